"""KuaiRand's CSV files: a hand-made folder with every bit, bad rows, and the real subset."""

import gzip
import re

import numpy as np
import pytest

from hstu_jax.data import kuairand, schema, summary, windowing

HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
# Columns of FLAG_COLUMNS in file order: is_click .. long_view, then is_profile_enter.
MIDNIGHT_MS = 1_649_347_200_000  # 8 April 2022 in UTC+8
DAY_MS = 86_400_000


def row(user, video, time_ms, flags="00000000", play="1500"):
    bits = list(flags)
    return ",".join(
        [str(user), str(video), "20220408", "0", str(time_ms), *bits[:7], str(play), "9000", "0",
         "0", bits[7], "0", "1"]
    )  # fmt: skip


DAYS = [
    row(9, 500, MIDNIGHT_MS + DAY_MS + 100, "10000000"),
    row(9, 700, MIDNIGHT_MS + 2 * DAY_MS, "01000000"),
]


def write_raw(folder, rows=(), log="log_standard_4_08_to_4_21_1k.csv", header=HEADER):
    folder.mkdir(exist_ok=True)
    text = "\n".join([header, *rows]) + "\n"
    if log.endswith(".gz"):
        (folder / log).write_bytes(gzip.compress(text.encode()))
    else:
        (folder / log).write_text(text)
    (folder / "user_features_1k.csv").write_text(
        "user_id,user_active_degree,follow_user_num_range,fans_user_num_range,"
        "friend_user_num_range,register_days_range,extra\n"
        '9,full_active,"(10,50]","[1,10)",0,730+,1\n'
        "4,low_active,0,,0,31-60,1\n"
        "77,low_active,0,0,0,31-60,1\n"
    )
    return folder


def test_every_bit_join_order_and_time(tmp_path):
    flags = [row(4, 600, MIDNIGHT_MS + n, "0" * n + "1" + "0" * (7 - n)) for n in range(8)]
    rows = [
        row(9, 700, MIDNIGHT_MS + DAY_MS, play="2750.5"),
        *DAYS,
        *flags[::-1],
        flags[0],  # repeated row
        row(5, 500, MIDNIGHT_MS + 5, "10000001"),
    ]
    raw = write_raw(tmp_path / "raw", rows)
    store = kuairand.prepare(raw, tmp_path / "store")
    # Users and items are numbered in the order of their raw ids.
    assert store.users["user_id"].tolist() == [4, 5, 9]
    assert store.items.item_id.tolist() == [500, 600, 700]
    # Sorted by user, then millisecond, although all eight share a second.
    assert store.events.user_index.tolist() == [0] * 8 + [1] + [2] * 3
    assert store.events.action.tolist()[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 129]
    assert set(store.events.timestamp_s[:8]) == {MIDNIGHT_MS // 1000}
    expected = np.array([1.5] * 9 + [2.7505, 1.5, 1.5], np.float32)
    np.testing.assert_array_equal(store.events.watch_time_s, expected)
    # Users' categories: 0 for an empty cell and for a user without a row.
    assert store.vocabularies["user_active_degree"] == ["full_active", "low_active"]
    assert store.users["user_active_degree"].tolist() == [2, 0, 1]
    assert store.vocabularies["fans_user_num_range"] == ["[1,10)"]
    assert store.users["fans_user_num_range"].tolist() == [0, 0, 1]
    assert store.stats["users_without_features"] == 1
    assert store.stats["dropped_user_rows"]["user without events"] == 1
    assert store.stats["dropped_events"] == {"row repeated (all used columns equal)": 1}
    assert store.stats["action_counts"] == {
        **{name: 1 for name in schema.ACTION_BITS},
        "click": 3, "like": 2, "profile_enter": 2,
    }  # fmt: skip
    # Training is before the validation day (9 April): events at that day's midnight are not in it.
    assert store.items.train_count.tolist() == [1, 8, 0]
    assert store.stats["days"]["validation"] == "2022-04-09"
    assert set(store.stats["sha256_raw"]) == {p.name for p in raw.iterdir()}


def test_ties_keep_file_order_and_files_are_joined(tmp_path):
    same = MIDNIGHT_MS + 3
    raw = write_raw(tmp_path / "raw", [row(9, 3, same), row(9, 1, same), row(9, 2, same), *DAYS])
    write_raw(raw, [row(9, 8, same + 1)], log="log_standard_4_22_to_5_08_1k.csv.gz")
    write_raw(raw, [row(9, 7, same + 2)], log="log_random_4_22_to_5_08_1k.csv")
    (raw / "log_standard_4_08_to_4_21_notes.txt").write_text("not a table")

    def order(**options):
        store = kuairand.prepare(
            raw, tmp_path / "store", options=kuairand.KuaiRandOptions(**options), overwrite=True
        )
        return store.items.item_id[store.events.item_index].tolist()

    assert order() == [3, 1, 2, 8, 500, 700]
    assert order(include_random=True) == [3, 1, 2, 8, 7, 500, 700]


def test_a_missing_standard_log_is_told(tmp_path):
    write_raw(tmp_path / "raw", DAYS + [row(9, 500, MIDNIGHT_MS, "10000000")])
    store = kuairand.prepare(tmp_path / "raw", tmp_path / "one")
    note = "missing log: no file log_standard_4_22_to_5_08_*; its days are not in the store"
    assert note in summary.describe(store)
    write_raw(tmp_path / "raw", DAYS, log="log_standard_4_22_to_5_08_1k.csv")
    both = kuairand.prepare(tmp_path / "raw", tmp_path / "both")
    assert "missing log" not in summary.describe(both)


def test_same_input_same_store(tmp_path):
    raw = write_raw(tmp_path / "raw", DAYS + [row(4, 1, MIDNIGHT_MS, "10000000")])
    first = kuairand.prepare(raw, tmp_path / "a")
    second = kuairand.prepare(raw, tmp_path / "b")
    assert first.fingerprint() == second.fingerprint()
    assert first.stats["sha256_written"] == second.stats["sha256_written"]


BAD_ROWS = [
    (row(9, 1, -5), "row 4: time_ms=-5 is negative (1 rows in all)"),
    (row(9, 1, 1_649_347_200), "row 4: time_ms=1649347200 looks like seconds"),
    (row(9, 1, "noon"), "row 4: time_ms=noon is not a whole number (1 rows in all)"),
    (row(9, "", MIDNIGHT_MS), "row 4: video_id=None is not a whole number"),
    (row(9, 1.5, MIDNIGHT_MS), "row 4: video_id=1.5 is not a whole number"),
    (row(9, "1e1", MIDNIGHT_MS), "row 4: video_id=1e1 is not a whole number"),
    (row(-3, 1, MIDNIGHT_MS), "row 4: user_id=-3 is negative"),
    (row(9, 1, MIDNIGHT_MS, "00200000"), "row 4: is_follow=2 is not 0 or 1"),
    (row(9, 1, MIDNIGHT_MS, "0000000x"), "row 4: is_profile_enter=x is not 0 or 1"),
    (row(9, 1, MIDNIGHT_MS, play="NaN"), "row 4: play_time_ms=NaN is missing or not usable"),
]


def test_whole_numbers_may_be_written_as_fractions(tmp_path):
    raw = write_raw(tmp_path / "raw", [*DAYS, row("4.0", "3.", MIDNIGHT_MS)])
    store = kuairand.prepare(raw, tmp_path / "store")
    assert 3 in store.items.item_id and 4 in store.users["user_id"]


def test_a_broken_line_far_behind_is_refused(tmp_path):
    lines = [row(1, item, MIDNIGHT_MS) for item in range(30_000)]
    raw = write_raw(tmp_path / "raw", [*DAYS, *lines, "1,2"])
    with pytest.raises(ValueError, match="log_standard_.*: cannot be read as CSV"):
        kuairand.prepare(raw, tmp_path / "store")


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_bad_rows_are_refused(tmp_path, bad, message):
    raw = write_raw(tmp_path / "raw", [*DAYS, bad])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        kuairand.prepare(raw, tmp_path / "store")
    assert "log_standard_4_08_to_4_21_1k.csv" in str(error.value)
    assert not (tmp_path / "store").exists()


def test_few_bad_watch_times_are_mended_and_counted(tmp_path):
    bad = [row(4, n, MIDNIGHT_MS + n, play=play) for n, play in enumerate(("", "nan", "-1", "x"))]
    raw = write_raw(tmp_path / "raw", DAYS + bad)
    options = kuairand.KuaiRandOptions(max_bad_watch_share=0.7)
    store = kuairand.prepare(raw, tmp_path / "store", options=options)
    assert store.events.watch_time_s.tolist() == [0, 0, 0, 0, 1.5, 1.5]
    (count,) = store.stats["mended_events"].values()
    assert count == 4
    with pytest.raises(ValueError, match=r"a share of 0.667, more than 0.01.*4 rows in all"):
        kuairand.prepare(raw, tmp_path / "other")
    with pytest.raises(ValueError, match="max_bad_watch_share=2.0: must be between 0 and 1"):
        kuairand.KuaiRandOptions(max_bad_watch_share=2.0)


def test_missing_columns_and_files(tmp_path):
    raw = write_raw(tmp_path / "raw", DAYS, header=HEADER.replace("time_ms,is", "times_ms,is"))
    with pytest.raises(
        ValueError, match=r"1k.csv column time_ms: missing \(did you mean 'times_ms'\?\); the file"
    ):
        kuairand.prepare(raw, tmp_path / "store")
    write_raw(raw, DAYS)
    with pytest.raises(FileNotFoundError, match=r"no random logs; looked for log_random_\*"):
        kuairand.prepare(
            raw, tmp_path / "store", options=kuairand.KuaiRandOptions(include_random=True)
        )
    (raw / "user_features_1k.csv").write_text("user_id\n9\n")
    with pytest.raises(ValueError, match="features_1k.csv column user_active_degree: missing"):
        kuairand.prepare(raw, tmp_path / "store")
    (raw / "user_features_1k.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no user features; looked for user_features_\*"):
        kuairand.prepare(raw, tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"no standard logs; looked for log_standard_4_08"):
        kuairand.prepare(tmp_path / "empty", tmp_path / "store")


def test_real_subset(tmp_path, real_data_dir):
    raw = real_data_dir / "kuairand_27k_subset"
    if not raw.is_dir():
        pytest.skip(f"no KuaiRand subset at {raw}; set HSTU_DATA_DIR")
    store = kuairand.prepare(raw, tmp_path / "store")
    assert (store.num_users, store.num_items) == (664, 9_359)
    assert len(store.events) == 41_828 - 124  # 124 rows are repeated
    assert store.stats["action_counts"]["hate"] > 0
    assert store.stats["users_without_features"] == 0
    # Its real times: UTC+8 days from 7 to 21 April 2022.
    assert store.stats["days"]["first"] == "2022-04-07"
    assert store.stats["days"]["test"] == "2022-04-21"
    day = (store.events.timestamp_s + windowing.UTC_PLUS_8_S) // windowing.SECONDS_PER_DAY
    window_day = (store.windows.request_time_s + windowing.UTC_PLUS_8_S) // 86_400
    positives = np.repeat(window_day, np.diff(store.windows.positive_offsets))
    np.testing.assert_array_equal(day[store.windows.positive_events], positives)
