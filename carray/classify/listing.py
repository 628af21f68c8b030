"""Opens what is to be scored: a folder, an `s3://` prefix, an S3 Inventory, or a manifest or other table of URIs.

From: its URI. To: a `Source`, which gives its images piece by piece.
Invariants: nothing is left out uncounted: keys without an image's suffix are counted by suffix, repetitions of a (uri,
box) by number. Cost: memory for a few pieces, whatever the source's length.
"""

from __future__ import annotations

import os

from carray.classify.inventory import InventorySource
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.sources import Source
from carray.classify.tables import TableSource
from carray.core.errors import SettingsError
from carray.core.store.files import absolute, is_s3
from carray.core.uri_tables import TABLE_SUFFIXES

__all__ = ["open_source"]


def open_source(source: str, settings: ClassifySettings, *, uses_boxes: bool) -> Source:
    """Open what is asked to be scored; boxes are kept only for a bundle that was trained on them.

    Raises:
        SettingsError: `split` or `column` is given for a source that has none.
        StorageError: a table or an inventory does not exist.
    """
    source = absolute(source)
    is_folder = not is_s3(source) and os.path.isdir(source)
    if source.lower().endswith(TABLE_SUFFIXES) and not is_folder:
        return TableSource(source, settings, uses_boxes=uses_boxes)
    if settings.split is not None:
        raise SettingsError(
            f"split is {settings.split!r}, but {source} is no manifest; leave it out or give a manifest."
        )
    if settings.column:
        raise SettingsError(
            f"column is {settings.column}, but {source} is no table ({', '.join(TABLE_SUFFIXES)}); leave it out."
        )
    if source.endswith("/manifest.json") and not is_folder:
        return InventorySource(source, settings)
    return Source(source, settings)
