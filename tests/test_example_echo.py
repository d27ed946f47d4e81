"""examples/echo.py, driven by Debian's clients and by a socket."""

import contextlib
import select
import signal
import subprocess

import pytest
from example_helpers import FOREIGN, Example, Tool, need
from helpers import SANITIZER, connect, patient, recv_exact, scaled

# How each is told to send a file, end its output, and wait for all of the reply.
COMMANDS = {
    "ncat": ["ncat", "127.0.0.1"],
    "socat": ["socat", "-t60", "-"],
}


@pytest.mark.parametrize("tool", COMMANDS)
def test_a_megabyte_comes_back_as_it_was(tool):
    need(tool)
    data = bytes(range(256)) * scaled(4096, minimum=256)
    with Example("echo.py") as echo:
        port = echo.addr[1]
        where = [f"TCP:127.0.0.1:{port}"] if tool == "socat" else [str(port)]
        done = subprocess.run(
            COMMANDS[tool] + where, input=data, capture_output=True, env=FOREIGN, timeout=patient(60), check=True
        )
        assert done.stdout == data
        assert f"echo on 127.0.0.1:{port}".encode() in echo.output


@pytest.mark.parametrize("tool", ["ncat", "socat", "telnet"])
@pytest.mark.parametrize("end_by", [signal.SIGINT, signal.SIGTERM])
def test_what_is_typed_comes_back(tool, end_by):
    need(tool)
    with Example("echo.py", end_by=end_by) as echo, Tool(tool, echo.addr) as one, Tool(tool, echo.addr) as other:
        for i in range(3):
            one.type(f"line {i}")
            other.type(f"other {i}")
            one.wait_for(f"line {i}")
            other.wait_for(f"other {i}")


def test_many_talk_at_once():
    with Example("echo.py") as echo, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(echo.addr)) for _ in range(20)]
        for i, client in enumerate(clients):
            client.sendall(bytes([i]) * 1000)
        for i, client in enumerate(clients):
            assert recv_exact(client, 1000) == bytes([i]) * 1000


def test_a_peer_that_does_not_read_fills_no_memory():
    """B34: it sends as much as is taken of it, reads nothing meanwhile, and still gets all of it in the end."""
    total = 64 << 20
    with Example("echo.py") as echo, connect(echo.addr) as client:
        before = echo.resident_bytes()
        client.setblocking(False)
        piece, sent = bytes(range(256)) * 256, 0
        while sent < total and select.select([], [client], [], 0.5)[1]:
            sent += client.send(piece[sent % len(piece) :])
        assert sent < total // 2
        assert SANITIZER or echo.resident_bytes() - before < total // 4
        client.settimeout(patient(30))
        assert recv_exact(client, sent) == (piece * (sent // len(piece) + 1))[:sent]
