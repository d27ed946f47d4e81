"""B39, B40: as many connects as the machine can make, and as many connections as time allows."""

import ctypes
import multiprocessing
import os
import socket
import time

import pytest
from contract_helpers import ServerProcess, round_trip
from helpers import SANITIZER, connect, patient, scaled, wait_until

SERVER = """
class Server(TstHandler):
    def on_message(self, sock, data):
        if data == b"raise":
            raise ZeroDivisionError
        sock.send(data)
    def on_error(self, sock, error):
        pass

import ctypes, gc
pool = TstPool(Server(), workers=4)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
print(port)

def numbers():
    while len(pool):
        time.sleep(0.01)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident

for line in sys.stdin:
    print(*numbers(), pool.stats().accepted)
pool.stop()
"""


def flood(address, seconds, ready):
    """A process that does nothing but connect and reset, which leaves no TIME_WAIT behind."""
    linger = ctypes.string_at(ctypes.byref((ctypes.c_int * 2)(1, 0)), 8)
    until = time.monotonic() + seconds
    ready.set()
    while time.monotonic() < until:
        try:
            with socket.create_connection(address, 1) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except OSError:
            pass


def round_trips(client, seconds):
    """How long each of the round trips of some seconds took, in order of length."""
    took, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.monotonic()
        assert round_trip(client, b"hello") == b"hello"
        took.append(time.monotonic() - begin)
        time.sleep(0.001)
    return sorted(took)


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_who_is_there_is_served_during_a_flood_of_connects(seconds):
    """B39: two processes that only connect; the slowest in a hundred round trips of a connection beside them."""
    context = multiprocessing.get_context("spawn")
    with ServerProcess(SERVER) as server, connect(server.addr) as client:
        ready = [context.Event() for _ in range(2)]
        floods = [context.Process(target=flood, args=(server.addr, patient(seconds) + 1, event)) for event in ready]
        for process in floods:
            process.start()
        for event in ready:
            assert event.wait(patient(20))
        took = round_trips(client, patient(seconds))
        for process in floods:
            process.join()
        client.close()
        accepted = int(server.process.communicate("?\n", timeout=patient(20))[0].split()[3])
    slow = took[len(took) * 99 // 100]
    print(f"{accepted / (seconds + 1):.0f} connects a second; 99 % of {len(took)} round trips < {slow * 1e3:.1f} ms")
    assert accepted > 500 * seconds
    assert slow < patient(0.1)
    assert took[-1] < patient(1)


def ask(server):
    server.process.stdin.write("?\n")
    server.process.stdin.flush()
    return [int(word) for word in server.process.stdout.readline().split()]


def visit(address, count):
    """Connections that end in each of the ways, in turn."""
    linger = ctypes.string_at(ctypes.byref((ctypes.c_int * 2)(1, 0)), 8)
    for i in range(count):
        with socket.create_connection(address, patient(10)) as client:
            if i % 4:  # else nothing is ever said
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"
            if i % 4 == 2:
                client.sendall(b"raise")
                assert client.recv(1) == b""
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_process_does_not_grow(count):
    """B40: connect, echo, raise, reset; descriptors, threads and memory after the half are those after the whole."""
    context = multiprocessing.get_context("spawn")
    count = scaled(count, minimum=1000)
    with ServerProcess(SERVER) as server:
        seen = []
        for _ in range(2):
            with context.Pool(2) as visitors:
                visitors.starmap(visit, [(server.addr, count // 4)] * 2)
            seen.append(wait_until(lambda: ask(server)))
        server.finish()
    (*before, resident, _), (*after, resident_after, accepted) = seen
    print(f"{accepted} connections: {resident} bytes after the half, {resident_after} after the whole")
    assert before == after
    assert accepted == count // 4 * 4
    assert SANITIZER or resident_after < resident * 1.02 + (1 << 18)
