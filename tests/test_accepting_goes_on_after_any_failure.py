"""Defects 3 and 8, S1, B08, B22, B27, B31, B32: system calls that fail, in a server process of its own."""

import contextlib
import errno
import os
import select
import time

import pytest
from contract_helpers import Gate, ServerProcess, exchange, faults, handler, is_open, round_trip
from helpers import SANITIZER, connect, patient, recv_exact, recv_until_eof, reset, run_python, scaled, wait_until

SERVER = """
pool = TstPool(Echo(), workers=2, trigger=os.environ.get("TRIGGER", "level"))
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
if os.environ.get("NOFILE"):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["NOFILE"]), 4096))
print(port)
sys.stdin.read()
stats = pool.stats()
print(stats.accept_errors, stats.accepted)
pool.stop()
"""


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_after_emfile_it_accepts_again_within_a_second(trigger):
    """Defect 3, B31: out of descriptors: existing connections go on, CPU stays quiet, then all are served."""
    with ServerProcess(SERVER, env={"NOFILE": "40", "TRIGGER": trigger}) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.addr)) for _ in range(60)]
        for client in clients:
            client.sendall(b"hello")
        served = []
        while ready := select.select(
            [client for client in clients if client not in served], [], [], patient(0.3 if len(served) > 5 else 10)
        )[0]:
            served += ready
        assert 5 < len(served) < 40
        assert [recv_exact(client, 5) for client in served] == [b"hello"] * len(served)
        cpu = server.cpu_seconds()
        begin = time.monotonic()
        while time.monotonic() - begin < 0.5:  # starving, for half a second
            for client in served:
                assert round_trip(client, b"still here") == b"still here"
            time.sleep(0.05)
        assert server.cpu_seconds() - cpu < (0.4 if SANITIZER else 0.2)
        for client in served:
            client.close()
        begin = time.monotonic()
        for client in [client for client in clients if client not in served][:20]:
            assert recv_exact(client, 5) == b"hello"
        took = time.monotonic() - begin
        print(f"accepting again {took * 1e3:.1f} ms after descriptors became free ({trigger})")
        assert took < patient(1)
        errors, _accepted = map(int, server.finish().split())
        assert errors > 0


@pytest.mark.parametrize(
    "name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "ECONNABORTED", "EPROTO", "EINTR", "ENETDOWN"]
)
def test_each_error_of_accept_is_survived(name):
    """Defect 3, B32: three in a row; the waiting client is served within a second, and so is the next."""
    env = {"FAIL_CALL": "accept4", "FAIL_ERRNO": str(getattr(errno, name)), "FAIL_COUNT": "3"}
    with ServerProcess(SERVER, env=env, preload=faults()) as server:
        begin = time.monotonic()
        for _ in range(5):
            with connect(server.addr) as client:
                assert round_trip(client, b"hello") == b"hello"
        assert time.monotonic() - begin < patient(1.5)
        errors, accepted = map(int, server.finish().split())
        assert accepted == 5
        assert errors >= (0 if name in ("EINTR", "ECONNABORTED") else 1)


@pytest.mark.parametrize(
    "name",
    ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "ENETDOWN", "EINVAL"],
)
def test_an_accept_that_goes_on_failing_does_not_make_the_worker_spin(name):
    """Defects 2 and 3, B31, B32: a client waits, accept fails for a second: some tries, not a million."""
    env = {"FAIL_CALL": "accept4", "FAIL_ERRNO": str(getattr(errno, name)), "FAIL_COUNT": "2000000000"}
    # The last look is one after the first try, however late that is.
    until_it_has_tried = "sys.stdin.read()\nwhile not pool.stats().accept_errors:\n    time.sleep(0.001)\n"
    code = SERVER.replace("sys.stdin.read()\n", until_it_has_tried)
    with ServerProcess(code, env=env, preload=faults()) as server, connect(server.addr):
        time.sleep(0.5)  # a window to measure in, not a wait
        errors, accepted = map(int, server.finish().split())
    assert accepted == 0
    assert 0 < errors < 500


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_clients_that_reset_before_they_are_accepted(make_pool, make_client, trigger):
    """B22: the only worker is in a handler meanwhile, so that each is gone when it is accepted: ECONNABORTED, or a
    connection without a peer. The listener goes on."""
    ended = []
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"wait":
                gate.wait()
            sock.send(data)

        pool = make_pool(
            handler(on_message=on_message, on_disconnect=lambda sock, reason: ended.append(sock.peer)),
            workers=1,
            trigger=trigger,
        )
        first = make_client(pool)
        first.sendall(b"wait")
        wait_until(lambda: gate.inside)
        gone = scaled(200, 50)
        for _ in range(gone):
            reset(connect(pool))
        assert pool.stats().accepted == 1
        gate.open()
        assert recv_exact(first, 4) == b"wait"
        assert round_trip(make_client(pool), b"hello") == b"hello"
        wait_until(lambda: len(pool) == 2)
        stats = pool.stats()
        assert stats.accepted + stats.accept_errors == gone + 2
        assert stats.closed == stats.accepted - 2


@pytest.mark.parametrize(
    ("trigger", "fault"),
    [
        ("level", {"SHORT": "1"}),
        ("oneshot", {"SHORT": "1"}),  # with "edge" a short count means that there is no more: epoll(7) allows that
        ("level", {"EINTR_EVERY": "3"}),
        ("oneshot", {"EINTR_EVERY": "3"}),
        ("edge", {"EINTR_EVERY": "3"}),
        ("level", {"SHORT": "1", "EINTR_EVERY": "2"}),
        ("oneshot", {"SHORT": "1", "EINTR_EVERY": "2"}),
    ],
    ids=str,
)
def test_short_and_interrupted_calls_change_no_byte(trigger, fault):
    """Defect 8, B08, B27: recv and send of 1 to 3 bytes, EINTR everywhere; -1 is never added to a length."""
    with ServerProcess(SERVER, env={**fault, "TRIGGER": trigger}, preload=faults()) as server:
        data = os.urandom(scaled(15_000))
        with connect(server.addr) as client:
            assert exchange(client, data) == data
        server.finish()


@pytest.mark.parametrize("name", ["ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH"])
@pytest.mark.parametrize("call", ["recv", "send"])
def test_an_error_of_a_connection_ends_only_that_one(call, name):
    """Defect 8, B27: the peer sees the end, the next client is served."""
    env = {"FAIL_CALL": call, "FAIL_ERRNO": str(getattr(errno, name)), "FAIL_COUNT": "1"}
    with ServerProcess(SERVER, env=env, preload=faults()) as server:
        with connect(server.addr) as client:
            client.sendall(b"hello")
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(5) == b""
        with connect(server.addr) as client:
            assert round_trip(client, b"hello") == b"hello"
            assert is_open(client)
        server.finish()


STORM = """
signal.signal(signal.SIGUSR1, lambda *args: None)
pool = TstPool(Echo(), workers=2, idle_timeout=float(os.environ["IDLE"]))
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
over, rounds = threading.Event(), 0
def storm():
    global rounds
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("tstpool-")]
    assert len(workers) == 2
    while not over.wait(0.0003):
        for worker in workers:
            signal.pthread_kill(worker.ident, signal.SIGUSR1)
        rounds += 1
thread = threading.Thread(target=storm)
thread.start()
print(port)
sys.stdin.read()
over.set()
thread.join()
print(rounds)
pool.stop()
"""


def test_a_signal_storm_loses_nothing_and_makes_no_deadline_earlier():
    """B08: the workers themselves get signals all the time, while one client talks and another is silent."""
    idle = patient(0.5)  # the one that talks may be held up
    env = {"IDLE": str(idle)}
    with ServerProcess(STORM, env=env) as server, connect(server.addr) as client, connect(server.addr) as silent:
        begin = time.monotonic()
        round_trip(silent, b"hello")
        for i in range(scaled(1000, 200)):
            assert round_trip(client, b"%06d" % i) == b"%06d" % i
            if i % 10 == 0 and time.monotonic() - begin > 0.5:
                break
        assert recv_until_eof(silent) == b""
        assert time.monotonic() - begin >= idle  # from the server's last byte on, which came a little later
        assert int(server.finish()) > 100


def test_sigpipe_at_its_default_does_not_kill(make_client):
    """B26: MSG_NOSIGNAL on every send: a peer that is gone is an error, not a death."""
    code = SERVER.replace("print(port)", "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL); print(port)")
    with ServerProcess(code) as server:
        for _ in range(scaled(50)):
            client = make_client(server.addr)
            client.sendall(b"x" * 300_000)
            reset(client)
        with connect(server.addr) as client:
            assert round_trip(client, b"hello") == b"hello"
        server.finish()


SENDS_TO_NOBODY = """
import signal, socket, time, tstpool
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
reasons = []

class Late(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.user_data.close()
        for _ in range(data[0]):  # each of them is a piece of its own in the queue
            sock.send(b"x" * 5000)

    def on_disconnect(self, sock, reason):
        reasons.append(reason)

with tstpool.TstPool(Late(), workers=1) as pool:
    for pieces in (1, 3):
        ours, theirs = socket.socketpair()
        pool.addsocket(theirs, user_data=ours)
        ours.send(bytes([pieces]))
        while not reasons:
            time.sleep(0.001)
        print(pieces, type(reasons.pop()).__name__)
"""


def test_sigpipe_is_never_raised():
    """B26: EPIPE, from send and from sendmsg. TCP mostly hides it behind ECONNRESET; a socketpair does not."""
    assert run_python("-c", SENDS_TO_NOBODY).stdout == "1 BrokenPipeError\n3 BrokenPipeError\n"
