"""The attention benchmark runs with tiny sizes, and its batches are what they are said to be."""

import json

import jax
import numpy as np
import pytest

from pallas_kernels import timing
from pallas_kernels.hstu_attention import (
    api,
    benchmark,
    benchmark_baselines,
    benchmark_batches,
    benchmark_report,
    flops,
    reference,
)
from pallas_kernels.hstu_attention.layout import from_lengths
from pallas_kernels.hstu_attention.mask import MaskRule

TINY = "--lengths 16 --batch 4 --heads 1 --widths 4 --runs 1".split()


def _words(text):
    return [line.split() for line in text.splitlines()]


def test_all_batches_and_implementations_reach_the_file(tmp_path, capsys):
    path = tmp_path / "rows.json"
    batches = "dense,ragged_padded,ragged_packed"
    flags = ["--passes", "forward", "--batches", batches, "--json", str(path)]
    benchmark.main([*TINY, *flags])
    stored = json.loads(path.read_text())
    assert stored["machine"]["jax"] == jax.__version__ and stored["command"][:2] == TINY[:2]
    assert stored["matmul_tflops"]["float32"] > 0
    rows = {(row["batch"], row["implementation"]): row for row in stored["rows"]}
    names = ("xla", "reference", "softmax")
    assert list(rows) == [(batch, name) for batch in batches.split(",") for name in names]
    skipped = rows.pop(("ragged_packed", "softmax"))
    assert "with one user a row only" in skipped["skipped"] and skipped["min_ms"] is None
    for row in rows.values():
        assert not row["skipped"] and row["passes"] == "forward" and row["num_runs"] == 1
        useful = flops.attention_flops(
            row["visible_pairs"], num_heads=1, qk_dim=4, v_dim=4, passes="forward"
        )
        assert row["tflops"] == pytest.approx(useful / row["min_ms"] / 1e9)
        share = row["tflops"] / stored["matmul_tflops"]["float32"]
        assert row["matmul_share"] == pytest.approx(share)
    assert rows["dense", "xla"]["visible_pairs"] == 4 * 16 * 17 // 2
    padded, packed = rows["ragged_padded", "xla"], rows["ragged_packed", "xla"]
    assert padded["visible_pairs"] == packed["visible_pairs"]
    assert padded["rows"] == 4 > packed["rows"]
    # Blocks of 16 tokens, one a row, 2 products of width 4.
    assert packed["executed_flops"] == packed["rows"] * 16 * 16 * 2 * 2 * 4
    assert rows["dense", "softmax"]["executed_flops"] is None
    ratios = [words for words in _words(capsys.readouterr().out) if words[0] == "packed"]
    assert [words[7] for words in ratios] == ["xla,", "reference,"]


def test_lines_of_forward_both_and_their_difference(capsys):
    benchmark.main([*TINY, "--implementations", "softmax", "--passes", "forward,both"])
    lines = _words(capsys.readouterr().out)
    assert jax.__version__ + "," in lines[0]
    assert [line[:5] for line in lines[3:5]] == [
        ["dense", "16", "4", "softmax", "forward"],
        ["dense", "16", "4", "softmax", "both"],
    ]
    # The difference is left out where the clock of a tiny run says that there is none.
    assert all(line[4] == "backward" for line in lines[5:])


@pytest.mark.parametrize("flag", ["--contextual", "--window"])
def test_softmax_is_skipped_for_other_masks(flag, capsys):
    benchmark.main([*TINY, flag, "2", "--implementations", "softmax"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[3:6] == ["softmax", "all", "skipped:"]
    assert "plain causal mask only" in last


def _timing(min_ms):
    return timing.Timing(min_ms, min_ms + 1, compile_s=2.0, temp_bytes=-1, num_runs=3)


def _row(passes, min_ms, *, useful, executed, peaks=(None, None)):
    row = benchmark_report.Row("dense", 16, 4, "xla", 4, 4, 1, 0, 0, "float32", visible_pairs=544)
    before, after = peaks
    return row.timed(
        _timing(min_ms),
        passes=passes,
        useful=useful,
        executed=executed,
        matmul_tflops=2.0,
        peak_before=before,
        peak_after=after,
    )


def test_backward_is_the_difference():
    forward = _row("forward", 2.0, useful=10**9, executed=2 * 10**9)
    both = _row("both", 7.0, useful=35 * 10**8, executed=10 * 10**9)
    row = benchmark_report.backward_row(forward, both, 2.0)
    assert (row.passes, row.min_ms, row.median_ms) == ("backward", 5.0, 5.0)
    assert row.tflops == pytest.approx(0.5)  # 2.5e9 operations in 5 ms
    assert row.executed_tflops == pytest.approx(1.6)
    assert row.matmul_share == pytest.approx(0.25)
    assert row.temp_bytes is None and row.compile_s is None
    assert benchmark_report.backward_row(both, forward, 2.0) is None


def test_peak_is_marked_where_it_is_only_a_bound(capsys):
    mebibyte = 2**20
    for peaks, text in (((mebibyte, 3 * mebibyte), "3.0"), ((mebibyte, mebibyte), "<=1.0")):
        row = _row("forward", 1.0, useful=1, executed=None, peaks=peaks)
        benchmark_report.print_row(row)
        assert capsys.readouterr().out.split()[11] == text


def test_sizes_that_do_not_fit_are_skipped_with_a_line(capsys):
    benchmark.main([*TINY, "--implementations", "reference", "--memory_gib", "1e-6"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[3:6] == ["reference", "all", "skipped:"]
    assert "needs about" in last and "GiB, 1e-06 are there" in last


def test_memory_estimate_is_above_what_the_program_asks_for():
    layout = from_lengths(np.full(4, 256, np.int32), row_len=256)
    arrays = [benchmark_baselines.normal(seed, (4, 256, 2, 8), "float32") for seed in range(4)]

    def run(q, k, v, g):
        def attend(q, k, v):
            return reference.hstu_attention(
                q, k, v, layout=layout, rule=MaskRule(), alpha=0.3, divisor=16.0
            )

        output, vjp = jax.vjp(attend, q, k, v)
        return output, vjp(g)

    memory = jax.jit(run).lower(*arrays).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    estimated = benchmark_baselines.estimated_bytes(
        "reference", layout, num_heads=2, width=8, dtype="float32"
    )
    assert needed < estimated < 3 * needed


def test_softmax_baseline_is_causal_softmax_over_the_row():
    q, k, v = (benchmark_baselines.normal(seed, (2, 5, 1, 4), "float32") for seed in range(3))
    lengths = np.array([5, 3], np.int32)
    actual = np.asarray(benchmark_baselines.softmax_attention(q, k, v, jax.numpy.asarray(lengths)))
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in (q, k, v))
    for row, length in enumerate(lengths):
        for query in range(length):
            weights = np.exp(k[row, : query + 1] @ q[row, query] / 2)
            expected = weights @ v[row, : query + 1] / weights.sum()
            np.testing.assert_allclose(actual[row, query, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_refused_kernel_is_printed_and_ends_in_status_1(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*TINY, "--implementations", "pallas_triton,xla"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("self-check: device='cpu': pallas_triton needs an NVIDIA GPU")
    assert "skipped: device='cpu'" in lines[-2] and lines[-1].split()[3:5] == ["xla", "both"]


def test_quick_checks_first_then_times_its_sizes(monkeypatch, capsys):
    """The presets, as on a device with a kernel: what is timed there is cut to nothing here."""
    timed = []
    monkeypatch.setattr(api, "auto_implementation", lambda: "pallas_triton")
    monkeypatch.setattr(benchmark, "_self_check", lambda *case: timed.append(case) or "")
    monkeypatch.setattr(benchmark_baselines, "matmul_tflops", lambda dtype: 1.0)
    monkeypatch.setattr(
        benchmark,
        "_run_size",
        lambda kind, longest, width, names, args, report: timed.append(
            (kind, longest, width, args.batch, args.dtype, args.passes, list(names))
        ),
    )
    names = ["pallas_triton", "xla", "softmax"]
    checks = [(name, "bfloat16", 128) for name in names]
    benchmark.main(["--quick"])
    shared = ("bfloat16", "forward,both", names)
    assert timed == [
        *checks,
        ("dense", 1024, 128, 32, *shared),
        ("dense", 4096, 128, 32, *shared),
        *checks,
        ("ragged_packed", 4096, 128, 128, *shared),
    ]
    timed.clear()
    benchmark.main(["--all", "--widths", "64", "--implementations", "xla"])
    sizes = [case[:4] for case in timed if case[0] != "xla"]
    assert len(sizes) == 7 * 3 and sizes[-1] == ("ragged_packed", 16384, 64, 32)
    assert timed[-1][-1] == ["xla"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick: no kernel runs on this device; name sizes and implementations, as"),
        (["--all"], "--all: no kernel runs on this device; name sizes and implementations, as in"),
        (["--lengths=16,x"], "--lengths=16,x: must be at least 1 (a list has commas between)"),
        (["--batch=0"], "--batch=0: must be at least 1"),
        (["--quick", "--all"], "--quick, --all: two sets of sizes; give one of them"),
        (["--passes=backward"], "--passes=backward: knows 'forward', 'both', not 'backward'"),
        (["--batches=dense,full"], "--batches=dense,full: knows 'dense', 'spread', "),
        (["--implementations=cuda"], "--implementations=cuda: knows 'xla', 'reference', "),
    ],
)
def test_benchmark_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_ragged_lengths_have_a_mean_of_a_quarter():
    for num_users, longest in ((32, 4096), (128, 512)):
        lengths = benchmark_batches.ragged_lengths(num_users, longest)
        assert lengths.mean() == pytest.approx(longest / 4, rel=0.01)
        assert lengths.min() >= 1 and lengths.max() <= longest
        assert np.median(lengths) < 0.8 * lengths.mean()
        again = benchmark_batches.ragged_lengths(num_users, longest)
        np.testing.assert_array_equal(lengths, again)


def test_first_fit_takes_the_first_row_with_room():
    rows = benchmark_batches.first_fit(np.array([6, 5, 4, 10, 3, 2]), 10)
    assert rows == [[6, 4], [5, 3, 2], [10]]


def test_packed_batch_holds_the_users_of_the_padded_one():
    sizes = dict(num_users=32, longest=256, rule=MaskRule(contextual_len=3), block_len=64)
    padded = benchmark_batches.build_batch("ragged_padded", **sizes)
    packed = benchmark_batches.build_batch("ragged_packed", **sizes)
    assert sorted(padded.lengths) == sorted(packed.lengths)
    assert padded.layout.num_rows == 32 and packed.layout.num_rows <= 12
    assert packed.layout.row_len == padded.layout.row_len == 259
    dense = benchmark_batches.build_batch("dense", **sizes)
    assert dense.lengths.tolist() == [259] * 32
    spread = benchmark_batches.build_batch("spread", **sizes)
    assert (spread.lengths.min(), spread.lengths.max()) == (32 + 3, 256 + 3)
    with pytest.raises(ValueError, match=r"batches='full': unknown kind; use dense, spread, "):
        benchmark_batches.build_batch("full", **sizes)
