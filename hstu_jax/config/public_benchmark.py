"""What the configurations of public next-item benchmarks share: item ids alone, leave-one-out.

Here: fields from sizes. Not here: which data and sizes (`configs/ml_1m.py` and its siblings).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import ml_collections

from hstu_jax.config import resolve, schema

# Users of a batch, rates and the rest are those of the published runs. A packed batch has so many
# at most: of ML-1M 118 in the mean, so that an epoch has 51 steps in place of 48.
_BATCH_USERS = 128
_CUTOFFS = (1, 5, 10, 50, 100, 200)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set and a model of the published experiments.

    Attributes:
        folder: event store.
        num_items: rows of the item table; at least the items of the data.
        num_train_users: users with a training window, for the steps between validations.
        has_times: the data has times, and attention a bias by them.
        max_seq_len: newest items of a user.
        width: of items and of the model.
        num_layers: blocks.
        num_heads: of attention.
        head_width: of queries, keys, values and gates per head.
        dropout: of the input and of every layer's output.
        num_negatives: shared by the queries of a batch.
        num_epochs: visits of every user.
        encoder: "hstu", or "sasrec" in its place with blocks of the same width.
    """

    folder: str
    num_items: int
    num_train_users: int
    has_times: bool
    max_seq_len: int
    width: int
    num_layers: int
    num_heads: int
    head_width: int
    dropout: float
    num_negatives: int
    num_epochs: int
    encoder: Literal["hstu", "sasrec"] = "hstu"


def of_variant(
    variants: Mapping[str, Benchmark], variant: str, *, name: str
) -> ml_collections.ConfigDict:
    """The configuration of one variant of a data set.

    Args:
        variants: by the word after the colon.
        variant: one of them; "" is `hstu`.
        name: of the configuration's file; the run's folder is `runs/<name>_<variant>`.

    Raises:
        ValueError: an unknown variant; lists the known ones.
    """
    variant = variant or "hstu"
    if variant not in variants:
        raise ValueError(f"variant={variant!r}: unknown; available: {', '.join(variants)}.")
    return get_config(variants[variant], workdir=f"runs/{name}_{variant}")


def get_config(benchmark: Benchmark, *, workdir: str) -> ml_collections.ConfigDict:
    """The configuration of a run.

    Args:
        benchmark: data and sizes.
        workdir: folder of the run.
    """
    c = resolve.defaults()
    c.workdir = workdir
    c.data.path = benchmark.folder
    _features(c, benchmark)
    _model(c, benchmark)
    c.data.batch_size, c.data.block_len = _BATCH_USERS, 64
    c.data.negative_sampler.num_sample = benchmark.num_negatives
    c.data.negative_sampler.exclusion = "query"
    _training(c, benchmark)
    c.eval.top_k, c.eval.catalogue, c.eval.also_with_seen = _CUTOFFS, "all", True
    c.eval.mean_baseline = False
    return c


def _features(c, benchmark: Benchmark) -> None:
    item = schema.IdFeature(
        expression="item:video_id",
        num_buckets=benchmark.num_items,
        embedding_dim=benchmark.width,
        embedding_name="item_emb",
        init_bound=0.035,  # standard deviation .02
    )
    groups = {"uih": ("uih_seq__video_id",), "candidate": ("cand_seq__video_id",)}
    if benchmark.has_times:
        groups |= {
            "uih_timestamp": ("uih_seq__action_timestamp",),
            "query_time": ("request_time",),
        }
    with c.unlocked():
        c.features = {n: resolve.section(item) for n in (*groups["uih"], *groups["candidate"])}
        c.feature_groups = groups


def _model(c, benchmark: Benchmark) -> None:
    c.model.objective = "next_item"
    tower = c.model.user_tower
    tower.encoder, tower.max_seq_len = benchmark.encoder, benchmark.max_seq_len
    hstu, stu = tower.hstu, tower.hstu.stu
    stu.embedding_dim, stu.num_heads = benchmark.width, benchmark.num_heads
    stu.hidden_dim, stu.attention_dim = benchmark.head_width, benchmark.head_width
    stu.output_dropout_ratio = benchmark.dropout
    stu.attn_alpha = 1.0  # the paper does not scale the logits
    # Histories of at most 200 tokens leave memory for what the reference's defaults compute twice.
    stu.recompute_normed_x = stu.recompute_uvqk = stu.recompute_y = False
    stu.use_silu_qkv, stu.use_position_bias = True, True
    stu.use_time_bias = benchmark.has_times
    hstu.attn_num_layers, hstu.input_dropout_ratio = benchmark.num_layers, benchmark.dropout
    hstu.positional_encoder.use_time_encoding = False
    hstu.positional_encoder.num_position_buckets = benchmark.max_seq_len
    actions = hstu.input_preprocessor.uih_preprocessor
    with c.unlocked():
        actions.action_encoder, actions.action_mlp = None, None
    tower.sasrec.num_blocks, tower.sasrec.num_heads = benchmark.num_layers, benchmark.num_heads
    tower.sasrec.dropout_ratio = benchmark.dropout
    c.model.similarity, c.model.temperature = "COSINE", 0.05
    # An input projection that starts as the identity, since the published model has none. In `hstu`
    # layers values and their way out start aligned too (`model/initialization.py`).
    c.model.initialization = "aligned"


def _training(c, benchmark: Benchmark) -> None:
    c.train.num_epochs = benchmark.num_epochs
    dense, sparse = c.train.dense_optimizer, c.train.sparse_optimizer
    dense.kind, dense.lr, dense.beta2, dense.weight_decay = "adamw", 1e-3, 0.98, 0.0
    # Rows of a batch alone move, where the published AdamW also moves the others by its momentum.
    sparse.kind, sparse.lr, sparse.beta2 = "adam", 1e-3, 0.98
    full_batches = -(-benchmark.num_train_users // _BATCH_USERS)  # a little less than an epoch
    c.eval.every_num_steps = c.train.save_checkpoints_steps = 5 * full_batches
    c.train.log_step_count_steps = full_batches
    c.train.keep_best.metric = "ndcg@10"
