"""S27, S28: closesocket, sock.close, TstStat.DISCONNECT."""

import contextlib
import threading
import time

import pytest
from contract_helpers import (
    Gate,
    echo,
    every_style,
    every_trigger,
    handler,
    ignore,
    in_threads,
    replying,
    round_trip,
    serve,
)
from helpers import connect, patient, recv_until_eof, scaled, wait_until

from tstpool import ConnectionClosed, TstStat


@every_style
@every_trigger
@pytest.mark.parametrize("how", ["socket", "descriptor", "id", "close"])
def test_another_thread_drops_a_client(make_pool, make_client, style, trigger, how):
    """S27: the client sees EOF; on_disconnect comes once, without a reason."""
    ended = []
    pool = serve(
        make_pool, style, ignore, on_disconnect=lambda sock, reason: ended.append((sock, reason)), trigger=trigger
    )
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    if how == "close":
        assert sock.close() is True
    else:
        assert pool.closesocket({"socket": sock, "descriptor": sock.sd, "id": sock.id}[how]) is True
    assert client.recv(1) == b""
    wait_until(lambda: len(pool) == 0)
    wait_until(lambda: ended)
    assert ended == [(sock, None)]
    assert sock.closed
    assert pool.closesocket(sock) is False
    assert sock.close() is False


@every_style
def test_only_one_of_many_closers_began_it(make_pool, make_client, style):
    """S27: any thread, any number of times; True for exactly one."""
    ended = []
    pool = serve(make_pool, style, ignore, on_disconnect=lambda sock, reason: ended.append(sock))
    for _ in range(scaled(50, minimum=5)):
        client = make_client(pool)
        (sock,) = wait_until(pool.sockets)
        answers = in_threads(*[sock.close] * 4, *[lambda sock=sock: pool.closesocket(sock)] * 4)
        assert sorted(answers) == [False] * 7 + [True]
        assert client.recv(1) == b""
        wait_until(lambda: len(pool) == 0)
    wait_until(lambda: len(ended) == scaled(50, minimum=5))


@every_style
@every_trigger
def test_a_handler_drops_another_client(make_pool, make_client, style, trigger):
    """S27: inside a handler."""

    def drop_others(sock, data):
        for other in pool.sockets():
            if other is not sock:
                pool.closesocket(other)
        sock.send(b"done")

    pool = serve(make_pool, style, drop_others, trigger=trigger, workers=2)
    others = [make_client(pool) for _ in range(10)]
    killer = make_client(pool)
    wait_until(lambda: len(pool) == 11)
    assert round_trip(killer, b"kill") == b"done"
    assert [other.recv(1) for other in others] == [b""] * 10
    wait_until(lambda: len(pool) == 1)


@every_style
@every_trigger
def test_returning_disconnect_closes_the_current_client(make_pool, make_client, style, trigger):
    """S28: from on_message."""
    pool = serve(make_pool, style, lambda sock, data: TstStat.DISCONNECT, trigger=trigger)
    client = make_client(pool)
    client.sendall(b"bye")
    assert client.recv(1) == b""
    wait_until(lambda: len(pool) == 0)


@every_style
def test_returning_disconnect_from_the_writable_call(make_pool, make_client, style):
    """S28: from on_writable."""
    pool = serve(make_pool, style, ignore, on_writable=lambda sock: TstStat.DISCONNECT)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    pool.need_send(sock)
    assert client.recv(1) == b""
    wait_until(lambda: len(pool) == 0)


@every_style
@every_trigger
@pytest.mark.parametrize("how", ["return", "close", "closesocket"])
def test_what_was_queued_is_sent_first(make_pool, make_client, style, trigger, how):
    """S28: four megabytes and then the end: the client gets all of them."""
    size = 4 << 20

    def answer(sock, data):
        sock.send(b"z" * size)
        if how == "close":
            sock.close()
        elif how == "closesocket":
            pool.closesocket(sock)
        return TstStat.DISCONNECT if how == "return" else None

    pool = serve(make_pool, style, answer, trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(b"x")
    assert len(recv_until_eof(client)) == size
    wait_until(lambda: len(pool) == 0)


@every_style
def test_send_data_is_sent_before_a_disconnect(make_pool, make_client, style):
    """S10, S28: the buffer counts as queued."""

    def answer(sock, data):
        sock.send_data.s[:3] = b"bye"
        sock.send_data.req_len = 3
        return TstStat.DISCONNECT

    client = make_client(serve(make_pool, style, answer))
    client.sendall(b"x")
    assert recv_until_eof(client) == b"bye"


def test_a_second_close_does_not_wait_for_a_deaf_peer(make_pool, make_client):
    """S27: close returns at once, whatever is queued."""
    pool = make_pool(handler(on_message=ignore))
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.send(b"z" * (16 << 20))
    begin = time.monotonic()
    assert sock.close() is True
    assert sock.close() is False
    assert time.monotonic() - begin < patient(1)


def test_a_deaf_peer_is_dropped_after_five_seconds(make_pool, make_client):
    """SPEC: the queue gets at most 5 s after close; then the connection ends anyway, and others never noticed."""
    pool = make_pool(handler(on_message=replying(lambda data: data)))
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.send(b"z" * (32 << 20))
    begin = time.monotonic()
    sock.close()
    other = make_client(pool)
    round_trip(other, b"hello")
    while len(pool) == 2:
        assert round_trip(other, b"hello") == b"hello"
        assert time.monotonic() - begin < 10 + patient(5)
        time.sleep(0.02)
    assert time.monotonic() - begin > 4


@every_style
def test_no_message_is_delivered_after_the_handler_closed(make_pool, make_client, style):
    """S28: what the client says after that is not heard."""
    calls = []

    def once(sock, data):
        calls.append(data)
        return TstStat.DISCONNECT

    pool = serve(make_pool, style, once, on_connect=lambda sock: setattr(sock.recv_data, "req_len", 1), workers=1)
    client = make_client(pool)
    client.sendall(b"abc")
    assert recv_until_eof(client) == b""
    wait_until(lambda: len(pool) == 0)
    assert calls == [b"a"]


def test_closing_while_the_handler_of_the_socket_runs_elsewhere(make_pool, make_client):
    """S27, defect 6: the handler keeps a valid socket; its send either goes out or raises ConnectionClosed."""
    outcome = []
    with Gate() as gate:

        def slow(sock, data):
            gate.wait()
            try:
                outcome.append(sock.send(b"late"))
            except ConnectionClosed as exc:
                outcome.append(exc)

        pool = make_pool(handler(on_message=slow), workers=2)
        client = make_client(pool)
        client.sendall(b"x")
        wait_until(lambda: gate.inside)
        (sock,) = pool.sockets()
        assert pool.closesocket(sock) is True
        gate.open()
        assert recv_until_eof(client) in (b"", b"late")
        wait_until(lambda: outcome)
    wait_until(lambda: len(pool) == 0)


def test_a_request_that_crosses_the_last_close_leaks_no_descriptor(make_pool):
    """B05: a connection that ends while another thread's request for it is still in the stack is closed all the same.

    The leak check around every test sees it.
    """
    for _ in range(scaled(100)):
        over = threading.Event()
        pool = make_pool(handler(on_message=echo), workers=1)
        with contextlib.ExitStack() as clients:
            for _ in range(8):
                round_trip(clients.enter_context(connect(pool)), b"x")
            socks = pool.sockets()

            def ask(over=over, socks=socks, pool=pool):
                while not over.is_set():
                    for sock in socks:
                        pool.need_send(sock)

            asker = threading.Thread(target=ask)
            asker.start()
            assert pool.stop(patient(5)) is True
            over.set()
            asker.join(10)
