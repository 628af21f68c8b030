"""Says which images an earlier run has already scored, so that only new and changed ones are.

From: a folder of predictions, local or S3. To: for one shard's images, which are known.
Invariants: an image is known when a row of the earlier run has its uri and its etag, is ok, and is of the same bundle;
an image listed without an etag never is. Only row groups that may hold a shard's uris are read, and nothing is kept
between shards: memory does not grow with the earlier run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from carray.classify.predictions_folder import PlannedImage
from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import is_folder, list_files, retry
from carray.core.store.random_access import open_dataset

__all__ = ["EarlierRun"]

_COLUMNS = ["uri", "etag"]


class EarlierRun:
    """A folder of earlier predictions, asked for a shard at a time; safe to call from several threads."""

    def __init__(self, uri: str, bundle_id: str) -> None:
        """Open the folder.

        Raises:
            SettingsError: there is no such folder, or it holds no predictions.
            SchemaError: it holds a file that is not Parquet, or not predictions.
            StorageError: it cannot be read.
        """
        self.uri, self._bundle_id = uri, bundle_id
        self._lock = threading.Lock()
        if not is_folder(uri):
            raise SettingsError(f"since is {uri!r}, but there is no such folder; give the folder of an earlier run.")
        self._dataset = self._read(self._open)
        missing = [name for name in (*_COLUMNS, "status", "bundle_id") if name not in self._dataset.schema.names]
        if missing:
            raise SettingsError(
                f"since is {uri!r}, which lacks the column {', '.join(missing)} in Parquet files, so it is no folder "
                "of predictions; give the folder of an earlier run."
            )

    def known(self, images: Sequence[PlannedImage]) -> set[int]:
        """Give the indices of the images that the earlier run has scored as they are now.

        Raises:
            StorageError: the earlier run cannot be read.
        """
        etags = {image.uri: image.etag for image in images if image.etag is not None}
        if not etags:
            return set()
        with self._lock:  # the dataset reads with threads of its own
            table = self._read(lambda: self._dataset.to_table(columns=_COLUMNS, filter=self._between(list(etags))))
        scored = {
            uri
            for uri, etag in zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True)
            if etag is not None and etags.get(uri) == etag
        }
        return {index for index, image in enumerate(images) if image.etag is not None and image.uri in scored}

    def _between(self, uris: Sequence[str]) -> Any:
        import pyarrow.dataset as ds

        uri = ds.field("uri")
        ours = (ds.field("bundle_id") == self._bundle_id) & (ds.field("status") == "ok")
        return (uri >= min(uris, key=str.encode)) & (uri <= max(uris, key=str.encode)) & ours

    def _open(self) -> Any:
        files = [uri for uri in list_files(self.uri) if not uri.rpartition("/")[2].startswith((".", "_"))]
        return open_dataset(files)

    def _read(self, action: Any) -> Any:
        try:
            return retry(action, what=f"reading {self.uri}")
        except FileNotFoundError:
            raise StorageError(f"a file of {self.uri} went away while it was read; let nothing write there.") from None
        except (pa.ArrowException, ValueError, LookupError) as err:
            reason = " ".join(str(err).split())[:200]
            raise SchemaError(f"{self.uri} holds a file that is not readable Parquet ({reason}).") from None
