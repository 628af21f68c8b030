"""KubeRay's manifests: its own fields by a schema written down from its reference, pods by Kubernetes' own schemas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay.yaml").read_text())
KUBERNETES = "1.31"


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Give each pod template as the Pod that KubeRay makes of it: the head's first."""
    cluster = cluster_of(manifest)
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **one.get("metadata", {})}, "spec": one["spec"]}
        for one in templates
    ]


def check(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, SCHEMA)
    for pod in pods_of(manifest):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_there_is_a_cluster_and_a_job_of_each_kind() -> None:
    assert [file.name for file in FILES] == ["raycluster.yaml", "rayjob-classify.yaml", "rayjob-tune.yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_manifest_has_only_fields_that_exist(file: Path) -> None:
    check(read(file))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(backofLimit=3),
        lambda m: m["spec"].update(ttlSecondsAfterFinished="600"),
        lambda m: cluster_of(m)["authOptions"].update(mode="tokens"),
        lambda m: cluster_of(m)["workerGroupSpecs"][0].update(maxReplica=2),
        lambda m: cluster_of(m)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda m: pods_of(m)[0]["spec"]["containers"][0].update(imagePullPolice="Always"),
        lambda m: pods_of(m)[1]["spec"]["tolerations"][0].update(effects="NoSchedule"),
        lambda m: pods_of(m)[1]["spec"]["containers"][0]["livenessProbe"].update(periodSeconds="often"),
    ],
)
def test_a_wrong_field_is_found(spoil: Any) -> None:
    manifest = copy.deepcopy(read(ROOT / "cluster" / "kuberay" / "rayjob-classify.yaml"))
    spoil(manifest)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pods_are_closed_sized_and_probed(file: Path) -> None:
    for pod in pods_of(read(file)):
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["serviceAccountName"] == "carray"
        assert pod["spec"]["restartPolicy"] == "Never"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert "env" not in container, "what is secret comes from a Secret: envFrom"
        assert all(list(source) == ["secretRef"] for source in container["envFrom"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_head_keeps_to_itself_and_workers_may_be_spot(file: Path) -> None:
    cluster = cluster_of(read(file))
    head, *workers = pods_of(read(file))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "serviceType" not in cluster["headGroupSpec"] and "enableIngress" not in cluster["headGroupSpec"]
    assert "tolerations" not in head["spec"], "a head on a spot machine costs the whole job when that goes"
    assert all("cloud.google.com/gke-spot" in {t["key"] for t in pod["spec"]["tolerations"]} for pod in workers)
    assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("file", FILES[1:], ids=lambda file: file.stem)
def test_a_job_may_be_tried_again_and_takes_its_cluster_away(file: Path) -> None:
    spec = read(file)["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert "--out s3://" in spec["entrypoint"], "a try that goes on needs the folder of the last one"


def test_ray_is_the_images() -> None:
    (line,) = [line for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines() if "ARG RAY_VERSION" in line]
    assert {cluster_of(read(file))["rayVersion"] for file in FILES} == {line.partition("=")[2]}
