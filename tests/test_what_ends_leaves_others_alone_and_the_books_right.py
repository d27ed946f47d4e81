"""A stop, a close or a failure ends what is its own, and no more: others keep what is theirs, and the books balance."""

import contextlib
import os
import socket
import threading

import pytest
from contract_helpers import Gate, blocking, echo, handler, ignore, in_threads, round_trip
from helpers import SANITIZER, connect, patient, run_python, scaled, wait_until
from test_memory_that_cannot_be_had_crashes_nothing import no_memory

from tstpool import TstError, TstPool, TstSockType


def refuses(address):
    """True when nobody listens there."""
    try:
        connect(address).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False


@contextlib.contextmanager
def draining(make_pool, path):
    """A pool whose stop has begun, its listener is closed, and cannot end before a handler does."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=blocking(gate)), listen=(path,), workers=2)
        with connect(pool) as client:
            client.sendall(b"block")
            wait_until(lambda: gate.inside)
            stopping = threading.Thread(target=pool.stop, args=(patient(30),))
            stopping.start()
            try:
                wait_until(lambda: refuses(path))
                yield pool
                assert gate.inside  # it was draining all the time
            finally:
                gate.open()
                stopping.join(patient(30))
                assert not stopping.is_alive()


def test_a_stop_leaves_the_unix_socket_of_a_successor(make_pool, tmp_path):
    """While one pool drains, another one listens on the path that is free again: the end of the first one's stop must
    not remove that file."""
    path = f"unix:{tmp_path}/socket"
    with draining(make_pool, path):
        make_pool(handler(on_message=echo), listen=(path,))
        with connect(path) as client:
            assert round_trip(client, b"hello") == b"hello"
    with connect(path) as client:
        assert round_trip(client, b"again") == b"again"


def test_a_stop_leaves_the_file_that_somebody_else_has_put_there(make_pool, tmp_path):
    """The pool's own socket file was moved away, and another server's has taken its name."""
    path = tmp_path / "socket"
    pool = make_pool(handler(on_message=echo), listen=(f"unix:{path}",))
    path.rename(tmp_path / "old")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert pool.stop(patient(5)) is True
        assert path.is_socket()
        connect(f"unix:{path}").close()


def test_a_stop_removes_its_own_unix_socket(make_pool, tmp_path):
    """With nobody else there the file is gone afterwards, as ever."""
    path = tmp_path / "socket"
    pool = make_pool(handler(on_message=echo), listen=(f"unix:{path}",))
    assert path.is_socket()
    assert pool.stop(patient(5)) is True
    assert not path.exists()


def test_a_stop_does_not_mind_that_its_unix_socket_is_gone(make_pool, tmp_path):
    """Somebody else has removed it."""
    path = tmp_path / "socket"
    pool = make_pool(handler(on_message=echo), listen=(f"unix:{path}",))
    path.unlink()
    assert pool.stop(patient(5)) is True


@pytest.mark.parametrize("count", (1, 3))
def test_the_books_balance_when_a_pool_that_never_ran_is_stopped(count):
    """What was added is closed by the stop, and counted as that."""
    pool = TstPool(handler(on_message=ignore))
    ours, theirs = zip(*(socket.socketpair() for _ in range(count)), strict=True)
    for sock in theirs:
        pool.addsocket(sock)
    assert pool.stats().added == pool.stats().connections == count
    assert pool.stop() is True
    for sock in ours:
        with sock:
            sock.settimeout(patient(10))
            assert sock.recv(1) == b""
    stats = pool.stats()
    assert (stats.accepted, stats.added, stats.closed, stats.connections) == (0, count, count, 0)


def test_no_socket_is_added_once_a_stop_has_begun(make_pool):
    """The stop begins inside the call, behind its first look at the pool: TstError, and the descriptor stays the
    caller's."""
    gate = Gate()
    pool = make_pool(handler(on_message=lambda sock, data: gate.wait()), workers=2, shards=2)
    ours, theirs = socket.socketpair()
    answers = []

    class Number:
        def __index__(self):
            answers.append(pool.stop(0.1))
            return theirs.fileno()

    with gate, ours, theirs, connect(pool) as client:
        client.sendall(b"block")
        wait_until(lambda: gate.inside)
        ours.settimeout(patient(10))
        blocks = os.get_blocking(theirs.fileno())
        with pytest.raises(TstError):
            pool.addsocket(Number())
        assert answers == [False]
        assert gate.inside
        assert os.get_blocking(theirs.fileno()) == blocks
        theirs.sendall(b"mine")
        assert ours.recv(4) == b"mine"
        gate.open()
        assert pool.stop(patient(10)) is True
        theirs.sendall(b"still")
        assert ours.recv(5) == b"still"
        stats = pool.stats()
        assert stats.accepted + stats.added == stats.closed + stats.connections


def test_no_listener_is_added_while_the_pool_stops(make_pool, tmp_path):
    """TstError, as addsocket() has it: an address that nobody will ever serve is no answer."""
    with draining(make_pool, f"unix:{tmp_path}/first") as pool, pytest.raises(TstError):
        pool.listen("127.0.0.1", 0)
    assert pool.addresses == []


def test_no_unix_listener_is_added_while_the_pool_stops(make_pool, tmp_path):
    """The same for a path, where no file may be left."""
    path = tmp_path / "socket"
    with draining(make_pool, f"unix:{tmp_path}/first") as pool, pytest.raises(TstError):
        pool.listen(f"unix:{path}")
    assert not path.exists()


def test_no_listener_is_adopted_once_a_stop_has_begun(make_pool):
    """addsocket(..., LISTEN) with a stop inside the call: TstError, and the listener is still the caller's."""
    gate = Gate()
    pool = make_pool(handler(on_message=lambda sock, data: gate.wait()), workers=2)

    class Number:
        def __index__(self):
            pool.stop(0.1)
            return listener.fileno()

    with gate, socket.create_server(("127.0.0.1", 0)) as listener, connect(pool) as client:
        client.sendall(b"block")
        wait_until(lambda: gate.inside)
        with pytest.raises(TstError):
            pool.addsocket(Number(), TstSockType.LISTEN)
        gate.open()
        assert pool.stop(patient(10)) is True
        listener.settimeout(patient(10))
        with connect(listener.getsockname()), listener.accept()[0]:
            pass


CUT_SHORT = """
import ctypes, socket, sys, time
import tstpool
from tstpool import LengthPrefixed, TstHandler, TstPool

shim = ctypes.CDLL(None)
fail, calls, failed = (ctypes.c_int.in_dll(shim, name) for name in ("tst_fail", "tst_calls", "tst_failed"))
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if tstpool._core.__file__ in line]

class Echo(TstHandler):
    def on_message(self, sock, data):
        sock.send_message(data)

patience = float(sys.argv[1])
pool = TstPool(Echo(), workers=1, framing=LengthPrefixed(4))
address = pool.listen("127.0.0.1", 0)
pool.start()
shim.tst_watch(ctypes.c_void_p(int(places[0][0], 16)), ctypes.c_void_p(int(places[-1][1], 16)))
for number in range(1, 9):
    with socket.create_connection(address, patience) as client:
        client.sendall(b"\\0\\0\\0\\1x")
        assert client.recv(5, socket.MSG_WAITALL) == b"\\0\\0\\0\\1x"  # the worker has allocated what it needs
        (sock,) = pool.sockets()
        calls.value, failed.value, fail.value = 0, 0, number
        try:
            sock.send_message(b"x" * 100_000)
            said = "taken"
        except MemoryError:
            said = "MemoryError"
        fail.value = 0
        if said == "MemoryError" and not sock.closed:  # nothing of it was queued: the connection is as it was
            sock.send(b"whole")
        if not sock.closed:
            sock.close()
        got = 0
        try:
            while piece := client.recv(1 << 20):
                got += len(piece)
            end = "EOF"
        except ConnectionResetError:
            end = "reset"
        print(number, failed.value, said, got, end)
    while len(pool):
        time.sleep(0.001)
assert pool.stop(5) is True
"""


@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a malloc of its own")
def test_a_frame_that_memory_cuts_short_ends_in_a_reset():
    """Each allocation of a send_message() fails once. Its peer gets the whole frame, nothing of it, or a reset: never
    a header and a clean end."""
    preload = {"LD_PRELOAD": str(no_memory())}
    out = run_python("-c", CUT_SHORT, str(patient(10)), env=preload, timeout=60).stdout
    print(out)
    seen = [line.split()[1:] for line in out.splitlines()]
    for failed, said, got, end in seen:
        if said == "taken":
            assert (got, end) == ("100004", "EOF")
        else:
            assert failed == "1"
            assert (got, end) == ("5", "EOF") or end == "reset", f"{got} bytes and {end} of a frame that was not sent"
    assert "MemoryError" in [said for _, said, _, _ in seen]


def test_only_one_of_many_aborts_began_it(make_pool):
    """close(abort=True) on many threads at once: True for exactly one. Each spins for its cue, so that they come as
    close together as they can."""
    pool = make_pool(handler(on_message=ignore), workers=2)
    for _ in range(scaled(300, minimum=10)):
        with connect(pool) as client:
            (sock,) = wait_until(pool.sockets)
            ready, cue = [], []

            def abort(sock=sock, ready=ready, cue=cue):
                ready.append(True)
                wait_until(lambda: len(ready) == 4, timeout=20)
                cue.append(True)
                while len(cue) < 4:
                    pass
                return sock.close(abort=True)

            answers = in_threads(*[abort] * 4)
            assert sorted(answers) == [False] * 3 + [True]
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        wait_until(lambda: len(pool) == 0)


def test_local_is_never_the_address_of_a_successor(make_pool):
    """The connection ends, and another listener's takes its descriptor, while a thread asks for `local` all the time:
    its own address, then None."""
    pool = make_pool(handler(on_message=ignore), workers=1)
    second = pool.listen("127.0.0.1", 0)
    seen, again = set(), 0
    for _ in range(scaled(50, minimum=10)):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(connect(pool))
            own = first.getpeername()
            (sock,) = wait_until(pool.sockets)
            successor = stack.enter_context(socket.socket())  # has its descriptor before the connection's is free
            successor.settimeout(patient(10))
            over = threading.Event()

            def ask(sock=sock, over=over):
                while not over.is_set():
                    seen.add(sock.local)
                seen.add(sock.local)

            def replace(sock=sock, over=over, successor=successor):
                try:
                    sock.close(abort=True)
                    successor.connect(second)
                    wait_until(lambda: pool.sockets() and sock not in pool.sockets())
                finally:
                    over.set()

            in_threads(ask, replace)
            again += pool.sockets()[0].sd == sock.sd
            assert pool.sockets()[0].local == second
            assert seen <= {own, None}
        wait_until(lambda: len(pool) == 0)
    assert again
