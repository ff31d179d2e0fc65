"""The prepare command: flags to stores, the printed summary, and messages instead of traces."""

import pathlib
import subprocess
import sys

import pytest

from hstu_jax import prepare
from hstu_jax.data import event_store

SMALL = ["--num_users", "60", "--num_items", "960", "--num_days", "4"]


def test_sample_command(tmp_path, capsys):
    out_dir = tmp_path / "made" / "sample"
    prepare.main(["sample", "--out_dir", str(out_dir), *SMALL])
    text = capsys.readouterr().out
    store = event_store.open_store(out_dir)
    assert "generated sample (invented data, no real users)" in text
    for part in (
        "users 60   items 960",
        f"events {len(store.events):,}",
        f"train {store.stats['windows_per_split']['train']:,}",
        "dropped windows:",
        f"fingerprint {store.fingerprint()[:16]}",
    ):
        assert part in text
    with pytest.raises(SystemExit, match="already holds an event store; add --overwrite"):
        prepare.main(["sample", "--out_dir", str(out_dir), *SMALL])
    flags = ["--overwrite", "--window_mode", "events", "--positive_actions", "like", "long_view"]
    prepare.main(["sample", "--out_dir", str(out_dir), *SMALL, *flags])
    options = event_store.open_store(out_dir).stats["options"]["windows"]
    assert (options["mode"], options["positive_actions"]) == ("events", ["like", "long_view"])


def test_refused_input_is_a_message(tmp_path):
    with pytest.raises(SystemExit, match="error: raw_dir=.*: no standard logs; looked for"):
        prepare.main(["kuairand", "--raw_dir", str(tmp_path), "--out_dir", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match="error: action='hug': unknown"):
        prepare.main(["sample", "--out_dir", str(tmp_path / "o"), "--positive_actions", "hug"])


def test_what_the_windows_do_not_read_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--window_events=4: is not read with --window_mode=day"):
        prepare.main(
            ["kuairand", "--raw_dir", "raw", "--out_dir", str(tmp_path), "--window_events", "4"]
        )
    command = ["sample", "--out_dir", str(tmp_path / "a"), *SMALL, "--item_weight_exponent", "-1"]
    with pytest.raises(SystemExit, match="item_weight_exponent=-1.0: must not be negative"):
        prepare.main(command)
    assert not (tmp_path / "a").exists()


def test_jax_is_not_imported():
    root = pathlib.Path(prepare.__file__).parent.parent
    code = "import sys, hstu_jax.prepare; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
