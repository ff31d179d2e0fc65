"""Times and memory of serving: `python -m hstu_jax.serving.benchmark latency|search|index ...`.

    latency --export_dir D [--lengths 128,1024,4096]    one user: first call, then p50 and p99
        [--endpoint examples/http_endpoint.py]          the same over HTTP, by a server of its own
    search [--users 10000 --items 1000000 --dim 64]     exact top-k: seconds and peak memory
    index [--items 1000000 --kinds flat,ivf,hnsw]       recall against exact, build and search times

Users and items of `search` and `index` are drawn here, in clusters; `latency` draws histories of an
export's items. Every line says what it measured, so that it can be quoted; `--json FILE` writes the
figures. `benchmark_report.py` runs all of it and prints the tables of docs/serving.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from hstu_jax import launchers
from hstu_jax.serving import artifact as artifact_lib
from hstu_jax.serving import item_index, top_k
from hstu_jax.serving.search_catalogue import TopK

_CLUSTER_SIZE = 500
_NOW_S = 1_700_000_000
_LEAST_CALLS = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and measures.

    Args:
        argv: flags; None for the command line's.
    """
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.serving.benchmark")
    commands = parser.add_subparsers(dest="command", required=True)
    of_latency = commands.add_parser("latency", help="one user through an export")
    of_latency.add_argument("--export_dir", required=True)
    of_latency.add_argument("--lengths", default="128,1024,4096", help="events of the history")
    of_latency.add_argument("--repeats", type=int, default=200)
    help_text = "stop repeating after this time, and 20 calls"
    of_latency.add_argument("--seconds", type=float, default=10.0, help=help_text)
    of_latency.add_argument("--endpoint", default="", help="server's script; empty = no HTTP")
    of_latency.add_argument("--k", type=int, default=100)
    of_search = commands.add_parser("search", help="exact top-k of drawn vectors")
    of_search.add_argument("--users", type=int, default=10_000)
    of_index = commands.add_parser("index", help="faiss indexes of drawn vectors")
    of_index.add_argument("--users", type=int, default=200)
    of_index.add_argument("--kinds", default=",".join(item_index.KINDS))
    help_text = "spread of log |v|; 0 = vectors of one length"
    of_index.add_argument("--spread", type=float, default=0.0, help=help_text)
    for command in (of_search, of_index):
        command.add_argument("--items", type=int, default=1_000_000)
        command.add_argument("--dim", type=int, default=64)
        command.add_argument("--k", type=int, default=100)
    for command in (of_latency, of_search, of_index):
        command.add_argument("--json", default="", help="file for the figures")
    flags = launchers.parse_alone(parser, argv)
    print(f"devices   {len(jax.devices())} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    figures = _COMMANDS[flags.command](flags)
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(figures, indent=1) + "\n")


def _latency(flags: argparse.Namespace) -> dict[str, Any]:
    before = resident_mib()
    start = time.perf_counter()
    artifact = artifact_lib.load(flags.export_dir)
    search = top_k.ExactSearch(artifact.item_ids(), artifact.item_vectors())
    figures = {"load_s": time.perf_counter() - start, "items": len(artifact.item_ids())}
    figures |= {"loaded_mib": resident_mib(), "before_mib": before, "lengths": []}
    print(
        f"load      {figures['load_s']:.2f} s with all hashes, {figures['items']:,} items; "
        f"{figures['loaded_mib']:,} MiB resident, {before:,} before"
    )
    k = min(flags.k, figures["items"])
    lengths = [int(text) for text in flags.lengths.split(",")]
    for length in lengths:
        columns = drawn_users(artifact, lengths=[length])
        embed = _times(lambda columns=columns: artifact.embed_users(columns), flags)
        user = artifact.embed_users(columns)
        find = _times(lambda user=user: search.search(user, k=k), flags)
        read = min(length, artifact.manifest.history.max_seq_len)
        print(f"history   {length:,} events, {read:,} of them read by the model")
        print(f"  vector  {embed.line()}")
        print(f"  top {k:<4}{find.line()}")
        own = {"events": length, "read": read, "k": k}
        figures["lengths"].append(own | {"vector": embed.figures(), "search": find.figures()})
    figures["peak_mib"] = peak_memory_mib()
    print(f"memory    {figures['peak_mib']:,} MiB at most")
    if flags.endpoint:
        figures["http"] = _http(flags, artifact, lengths, k)
    return figures


def _http(flags: argparse.Namespace, artifact, lengths: Sequence[int], k: int) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, "-u", flags.endpoint, "--export_dir", flags.export_dir]
    figures: dict[str, Any] = {"lengths": []}
    # The script's own folder is its import path: the package comes from here.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = server.stdout.readline()
        if not line.startswith("listening on port"):
            raise RuntimeError(f"{flags.endpoint}: ended without listening; run it by hand.")
        figures["start_s"] = time.perf_counter() - start
        url = f"http://127.0.0.1:{line.split()[-1]}/top_k"
        for length in lengths:
            columns = drawn_users(artifact, lengths=[length])
            lists = {name: values.to_pylist() for name, values in columns.items()}
            body = json.dumps({"columns": lists, "k": k}).encode()

            def post(body=body):
                with urllib.request.urlopen(url, body) as answer:
                    return answer.read()

            times = _times(post, flags)
            print(f"http      {length:,} events, top {k}: {times.line()}")
            figures["lengths"].append({"events": length, "request": times.figures()})
        figures["resident_mib"] = resident_mib(server.pid)
        print(
            f"server    up in {figures['start_s']:.1f} s, {figures['resident_mib']:,} MiB resident"
        )
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    return figures


def _search(flags: argparse.Namespace) -> dict[str, Any]:
    vectors = clustered(flags.items, flags.dim, seed=0)
    users = near(vectors, flags.users, seed=1)
    before = peak_memory_mib()
    start = time.perf_counter()
    search = top_k.ExactSearch(np.arange(flags.items), vectors)
    built = time.perf_counter() - start
    search.search(users[:1024], k=flags.k)  # compiles
    start = time.perf_counter()
    found = search.search(users, k=flags.k)
    seconds = time.perf_counter() - start
    print(
        f"exact     top {flags.k} of {flags.items:,} items of width {flags.dim} for "
        f"{flags.users:,} users: {seconds:.1f} s ({flags.users / seconds:,.0f} users/s) after "
        f"{built:.1f} s of set-up; {found.num_exhaustive} users scored in full"
    )
    peak, matrix = peak_memory_mib(), flags.users * flags.items * 4 / 2**20
    print(
        f"memory    {peak:,} MiB at most, {before:,} MiB before the search; all scores at once "
        f"would be {matrix:,.0f} MiB"
    )
    return {
        "users": flags.users, "items": flags.items, "dim": flags.dim, "k": flags.k,
        "seconds": seconds, "built_s": built, "exhaustive": found.num_exhaustive,
        "peak_mib": peak, "before_mib": before, "matrix_mib": matrix,
    }  # fmt: skip


def _index(flags: argparse.Namespace) -> dict[str, Any]:
    vectors = clustered(flags.items, flags.dim, seed=0, spread=flags.spread)
    users = near(vectors, flags.users, seed=1)
    exact = top_k.ExactSearch(np.arange(flags.items), vectors).search(users, k=flags.k)
    print(f"items     {flags.items:,} of width {flags.dim}, spread of lengths {flags.spread}")
    figures = {name: getattr(flags, name) for name in ("items", "dim", "users", "k", "spread")}
    figures["kinds"] = []
    with tempfile.TemporaryDirectory() as folder:
        items = GeneratedItems(pathlib.Path(folder), vectors)
        for kind in flags.kinds.split(","):
            start = time.perf_counter()
            described = item_index.build(items, options=item_index.IndexOptions(kind=kind))
            built = time.perf_counter() - start
            search = item_index.AnnSearch(items)
            start = time.perf_counter()
            found = search.search(users, k=flags.k)
            each = (time.perf_counter() - start) / len(users) * 1e3
            one = _times(lambda s=search: s.search(users[:1], k=flags.k), None)
            size = sum(file.stat().st_size for file in described.parent.iterdir()) / 2**20
            share = recall(found, exact)
            print(
                f"{kind:<10}recall@{flags.k} {share:.4f}, built in {built:.1f} s, "
                f"{each:.2f} ms a user in a batch, alone {one.line()}, {size:,.0f} MiB"
            )
            own = {"kind": kind, "recall": share, "built_s": built, "batch_ms": each}
            figures["kinds"].append(own | {"alone": one.figures(), "mib": size})
    return figures


_COMMANDS = {"latency": _latency, "search": _search, "index": _index}


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the first call and of the calls after it."""

    first: float
    further: tuple[float, ...]

    def line(self) -> str:
        """For the screen."""
        p50, p99 = np.percentile(self.further, [50, 99]) * 1e3
        calls = f"{len(self.further)} calls"
        return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms ({calls}), first {self.first * 1e3:,.0f} ms"

    def figures(self) -> dict[str, float]:
        """Milliseconds, and how many calls."""
        p50, p99 = np.percentile(self.further, [50, 99]) * 1e3
        return {"first": 1e3 * self.first, "p50": p50, "p99": p99, "calls": len(self.further)}


def _times(call: Callable[[], Any], flags: argparse.Namespace | None) -> Times:
    repeats, limit = (flags.repeats, flags.seconds) if flags else (100, np.inf)
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) <= repeats:
        if len(seconds) > _LEAST_CALLS and time.perf_counter() - begun > limit:
            break
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Times(seconds[0], tuple(seconds[1:]))


class GeneratedItems:
    """Drawn vectors in place of an export; their ids count from 0."""

    def __init__(self, path: pathlib.Path, vectors: np.ndarray) -> None:
        self.path, self.vectors = path, vectors
        self.manifest = types.SimpleNamespace(model_version="generated")

    def item_ids(self) -> np.ndarray:
        """Their numbers."""
        return np.arange(len(self.vectors))

    def item_vectors(self) -> np.ndarray:
        """As given."""
        return self.vectors

    def item_is_cold(self) -> np.ndarray:
        """None is."""
        return np.zeros(len(self.vectors), bool)


def clustered(num: int, dim: int, *, seed: int, spread: float = 0.0) -> np.ndarray:
    """float32 [num, dim]: vectors around centres, 500 to each.

    Args:
        num: vectors.
        dim: their width.
        seed: of the draw.
        spread: standard deviation of the logarithm of their length; 0 = all of length 1.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(num // _CLUSTER_SIZE, 1), dim)).astype(np.float32)
    vectors = rng.standard_normal((num, dim), np.float32)
    vectors *= 0.5
    vectors += centres[rng.integers(0, len(centres), num)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if spread:
        vectors *= np.exp(spread * rng.standard_normal((num, 1), np.float32))
    return vectors


def near(vectors: np.ndarray, num: int, *, seed: int) -> np.ndarray:
    """float32 [num, E]: users, each near an item and half as far again from it."""
    rng = np.random.default_rng(seed)
    chosen = vectors[rng.integers(0, len(vectors), num)]
    noise = rng.normal(size=chosen.shape).astype(np.float32)
    noise *= 0.5 * np.linalg.norm(chosen, axis=1, keepdims=True) / chosen.shape[1] ** 0.5
    return chosen + noise


def recall(found: TopK, exact: TopK) -> float:
    """Share of the exact lists that was found."""
    shared = [
        np.intersect1d(one[:count], other).size
        for one, other, count in zip(exact.ids, found.ids, exact.counts, strict=True)
    ]
    return float(np.sum(shared) / np.sum(exact.counts))


def drawn_users(artifact: artifact_lib.Artifact, *, lengths: Sequence[int]) -> dict[str, pa.Array]:
    """Rows that an export's user tower reads, with histories of drawn items.

    Args:
        artifact: the export.
        lengths: events of each row's history.
    """
    rng = np.random.default_rng(0)
    manifest, history = artifact.manifest, artifact.manifest.history
    columns = {}
    for column in manifest.user_inputs:
        if column.kind != "sequence":
            value = _NOW_S if column.name == history.request_time else 1
            columns[column.name] = pa.array([value] * len(lengths))
            continue
        lists = []
        for length in lengths:
            if column.name == manifest.history_column:
                values = rng.choice(artifact.item_ids(), length).tolist()
            elif column.name == history.timestamp:
                values = (_NOW_S - 60 * np.arange(length, 0, -1)).tolist()
                values = values[::-1] if history.newest_first else values
            else:
                values = [1] * length
            delimiter = history.sequence_delim
            lists.append(delimiter.join(map(str, values)) if delimiter else values)
        columns[column.name] = pa.array(lists)
    return columns


def peak_memory_mib() -> int:
    """Most memory that this process has had resident so far."""
    # On Linux `ru_maxrss` of a process starts with that of the one that started it.
    found = _proc_mib("self", "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def resident_mib(process: int | str = "self") -> int:
    """Memory that a process has resident now; 0 where the system does not say (only Linux does)."""
    return _proc_mib(process, "VmRSS")


def _proc_mib(process: int | str, name: str) -> int:
    try:
        text = pathlib.Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return int(lines[0].split()[1]) // 1024 if lines else 0


if __name__ == "__main__":
    main()
