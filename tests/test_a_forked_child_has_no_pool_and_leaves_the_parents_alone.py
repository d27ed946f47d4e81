"""B45, bad input: a pool used after fork. Each case forks in a fresh interpreter."""

import pytest
from helpers import ROOT, patient, run_python, scaled

SCRIPT = """
import os, socket, sys, threading, warnings
warnings.simplefilter("ignore")  # 3.12 and later warn about fork with threads
import tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

pool = tstpool.TstPool(Echo(), workers=2, trigger="%(trigger)s")
address = pool.listen("127.0.0.1", 0)
pool.start()

def round_trip(client):
    client.sendall(b"hello")
    assert client.recv(5) == b"hello"

client = socket.create_connection(address, 10)
round_trip(client)
(sock,) = pool.sockets()
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    status = 1
    try:
        %(child)s
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    os.write(ready[1], b"x")
    os.close(go[1])
    os.read(go[0], 1)  # lives until the parent lets it go
    %(end)s
assert os.read(ready[0], 1) == b"x"
os.close(go[0])
%(parent)s
os.close(go[1])
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"
round_trip(socket.create_connection(address, 10))
assert pool.stop() is True
print("done")
"""

EVERY_METHOD = """
        own = tstpool.TstPool(Echo())
        calls = {
            "listen": lambda: pool.listen("127.0.0.1", 0),
            "start": lambda: pool.start(),
            "stop": lambda: pool.stop(),
            "destroy": lambda: pool.destroy(),
            "serve_forever": lambda: pool.serve_forever(),
            "create": lambda: pool.create(1, "127.0.0.1", 0, print),
            "connect": lambda: pool.connect(*address),
            "addsocket": lambda: pool.addsocket(socket.socketpair()[0]),
            "broadcast": lambda: pool.broadcast(b"x"),
            "need_send": lambda: pool.need_send(sock),
            "closesocket": lambda: pool.closesocket(sock),
            "sockets": lambda: pool.sockets(),
            "stats": lambda: pool.stats(),
            "enter": lambda: pool.__enter__(),
            "send": lambda: sock.send(b"from the child"),
            "close": lambda: sock.close(),
        }
        for name, call in calls.items():
            try:
                call()
            except tstpool.TstError as exc:
                assert name in ("send", "close") or "fork" in str(exc), f"{name}: {exc}"
            else:
                raise AssertionError(f"{name} works in the child")
"""

NOTHING = "pass"
OWN_POOL = """
        with tstpool.TstPool(Echo(), workers=2) as own:
            own.listen("127.0.0.1", 0)
            round_trip(socket.create_connection(own.addresses[0], 10))
"""
DROP_IT = """
        import gc
        del pool, sock
        gc.collect()
"""

GO_ON = "round_trip(client)\nround_trip(socket.create_connection(address, 10))"
CLOSE_IT = "assert pool.closesocket(sock) is True\nassert client.recv(1) == b''"
PEER_LEAVES = """
client.shutdown(socket.SHUT_RDWR)  # the child has a copy of the client, too
import time
deadline = time.monotonic() + 10
while len(pool):
    assert time.monotonic() < deadline, "the parent never saw its client leave"
    time.sleep(0.001)
"""


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (EVERY_METHOD, GO_ON),
        (NOTHING, CLOSE_IT),
        ("client.close()", PEER_LEAVES),
        (OWN_POOL, GO_ON),
        (DROP_IT, GO_ON),
    ],
    ids=["every method is refused", "FIN although the child lives", "peer leaves", "own pool", "dropped"],
)
def test_while_the_child_lives(trigger, child, parent):
    """B45: the parent serves on, with the child's copies of its descriptors open."""
    code = SCRIPT % {"trigger": trigger, "child": child, "parent": parent, "end": "os._exit(status)"}
    assert run_python("-c", code, timeout=30).stdout == "done\n"


@pytest.mark.parametrize("end", ["sys.exit(status)", "raise SystemExit(status)"])
def test_a_child_that_ends_the_ordinary_way(end):
    """B45, B46: with exit handlers; it neither hangs on threads that it has not, nor disturbs the parent."""
    code = SCRIPT % {"trigger": "level", "child": NOTHING, "parent": GO_ON, "end": end}
    assert run_python("-c", code, timeout=30).stdout == "done\n"


UNDER_LOAD = """
import os, select, signal, socket, sys, time, warnings
warnings.simplefilter("ignore")
import tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

pool = tstpool.TstPool(Echo(), workers=2)
address = pool.listen("127.0.0.1", 0)
load = os.fork()  # before start(): this child has no pool's threads to lose
if load == 0:
    clients = [socket.create_connection(address, 10) for _ in range(30)]
    for client in clients:
        client.sendall(b"x" * 2000)
    while True:
        for client in select.select(clients, [], [], 1)[0]:
            client.sendall(client.recv(100000) or os._exit(0))
    os._exit(0)
pool.start()
while len(pool) < 30 or not pool.stats().messages:
    time.sleep(0.001)
hung = 0
for _ in range(%d):
    child = os.fork()
    if child == 0:
        os._exit(0)
    deadline = time.monotonic() + %g
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            hung += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.0002)
    if hung:
        break
os.kill(load, signal.SIGKILL)
os.waitpid(load, 0)
pool.stop(1)
print("children that hung in os.fork():", hung)
"""


def test_a_fork_under_load_never_hangs():
    """B45: the workers are in the middle of anything when the process forks, with connection.lock held for instance."""
    code = UNDER_LOAD % (scaled(500, minimum=50), patient(5))
    assert run_python("-c", code, timeout=60).stdout == "children that hung in os.fork(): 0\n"


INHERITED = """
import os, socket, subprocess, sys
import tstpool
pool = tstpool.TstPool(lambda sock: None, shards=2, workers=2)
address = pool.listen("127.0.0.1", 0)
pool.listen("unix:%s/socket")
pool.start()
clients = [socket.create_connection(address) for _ in range(3)]
pool.connect(*address)
while len(pool) != 5:
    pass
def ours(pid):
    n = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            n += os.readlink(f"/proc/{pid}/fd/{fd}").startswith(("socket:", "anon_inode:"))
        except FileNotFoundError:
            pass  # the folder that is being listed
    return n
with subprocess.Popen([sys.executable, "-c", "input()"], close_fds=False, stdin=subprocess.PIPE) as child:
    print(ours(os.getpid()) > 10, ours(child.pid))
    child.communicate(b"\\n")
pool.stop()
"""


def test_no_descriptor_of_the_pools_is_inherited_by_a_program(tmp_path):
    """B45: listeners, connections, epoll sets, eventfds and timerfds have CLOEXEC."""
    assert run_python("-c", INHERITED % tmp_path).stdout.split() == ["True", "0"]


SPAWNED = """
import multiprocessing, os, socket, sys
import tstpool

if __name__ == "__main__":
    pool = tstpool.TstPool(lambda sock: sock.send(sock.read()) and None, workers=2)
    address = pool.listen("127.0.0.1", 0)
    pool.start()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=os.getcwd)
    child.start()
    child.join(30)
    print(child.exitcode)
    with socket.create_connection(address, 10) as client:
        client.sendall(b"hello")
        print(client.recv(5).decode())
    pool.stop()
"""


def test_multiprocessing_spawns_beside_a_running_pool(tmp_path):
    """B45: and the pool serves on."""
    (tmp_path / "main.py").write_text(SPAWNED)
    environment = {"PYTHONPATH": str(ROOT)}
    assert run_python(str(tmp_path / "main.py"), env=environment).stdout.split() == ["0", "hello"]
