"""B45: whatever a hook or a subclass has done before."""

import pytest
from helpers import patient, run_python

PRELUDE = """
import os, signal, socket, sys, time, warnings
warnings.simplefilter("ignore")  # 3.12 and later warn about fork with threads
from tstpool import TstError, TstHandler, TstPool

patience = float(sys.argv[1])

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

def end_of(child):
    "Its exit status; None when it had to be killed."
    until = time.monotonic() + patience
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

def ask(client):
    client.sendall(b"hello")
    return client.recv(5)
"""

FORK_IN_ON_IDLE = """
import threading
children, log, once = [], sys.argv[3], threading.Lock()

class Forking(Echo):
    def on_idle(self, no):
        if not once.acquire(blocking=False):  # several workers may be idle at the same moment
            return
        child = os.fork()
        if child:
            children.append(child)
            return
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)

pool = TstPool(Forking(), workers=int(sys.argv[2]), idle_time=0.02)
address = pool.listen("127.0.0.1", 0)
pool.start()
while not children:
    time.sleep(0.001)
print(end_of(children[0]))
with socket.create_connection(address, patience) as client:
    print(ask(client), pool.stop())
"""

NAMED = """
class Server(TstPool):
    _forked = False  # of its own

pools = [TstPool(Echo(), workers=1), Server(Echo(), workers=2), TstPool(Echo(), workers=1)]
clients = []
for pool in pools:
    address = pool.listen("127.0.0.1", 0)
    pool.start()
    clients.append(socket.create_connection(address, patience))
    assert ask(clients[-1]) == b"hello"
child = os.fork()
if child == 0:
    dead = 0
    for pool in pools:
        try:
            pool.start()
        except TstError as error:
            dead += "fork" in str(error)
    sys.exit(dead)
print(end_of(child), [ask(client) for client in clients], [pool.stop() for pool in pools])
"""

FORK_IN_A_SIGNAL_HANDLER = """
import threading
children, parent = [], os.getpid()

class Slow(Echo):
    def on_message(self, sock, data):
        if data == b"wait":
            inside.set()
            gate.wait(patience)
        return data

def fork(number, frame):
    child = os.fork()
    if child:
        children.append(child)

def signal_and_end():
    if sys.argv[2] == "serve":  # not while start() waits for its thread: in the child there is none
        with socket.create_connection(address, patience) as client:
            assert ask(client) == b"hello"
    while pool.running != (sys.argv[2] == "serve"):  # until the call has begun
        time.sleep(0.001)
    while not children:
        os.kill(parent, signal.SIGUSR1)
        time.sleep(0.05)
    gate.set()
    sys.stdout.write(f"{end_of(children[0])}\\n")  # print() in two threads mixes the ends of lines
    pool.stop()

inside, gate = threading.Event(), threading.Event()
pool = TstPool(Slow(), workers=1)
address = pool.listen("127.0.0.1", 0)
if sys.argv[2] == "stop":
    pool.start()
    client = socket.create_connection(address, patience)
    client.sendall(b"wait")
    inside.wait(patience)
signal.signal(signal.SIGUSR1, fork)
threading.Thread(target=signal_and_end).start()
try:
    result = pool.serve_forever() if sys.argv[2] == "serve" else pool.stop(patience)
except TstError as error:
    result = str(error)
if os.getpid() != parent:
    os._exit(7 if sys.argv[2] == "stop" or "fork" in result else 1)
sys.stdout.write(f"{result}\\n")
"""

WITH = """
with TstPool(Echo(), workers=1) as pool:
    child = os.fork()
    if child == 0:
        %s
    print(end_of(child))
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_when_on_idle_has_forked_it_and_returns_there(workers, tmp_path):
    """B45: the worker's thread is all that the child has; it ends, and says little about it."""
    log = tmp_path / "log"
    out = run_python("-c", PRELUDE + FORK_IN_ON_IDLE, str(patient(2.5)), str(workers), str(log), timeout=9).stdout
    assert out.splitlines() == ["0", "b'hello' True"]
    assert len(log.read_bytes()) < 10_000


def test_when_a_subclass_has_an_attribute_of_a_name_that_the_engine_once_called():
    """B45: all pools are dead in the child, and its exit leaves the parent's connections alone."""
    out = run_python("-c", PRELUDE + NAMED, str(patient(2.5)), timeout=9).stdout
    assert out == f"3 {[b'hello'] * 3} {[True] * 3}\n"


@pytest.mark.parametrize(("call", "result"), [("serve", "None"), ("stop", "True")])
def test_when_a_signal_handler_has_forked_while_a_call_waited(call, result):
    """B45, B49: the call is over in the child, where nobody is left to wait for, and goes on in the parent."""
    out = run_python("-c", PRELUDE + FORK_IN_A_SIGNAL_HANDLER, str(patient(10)), call, timeout=40).stdout
    assert sorted(out.split()) == sorted(["7", result])


@pytest.mark.parametrize(
    ("leave", "status", "said"),
    [("sys.exit(5)", 5, ""), ("raise RuntimeError('its own')", 1, "RuntimeError: its own\n"), ("os._exit(3)", 3, "")],
)
def test_when_it_leaves_the_pools_block(leave, status, said):
    """B45: as it likes, with its own exit status or exception; the parent's pool is none of its business."""
    done = run_python("-c", PRELUDE + WITH % leave, str(patient(10)), timeout=40)
    assert done.stdout == f"{status}\n"
    assert done.stderr.endswith(said) and "TstError" not in done.stderr
