"""Ages of events in whole seconds: the times of a bias by time.

`Batch.time_gap_s` is a float32, which holds whole seconds to 194 days only; a bias by time takes
differences of two of them, which would be off by 8 seconds at 4 years. Filled in by `packing.py`,
read by `hstu_jax.model.relative_bias`; the loader of exports has the same formula
(`serving/user_batches.py`).
"""

import numpy as np
from jaxtyping import Int

from hstu_jax.config import schema

# Differences of any two fit int32: ages up to 67 years, and events up to 194 days past the request.
NEWEST_S = -(2**24)
OLDEST_S = 2**31 - 1 - 2**24


def are_read(config: schema.Config) -> bool:
    """Whether the configuration's model reads `Batch.age_s`."""
    tower = config.model.user_tower
    return tower.encoder == "hstu" and tower.hstu.stu.use_time_bias


def ages(
    request_time_s: Int[np.ndarray, "tokens"], timestamp_s: Int[np.ndarray, "tokens"]
) -> Int[np.ndarray, "tokens"]:
    """request - time as int32, no less than `NEWEST_S` and no more than `OLDEST_S`."""
    age = request_time_s.astype(np.int64) - timestamp_s
    return np.clip(age, NEWEST_S, OLDEST_S).astype(np.int32)
