"""Amazon Books (ratings of 2014), next item, by the protocol of the published figures.

    python -m hstu_jax.prepare interactions --format=amazon --raw_file ratings_Books.csv \\
        --min_user_events 5 --min_item_events 5 --out_dir data/amazon_books
    python -m hstu_jax.train --config=configs/amazon_books.py

Published: HSTU HR@10 .0416, NDCG@10 .0227; HSTU-large .0478, .0262; SASRec .0306, .0164. For a GPU.
Variants after the colon: `hstu` (default), `hstu_large`. See docs/benchmarks.md.
"""

import dataclasses

import ml_collections

from hstu_jax.config import public_benchmark

_HSTU = public_benchmark.Benchmark(
    folder="data/amazon_books",
    num_items=700_000,
    num_train_users=694_897,
    has_times=True,
    max_seq_len=50,
    width=64,
    num_layers=4,
    num_heads=4,
    head_width=16,
    dropout=0.5,
    num_negatives=2_048,
    num_epochs=201,
)
_VARIANTS = {
    "hstu": _HSTU,
    "hstu_large": dataclasses.replace(_HSTU, num_layers=16, num_heads=8, head_width=8),
}


def get_config(variant: str = "hstu") -> ml_collections.ConfigDict:
    """The configuration of one variant.

    Args:
        variant: a name of the module docstring; "" is `hstu`.
    """
    return public_benchmark.of_variant(_VARIANTS, variant, name="amazon_books")
