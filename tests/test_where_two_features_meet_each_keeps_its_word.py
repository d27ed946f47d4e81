"""What each of two features promises holds also where they meet: pauses and half-closes, transfers and limits, hooks
that block and errors, passing on and pressure, reconnecting and other threads' output, fork and handlers."""

import contextlib
import os
import select
import socket
import threading
import time

import pytest
from contract_helpers import Gate, every_trigger, handler
from downstream_handlers import PassesOn
from helpers import connect, patient, recv_exact, recv_until_eof, run_python, wait_until

from tstpool import ConnectionClosed, Fixed, LengthPrefixed, TstStat

MUCH = 64 << 20  # more than the socket buffers of a loopback connection hold


def small_reader(pool):
    """A client that takes next to nothing until it reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(pool.addresses[0])
    client.settimeout(patient(10))
    return client


@every_trigger
@pytest.mark.parametrize("auto_pause", [True, False])
def test_transfers_to_a_peer_that_does_not_read_are_output_like_other(make_pool, trigger, auto_pause):
    """S10, B34, B35: each message asks for a transfer, and no reply is read. They count, and hold messages back;
    without auto_pause the connection ends at max_queued."""
    calls = []

    def on_message(sock, data):
        calls.append(data)
        sock.send_data.req_len = 4096

    pool = make_pool(handler(on_message=on_message), framing=Fixed(16), trigger=trigger, auto_pause=auto_pause)
    with small_reader(pool) as client:
        client.setblocking(False)
        deadline = time.monotonic() + patient(20)
        try:
            while time.monotonic() < deadline and (len(calls) < 100_000):
                try:
                    client.send(b"x" * 16 * 64)
                except BlockingIOError:
                    # That nothing waits yet says that the worker was held up.
                    room = select.select([], [client], [], 0.3)[1]
                    if not room and auto_pause and pool.stats().bytes_queued > 4096:
                        break  # TCP holds it back
                assert pool.stats().bytes_queued < 2 << 20
        except ConnectionError:
            assert not auto_pause
        wait_until(lambda: pool.stats().bytes_queued > 4096 if auto_pause else len(pool) == 0)
        assert pool.stats().bytes_queued < 2 << 20
        assert len(calls) < 50_000
        if auto_pause:
            n = len(calls)
            client.settimeout(patient(10))
            assert len(recv_exact(client, 4096 * n)) == 4096 * n  # and all of it comes
            wait_until(lambda: len(calls) > n)


@pytest.mark.parametrize("what", ["too large", "no reply", "no verdict", "slow"])
def test_a_hook_for_errors_or_slowness_may_block_too(make_pool, make_client, what):
    """B14: other connections go on meanwhile, whoever has called the hook."""
    gate = Gate()
    hooks = {"on_error": lambda sock, error: gate.wait()}
    if what == "slow":
        # Not for the other one, whose handler may be held up for as long.
        hooks = {"on_slow": lambda sock, seconds: gate.wait() if sock.user_data == "bad" else None}

    def on_message(sock, data):
        if data == b"bad":
            sock.user_data = "bad"
            if what == "slow":
                time.sleep(0.15)
            return {"no reply": b"y" * 2000, "no verdict": "text"}.get(what)
        return data

    pool = make_pool(handler(on_message=on_message, **hooks), framing=LengthPrefixed(2, max_message=1000), workers=4)
    good, bad = make_client(pool), make_client(pool)
    try:
        bad.sendall(b"\xff\xff" if what == "too large" else b"\0\3bad")
        wait_until(lambda: gate.inside)
        begin = time.monotonic()
        good.sendall(b"\0\1x")
        assert recv_exact(good, 3) == b"\0\1x"
        assert time.monotonic() - begin < patient(1)
    finally:
        gate.open()


@every_trigger
def test_a_whole_transfer_waits_for_the_resume_of_a_peer_that_has_half_closed(make_pool, make_client, trigger):
    """S16, B18: it had been asked for by req_len, was there, and the socket was paused before the handler had it."""
    got, sockets, paused = [], [], threading.Event()

    def on_message(sock, data):
        if data == b"pause!!!":
            sockets[0].pause()
            paused.set()
            return
        if not sockets:
            sockets.append(sock)
            sock.recv_data.req_len = 4
            return
        got.append(data)
        if len(got) == 32:
            time.sleep(0.05)  # the share of a turn is over: the next one is looked for, and has to wait

    pool = make_pool(handler(on_message=on_message), framing=None, workers=1, trigger=trigger)
    for _ in range(6):
        got.clear(), sockets.clear(), paused.clear()
        first, other = make_client(pool), make_client(pool)
        first.sendall(b"go")
        wait_until(lambda: sockets)
        first.sendall(b"abcd" * 33)
        first.shutdown(socket.SHUT_WR)
        other.sendall(b"pause!!!")
        assert paused.wait(10)
        sockets[0].resume()
        assert recv_until_eof(first) == b""
        assert got == [b"abcd"] * 33
        other.close()


def test_a_function_that_pauses_without_reading_gets_its_input_later(make_pool, make_client):
    """S14, B18: also when the peer has half-closed meanwhile: no more will come, but what has come is its."""
    calls, got = [], []
    sent, paused = threading.Event(), threading.Event()

    def function(sock):
        calls.append(sock.events)
        if len(calls) == 1:
            sent.wait(10)  # it is called again for what it has not read; before that the end is seen
        elif len(calls) == 2:
            sock.pause()
            paused.set()
        else:
            got.append(sock.read())

    pool = make_pool(function, workers=2)
    client = make_client(pool)
    client.sendall(b"data")
    wait_until(lambda: calls)
    client.shutdown(socket.SHUT_WR)
    sent.set()
    assert paused.wait(patient(10))
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):  # it is not closed
        client.recv(1)
    (sock,) = pool.sockets()
    sock.resume()
    client.settimeout(patient(10))
    assert recv_until_eof(client) == b""
    assert got == [b"data"]


@every_trigger
def test_a_message_that_is_passed_on_under_pressure_is_passed_on_once(make_pool, make_client, trigger):
    """B34: the compiled handler's reply is over high_water, so the message waits for Python; then it may write, and is
    told so itself."""
    messages = []

    class Both(PassesOn):
        def on_message(self, sock, data):
            messages.append(data)

    hooks = Both()
    pool = make_pool(hooks, framing=Fixed(4), trigger=trigger, workers=2)
    with small_reader(pool) as client:
        client.sendall(b"abcd")
        assert recv_exact(client, 100_000) == b"r" * 100_000
        wait_until(lambda: messages)
        wait_until(lambda: hooks.writable_calls)
        client.shutdown(socket.SHUT_WR)
        assert recv_until_eof(client) == b""
    assert messages == [b"abcd"]
    assert (hooks.received_calls, hooks.writable_calls) == (1, 1)


@pytest.mark.parametrize("way", ["abort", "reset"])
def test_flush_does_not_take_what_was_thrown_away_for_sent(make_pool, make_client, way):
    """S20: its handler still runs, so that the slot is still there."""
    gate = Gate()
    pool = make_pool(handler(on_message=lambda sock, data: gate.wait()), workers=2, max_queued=None)
    client = make_client(pool)
    client.sendall(b"x")
    wait_until(lambda: gate.inside)
    (sock,) = pool.sockets()
    sock.send(b"y" * MUCH)
    end = threading.Timer(0.1, lambda: sock.close(abort=True) if way == "abort" else client.close())
    end.start()
    try:
        with pytest.raises(ConnectionClosed):
            sock.flush(patient(10))
    finally:
        gate.open()
        end.join()


def test_a_fresh_connection_does_not_get_the_old_ones_output(make_pool):
    """S40, B01: another thread is in the middle of sending the old one's when the handler reconnects. What it sends
    before the handler has returned nobody can hold back; nothing comes after that."""
    fresh = []

    def on_message(sock, data):
        ours, theirs = socket.socketpair()
        os.dup2(theirs.fileno(), sock.sd)
        theirs.close()
        fresh.append(ours)
        return TstStat.RECONNECTED

    pool = make_pool(handler(on_message=on_message), workers=2, auto_pause=False, max_queued=None)
    for n in range(30):
        with connect(pool) as client:
            (sock,) = wait_until(pool.sockets)
            sock.send(b"OLD" * (4 << 20))

            def flush(sock=sock):
                with contextlib.suppress(ConnectionClosed, TimeoutError):
                    sock.flush(patient(5))

            thread = threading.Thread(target=flush)
            reader = threading.Thread(target=lambda client=client: [client.recv(1 << 18) for _ in range(20)])
            thread.start(), reader.start()
            client.sendall(b"go")
            wait_until(lambda n=n: pool.stats().messages > n)  # what the handler has returned is known by then
            with fresh[n] as ours:
                ours.settimeout(0.05)
                got = 0
                with contextlib.suppress(TimeoutError):
                    while True:
                        got += len(ours.recv(1 << 20))
                assert got < 1 << 20
                sock.send(b"new")
                ours.settimeout(patient(10))
                assert ours.recv(100) == b"new"
            reader.join(patient(10)), thread.join(patient(10))
            assert not thread.is_alive()
        wait_until(lambda: len(pool) == 0)


def test_a_peer_that_blocks_every_worker_is_gone_after_its_write_timeout(make_pool, make_client):
    """B35, B38: nobody is left to look at deadlines when each handler waits in send() for the same peer."""
    closed = []

    def on_message(sock, data):
        for other in pool.sockets():
            if other is not sock:
                try:
                    other.send(b"z" * 2_000_000)
                except ConnectionClosed:
                    closed.append(other)

    pool = make_pool(
        handler(on_message=on_message), framing=Fixed(4), workers=2, on_overflow="block", write_timeout=patient(0.5)
    )
    make_client(pool)  # which never reads
    wait_until(lambda: len(pool) == 1)
    talkers = [make_client(pool) for _ in range(2)]
    wait_until(lambda: len(pool) == 3)

    def read(client):
        while client.recv(1 << 18):
            pass

    readers = [threading.Thread(target=read, args=(client,)) for client in talkers]
    for thread in readers:
        thread.start()
    for client in talkers:
        client.sendall(b"talk" * 20)
    wait_until(lambda: closed, 20)
    wait_until(lambda: len(pool) == 2, 20)
    for client in talkers:
        client.shutdown(socket.SHUT_WR)
    for thread in readers:
        thread.join(patient(20))
    stats = pool.stats()
    assert (stats.write_closed, stats.overflow_closed) == (1, 0)


FORKED = """
import os, socket, sys, threading, time
import tstpool

class Forks(tstpool.TstHandler):
    def on_message(self, sock, data):
        if data == b"fork":
            child = os.fork()
            if child == 0:
                %s
            children.append(child)
        return data

children = []
pool = tstpool.TstPool(Forks(), workers=2)
address = pool.listen("127.0.0.1")
pool.start()
client = socket.create_connection(address, 10)
for _ in range(3):
    client.sendall(b"fork")
    assert client.recv(100) == b"fork"  # once, and not from the child too
    deadline = time.monotonic() + 20
    while os.waitpid(children[-1], os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.01)
    client.sendall(b"more")
    assert client.recv(100) == b"more"
pool.stop()
assert client.recv(1) == b""
print("done")
"""


@pytest.mark.parametrize("end", ["return data", "sys.exit(0)", "raise ValueError"])
def test_a_child_whose_handler_returns_ends_and_touches_nothing(end):
    """B45: the thread that forked is a worker of a pool that is dead in the child."""
    done = run_python("-W", "ignore", "-c", FORKED % end, timeout=90)
    assert done.stdout == "done\n"
    assert "CRITICAL" not in done.stderr
    assert "stops" not in done.stderr


def test_a_broadcast_of_nothing_leaves_nothing(make_pool, make_client):
    """It counts as sent to everybody, and holds no memory."""
    pool = make_pool(handler(on_message=lambda sock, data: data))
    client = make_client(pool)
    wait_until(pool.sockets)
    for _ in range(100):
        assert pool.broadcast(b"") == 1
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"
