"""Random masks, segments, targets and poison for the property tests, and what results must be.

One generator and one comparison for every path: `test_hstu_attention_property.py` (xla),
`test_pallas_triton_property.py` and `test_pallas_tpu_property.py`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import layout
from pallas_kernels.hstu_attention.mask import MaskRule, key_intervals
from tests.pallas_kernels import dense, oracle

ALPHA, DIVISOR = 0.6, 5.0


@dataclasses.dataclass(frozen=True)
class Example:
    """One drawn batch.

    Args:
        rule: the mask.
        starts: flat index of each segment's first token; unused entries at the end.
        lengths: tokens of each segment; 0 = unused or empty.
        targets: targets of each segment.
        seed: of the values.
        poisoned: a segment with tokens, which of q, k, v and the cotangent holds one NaN there, and
            how far into the segment; None = none.
        num_rows: R.
        row_len: L.
    """

    rule: MaskRule
    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    seed: int
    poisoned: tuple[int, int, float] | None
    num_rows: int
    row_len: int

    def layout(self, block_len: int) -> layout.SequenceLayout:
        """Its layout in blocks of that length, with as many entries for every example."""
        pairs, count = layout.build_block_pairs(
            self.starts,
            self.lengths,
            num_rows=self.num_rows,
            row_len=self.row_len,
            block_len=block_len,
            rule=self.rule,
            max_pairs=layout.max_block_pairs(self.num_rows, self.row_len, block_len),
            num_targets=self.targets,
        )
        return layout.SequenceLayout(
            starts=self.starts,
            lengths=self.lengths,
            block_pairs=pairs[None],
            num_block_pairs=np.array([count], np.int32),
            num_rows=self.num_rows,
            row_len=self.row_len,
            block_len=block_len,
        )

    def bounds(self) -> np.ndarray:
        """Mask as data [R, 4, L]: start, end, start, end of the keys of each slot's query.

        A mask of one interval gets an empty second one, so that all examples fit one program.
        """
        owner = self.owners()
        segment = np.maximum(owner, 0)
        first_slot = self.starts[segment] % self.row_len
        position = np.where(owner < 0, 0, np.arange(self.row_len) - first_slot)
        intervals = key_intervals(
            position, self.lengths[segment], self.targets[segment], rule=self.rule, xp=np
        )
        bounds = np.zeros((self.num_rows, 4, self.row_len), np.int32)
        for index, interval in enumerate(intervals):
            bounds[:, 2 * index] = np.where(owner < 0, 0, interval.start + first_slot)
            bounds[:, 2 * index + 1] = np.where(owner < 0, 0, interval.end + first_slot)
        return bounds

    def owners(self) -> np.ndarray:
        """Segment of each slot [R, L], -1 in padding."""
        owner = np.full(self.num_rows * self.row_len, -1, np.int32)
        for index, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            owner[start : start + length] = index
        return owner.reshape(self.num_rows, self.row_len)


@st.composite
def rules(draw) -> MaskRule:
    """Any mask: contextual prefix with a window or without, full tail, semi-local."""
    numbers = st.integers(0, 4)
    contextual = draw(numbers)
    if draw(st.booleans()):
        return MaskRule(contextual_len=contextual, sla_k1=draw(numbers), sla_k2=draw(numbers))
    window = draw(st.sampled_from((0, 1, 3, 20)))
    full = draw(numbers) if window else 0
    return MaskRule(contextual_len=contextual, max_attn_len=window, min_full_attn_len=full)


@st.composite
def examples(
    draw, *, num_rows: int, row_len: int, num_segments: int, rule: MaskRule | None = None
) -> Example:
    """Segments with gaps in all rows, with targets; padding is NaN in all, a segment in many.

    Args:
        draw: given by hypothesis.
        num_rows: R.
        row_len: L.
        num_segments: S, unused entries included.
        rule: the mask; None = any.
    """
    rule = draw(rules()) if rule is None else rule
    starts, lengths, targets = [], [], []
    for row in range(num_rows):
        slot = draw(st.integers(0, 2))
        while slot < row_len and len(starts) < (row + 1) * num_segments // num_rows:
            length = draw(st.integers(0, row_len - slot))
            length = length if length >= rule.contextual_len else 0
            starts.append(row * row_len + slot)
            lengths.append(length)
            targets.append(draw(st.integers(0, max(length - rule.contextual_len, 0))))
            slot += length + draw(st.integers(0, row_len // 2)) * draw(st.booleans())
            slot += length == 0
    unused = num_segments - len(starts)
    starts += [num_rows * row_len] * unused
    is_used = [index for index, length in enumerate(lengths) if length]
    poisoned = None
    if is_used and draw(st.booleans()):
        segment, which = draw(st.sampled_from(is_used)), draw(st.integers(0, 3))
        poisoned = (segment, which, draw(st.floats(0, 1, exclude_max=True)))
    return Example(
        rule,
        *(np.array(a, np.int32) for a in (starts, lengths + [0] * unused, targets + [0] * unused)),
        seed=draw(st.integers(0, 2**31)),
        poisoned=poisoned,
        num_rows=num_rows,
        row_len=row_len,
    )


def budgets(num_programs: int, *, num_short: int | None = None) -> list:
    """(program, examples) pairs: 300 examples in every run, ten times as many with -m long.

    Args:
        num_programs: how many there are.
        num_short: the first so many share the examples of every run; None = all.
    """
    num_short = num_short or num_programs
    every = [pytest.param(number, 300 // num_short) for number in range(num_short)]
    return every + [
        pytest.param(number, 3000 // num_programs, marks=pytest.mark.long)
        for number in range(num_programs)
    ]


def assert_as_dense(
    example: Example, run: Callable[..., tuple], *, heads: int, qk_dim: int, v_dim: int
) -> None:
    """Compares `run(q, k, v, g) -> (o, dq, dk, dv)` with the dense formula in float64.

    Padding holds NaN. A segment that holds a NaN must be NaN as a whole, and no other token may
    notice either.
    """
    shape = example.num_rows, example.row_len
    values = oracle.random_inputs(
        *shape, heads=heads, qk_dim=qk_dim, v_dim=v_dim, seed=example.seed
    )
    values[0] *= 2 / qk_dim**0.5  # logits spread by about 2 at every width
    mask = oracle.dense_mask(example.starts, example.lengths, example.targets, *shape, example.rule)
    expected = dense.attention(*values, mask, ALPHA, DIVISOR)
    owner = example.owners()
    for x in values:
        x[owner < 0] = np.nan
    is_hit, which = np.zeros(shape, bool), -1
    if example.poisoned is not None:
        segment, which, depth = example.poisoned
        is_hit = owner == segment
        row, slot = divmod(int(example.starts[segment]), example.row_len)
        values[which][row, slot + int(depth * example.lengths[segment]), -1, 0] = np.nan
    results = run(*values)
    for name, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
        result = np.asarray(result)
        # A cotangent that is not finite reaches gradients only.
        lost = is_hit & (name != "o" or which != 3)
        assert np.isnan(result[lost]).all(), name
        # Relative to the largest value: some 16 roundings of a sum of up to 37 terms.
        atol = 2e-6 * max(np.abs(e).max(), 1e-3)
        np.testing.assert_allclose(result[~lost], e[~lost], rtol=0, atol=atol, err_msg=name)
