"""The readable summary of an event store that `prepare` prints.

Here: text from `stats.json`. Not here: counting (`windowing.py`, `kuairand.py`, `sample.py`).
"""

import datetime
from typing import Any

from hstu_jax.data import windowing
from hstu_jax.data.event_store import EventStore


def describe(store: EventStore) -> str:
    """Lines that tell what a store holds, what was dropped and why, and its hashes."""
    stats = store.stats
    lines = [
        f"{store.path}: {stats['source']}"
        + (" (invented data, no real users)" if stats["source"] == "generated sample" else ""),
        f"  users {stats['users']:,}   items {stats['items']:,} "
        f"({stats['cold_items']:,} without a training event)   events {stats['events']:,}",
        _split_line(stats),
        f"  windows   {_pairs(stats['windows_per_split'])}   (all {stats['windows']:,}; "
        f"{stats['windows_with_empty_history']:,} with an empty history)",
        f"  positives {_pairs(stats['positives_per_split'])}   "
        f"({stats['mean_positives_per_window']:.1f} a window)",
        f"  history   mean {stats['mean_history']:.1f}, longest {stats['max_history']:,} events",
        f"  actions   {_pairs(stats['action_counts'])}",
        f"  buckets   {_pairs(stats['num_buckets'])}",
    ]
    for kind in ("dropped_events", "mended_events", "dropped_windows", "dropped_positives"):
        lines += [f"  {kind.replace('_', ' ')}: {n:,} {why}" for why, n in stats[kind].items()]
    for kind in ("users", "items"):
        if stats.get(f"dropped_{kind}"):
            lines.append(f"  dropped {kind}: {stats[f'dropped_{kind}']:,}")
    if stats["users_without_features"]:
        lines.append(f"  users without a features row: {stats['users_without_features']:,}")
    for why, count in stats.get("dropped_user_rows", {}).items():
        lines.append(f"  dropped user rows: {count:,} {why}")
    for pattern in stats.get("missing_logs", ()):
        lines.append(f"  missing log: no file {pattern}; its days are not in the store")
    for kind in ("sha256_raw", "sha256_written"):
        lines += [f"  {kind} {digest[:16]} {name}" for name, digest in stats[kind].items()]
    lines.append(f"  fingerprint {store.fingerprint()[:16]}")
    return "\n".join(lines)


def _split_line(stats: dict[str, Any]) -> str:
    """What the splits are."""
    if "days" not in stats:
        tested = stats[windowing.LEAVE_ONE_OUT]
        times = {
            "position": "times are positions, the file has none",
            "seconds": f"{stats.get('events_moved', 0):,} events moved by up to "
            f"{stats.get('largest_move_s', 0):,} s to make times distinct",
        }
        line = (
            f"  leave-one-out: {tested['users_tested']:,} users tested, "
            f"{tested['users_only_trained']:,} with fewer than 3 positives"
        )
        return f"{line}; {times[stats['event_times']]}" if "event_times" in stats else line
    days = stats["days"]
    first, last = (_clock(t, days["utc_offset_s"]) for t in stats["time_range_s"])
    return (
        f"  time {first} .. {last} (UTC{days['utc_offset_s'] / 3600:+g}h)   "
        f"validation {days['validation']}   test {days['test']}"
    )


def _pairs(counts: dict[str, Any]) -> str:
    return " ".join(f"{name} {count:,}" for name, count in counts.items())


def _clock(time_s: int, utc_offset_s: int) -> str:
    zone = datetime.timezone(datetime.timedelta(seconds=utc_offset_s))
    return datetime.datetime.fromtimestamp(time_s, zone).strftime("%Y-%m-%d %H:%M")
