"""B49, B44: signals inside start(), where the threads of workers are being made."""

import pytest
from helpers import patient, run_python

SCENE = """
import faulthandler, os, socket, sys, threading, time
from tstpool import TstHandler, TstPool

which, patience = int(sys.argv[1]), float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
real, begun = getattr(threading, name), []

def interrupted(*args, **options):
    begun.append(name)
    if len(begun) == which:
        raise KeyboardInterrupt
    return real(*args, **options)

pool = TstPool(Echo(), workers=3)
pool.listen("127.0.0.1", 0)
setattr(threading, name, interrupted)
try:
    pool.start()
except KeyboardInterrupt:
    print("interrupted", pool.running, pool.stop(), pool.addresses)
setattr(threading, name, real)
address = pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(address, patience) as client:
    client.sendall(b"hello")
    print(client.recv(5))
print(pool.stop(), flush=True)
os._exit(0)  # threading waits for the thread that never began, as it does for any
"""


@pytest.mark.parametrize("which", [1, 2])
def test_where_the_thread_never_begins(which):
    """B49, B44: the first worker's, or the second's; the next start is as any."""
    out = run_python("-c", SCENE, str(which), str(patient(8))).stdout
    assert out.splitlines() == ["interrupted False True []", "b'hello'", "True"]


SIGNAL = """
import faulthandler, os, signal, socket, sys, threading
from tstpool import TstError, TstHandler, TstPool

what, patience = sys.argv[1], float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

real, parent, child = threading.Condition._acquire_restore, os.getpid(), 0

def restore(condition, saved):
    threading.Condition._acquire_restore = real
    signal.raise_signal(signal.SIGINT)  # it is the main thread whose handler runs
    real(condition, saved)

def fork(*args):
    global child
    child = os.fork()

if what == "fork":
    signal.signal(signal.SIGINT, fork)
pool = TstPool(Echo(), workers=3)
address = pool.listen("127.0.0.1", 0)
threading.Condition._acquire_restore = restore
try:
    pool.start()
    if os.getpid() != parent:
        os._exit(2)
except TstError as error:
    os._exit(0 if "fork" in str(error) and os.getpid() != parent else 3)
except KeyboardInterrupt:
    print("interrupted", pool.running, pool.stop(), threading.active_count())
    address = pool.listen("127.0.0.1", 0)
    pool.start()
with socket.create_connection(address, patience) as client:
    client.sendall(b"hello")
    print(client.recv(5))
print(pool.stop(), threading.active_count())
if child:
    print(os.waitpid(child, 0)[1])
"""


def test_where_it_waits_for_a_thread_to_begin():
    """B49, B44: CPython's Thread.start() has RuntimeError instead, when one comes where it takes its lock again."""
    out = run_python("-c", SIGNAL, "raise", str(patient(8))).stdout
    assert out.splitlines() == ["interrupted False True 1", "b'hello'", "True 1"]


def test_by_a_fork():
    """B45: the child has none of the threads that start() waits for."""
    out = run_python("-c", SIGNAL, "fork", str(patient(8))).stdout
    assert out.splitlines() == ["b'hello'", "True 1", "0"]
