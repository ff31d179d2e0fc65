"""An export of an earlier version opens and gives the vectors that it gave then."""

import numpy as np

from hstu_jax.serving import artifact
from tests.serving import record_golden_artifact as recorded


def test_an_old_export_opens_and_gives_its_vectors():
    opened = artifact.load(recorded.FOLDER)
    with np.load(recorded.FOLDER.parent / "golden_artifact_vectors.npz") as file:
        expected = dict(file)
    # Other versions of XLA sum in another order.
    np.testing.assert_allclose(
        opened.embed_users(recorded.users()), expected["users"], rtol=0, atol=1e-5
    )
    items = opened.embed_items({"video_id": np.arange(recorded.NUM_ITEMS)})
    np.testing.assert_allclose(items, expected["items"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(opened.item_vectors(), expected["items"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(opened.item_is_cold(), np.arange(recorded.NUM_ITEMS) >= 30)
    assert opened.counts["truncated_histories"] == 1
