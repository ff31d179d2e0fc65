"""The aligned start: shapes stay, the item's path is an identity, the rest keeps its value."""

import jax
import numpy as np
import pytest

from configs import kuairand
from hstu_jax.config import resolve
from hstu_jax.model import initialization, match


@pytest.fixture(scope="module", params=["hstu", "mean"])
def trees(request):
    raw = kuairand.get_config("sample")
    raw.model.user_tower.encoder = request.param
    config = resolve.resolve(raw)
    stu = config.model.user_tower.hstu.stu
    model = match.build_model(config.model, config.features, config.feature_groups)
    params = match.init_params(model, jax.random.key(0))
    width = stu.num_heads * stu.hidden_dim
    return params, initialization.align(params, value_width=width), width


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_only_the_items_path_changes(trees):
    before, after, _ = map(lambda t: leaves(t) if isinstance(t, dict) else t, trees)
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    ends = ("input_projection", "layers_0", "action_mlp/norm", "uvqk_kernel", "output_kernel")
    for name in changed:
        assert any(end in name for end in ends), name
    (item,) = [v for n, v in after.items() if "item_tower" in n and n.endswith("kernel")]
    np.testing.assert_array_equal(item, np.eye(len(item)))


def test_attention_starts_as_a_multiple_of_the_identity(trees):
    _, after, width = trees
    after = leaves(after)
    for name in [n for n in after if n.endswith("uvqk_kernel")]:
        values = after[name][:, width : 2 * width]
        out = after[name.replace("uvqk", "output")][width : 2 * width]
        np.testing.assert_allclose(values @ out, 5 * np.eye(len(values)), atol=1e-5)


def test_without_a_gate_attention_starts_as_the_identity():
    rng = np.random.default_rng(0)
    layer = {"uvqk_kernel": rng.normal(size=(4, 10)), "output_kernel": rng.normal(size=(6, 4))}
    layer = {name: values.astype(np.float32) for name, values in layer.items()}
    params = {"layers_0": jax.tree.map(jax.numpy.asarray, layer)}
    after = initialization.align(params, value_width=6, has_gate=False)["layers_0"]
    values = after["uvqk_kernel"][:, :6]
    np.testing.assert_allclose(values @ after["output_kernel"], np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(after["uvqk_kernel"][:, 6:], layer["uvqk_kernel"][:, 6:])


def test_orthonormal_of_tall_and_wide():
    rng = np.random.default_rng(0)
    tall = initialization.orthonormal(rng.normal(size=(6, 4)))
    np.testing.assert_allclose(tall.T @ tall, np.eye(4), atol=1e-12)
    wide = initialization.orthonormal(rng.normal(size=(4, 6)))
    np.testing.assert_allclose(wide @ wide.T, np.eye(4), atol=1e-12)


def test_time_in_the_output_and_maps_of_users_start_small():
    """The Linear of vector and times passes the vector on; users' matrices are a tenth."""
    rng = np.random.default_rng(0)
    params = {
        "time_combiner": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)},
        "action_mlp": {"weights_norm": {"scale": np.ones((3, 4)), "bias": np.ones((3, 4))}},
    }
    after = initialization.align(jax.tree.map(jax.numpy.asarray, params), value_width=0)
    np.testing.assert_array_equal(after["time_combiner"]["kernel"], np.eye(6, 4))
    np.testing.assert_array_equal(after["time_combiner"]["bias"], 0)
    np.testing.assert_allclose(after["action_mlp"]["weights_norm"]["scale"], 0.1)
    np.testing.assert_array_equal(after["action_mlp"]["weights_norm"]["bias"], 1)
