"""carray finds the best car-image classifier by a cluster-wide search, and classifies whole image buckets with it.

images: folder, S3 prefix, Stanford Cars devkit, table of URIs
    |  carray prepare            manifest.parquet   one row an image: uri, label, split, size, hashes
    v
manifest
    |  carray tune               RUN/               Ray Tune + ASHA over CNNs and timm backbones
    v
trials.parquet, bundle/          the winner: weights.safetensors, model.onnx, bundle.json
    |  carray classify           PREDICTIONS/       shards of a folder or bucket, in processes or on Ray Data
    v
Parquet, one row an image        carray query, carray report, carray.read_predictions, pd.read_parquet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carray.core.environment import turn_telemetry_off

if TYPE_CHECKING:
    from carray.bundle.scorer import Classifier
    from carray.queries import read_predictions

__all__ = ["Classifier", "__version__", "read_predictions"]

__version__ = "0.1.0"

turn_telemetry_off()  # before anything imports onnxruntime, Ray, MLflow or the hub's client


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import carray` and `carray --help` stay light.

    Raises:
        AttributeError: the name is not public.
    """
    if name == "Classifier":
        from carray.bundle.scorer import Classifier

        return Classifier
    if name == "read_predictions":
        from carray.queries import read_predictions

        return read_predictions
    raise AttributeError(f"module 'carray' has no attribute {name!r}")
