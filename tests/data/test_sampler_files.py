"""The samplers' text files: what is read, and the message of each broken line."""

import numpy as np
import pytest

from hstu_jax.data import sampler_files

EDGES = sampler_files.EDGE_COLUMNS
HEADER = "userid:int64\titemid:int64\tweight:float\n"


def _read(tmp_path, text, columns=EDGES, **options):
    path = tmp_path / "file.tsv"
    path.write_text(text)
    return sampler_files.read_columns(path, columns, **options)


def test_lines_in_order_without_the_empty_ones(tmp_path):
    table = _read(tmp_path, HEADER + "3\t-4\t1e-2\n\n3\t9007199254740993\t2\r\n")
    assert table["userid"].tolist() == [3, 3]
    assert table["itemid"].tolist() == [-4, 9007199254740993]  # not a float64
    assert table["weight"].tolist() == [0.01, 2.0]


@pytest.mark.parametrize("text", [HEADER, HEADER + "\n", HEADER.rstrip("\n")])
def test_no_lines_are_empty_columns(tmp_path, text):
    table = _read(tmp_path, text)
    assert [(len(values), values.dtype) for values in table.values()] == [
        (0, np.int64),
        (0, np.int64),
        (0, np.float64),
    ]


def test_names_of_the_header_and_the_delimiter_are_free(tmp_path):
    text = 'video:int64,w:float,a:string\n5,1,"x:y\n6,2,\n'
    table = _read(tmp_path, text, sampler_files.ITEM_COLUMNS, delimiter=",")
    assert table["id"].tolist() == [5, 6]
    assert table["attrs"].tolist() == ['"x:y', ""]


def test_what_is_written_is_read(tmp_path):
    values = [np.array([7, -1]), np.array([5, 6]), np.array([0.125, 1.0])]
    sampler_files.write_columns(tmp_path / "edges.tsv", EDGES, values)
    table = sampler_files.read_columns(tmp_path / "edges.tsv", EDGES)
    for written, read in zip(values, table.values(), strict=True):
        np.testing.assert_array_equal(written, read)
    assert (tmp_path / "edges.tsv").read_text() == HEADER + "7\t5\t0.125\n-1\t6\t1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: header \[''\]: must have the types \['int64', 'int64', 'float'\], such as"),
        ("u:string\ti:int64\tw:float\n", r"line 1: header \['u:string', 'i:int64', 'w:float'\]"),
        (HEADER + "1\t2\t1\n1\t2\n", r"line 3: 2 columns found, 3 expected \(1 such lines"),
        (HEADER + "1\tx\t1\n1\t2\t1\nx\t2\n", r"line 2: itemid='x': must be int64 \(2 such lines"),
        (HEADER + "1\t2.5\t1\n", r"line 2: itemid='2\.5': must be int64"),
        (HEADER + "1\t2\t1\n\n\t2\t1\n", r"line 4: userid='': must be int64"),
        (HEADER + "1\t99999999999999999999\t1\n", "must be int64"),
        (HEADER + "1\t2\tnan\n", r"line 2: weight='nan': must be float"),
        (HEADER + "1\t2\tbig\n", r"line 2: weight='big': must be float"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, text)
