"""Weights of items: the reference's item table, its broken forms, and its use by the pipeline."""

import numpy as np
import pytest

from hstu_jax.features import item_weights, pipeline

HEADER = "id:int64\tweight:float\tattrs:string\n"


@pytest.fixture
def read(tmp_path):
    """Function: text of a table -> weights."""

    def read(text, *, num_items=5, **options):
        (tmp_path / "items.tsv").write_text(text)
        return item_weights.table_weights(tmp_path / "items.tsv", num_items=num_items, **options)

    return read


def test_lines_in_any_order_and_items_without_a_line(read):
    weights = read(HEADER + "3\t2.5\t77:a\n0\t1e-2\t\n\n4\t0\t#9\n")
    np.testing.assert_array_equal(weights, [0.01, 0, 0, 2.5, 0])
    np.testing.assert_array_equal(read(HEADER), np.zeros(5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\tweight\tattrs\n", r"items.tsv line 1: header \['id', 'weight', 'attrs'\]: must have"),
        ("id:int64,weight:float,attrs:string\n", r"such as 'id:int64\\tweight:float\\tattrs:str"),
        (HEADER + "1\t2\ta\nx\t2\ta\n", r"items.tsv line 3: id='x': must be int64 \(1 such"),
        (HEADER + "1\n", "line 2: 1 columns found, 3 expected"),
        (HEADER + "1\t2\ta\n2\tnan\ta\n", "line 3: weight='nan': must be float"),
        (
            HEADER + "1\t2\ta\n5\t1\ta\n-1\t1\ta\n",
            r"entry 2: id=5: outside 0\.\.4 .* \(2 such entries",
        ),
        (HEADER + "1\t2\ta\n1\t3\ta\n", r"entry 2: id=1: on an earlier line already \(1 such"),
    ],
)
def test_broken_tables_are_refused(text, message, read):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_items_of_list_columns_are_named_by_their_own_ids(read):
    key = np.array([70, 5, 9])
    weights = read(HEADER + "9\t3\t\n70\t1\t\n", num_items=3, item_key=key)
    np.testing.assert_array_equal(weights, [1, 0, 3])
    with pytest.raises(ValueError, match=r"entry 1: id=8: is no item of the list columns \(2 such"):
        read(HEADER + "8\t3\t\n99\t1\t\n", num_items=3, item_key=key)
    words = np.array(["v9", "a", "long name"])
    text = HEADER.replace("int64", "string")
    weights = read(text + "long name\t3\t\nv9\t1\t\n", num_items=3, item_key=words)
    np.testing.assert_array_equal(weights, [1, 0, 3])
    with pytest.raises(ValueError, match="line 1: header .*'id:int64'.*: must have .*'id:string"):
        read(HEADER, num_items=3, item_key=words)
    with pytest.raises(ValueError, match="line 2: 1 columns found, 3 expected"):
        read(text + "a\n", num_items=3, item_key=words)
    with pytest.raises(ValueError, match="entry 2: id='a': on an earlier line already"):
        read(text + "a\t1\t\na\t2\t\n", num_items=3, item_key=words)


def test_pipeline_draws_by_the_table(make_store, make_config, tmp_path):
    store = make_store([4] * 8, [1] * 8)
    table = tmp_path / "weights.tsv"
    table.write_text(HEADER + "".join(f"{i}\t{i % 2}\t{i}\n" for i in range(50)))
    config = make_config(sampler_input_path=str(table), sampler_num_sample=500)
    batch = pipeline.Pipeline(config, store).batch_at(0).batch
    negative = batch.negative["cand_seq__video_id"][0]
    positive = batch.positive["cand_seq__video_id"][0][batch.query_mask[0]]
    assert set(negative.tolist()) == set(range(1, 50, 2)) - set(positive.tolist())
    np.testing.assert_allclose(batch.negative_log_q, np.log(1 / 25), rtol=1e-6)


def test_columns_may_be_separated_otherwise(make_store, make_config, tmp_path):
    store = make_store([4] * 8)
    table = tmp_path / "weights.csv"
    table.write_text(HEADER.replace("\t", ",") + "7,1,a\tb\n9,3,\n")
    fields = {"sampler_input_path": str(table), "sampler_field_delimiter": ","}
    sampler = pipeline.Pipeline(make_config(**fields), store).source.sampler
    np.testing.assert_allclose(sampler.log_q(np.array([7, 9])), np.log([0.25, 0.75]), rtol=1e-6)


def test_the_table_of_a_store_isread(make_store, make_config):
    store = make_store([4] * 8)
    config = make_config(sampler_input_path=str(store.path / "item_table.tsv"))
    pipeline.Pipeline(config, store).batch_at(0)


def test_missing_table_names_the_one_that_preparation_writes(make_store, make_config):
    config = make_config(sampler_input_path="nowhere.tsv")
    with pytest.raises(FileNotFoundError) as error:
        pipeline.Pipeline(config, make_store([3]))
    message = str(error.value)
    assert message.startswith("data.negative_sampler.input_path='nowhere.tsv': no such file; use ")
    assert "item_table.tsv" in message
