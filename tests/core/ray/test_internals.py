"""Each private name that carray uses is still there, and does what it is used for."""

from __future__ import annotations

import ast
import logging
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from carray.core.ray import internals
from carray.core.store.s3 import make_client

ROOT = Path(__file__).resolve().parents[3]
PRIVATE = re.compile(r"\b(ray|botocore|obstore)\.(\w+\.)*_\w+|\bray\.core\.generated\b|\bray\.tune\.execution\b")


def test_the_autoscaler_of_a_private_ray_is_silent(ray_cluster) -> None:
    state = internals.autoscaling_state()
    assert state.autoscaler_state_version == 0
    assert list(state.infeasible_gang_resource_requests) == []


def test_a_private_ray_asks_for_a_token(ray_cluster) -> None:
    assert internals.is_token_required()


def test_the_logger_of_the_token_warning_exists() -> None:
    from ray._private.authentication import authentication_token_setup

    internals.silence_token_warning()
    assert authentication_token_setup.logger.level == logging.ERROR


def test_no_aws_variable_is_sent_to_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    names = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "OTHER"}
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names)
    internals.withhold_aws_variables()
    assert names == {"OTHER"}
    assert "ENV_VARS_TO_PROPAGATE" in Path(os.fspath(class_cache.__file__)).read_text()


def test_a_lost_process_leaves_no_trial_that_tune_waits_for() -> None:
    from ray.tune.execution import tune_controller

    controller = SimpleNamespace(_resetting_trials={"lost", "other"})
    internals.forget_handover(controller, "lost")
    assert controller._resetting_trials == {"other"}
    assert "self._resetting_trials: Set[Trial] = set()" in Path(os.fspath(tune_controller.__file__)).read_text()


def test_proxies_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert internals.environment_proxies("https://store.example/bucket")["https"] == "http://127.0.0.1:9"
    assert internals.environment_proxies("https://inside.example/bucket") == {}


def test_a_client_tells_its_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert internals.client_credentials(make_client(region="us-east-1")) is None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "known")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert internals.client_credentials(make_client(region="us-east-1")).access_key == "known"


def test_no_other_module_uses_a_private_name() -> None:
    found = []
    for path in (ROOT / "carray").rglob("*.py"):
        if path.name != "internals.py":
            assert "._request_signer" not in path.read_text(), path
            found += [f"{path}: {name}" for name in imported(path) if PRIVATE.search(name)]
    assert found == []
    assert [name for name in imported(Path(internals.__file__)) if PRIVATE.search(name)], "the pattern finds none"


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_libraries_with_private_names_are_bounded_from_above() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert all("<" in line for line in lines if re.match(r"(ray|botocore|obstore)\b", line))
