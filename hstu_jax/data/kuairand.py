"""KuaiRand's official CSV files to an event store.

Here: which files are read, which raw rows are refused, dropped or mended (each counted), ids made
dense, category strings made ids. Reading and casting is `raw_csv.py`; cutting into windows is
`windowing.py`; writing is `event_store.py`. Works in memory: 3 million events peaked at 0.6 GB.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from hstu_jax.data import event_store, raw_csv, schema, store_files, windowing
from hstu_jax.data.records import Events, ItemTable

STANDARD_LOGS = ("log_standard_4_08_to_4_21_*", "log_standard_4_22_to_5_08_*")
RANDOM_LOGS = ("log_random_*",)
USER_FEATURES = ("user_features_*",)

# raw column -> action, in the order of the bits.
FLAG_COLUMNS = {
    "is_click": "click",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
    "long_view": "long_view",
    "is_profile_enter": "profile_enter",
}


@dataclasses.dataclass(frozen=True)
class KuaiRandOptions:
    """What `prepare` does with the raw files.

    Attributes:
      include_random: also read `log_random_*` (randomly exposed videos).
      max_bad_watch_share: largest share of a file's rows whose `play_time_ms` may be missing, not
        a number or negative; such rows get watch time 0 and are counted. More is refused.
      item_weight_exponent: weight in `item_table.tsv` = train_count ** exponent.
      windows: how events become windows.
    """

    include_random: bool = False
    max_bad_watch_share: float = 0.01
    item_weight_exponent: float = 0.0
    windows: windowing.WindowOptions = dataclasses.field(default_factory=windowing.WindowOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_watch_share <= 1:
            raise ValueError(
                f"max_bad_watch_share={self.max_bad_watch_share}: must be between 0 and 1."
            )


def prepare(
    raw_dir: str | pathlib.Path,
    out_dir: str | pathlib.Path,
    *,
    options: KuaiRandOptions | None = None,
    overwrite: bool = False,
) -> event_store.EventStore:
    """Reads KuaiRand's CSV files and writes an event store.

    Deterministic: users and items are numbered in the order of their raw ids; events are sorted by
    user, then millisecond, ties in file order.

    Args:
      raw_dir: folder with `log_standard_*` and `user_features_*` as `.csv` or `.csv.gz`.
      out_dir: folder to make.
      options: rules; None for the defaults.
      overwrite: replace an event store that is already there.

    Returns:
      The opened store.

    Raises:
      FileNotFoundError: a needed file is missing; lists what was looked for.
      FileExistsError: `out_dir` exists and is not to be replaced.
      ValueError: a file lacks a column or holds values that are refused (file, row, value).
    """
    options = options or KuaiRandOptions()
    event_store.check_target(pathlib.Path(out_dir), overwrite=overwrite)
    log_files, user_files = _find_files(pathlib.Path(raw_dir), options.include_random)
    logs = [
        raw_csv.read_log(path, flags=FLAG_COLUMNS, max_bad_watch_share=options.max_bad_watch_share)
        for path in log_files
    ]
    features = [raw_csv.read_user_features(path) for path in user_files]
    events, user_id, item_id, log_stats = _join_logs(logs)
    users, vocabularies, user_stats = _join_users(user_id, features)
    windowed = windowing.build_windows(events, options=options.windows)
    train_items = events.item_index[windowed.is_training_event]
    items = ItemTable(
        item_id=item_id,
        train_count=np.bincount(train_items, minlength=len(item_id)).astype(np.int64),
    )
    stats = {
        "source": "kuairand",
        "options": dataclasses.asdict(options),
        **windowed.stats,
        **log_stats,
        **user_stats,
        "missing_logs": _missing_logs(log_files),
        "sha256_raw": {
            path.name: store_files.file_sha256(path) for path in (*log_files, *user_files)
        },
    }
    return event_store.write_store(
        out_dir,
        events=events,
        windows=windowed.windows,
        users=users,
        items=items,
        vocabularies=vocabularies,
        stats=stats,
        item_weight_exponent=options.item_weight_exponent,
        overwrite=overwrite,
    )


def _find_files(
    raw_dir: pathlib.Path, include_random: bool
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    def found(patterns: tuple[str, ...]) -> list[pathlib.Path]:
        paths = {p for pattern in patterns for p in raw_dir.glob(pattern)}
        return sorted(p for p in paths if p.name.endswith((".csv", ".csv.gz")))

    wanted = {"standard logs": STANDARD_LOGS, "user features": USER_FEATURES}
    if include_random:
        wanted["random logs"] = RANDOM_LOGS
    files = {kind: found(patterns) for kind, patterns in wanted.items()}
    for kind, patterns in wanted.items():
        if not files[kind]:
            raise FileNotFoundError(
                f"raw_dir={raw_dir}: no {kind}; looked for {', '.join(patterns)} as .csv or "
                ".csv.gz. Download KuaiRand from https://kuairand.com and give the folder that "
                "holds its CSV files."
            )
    logs = files["standard logs"] + files.get("random logs", [])
    return logs, files["user features"]


def _missing_logs(log_files: list[pathlib.Path]) -> list[str]:
    """Standard logs without a file: KuaiRand is complete with both, and usable with either."""
    return [
        pattern for pattern in STANDARD_LOGS if not any(path.match(pattern) for path in log_files)
    ]


def _join_logs(
    logs: list[raw_csv.RawLog],
) -> tuple[Events, np.ndarray, np.ndarray, dict[str, Any]]:
    """All logs as sorted events with dense ids, the raw ids, and counts."""
    user = np.concatenate([log.user_id for log in logs])
    item = np.concatenate([log.video_id for log in logs])
    time_ms = np.concatenate([log.time_ms for log in logs])
    action = np.concatenate([log.action for log in logs])
    watch = np.concatenate([log.watch_time_s for log in logs])
    # lexsort is stable: equal user and millisecond keep file order.
    order = np.lexsort((time_ms, user))
    user, item, time_ms = user[order], item[order], time_ms[order]
    action, watch = action[order], watch[order]
    repeated = _repeated_rows(user, item, time_ms, action, watch)
    keep = ~repeated
    user_id, user_index = np.unique(user[keep], return_inverse=True)
    item_id, item_index = np.unique(item[keep], return_inverse=True)
    events = Events(
        user_index=user_index.astype(np.int32),
        item_index=item_index.astype(np.int32),
        timestamp_s=time_ms[keep] // 1000,
        action=action[keep],
        watch_time_s=watch[keep],
    )
    stats = {
        "raw_rows": {log.name: len(log.user_id) for log in logs},
        "dropped_events": {"row repeated (all used columns equal)": int(repeated.sum())},
        "mended_events": {
            "play_time_ms missing, not a number or negative, set to 0": sum(
                log.num_bad_watch for log in logs
            )
        },
    }
    return events, user_id, item_id, stats


def _repeated_rows(
    user: np.ndarray,
    item: np.ndarray,
    time_ms: np.ndarray,
    action: np.ndarray,
    watch: np.ndarray,
) -> np.ndarray:
    """True at each row that equals an earlier one of the sorted rows in all five columns."""
    order = np.lexsort((watch, action, item, time_ms, user))
    equal = np.ones(max(len(user) - 1, 0), dtype=bool)
    for values in (user, item, time_ms, action, watch):
        sorted_values = values[order]
        equal &= sorted_values[1:] == sorted_values[:-1]
    repeated = np.zeros(len(user), dtype=bool)
    repeated[order[1:][equal]] = True
    return repeated


def _join_users(
    user_id: np.ndarray, features: list[raw_csv.RawUsers]
) -> tuple[dict[str, np.ndarray], dict[str, list[str]], dict[str, Any]]:
    """Category ids by user_index; 0 where the user has no row or an empty cell."""
    row_id = np.concatenate([f.user_id for f in features])
    known_id, first_row = np.unique(row_id, return_index=True)
    at = np.minimum(np.searchsorted(known_id, user_id), max(len(known_id) - 1, 0))
    has_row = known_id[at] == user_id if len(known_id) else np.zeros(len(user_id), dtype=bool)
    users: dict[str, np.ndarray] = {"user_id": user_id.astype(np.int64)}
    vocabularies: dict[str, list[str]] = {}
    for name in schema.USER_CATEGORIES:
        cells = np.concatenate([f.categories[name] for f in features])
        words = np.full(len(user_id), "", dtype=object)
        words[has_row] = cells[first_row[at[has_row]]]
        vocabularies[name] = sorted({word for word in words if word})
        ids = {word: number for number, word in enumerate(vocabularies[name], start=1)}
        users[name] = np.array([ids.get(word, 0) for word in words], dtype=np.int32)
    stats = {
        "users_without_features": int((~has_row).sum()),
        "dropped_user_rows": {
            "user without events": int((~np.isin(known_id, user_id)).sum()),
            "user_id repeated": len(row_id) - len(known_id),
        },
    }
    return users, vocabularies, stats
