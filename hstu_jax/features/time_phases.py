"""Where a time lies in periods such as the day or the week, as an angle.

Read by the `timestamp_layernorm` postprocessor. Computed here, on the host, because float32 on a
device holds Unix seconds to 128 s only. Used by `packing.py`.
"""

import numpy as np
from jaxtyping import Float, Int

# The reference's turn is 2 * 3.14, not 2 * pi.
_TURN = np.float32(2 * 3.14)


def time_phases(
    timestamp_s: Int[np.ndarray, "n"], periods: tuple[tuple[int, int], ...]
) -> Float[np.ndarray, "n P"]:
    """phase = ((floor(t / unit) mod count) / count) * 2 * 3.14 of every time and period.

    Args:
        timestamp_s: t, Unix seconds.
        periods: (unit in seconds, count = units of a period), each above 0.

    Returns:
        Radians, from 0 to below 6.28.

    Source: TorchEasyRec 1.3.16, timestamp layer-norm postprocessor. It divides in float32, where
    the quotient of a large time may round up to the next unit; here the unit is exact.
    """
    units = np.array([unit for unit, _ in periods], dtype=np.int64)
    counts = np.array([count for _, count in periods], dtype=np.int64)
    passed = timestamp_s.astype(np.int64)[:, None] // units[None] % counts[None]
    return passed.astype(np.float32) / counts[None].astype(np.float32) * _TURN
