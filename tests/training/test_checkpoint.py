"""Checkpoints on disk. What a resumed run makes of them is in `test_loop.py`."""

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.training import checkpoint
from hstu_jax.training import state as state_lib


def state_at(step):
    return state_lib.TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.full((2, 3), float(step))},
        opt_state=(),
        tables={},
        batch_stats={},
        ema=None,
    )


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    record = checkpoint.Record(config="", data_fingerprint="", num_steps=9)
    writer = checkpoint.Checkpointer(tmp_path / "checkpoints", keep_max=2)
    for step in (3, 6, 9):
        writer.save(state_at(step), record)
    writer.wait()
    assert writer.all_steps() == [6, 9]
    writer.close()
    reader = checkpoint.Checkpointer(tmp_path / "checkpoints", keep_max=None)
    restored = reader.restore(reader.latest_step(), jax.eval_shape(lambda: state_at(0)))
    reader.close()
    np.testing.assert_array_equal(restored.params["kernel"], np.full((2, 3), 9.0))
