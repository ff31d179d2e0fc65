"""Times and memory of serving: `python -m hstu_jax.serving.benchmark latency|search|index ...`.

    latency --export_dir D [--lengths 128,1024,4096]    one user: first call, then p50 and p99
    search [--users 10000 --items 1000000 --dim 64]     exact top-k: seconds and peak memory
    index [--items 1000000 --kinds flat,ivf,hnsw]       recall against exact, build and search times

Users and items of `search` and `index` are drawn here, in clusters; `latency` draws histories of an
export's items. Every line says what it measured, so that it can be quoted.
"""

import argparse
import dataclasses
import pathlib
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from hstu_jax.serving import artifact as artifact_lib
from hstu_jax.serving import item_index, top_k
from hstu_jax.serving.search_catalogue import TopK

_CLUSTER_SIZE = 500
_NOW_S = 1_700_000_000


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
    flags = parser.parse_args(argv)
    print(f"devices   {len(jax.devices())} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    _COMMANDS[flags.command](flags)


def _latency(flags: argparse.Namespace) -> None:
    start = time.perf_counter()
    artifact = artifact_lib.load(flags.export_dir, verify=False)
    search = top_k.ExactSearch(artifact.item_ids(), artifact.item_vectors())
    print(f"load      {time.perf_counter() - start:.2f} s, {len(artifact.item_ids()):,} items")
    k = min(flags.k, len(artifact.item_ids()))
    for length in (int(text) for text in flags.lengths.split(",")):
        columns = drawn_users(artifact, lengths=[length])
        embed = _times(lambda columns=columns: artifact.embed_users(columns), flags.repeats)
        user = artifact.embed_users(columns)
        find = _times(lambda user=user: search.search(user, k=k), flags.repeats)
        read = min(length, artifact.manifest.history.max_seq_len)
        print(f"history   {length:,} events, {read:,} of them read by the model")
        print(f"  vector  {embed.line()}")
        print(f"  top {k:<4}{find.line()}")
    print(f"memory    {peak_memory_mib():,} MiB at most")


def _search(flags: argparse.Namespace) -> None:
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
    matrix = flags.users * flags.items * 4 / 2**20
    print(
        f"memory    {peak_memory_mib():,} MiB at most, {before:,} MiB before the search; all "
        f"scores at once would be {matrix:,.0f} MiB"
    )


def _index(flags: argparse.Namespace) -> None:
    vectors = clustered(flags.items, flags.dim, seed=0, spread=flags.spread)
    users = near(vectors, flags.users, seed=1)
    exact = top_k.ExactSearch(np.arange(flags.items), vectors).search(users, k=flags.k)
    print(f"items     {flags.items:,} of width {flags.dim}, spread of lengths {flags.spread}")
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
            one = _times(lambda s=search: s.search(users[:1], k=flags.k), 100)
            size = sum(file.stat().st_size for file in described.parent.iterdir()) / 2**20
            print(
                f"{kind:<10}recall@{flags.k} {recall(found, exact):.4f}, built in {built:.1f} s, "
                f"{each:.2f} ms a user in a batch, alone {one.line()}, {size:,.0f} MiB"
            )


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


def _times(call: Callable[[], Any], repeats: int) -> Times:
    seconds = []
    for _ in range(repeats + 1):
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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


if __name__ == "__main__":
    main()
