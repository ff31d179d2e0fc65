"""What an embedding table is: its name and size, the place of an id in it, its first values.

An id is what the features hold; a row is a place in the table's array. The map between them is
fixed and does not depend on the number of devices. Looking rows up is in `lookup.py`, changing them
in `update.py`, moving them between devices in `exchange.py`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Tables are cut into this many stripes, and consecutive ids go to different stripes, so that hot
# neighbouring ids spread over the devices. Rows are padded to a multiple of it: any device count
# that divides it can hold equal blocks.
VIRTUAL_SHARDS = 1024
# With fewer rows than this per stripe a table keeps the identity: nothing is gained by spreading.
_MIN_ROWS_PER_SHARD = 8
_SLAB_VALUES = 2**21  # values drawn at a time
_MAX_ROWS = 2**31 - 2 * VIRTUAL_SHARDS  # rows and the padding row must fit int32


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """Name and size of one embedding table.

    With S stripes, `row = (id % S) * (padded_rows / S) + id // S`; S is 1024 for tables of at least
    8 * 1024 ids, else 1 (row = id).

    Attributes:
        name: the `embedding_name`; features that share it share the table.
        num_rows: number of ids, which are 0..num_rows-1.
        dim: width of a row.
        init_bound: first values lie within +- this; 0 = sqrt(1 / num_rows).
    """

    name: str
    num_rows: int
    dim: int
    init_bound: float = 0.0

    def __post_init__(self):
        if not 1 <= self.num_rows <= _MAX_ROWS:
            raise ValueError(
                f"num_rows={self.num_rows} (table {self.name!r}): must be between 1 and "
                f"{_MAX_ROWS}; hash the ids into fewer buckets."
            )
        if self.dim < 1:
            raise ValueError(
                f"dim={self.dim} (table {self.name!r}): must be at least 1; "
                "set the feature's embedding_dim."
            )
        if not self.init_bound >= 0:
            raise ValueError(
                f"init_bound={self.init_bound} (table {self.name!r}): must not be negative; 0 is "
                "sqrt(1 / num_rows)."
            )

    @property
    def num_stripes(self) -> int:
        """S of the id -> row map."""
        return VIRTUAL_SHARDS if self.num_rows >= _MIN_ROWS_PER_SHARD * VIRTUAL_SHARDS else 1

    @property
    def padded_rows(self) -> int:
        """Rows of the table's array; also the row number that stands for "no row"."""
        return math.ceil(self.num_rows / VIRTUAL_SHARDS) * VIRTUAL_SHARDS


def rows_of(
    spec: TableSpec, ids: Int[Array, "*slots"], valid: Bool[Array, "*slots"]
) -> Int[Array, "*slots"]:
    """Rows of the ids, `spec.padded_rows` where there is no id.

    Args:
        spec: the table.
        ids: 0..spec.num_rows-1 where `valid`; anything elsewhere. Ids out of range are refused by
            the host pipeline and not looked for here.
        valid: False in padding slots.

    Returns:
        int32 rows; padding slots hold `spec.padded_rows`, which every lookup and update drops.
    """
    ids = ids.astype(jnp.int32)
    stripe_rows = spec.padded_rows // spec.num_stripes
    rows = (ids % spec.num_stripes) * stripe_rows + ids // spec.num_stripes
    return jnp.where(valid, rows, spec.padded_rows)


def ids_of(spec: TableSpec, rows: Int[Array, "*slots"]) -> Int[Array, "*slots"]:
    """Ids of the rows: the inverse of `rows_of`.

    Args:
        spec: the table.
        rows: 0..spec.padded_rows-1.

    Returns:
        int32 ids; at least `spec.num_rows` for the table's padding rows.
    """
    rows = rows.astype(jnp.int32)
    stripe_rows = spec.padded_rows // spec.num_stripes
    return (rows % stripe_rows) * spec.num_stripes + rows // stripe_rows


def init_weights(
    spec: TableSpec, key: Array, *, sharding: jax.sharding.Sharding | None = None
) -> Float[Array, "rows dim"]:
    """First values of a table, drawn on the devices that keep them.

    weights ~ U(-b, b) with b = init_bound, or sqrt(1 / num_rows) where that is 0; padding rows 0. A
    value depends on the key and its place only, not on the number of devices.

    Args:
        spec: the table.
        key: random key.
        sharding: where the rows are to live; None is the default device.

    Returns:
        The table's array, `spec.padded_rows` x `spec.dim`, float32, in row (not id) order.

    Source: the default initialiser of torchrec 1.8.0 `EmbeddingConfig`, which TorchEasyRec 1.3.16
    leaves as it is.
    """
    return jax.jit(functools.partial(_draw, spec), out_shardings=sharding)(key)


def _draw(spec: TableSpec, key: Array) -> Float[Array, "rows dim"]:
    """The table, a slab of every stripe at a time.

    In one piece the random bits take three times the table's memory. The loop runs along the
    stripes, so each device of a split table draws its own part.
    """
    limit = spec.init_bound or math.sqrt(1.0 / spec.num_rows)
    stripe_rows = spec.padded_rows // VIRTUAL_SHARDS
    slab_rows = min(stripe_rows, math.ceil(_SLAB_VALUES / (VIRTUAL_SHARDS * spec.dim)))
    shape = (VIRTUAL_SHARDS, slab_rows, spec.dim)

    def fill(slab, weights):
        # The last slab may begin inside the one before: its rows are drawn again.
        start = jnp.minimum(slab * slab_rows, stripe_rows - slab_rows)
        stripe = jnp.arange(VIRTUAL_SHARDS, dtype=jnp.int32)[:, None]
        place = start + jnp.arange(slab_rows, dtype=jnp.int32)[None, :]
        is_used = ids_of(spec, stripe * stripe_rows + place) < spec.num_rows
        slab_key = jax.random.fold_in(key, slab)
        drawn = jax.random.uniform(slab_key, shape, jnp.float32, -limit, limit)
        drawn = jnp.where(is_used[:, :, None], drawn, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(weights, drawn, start, axis=1)

    weights = jnp.zeros((VIRTUAL_SHARDS, stripe_rows, spec.dim), jnp.float32)
    weights = jax.lax.fori_loop(0, math.ceil(stripe_rows / slab_rows), fill, weights)
    return weights.reshape(spec.padded_rows, spec.dim)
