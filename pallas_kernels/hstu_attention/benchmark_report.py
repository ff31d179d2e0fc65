"""Rows of the attention benchmark: as printed lines and as JSON with hardware and versions.

What is measured is decided in `benchmark.py`.
"""

import dataclasses
import json
import pathlib

from pallas_kernels import timing
from pallas_kernels.hstu_attention import self_check

# What packed ragged rows should keep of the rate of full ones.
_PACKED_TARGET = 0.8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: a size, an implementation, a kind of pass, and what was measured.

    Args:
        batch: kind of the batch.
        length: history tokens of a full row, N.
        width: of q, k and v per head.
        implementation: name.
        users: in the batch.
        rows: R.
        heads: H.
        contextual: contextual tokens of each user.
        window: max_attn_len of the mask.
        dtype: of q, k and v.
        visible_pairs: pairs of tokens that the mask lets through, one head.
        passes: "forward", "both", or "backward": the difference of the two, of their fastest runs
            and of their medians.
        skipped: why there are no figures; empty if there are.
        min_ms: fastest run.
        median_ms: median run.
        num_runs: timed runs.
        compile_s: lowering and compilation.
        useful_flops: operations of visible pairs.
        executed_flops: operations of visited tiles; None where they are not known.
        tflops: useful rate of the fastest run.
        executed_tflops: executed rate of the fastest run.
        matmul_share: `tflops` over the measured rate of a matrix product.
        temp_bytes: temporary memory of the compiled program; None if the backend does not tell.
        device_peak_bytes: high-water mark of the process; None if the backend does not tell.
        is_peak_of_row: the mark rose in this row; else it is an upper bound only.
    """

    batch: str
    length: int
    width: int
    implementation: str
    users: int
    rows: int
    heads: int
    contextual: int
    window: int
    dtype: str
    visible_pairs: int
    passes: str = ""
    skipped: str = ""
    min_ms: float | None = None
    median_ms: float | None = None
    num_runs: int | None = None
    compile_s: float | None = None
    useful_flops: int | None = None
    executed_flops: int | None = None
    tflops: float | None = None
    executed_tflops: float | None = None
    matmul_share: float | None = None
    temp_bytes: int | None = None
    device_peak_bytes: int | None = None
    is_peak_of_row: bool = False

    def skipped_because(self, reason: str, *, passes: str = "") -> "Row":
        """Returns this row without figures."""
        return dataclasses.replace(self, skipped=" ".join(reason.split()), passes=passes)

    def timed(
        self,
        result: timing.Timing,
        *,
        passes: str,
        useful: int,
        executed: int | None,
        matmul_tflops: float,
        peak_before: int | None,
        peak_after: int | None,
    ) -> "Row":
        """Returns this row with figures.

        Args:
            result: of `timing.time_function`.
            passes: what was timed.
            useful: operations of visible pairs.
            executed: operations of visited tiles, if known.
            matmul_tflops: rate of a matrix product on this device.
            peak_before: the device's high-water mark before the row.
            peak_after: and after it.
        """
        filled = dataclasses.replace(
            self,
            passes=passes,
            min_ms=result.min_ms,
            median_ms=result.median_ms,
            num_runs=result.num_runs,
            compile_s=result.compile_s,
            temp_bytes=None if result.temp_bytes < 0 else result.temp_bytes,
            device_peak_bytes=peak_after,
            is_peak_of_row=peak_after is not None and peak_after > (peak_before or 0),
        )
        return filled.with_rates(useful, executed, matmul_tflops)

    def with_rates(self, useful: int, executed: int | None, matmul_tflops: float) -> "Row":
        """Returns this row with the rates of its fastest run."""
        # Operations a millisecond are 1e-9 of TFLOP/s.
        tflops = useful / self.min_ms / 1e9
        return dataclasses.replace(
            self,
            useful_flops=useful,
            executed_flops=executed,
            tflops=tflops,
            executed_tflops=None if executed is None else executed / self.min_ms / 1e9,
            matmul_share=tflops / matmul_tflops,
        )


def backward_row(forward: Row, both: Row, matmul_tflops: float) -> Row | None:
    """Returns the backward pass as the difference of two rows; None if they do not tell it."""
    if forward.skipped or both.skipped or both.min_ms <= forward.min_ms:
        return None
    row = dataclasses.replace(
        both,
        passes="backward",
        min_ms=both.min_ms - forward.min_ms,
        median_ms=both.median_ms - forward.median_ms,
        compile_s=None,
        temp_bytes=None,
        device_peak_bytes=None,
        is_peak_of_row=False,
    )
    executed = (
        None
        if both.executed_flops is None or forward.executed_flops is None
        else both.executed_flops - forward.executed_flops
    )
    return row.with_rates(both.useful_flops - forward.useful_flops, executed, matmul_tflops)


@dataclasses.dataclass
class Report:
    """Collects rows, prints each at once, writes all to a file.

    Args:
        json_path: file to write, or None.
        command: arguments of the benchmark.
        rows: so far.
        matmul_tflops: measured rate by dtype.
        has_failed: a kernel was refused or a row failed.
    """

    json_path: str | None
    command: list[str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    matmul_tflops: dict[str, float] = dataclasses.field(default_factory=dict)
    has_failed: bool = False

    def add(self, row: Row) -> None:
        """Prints and keeps a row; after "forward" and "both" of a case, the difference too."""
        self.rows.append(row)
        print_row(row)
        before = self.rows[-2] if len(self.rows) > 1 else row
        if (before.passes, row.passes) == ("forward", "both") and _case(before) == _case(row):
            difference = backward_row(before, row, self.matmul_tflops[row.dtype])
            if difference is not None:
                self.add(difference)

    def print_ratios(self) -> None:
        """Prints what packed ragged rows keep of the rate of full rows, where both were timed."""
        timed = [row for row in self.rows if not row.skipped]
        dense = {_packing_case(row): row for row in timed if row.batch == "dense"}
        for row in timed:
            full = dense.get(_packing_case(row))
            if row.batch == "ragged_packed" and full is not None:
                is_alike = abs(row.rows - full.rows) <= full.rows // 4
                target = f"target {_PACKED_TARGET:.0%}" if is_alike else "no target"
                print(
                    f"packed ragged / dense: {row.tflops / full.tflops:.0%} ({target}), "
                    f"{row.implementation}, N {row.length}, width "
                    f"{row.width}, {row.passes}, {row.rows} rows of {row.users} users against "
                    f"{full.rows}"
                )

    def save(self) -> None:
        """Writes everything so far, if there is a file to write to."""
        if self.json_path is None:
            return
        content = {
            "command": self.command,
            "machine": timing.machine() | {"driver": self_check.driver_version()},
            "matmul_tflops": self.matmul_tflops,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        pathlib.Path(self.json_path).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _case(row):
    return row.batch, row.length, row.width, row.implementation, row.users, row.dtype


def _packing_case(row):
    return row.length, row.width, row.implementation, row.passes, row.dtype


def print_header() -> None:
    """Prints the names of the columns."""
    print(
        f"{'batch':>13} {'N':>5} {'width':>5} {'implementation':>14} {'passes':>8} {'min ms':>9} "
        f"{'median':>9} {'TFLOP/s':>8} {'executed':>8} {'matmul %':>8} {'temp MiB':>9} "
        f"{'peak MiB':>10} {'compile s':>9}"
    )


def print_row(row: Row) -> None:
    """Prints one line."""
    start = f"{row.batch:>13} {row.length:>5} {row.width:>5} {row.implementation:>14}"
    if row.skipped:
        print(f"{start} {row.passes or 'all':>8} skipped: {row.skipped}", flush=True)
        return
    share = None if row.matmul_share is None else 100 * row.matmul_share
    temp, peak = (None if x is None else x / 2**20 for x in (row.temp_bytes, row.device_peak_bytes))
    mark = "" if peak is None or row.is_peak_of_row else "<="
    print(
        f"{start} {row.passes:>8} {row.min_ms:>9.3f} {row.median_ms:>9.3f} "
        f"{_figure(row.tflops, 4):>8} {_figure(row.executed_tflops, 4):>8} {_figure(share):>8} "
        f"{_figure(temp):>9} {mark + _figure(peak):>10} {_figure(row.compile_s, 2):>9}",
        flush=True,
    )


def _figure(value, digits=1):
    return "-" if value is None else f"{value:.{digits}f}"
