"""Which tiles the GPU kernels visit: exactly those with a visible pair, counted pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import cases, layout, tile_runs
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import oracle

# Small tiles, so that few tokens already leave holes between the tiles of a mask.
BLOCK_Q, BLOCK_K = 4, 2
LENGTHS = ((40, 3, 17), (21, 0, 40), (), (1, 60))
RULES = {
    "causal": MaskRule(),
    "context": MaskRule(contextual_len=1),
    "window": MaskRule(max_attn_len=5),
    "context and window": MaskRule(contextual_len=1, max_attn_len=3),
    # Two segments in one query tile: their prefixes are far apart.
    "semi-local": MaskRule(sla_k1=3, sla_k2=2),
}


def _visited_pairs(bounds, block_q=BLOCK_Q, block_k=BLOCK_K):
    run = jax.jit(tile_runs.visited_tiles, static_argnames=("block_q", "block_k"))
    return np.asarray(run(bounds, block_q=block_q, block_k=block_k))


def _case(rule):
    case = cases.Case("", LENGTHS, rule, row_len=64)
    built = cases.build_layout(case)
    intervals = layout.slot_intervals(built, None, rule=rule, padded_len=64)
    bounds = jnp.stack([x for i in intervals for x in (i.start, i.end)], 1)
    return bounds, oracle.case_mask(case)


def _walk(runs):
    """The tiles that a kernel walks, [R, T, N] counts."""
    counts, bounds = np.asarray(runs.counts), np.asarray(runs.bounds)
    num_rows, num_tiles, _ = counts.shape
    seen = {}
    for row in range(num_rows):
        for tile in range(num_tiles):
            ranges = bounds[row, tile, : counts[row, tile, 0]]
            seen[row, tile] = [other for first, end in ranges for other in range(first, end)]
    return seen


@pytest.mark.parametrize("name", list(RULES))
def test_visited_tiles_are_exactly_those_of_the_mask(name):
    bounds, mask = _case(RULES[name])
    by_tile = mask.reshape(len(LENGTHS), 64 // BLOCK_Q, BLOCK_Q, 64 // BLOCK_K, BLOCK_K)
    exact = by_tile.any(axis=(2, 4))
    np.testing.assert_array_equal(_visited_pairs(bounds), exact)
    for visited in (exact, exact.swapaxes(1, 2)):
        walked = _walk(tile_runs.runs_of(jnp.asarray(visited)))
        for (row, tile), others in walked.items():
            # In ascending order, each once, and no other.
            assert others == np.flatnonzero(visited[row, tile]).tolist()


def test_cost_follows_the_window_not_the_square_of_the_length():
    visits = {}
    for window in (0, 8):
        bounds, _ = _case(MaskRule(max_attn_len=window))
        visits[window] = int(_visited_pairs(bounds).sum())
    # 4 queries with a window of 8 reach over 12 keys: at most 7 tiles of 2 keys each.
    num_query_tiles = sum(-(-length // BLOCK_Q) + 1 for row in LENGTHS for length in row if length)
    assert visits[8] <= 7 * num_query_tiles
    assert visits[8] < visits[0] / 2


def test_runs_at_the_limit_of_their_capacity():
    alternating = jnp.asarray([[[True, False, True, False, True], [False] * 5, [True] * 5]])
    runs = tile_runs.runs_of(alternating)
    assert runs.counts[0, :, 0].tolist() == [3, 0, 1]
    assert runs.bounds.shape == (1, 3, 3, 2)
    assert runs.bounds[0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert runs.bounds[0, 2, 0].tolist() == [0, 5]
