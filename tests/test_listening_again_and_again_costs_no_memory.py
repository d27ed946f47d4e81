"""B44: listeners with the same limits share them, and one that fails leaves none behind."""

import ctypes

import pytest
from helpers import SANITIZER, run_python

LISTENING = """
import ctypes
from tstpool import TstPool

class Mallinfo(ctypes.Structure):
    _fields_ = [("before", ctypes.c_size_t * 7), ("uordblks", ctypes.c_size_t), ("behind", ctypes.c_size_t * 2)]

mallinfo = ctypes.CDLL(None).mallinfo2  # Python's small objects are not in it
mallinfo.restype = Mallinfo

def listen(times):
    refused = 0
    for _ in range(times):
        try:
            pool.listen(*address, idle_timeout=3)
        except OSError:
            refused += 1
    return refused, mallinfo().uordblks

pool = TstPool(lambda sock: None)
address = pool.listen("127.0.0.1", 0)
before = listen(100)[1]
refused, after = listen(2000)
print(refused, after - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a malloc of its own")
def test_a_port_in_use_costs_nothing_however_often_it_is_tried():
    """B44: with limits of its own; they took 80 bytes each."""
    refused, bytes_more = map(int, run_python("-c", LISTENING).stdout.split())
    assert refused == 2000
    assert bytes_more < 40_000
