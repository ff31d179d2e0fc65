"""Training with the attention kernels, run step by step, against training with `xla`."""

import jax
import numpy as np
import pytest

from hstu_jax.training import run as run_lib
from pallas_kernels.hstu_attention import pallas_tpu_kernels, triton_kernels
from tests.training.small_config import small_config, with_two_tables

NUM_STEPS = 3


def _train(store, workdir, kernel):
    """Losses and last state of some steps; the last layer is computed for one token per user."""
    config = with_two_tables(
        small_config(
            store,
            workdir,
            model__kernel=kernel,
            # Steps that follow the gradients: Adam's first ones follow their signs alone, also
            # where rounding decides the sign.
            train__dense_optimizer__kind="sgd",
            train__dense_optimizer__beta2=0.999,
            train__dense_optimizer__lr=0.1,
        )
    )
    run = run_lib.build_run(config, store, devices=jax.devices()[:1])
    state, losses = run_lib.init_state(run), []
    for number in range(NUM_STEPS):
        state, metrics = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
        losses.append(float(metrics.loss_sum) / float(metrics.num_queries))
    tables = {name: table.weights for name, table in state.tables.items()}
    return losses, jax.device_get((state.params, tables))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kernel", "module", "names"),
    [
        ("pallas_triton_interpret", triton_kernels, ("forward", "dq", "dkv")),
        (
            "pallas_tpu_interpret",
            pallas_tpu_kernels,
            ("forward", "backward_query", "backward_key_value"),
        ),
    ],
)
def test_training_with_a_kernel_equals_xla(
    small_store, tmp_path, kernel, module, names, monkeypatch
):
    traced = []
    for name in names:
        right = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, _of=right, _n=name, **k: traced.append(_n) or _of(*a, **k),
        )
    losses, expected = _train(small_store, tmp_path / "xla", "xla")
    assert traced == []
    kernel_losses, actual = _train(small_store, tmp_path / "kernel", kernel)
    assert set(traced) == set(names)
    # Other roundings somewhere: it is not the same program twice.
    assert not all(map(np.array_equal, jax.tree.leaves(actual), jax.tree.leaves(expected)))
    np.testing.assert_allclose(kernel_losses, losses, rtol=1e-6)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        # Some hundred roundings of the largest weight over three steps.
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=str(path))
