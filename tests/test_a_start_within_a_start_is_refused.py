"""B49: a signal's handler comes in the middle of start() and starts the pool itself."""

import pytest
from helpers import patient, run_python

SCENE = """
import faulthandler, os, signal, socket, sys, threading
from tstpool import TstError, TstHandler, TstPool

call, patience = sys.argv[1], float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

pool = TstPool(Echo(), workers=4)
address = pool.listen("127.0.0.1", 0)
calls = {"start": pool.start, "create": lambda: pool.create(4, "127.0.0.1", 0, Echo())}
answers = []

def begin(*args):
    try:
        answers.append(calls[call]())
    except TstError:
        answers.append("refused")

signal.signal(signal.SIGUSR1, begin)
real, made = threading.Thread.__init__, []

def interrupted(thread, *args, **options):
    real(thread, *args, **options)
    made.append(thread)
    if len(made) == 2:
        signal.raise_signal(signal.SIGUSR1)

threading.Thread.__init__ = interrupted
pool.start()
threading.Thread.__init__ = real
print(answers, threading.active_count() - 1, pool.running)
with socket.create_connection(address, patience) as client:
    client.sendall(b"hello")
    print(client.recv(5))
print(pool.stop(), threading.active_count(), flush=True)
"""


@pytest.mark.parametrize("call", ["start", "create"])
def test_by_a_signal_whose_handler_starts_the_pool_too(call):
    """B49: it is told so, and there are as many workers as ever."""
    out = run_python("-c", SCENE, call, str(patient(8))).stdout
    assert out.splitlines() == ["['refused'] 4 True", "b'hello'", "True 1"]
