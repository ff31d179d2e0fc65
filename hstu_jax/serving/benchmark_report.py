"""All measurements of serving as Markdown: `python -m hstu_jax.serving.benchmark_report`.

Run it from the repository's root, on a machine that does nothing else. It makes two exports of
models that were never trained (times do not depend on the values), in a temporary folder: the
sample's, and one of 3 layers, 128 wide, that reads 4,096 events. Then it runs `benchmark.py`, every
part in a process of its own so that memory is that part's, and prints tables for docs/serving.md.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from hstu_jax import launchers
from hstu_jax.config import resolve
from hstu_jax.serving import exporter, trained
from hstu_jax.training import run as run_lib

MODELS = ("sample", "wide")
_NUM_ITEMS = 5_000  # the sample's
_WIDE_LENGTH = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        argv: flags; None for the command line's.
    """
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.serving.benchmark_report")
    parser.add_argument("--config", default="configs/kuairand.py", help="of the sample's model")
    parser.add_argument("--endpoint", default="examples/http_endpoint.py")
    parser.add_argument("--lengths", default="128,1024,4096")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=8.0, help="of repeating a call, at most")
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--ivf_items", type=int, default=1_000_000)
    parser.add_argument("--hnsw_items", type=int, default=200_000)
    parser.add_argument("--wide_length", type=int, default=_WIDE_LENGTH, help="that it reads")
    parser.add_argument("--wide_layers", type=int, default=3)
    flags = launchers.parse_alone(parser, argv)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measure = _Measurement(pathlib.Path(folder), begun)
        latency = {}
        for name in MODELS:
            export = pathlib.Path(folder) / name
            export_untrained(name, export, flags)
            measure.say(f"{name}: exported")
            latency[name] = measure.run(
                "latency", export_dir=export, endpoint=flags.endpoint, lengths=flags.lengths,
                repeats=flags.repeats, seconds=flags.seconds,
            )  # fmt: skip
        search = measure.run("search", users=flags.users, items=flags.items)
        indexes = [
            measure.run("index", items=flags.ivf_items, kinds="ivf"),
            measure.run("index", items=flags.hnsw_items, kinds="hnsw"),
        ]
    print("\n".join(report(latency, search, indexes)))
    measure.say("done")


class _Measurement:
    """Runs parts of the benchmark in processes of their own and reads their figures."""

    def __init__(self, folder: pathlib.Path, begun: float) -> None:
        self._folder, self._begun = folder, begun

    def run(self, command: str, **flags: Any) -> dict[str, Any]:
        file = self._folder / "figures.json"
        given = [f"--{name}={value}" for name, value in flags.items()]
        # A launcher that started this process did not start those: it was asked already.
        module = [sys.executable, "-m", "hstu_jax.serving.benchmark", "--launcher=none"]
        whole = [*module, command, *given]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command_line = [*whole, f"--json={file}"]
        done = subprocess.run(
            command_line, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        # Not given to the process: tests put something without a file in place of sys.stderr.
        print(done.stdout, end="", file=sys.stderr, flush=True)
        self.say(f"{command}: measured")
        return json.loads(file.read_text())

    def say(self, what: str) -> None:
        seconds = time.perf_counter() - self._begun
        print(f"[{seconds:5.0f} s] {what}", file=sys.stderr, flush=True)


def export_untrained(name: str, folder: pathlib.Path, flags: argparse.Namespace) -> None:
    """Exports a model in its first state, for one user at a time, with invented items.

    Args:
        name: one of `MODELS`.
        folder: to make.
        flags: `config`, and of the wide model `wide_length` and `wide_layers`.
    """
    raw = runpy.run_path(flags.config)["get_config"]()
    if name == "wide":
        raw.model.user_tower.max_seq_len = flags.wide_length
        raw.model.user_tower.hstu.attn_num_layers = flags.wide_layers
        raw.data.block_len = 128
    config = resolve.resolve(raw)
    state = run_lib.untrained_state(config)
    ids = np.arange(1, _NUM_ITEMS + 1)
    exporter.export(
        trained.from_state(config, state, recorded=resolve.to_text(config)),
        folder,
        training_items=exporter.TrainingItems(ids=ids, counts=np.ones_like(ids)),
        item_rows=[("invented", pa.RecordBatch.from_pydict({"video_id": ids}))],
        options=exporter.ExportOptions(batch_sizes=(1,), platforms=("cpu",)),
    )


def report(
    latency: dict[str, dict], search: dict[str, Any], indexes: Sequence[dict[str, Any]]
) -> list[str]:
    """Lines of Markdown.

    Args:
        latency: figures of `benchmark latency` by model.
        search: of `benchmark search`.
        indexes: of `benchmark index`, one or more.
    """
    jax_version = importlib.metadata.version("jax")
    where = f"{os.cpu_count()} cores, {platform.machine()}, jax {jax_version}, CPU"
    lines = [f"Measured on {where}.", "", *_latency_tables(latency), ""]
    lines += [
        f"Exact top {search['k']} of {search['items']:,} items of width {search['dim']} for "
        f"{search['users']:,} users: {search['seconds']:.0f} s "
        f"({search['users'] / search['seconds']:,.0f} users/s) after {search['built_s']:.1f} s of "
        f"set-up, {search['peak_mib']:,} MiB resident at most ({search['before_mib']:,} before, "
        f"with the vectors). An array of all scores would take {search['matrix_mib']:,.0f} MiB; "
        "there is none.",
        "",
        "| index | items | recall against exact | built | one user p50 / p99 | a user in a batch "
        "| size |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in indexes:
        for kind in each["kinds"]:
            alone = kind["alone"]
            lines.append(
                f"| `{kind['kind']}` | {each['items']:,} | {kind['recall']:.4f} @{each['k']} "
                f"| {kind['built_s']:.0f} s | {alone['p50']:.1f} / {alone['p99']:.1f} ms "
                f"| {kind['batch_ms']:.2f} ms | {kind['mib']:,.0f} MiB |"
            )
    return lines


def _latency_tables(latency: dict[str, dict]) -> list[str]:
    lines = [
        "One user, times in ms; vector and top k in the process, HTTP is the whole request.",
        "",
        "| model | events (read) | vector: first | p50 | p99 | top k: p50 | p99 "
        "| HTTP: first | p50 | p99 | calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in latency.items():
        for own, over_http in zip(figures["lengths"], figures["http"]["lengths"], strict=True):
            vector, find, request = own["vector"], own["search"], over_http["request"]
            lines.append(
                f"| {name} | {own['events']:,} ({own['read']:,}) | {vector['first']:,.0f} "
                f"| {vector['p50']:.2f} | {vector['p99']:.2f} | {find['p50']:.2f} "
                f"| {find['p99']:.2f} | {request['first']:,.0f} | {request['p50']:.2f} "
                f"| {request['p99']:.2f} | {vector['calls']}, {request['calls']} |"
            )
    lines += [
        "",
        "| model | items | load with all hashes | resident before / after load / at most | server "
        "up in | server resident |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in latency.items():
        http = figures["http"]
        lines.append(
            f"| {name} | {figures['items']:,} | {figures['load_s']:.2f} s "
            f"| {figures['before_mib']:,} / {figures['loaded_mib']:,} / "
            f"{figures['peak_mib']:,} MiB | {http['start_s']:.1f} s "
            f"| {http['resident_mib']:,} MiB |"
        )
    return lines


if __name__ == "__main__":
    main()
