"""B49, B44: Ctrl-C inside start(), where a worker's thread is about to be made."""

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
