"""Ports for servers that start later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_rlpt.distributed import addresses
from megatron_rlpt.distributed.addresses import _lasting_ports, free_port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_free_and_no_outgoing_connection_gets_it(host):
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if not _lasting_ports():
        pytest.skip("the system gives all ports to outgoing connections")
    found = {free_port(host) for _ in range(20)}
    assert len(found) > 15
    for port in found:
        assert not first <= port <= last
        with socket.create_server((host, port)):
            pass


@pytest.mark.parametrize("text", ["10000 65535", "", None])
def test_without_such_ports_it_is_one_of_those_that_the_system_gives(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "range").write_text(text)
    monkeypatch.setattr(addresses, "_GIVEN_OUT", tmp_path / "range")
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_taken_ports_are_passed_over(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(addresses, "_lasting_ports", lambda: [taken.getsockname()[1]])
        assert free_port() != taken.getsockname()[1]


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")
