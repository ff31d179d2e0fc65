"""Results of a search, what is not to be shown, and the one definition of score and order.

score(u, v) = sum_e u_e v_e in float64, rounded once to float32; order: score down, then id up.
Every search, exact or approximate, finds candidates in its own way and has them scored and ordered
here. Next on the path: `top_k.py` and `item_index.py`. Imports are the loader's.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

# Stands after the last item of a list shorter than k, by kind of the ids.
PADDING_IDS = {"i": -1, "U": ""}
_CHECK_ROWS = 65_536
# Held at a time: numbers of item vectors that are scored exactly (24 bytes each), and excluded
# positions of a block of users (4 bytes each, on the device too).
_EXACT_NUMBERS = 2**20
_BLOCK_HIDDEN = 2**22
# A device's float32 product of E terms is off by less than this times E |u| |v|: twice the bound of
# a sum in any order, and twice again for products made of bfloat16 parts.
_ROUNDING = 4 * 2.0**-24


@dataclasses.dataclass(frozen=True)
class TopK:
    """The best items of every user.

    Attributes:
        ids: [W, k], integers or strings, best first, equal scores by lower id; `PADDING_IDS` from
            `counts` on.
        scores: float32 [W, k]: the inner product in float64, rounded once; -inf from `counts` on.
        counts: int64 [W]: entries in use, fewer than k where fewer items may be shown.
        num_exhaustive: users answered by scoring the whole catalogue in float64.
    """

    ids: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    num_exhaustive: int = 0

    @property
    def num_empty(self) -> int:
        """Users who may be shown nothing, having seen every item."""
        return int(np.count_nonzero(self.counts == 0))


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """Items not to be shown to each user.

    Attributes:
        offsets: int64 [W + 1]; the items of user w are `ids[offsets[w]:offsets[w + 1]]`.
        ids: integers or strings, as the catalogue's; repeats and unknown ids are allowed.
    """

    offsets: np.ndarray
    ids: np.ndarray

    def __post_init__(self) -> None:
        ends = (int(self.offsets[0]), int(self.offsets[-1])) if self.offsets.size else "empty"
        if ends != (0, self.ids.size) or np.any(np.diff(self.offsets) < 0):
            raise ValueError(
                f"exclusions.offsets={ends}: must ascend from 0 to the {self.ids.size} ids; give "
                "the offsets of these very ids."
            )

    def take(self, users: np.ndarray) -> "Exclusions":
        """Those of some users, in the order given."""
        counts = np.diff(self.offsets)[users]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[users] - offsets[:-1], counts)
        return Exclusions(offsets, self.ids[places])


class Catalogue:
    """Items in order of their ids.

    Args:
        item_ids: integers or strings [N], each once, in any order.
        item_vectors: float32 [N, E].
        item_mask: bool [N], items that take part; None is all.

    Raises:
        ValueError: an id twice, a vector that is not finite, shapes that do not fit, no item.
    """

    def __init__(
        self, item_ids: np.ndarray, item_vectors: np.ndarray, *, item_mask: np.ndarray | None = None
    ) -> None:
        if item_vectors.ndim != 2 or item_vectors.shape[0] != len(item_ids):
            raise ValueError(
                f"item_vectors={item_vectors.shape}: must be one row for each of the "
                f"{len(item_ids)} ids; give both from one export."
            )
        self.dim = item_vectors.shape[1]
        order = np.argsort(item_ids, kind="stable")
        ids = as_ids(item_ids)[order]
        if (ids[1:] == ids[:-1]).any():
            again = ids[1:][ids[1:] == ids[:-1]][0]
            raise ValueError(f"item_ids={again}: is there twice; list each item once.")
        if item_mask is not None:
            order, ids = order[item_mask[order]], ids[item_mask[order]]
        if not ids.size:
            raise ValueError("item_ids=[]: no item to search; export a catalogue with items.")
        self.ids = ids
        self._padding = PADDING_IDS[ids.dtype.kind]
        self.num_items = len(ids)
        self._order = order
        self._vectors = item_vectors
        lengths = self.lengths()
        if not np.isfinite(lengths).all():
            bad = ids[int(np.argmax(~np.isfinite(lengths)))]
            raise ValueError(f"item_vectors of id {bad}: not finite; export the items again.")
        self._longest = float(lengths.max())

    def lengths(self) -> np.ndarray:
        """float64 [N]: the length of every vector, in the id order."""
        blocks = [
            _norms(self.vectors(np.arange(start, min(start + _CHECK_ROWS, self.num_items))))
            for start in range(0, self.num_items, _CHECK_ROWS)
        ]
        return np.concatenate(blocks)

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """float32 vectors of the items at positions of the id order."""
        return np.asarray(self._vectors[self._order[positions]], np.float32)

    def check_k(self, k: int, *, num_shown: int | None = None) -> None:
        """Raises ValueError unless k is 1 .. the number of items that may be shown."""
        num_shown = self.num_items if num_shown is None else num_shown
        if k < 1:
            raise ValueError(f"k={k}: must be 1 or more.")
        if k > num_shown:
            raise ValueError(
                f"k={k}: the catalogue has {num_shown} items to show; give a k of {num_shown} or "
                "less."
            )

    def check_users(
        self,
        user_vectors: np.ndarray,
        *,
        k: int,
        exclusions: Exclusions | None,
        num_shown: int | None = None,
    ) -> np.ndarray:
        """The vectors as float32; raises ValueError on what cannot be searched.

        Args:
            user_vectors: numbers [W, E].
            k: items a user.
            exclusions: of the same users.
            num_shown: items that may be shown; None is all.
        """
        self.check_k(k, num_shown=num_shown)
        users = np.asarray(user_vectors, np.float32)
        if users.ndim != 2 or users.shape[1] != self.dim:
            raise ValueError(
                f"user_vectors={users.shape}: must be [users, {self.dim}], as the items' vectors; "
                "make both with one export."
            )
        is_bad = ~np.isfinite(users).all(axis=1)
        norms = _norms(users)
        if is_bad.any():
            raise ValueError(
                f"user_vectors[{int(np.argmax(is_bad))}]: not finite ({int(is_bad.sum())} in all); "
                "check the model and its input."
            )
        if norms.size and norms.max() * self._longest > np.finfo(np.float32).max:
            raise ValueError(
                f"user_vectors[{int(np.argmax(norms))}]: inner products may overflow float32; "
                "check the model."
            )
        if exclusions is not None and exclusions.offsets.size - 1 != len(users):
            raise ValueError(
                f"exclusions={exclusions.offsets.size - 1} users: must be the {len(users)} of "
                "user_vectors; give an empty list to those without exclusions."
            )
        return users

    def excluded_positions(self, exclusions: Exclusions | None, num_users: int) -> np.ndarray:
        """int32 [users, a power of two]: positions in the id order, -1 after the last."""
        if exclusions is None or not exclusions.ids.size:
            return np.full((num_users, 0), -1, np.int32)
        counts = np.diff(exclusions.offsets)
        wanted = as_ids(exclusions.ids)
        if wanted.dtype.kind != self.ids.dtype.kind:
            kinds = {"i": "integers", "U": "strings"}
            raise TypeError(
                f"exclusions.ids={wanted[0]!r}: ids are {kinds[wanted.dtype.kind]}, the "
                f"catalogue's {kinds[self.ids.dtype.kind]}; give one kind."
            )
        at = np.minimum(np.searchsorted(self.ids, wanted), self.num_items - 1)
        at = np.where(self.ids[at] == wanted, at, -1)
        hidden = np.full((num_users, padded_size(int(counts.max()), None)), -1, np.int32)
        row = np.repeat(np.arange(num_users), counts)
        hidden[row, np.arange(at.size) - np.repeat(exclusions.offsets[:-1], counts)] = at
        return hidden

    def rounding_bound(self, users: np.ndarray) -> np.ndarray:
        """float64 [W]: how far a device's scores may be from the exact ones."""
        return _ROUNDING * (self.dim + 4) * _norms(users) * self._longest + 1e-36

    def order(
        self, users: np.ndarray, positions: np.ndarray, *, is_candidate: np.ndarray, k: int
    ) -> TopK:
        """The k best of each user's candidates, exactly scored and ordered.

        Vectors are read and scored for `_EXACT_NUMBERS` of their numbers at a time, whatever k is.

        Args:
            users: float32 [W, E].
            positions: integers [W, C], in the id order; each position once a user.
            is_candidate: bool [W, C]; others do not take part.
            k: entries of the result; missing ones are padding.
        """
        num_users, width = positions.shape
        positions = np.where(is_candidate, positions, 0)
        scores = np.empty(positions.shape, np.float32)
        flat_positions, flat_scores = positions.reshape(-1), scores.reshape(-1)
        step = max(_EXACT_NUMBERS // self.dim, 1)
        for start in range(0, flat_scores.size, step):
            own = np.arange(start, min(start + step, flat_scores.size))
            flat_scores[own] = _exact_scores(self.vectors(flat_positions[own]), users[own // width])
        scores = np.where(is_candidate, scores, np.float32(-np.inf))
        place = np.lexsort((positions, -scores), axis=-1)[:, :k]
        counts = np.minimum(is_candidate.sum(axis=1), k)
        ids = np.full((num_users, k), self._padding, self.ids.dtype)
        best = np.full((num_users, k), -np.inf, np.float32)
        ids[:, : place.shape[1]] = self.ids[np.take_along_axis(positions, place, axis=1)]
        best[:, : place.shape[1]] = np.take_along_axis(scores, place, axis=1)
        ids[np.arange(k) >= counts[:, None]] = self._padding
        return TopK(ids, best, counts.astype(np.int64))

    def proven(
        self,
        result: TopK,
        users: np.ndarray,
        *,
        k: int,
        least: np.ndarray,
        hidden: np.ndarray,
        masked: np.ndarray,
    ) -> TopK:
        """The result of `order` with the users scored in full whom their candidates do not settle.

        Args:
            result: of the candidates.
            users: float32 [W, E].
            k: entries of the result.
            least: float [W]: float32 products of items that are no candidates are not greater; -inf
                where all items are.
            hidden: integers [W, H]: positions not to be shown to a user, -1 for none.
            masked: integers [M]: positions not to be shown to anyone.
        """
        bound = (least.astype(np.float64) + self.rounding_bound(users)).astype(np.float32)
        is_open = (bound >= result.scores[:, k - 1]) & (least > -np.inf)
        for row in np.flatnonzero(is_open):
            own_hidden = np.concatenate([hidden[row], masked])
            answer = self.exhaustive(users[row], own_hidden, k=k)
            result.ids[row], result.scores[row], result.counts[row] = answer
        return dataclasses.replace(result, num_exhaustive=int(np.count_nonzero(is_open)))

    def exhaustive(
        self, user: np.ndarray, hidden: np.ndarray, *, k: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids [k], scores [k], count) of one user, with every item scored in float64."""
        position, score = np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, self.num_items, _CHECK_ROWS):
            own = np.arange(start, min(start + _CHECK_ROWS, self.num_items))
            scores = _exact_scores(self.vectors(own), np.broadcast_to(user, (own.size, user.size)))
            own_hidden = hidden[(hidden >= start) & (hidden < start + own.size)]
            shown = np.ones(own.size, bool)
            shown[own_hidden - start] = False
            position = np.concatenate([position, own[shown]])
            score = np.concatenate([score, scores[shown]])
            place = np.lexsort((position, -score))[:k]
            position, score = position[place], score[place]
        spare = k - position.size
        ids = np.concatenate([self.ids[position], np.full(spare, self._padding, self.ids.dtype)])
        best = np.concatenate([score, np.full(spare, -np.inf, np.float32)])
        return ids, best, position.size


def as_ids(ids: np.ndarray) -> np.ndarray:
    """Ids as int64 or as strings.

    Raises:
        TypeError: neither.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iuU":
        raise TypeError(f"ids of type {ids.dtype}: must be integers or strings.")
    return ids if ids.dtype.kind == "U" else ids.astype(np.int64)


def user_blocks(
    exclusions: Exclusions | None, num_users: int, *, most: int
) -> Iterator[np.ndarray]:
    """Users to be searched together; those with very many exclusions in blocks of their own.

    A block's exclusions are padded to the longest: [users, a power of two], `_BLOCK_HIDDEN` at
    most, or those of one user. Without the very long ones, blocks are in the users' order.

    Args:
        exclusions: of these users.
        num_users: in all.
        most: users of a block.
    """
    counts = np.zeros(num_users, np.int64) if exclusions is None else np.diff(exclusions.offsets)
    usual = 1 << max((_BLOCK_HIDDEN // most).bit_length() - 1, 0)
    users = np.flatnonzero(counts <= usual)
    for start in range(0, len(users), most):
        yield users[start : start + most]
    rest = np.flatnonzero(counts > usual)
    rest = rest[np.argsort(-counts[rest], kind="stable")]
    while rest.size:
        size = min(max(_BLOCK_HIDDEN // padded_size(int(counts[rest[0]]), None), 1), most)
        yield rest[:size]
        rest = rest[size:]


def concatenate(
    parts: Sequence[TopK], catalogue: Catalogue, *, blocks: Sequence[np.ndarray], k: int
) -> TopK:
    """The results of several blocks of users as one, in the users' order."""
    ids = np.empty((0, k), catalogue.ids.dtype)
    none = TopK(ids, np.empty((0, k), np.float32), np.empty(0, np.int64))
    parts = [none, *parts]
    place = np.argsort(np.concatenate([np.empty(0, np.int64), *blocks]))
    return TopK(
        np.concatenate([part.ids for part in parts])[place],
        np.concatenate([part.scores for part in parts])[place],
        np.concatenate([part.counts for part in parts])[place],
        sum(part.num_exhaustive for part in parts),
    )


def _exact_scores(items: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Row by row: the sum in float64, in an order that depends on E alone, rounded once."""
    exact = np.einsum("ne,ne->n", items.astype(np.float64), users.astype(np.float64))
    return exact.astype(np.float32)


def _norms(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return np.sqrt(np.einsum("ne,ne->n", wide, wide))


def padded_size(size: int, most: int | None) -> int:
    """The next power of two, so that few shapes are compiled."""
    padded = 1 << max(size - 1, 0).bit_length()
    return padded if most is None else min(padded, most)
