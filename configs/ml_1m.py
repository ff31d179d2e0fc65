"""MovieLens-1M, next item, by the protocol of the published figures (docs/benchmarks.md).

    python -m hstu_jax.prepare interactions --format=sequences \\
        --raw_file ../shared/data/ml_1m/ml-1m.txt.gz --out_dir data/ml_1m
    python -m hstu_jax.train --config=configs/ml_1m.py

Leave-one-out with a validation item of its own, the whole catalogue, seen items removed and not.
Beside, on this very file: gSASRec HR@10 .3003, NDCG@10 .1726, SASRec .2392, .1259; HSTU and
HSTU-large (their paper, from the raw ratings, with times) .3097, .1720 and .3294, .1893.

Variants after the colon: `hstu` (default), `hstu_large`, `sasrec`: on the file above, which has the
order of events and no times; `hstu_times`, `hstu_large_times`: with a bias by time, on ratings.dat
of ml-1m.zip:

    python -m hstu_jax.prepare interactions --format=movielens_1m \\
        --raw_file ml-1m/ratings.dat --out_dir data/ml_1m_ratings
"""

import dataclasses

import ml_collections

from hstu_jax.config import public_benchmark

_HSTU = public_benchmark.Benchmark(
    folder="data/ml_1m",
    num_items=4_096,
    num_train_users=6_040,
    has_times=False,
    max_seq_len=200,
    width=50,
    num_layers=2,
    num_heads=1,
    head_width=50,
    dropout=0.2,
    num_negatives=512,
    num_epochs=101,
)
_LARGE = dataclasses.replace(_HSTU, num_layers=8, num_heads=2, head_width=25)
_TIMES = {"folder": "data/ml_1m_ratings", "has_times": True}
_VARIANTS = {
    "hstu": _HSTU,
    "hstu_large": _LARGE,
    "sasrec": dataclasses.replace(_HSTU, encoder="sasrec"),
    "hstu_times": dataclasses.replace(_HSTU, **_TIMES),
    "hstu_large_times": dataclasses.replace(_LARGE, **_TIMES),
}


def get_config(variant: str = "hstu") -> ml_collections.ConfigDict:
    """The configuration of one variant.

    Args:
        variant: a name of the module docstring; "" is `hstu`.
    """
    return public_benchmark.of_variant(_VARIANTS, variant, name="ml_1m")
