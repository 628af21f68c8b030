"""The IAM policies: AWS's own linter, and every request that each job sends against what its policy allows."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from carray.testing.fault_proxy import start_proxy
from carray.testing.object_store import S3Server

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ["classify", "head", "tune", "worker"]
WITHOUT_RESOURCES = {"ec2:DescribeInstances", "ecr:GetAuthorizationToken"}
"""Actions that AWS offers for everything or not at all."""


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "cluster" / "iam" / f"{name}.json").read_text())


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def complaints(policy: dict[str, Any], folder: Path) -> list[str]:
    """Give what cfn-lint, which knows AWS's actions and their resources, and the house say against a policy."""
    policies = {"P": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}}}
    file = folder / "template.json"
    file.write_text(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": policies}))
    command = [str(Path(sys.executable).with_name("cfn-lint")), "--include-checks", "I3510", "--format", "json"]
    found = json.loads(subprocess.run([*command, str(file)], capture_output=True, text=True).stdout or "[]")
    said = [f"{one['Rule']['Id']}: {one['Message']}" for one in found if one["Rule"]["Id"] != "I4010"]
    for statement in policy["Statement"]:
        actions = listed(statement["Action"])
        said += [f"{action} allows more than it names" for action in actions if "*" in action]
        if "*" in listed(statement["Resource"]) and not set(actions) <= WITHOUT_RESOURCES:
            said.append(f"{actions} are allowed on everything")
    return said


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_names_actions_and_resources_that_exist(name: str, tmp_path: Path) -> None:
    assert complaints(read(name), tmp_path) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"Action": "s3:GetObjects"}, "'getobjects' is not one of"),
        ({"Action": "s3:*"}, "s3:. allows more than it names"),
        ({"Resource": "*"}, "are allowed on everything"),
        ({"Resource": "arn:aws:ec2:us-east-1:111122223333:instance/*"}, "I3510"),
        ({"Effect": "Permit"}, "'Permit' is not one of"),
    ],
)
def test_a_loose_or_wrong_policy_is_found(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    policy = read("classify")
    policy["Statement"][0].update(change)
    found = " ".join(complaints(policy, tmp_path))
    assert complaint.replace("s3:.", "s3:*") in found, found


def action_of(method: str, path: str) -> tuple[str, str]:
    """Give the IAM action of an S3 request, and what it is about, as AWS's Service Authorization Reference has them."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    resource = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
    if not key:
        action = {"GET": "ListBucket", "HEAD": "ListBucket", "POST": "DeleteObject"}.get(method, "CreateBucket")
        resource += "/*" if method == "POST" else ""
        return "s3:GetBucketLocation" if "location" in query else f"s3:{action}", resource
    if method == "DELETE" and "uploadId" in query:
        return "s3:AbortMultipartUpload", resource
    by_method = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject"}
    return f"s3:{by_method.get(method, 'DeleteObject')}", resource


def right_for(action: str, resource: str, policy: dict[str, Any]) -> tuple[str, str, str] | None:
    """Give the (statement, action, resource) that allows a request, or None."""
    for statement in policy["Statement"]:
        for named in listed(statement["Resource"]):
            if action in listed(statement["Action"]) and fnmatchcase(resource, named):
                return statement["Sid"], action, named
    return None


def test_the_documents_name_the_rights_of_the_policy() -> None:
    section = (ROOT / "docs" / "classify.md").read_text().partition("## Rights and requests")[2].partition("\n## ")[0]
    assert set(re.findall(r"s3:\w+", section)) == {
        action for one in read("classify")["Statement"] for action in listed(one["Action"])
    }


def test_what_no_statement_names_is_refused() -> None:
    policy = read("classify")
    assert right_for("s3:GetObject", "arn:aws:s3:::images-bucket/a/b.jpg", policy) is not None
    assert right_for("s3:DeleteObject", "arn:aws:s3:::images-bucket/a/b.jpg", policy) is None
    assert right_for("s3:GetObject", "arn:aws:s3:::other/a/b.jpg", policy) is None
    assert right_for(*action_of("GET", "/images-bucket?list-type=2&prefix=a"), policy) is not None
    assert right_for(*action_of("GET", "/images-bucket?location"), policy) is None


@pytest.fixture
def watched(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[set[str], set[str]]]:
    """Give a function that runs a carray command against buckets of its own, and says what its policy made of it."""
    from carray.core.store.s3 import forget_client

    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))

    def run(policy: dict[str, Any], *commands: list[str], images: str, results: str) -> tuple[set[str], set[str]]:
        seen: set[tuple[str, str]] = set()
        with start_proxy(s3_server.endpoint) as proxy:
            plain = proxy.server.RequestHandlerClass

            class Noting(plain):  # type: ignore[valid-type, misc]
                def parse_request(self) -> bool:
                    known = super().parse_request()
                    seen.add((self.command, self.path))
                    return known

            proxy.server.RequestHandlerClass = Noting
            for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
                monkeypatch.setenv(name, value)
            forget_client()
            for command in commands:
                carray(*command)
        asked = [
            action_of(method, path.replace(images, "images-bucket").replace(results, "results-bucket"))
            for method, path in seen
        ]
        rights = {request: right_for(*request, policy) for request in asked}
        refused = {" ".join(request) for request, right in rights.items() if right is None}
        used = {" ".join(right) for right in rights.values() if right is not None}
        return refused, used

    return run


def carray(*words: str) -> None:
    from carray.__main__ import main

    try:
        main(list(words))
    except SystemExit as end:
        assert not end.code, words


def buckets(server: S3Server) -> tuple[str, str]:
    names = f"images-{secrets.token_hex(4)}", f"results-{secrets.token_hex(4)}"
    for name in names:
        server.client().create_bucket(Bucket=name)
    return names


def put_folder(server: S3Server, folder: str | Path, bucket: str, prefix: str) -> None:
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            server.client().put_object(Bucket=bucket, Key=key, Body=file.read_bytes())


def all_of(policy: dict[str, Any]) -> set[str]:
    return {
        f"{one['Sid']} {action} {resource}"
        for one in policy["Statement"]
        for action in listed(one["Action"])
        for resource in listed(one["Resource"])
    }


def test_classification_needs_its_policy_and_all_of_it(
    watched: Any, s3_server: S3Server, small_bundle: str, image_folder: Path
) -> None:
    images, results = buckets(s3_server)
    put_folder(s3_server, image_folder, images, "photos")
    (image_folder / "late.jpg").write_bytes(b"no image")
    put_folder(s3_server, small_bundle, results, "run/bundle")
    out = f"s3://{results}/predictions"
    command = ["classify", f"s3://{results}/run/bundle", f"s3://{images}/photos", "--out", out]
    more = [*command[:3], "--out", f"{out}-new", "--only-new", "--since", out]
    policy = read("classify")
    refused, used = watched(policy, command, command, more, images=images, results=results)
    assert refused == set()
    assert used == all_of(policy)


@pytest.mark.slow
def test_a_search_needs_its_policy_and_all_of_it(
    ray_cluster: object, watched: Any, s3_server: S3Server, tmp_path: Path
) -> None:
    from carray.manifest.prepare import prepare
    from carray.testing.drawing import draw_dataset

    images, results = buckets(s3_server)
    draw_dataset(tmp_path / "drawn", images_per_class=6)
    put_folder(s3_server, tmp_path / "drawn", images, "drawn")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        prepare(f"s3://{images}/drawn", out=f"s3://{images}/manifest.parquet")
    config = tmp_path / "search.yaml"
    config.write_text(
        "search: {trials: 2, epochs: 2}\npixels: {decode_size: 40, input_size: 32}\n"
        "families: {cnn: {default: {input_size: 32, stages: 2, width: 8, batch_images: 16}, space: {width: [8, 12]}}}\n"
    )
    command = ["tune", "--manifest", f"s3://{images}/manifest.parquet", "--out", f"s3://{results}/run"]
    policy = read("tune")
    refused, used = watched(policy, [*command, "--config", str(config)], images=images, results=results)
    assert refused == set()
    assert used == all_of(policy)
