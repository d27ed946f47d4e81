"""Regression cases for pytest-benchmark: ``pytest benchmarks``. To compare servers: ``python -m benchmarks``.

The same two clients against tstpool, in this process, and against the C loop, in another. Compare the two groups'
ratios between two versions rather than their times: the noise of the machine is in both.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

tstpool: Any = pytest.importorskip("tstpool")

REPOSITORY = Path(__file__).resolve().parents[1]
MESSAGE = bytes(range(64))


class Echo(tstpool.TstHandler):  # type: ignore[misc]
    def on_message(self, sock: Any, data: bytes) -> None:
        sock.send(data)


@contextmanager
def tstpool_server() -> Iterator[int]:
    pool = tstpool.TstPool(Echo())
    port = pool.listen("127.0.0.1", 0)[1]
    with pool:
        yield port


@contextmanager
def c_server() -> Iterator[int]:
    # Not imported: pytest may run from anywhere, and `benchmarks` is a package only with the repository on the path.
    built = subprocess.run(
        [sys.executable, "-m", "benchmarks.build"], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True
    )
    program = re.search(rb".*/epoll_echo$", built.stdout, re.MULTILINE)
    assert program is not None
    with subprocess.Popen([program[0]], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture(params=[tstpool_server, c_server], ids=["tstpool", "c-loop"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    with request.param() as number:
        yield number


@contextmanager
def connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(count)]
        for client in clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield clients


def receive(client: socket.socket, size: int) -> bytes:
    data = client.recv(size)
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, "the server closed the connection"
        data += more
    return data


@pytest.mark.benchmark(group="ping-pong: 1 connection, 100 x 64 B")
def test_ping_pong(benchmark: Any, port: int) -> None:
    def run() -> None:
        for _ in range(100):
            client.sendall(MESSAGE)
            assert receive(client, len(MESSAGE)) == MESSAGE

    with connections(port, 1) as [client]:
        benchmark.pedantic(run, rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="burst: 50 connections at once, 10 x 64 B each")
def test_burst(benchmark: Any, port: int) -> None:
    def run() -> None:
        for client in clients:
            client.sendall(MESSAGE * 10)
        for client in clients:
            assert receive(client, len(MESSAGE) * 10) == MESSAGE * 10

    with connections(port, 50) as clients:
        benchmark.pedantic(run, rounds=20, warmup_rounds=2)
