"""All uses of private names of Ray and botocore, each with the version in which it was found.

pyproject.toml bounds these libraries from above, and tests/core/ray/test_internals.py fails where a name has moved:
raise a bound only after it has passed.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = [
    "autoscaling_state",
    "client_credentials",
    "environment_proxies",
    "forget_handover",
    "is_token_required",
    "silence_token_warning",
    "withhold_aws_variables",
]


def autoscaling_state() -> Any:
    """Read the autoscaler's last report from Ray's control store; all zeros where there is none, or no access to it.

    Ray's public state API does not say which requests the autoscaler refuses (Ray 2.60: `ray.autoscaler.v2.sdk` reads
    the same message).
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    if ray.util.client.ray.is_connected():  # a ray:// address: the store is inside the cluster
        return GetClusterStatusReply().autoscaling_state
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state


def is_token_required() -> bool:
    """Check whether the Ray that this process is connected to requires a token (Ray 2.60)."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def silence_token_warning() -> None:
    """Silence Ray's warning on every start that it chose token authentication (Ray 2.60)."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def forget_handover(tune_controller: Any, trial: Any) -> None:
    """Keep Ray Tune from waiting for ever for a trial whose process was lost while it took the trial up (Ray 2.60)."""
    tune_controller._resetting_trials.discard(trial)


def withhold_aws_variables() -> None:
    """Keep Ray Tune from sending this process's AWS keys to its trials, whose environment Ray logs (Ray 2.60)."""
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])


def environment_proxies(url: str) -> dict[str, str]:
    """Find the proxies of the environment that botocore would use for a URL (botocore 1.44)."""
    from botocore.utils import get_environ_proxies

    return dict(get_environ_proxies(url))


def client_credentials(client: Any) -> Any:
    """Give the credentials that a botocore client signs with; None for an anonymous one (botocore 1.44)."""
    return client._request_signer._credentials
