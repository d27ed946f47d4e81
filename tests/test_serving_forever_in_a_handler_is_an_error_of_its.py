"""B42: serve_forever() waits until the pool has stopped, which waits for its handlers."""

import pytest
from helpers import patient, run_python

SERVING = """
import os, socket, sys, threading
import tstpool

patience = float(sys.argv[2])
heard = threading.Event()
errors = []

class Server(tstpool.TstHandler):
    def on_error(self, sock, error):
        errors.append(type(error).__name__)
        heard.set()

def serve(self, sock, *data):
    pool.serve_forever()

setattr(Server, sys.argv[1], serve)
pool = tstpool.TstPool(Server(), workers=2)
address = pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(address) as client:
    client.sendall(b"hello")
    heard.wait(patience)
    print(errors, pool.running, pool.stop(patience), pool.running, flush=True)
os._exit(0)  # a pool that never ends would hold the interpreter
"""


@pytest.mark.parametrize("hook", ["on_connect", "on_message"])
def test_it_raises_and_the_pool_can_be_stopped(hook):
    """B42: in a process of its own, as such a pool once never ended."""
    assert run_python("-c", SERVING, hook, str(patient(3))).stdout == "['TstError'] True True False\n"
