"""S40, B01, B61: input that goes another way than as a message takes with it what the framing knew of it. Else the next
message would be cut where that one would have ended, in memory that is somebody else's."""

import os
import socket
import threading
import time

import pytest
from contract_helpers import every_trigger, handler
from helpers import connect, patient, wait_until

from tstpool import Delimited, Fixed, LengthPrefixed, TstStat

HALF = b"x" * 200
LONG = b"y" * 3000


@pytest.fixture
def others_bytes(make_pool):
    """fill(pool): another connection's bytes go through the buffer that all of a worker's connections share."""

    def fill(pool):
        with connect(pool) as client:
            client.sendall(b"SECRET of another client." * 100 + b"\n")
            client.recv(1)

    return fill


def listener():
    return socket.create_server(("127.0.0.1", 0))


@every_trigger
@pytest.mark.parametrize("begun", [HALF, LONG], ids=["half a line", "too long a line"])
def test_a_connection_that_is_made_anew_begins_anew(make_pool, begun, trigger):
    """S40: the server has sent half a line, or more than a line may have, before it went; the next one sends a line."""
    lines, reconnected = [], threading.Event()
    with listener() as server:

        def on_disconnect(sock, reason):
            if reconnected.is_set():
                return None
            with socket.create_connection(server.getsockname()) as fresh:
                os.dup2(fresh.fileno(), sock.sd)
            reconnected.set()
            return TstStat.RECONNECTED

        pool = make_pool(
            handler(
                on_message=lambda sock, data: lines.append(data),
                on_disconnect=on_disconnect,
                on_error=lambda sock, error: None,
            ),
            listen=None,
            framing=Delimited(b"\n", max_message=2000),
            workers=1,
            trigger=trigger,
        )
        sock = pool.connect(*server.getsockname())
        first, _ = server.accept()
        with first:
            first.sendall(begun)
        second, _ = server.accept()
        with second:
            assert reconnected.wait(patient(10))
            second.sendall(b"hello")
            wait_until(lambda: pool.stats().bytes_in >= len(begun) + 5 or sock.closed)
            second.sendall(b" again\nand so on\n")
            wait_until(lambda: len(lines) == 2 or sock.closed)
            assert lines == [b"hello again", b"and so on"]


FRAMINGS = {
    "delimited": (Delimited(b"\n"), HALF, b"line\n", b"line"),
    "fixed": (Fixed(300), HALF, b"z" * 300, b"z" * 300),
    "prefixed": (LengthPrefixed(2), b"\x01\x2c" + HALF, b"\0\x04line", b"line"),
}


@every_trigger
@pytest.mark.parametrize("kind", FRAMINGS)
@pytest.mark.parametrize("whole", [True, False], ids=["all", "a part"])
def test_half_a_message_that_on_writable_reads(make_pool, make_client, others_bytes, kind, trigger, whole):
    """S13, B61: the handler takes what has arrived of the message; what comes next is the next message. If it takes a
    part only, the rest is cut as if it stood at the beginning; either way nobody else's byte is in it."""
    framing, begun, following, message = FRAMINGS[kind]
    taken, messages = [], []

    def on_writable(sock):
        taken.append(sock.read(len(begun) if whole else len(begun) - 3))

    pool = make_pool(
        handler(
            on_message=lambda sock, data: messages.append(data) or b"!",
            on_writable=on_writable,
            on_error=lambda sock, error: None,
        ),
        framing=framing,
        workers=1,
        trigger=trigger,
    )
    client = make_client(pool)
    client.sendall(begun)
    (sock,) = wait_until(pool.sockets)
    wait_until(lambda: pool.stats().bytes_in == len(begun))
    if kind == "delimited":
        others_bytes(pool)
        messages.clear()
    pool.need_send(sock)
    wait_until(lambda: taken)
    assert taken == [begun if whole else begun[:-3]]
    client.sendall(following)
    if whole:
        wait_until(lambda: messages)
        assert messages == [message]
    elif kind == "delimited":
        wait_until(lambda: messages)
        assert messages == [begun[-3:] + message]
    else:
        client.close()
        wait_until(lambda: len(pool) == 0)
        assert all(set(data) <= set(begun + following) for data in messages)


@pytest.mark.parametrize("kind", FRAMINGS)
def test_a_message_that_was_found_and_is_read_before_it_is_handed_out(make_pool, make_client, kind):
    """B61: a turn's share ends with one that is whole already; then on_writable reads all that is there."""
    framing, _, one, message = FRAMINGS[kind]
    messages, taken = [], []

    def on_message(sock, data):
        messages.append(data)
        if len(messages) < 40:
            time.sleep(20e-6)  # so that the share is over after 32
        if len(messages) == 32:
            pool.need_send(sock)

    pool = make_pool(
        handler(on_message=on_message, on_writable=lambda sock: taken.append(sock.read())), framing=framing, workers=1
    )
    client = make_client(pool)
    client.sendall(one * 33)
    wait_until(lambda: taken)
    client.sendall(one * 2)
    wait_until(lambda: len(messages) * len(one) + len(taken[0]) == 35 * len(one))
    assert set(messages) == {message}


def test_half_a_line_that_a_transfer_takes(make_pool, make_client):
    """S9, B61: on_writable asks for a part of it by req_len, and later for nothing more."""
    messages = []

    def on_writable(sock):
        sock.recv_data.req_len = 150

    def on_message(sock, data):
        messages.append(bytes(data))
        sock.recv_data.req_len = 0

    pool = make_pool(handler(on_message=on_message, on_writable=on_writable), framing=Delimited(b"\n"), workers=1)
    client = make_client(pool)
    client.sendall(HALF)
    (sock,) = wait_until(pool.sockets)
    wait_until(lambda: pool.stats().bytes_in == len(HALF))
    pool.need_send(sock)
    wait_until(lambda: messages)
    client.sendall(b"end\n")
    wait_until(lambda: len(messages) == 2)
    assert messages == [HALF[:150], HALF[150:] + b"end"]


@pytest.mark.parametrize("later", [None, Fixed(3)], ids=str)
def test_a_message_that_was_found_by_a_framing_that_is_no_longer_there(make_pool, make_client, later):
    """B61: on_writable changes the framing while a message that the old one has found waits for its turn."""
    messages = []

    def on_message(sock, data):
        messages.append(data)
        time.sleep(20e-6)
        if len(messages) == 32:
            pool.need_send(sock)

    def on_writable(sock):
        sock.framing = later

    pool = make_pool(handler(on_message=on_message, on_writable=on_writable), framing=Delimited(b"\n"), workers=1)
    client = make_client(pool)
    client.sendall(b"12345\n" * 34)
    wait_until(lambda: sum(map(len, messages)) >= 32 * 5 + 12)
    assert messages[:32] == [b"12345"] * 32
    assert b"".join(messages[32:]) == b"12345\n12345\n"
    assert all(len(data) == 3 for data in messages[32:]) or later is None


@pytest.mark.parametrize("framing", [None, Delimited(b"\n"), LengthPrefixed(1)], ids=str)
def test_the_pools_handler_makes_the_connection_anew_while_the_message_is_lent(make_pool, make_client, framing):
    """S38, S40: copy=False; the socket's own handler passes the message on, and the pool's returns RECONNECTED: what
    was lent stays until both are through with it."""
    kept, messages = [], []

    def own(sock, data):
        kept.append(data[1:])
        return TstStat.RUN

    def pools(sock, data):
        messages.append(bytes(data))
        with connect(pool) as fresh:  # its own server: the fresh connection's other end is a connection like any
            others.append(sock)
            os.dup2(fresh.fileno(), sock.sd)
        return TstStat.RECONNECTED if len(messages) == 1 else None

    others = []
    wire = {None: b"hello", Delimited(b"\n"): b"hello\n", LengthPrefixed(1): b"\x05hello"}[framing]

    def on_connect(sock):
        if not messages:
            sock.handler = handler(on_message=own)

    pool = make_pool(handler(on_connect=on_connect, on_message=pools), framing=framing, copy=False, workers=1)
    client = make_client(pool)
    client.sendall(wire)
    wait_until(lambda: messages)
    assert messages == [b"hello"]
    with connect(pool) as other:
        other.sendall(wire)
        wait_until(lambda: len(messages) == 2)
    assert messages == [b"hello"] * 2
    assert [bytes(view) for view in kept] == [b"ello"] * len(kept)
