"""Files of a `HardNegativeSampler`: original ids, the three tables together, broken contents."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.config import sampler_schema
from hstu_jax.data import event_store
from hstu_jax.data.raw_columns import FeatureColumns, RawColumn
from hstu_jax.features import sampler_inputs

ITEM_ID = np.array([900, 20, 510, 7, 66], dtype=np.int64)  # of item_index 0 to 4; not ascending


@pytest.fixture
def store(make_store):
    """Four users 1000 to 1003; users 0 and 2 have the same category."""
    made = make_store([2] * 4, num_items=5)
    category = np.array([4, 8, 4, 0], dtype=np.int32)
    items = event_store.ItemTable(item_id=ITEM_ID, train_count=np.array(made.items.train_count))
    users = made.users | {"user_active_degree": category}
    return dataclasses.replace(made, items=items, users=users)


@pytest.fixture
def config(tmp_path):
    """Function: contents of the files and further fields -> the sampler's section."""

    def make(*, edges, users=None, items=None, edges_header="u:int64\ti:int64\tw:float", **fields):
        for name, header, lines in (
            ("hard_neg_edge_input_path", edges_header, edges),
            ("user_input_path", "id:int64\tweight:float", users),
            ("item_input_path", "id:int64\tweight:float\tattrs:string", items),
        ):
            if lines is not None:
                fields[name] = str(tmp_path / name)
                (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
        return sampler_schema.NegativeSamplerConfig(
            kind="HardNegativeSampler", num_hard_sample=2, **fields
        )

    return make


def _lists(edges):
    return [
        edges.item_index[start : start + count].tolist()
        for start, count in zip(edges.start, edges.count, strict=True)
    ]


EDGES = ["1002\t7\t1", "1000\t66\t1", "1002\t900\t0.5", "1000\t510\t1", "1002\t7\t1"]


def test_original_ids_become_lists_of_item_indices_in_file_order(store, config):
    edges = sampler_inputs.read_hard_edges(config(edges=EDGES), store, is_listed_item=None)
    assert _lists(edges) == [[4, 2], [], [3, 0, 3], []]
    assert (edges.num_lines, edges.num_dropped) == (5, 0)


def test_columns_may_be_separated_otherwise(store, config):
    edges = [line.replace("\t", ",") for line in EDGES]
    header = "u:int64,i:int64,w:float"
    section = config(edges=edges, edges_header=header, field_delimiter=",")
    edges = sampler_inputs.read_hard_edges(section, store, is_listed_item=None)
    assert _lists(edges) == [[4, 2], [], [3, 0, 3], []]


def test_unknown_ids_are_dropped_up_to_the_share_and_refused_above(store, config):
    lines = [*EDGES, "5\t7\t1", "1000\t3\t1"]
    section = config(edges=lines, max_unknown_share=0.2)
    edges = sampler_inputs.read_hard_edges(section, store, is_listed_item=None)
    assert _lists(edges) == [[4, 2], [], [3, 0, 3], []]
    assert (edges.num_lines, edges.num_dropped) == (7, 2)
    for rest, message in ((lines[:6], "entry 6: userid=5: no user_id of"),
                          (lines[:5] + lines[6:], "entry 6: itemid=3: no item_id of")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{message} .* \(1 of 6 entries, more than data"):
            section = config(edges=rest, max_unknown_share=0.1)
            sampler_inputs.read_hard_edges(section, store, is_listed_item=None)


def test_users_and_items_that_are_not_in_their_tables_have_no_edges(store, config):
    section = config(
        edges=EDGES,
        users=["1002\t1", "1001\t1"],
        items=["7\t1\t", "66\t2\t", "20\t1\t"],
        max_unknown_share=0.5,
    )
    items = sampler_inputs.read_item_table(section, store)
    np.testing.assert_array_equal(items.weight, [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(items.is_listed, [False, True, False, True, True])
    edges = sampler_inputs.read_hard_edges(section, store, is_listed_item=items.is_listed)
    assert _lists(edges) == [[], [], [3, 3], []]
    assert edges.num_dropped == 3


def test_user_ids_may_be_values_of_another_column(store, config):
    section = config(edges=["4\t7\t1", "0\t20\t1"], user_id_field="user_active_degree")
    edges = sampler_inputs.read_hard_edges(section, store, is_listed_item=None)
    assert _lists(edges) == [[3], [], [3], [1]]
    section = config(edges=EDGES, user_id_field="user")
    with pytest.raises(ValueError, match=r"user_id_field='user': no such column .* 'user_id'\]"):
        sampler_inputs.read_hard_edges(section, store, is_listed_item=None)


def test_user_ids_may_be_a_further_column_of_users(store, config):
    """A column beside the format's: integers or strings, and a user without one has no edges."""
    named = RawColumn(values=np.array(["anna", "bo"]), codes=np.array([1, 0, -1, 0]))
    user = {
        "account": named,
        "number": RawColumn(values=np.array([8, 5, 5, 6], np.int16)),
        "share": RawColumn(values=np.ones(4)),
        "tags": RawColumn(values=np.arange(8), offsets=np.array([0, 2, 4, 6, 8])),
    }
    store = dataclasses.replace(store, features=FeatureColumns(user=user))

    def read(**fields):
        return sampler_inputs.read_hard_edges(config(**fields), store, is_listed_item=None)

    lines = ["anna\t7\t1", "bo\t66\t1", "anna\t20\t1"]
    header = "u:string\ti:int64\tw:float"
    edges = read(edges=lines, user_id_field="account", edges_header=header)
    assert _lists(edges) == [[4], [3, 1], [], [3, 1]]
    edges = read(edges=["5\t7\t1", "8\t20\t1"], user_id_field="number")
    assert _lists(edges) == [[1], [3], [3], []]
    with pytest.raises(ValueError, match="entry 1: userid=7: no number of .*/users.parquet"):
        read(edges=["7\t7\t1"], user_id_field="number")
    with pytest.raises(ValueError, match=r"header \['u:int64', .*: must have the types \['string'"):
        read(edges=lines, user_id_field="account")
    with pytest.raises(TypeError, match="user_id_field='share': holds float64 in .*; ids are int"):
        read(edges=EDGES, user_id_field="share")
    with pytest.raises(ValueError, match="user_id_field='tags': has several values an entry in"):
        read(edges=EDGES, user_id_field="tags")


def test_attributes_hold_the_fields_and_the_items_own_id(store, config):
    fields = dict(
        item_id_field="cand_seq__video_id", attr_fields=("tag", "video_id"), attr_delimiter="#"
    )
    section = config(edges=EDGES, items=["7\t1\ta:b#7", "66\t2\t#66"], **fields)
    items = sampler_inputs.read_item_table(section, store)
    np.testing.assert_array_equal(items.weight, [0, 0, 0, 1, 2])
    for line, message in (
        (
            "66\t2\t66",
            r"entry 2: attrs='66': must hold 2 values joined by '#': tag, video_id \(1 such",
        ),
        ("66\t2\t", "entry 2: attrs='': must hold 2 values"),
        ("66\t2\t1#67", "entry 2: attrs='1#67': its video_id must be the line's id"),
    ):
        with pytest.raises(ValueError, match=message):
            section = config(edges=EDGES, items=["7\t1\ta#7", line], **fields)
            sampler_inputs.read_item_table(section, store)
    section = config(edges=EDGES, items=["7\t1\ta#7", "66\t2\t1#67"])  # not looked at
    assert sampler_inputs.read_item_table(section, store).is_listed.sum() == 2


def test_an_item_twice_and_missing_files_are_refused(store, config):
    section = config(edges=EDGES, items=["7\t1\t", "66\t2\t", "7\t1\t"])
    with pytest.raises(ValueError, match=r"entry 3: id=7: on an earlier line already \(1 such"):
        sampler_inputs.read_item_table(section, store)
    section = config(edges=EDGES, user_input_path="nowhere.tsv")
    with pytest.raises(
        FileNotFoundError,
        match=r"^data.negative_sampler.user_input_path='nowhere.tsv': no such file; make it with",
    ):
        sampler_inputs.read_hard_edges(section, store, is_listed_item=None)


def test_places_of_ids_in_any_order():
    ids = np.array([7, 900, 8, 66, -1, 10_000])
    np.testing.assert_array_equal(sampler_inputs.index_of(ids, ITEM_ID), [3, 0, -1, 4, -1, -1])
