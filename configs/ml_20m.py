"""MovieLens-20M, next item, by the protocol of the published figures (docs/benchmarks.md).

    python -m hstu_jax.prepare interactions --format=movielens_20m \\
        --raw_file ml-20m/ratings.csv --out_dir data/ml_20m
    python -m hstu_jax.train --config=configs/ml_20m.py

Published: HSTU HR@10 .3273, NDCG@10 .1895; HSTU-large .3556, .2098; SASRec .2889, .1621. For a GPU.
Variants after the colon: `hstu` (default), `hstu_large`.
"""

import dataclasses

import ml_collections

from hstu_jax.config import public_benchmark

_HSTU = public_benchmark.Benchmark(
    folder="data/ml_20m",
    num_items=27_000,
    num_train_users=138_493,
    has_times=True,
    max_seq_len=200,
    width=256,
    num_layers=4,
    num_heads=4,
    head_width=64,
    dropout=0.2,
    num_negatives=1_024,
    num_epochs=101,
)
_VARIANTS = {
    "hstu": _HSTU,
    "hstu_large": dataclasses.replace(_HSTU, num_layers=16, num_heads=8, head_width=32),
}


def get_config(variant: str = "hstu") -> ml_collections.ConfigDict:
    """The configuration of one variant.

    Args:
        variant: a name of the module docstring; "" is `hstu`.
    """
    return public_benchmark.of_variant(_VARIANTS, variant, name="ml_20m")
