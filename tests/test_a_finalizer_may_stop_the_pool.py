"""B47, B48, B49: that of a handler or hook which the pool lets go of, or of a worker's thread-local data."""

import pytest
from contract_helpers import free_port
from helpers import patient, run_python

PRELUDE = """
import faulthandler, gc, socket, sys, threading, time
from tstpool import TstHandler, TstPool

patience = float(sys.argv[1])
faulthandler.dump_traceback_later(patience, exit=True)

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

def ask(address):
    with socket.create_connection(address, patience) as client:
        client.sendall(b"hello")
        return client.recv(5)

stops = []
"""

OF_A_HANDLER = """
pool = TstPool()

class Owner(Echo):
    def __del__(self):
        stops.append(pool.stop(1))

pool.create(2, "127.0.0.1", int(sys.argv[2]), Owner())
pool.stop()
print(pool.create(2, "127.0.0.1", int(sys.argv[2]), Echo()), pool.running, len(pool.addresses), stops)
print(ask(pool.addresses[0]), pool.stop(), flush=True)
"""

OF_A_HOOK = """
pool = TstPool(Echo())

class Hook:
    def __call__(self, sock, *args):
        pass

    def __del__(self):
        stops.append(pool.stop(1))

setter = getattr(pool, sys.argv[2])
setter(Hook())
setter(None)
address = pool.listen("127.0.0.1", 0)
pool.start()
print(stops, pool.addresses == [address], ask(address), pool.stop(), flush=True)
"""

OF_THREAD_LOCAL_DATA = """
local = threading.local()

class Session:
    def __del__(self):
        stops.append((threading.get_ident(), pool.stop(1)))

class Keeping(Echo):
    def on_message(self, sock, data):
        local.session = Session()
        stops.append(threading.get_ident())
        return data

pool = TstPool(Keeping(), workers=1)
address = pool.listen("127.0.0.1", 0)
pool.start()
print(ask(address), pool.stop(patience / 2))
print(len(stops), stops[0] == stops[1][0], pool.running, threading.active_count(), flush=True)
"""


def test_of_a_handler_that_create_replaces():
    """B48: the new server is there all the same; it listens and serves."""
    out = run_python("-c", PRELUDE + OF_A_HANDLER, str(patient(8)), str(free_port())).stdout
    assert out.splitlines() == ["True True 1 [True]", "b'hello' True"]


@pytest.mark.parametrize("setter", ["setEventNewConnected", "setEventDisconnected"])
def test_of_a_hook_that_is_taken_away(setter):
    """B48: it is over with that; what listens from then on is not stopped."""
    out = run_python("-c", PRELUDE + OF_A_HOOK, str(patient(8)), setter).stdout
    assert out == "[True] True b'hello' True\n"


def test_of_what_a_worker_thread_has_kept_for_itself():
    """B47: it comes when the thread ends, which would wait for itself."""
    out = run_python("-c", PRELUDE + OF_THREAD_LOCAL_DATA, str(patient(8))).stdout
    assert out.splitlines() == ["b'hello' True", "2 True False 1"]
