"""Every token times the matrix of its user, in memory linear in tokens plus users.

A matrix per token would be [tokens, I, O]. Instead the tokens of each user are cut into blocks that
hold one user only, a matrix is read once per block, and one batched product does the rest. (The
matrices could also stay factored through the few numbers that they are made from, but then every
token would be multiplied once per factor.) Used by `contextual_mlp.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hstu_jax.model import linear
from pallas_kernels.hstu_attention import layout as attention_layout

# About I * O / (I + O) at the sizes in use (64 to 512, 64 to 128): there the matrices of the blocks
# take as much memory as the tokens. Longer blocks waste slots on short histories.
_BLOCK_TOKENS = 64


def apply_user_maps(
    x: Float[Array, "R L I"],
    kernels: Float[Array, "S I O"],
    biases: Float[Array, "S O"],
    *,
    layout: attention_layout.SequenceLayout,
    skip: int,
) -> Float[Array, "R L O"]:
    """x[token] @ kernels[user of the token] + biases[user of the token].

    Args:
        x: tokens; those without a result hold finite values.
        kernels: a matrix per user slot; finite also in unused ones.
        biases: a vector per user slot, likewise.
        layout: where the users' tokens lie.
        skip: tokens at the start of every segment that get no result (contextual ones).

    Returns:
        Results; finite values that mean nothing in skipped slots and padding.
    """
    starts, lengths = jnp.asarray(layout.starts) + skip, jnp.asarray(layout.lengths) - skip
    lengths = jnp.maximum(lengths, 0)
    num_slots = layout.num_rows * layout.row_len
    block_len = min(_BLOCK_TOKENS, layout.row_len)
    num_users = lengths.shape[0]
    # Each user rounds up to whole blocks: at most one partly filled block per user.
    num_blocks = num_slots // block_len + num_users
    ends = jnp.cumsum(-(-lengths // block_len))
    begins = ends - -(-lengths // block_len)
    block = jnp.arange(num_blocks, dtype=ends.dtype)
    user = jnp.minimum(jnp.searchsorted(ends, block, side="right"), num_users - 1)
    offset = (block - begins[user])[:, None] * block_len + jnp.arange(block_len)[None]
    is_token = (offset >= 0) & (offset < lengths[user][:, None])
    slot = jnp.where(is_token, starts[user][:, None] + offset, num_slots)
    tokens = x.reshape(num_slots, -1).at[slot].get(mode="fill", fill_value=0)

    # The matrices of the blocks are read again in the backward pass, not kept until then.
    @jax.checkpoint
    def multiply(tokens, kernels, biases):
        # Through float32, where the gradients of a user's blocks are summed.
        kernels, biases = kernels.astype(jnp.float32), biases.astype(jnp.float32)
        kernels = kernels[user].astype(tokens.dtype)
        precision = linear.product_precision(tokens.dtype)
        products = jnp.einsum("bti,bio->bto", tokens, kernels, precision=precision)
        return (products + biases[user][:, None]).astype(tokens.dtype)

    products = multiply(tokens, kernels, biases).reshape(num_blocks * block_len, -1)
    segment = attention_layout.token_segments(layout)
    in_segment = attention_layout.token_positions(layout) - skip
    has_result = (segment >= 0) & (in_segment >= 0)
    segment, in_segment = jnp.maximum(segment, 0), jnp.maximum(in_segment, 0)
    # Inside a user, tokens of its blocks are numbered on from the user's first block.
    place = jnp.where(has_result, begins[segment] * block_len + in_segment, products.shape[0])
    return products.at[place].get(mode="fill", fill_value=0)
