"""cluster/aws.yaml: Ray's schema, and a dry run in which Ray's own provider starts its machines in a pretended AWS."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROFILES = {"head": "carray-head", "cpu": "carray-worker", "gpu": "carray-worker"}


def read() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Do what `ray up` does first: fill in the defaults, and check against Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c["provider"].pop("type"),
        lambda c: c["available_node_types"]["gpu"].pop("node_config"),
        lambda c: c["available_node_types"]["cpu"].update(max_workers="16"),
        lambda c: c["available_node_types"]["cpu"].update(spot=True),
        lambda c: c["auth"].update(ssh_key="x"),
        lambda c: c.update(head_node_type="main"),
        lambda c: c.update(idle_timeout_minutes="soon"),
    ],
)
def test_a_wrong_field_is_found(spoil: Any) -> None:
    config = read()
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate(config)


def test_no_machine_takes_work_that_is_not_its_own_and_all_start_at_none() -> None:
    types = validate(read())["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert [types[name]["min_workers"] for name in ("cpu", "gpu")] == [0, 0]
    assert types["gpu"]["resources"]["GPU"] == 1


def test_the_token_is_a_file_and_the_dashboard_is_the_heads_own() -> None:
    config = read()
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    text = (ROOT / "cluster" / "aws.yaml").read_text()
    assert "RAY_AUTH_TOKEN" not in text and "aws_access_key" not in text.lower()


@pytest.fixture(scope="module")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Give the file as `ray up` sends it to the head: with subnets, security groups, a key pair and resources.

    The AWS account is a pretended one in this process, with the roles that cluster/README.md says to make.
    """
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    trust = (ROOT / "cluster" / "iam" / "trust-ec2.json").read_text()
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # `ray up` writes an SSH key below it
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        iam = boto3.client("iam")
        for name in set(PROFILES.values()):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        filled = AWSNodeProvider.fillout_available_node_types_resources(validate(read()))
        yield AWSNodeProvider.bootstrap_config(filled)


def start(config: dict[str, Any], name: str) -> tuple[Any, str]:
    """Start one machine of a type as Ray's autoscaler does; gives Ray's provider and the machine's id."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-kind": "head" if name == "head" else "worker", "ray-user-node-type": name}
    (machine,) = provider.create_node(config["available_node_types"][name]["node_config"], tags, 1)
    return provider, machine


def describe(machine: str) -> dict[str, Any]:
    import boto3

    (reservation,) = boto3.client("ec2").describe_instances(InstanceIds=[machine])["Reservations"]
    return reservation["Instances"][0]


@pytest.mark.parametrize("name", PROFILES)
def test_each_machine_has_its_role_its_market_and_the_newer_metadata_service(
    bootstrapped: dict[str, Any], name: str
) -> None:
    machine = describe(start(bootstrapped, name)[1])
    assert machine["IamInstanceProfile"]["Arn"].endswith(f"/{PROFILES[name]}")
    assert machine.get("InstanceLifecycle") == (None if name == "head" else "spot")
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    assert machine["MetadataOptions"]["HttpPutResponseHopLimit"] == 2


def test_what_the_file_says_of_a_machine_is_what_aws_says(bootstrapped: dict[str, Any]) -> None:
    import boto3

    types = bootstrapped["available_node_types"]
    for name in ("cpu", "gpu"):
        asked = [types[name]["node_config"]["InstanceType"]]
        (kind,) = boto3.client("ec2").describe_instance_types(InstanceTypes=asked)["InstanceTypes"]
        gpus = sum(gpu["Count"] for gpu in kind.get("GpuInfo", {}).get("Gpus", []))
        assert types[name]["resources"]["CPU"] == kind["VCpuInfo"]["DefaultVCpus"]
        assert types[name]["resources"].get("GPU", 0) == gpus


def test_strangers_reach_nothing_but_ssh(bootstrapped: dict[str, Any]) -> None:
    import boto3

    machine = describe(start(bootstrapped, "head")[1])
    ids = [group["GroupId"] for group in machine["SecurityGroups"]]
    for group in boto3.client("ec2").describe_security_groups(GroupIds=ids)["SecurityGroups"]:
        public = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
        assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in public] == [("tcp", 22, 22)]
        others = [pair for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
        assert {pair["GroupId"] for pair in others} <= set(ids)


def test_the_heads_role_allows_what_its_autoscaler_sends(
    bootstrapped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start, find, tag and end a machine as the autoscaler on the head does, and look at the requests."""
    from botocore.client import BaseClient

    sent: set[str] = set()
    call = BaseClient._make_api_call

    def note(client: Any, operation: str, arguments: Any) -> Any:
        sent.add(f"{client.meta.service_model.service_name}:{operation}")
        return call(client, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", note)
    provider, machine = start(bootstrapped, "cpu")
    provider.non_terminated_nodes({})
    provider.set_node_tags(machine, {"ray-node-status": "up-to-date"})
    provider._update_node_tags()  # tags go out in batches, after a second
    provider.terminate_nodes([machine])
    statements = json.loads((ROOT / "cluster" / "iam" / "head.json").read_text())["Statement"]
    allowed = {action for one in statements for action in _listed(one["Action"]) if action.startswith("ec2:")}
    assert sent == allowed


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
