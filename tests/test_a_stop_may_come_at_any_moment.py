"""B42, B46, B48, B49, S34: stop() from a signal handler, from a finalizer, beside another thread's start(); and what a
pool that does not run still owes."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
from contract_helpers import echo, handler, in_threads, round_trip
from helpers import PATIENCE, RunningPool, connect, patient, run_python, scaled, wait_until

from tstpool import TstError, TstPool, TstSockType, TstStat

PRELUDE = f"""
import faulthandler, gc, os, signal, socket, sys, threading, time
from tstpool import *
faulthandler.dump_traceback_later({patient(20)}, exit=True)
pool = TstPool(lambda sock: None, workers=8)
"""


def in_a_process(code):
    """What it has printed; a deadlock ends it with every stack."""
    return run_python("-c", PRELUDE + code, timeout=patient(60)).stdout


def test_by_a_signal_while_the_same_thread_starts_the_pool():
    """B49: start() takes a while, and the mutex is held; the stop comes when it is over."""
    out = in_a_process(f"""
hits = 0
def stop(*args):
    global hits
    hits += 1
    pool.stop(0)
signal.signal(signal.SIGALRM, stop)
for i in range({scaled(200, 40)}):
    signal.setitimer(signal.ITIMER_REAL, 0.0001 + i % 20 * 0.00005)
    try:
        pool.start()
    except TstError:
        pass
    while hits == i:  # a sanitizer may deliver it late
        time.sleep(0.0001)
    pool.stop(1)
    assert not pool.running
print(hits, threading.active_count())
""")
    assert out == f"{scaled(200, 40)} 1\n"


def test_by_a_signal_in_start_ends_what_start_has_begun():
    """B49: in the middle of it, for sure: a thread's start() is where the signal comes."""
    out = in_a_process("""
real, answers = threading.Thread.start, []
def start(thread):
    real(thread)
    if thread.name == "tstpool-3":
        signal.raise_signal(signal.SIGTERM)
threading.Thread.start = start
signal.signal(signal.SIGTERM, lambda *args: answers.append(pool.stop()))
pool.listen("127.0.0.1", 0)
pool.start()
print(answers, pool.running, pool.stop(), threading.active_count(), pool.addresses)
""")
    assert out == "[False] False True 1 []\n"


def test_by_a_signal_while_the_same_thread_waits_for_the_end():
    """B49: the signal comes inside serve_forever's wait, and its handler waits too."""
    out = in_a_process("""
answers = []
class Pool(TstPool):
    def start(self):  # serve_forever() calls it: a signal before that would only stop what it starts then
        super().start()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
pool = Pool(lambda sock: None, workers=8)
signal.signal(signal.SIGALRM, lambda *args: answers.append(pool.stop(1.0)))
pool.serve_forever()
print(answers, threading.active_count())
""")
    assert out == "[True] 1\n"


@pytest.mark.parametrize("stops", [True, False], ids=["handler stops", "handler raises"])
def test_by_a_signal_that_another_thread_gets(stops):
    """B49: the kernel may give it to a worker: the main thread, which waits, hears of it within 250 ms."""
    out = in_a_process(f"""
class Echo(TstHandler):
    def on_message(self, sock, data):
        return data
pool = TstPool(Echo(), workers=1)
address = pool.listen("127.0.0.1", 0)
signal.signal(signal.SIGTERM, (lambda *args: pool.stop()) if {stops} else signal.default_int_handler)
times = []
def kill():
    with socket.create_connection(address) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        (worker,) = [thread for thread in threading.enumerate() if thread.name == "tstpool-0"]
        times.append(time.monotonic())
        signal.pthread_kill(worker.ident, signal.SIGTERM)
        assert client.recv(5) == b""
        times.append(time.monotonic())
thread = threading.Thread(target=kill)
thread.start()
try:
    pool.serve_forever()
    print("returned")
except KeyboardInterrupt:
    print("interrupted")
thread.join()
print(times[1] - times[0])
""")
    how, took = out.split()
    assert how == ("returned" if stops else "interrupted")
    assert float(took) < (0.25 if PATIENCE == 1 else patient(1))


def test_by_a_finalizer_that_the_collector_runs_in_listen():
    """B48: the collector may run anything, anywhere."""
    out = in_a_process("""
class Server:
    def __init__(self):
        self.me = self
    def __del__(self):
        global hits
        hits += inside
        pool.stop(0)
hits, inside, kept = 0, False, []
gc.set_threshold(20, 0)  # 0: a free-threaded Python collects as soon, however much there is
for n in range(300):
    Server()
    kept.append([[] for _ in range(n % 50)])  # it counts what stays, in hundreds: somewhere in here the next is full
    inside = True
    pool.listen("127.0.0.1", 0)
    inside = False
    if hits > 3:
        break
gc.set_threshold(700)
print(hits > 0)
pool.stop()
print(pool.addresses)
""")
    assert out == "True\n[]\n"


def test_by_what_a_socket_of_the_pool_lets_go_of(make_pool):
    """B48: user_data of a socket that was added to a pool that never ran; its finalizer stops the pool, looks at it and
    adds the next one."""
    seen, ends = [], []

    class Session:
        def __del__(self):
            seen.append(pool.stop(0))
            seen.append(len(pool))
            ours, theirs = socket.socketpair()
            ends.append(theirs)
            pool.addsocket(ours)

    pool = TstPool(handler(on_message=echo))
    ours, theirs = socket.socketpair()
    with theirs:
        pool.addsocket(ours, user_data=Session())
        assert pool.stop() is True
    assert seen == [True, 0]
    assert len(pool) == 1
    pool.stop()
    ends[0].close()


def test_when_a_handler_makes_the_connection_anew_at_its_end(make_pool):
    """S40, B41: while the pool stops nothing is made anew: nobody would ask it to close."""
    calls = []
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:

        def on_disconnect(sock, reason):
            calls.append(reason)
            with socket.create_connection(server.getsockname()) as fresh:
                os.dup2(fresh.fileno(), sock.sd)
            return TstStat.RECONNECTED

        there = threading.Event()
        hooks = {"on_connect": lambda sock: there.set(), "on_message": echo, "on_disconnect": on_disconnect}
        pool = make_pool(handler(**hooks), listen=None)
        pool.connect(*server.getsockname())
        assert there.wait(10)
        begin = time.monotonic()
        assert pool.stop(patient(1)) is True
        assert time.monotonic() - begin < patient(1)
    assert len(calls) == 1
    assert len(pool) == 0


def test_beside_a_thread_that_stops_and_starts_it_again(monkeypatch):
    """B42: a stop() is about the run that it found. One that loses the processor before it waits must not cut off the
    next run."""
    there, go = threading.Event(), threading.Event()
    real = threading.current_thread

    def slow():
        if real().name == "first" and not there.is_set():
            there.set()
            assert go.wait(20)
        return real()

    with RunningPool(handler(on_message=echo), workers=2) as pool:
        monkeypatch.setattr(threading, "current_thread", slow)
        answers = []
        first = threading.Thread(target=lambda: answers.append(pool.stop(0.2)), name="first")
        first.start()
        assert there.wait(20)
        assert pool.stop() is True
        address = pool.listen("127.0.0.1", 0)
        pool.start()
        with connect(address) as client:
            assert round_trip(client, b"the next run") == b"the next run"
            go.set()
            first.join(20)
            time.sleep(0.4)  # a window in which it would be cut off
            assert round_trip(client, b"goes on") == b"goes on"
        with connect(address) as client:
            assert round_trip(client, b"and accepts") == b"and accepts"
        assert answers == [True]


def test_beside_threads_that_flush_a_pool_that_does_not_run():
    """B58: its sockets may be sent from; stop() closes them when nobody is in the middle of that, and the books
    balance."""
    for i in range(scaled(300, 60)):
        pool = TstPool(handler(on_message=echo))
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
            sock = pool.addsocket(ours)
            for _ in range(4):
                sock.send(bytearray(100_000))

            def flush(sock=sock):
                with contextlib.suppress(TstError, TimeoutError):
                    sock.flush(0.01)

            def stop(pool=pool, i=i):
                until = time.perf_counter() + i % 40 * 5e-6
                while time.perf_counter() < until:
                    pass
                pool.stop()

            in_threads(flush, stop)
            assert pool.stats().bytes_queued == 0


def test_a_pool_that_has_only_listened_is_dead_in_a_forked_child():
    """B45: else parent and child would take each other's events out of one epoll set."""
    out = in_a_process("""
address = pool.listen("127.0.0.1", 0)
child = os.fork()
if child == 0:
    try:
        pool.start()
    except TstError as error:
        print("refused:", error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
pool.start()
with socket.create_connection(address) as client:
    print(len(pool.addresses))
pool.stop()
""")
    refused, rest = out.splitlines()
    assert refused.startswith("refused: ") and "fork" in refused
    assert rest == "1"


def test_a_transfer_that_somebody_asks_for_at_the_end_is_not_the_engines(make_pool, make_client):
    """B10: the finalizer of user_data asks the socket, whose slot has let go of it, for its first recv_data."""
    ended = []

    class Last:
        def __init__(self, sock):
            self.sock = sock

        def __del__(self):
            self.sock.recv_data.req_len = 100
            ended.append(self.sock.closed)

    def on_message(sock, data):
        sock.user_data = Last(sock)
        sock.send(b"bye")
        return TstStat.DISCONNECT

    pool = make_pool(handler(on_message=on_message), workers=1)
    for _ in range(20):
        client = make_client(pool)
        client.sendall(b"x")
        assert client.recv(10) == b"bye"
        begin = time.monotonic()
        assert client.recv(1) == b""
        wait_until(lambda: len(pool) == 0)
        assert time.monotonic() - begin < patient(1)  # it does not linger for a transfer that is none of its own
    assert len(ended) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_by_a_signal_whose_handler_stops_it_again_and_again(number):
    """B49: while a client is served; each of the handler's calls returns."""
    out = in_a_process(f"""
class Echo(TstHandler):
    def on_message(self, sock, data):
        return data
pool = TstPool(Echo())
address = pool.listen("127.0.0.1", 0)
answers = []
signal.signal({int(number)}, lambda *args: answers.append((pool.stop(), pool.stop())))
def talk():
    with socket.create_connection(address) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        os.kill(os.getpid(), {int(number)})
        assert client.recv(5) == b""
thread = threading.Thread(target=talk)
thread.start()
pool.serve_forever()  # starts it: it is there that the signal comes, or still in start()
thread.join()
print(len(answers), pool.running)
""")
    assert out == "1 False\n"


def test_of_another_pool_while_this_one_is_entered_among_the_open_ones():
    """B49: a signal handler or finalizer that comes in between stops the other one as ever."""
    other, results = TstPool(handler()), []

    class Entered(TstPool):
        def __hash__(self):  # what a signal's handler could do just then
            results.append(other.stop(0))
            return id(self)

        def __eq__(self, other):
            return self is other

    other.start()
    pool = Entered(handler())
    pool.listen("127.0.0.1")
    pool.stop()
    assert all(results)
    assert other.stop(0) is True


def test_while_a_stop_takes_the_files_away_is_over_with_it(monkeypatch, tmp_path):
    """B49: the next start is not stopped for it."""
    pool = TstPool(handler())
    pool.listen(f"unix:{tmp_path}/first")
    monkeypatch.setattr("tstpool._net.unlink_socket", lambda address, file: pool.stop(0))
    pool.stop()
    monkeypatch.undo()
    try:
        address = pool.listen("127.0.0.1")
        assert pool.addresses == [address]
    finally:
        pool.stop()


def test_while_a_listener_is_added():
    """B49: it is stopped then, as it is by a stop() while it listens by itself."""
    pool = TstPool(handler())

    class Listener(socket.socket):
        def detach(self):
            pool.stop(0)
            return super().detach()

    listener = Listener()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    pool.addsocket(listener, TstSockType.LISTEN)
    assert pool.addresses == []
    pool.stop()
