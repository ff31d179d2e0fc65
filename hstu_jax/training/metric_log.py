"""Where metrics go: `metrics.jsonl`, TensorBoard, and the progress line on the screen.

One JSON object per log point, `{"step": ..., "kind": "train" | "validation", ...}`. A resumed run
first drops what was logged after its checkpoint, so the file reads as if it had never stopped.
"""

import json
import os
import pathlib
from collections.abc import Mapping


class MetricLog:
    """Writes scalars of one run.

    Args:
        workdir: folder of the run.
        start_step: step the run starts from; later lines of an earlier attempt are dropped.
        use_tensorboard: also write TensorBoard events to `<workdir>/tensorboard`.
        is_writer: False writes nothing, since another process of the run does.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        start_step: int,
        use_tensorboard: bool,
        is_writer: bool = True,
    ):
        self._file, self._board = None, None
        if not is_writer:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = path.open("a")
        if use_tensorboard:
            import tensorboardX  # slow to import, and not needed without it

            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Logs scalars of one kind at a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line a killed run was writing
            continue
        if record["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def progress_line(
    step: int, num_steps: int, values: Mapping[str, float], *, remaining_s: float
) -> str:
    """One line for the screen: step, loss, recalls, rates, share of time waiting for data."""
    recalls = "  ".join(
        f"{name} {value:.3f}" for name, value in values.items() if "recall@" in name
    )
    return (
        f"step {step:>6}/{num_steps}  loss {values['loss']:.4f}  {recalls}  "
        f"{values['users_per_s']:,.0f} users/s  {values['tokens_per_s']:,.0f} tokens/s  "
        f"data wait {values['data_wait_share']:.0%}  left {remaining_s:,.0f} s"
    )
