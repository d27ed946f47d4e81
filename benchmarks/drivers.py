"""Loads in which little happens, so that Python is fast enough for them: ``python -m benchmarks.drivers idle --help``.

Like the C generators they print one line of JSON, compare every byte, and end with 1 when something is wrong. What they
measure stands under "values".
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack

PATIENCE = 10.0
_libc = ctypes.CDLL(None)


class Wrong(Exception):
    """What the server did wrong."""


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of the process, ended ones too, from the scheduler's own clock: in nanoseconds."""
    clock = ctypes.c_int()
    if _libc.clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        raise ProcessLookupError(pid)
    return time.clock_gettime(clock.value)


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def receive(client: socket.socket, expected: bytes) -> None:
    got = b""
    while len(got) < len(expected):
        try:
            piece = client.recv(len(expected) - len(got))
        except TimeoutError:
            raise Wrong(f"{len(got)} of {len(expected)} bytes came within {PATIENCE:g} s") from None
        if not piece:
            raise Wrong(f"closed after {len(got)} of {len(expected)} bytes")
        got += piece
    if got != expected:
        raise Wrong("wrong bytes came back")


def connect(port: int, stack: ExitStack) -> socket.socket:
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def idle(port: int, pid: int, connections: int, seconds: float) -> dict[str, float]:
    """Many connections that have been used once and then say nothing: what they cost in memory and CPU time."""
    with ExitStack() as stack:
        receive_echo([connect(port, stack)])  # the first of all: what the server makes only once
        empty = resident_bytes(pid)
        receive_echo(connect(port, stack) for _ in range(connections - 1))
        full = resident_bytes(pid)
        time.sleep(0.5)  # what the last message has left to do is done
        before, began = cpu_seconds(pid), time.monotonic()
        time.sleep(seconds)
        cpu, elapsed = cpu_seconds(pid) - before, time.monotonic() - began
    return {"cpu_share": cpu / elapsed, "bytes_per_connection": (full - empty) / (connections - 1)}


def receive_echo(clients: Iterable[socket.socket]) -> None:
    for client in clients:
        message = random.randbytes(64)
        client.sendall(message)
        receive(client, message)


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


def asleep(port: int, pid: int, connections: int, workers: int) -> dict[str, float]:
    """All workers sleep for a second in their handlers (a message of one byte asks for that); 20 messages wait on each
    of the other connections. What does the server do meanwhile, and does it serve all of them afterwards?"""
    with ExitStack() as stack:
        sleepers = [connect(port, stack) for _ in range(workers)]
        others = [connect(port, stack) for _ in range(connections)]
        waiting = [b"".join(framed(random.randbytes(64)) for _ in range(20)) for _ in others]
        began = time.monotonic()
        for number, sleeper in enumerate(sleepers):
            sleeper.sendall(framed(bytes([number])))
        time.sleep(0.2)  # until they all sleep; it takes a few milliseconds
        for client, messages in zip(others, waiting, strict=True):
            client.sendall(messages)
        before, since = cpu_seconds(pid), time.monotonic()
        time.sleep(max(0.0, began + 0.9 - since))
        cpu, elapsed = cpu_seconds(pid) - before, time.monotonic() - since
        early = sum(has_bytes(client) for client in others)
        for client, messages in zip(others, waiting, strict=True):
            receive(client, messages)
        all_served = time.monotonic() - began
        for number, sleeper in enumerate(sleepers):
            receive(sleeper, framed(bytes([number])))
    return {
        "cpu_share": cpu / elapsed,
        "served_early": early * 20,
        "served": connections * 20,
        "seconds_until_served": all_served,
    }


def has_bytes(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.settimeout(PATIENCE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drivers", description=__doc__.partition(":")[0])
    parser.add_argument("load", choices=("idle", "asleep"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0, help="idle: how long to look")
    parser.add_argument("--workers", type=int, default=8, help="asleep: how many the server has")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        if options.load == "idle":
            values = idle(options.port, options.pid, options.connections, options.seconds)
        else:
            values = asleep(options.port, options.pid, options.connections, options.workers)
    except (Wrong, OSError) as error:
        print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    print(json.dumps({"ok": True, "values": values}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
