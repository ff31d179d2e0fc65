"""The exchange on four and eight devices: exact for any ids; memory and traffic of its programs."""

import json
import math

import pytest

from tests import devices

MESHES = ("1x2", "1x4", "1x8", "2x4")
ROWS, MORE_ROWS = 400_000, 1_600_000
MODULE = "tests.tables.exchange_on_many"
BUCKETS = 1.25 * 4096  # keys that a device has room to send


@pytest.fixture(scope="module")
def figures():
    """Figures of compiled steps by (mesh, rows); before them four devices are checked."""
    tasks = [f"compiled:{mesh}:{ROWS}" for mesh in MESHES]
    tasks.append(f"compiled:2x4:{MORE_ROWS}")
    printed = devices.run_on_devices(
        MODULE,
        *("exact:1x4:6", "exact:2x2:6", "ragged:2x2", "joined:2x4"),
        *tasks,
        num_devices=8,
        timeout_s=600,
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    return {(line["mesh"], line["rows"]): line for line in lines}


def test_four_devices_are_exact_and_tables_change_in_place(figures):
    assert len(figures) == 5
    for line in figures.values():
        assert line["alias_bytes"] >= line["state_bytes"]
    large = figures["2x4", MORE_ROWS]
    assert large["temp_bytes"] < 0.15 * large["state_bytes"]


def test_temporaries_follow_neither_rows_nor_devices(figures):
    temp_bytes = {place: line["temp_bytes"] for place, line in figures.items()}
    assert temp_bytes["2x4", MORE_ROWS] == temp_bytes["2x4", ROWS]
    assert temp_bytes["1x4", ROWS] < 1.01 * temp_bytes["1x2", ROWS]
    assert temp_bytes["1x8", ROWS] < 1.01 * temp_bytes["1x4", ROWS]
    assert temp_bytes["2x4", ROWS] < 1.25 * temp_bytes["1x2", ROWS]  # the second level's buckets


def test_traffic_is_that_of_the_ids_whatever_the_rows_and_devices(figures):
    # Ids twice (to fetch, to update), rows once, gradients once; rows are 64 floats.
    payload = BUCKETS * 4 * (2 + 64 + 64)
    for line in figures.values():
        assert line["kinds"] == ["all-reduce", "all-to-all"]
        sizes = [int(size) for size in line["mesh"].split("x") if size != "1"]
        scalars = 32  # the ends of rounds: one number each
        for size in set(sizes):
            want = sizes.count(size) * payload * (size - 1) / size
            assert abs(line["sent_bytes"][str(size)] - want) <= scalars
        if len(sizes) == 2:  # nothing but scalars goes between all devices at once
            assert line["sent_bytes"][str(math.prod(sizes))] <= scalars
        assert line["largest_bytes"] == BUCKETS * 64 * 4


@pytest.mark.long
def test_four_and_eight_devices_are_exact_on_many_draws():
    meshes = ("1x4", "2x2", "1x8", "2x4", "4x2", "8x1")
    tasks = [task for mesh in meshes for task in (f"exact:{mesh}:20", f"ragged:{mesh}")]
    devices.run_on_devices(MODULE, *tasks, num_devices=8, timeout_s=1200)
