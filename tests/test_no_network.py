"""Tests reach this machine only: the fixture no_network of conftest.py."""

import socket
import urllib.error
import urllib.request

import pytest

ELSEWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737): nobody has it


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_connections_to_other_machines_are_refused(call: str) -> None:
    with socket.socket() as opened, pytest.raises(OSError, match=rf"no network.*{ELSEWHERE}"):
        getattr(opened, call)((ELSEWHERE, 80))


def test_datagrams_to_other_machines_are_refused() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as opened, pytest.raises(OSError, match=rf"no network.*{ELSEWHERE}"):
        opened.sendto(b"text", (ELSEWHERE, 53))


def test_names_of_other_machines_are_not_looked_up() -> None:
    with pytest.raises(urllib.error.URLError, match=r"no network.*example\.org"):
        urllib.request.urlopen("http://example.org")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1])).close()


def test_unix_sockets_are_reached(tmp_path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))
