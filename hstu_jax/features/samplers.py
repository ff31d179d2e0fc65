"""(sampler configuration, store) -> the samplers of a run: negatives, and hard negatives if any.

Here: which file or count the weights come from. Not here: reading the files (`sampler_inputs.py`)
and drawing (`negatives.py`, `hard_negatives.py`).
"""

import pathlib

from hstu_jax.config import sampler_schema
from hstu_jax.data import event_store
from hstu_jax.data import schema as data_schema
from hstu_jax.features import hard_negatives, item_weights, negatives, sampler_inputs


def build(
    config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore
) -> tuple[negatives.NegativeSampler, hard_negatives.HardNegativeSampler | None]:
    """The sampler of a group's negatives, and that of each user's hard ones or None.

    Raises:
        ValueError: weights or edges are wrong, or do not fit the items.
        FileNotFoundError: a path of the configuration names no file.
    """
    if config.kind == "NegativeSampler":
        return _build_sampler(config, store), None
    if config.item_input_path:
        items = sampler_inputs.read_item_table(config, store)
        sampler = negatives.NegativeSampler(items.weight, origin=config.item_input_path)
    else:
        items, sampler = None, _build_sampler(config, store)
    edges = sampler_inputs.read_hard_edges(
        config, store, is_listed_item=None if items is None else items.is_listed
    )
    return sampler, hard_negatives.HardNegativeSampler(
        edges,
        num_sample=config.num_hard_sample,
        strategy=config.hard_sample_strategy,
        exclude_positives=config.exclude_positives,
    )


def _build_sampler(
    config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore
) -> negatives.NegativeSampler:
    if config.input_path:
        path = pathlib.Path(config.input_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"data.negative_sampler.input_path={config.input_path!r}: no such file; use "
                f"{store.path / data_schema.ITEM_TABLE_FILE}, which `python -m hstu_jax.prepare` "
                "writes, or leave it empty."
            )
        weights = item_weights.table_weights(
            path,
            num_items=store.num_items,
            delimiter=config.field_delimiter,
            item_key=store.features.item_key,
        )
        return negatives.NegativeSampler(weights, origin=config.input_path)
    weights = item_weights.train_count_weights(
        store.items.train_count, exponent=config.weight_exponent
    )
    return negatives.NegativeSampler(weights, origin=f"{store.path} train_count")
