"""B40: what is stored of a next message is no longer in the room that a long one has taken."""

import ctypes

import pytest
from helpers import SANITIZER, patient, run_python

CODE = """
import socket, sys, time
sys.path.insert(0, "tests")
from helpers import mapped_memory
from tstpool import Delimited, TstHandler, TstPool

COUNT, LENGTH = 30, (1 << 20) - 1

def held():
    return mapped_memory() >> 10  # KiB

def wait_until(cond):
    deadline = time.monotonic() + float(sys.argv[1])
    while not cond() and time.monotonic() < deadline:
        time.sleep(0.01)
    return cond()

class Handler(TstHandler):
    def on_message(self, sock, data):
        pass

pool = TstPool(Handler(), framing=Delimited(), workers=2)
pool.listen("127.0.0.1", 0)
pool.start()
clients = [socket.create_connection(pool.addresses[0]) for _ in range(COUNT)]
before = held()
sent = 0
for piece in (b"a" * LENGTH, b"\\n" + b"a" * LENGTH, b"\\nb"):
    for client in clients:
        client.sendall(piece)
    sent += len(piece) * COUNT
    assert wait_until(lambda: pool.stats().bytes_in == sent)
    print((held() - before) // COUNT)
assert wait_until(lambda: pool.stats().messages == 2 * COUNT)
wait_until(lambda: held() - before < 100 * COUNT)
print((held() - before) // COUNT)
for client in clients:
    client.close()
pool.stop(0)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer's malloc keeps what is freed")
def test_its_room_shrinks_when_the_message_has_been_handed_over():
    """B40: a mebibyte for each connection was there before."""
    done = run_python("-c", CODE, str(patient(4)), env={"MALLOC_MMAP_THRESHOLD_": "131072"})
    first, *_, last = map(int, done.stdout.split())
    assert first > 900  # KiB
    assert last < 100, done.stdout
