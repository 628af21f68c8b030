"""Looks into an ONNX file before onnxruntime opens it: it must be whole in itself, and so name no other file.

Why: given bytes, onnxruntime reads a tensor's external data from below the working directory (seen on 1.32), so that
the answers of a hostile model could carry the files there away: in a container all, at home `.aws/credentials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carray.core.errors import BundleError

__all__ = ["check_graph"]


def check_graph(model: bytes) -> None:
    """Let an ONNX file pass that names no other file.

    Raises:
        BundleError: it is no ONNX, or one of its tensors or nodes lies in another file.
    """
    import onnx

    try:
        parsed = onnx.load_model_from_string(model)
    except Exception as err:  # protobuf's, which is no dependency of ours
        raise BundleError(f"the model is not ONNX ({' '.join(str(err).split())}); copy the bundle again.") from None
    for part in _parts(parsed):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (part.external_data or part.data_location == onnx.TensorProto.EXTERNAL):
            raise BundleError(
                f"the model keeps its tensor {part.name[:80]!r} in another file, which the model of a bundle never "
                "does; use a bundle that carray packed."
            )
        if kind == "NodeProto" and part.op_type == "EPContext":  # a compiled engine, which it may name by its path
            raise BundleError("the model holds an EPContext node, which names another file; use a bundle of carray's.")


def _parts(message: Any) -> Iterator[Any]:
    """Give a message and every one inside it, however deep: graphs, subgraphs, functions, attributes."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        yield part
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "ListFields") else list(value)
