"""S38: a socket's own handler passes on what it got (TstStat.RUN); whatever it did before, no other memory is shown."""

import threading

import pytest
from contract_helpers import handler, round_trip
from downstream_handlers import Echo
from helpers import recv_exact, wait_until

from tstpool import Fixed, TstStat


def given(got, reply=b"ok"):
    """A handler that notes its messages and answers each."""

    def on_message(sock, data):
        got.append(bytes(data))
        return reply

    return handler(on_message=on_message)


def ask(client, data):
    client.sendall(data)
    return recv_exact(client, 2)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("position", [0, 8])
def test_input_of_a_function_that_asks_for_a_transfer(make_pool, make_client, copy, position):
    """The transfer is for what comes next: nothing has arrived in its buffer."""
    got = []

    def own(sock):
        sock.recv_data.req_pos, sock.recv_data.req_len = position, 4
        sock.handler = None
        return TstStat.RUN

    pool = make_pool(given(got), copy=copy)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = own
    assert ask(client, b"hello") == b"ok"
    assert got == [b"hello"]
    assert ask(client, b"next") == b"ok"
    assert got == [b"hello", b"next"]


def test_a_transfer_of_a_function_that_asks_for_the_next_one(make_pool, make_client):
    """It is passed on as it was."""
    got = []

    def own(sock):
        sock.recv_data.req_pos, sock.recv_data.req_len = 100, 50
        return TstStat.RUN

    pool = make_pool(given(got))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.recv_data.req_len = 5
    sock.handler = own
    assert ask(client, b"hello") == b"ok"
    assert got == [b"hello"]


def test_a_view_that_was_released_already(make_pool, make_client):
    """It can't be passed on, which ends the connection; a part of it that was kept stays as it was."""
    kept, over = [], threading.Event()

    def own(sock, data):
        with data:
            kept.append(data[2:])
        return TstStat.RUN

    pool = make_pool(Echo(), framing=Fixed(8), copy=False, workers=1)
    client, other = make_client(pool), make_client(pool)
    assert round_trip(other, b"otherwho") == b"otherwho"
    (sock,) = [each for each in pool.sockets() if each.peer[1] == client.getsockname()[1]]
    sock.handler = handler(on_message=own, on_disconnect=lambda sock, reason: over.set())
    client.sendall(b"mine-1-2")
    assert over.wait(10)
    for _ in range(20):
        assert round_trip(other, b"another!") == b"another!"
    assert bytes(kept[0]) == b"ne-1-2"
