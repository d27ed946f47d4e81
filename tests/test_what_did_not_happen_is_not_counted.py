"""B33, S36, S11, S14, S22: figures of what has happened, and only once; a refusal that has something to say says it."""

import contextlib
import select
import time

from contract_helpers import echo, handler, round_trip, serve
from helpers import patient, recv_until_eof, wait_until

from tstpool import EPOLLOUT, LengthPrefixed, TstStat


def test_a_pause_of_two_listeners_is_counted_once(make_pool, make_client):
    """B33: there are max_connections again when one of two who waited is in."""
    pool = make_pool(handler(on_message=echo), workers=1, max_connections=1)
    second = pool.listen("127.0.0.1", 0)
    first = make_client(pool)
    assert round_trip(first, b"hello") == b"hello"
    wait_until(lambda: pool.stats().accept_pauses)
    waiting = [make_client(pool), make_client(second)]
    assert pool.stats().accept_pauses == 1
    for client in waiting:
        client.sendall(b"x")
    first.close()
    served, _, _ = select.select(waiting, [], [], patient(5))
    assert len(served) == 1
    assert served[0].recv(1) == b"x"
    for _ in range(20):  # the only worker has been round its loop
        assert round_trip(served[0], b"hello") == b"hello"
    stats = pool.stats()
    assert (stats.accepted, stats.accept_pauses) == (2, 2)


def test_a_message_over_the_limit_is_no_message(make_pool, make_client):
    """S36, B30: on_message did not get it."""
    pool = make_pool(
        handler(on_message=lambda sock, data: data, on_error=lambda sock, error: None),
        framing=LengthPrefixed(4, max_message=10),
        workers=1,
    )
    client = make_client(pool)
    assert round_trip(client, b"\0\0\0\2ok") == b"\0\0\0\2ok"
    client.sendall(b"\0\0\1\0")
    with contextlib.suppress(ConnectionResetError):
        assert recv_until_eof(client) == b""
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert pool.stats().messages == 1


def test_a_send_of_nothing_takes_no_time(make_pool, make_client):
    """S11, S14: its trans_time does not begin with the transfer before it."""
    times = []

    def func(sock):
        data = sock.send_data
        if sock.events & EPOLLOUT:
            times.append(data.trans_time)
        elif sock.read() == b"nothing":
            return TstStat.SEND
        else:
            data.s[:2] = b"ok"
            data.req_len = 2
        return None

    pool = make_pool(func, workers=1)
    client = make_client(pool)
    assert round_trip(client, b"ok") == b"ok"
    then = time.monotonic()
    wait_until(lambda: time.monotonic() > then + 0.2)
    begin = time.monotonic()
    client.sendall(b"nothing")
    wait_until(lambda: times)
    assert times[0] <= time.monotonic() - begin


def test_who_is_refused_gets_what_the_send_buffer_asks_for(make_pool, make_client):
    """S22, S28: on_connect has filled it, and returns DISCONNECT."""
    ends = []

    def on_connect(sock):
        sock.send_data.s[:3] = b"bye"
        sock.send_data.req_len = 3
        return TstStat.DISCONNECT

    pool = serve(make_pool, "handler", echo, on_connect=on_connect, on_disconnect=lambda *args: ends.append(args))
    assert recv_until_eof(make_client(pool)) == b"bye"
    wait_until(lambda: len(pool) == 0)
    assert ends == []
