"""B46, B47, B49, issue 2: exits, signals, and serve."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from contract_helpers import ServerProcess, free_port, round_trip
from helpers import ROOT, connect, patient, run_python

import tstpool

START = """
import os, signal, socket, sys, threading, time
import tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

pool = tstpool.TstPool(Echo(), workers=4, slow_handler=60)  # or one that is held up says so on stderr
address = pool.listen("127.0.0.1", 0)
pool.start()
client = socket.create_connection(address, 10)
client.sendall(b"hello")
assert client.recv(5) == b"hello"
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a message')", 1),
        ("raise ZeroDivisionError", 1),
        ("os._exit(4)", 4),
        ("del pool", 0),
        ("pool.stop(); del pool, client", 0),
        ("import atexit; atexit.register(pool.stop)", 0),
        ("import atexit; atexit.register(lambda: pool.broadcast(b'bye'))", 0),
        ("threading.Thread(target=lambda: time.sleep(0.1)).start()", 0),
        ("threading.Thread(target=pool.serve_forever, daemon=True).start()", 0),
        (
            "class Late:\n    def __del__(self):\n        pool.serve_forever()\nsys.late = Late(); import atexit\n"
            "atexit.register(pool.serve_forever)",
            0,
        ),
        ("sys.mypool = pool; sys.mysocks = pool.sockets()", 0),
        ("class Bye:\n    def __del__(self):\n        pool.stats(); pool.stop()\nsys.bye = Bye()", 0),
        (
            "import weakref\nclass Thing: pass\nsys.thing = Thing()\n"
            "sys.ref = weakref.ref(sys.thing, lambda ref: (pool.stats(), pool.broadcast(b'bye'), pool.stop()))",
            0,
        ),
        ("pool.sockets()[0].user_data = pool; pool.sockets()[0].handler = Echo()", 0),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
    ids=lambda value: str(value)[:40],
)
def test_exit_codes_are_as_expected_and_it_does_not_hang(end, code):
    """B46, B47: a pool that still runs, with an open connection, when the main thread is done."""
    begin = time.monotonic()
    done = run_python("-c", START + end, timeout=20, check=False)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - begin < patient(5)
    assert "Fatal" not in done.stderr
    assert code or done.stderr == ""


def test_a_handler_that_is_still_running_at_exit_is_waited_for_and_then_left():
    """B46: workers are joined with the GIL released: a handler that needs a moment ends in peace."""
    code = (
        START.replace("sock.send(data)", "sock.send(data); entered.set(); time.sleep(0.3); print('ended')")
        + "entered.wait(10)"
    )
    done = run_python("-c", code.replace("pool = ", "entered = threading.Event()\npool = ", 1), timeout=20)
    assert done.stdout == "ended\n"


def test_sys_exit_in_a_handler_ends_neither_the_worker_nor_the_process():
    """B46, B51."""
    code = START.replace("sock.send(data)", "sock.send(data)\n        if data == b'exit': sys.exit(5)") + (
        "client.sendall(b'exit')\n"
        "assert client.recv(5) == b'exit'\n"
        "assert client.recv(1) == b''\n"
        "again = socket.create_connection(address, 10)\n"
        "again.sendall(b'hello')\n"
        "assert again.recv(5) == b'hello'\n"
        "assert pool.stop() is True\n"
    )
    run_python("-c", code, timeout=20)


SERVE_FOREVER = """
pool = TstPool(Echo(), workers=2)
print(pool.listen("127.0.0.1", 0)[1])
try:
    pool.serve_forever()
except KeyboardInterrupt:
    print("interrupted", pool.running)
"""


def test_ctrl_c_in_serve_forever_drains_stops_and_is_raised_again():
    """B49, issue 2: KeyboardInterrupt, after the pool has stopped; within 250 ms when there is nothing to drain."""
    with ServerProcess(SERVE_FOREVER) as server, connect(server.addr) as client:
        round_trip(client, b"hello")
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert client.recv(1) == b""
        assert time.monotonic() - begin < patient(0.5)
        assert server.finish() == "interrupted False\n"


def test_ctrl_c_that_nobody_catches_ends_the_process_as_usual():
    """B49: exit by SIGINT, with Python's traceback and nothing worse."""
    with ServerProcess(SERVE_FOREVER.split("try:")[0] + "pool.serve_forever()\n") as server:
        with connect(server.addr) as client:
            round_trip(client, b"hello")
        server.process.send_signal(signal.SIGINT)
        _out, err = server.process.communicate(timeout=patient(5))
        assert server.process.returncode == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")


SERVE = """
port = int(os.environ["PORT"])
class Handler(Echo):
    def on_message(self, sock, data):
        if data == b"slow":
            time.sleep(0.3)
        sock.send(data)
def tell():
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 10).close()
            return print(port)
        except ConnectionRefusedError:
            time.sleep(0.001)
teller = threading.Thread(target=tell, daemon=True)
teller.start()
tstpool.serve(Handler(), host="127.0.0.1", port=port, workers=2)
teller.join()
print("returned", threading.active_count())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_returns_after_a_signal(number):
    """DESIGN 4, B49: SIGINT and SIGTERM drain and stop; what a handler was about to answer is still sent."""
    with ServerProcess(SERVE, env={"PORT": str(free_port())}) as server, connect(server.addr) as client:
        round_trip(client, b"hello")
        client.sendall(b"slow")
        time.sleep(0.05)  # either way it must be answered: before the handler starts, or while it runs
        begin = time.monotonic()
        server.process.send_signal(number)
        assert client.recv(10) == b"slow"
        assert client.recv(1) == b""
        assert server.finish() == "returned 1\n"
        assert time.monotonic() - begin < patient(5)


def test_serve_gives_the_old_signal_handlers_back():
    """DESIGN 4: Ctrl-C is Python's own again afterwards."""
    code = SERVE + (
        "import signal\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    with ServerProcess(code, env={"PORT": str(free_port())}) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == "returned 1\n"


SIGNALLED_EARLY = """
import os, signal, socket
import tstpool

real, listen = signal.signal, tstpool.TstPool.listen

def install(number, action):
    before = real(number, action)
    if WHEN == "installed" and (number, action) == (signal.SIGTERM, signal.default_int_handler):
        os.kill(os.getpid(), signal.SIGTERM)
    return before

class Pool(tstpool.TstPool):
    def listen(self, *args):
        addresses.append(super().listen(*args))
        if WHEN == "listening":
            os.kill(os.getpid(), signal.SIGTERM)
        return addresses[0]

addresses = []
signal.signal = install
tstpool._serve.TstPool = Pool
tstpool.serve(lambda sock: None, port=0)
signal.signal = real
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
for address in addresses:
    socket.create_server(address).close()
print(len(addresses))
"""


@pytest.mark.parametrize(("when", "listeners"), [("installed", "0"), ("listening", "1")])
def test_serve_returns_when_the_signal_comes_before_it_serves(when, listeners):
    """B49: who stops a service does not ask whether it has begun; nothing is left of it."""
    assert run_python("-c", f"WHEN = {when!r}\n" + SIGNALLED_EARLY).stdout.strip() == listeners


def test_serve_on_a_port_in_use_raises(make_pool):
    """Bad input: OSError with the address, at once."""
    pool = make_pool(lambda sock: None)
    host, port = pool.addresses[0]
    with pytest.raises(OSError, match=f"{host}.*{port}"):
        tstpool.serve(lambda sock: None, host=host, port=port)


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_exit_under_load(rounds):
    """B46: while a client floods it."""
    code = START + (
        "def flood():\n"
        "    try:\n"
        "        while True:\n"
        "            client.sendall(b'x' * 1000)\n"
        "            client.recv(1000)\n"
        "    except OSError:\n"
        "        pass\n"
        "threading.Thread(target=flood, daemon=True).start()\n"
        "time.sleep(0.02)\n"
    )
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, timeout=patient(10), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_in_the_middle_of_start_leaves_no_worker(monkeypatch):
    """B49: Ctrl-C while the second worker is being started; also one that begins only after the pool has given up."""
    held, begun = threading.Event(), []
    real = threading.Thread.start

    def start(thread):
        if thread.name.endswith("-1"):
            run = thread.run
            thread.run = lambda: (held.wait(10), run())  # it exists, but has not come to the pool's code yet
            real(thread)
            begun.append(thread)
            threading.Timer(0.05, held.set).start()
            raise KeyboardInterrupt
        real(thread)

    pool = tstpool.TstPool(lambda sock: None, workers=3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            pool.start()
    assert not begun[0].is_alive()
    assert not pool.running
    address = pool.listen("127.0.0.1", 0)
    with pool, connect(address):
        pass
