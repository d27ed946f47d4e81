"""B46: at the interpreter's exit one pool is none of the others' concern."""

from helpers import patient, run_python

PRELUDE = """
import atexit, faulthandler, os, signal, socket, sys, threading, time
from tstpool import TstHandler, TstPool

patience = float(sys.argv[1])
faulthandler.dump_traceback_later(patience, exit=True)
pools = []
atexit.register(lambda: print([pool.running for pool in pools], flush=True))  # threading's own exit comes before

def started(pool):
    pool.listen("127.0.0.1", 0)
    pool.start()
    pools.append(pool)
"""

SUBCLASSES = """
class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

class Other(TstPool):
    def stop(self):
        return super().stop(0.2)

class Raising(TstPool):
    def stop(self, drain=5.0):
        raise RuntimeError("not now")

for cls in (TstPool, Other, TstPool, Raising, TstPool):
    started(cls(Echo(), workers=1))
"""

STUCK = """
gate = threading.Event()
atexit.register(gate.set)  # comes first
inside = []

class Stuck(TstHandler):
    def on_message(self, sock, data):
        inside.append(sock)
        gate.wait(patience)

clients = []
for _ in range(2):
    started(TstPool(Stuck(), workers=1, slow_handler=60))
    clients.append(socket.create_connection(pools[-1].addresses[0], patience))
    clients[-1].sendall(b"x")
while len(inside) < 2:
    time.sleep(0.001)
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
    while all(pool.running for pool in pools):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
"""

TAKE_NOTHING = """
class Sending(TstHandler):
    def on_connect(self, sock):
        sock.send(bytes(16_000_000))

clients = []
for number in range(4):
    started(TstPool(Sending(), workers=1, max_queued=None, name=f"pool{number}"))
    clients.append(socket.create_connection(pools[-1].addresses[0], patience))
for client in clients:
    assert client.recv(1)

def workers():
    return sum(thread.name.startswith("pool") for thread in threading.enumerate())

def watch():
    while workers() == len(pools):
        time.sleep(0.001)
    print([pool.running for pool in pools], flush=True)

threading.Thread(target=watch).start()
"""


def test_where_a_subclass_has_another_stop():
    """B46: one of other arguments, one that raises: these pools are stopped, too."""
    done = run_python("-c", PRELUDE + SUBCLASSES, str(patient(8)))
    assert done.stdout == "[False, False, False, False, False]\n"
    assert done.stderr == ""


def test_where_ctrl_c_interrupts_the_stop_of_one():
    """B46, B49: the other is stopped all the same."""
    out = run_python("-c", PRELUDE + STUCK, str(patient(8))).stdout
    assert out == "[False, False]\n"


def test_where_each_has_a_client_that_takes_nothing():
    """B46: when the first one has waited for its client, so have the others; they do not do so in turn."""
    out = run_python("-c", PRELUDE + TAKE_NOTHING, str(patient(20))).stdout
    assert out == "[False, False, False, False]\n" * 2
