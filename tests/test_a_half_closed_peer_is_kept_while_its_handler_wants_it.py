"""B18, S6, S26: a peer that has half-closed gets all that its handler sends later: piece by piece, or once resumed."""

import contextlib
import os
import queue
import socket

import pytest
from contract_helpers import every_trigger, handler, round_trip
from helpers import patient, recv_exact, recv_until_eof, reset, wait_until

from tstpool import ConnectionClosed, Delimited, TstHandler

PIECE = bytes(range(250)) * 120
PIECES = 400  # more than the socket buffers of a loopback connection hold
HIGH_WATER = 65536


class Pieces(TstHandler):
    """Answers with PIECES of them: each asks for the next by need_send(). Notes how many were left at each end."""

    def __init__(self):
        self.ends = []
        self.left = PIECES
        self.seen = []

    def on_message(self, sock, data):
        self.on_writable(sock)

    def on_writable(self, sock):
        if self.left:
            self.left -= 1
            sock.send(PIECE)
            if self.left:
                self.pool.need_send(sock)

    def on_disconnect(self, sock, reason):
        self.ends.append((self.left, reason))

    def has_stopped(self):
        """It has begun, and has sent nothing more in the last calls of this: wait_until pauses longer and longer."""
        self.seen = [*self.seen[-5:], self.left]
        return len(self.seen) == 6 and len(set(self.seen)) == 1 and self.left < PIECES


class Paced(Pieces):
    """Sends until more than high_water waits, and goes on when on_writable says that it has gone out."""

    def on_writable(self, sock):
        waits = 0
        while self.left and waits <= HIGH_WATER:
            self.left -= 1
            waits = sock.send(PIECE)


def ask_and_half_close(client, data=b"q"):
    """The request and the FIN come together."""
    client.send(data, socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)


def talk_to(client, rounds=20):
    """The only worker has been round its loop as many times when this returns."""
    for _ in range(rounds):
        assert round_trip(client, b"tick\n") == b"tick\n"


@every_trigger
@pytest.mark.parametrize(
    "kind, options",
    [(Pieces, {}), (Paced, {"auto_pause": False}), (Paced, {"auto_pause": True})],
    ids=["need_send", "on_writable", "on_writable-auto_pause"],
)
@pytest.mark.parametrize("late", [False, True], ids=["fin-at-once", "fin-later"])
def test_a_reply_in_pieces_reaches_a_half_closed_peer_whole(make_pool, make_client, trigger, kind, options, late):
    """B18, S6: it begins to read when no more goes out, and on_disconnect comes once, after all of it."""
    pieces = kind()
    pool = pieces.pool = make_pool(pieces, workers=2, trigger=trigger, high_water=HIGH_WATER, start=False, **options)
    pool.start()
    client = make_client(pool)
    if late:
        client.sendall(b"q")
    else:
        ask_and_half_close(client)
    wait_until(pieces.has_stopped)
    if late:
        client.shutdown(socket.SHUT_WR)
    for _ in range(PIECES):
        assert recv_exact(client, len(PIECE)) == PIECE
    assert client.recv(1) == b""
    wait_until(lambda: len(pool) == 0)
    assert pieces.ends == [(0, None)]


class Direct(Pieces):
    """Writes to the descriptor itself, as much as the kernel takes, and waits with need_send() for more."""

    def on_writable(self, sock):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(sock.sd, PIECE)
        self.pool.need_send(sock)


@pytest.mark.parametrize("kind", [Pieces, Direct])
def test_a_half_closed_peer_that_reads_nothing_is_closed_by_write_timeout(make_pool, make_client, kind):
    """B18, B34, S6: its handler waits with need_send() all the time."""
    pieces = kind()
    pool = pieces.pool = make_pool(pieces, workers=2, write_timeout=patient(0.3), start=False)
    pool.start()
    ask_and_half_close(make_client(pool))
    wait_until(lambda: pieces.ends, 5)
    wait_until(lambda: len(pool) == 0)
    ((left, reason),) = pieces.ends
    assert left > 0
    assert type(reason) is TimeoutError
    assert pool.stats().write_closed == 1


def pausing(asked):
    """on_message that leaves the socket paused, for the test to answer; b"tick" is echoed."""

    def on_message(sock, data):
        if data.startswith(b"tick"):
            sock.send(b"tick\n")
        else:
            sock.pause()
            asked.put((sock, data))

    return on_message


@every_trigger
def test_a_half_closed_peer_that_is_paused_gets_each_answer(make_pool, make_client, trigger):
    """B18, S26: two messages come with the FIN, and another thread answers each of them and resumes."""
    asked, ends = queue.Queue(), []
    hooks = handler(on_message=pausing(asked), on_disconnect=lambda sock, reason: ends.append((sock.id, reason)))
    pool = make_pool(hooks, framing=Delimited(b"\n"), workers=1, trigger=trigger)
    other = make_client(pool)
    client = make_client(pool)
    ask_and_half_close(client, b"one\ntwo\n")
    for message in (b"one", b"two"):
        sock, data = asked.get(timeout=patient(5))
        assert data == message
        talk_to(other)
        sock.send(b"re:" + data + b"\n")
        talk_to(other)
        assert (ends, asked.qsize()) == ([], 0)
        sock.resume()
    assert recv_until_eof(client) == b"re:one\nre:two\n"
    wait_until(lambda: len(pool) == 1)
    assert ends == [(sock.id, None)]


def reading(asked):
    """A function as pausing(asked), whose read() asks for more than there is."""
    on_message = pausing(asked)
    return lambda sock: on_message(sock, sock.read(1000))


@every_trigger
def test_a_function_whose_read_has_met_the_end_may_pause_and_answer_later(make_pool, make_client, trigger):
    """B18, S32: the read() that takes the request sees the end behind it."""
    asked, ends = queue.Queue(), []
    pool = make_pool(reading(asked), workers=1, trigger=trigger, start=False)
    pool.setEventDisconnected(lambda sock, reason: ends.append((sock.id, reason)))
    pool.start()
    other = make_client(pool)
    client = make_client(pool)
    ask_and_half_close(client)
    sock, data = asked.get(timeout=patient(5))
    talk_to(other)
    assert (data, ends) == (b"q", [])
    sock.send(b"answer")
    sock.resume()
    assert recv_until_eof(client) == b"answer"
    wait_until(lambda: len(pool) == 1)
    assert ends == [(sock.id, None)]


@every_trigger
@pytest.mark.parametrize("kind", ["function", "handler"])
def test_a_paused_half_closed_peer_that_resets_ends_when_something_is_sent(make_pool, make_client, kind, trigger):
    """S26, B21: on_disconnect comes although nobody resumes."""
    asked, ends = queue.Queue(), []
    hooks = reading(asked) if kind == "function" else handler(on_message=pausing(asked))
    pool = make_pool(hooks, workers=1, trigger=trigger, start=False)
    pool.setEventDisconnected(lambda sock, reason: ends.append(sock.id))
    pool.start()
    other = make_client(pool)
    client = make_client(pool)
    ask_and_half_close(client)
    sock, _ = asked.get(timeout=patient(5))
    talk_to(other)
    assert ends == []
    reset(client)
    with contextlib.suppress(ConnectionClosed):
        sock.send(b"answer")
    wait_until(lambda: len(pool) == 1, 5)
    assert ends == [sock.id]
