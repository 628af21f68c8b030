"""Network namespaces joined at one switch: every host has an address, and a cable that can be cut or slowed.

Makes namespaces `carrayN-HOST` in 198.18.N.0/24 (addresses that RFC 2544 reserves for tests), reachable from this
machine. The namespace of the switch is made first and claims N, so two clusters get two numbers. Nothing outside
`carrayN` is touched. A cut cable drops packets silently. Needs Linux, root, and `ip` and `tc` of iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Network", "numbers_in_use", "why_not"]

_NUMBERS = 256
_SWITCH = "switch"
_NAME = re.compile(r"carray(\d+)-(\w+)")


def why_not() -> str:
    """Return why this machine can have no such network; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is missing (Debian's packages iproute2 and util-linux)"
    try:
        Network.claim().remove()
    except OSError as err:
        return f"this machine allows no network namespaces ({err})"
    return ""


def numbers_in_use() -> list[int]:
    """List the numbers of the networks that exist, whoever made them."""
    return sorted({int(found[1]) for name in _namespaces() if (found := _NAME.fullmatch(name))})


@dataclass(frozen=True)
class Network:
    """A network, by its number."""

    number: int

    @classmethod
    def claim(cls) -> Network:
        """Make a switch under the first number that is free, with a cable to this machine.

        Raises:
            OSError: this machine refuses.
        """
        refusal = OSError("all numbers are taken")
        for number in range(_NUMBERS):
            network = cls(number)
            try:
                _run("ip", "netns", "add", network.namespace(_SWITCH))
            except OSError as err:
                refusal = err
                if network.namespace(_SWITCH) not in _namespaces():
                    break
                continue
            network._build()
            return network
        raise refusal

    def _build(self) -> None:
        switch, cable = self.namespace(_SWITCH), f"carray{self.number}"
        try:
            _run("ip", "-n", switch, "link", "add", _SWITCH, "type", "bridge")
            _run("ip", "-n", switch, "link", "set", _SWITCH, "up")
            _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "machine", "netns", switch)
            self._plug("machine")
            _run("ip", "addr", "add", f"{self.address(1)}/24", "dev", cable)
            _run("ip", "link", "set", cable, "up")
        except OSError:
            self.remove()
            raise

    def namespace(self, host: str) -> str:
        """Return the name of a host's namespace."""
        return f"carray{self.number}-{host}"

    def address(self, host_number: int) -> str:
        """Return the address of a host's number; 1 is this machine."""
        return f"198.18.{self.number}.{host_number}"

    def join(self, host: str, host_number: int) -> None:
        """Make a host's namespace, with its address and its cable."""
        name = self.namespace(host)
        _run("ip", "netns", "add", name)
        peer = ("peer", "name", "eth0", "netns", name)
        _run("ip", "link", "add", host, "netns", self.namespace(_SWITCH), "type", "veth", *peer)
        self._plug(host)
        _run("ip", "-n", name, "addr", "add", f"{self.address(host_number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")

    def cut(self, host: str) -> None:
        """Cut a host's cable: what is sent is lost silently."""
        _run("ip", "-n", self.namespace(_SWITCH), "link", "set", host, "nomaster")

    def mend(self, host: str) -> None:
        """Restore a host's cable."""
        self._plug(host)

    def slow(self, host: str, *, kilobits: int) -> None:
        """Limit a host's cable to so many kilobits a second, each way."""
        limit = ("root", "tbf", "rate", f"{kilobits}kbit", "burst", "32kbit", "latency", "400ms")
        _run("tc", "-n", self.namespace(_SWITCH), "qdisc", "replace", "dev", host, *limit)
        _run("tc", "-n", self.namespace(host), "qdisc", "replace", "dev", "eth0", *limit)

    def unlimit(self, host: str) -> None:
        """Remove the limit."""
        for namespace, device in ((self.namespace(_SWITCH), host), (self.namespace(host), "eth0")):
            with suppress(OSError):  # it had none
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")

    def pids(self, host: str) -> list[int]:
        """List a host's processes, as this machine counts."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace(host)).split()]

    def remove(self) -> None:
        """Kill every process in the network's namespaces, and delete them."""
        own = [name for name in _namespaces() if (found := _NAME.fullmatch(name)) and int(found[1]) == self.number]
        for name in own:
            for pid in self.pids(name.partition("-")[2]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(OSError):  # it was never made
            _run("ip", "link", "del", f"carray{self.number}")
        # The switch last: it is the claim on the number.
        for name in sorted(own, key=lambda name: name.endswith(f"-{_SWITCH}")):
            _run("ip", "netns", "del", name)

    def _plug(self, host: str) -> None:
        for state in (("master", _SWITCH), ("up",)):
            _run("ip", "-n", self.namespace(_SWITCH), "link", "set", host, *state)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` says: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout
