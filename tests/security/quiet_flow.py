"""Runs commands in a network namespace without a route out, and counts the packets that tried to leave it.

    python quiet_flow.py FOLDER BUNDLE

From: FOLDER/images. To: one JSON line on standard output: the attempts of each stage.
"""

from __future__ import annotations

import json
import sys
import time

from carray.__main__ import main


def attempts() -> int:
    """Count what the kernel had no route for: connections, datagrams and name lookups of any library."""
    with open("/proc/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Ip:"))
    return int(values[names.index("OutNoRoutes")])


def run(*arguments: str) -> None:
    """Run a command line; click ends even a good one with SystemExit."""
    try:
        main(list(arguments))
    except SystemExit as end:
        assert end.code in (0, None), arguments


def flow(folder: str, bundle: str) -> dict[str, int]:
    """Run the commands without Ray, then those with it; returns the attempts of each stage."""
    manifest = f"{folder}/manifest.parquet"
    run("prepare", f"{folder}/images", "--out", manifest)
    run("evaluate", bundle, "--manifest", manifest, "--split", "train", "--out", f"{folder}/evaluation")
    run("predict", bundle, f"{folder}/images/unknown/0.jpg")
    counted = {"without Ray": attempts()}
    from carray.core.ray.connect import start_ray

    with start_ray(num_cpus=1):
        counted["starting Ray"] = attempts() - counted["without Ray"]
        run("classify", bundle, f"{folder}/images", "--out", f"{folder}/predictions")
        time.sleep(5)  # several intervals of the reports that would be due
        counted["classify"] = attempts() - sum(counted.values())
    before = attempts()
    run("query", f"{folder}/predictions", "by-label")
    run("query", f"{folder}/predictions", "SELECT count(*) FROM predictions")
    run("report", f"{folder}/predictions", "--out", f"{folder}/report.html")
    return counted | {"asking": attempts() - before}


if __name__ == "__main__":
    print(json.dumps(flow(sys.argv[1], sys.argv[2])))
