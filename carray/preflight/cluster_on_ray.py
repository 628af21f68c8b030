"""Checks the Ray cluster at RAY_ADDRESS: whether it answers and accepts the token, and each of its machines.

It runs in a process of its own (`preflight.isolated`), since Ray may hang. Each machine is checked by a task that needs
no CPU, so that a busy cluster answers, too.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import carray
from carray.core.errors import SettingsError
from carray.core.ray.connect import start_ray
from carray.core.ray.internals import is_token_required
from carray.preflight.findings import Finding, judge, merge_hosts, one_line

__all__ = ["NODE_SECONDS", "look_at_jobs", "look_at_machines", "look_at_ray"]

NODE_SECONDS = 75
"""Time limit for a machine to start a process and run its checks."""


def look_at_ray() -> Iterator[Finding]:
    """Connect to the cluster at RAY_ADDRESS, and compare the software of its machines."""
    try:
        with start_ray() as running:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            counted = [_count(len(nodes), "machine"), _count(running.cpus, "CPU")]
            counted += [_count(running.gpus, "GPU")] if running.gpus else []
            seen = f"{ray.get_runtime_context().gcs_address} answers: {', '.join(counted)}"
            if is_token_required():
                yield judge("Ray", f"{seen}, the token is accepted")
            else:
                open_to_all = "anyone who can reach it controls the machines: set RAY_AUTH_MODE=token on all"
                yield judge("Ray", f"{seen}, no token is required", warn=f"{open_to_all} before Ray starts")
            yield _same_software(_ask_all(nodes, _software))
    except SettingsError as err:
        seen, _, remedy = str(err).rstrip(".").rpartition("; ")
        yield Finding("Ray", "fail", one_line(seen), remedy)


def look_at_jobs(address: str) -> Iterator[Finding]:
    """Check whether the job server of `ray job submit` answers and accepts the token."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(address).list_jobs()
    except Exception as err:  # of many kinds; each means that no job can be submitted
        seen = one_line(err)
        remedy = "start the head with its dashboard, or tunnel its port: ssh -L 8265:127.0.0.1:8265 HEAD"
        if "uthenticat" in seen:
            seen = "the token is missing or refused"
            remedy = "set RAY_AUTH_MODE=token, and copy the head's ~/.ray/auth_token"
        yield Finding("Ray jobs", "fail", f"{one_line(address)}: {seen}", remedy)
        return
    yield Finding("Ray jobs", "ok", f"{one_line(address)} answers, and accepts jobs of this user")


def look_at_machines(arguments: str) -> Iterator[Finding]:
    """Run the checks on every machine of the cluster; `arguments` are those of `examine`, in JSON."""
    try:
        with start_ray():
            nodes = [node for node in ray.nodes() if node["Alive"]]
            answers = _ask_all(nodes, _examine_here, arguments)
    except SettingsError as err:
        seen, _, remedy = str(err).rstrip(".").rpartition("; ")
        yield Finding("machines", "fail", one_line(seen), remedy)
        return
    by_host = {}
    for host, answer in answers.items():
        if isinstance(answer, str):
            by_host[host] = [Finding("machines", "fail", answer, _missing_carray(answer))]
        else:
            by_host[host] = [Finding(**values) for values in answer]
    yield from merge_hosts(by_host)


def _ask_all(nodes: list[dict[str, Any]], question: Any, *arguments: Any) -> dict[str, Any]:
    """Run a function on each node, side by side; returns answers by host, or a sentence if none came."""
    tasks = {}
    for node in nodes:
        there: Any = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)  # its type is too narrow
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        tasks[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = task.remote(*arguments)
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=NODE_SECONDS)
    return {host: _answer(task) for host, task in tasks.items()}


def _answer(task: Any) -> Any:
    try:
        return ray.get(task, timeout=0.1)
    except GetTimeoutError:
        return f"no answer within {NODE_SECONDS} s"
    except RayError as err:
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        return one_line(lines[-1]) if lines else type(err).__name__


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _software() -> str:
    return f"carray {carray.__version__}, Python {platform.python_version()}, Ray {ray.__version__}"


def _same_software(answers: dict[str, Any]) -> Finding:
    here = _software()
    others = {host: answer for host, answer in answers.items() if answer != here}
    if not others:
        return judge("Ray's machines", f"{here} on each of {len(answers)}")
    seen = "; ".join(f"{host} says {answer}" for host, answer in others.items())
    remedy = _missing_carray(seen) or f"use the same image on all machines: here is {here}"
    return judge("Ray's machines", seen, fail=remedy)


def _missing_carray(text: str) -> str:
    if "No module named 'carray" not in text:
        return ""
    return "install carray in the machines' image, or submit the command as a job with --working-dir"


def _examine_here(arguments: str) -> list[dict[str, Any]]:
    from carray.preflight.doctor import examine

    wanted = json.loads(arguments)
    return [asdict(found) for found in examine(wanted["reads"], wanted["writes"], ray=False)]
