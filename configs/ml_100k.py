"""MovieLens-100K, next item: the quick one. Minutes on two CPU cores; no published HSTU figures.

    python -m hstu_jax.prepare interactions --format=movielens_100k \\
        --raw_file ml-100k/u.data --out_dir data/ml_100k
    python -m hstu_jax.train --config=configs/ml_100k.py

The sizes are those of ML-1M. Variants after the colon: `hstu` (default), `sasrec`. See
docs/benchmarks.md.
"""

import dataclasses

import ml_collections

from hstu_jax.config import public_benchmark

_HSTU = public_benchmark.Benchmark(
    folder="data/ml_100k",
    num_items=2_048,
    num_train_users=943,
    has_times=True,
    max_seq_len=200,
    width=50,
    num_layers=2,
    num_heads=1,
    head_width=50,
    dropout=0.2,
    num_negatives=512,
    num_epochs=101,
)
_VARIANTS = {
    "hstu": _HSTU,
    "sasrec": dataclasses.replace(_HSTU, encoder="sasrec", has_times=False),
}


def get_config(variant: str = "hstu") -> ml_collections.ConfigDict:
    """The configuration of one variant.

    Args:
        variant: a name of the module docstring; "" is `hstu`.
    """
    return public_benchmark.of_variant(_VARIANTS, variant, name="ml_100k")
