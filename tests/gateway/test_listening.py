"""The socket that the gateway listens on."""

from __future__ import annotations

import socket
import sys

import pytest

from gateway.listening import KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES, ServeError, listen, url


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not inherit the options")
def test_listen_enables_keep_alive_on_accepted_sockets() -> None:
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = [
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert options == [KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("gateway.local", "http://gateway.local:8100"),
        ("0.0.0.0", "http://127.0.0.1:8100"),
        ("::", "http://[::1]:8100"),
        ("fd00::5", "http://[fd00::5]:8100"),
    ],
)
def test_url_reaches_the_host(host: str, expected: str) -> None:
    assert url(host, 8100) == expected


def test_shared_port_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ServeError, match=r"server\.processes: only Linux"):
        listen("127.0.0.1", 0, shared=True)
