"""Builds a cluster of several hosts on this machine for whoever wants to look around in one, and takes it away.

    python tests/hosts up                       build one, and say how to use it
    python tests/hosts check                    say whether this machine allows them; exit code 1 where not
    python tests/hosts list                     the numbers of those that are there
    python tests/hosts exec N HOST -- COMMAND   run a command on head, worker1 or worker2, in the clone on the head
    python tests/hosts down N [N ...]           take them away, with all that they hold; also what a crash left

Needs Linux, root, iproute2 and util-linux, and carray's environment with the extra `dev`. Cost of `up`: 20 s.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts.cluster import STATE, Cluster
from hosts.machine import CLONE
from hosts.network import Network, numbers_in_use, why_not

_BUCKET = "cars"


def main() -> None:
    """Do what the arguments say."""
    arguments = _parser().parse_args()
    reason = why_not()
    if reason:
        print(f"There can be no hosts here: {reason}.")
    if reason or arguments.command == "check":
        sys.exit(bool(reason))
    try:
        if arguments.command == "up":
            up()
        elif arguments.command == "list":
            print(*numbers_in_use())
        elif arguments.command == "down":
            down(arguments.numbers)
        else:
            words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
            sys.exit(run(arguments.number, arguments.host, words))
    except OSError as err:
        sys.exit(str(err))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "check", "list"):
        commands.add_parser(name)
    execute = commands.add_parser("exec")
    execute.add_argument("number", type=int)
    execute.add_argument("host", choices=("head", "worker1", "worker2"))
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("down").add_argument("numbers", type=int, nargs="+", metavar="N")
    return parser


def up() -> None:
    """Build a cluster with an empty bucket."""
    cluster = Cluster.build()
    try:
        cluster.store.client().create_bucket(Bucket=_BUCKET)
        cluster.start()
    except BaseException:
        cluster.remove()
        raise
    number = cluster.network.number
    exports = "; ".join(f"export {name}={value}" for name, value in cluster.store.environment.items())
    print(
        f"Cluster {number} is up, with an empty bucket s3://{_BUCKET} in its store. To reach the store from here:\n\n"
        f"    {exports}\n\nTo submit a job, and to take the cluster away:\n\n"
        f"    python tests/hosts exec {number} head -- ray job submit --working-dir . -- python jobs/classify.py ...\n"
        f"    python tests/hosts down {number}"
    )


def down(numbers: list[int]) -> None:
    """Take clusters away, whole ones and what is left of others."""
    for number in numbers:
        Network(number).remove()
        shutil.rmtree(STATE / str(number), ignore_errors=True)


def run(number: int, name: str, words: list[str]) -> int:
    """Run a command on a host, here in the terminal; gives its exit code."""
    cluster = Cluster.find(number)
    environment = cluster.user if name == "head" else cluster.environment
    folder = str(CLONE) if name == "head" else "/"
    return subprocess.run(cluster.host(name).words(words, environment, folder), check=False).returncode


if __name__ == "__main__":
    main()
