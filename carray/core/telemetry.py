"""Keeps the libraries that carray runs on from telling their makers about it, unless the user has said otherwise.

onnxruntime (since 1.29, from every process that scores), Ray (a private one too, without a dashboard), MLflow and the
model hub's client report by default what runs where. Each reads one environment variable, which is set here when carray
is imported, and so before any of them; one that is set already stays.
"""

from __future__ import annotations

import os

__all__ = ["SWITCHES", "send_nothing"]

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What turns each library's reports off."""


def send_nothing() -> None:
    """Turn the reports off, in this process and in those that it starts."""
    for name, off in SWITCHES.items():
        os.environ.setdefault(name, off)
