"""B38, S16: which time limit counts when: a standing req_len is idle between messages, a greeting is no silence."""

import pytest
from contract_helpers import echo, every_style, handler, round_trip, serve
from helpers import patient, recv_exact, recv_until_eof, wait_until

from tstpool import TstStat

GREETING = 12 << 20  # more than the socket buffers of a loopback connection hold


def four_at_a_time(sock):
    sock.recv_data.req_len = 4


@every_style
@pytest.mark.parametrize("message_timeout", [0.2, None])
def test_a_connection_whose_req_len_stands_is_idle_between_messages(make_pool, make_client, style, message_timeout):
    """B38, S16: idle_timeout closes it, though message_timeout is shorter, or off."""
    ends = []
    pool = serve(
        make_pool,
        style,
        echo,
        on_connect=four_at_a_time,
        on_disconnect=lambda sock, reason: ends.append(type(reason)),
        workers=2,
        message_timeout=message_timeout and patient(message_timeout),
        idle_timeout=patient(0.5),
    )
    client = make_client(pool, timeout=3)
    assert round_trip(client, b"abcd") == b"abcd"
    assert recv_until_eof(client) == b""
    wait_until(lambda: len(pool) == 0)
    stats = pool.stats()
    assert (stats.message_closed, stats.idle_closed, len(ends)) == (0, 1, 1)


@every_style
def test_part_of_a_message_is_not_idle_though_req_len_stands(make_pool, make_client, style):
    """B38, S16: its first byte has come, and message_timeout counts from there."""
    pool = serve(
        make_pool,
        style,
        echo,
        on_connect=four_at_a_time,
        workers=2,
        message_timeout=patient(0.3),
        idle_timeout=patient(30),
    )
    client = make_client(pool, timeout=5)
    assert round_trip(client, b"abcd") == b"abcd"
    client.sendall(b"ab")
    assert recv_until_eof(client) == b""
    wait_until(lambda: len(pool) == 0)
    stats = pool.stats()
    assert (stats.message_closed, stats.idle_closed) == (1, 0)


def test_a_disconnect_between_messages_does_not_linger_though_req_len_stands(make_pool, make_client):
    """S28, S16, B24: all input has been read, so it is closed at once."""

    def on_message(sock, data):
        sock.send(data)
        return TstStat.DISCONNECT if data == b"quit" else None

    pool = make_pool(handler(on_connect=four_at_a_time, on_message=on_message), workers=1, linger_timeout=60)
    client = make_client(pool)
    assert round_trip(client, b"abcd") == b"abcd"
    assert round_trip(client, b"quit") == b"quit"
    assert client.recv(1) == b""
    wait_until(lambda: len(pool) == 0, 2)


def test_the_first_byte_may_come_late_while_a_greeting_is_on_its_way(make_pool, make_client):
    """B38: while more than high_water waits for a peer, first_byte_timeout does not count; of a silent one it does."""
    greeted = []

    def on_connect(sock):
        if not greeted:
            greeted.append(sock)
            sock.send(bytes(GREETING))

    pool = make_pool(handler(on_connect=on_connect, on_message=echo), workers=2, first_byte_timeout=patient(1))
    client = make_client(pool)
    wait_until(lambda: pool.stats().bytes_queued)
    silent = make_client(pool)
    assert recv_until_eof(silent) == b""
    assert recv_exact(client, GREETING) == bytes(GREETING)
    assert round_trip(client, b"hello") == b"hello"
    assert pool.stats().first_byte_closed == 1
