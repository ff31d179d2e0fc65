"""Every configuration file loads, and resolves to the recorded text.

A changed default shows in review: rewrite the records with
`python tests/test_configs.py` and read the difference.
"""

import pathlib

import pytest

from configs import amazon_books, kuairand, ml_1m, ml_20m, ml_100k
from hstu_jax.config import resolve

RECORDS = pathlib.Path(__file__).parent / "golden_configs"
# File of configs/ -> its variants, the default first.
VARIANTS = {
    kuairand: ("sample", "subset", "1k", "pure", "27k", "seed"),
    ml_1m: ("hstu", "hstu_large", "sasrec", "hstu_times", "hstu_large_times"),
    ml_20m: ("hstu", "hstu_large"),
    ml_100k: ("hstu", "sasrec"),
    amazon_books: ("hstu", "hstu_large"),
}
ALL = [(module, variant) for module, variants in VARIANTS.items() for variant in variants]


def record_of(module, variant):
    return RECORDS / f"{module.__name__.split('.')[-1]}_{variant}.txt"


@pytest.mark.parametrize(("module", "variant"), ALL)
def test_resolved_text_is_the_recorded_one(module, variant):
    text = resolve.to_text(resolve.resolve(module.get_config(variant)))
    assert text == record_of(module, variant).read_text()


@pytest.mark.parametrize("module", VARIANTS)
def test_no_variant_is_the_default(module):
    assert module.get_config("") == module.get_config(VARIANTS[module][0])


@pytest.mark.parametrize("module", VARIANTS)
def test_unknown_variant_lists_the_known_ones(module):
    known = ", ".join(VARIANTS[module])
    with pytest.raises(ValueError, match=f"variant='2k': unknown; available: {known}"):
        module.get_config("2k")


if __name__ == "__main__":
    RECORDS.mkdir(exist_ok=True)
    for file, name in ALL:
        record_of(file, name).write_text(resolve.to_text(resolve.resolve(file.get_config(name))))
