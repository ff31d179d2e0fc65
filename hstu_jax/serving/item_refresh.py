"""A new catalogue for an export that is there: its items are embedded again, its index rebuilt.

The towers stay as they are: no training, no new model version. The catalogue becomes what the item
files say; items that training has not seen are marked cold. The old index is of other vectors, so
it is refused from the moment that the new items stand, until it is rebuilt. Imports are the
loader's.
"""

import dataclasses
from typing import Literal

import numpy as np

from hstu_jax.serving import artifact as artifact_lib
from hstu_jax.serving import index_folder, item_index, item_writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refreshed:
    """What a refresh did.

    Attributes:
        num_items: items now.
        num_cold: of these, without a training event.
        num_added: items that were not there before.
        num_removed: items that were, and are no more.
        index: kind of the index that was rebuilt; "" without one.
    """

    num_items: int
    num_cold: int
    num_added: int
    num_removed: int
    index: str

    def line(self) -> str:
        """For the screen."""
        rebuilt = f"; {self.index} index rebuilt" if self.index else "; no index"
        return (
            f"items     {self.num_items:,}, {self.num_cold:,} of them cold; {self.num_added:,} "
            f"added, {self.num_removed:,} removed{rebuilt}"
        )


def refresh_items(
    artifact: artifact_lib.Artifact,
    *,
    item_input_path: str,
    on_cold: Literal["count", "refuse"] = "count",
    rebuild_index: bool = True,
) -> Refreshed:
    """Embeds the items of files into an export, and rebuilds the index that it has.

    Args:
        artifact: the export, written to in place. This object goes on with the old items; load the
            folder again for the new ones.
        item_input_path: parquet files with the whole catalogue, one item a row, as a pattern.
        on_cold: what to do with items that training has not seen: count and mark them, or raise.
        rebuild_index: False leaves the old index, which nothing reads any more.

    Raises:
        FileNotFoundError: no such files.
        ImportError: the export has an index, and faiss does not load: nothing is changed then.
        ValueError, TypeError: a damaged index.json, or items that cannot be embedded: the old ones
            stay.
    """
    options = index_folder.built_options(artifact) if rebuild_index else None
    if options is not None:
        item_index.import_faiss()
    try:
        before = artifact.item_ids()
    except FileNotFoundError:  # exported without items
        before = np.empty(0, np.int64)
    written = item_writer.write_items(
        artifact, item_writer.read_rows(item_input_path), artifact.path, on_cold=on_cold
    )
    renewed = artifact_lib.load(artifact.path, verify=False)
    after = renewed.item_ids()
    if options is not None:
        item_index.build(renewed, options=options)
    return Refreshed(
        num_items=written.num_items,
        num_cold=written.num_cold,
        num_added=int(np.setdiff1d(after, before).size),
        num_removed=int(np.setdiff1d(before, after).size),
        index="" if options is None else options.kind,
    )
