"""Every configuration file loads, and resolves to the recorded text.

A changed default shows in review: rewrite the records with
`python tests/test_configs.py` and read the difference.
"""

import pathlib

import pytest

from configs import kuairand
from hstu_jax.config import resolve

RECORDS = pathlib.Path(__file__).parent / "golden_configs"
VARIANTS = ("sample", "subset", "1k", "pure", "27k", "seed")


@pytest.mark.parametrize("variant", VARIANTS)
def test_resolved_text_is_the_recorded_one(variant):
    text = resolve.to_text(resolve.resolve(kuairand.get_config(variant)))
    assert text == (RECORDS / f"kuairand_{variant}.txt").read_text()


def test_no_variant_is_the_sample():
    assert kuairand.get_config("") == kuairand.get_config("sample")


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="variant='2k': unknown; available: sample, subset, 1k"):
        kuairand.get_config("2k")


if __name__ == "__main__":
    RECORDS.mkdir(exist_ok=True)
    for name in VARIANTS:
        resolved = resolve.resolve(kuairand.get_config(name))
        (RECORDS / f"kuairand_{name}.txt").write_text(resolve.to_text(resolved))
