"""B39, B40: as many connects as the machine can make, and as many connections as time allows."""

import contextlib
import subprocess
import sys
import time

import pytest
from contract_helpers import ServerProcess, round_trip
from helpers import PATIENCE, SANITIZER, connect, patient, scaled

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


# Each client resets at its end, which leaves no TIME_WAIT behind.
CLIENT = """
import socket, struct, sys, time
address, patience = (sys.argv[1], int(sys.argv[2])), float(sys.argv[4])
"""

FLOOD = (
    CLIENT
    + """
until = time.monotonic() + float(sys.argv[3])
print("ready", flush=True)
while time.monotonic() < until:
    try:
        with socket.create_connection(address, 1) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
"""
)

VISIT = (
    CLIENT
    + """
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    with socket.create_connection(address, 10 * patience) as client:
        if i % 4:  # else nothing is ever said
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
        if i % 4 == 2:
            client.sendall(b"raise")
            assert client.recv(1) == b""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""
)


@contextlib.contextmanager
def two_processes(code, address, argument):
    """Two that run the code, beside the block; they end by themselves, without an error."""
    command = [sys.executable, "-c", code, address[0], str(address[1]), str(argument), str(PATIENCE)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        yield
        assert [process.wait() for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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
    with ServerProcess(SERVER) as server, connect(server.addr) as client:
        with two_processes(FLOOD, server.addr, patient(seconds) + 1):
            took = round_trips(client, patient(seconds))
        client.close()
        accepted = int(server.process.communicate("?\n", timeout=patient(20))[0].split()[3])
    slow = took[len(took) * 99 // 100]
    print(f"{accepted / (seconds + 1):.0f} connects a second; 99 % of {len(took)} round trips < {slow * 1e3:.1f} ms")
    assert accepted > 500 * seconds
    assert slow < patient(0.25)
    assert took[-1] < patient(1)


def ask(server):
    server.process.stdin.write("?\n")
    server.process.stdin.flush()
    return [int(word) for word in server.process.stdout.readline().split()]


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_process_does_not_grow(count):
    """B40: connect, echo, raise, reset; descriptors, threads and memory after the half are those after the whole."""
    count = scaled(count, minimum=1000)
    with ServerProcess(SERVER) as server:
        seen = []
        for _ in range(2):
            with two_processes(VISIT, server.addr, count // 4):
                pass
            seen.append(ask(server))
        server.finish()
    (*before, resident, _), (*after, resident_after, accepted) = seen
    print(f"{accepted} connections: {resident} bytes after the half, {resident_after} after the whole")
    assert before == after
    assert accepted == count // 4 * 4
    assert SANITIZER or resident_after < resident * 1.02 + (1 << 18)
