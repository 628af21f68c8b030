"""The hosts of a test cluster: what one writes no other sees, a cable can be pulled, and nothing is left of them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carray.testing.hosts.machine import CLONE, Host
from carray.testing.hosts.network import Network, numbers_in_use, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no hosts here: {REASON}")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    network = Network.claim()
    try:
        made = {}
        for place, name in enumerate(("one", "two"), start=10):
            network.join(name, place)
            made[name] = Host(name, place, network, tmp_path / name, clone=name == "one")
        for host in made.values():
            host.switch_on({other.name: other.address for other in made.values()})
        yield made
    finally:
        network.remove()
    assert network.number not in numbers_in_use()


def shell(host: Host, line: str) -> str:
    done = host.run("bash", "-c", line, environment={})
    return (done.stdout + done.stderr).strip()


def listen(host: Host, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        server = host.start("python", "-m", "http.server", "80", "--directory", "/tmp", environment={}, log=file)
    wait_for(lambda: answers(host))
    return server


def answers(host: Host) -> bool:
    try:
        socket.create_connection((host.address, 80), timeout=0.5).close()
    except OSError:
        return False
    return True


def wait_for(condition: object) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_one_host_writes_no_other_sees(hosts: dict[str, Host]) -> None:
    one, two = hosts.values()
    shell(one, "touch /tmp/a /var/tmp/a ~/a /dev/shm/a")
    assert shell(one, "ls /tmp /var/tmp /dev/shm; ls ~").split().count("a") == 4
    assert shell(two, "ls /tmp /var/tmp /dev/shm; ls ~").split().count("a") == 0
    for place in ("/usr/a", "/etc/hosts2", f"{CLONE}/a"):
        assert "Read-only" in shell(one, f"touch {place}")
    assert shell(two, f"ls -A {CLONE}") == "", "carray comes to a worker through Ray only"


def test_a_host_has_its_own_name_address_and_processes(hosts: dict[str, Host]) -> None:
    one, two = hosts.values()
    assert shell(one, "hostname") == "one"
    assert shell(one, "python -c 'import socket; print(socket.gethostbyname(\"two\"))'") == two.address
    assert len(shell(two, "ls -d /proc/[0-9]*").split()) <= 3
    assert shell(one, "python -c 'import ray; print(ray.__version__)'").startswith("2.")


def test_a_pulled_cable_says_nothing_and_can_be_put_back(hosts: dict[str, Host], tmp_path: Path) -> None:
    one = hosts["one"]
    listen(one, tmp_path / "server.log")
    with socket.create_connection((one.address, 80), timeout=5) as connection:
        one.network.cut("one")
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert not answers(one)
        one.network.mend("one")
        connection.settimeout(30)
        assert connection.recv(4) == b"HTTP"


def test_a_killed_host_is_silent_and_keeps_its_disk(hosts: dict[str, Host], tmp_path: Path) -> None:
    one = hosts["one"]
    shell(one, "touch ~/kept /tmp/gone")
    server = listen(one, tmp_path / "server.log")
    one.kill()
    server.wait(10)
    assert not one.alive and not one.network.pids("one") and not answers(one)
    one.switch_on({})
    assert shell(one, "ls ~") == "kept"
    assert "gone" not in shell(one, "ls /tmp").split()


def test_a_slow_cable_is_slow_until_it_is_not(hosts: dict[str, Host], tmp_path: Path) -> None:
    one = hosts["one"]
    shell(one, "head -c 100000 /dev/zero > /tmp/zeros")
    listen(one, tmp_path / "server.log")

    def fetch_seconds() -> float:
        started = time.monotonic()
        with socket.create_connection((one.address, 80), timeout=30) as connection:
            connection.sendall(b"GET /zeros HTTP/1.0\r\n\r\n")
            size = 0
            while data := connection.recv(65536):
                size += len(data)
        assert size > 100_000
        return time.monotonic() - started

    one.network.slow("one", kilobits=400)
    assert fetch_seconds() > 1  # 800 kilobits, at most a few of which are let through at once
    one.network.unlimit("one")
    fetch_seconds()


def test_two_networks_have_two_numbers(hosts: dict[str, Host]) -> None:
    other = Network.claim()
    try:
        assert other.number != hosts["one"].network.number
        assert other.number in numbers_in_use()
    finally:
        other.remove()
    assert hosts["one"].alive, "what is removed is one network's only"
