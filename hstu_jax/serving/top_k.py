"""Exact top-k of a catalogue: the items of greatest inner product with each user.

The device finds candidates in float32, block by block, with a running merge: no array is ever
[users, items]. The host then scores and orders the candidates (`search_catalogue.py`), and proves
for every user that no item outside them can belong to the answer; the few users for whom the proof
fails (very many items of one score) are answered by going through the whole catalogue. So the
answer does not depend on block sizes, the number of devices or the rounding of their products.

Not here: approximate search behind the same signature (`item_index.py`), files (`retrieval.py`).
Imports are the loader's, so that a server without the training code can search.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.serving.search_catalogue import (
    Catalogue,
    Exclusions,
    TopK,
    concatenate,
    padded_size,
    user_blocks,
)

_ITEM_BLOCK = 16_384
_BLOCK_SCORES = 2**22  # scores held at a time on a device, 16 MiB of float32
_MIN_SPARE = 32  # candidates beyond k


class ExactSearch:
    """Exact top-k over one catalogue, whose vectors stay on the devices.

    Items are split over the devices, every device keeps its best, and these are merged. Memory: the
    vectors once on the devices together, and `_BLOCK_SCORES` scores.

    Args:
        item_ids: integers or strings [N], each once, in any order.
        item_vectors: float32 [N, E]; a memory map is read, not held.
        item_mask: bool [N], items that may be shown; None is all.
        devices: where to search; None is all devices of the default backend.
        item_block: items scored at a time. No influence on the result.

    Raises:
        ValueError: an id twice, a vector that is not finite, shapes that do not fit, no item.
    """

    def __init__(
        self,
        item_ids: np.ndarray,
        item_vectors: np.ndarray,
        *,
        item_mask: np.ndarray | None = None,
        devices: Sequence[jax.Device] | None = None,
        item_block: int = _ITEM_BLOCK,
    ) -> None:
        self.catalogue = Catalogue(item_ids, item_vectors, item_mask=item_mask)
        devices = list(devices or jax.devices())
        num_items = self.catalogue.num_items
        block = min(item_block, -(-num_items // len(devices)))
        num_blocks = -(-num_items // (block * len(devices)))
        self._user_block = int(np.clip(_BLOCK_SCORES // block, 1, 1024))
        self._mesh = jax.make_mesh(
            (len(devices),), ("item",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        spec = jax.sharding.PartitionSpec("item")
        self._items = jax.make_array_from_callback(
            (len(devices), num_blocks, block, self.catalogue.dim),
            jax.sharding.NamedSharding(self._mesh, spec),
            lambda index: self._shard(index[0].start or 0, num_blocks, block),
        )

    def _shard(self, device: int, num_blocks: int, block: int) -> np.ndarray:
        size = num_blocks * block
        shard = np.zeros((size, self.catalogue.dim), np.float32)
        start = min(device * size, self.catalogue.num_items)
        stop = min(start + size, self.catalogue.num_items)
        shard[: stop - start] = self.catalogue.vectors(np.arange(start, stop))
        return shard.reshape(1, num_blocks, block, -1)

    def check_k(self, k: int) -> None:
        """Raises ValueError unless k is 1 .. the number of items that may be shown."""
        self.catalogue.check_k(k)

    def search(
        self, user_vectors: np.ndarray, *, k: int, exclusions: Exclusions | None = None
    ) -> TopK:
        """The k best items of every user.

        Args:
            user_vectors: float32 [W, E].
            k: items a user, at most N.
            exclusions: items not to be shown; None is none.

        Returns:
            `TopK`; ids in order of (score down, id up).

        Raises:
            ValueError: k is not 1..N, a vector is not finite, or shapes do not fit.
        """
        users = self.catalogue.check_users(user_vectors, k=k, exclusions=exclusions)
        num_kept = min(k + max(_MIN_SPARE, k // 4), self.catalogue.num_items)
        most = int(np.clip(_BLOCK_SCORES // num_kept, 1, self._user_block))
        blocks = list(user_blocks(exclusions, len(users), most=most))
        parts = []
        for own in blocks:
            hidden = self.catalogue.excluded_positions(
                exclusions.take(own) if exclusions else None, len(own)
            )
            size = padded_size(len(own), most)
            parts.append(self._search_block(users[own], hidden, size=size, num_kept=num_kept, k=k))
        return concatenate(parts, self.catalogue, blocks=blocks, k=k)

    def _search_block(
        self, users: np.ndarray, hidden: np.ndarray, *, size: int, num_kept: int, k: int
    ) -> TopK:
        catalogue = self.catalogue
        device_users = np.zeros((size, catalogue.dim), np.float32)
        device_users[: len(users)] = users
        device_hidden = np.full((size, hidden.shape[1]), -1, np.int32)
        device_hidden[: len(users)] = hidden
        approximate, positions = jax.device_get(
            _candidates(
                self._items,
                device_users,
                device_hidden,
                np.int32(catalogue.num_items),
                num_kept=num_kept,
                mesh=self._mesh,
            )
        )
        approximate, positions = approximate[: len(users)], positions[: len(users)]
        result = catalogue.order(users, positions, is_candidate=approximate > -np.inf, k=k)
        least = approximate[:, -1]  # -inf: every item that may be shown is a candidate
        if num_kept == catalogue.num_items:
            least = np.full_like(least, -np.inf)
        masked = np.empty(0, np.int64)  # masked items are not in the catalogue here
        return catalogue.proven(result, users, k=k, least=least, hidden=hidden, masked=masked)


@functools.partial(jax.jit, static_argnames=("num_kept", "mesh"))
def _candidates(items, users, hidden, num_items, *, num_kept, mesh):
    """Approximate scores and positions [B, num_kept] of each user's best items, best first."""

    def of_device(items, users, hidden, num_items):
        num_blocks, block = items.shape[1:3]
        first = jax.lax.axis_index("item") * (num_blocks * block)
        rows = jnp.arange(users.shape[0])[:, None]

        def merge(kept, number):
            start = first + number * block
            scores = jnp.einsum(
                "be,ne->bn", users, items[0, number], precision=jax.lax.Precision.HIGHEST
            )
            is_item = start + jnp.arange(block) < num_items
            scores = jnp.where(is_item[None, :], scores, -jnp.inf)
            is_here = (hidden >= start) & (hidden < start + block)
            column = jnp.where(is_here, hidden - start, block)  # out of range: dropped
            scores = scores.at[rows, column].set(-jnp.inf, mode="drop")
            best, place = jax.lax.top_k(scores, min(num_kept, block))
            return _best_of((kept[0], best), (kept[1], start + place), num_kept), None

        none = (
            jnp.full((users.shape[0], num_kept), -jnp.inf),
            jnp.zeros_like(rows, shape=(users.shape[0], num_kept)),
        )
        kept, _ = jax.lax.scan(merge, none, jnp.arange(num_blocks))
        every = [jax.lax.all_gather(part, "item", axis=1, tiled=True) for part in kept]
        return _best_of(every[:1], every[1:], num_kept)

    spec, everywhere = jax.sharding.PartitionSpec("item"), jax.sharding.PartitionSpec()
    # The result is the same on every device, which the check of replication cannot see.
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, everywhere, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )(items, users, hidden, num_items)


def _best_of(scores, positions, num_kept):
    scores, positions = jnp.concatenate(scores, 1), jnp.concatenate(positions, 1)
    best, place = jax.lax.top_k(scores, num_kept)
    return best, jnp.take_along_axis(positions, place, axis=1)
