"""LeakSanitizer finds nothing at the end of a process that used whatever allocates; `make asan` runs this.

Nothing is suppressed: CPython, from 3.11 on, is clean by itself. The scenes are few and short, because a leak needs to
happen but once to be found. Objects that the garbage collector knows are no leak to the sanitizer, so each process
looks itself that none of ours is left. (`make asan` has the sanitizer look at the end of the whole suite, too.)
"""

import os
import sys
import textwrap

import pytest
from helpers import ROOT, SANITIZER, run_python

pytestmark = [
    pytest.mark.skipif("address" not in SANITIZER, reason="only the build of `make asan` finds leaks"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="this interpreter leaks by itself"),
]

PRELUDE = """
import gc, logging, os, socket, struct, sys, threading, time
import tstpool
from tstpool import Delimited, Fixed, LengthPrefixed, Raw, TstHandler, TstPool, TstStat

logging.disable(logging.CRITICAL)
PATIENCE = float(os.environ.get("TSTPOOL_TEST_PATIENCE", "1"))

def until(condition):
    deadline = time.monotonic() + 10 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.001)

def dial(pool):
    return socket.create_connection(pool.addresses[0], 10 * PATIENCE)

def receive(sock, n):
    got = b""
    while len(got) < n:
        piece = sock.recv(n - len(got))
        assert piece, (len(got), n)
        got += piece
    return got

def to_the_end(sock, last_words=b""):
    try:
        sock.sendall(last_words)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1000):
            pass
    except OSError:
        pass  # the server was quicker

def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

def serve(handler, **options):
    options.setdefault("workers", 2)
    pool = TstPool(handler, **options)
    pool.listen("127.0.0.1", 0)
    pool.start()
    return pool

class Echo(TstHandler):
    def on_message(self, sock, data):
        sock.send_message(data)
"""

EPILOGUE = """
left_running = scene()

def ours():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing).__module__ == "tstpool._core"
            and type(thing).__name__ in ("TstSocket", "TstData", "TstPool", "Worker", "Binding")]

until(lambda: left_running or not ours())
"""

EVERY_FRAMING = """
for copy in (True, False):
    for trigger in ("level", "oneshot", "edge"):
        for framing in (None, Raw(), Fixed(8), Delimited(b"\\r\\n"), LengthPrefixed(4)):
            with serve(Echo(), framing=framing, copy=copy, trigger=trigger) as pool, dial(pool) as client:
                for size in (8, 3000, 300000):
                    body = b"x" * size
                    if isinstance(framing, LengthPrefixed):
                        body = len(body).to_bytes(4, "big") + body
                    elif isinstance(framing, Delimited):
                        body += b"\\r\\n"
                    sender = threading.Thread(target=client.sendall, args=(body,))
                    sender.start()
                    assert receive(client, len(body)) == body
                    sender.join()
                client.sendall(b"half")  # of a message: it is kept until the end
"""

LENT_AND_KEPT = """
kept = []
class Keeper(TstHandler):
    def on_message(self, sock, data):
        kept.append(data[1:])
        sock.send(b"!")

for size in (10, 5000, 300000):
    with serve(Keeper(), copy=False, framing=Fixed(size)) as pool, dial(pool) as client:
        client.sendall(bytes(size))
        assert receive(client, 1) == b"!"
kept.clear()
"""

THE_ORIGINALS_STYLE = """
def func(sock):
    recv = sock.recv_data
    if not recv.req_len:
        recv.resize(8192)
        recv.req_len = 4096
        return TstStat.SUSPEND
    sock.send_data.resize(recv.req_len)
    sock.send_data.s[:] = recv.s[:recv.req_len]
    sock.send_data.req_len = recv.req_len
    sock.user_data = {"a": "cycle", "of": sock}
    return TstStat.SEND

pool = TstPool()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
assert pool.create(2, "127.0.0.1", port, func)
with dial(pool) as client:
    client.sendall(bytes(8192))
    receive(client, 4096)
assert pool.destroy(5 * PATIENCE)
"""

HOOKS_THAT_RAISE = """
class Raises(TstHandler):
    def on_connect(self, sock):
        sock.user_data = [sock]
        if self.where == "connect":
            raise ValueError("connect")
    def on_message(self, sock, data):
        sock.send(data)
        if self.where == "message":
            raise ValueError("message")
        return TstStat.DISCONNECT
    def on_disconnect(self, sock, reason):
        if self.where == "disconnect":
            raise ValueError("disconnect")
    def on_error(self, sock, error):
        if self.where == "error":
            raise error

for where in ("connect", "message", "disconnect", "error"):
    handler = Raises()
    handler.where = where
    with serve(handler) as pool:
        for _ in range(5):
            with dial(pool) as client:
                to_the_end(client, b"hello")
"""

OUTPUT_THAT_NOBODY_TAKES = """
class Flood(TstHandler):
    def on_message(self, sock, data):
        sock.send(b"small")
        sock.send(bytearray(3000))
        sock.send(bytes(4 << 20))  # shared, not copied
        pool.broadcast(bytes(100000))
        sock.user_data = data
        if data == b"abort":
            sock.close(abort=True)
        elif data == b"close":
            sock.close()

for word, end in ((b"abort", None), (b"close", reset), (b"", reset), (b"stay", None)):
    with serve(Flood(), max_queued=16 << 20, linger_timeout=0.2) as pool:
        with dial(pool) as client:
            client.sendall(word or b"reset")
            until(lambda: not len(pool) or any(sock.user_data for sock in pool.sockets()))
            if end:
                end(client)
            pool.stop(drain=0.1)
"""

SOCKETS_OF_OTHERS = """
ours, theirs = socket.socketpair()
with serve(Echo()) as pool, ours:
    sock = pool.addsocket(theirs, handler=lambda sock: TstStat.DISCONNECT, user_data=object())
    sock.send(b"hello")
    receive(ours, 5)
    ours.sendall(b"bye")
    until(lambda: sock.closed)
    other = pool.connect(*pool.addresses[0], framing=LengthPrefixed(2))
    other.send_message(b"to itself")
    until(lambda: pool.stats().accepted)
"""

STARTS_THAT_FAIL = """
start = threading.Thread.start
for n in (0, 1, 3):
    left = [n]
    def fails(thread):
        if thread.name.startswith("tstpool"):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)
    pool = TstPool(Echo(), workers=4, shards=2)
    pool.listen("127.0.0.1", 0)
    threading.Thread.start = fails
    try:
        pool.start()
    except RuntimeError:
        pass
    else:
        raise SystemExit("it started")
    finally:
        threading.Thread.start = start
    pool.stop()
    pool.listen("127.0.0.1", 0)
    pool.start()
    with dial(pool) as client:
        client.sendall(b"hello")
        receive(client, 5)
        try:
            TstPool(Echo()).listen(*pool.addresses[0])
        except OSError:
            pass
        else:
            raise SystemExit("two listen there")
    pool.stop()
TstPool(Echo()).listen("127.0.0.1", 0)  # dropped without a start
for wrong in ({"workers": 0}, {"trigger": "x"}, {"high_water": -1}, {"framing": 3}):
    try:
        TstPool(Echo(), **wrong)
    except (TypeError, ValueError):
        pass
    else:
        raise SystemExit(f"{wrong} was taken")
"""

COMPILED = """
import downstream_handlers as compiled

def say(client, body, answer):
    client.sendall(len(body).to_bytes(4, "big") + body)
    receive(client, answer)

class Slow(compiled.Commands):
    def on_message(self, sock, data):
        sock.send_message(data)

for shards in (1, 2):
    commands = Slow()
    with serve(commands, framing=LengthPrefixed(4), shards=shards, workers=4) as pool:
        with dial(pool) as one, dial(pool) as two:
            say(one, b"e" * 200000, 200004)
            say(one, b"r" * 200000, 200004)  # passed on to Python
            two.sendall(b"\\0\\0\\0\\1p")     # blocks: the shard is taken over, and its requests wait
            receive(two, 11)
            say(one, b"e", 5)
            commands.open_gate()
            receive(two, 5)
            say(one, b"c", 6)
            say(two, b"q", 3)
            until(lambda: not len(pool))
        with dial(pool) as client:
            reset(client)
    counts = commands.counts
    assert counts["copies_made"] == counts["copies_freed"] and not counts["broken"], counts
for kind in (compiled.Echo, compiled.Refusing, compiled.Relay, compiled.Upper):
    with serve(kind()) as pool, dial(pool) as client:
        to_the_end(client, b"\\0\\0\\0\\2hi")
"""

BLOCKED_AND_ALIVE_AT_THE_END = """
gate = threading.Event()
class Blocks(TstHandler):
    def on_message(self, sock, data):
        if data == b"block":
            gate.wait(10 * PATIENCE)
        sock.send(data)

pool = serve(Blocks(), workers=3, first_byte_timeout=0.5 * PATIENCE)  # not so short that it strikes one that speaks
clients = [dial(pool) for _ in range(4)]
for client in clients[:2]:
    client.sendall(b"block")
clients[2].sendall(b"hello")
receive(clients[2], 5)
assert clients[3].recv(1) == b""  # the deadline for its first byte
gate.set()
receive(clients[0], 5)
for client in clients:
    client.close()
return "running"
"""

A_STOP_THAT_CUTS_OFF = """
gate = threading.Event()
class Blocks(TstHandler):
    def on_message(self, sock, data):
        sock.send(bytes(1 << 20))
        entered.set()
        gate.wait(10 * PATIENCE)
        sock.send(data)

entered = threading.Event()
pool = serve(Blocks())
with dial(pool) as client, dial(pool) as other:
    client.sendall(b"hello")
    entered.wait(10 * PATIENCE)
    other.sendall(b"x")
    assert not pool.stop(drain=0.05)
    gate.set()
    until(lambda: pool.stop(drain=1))
"""

A_LEAK = """
import ctypes
ctypes.CDLL(None).malloc(ctypes.c_size_t(12345))
"""

A_REFERENCE_TOO_MANY = """
global PATIENCE
PATIENCE = 0.1
import ctypes
ctypes.pythonapi.Py_IncRef(ctypes.py_object(TstPool()))
"""

SCENES = [
    "EVERY_FRAMING",
    "LENT_AND_KEPT",
    "THE_ORIGINALS_STYLE",
    "HOOKS_THAT_RAISE",
    "OUTPUT_THAT_NOBODY_TAKES",
    "SOCKETS_OF_OTHERS",
    "STARTS_THAT_FAIL",
    "COMPILED",
    "BLOCKED_AND_ALIVE_AT_THE_END",
    "A_STOP_THAT_CUTS_OFF",
]


def play(scene, *options):
    """The process that ran it; what is in ASAN_OPTIONS already comes before `options`, which win."""
    options = ":".join(filter(None, [os.environ.get("ASAN_OPTIONS"), "detect_leaks=1", *options]))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests" / "downstream")]))
    code = PRELUDE + "def scene():\n" + textwrap.indent(scene, "    ") + EPILOGUE
    return run_python("-c", code, env={"ASAN_OPTIONS": options, "PYTHONPATH": path}, check=False)


@pytest.mark.parametrize("name", SCENES)
def test_nothing_leaks(name):
    done = play(globals()[name])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_memory_that_nobody_points_to_would_be_found():
    done = play(A_LEAK, "log_path=stderr")  # not where .ci/flavour looks for reports
    assert done.returncode != 0
    assert "12345 byte" in done.stderr


def test_an_object_with_a_reference_too_many_would_be_found():
    done = play(
        "global PATIENCE\nPATIENCE = 0.1\nimport ctypes\nctypes.pythonapi.Py_IncRef(ctypes.py_object(TstPool()))"
    )
    assert done.returncode == 1
    assert "not in time" in done.stderr
