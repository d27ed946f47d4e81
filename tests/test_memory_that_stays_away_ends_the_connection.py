"""B36: memory for a message that can't be had, now or later: the connection ends, and the others are served."""

import pytest
from contract_helpers import shim
from helpers import FREE_THREADED, SANITIZER, patient, run_python

pytestmark = [
    pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a malloc of its own"),
    pytest.mark.skipif(FREE_THREADED, reason="bytes objects do not come from malloc there"),
]

NO_MEMORY = r"""
/* Memory that can't be had, for LD_PRELOAD: none of exactly tst_size bytes, whoever wants it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
size_t tst_size;
int tst_failed;

void *malloc(size_t n) {
    if (n && n == __atomic_load_n(&tst_size, __ATOMIC_SEQ_CST)) {
        __sync_add_and_fetch(&tst_failed, 1);
        errno = ENOMEM;
        return NULL;
    }
    return __libc_malloc(n);
}
"""

SCENE = """
import ctypes, logging, os, socket, sys, time
from tstpool import LengthPrefixed, TstHandler, TstPool

logging.disable(logging.CRITICAL)
shim = ctypes.CDLL(None)
size, failed = ctypes.c_size_t.in_dll(shim, "tst_size"), ctypes.c_int.in_dll(shim, "tst_failed")
framing, pieces, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
LENGTH = 40_007
ends = []

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

    def on_error(self, sock, error):
        assert type(error) is MemoryError

    def on_disconnect(self, sock, reason):
        ends.append(reason)

def framed(data):
    return len(data).to_bytes(4, "big") + data if framing == "framed" else data

def wait_until(condition, what):
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            print(f"not within {patience} s: {what}; {failed.value} allocations failed", file=sys.stderr, flush=True)
            os._exit(1)  # a worker that spins would not let the pool stop
        time.sleep(0.001)

def ended(client):
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True

def answered(client, buffer):
    try:
        buffer += client.recv(100)
    except BlockingIOError:
        pass
    return buffer == framed(b"hello")

pool = TstPool(Echo(), workers=1, framing=LengthPrefixed(4) if framing == "framed" else None)
client, theirs = socket.socketpair()
for end in (client, theirs):
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
pool.addsocket(theirs)
address = pool.listen("127.0.0.1", 0)
message = framed(bytes(LENGTH))
size.value = LENGTH + sys.getsizeof(b"")
client.settimeout(patience)
if pieces == 1:
    client.sendall(message)  # so that all of it is there when the worker looks first
    pool.start()
else:
    pool.start()
    client.sendall(message[:5000])
    wait_until(lambda: pool.stats().bytes_in == 5000, "the first piece")
    try:
        client.sendall(message[5000:])
    except ConnectionError:
        pass
client.setblocking(False)
wait_until(lambda: ended(client), "the end of the connection")
wait_until(lambda: failed.value, "an allocation that fails")
with socket.create_connection(address, patience) as other:
    other.sendall(framed(b"hello"))
    other.setblocking(False)
    buffer = bytearray()
    wait_until(lambda: answered(other, buffer), "an answer to another client")
    wait_until(lambda: len(ends) == 1, "on_disconnect")
    used = time.process_time()
    time.sleep(0.5)
    used = time.process_time() - used
assert pool.stop(patience) is True
assert len(ends) == 2, ends
print(used)
"""


def cpu_seconds_afterwards(framing, pieces):
    """What the process needs in half a second when it has ended the connection and has served another."""
    preload = {"LD_PRELOAD": str(shim("memory-stays-away", NO_MEMORY))}
    return float(run_python("-c", SCENE, framing, str(pieces), str(patient(5)), env=preload).stdout)


@pytest.mark.parametrize("framing", ["framed", "raw"])
def test_a_message_that_is_there_and_gets_no_object(framing):
    """B36: it has arrived as a whole, and whenever a worker looks at it there is no memory for it."""
    assert cpu_seconds_afterwards(framing, 1) < 0.25


def test_a_message_that_is_to_be_received_into_an_object_that_is_not_to_be_had():
    """B36: a part of it has arrived, and whenever a worker looks at it there is no memory for the whole."""
    assert cpu_seconds_afterwards("framed", 2) < 0.25
