"""B36: no memory to count what is logged either: that record is left out, and nothing else changes."""

import pytest
from contract_helpers import shim
from helpers import SANITIZER, patient, run_python

PRELUDE = """
import ctypes, faulthandler, logging, os, socket, sys, threading, time
from tstpool import TstHandler, TstPool, _core, _log

patience = float(sys.argv[1])
logging.disable(logging.CRITICAL)
threading.excepthook = lambda arguments: None

def wait_until(condition):
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            faulthandler.dump_traceback()
            os._exit(1)
        time.sleep(0.001)

def impoverish(module, name):
    # that function runs out of memory three times
    real = getattr(module, name)

    def function(*arguments, **others):
        if len(failures) < 3:
            failures.append(name)
            raise MemoryError
        return real(*arguments, **others)

    setattr(module, name, function)

failures = []
"""

DISCONNECT = """
calls = []

class Raises(TstHandler):
    def on_disconnect(self, sock, reason):
        calls.append(reason)
        raise ValueError

class RaisesTwice(Raises):
    def on_error(self, sock, error):
        raise error

if sys.argv[2] == "counting":
    impoverish(_log, "left_out")
    pool = TstPool(Raises(), workers=1)
else:
    impoverish(_core, "log_caused")
    pool = TstPool(RaisesTwice(), workers=1)
address = pool.listen("127.0.0.1", 0)
pool.start()
socket.create_connection(address, patience).close()
wait_until(lambda: calls and len(pool) == 0)
print(calls, len(failures) > 0, pool.stop())
"""


@pytest.mark.parametrize("what", ["counting", "logging"])
def test_on_disconnect_is_called_once_when_what_follows_it_lacks_memory(what):
    """B36, S23: it raises, and what the engine does about that fails."""
    assert run_python("-c", PRELUDE + DISCONNECT, str(patient(5)), what).stdout == "[None] True True\n"


# Memory that can't be had, for LD_PRELOAD: while tst_poor is set, none of 16 MiB and more.
NO_MEMORY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
int tst_poor, tst_failed;

void *malloc(size_t n) {
    if (n >= 16 << 20 && __atomic_load_n(&tst_poor, __ATOMIC_SEQ_CST)) {
        __sync_add_and_fetch(&tst_failed, 1);
        errno = ENOMEM;
        return NULL;
    }
    return __libc_malloc(n);
}
"""

POLL = """
shim = ctypes.CDLL(None)
poor, failed = ctypes.c_int.in_dll(shim, "tst_poor"), ctypes.c_int.in_dll(shim, "tst_failed")
kept = []
impoverish(_log, "left_out")

class Keeps(TstHandler):
    def on_message(self, sock, data):
        kept.append(data[:1])  # and with it the memory that it was received into
        sock.send(b"taken")

pool = TstPool(Keeps(), workers=1, copy=False, receive_size=16 << 20)
address = pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(address, patience) as client:
    client.sendall(b"first")
    assert client.recv(5) == b"taken"
    poor.value = 1
    client.sendall(b"next")
    wait_until(lambda: (failed.value > 3 and len(failures) == 3) or not pool.running)
    poor.value = 0
    print(pool.running)
    print(client.recv(5))
    kept.clear()
print(pool.stop())
"""


@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a malloc of its own")
def test_a_worker_that_has_no_memory_to_poll_with_goes_on_when_there_is_some():
    """B36: it wants to log that, again and again."""
    env = {"LD_PRELOAD": str(shim("no-memory-to-poll", NO_MEMORY))}
    out = run_python("-c", PRELUDE + POLL, str(patient(5)), env=env).stdout
    assert out == "True\nb'taken'\nTrue\n"
