"""B44: a handler whose attributes can't be looked up, in one of the workers' threads: the run ends and says why."""

import pytest
from helpers import patient, run_python

SCENE = """
import faulthandler, logging, os, socket, sys, threading
from tstpool import TstHandler, TstPool

workers, patience = int(sys.argv[1]), float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)
logging.disable(logging.CRITICAL)
threading.excepthook = lambda arguments: None
is_ill = True

class Echo(TstHandler):
    @property
    def on_connect(self):
        if is_ill and threading.current_thread().name == f"tstpool-{workers // 2}":
            raise RuntimeError("not now")
        return lambda sock: None

    def on_message(self, sock, data):
        return data

def counted():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

TstPool(Echo()).stop()  # what the first pool of a process keeps is not a leak
before = counted()
pool = TstPool(Echo(), workers=workers)
pool.listen("127.0.0.1", 0)
try:
    pool.serve_forever()
except RuntimeError as error:
    print(error, pool.running, pool.addresses)
print(pool.stop(), counted() == before)
is_ill = False
address = pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(address, patience) as client:
    client.sendall(b"hello")
    print(client.recv(5))
print(pool.stop(), counted() == before)
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_the_run_ends_with_its_error_and_the_next_one_is_as_any(workers):
    """B44: the only worker, or the second of three."""
    out = run_python("-c", SCENE, str(workers), str(patient(5))).stdout
    assert out.splitlines() == ["not now False []", "True True", "b'hello'", "True True"]
