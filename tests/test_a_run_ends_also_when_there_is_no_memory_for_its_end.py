"""B36: allocations fail while the last worker ends: the pool is stopped all the same, and may be started again."""

import pytest
from helpers import FREE_THREADED, SANITIZER, patient, run_python, scaled
from test_memory_that_cannot_be_had_crashes_nothing import has_failing_allocations

pytestmark = [
    pytest.mark.skipif(bool(SANITIZER), reason="each of many pools would take too long"),
    pytest.mark.skipif(FREE_THREADED, reason="CPython 3.13t itself crashes when an allocation fails"),
    pytest.mark.skipif(not has_failing_allocations(), reason="this Python was built without _testcapi"),
]

SCENE = """
import _testcapi, logging, socket, sys, threading, time
from tstpool import TstHandler, TstPool

patience, most, fails = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
logging.disable(logging.CRITICAL)
threading.excepthook = lambda args: None

def delete(thread, really=threading.Thread._delete):
    _testcapi.remove_mem_hooks()  # the engine is through; CPython may keep a lock of all threads for ever
    really(thread)

threading.Thread._delete = delete

class Striking(TstHandler):
    def on_disconnect(self, sock, reason):  # of the last connection: the run ends now
        _testcapi.set_nomemory(n, n + fails)

def ask_to_stop(pool):
    try:
        pool.stop(0)
    except MemoryError:
        pass  # it was this thread's
    _testcapi.remove_mem_hooks()

for n in range(most):
    pool = TstPool(Striking(), workers=1 + n % 2)
    address = pool.listen("127.0.0.1", 0)
    pool.start()
    with socket.create_connection(address, patience):
        while not len(pool):
            time.sleep(0.0005)
        ask_to_stop(pool)
    until = time.monotonic() + patience
    while not pool.stop(0):
        assert time.monotonic() < until, f"after failure {n} the pool never ends"
    pool.listen("127.0.0.1", 0)
    pool.start()
    assert pool.stop(0) is True, n
print("done")
"""


@pytest.mark.parametrize("fails", [1, 20])
def test_whichever_it_is(fails):
    """B36: one of them, and twenty in a row, counted from the last connection's on_disconnect."""
    most = scaled(150, minimum=40)
    out = run_python("-c", SCENE, str(patient(5)), str(most), str(fails), timeout=90).stdout
    assert out == "done\n"
