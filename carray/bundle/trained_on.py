"""Records which images a bundle's network was trained on, so that it is not evaluated on them.

    trained_on.safetensors   content_N, uint64, sorted: the first 8 bytes of the sha256 of each image's file

Images are compared by the content of their files, whatever their uri, box or manifest. For older bundles without this
file it is known only for the manifest that they were trained on, by its splits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import TRAINED_ON, BundleInfo, read_bundle_file
from carray.core.errors import BundleError
from carray.core.text import one_line
from carray.manifest.manifest_file import Manifest

__all__ = ["content_ids", "mask_trained_on", "pack_trained_on"]


def content_ids(sha256: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Convert the first 8 bytes of hex digests to numbers, uint64 (N,): enough to distinguish a million images."""
    return np.array([int(digest[:16], 16) for digest in sha256], dtype=np.uint64)


def pack_trained_on(sha256: Iterable[str]) -> bytes:
    """Pack the hashes of the training images into the bytes of the bundle's file."""
    from safetensors.numpy import save

    return save({"content_N": np.unique(content_ids(sha256))})


def mask_trained_on(uri: str, info: BundleInfo, table: Manifest, rows: pd.DataFrame) -> npt.NDArray[np.bool_] | None:
    """Mark the rows of a manifest whose images a bundle's network was trained on; None if that is not known.

    Raises:
        BundleError: the bundle's file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if TRAINED_ON in info.files:
        try:
            seen_N = load(read_bundle_file(uri, info, TRAINED_ON))["content_N"].astype(np.uint64)
        except (SafetensorError, KeyError) as err:
            raise BundleError(f"{uri} has a damaged {TRAINED_ON} ({one_line(err)}); pack it again.") from None
    elif info.search.get("manifest_fingerprint") == table.fingerprint:
        refit = info.search.get("refit_splits", ["train", "val"])
        seen_N = content_ids(table.by_content(*(refit if info.search.get("refit") else ["train"]))["sha256"])
    else:
        return None
    return np.isin(content_ids(rows["sha256"]), seen_N)
