"""Starts a cluster of several hosts on this machine to try things by hand, and removes it.

    python -m carray.testing.hosts up                       start one, and print how to use it
    python -m carray.testing.hosts check                    say whether this machine allows it; exit code 1 if not
    python -m carray.testing.hosts list                     print the numbers of the clusters that exist
    python -m carray.testing.hosts exec N HOST -- COMMAND   run a command on head, worker1 or worker2
    python -m carray.testing.hosts down N [N ...]           remove clusters, also what a crash left

Needs Linux, root, iproute2 and util-linux, and carray's environment with the extra `dev`. Cost of `up`: 20 s.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from carray.testing.hosts.cluster import STATE, Cluster
from carray.testing.hosts.machine import CLONE
from carray.testing.hosts.network import Network, numbers_in_use, why_not

__all__ = ["main"]

_BUCKET = "cars"


def main() -> None:
    """Run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "check", "list"):
        commands.add_parser(name)
    execute = commands.add_parser("exec")
    execute.add_argument("number", type=int)
    execute.add_argument("host", choices=("head", "worker1", "worker2"))
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("down").add_argument("numbers", type=int, nargs="+", metavar="N")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"There can be no hosts here: {reason}.")
    if reason or arguments.command == "check":
        sys.exit(bool(reason))
    try:
        if arguments.command == "up":
            _start()
        elif arguments.command == "list":
            print(*numbers_in_use())
        elif arguments.command == "down":
            for number in arguments.numbers:
                Network(number).remove()
                shutil.rmtree(STATE / str(number), ignore_errors=True)
        else:
            words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
            sys.exit(_execute(arguments.number, arguments.host, words))
    except OSError as err:
        sys.exit(str(err))


def _start() -> None:
    """Start a cluster with an empty bucket."""
    cluster = Cluster.build()
    try:
        cluster.store.create_bucket(_BUCKET)
        cluster.start()
    except BaseException:
        cluster.remove()
        raise
    number = cluster.network.number
    exports = "; ".join(f"export {name}={value}" for name, value in cluster.store.environment.items())
    print(
        f"Cluster {number} is up, with an empty bucket s3://{_BUCKET} in its store. To reach the store from here:\n\n"
        f"    {exports}\n\nTo submit a job, and to remove the cluster:\n\n"
        f"    python -m carray.testing.hosts exec {number} head -- ray job submit --working-dir . -- python ...\n"
        f"    python -m carray.testing.hosts down {number}"
    )


def _execute(number: int, name: str, words: list[str]) -> int:
    """Run a command on a host in this terminal; returns its exit code."""
    cluster = Cluster.find(number)
    environment = cluster.user if name == "head" else cluster.environment
    folder = str(CLONE) if name == "head" else "/"
    return subprocess.run(cluster.host(name).words(words, environment, folder), check=False).returncode


if __name__ == "__main__":
    main()
