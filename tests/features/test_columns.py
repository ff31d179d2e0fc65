"""Feature names -> store columns, and the check of ids against table sizes."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.features import columns, id_mapping


def _resolve(config, store):
    return columns.resolve_columns(
        features=config.features, feature_groups=config.feature_groups, store=store
    )


def test_every_group_reads_its_column(make_store, make_config):
    store = make_store([3, 0, 5])
    found = _resolve(make_config(contextual=3), store)
    np.testing.assert_array_equal(found.history["uih_seq__video_id"], store.events.item_index)
    np.testing.assert_array_equal(found.action, store.events.action)
    np.testing.assert_array_equal(found.watch_time_s, store.events.watch_time_s)
    np.testing.assert_array_equal(found.timestamp_s, store.events.timestamp_s)
    np.testing.assert_array_equal(found.request_time_s, store.windows.request_time_s)
    # The id in the raw files starts at 1000 here; the feature is the dense index.
    np.testing.assert_array_equal(found.contextual["user_id"], [0, 1, 2])
    second = list(found.contextual)[1]
    np.testing.assert_array_equal(found.contextual[second], store.users[second])
    np.testing.assert_array_equal(found.contextual_entry, store.windows.user_index)
    assert list(found.candidate) == ["cand_seq__video_id"]
    np.testing.assert_array_equal(found.candidate["cand_seq__video_id"], np.arange(50))


def test_absent_groups_are_none(make_store, make_config):
    config = make_config(contextual=0, query_time=False)
    groups = {
        name: value
        for name, value in config.feature_groups.items()
        if name not in ("uih_action", "uih_watchtime")
    }
    found = columns.resolve_columns(
        features=config.features, feature_groups=groups, store=make_store([3])
    )
    assert found.action is None and found.watch_time_s is None and found.request_time_s is None
    assert found.contextual == {}


@pytest.mark.parametrize(
    ("group", "name", "near", "known"),
    [
        ("uih", "uih_seq__video", "uih_seq__video_id", "uih_seq__video_id"),
        ("uih_action", "uih_seq__actions", "uih_seq__action_weight", "uih_seq__action_weight"),
        ("contextual", "follow_user_num", "follow_user_num_range", "register_days_range"),
    ],
)
def test_unknown_feature_lists_the_known_ones(make_store, make_config, group, name, near, known):
    config = make_config()
    groups = {**config.feature_groups, group: (name,)}
    with pytest.raises(ValueError) as error:
        columns.resolve_columns(
            features=config.features, feature_groups=groups, store=make_store([3])
        )
    message = str(error.value)
    assert message.startswith(f"feature_groups.{group}='{name}': no such column")
    assert f"did you mean '{near}'?" in message and known in message


def test_ids_out_of_range_name_feature_value_and_count(make_store, make_config):
    store = make_store([4, 4], num_items=50)
    item = store.events.item_index
    limit = int(np.sort(item)[-3])  # at least three ids are outside
    config = make_config(contextual=0, num_items=limit)
    bad = item >= limit
    with pytest.raises(ValueError) as error:
        _resolve(config, store)
    assert str(error.value) == (
        f"features.uih_seq__video_id.num_buckets={limit}: id {item[np.argmax(bad)]} is outside "
        f"0..{limit - 1} ({bad.sum()} such values in all); set it to at least {item.max() + 1}."
    )


def test_negative_ids_are_refused():
    ids = np.array([3, -1, -2, 4], dtype=np.int32)
    with pytest.raises(
        ValueError, match=r"features\.a\.num_buckets=5: id -1 is outside 0\.\.4 \(2 "
    ):
        id_mapping.check_ids(ids, feature="a", num_buckets=5)
    id_mapping.check_ids(np.arange(5), feature="a", num_buckets=5)
    id_mapping.check_ids(np.empty(0, np.int64), feature="a", num_buckets=5)


def test_candidate_table_must_hold_the_whole_catalogue(make_store, make_config):
    # An item without an event can be a negative of an item table file, so events do not suffice.
    store = make_store([2], num_items=50)
    largest = int(store.events.item_index.max())
    config = make_config(contextual=0, num_items=largest + 1)
    assert largest < 49
    with pytest.raises(ValueError, match=r"cand_seq__video_id.*at least 50"):
        _resolve(config, store)


def test_id_feature_without_a_size_is_refused(make_store, make_config):
    config = make_config()
    features = {k: v for k, v in config.features.items() if k != "user_id"}
    with pytest.raises(ValueError, match=r"^features\.user_id: missing; .*given are"):
        columns.resolve_columns(
            features=features, feature_groups=config.feature_groups, store=make_store([3])
        )


def test_contextual_ids_are_checked(make_store, make_config):
    config = make_config(contextual=1)
    small = dataclasses.replace(config.features["user_id"], num_buckets=2)
    config = dataclasses.replace(config, features={**config.features, "user_id": small})
    with pytest.raises(ValueError, match=r"features\.user_id\.num_buckets=2: id 2 .* at least 4"):
        _resolve(config, make_store([1, 1, 1, 1]))
