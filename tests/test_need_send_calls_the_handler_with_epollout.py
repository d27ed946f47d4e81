"""S6, S7, S9, S30, defect 7: need_send from any thread."""

import threading

import pytest
from compiled_helpers import socket_of
from contract_helpers import (
    Gate,
    echo,
    every_style,
    every_trigger,
    handler,
    ignore,
    in_threads,
    open_sockets,
    round_trip,
    serve,
)
from helpers import recv_exact, wait_until

from tstpool import EPOLLIN, EPOLLOUT


@every_style
@every_trigger
@pytest.mark.parametrize("how", ["socket", "descriptor", "id"])
def test_it_fires_at_once(make_pool, make_client, style, trigger, how):
    """S6, S30: True, and a worker calls the handler with EPOLLOUT and without EPOLLIN."""
    events = []
    pool = serve(make_pool, style, ignore, on_writable=lambda sock: events.append(sock.events), trigger=trigger)
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    for i in range(20):
        assert pool.need_send({"socket": sock, "descriptor": sock.sd, "id": sock.id}[how]) is True
        wait_until(lambda i=i: len(events) == i + 1)
    assert all(bits & EPOLLOUT and not bits & EPOLLIN for bits in events)


@every_style
def test_it_fires_although_the_kernel_already_holds_data(make_pool, make_client, style):
    """S6: only a full send buffer holds it back, not one with something in it."""
    fired = threading.Event()
    pool = serve(make_pool, style, ignore, on_writable=lambda sock: fired.set())
    make_client(pool)  # never reads
    (sock,) = wait_until(pool.sockets)
    sock.send(b"z" * 1000)
    sock.flush(5)
    assert pool.need_send(sock) is True
    assert fired.wait(10)


@every_trigger
def test_it_waits_while_the_send_buffer_is_full(make_pool, make_client, trigger):
    """S6: with output that the kernel does not take, EPOLLOUT comes after the peer has read."""
    order = []
    pool = make_pool(
        handler(on_message=ignore, on_writable=lambda sock: order.append(sock.user_data)), workers=1, trigger=trigger
    )
    deaf = make_client(pool)
    (full,) = wait_until(pool.sockets)
    full.user_data = "full"
    make_client(pool)
    free = next(sock for sock in open_sockets(pool, 2) if sock is not full)
    free.user_data = "free"
    full.send(b"z" * (16 << 20))
    with pytest.raises(TimeoutError):
        full.flush(0.05)
    pool.need_send(full)
    pool.need_send(free)
    wait_until(lambda: order)
    assert order == ["free"]
    recv_exact(deaf, 16 << 20)
    wait_until(lambda: len(order) == 2)
    assert order == ["free", "full"]


@every_style
@every_trigger
def test_it_sends_what_another_thread_put_into_the_send_buffer(make_pool, make_client, style, trigger):
    """S7: fill send_data, call need_send; a worker sends it. (Each assignment asks for a transfer, and the handler that
    was told of the last message may return between two: of nothing, then, not of the old length.)"""
    pool = serve(make_pool, style, ignore, trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    for i in range(20):
        text = b"message %04d" % i
        sock.send_data.req_len = 0
        sock.send_data.s[: len(text)] = text
        sock.send_data.req_pos = 0
        sock.send_data.req_len = len(text)
        assert pool.need_send(sock) is True
        assert recv_exact(client, len(text)) == text


@every_style
def test_one_client_writes_to_another_through_its_send_buffer(make_pool, make_client, style):
    """S7: inside a handler, for another connection; the original needs a global lock for this."""

    def forward(sock, data):
        (other,) = (other for other in pool.sockets() if other is not sock)
        other.send_data.s[: len(data)] = data
        other.send_data.req_len = len(data)
        pool.need_send(other)

    pool = serve(make_pool, style, forward, workers=2)
    one, two = make_client(pool), make_client(pool)
    wait_until(lambda: len(pool) == 2)
    for i in range(20):
        one.sendall(b"to two %03d" % i)
        assert recv_exact(two, 10) == b"to two %03d" % i
        two.sendall(b"to one %03d" % i)
        assert recv_exact(one, 10) == b"to one %03d" % i


@every_style
def test_a_handler_may_ask_for_itself(make_pool, make_client, style):
    """S6, B06: need_send of the socket whose handler runs; the call comes after the handler returned."""
    order = []

    def ask(sock, data):
        assert pool.need_send(sock) is True
        order.append("message")

    pool = serve(make_pool, style, ask, on_writable=lambda sock: order.append("writable"), workers=2)
    make_client(pool).sendall(b"x")
    wait_until(lambda: len(order) == 2)
    assert order == ["message", "writable"]


@every_style
@every_trigger
def test_it_never_lets_a_second_worker_in(make_pool, make_client, style, trigger):
    """S15, defect 7, B06: asked for while a worker is in the handler, it waits for that worker to leave."""
    events = []
    with Gate() as gate:

        def slow(sock, data):
            events.append("enter")
            gate.wait()
            events.append("leave")

        pool = serve(
            make_pool, style, slow, on_writable=lambda sock: events.append("writable"), workers=4, trigger=trigger
        )
        client, other = make_client(pool), make_client(pool)
        client.sendall(b"x")
        wait_until(lambda: gate.inside)
        sock, idle = socket_of(pool, client), socket_of(pool, other)
        assert in_threads(*[lambda: pool.need_send(sock)] * 4) == [True] * 4
        client.sendall(b"more input")
        # Another connection is served four times: if a second worker were to enter, it would have by now.
        for i in range(4):
            pool.need_send(idle)
            wait_until(lambda i=i: events.count("writable") == i + 1)
        assert gate.inside == 1
        assert events == ["enter", *["writable"] * 4]
        gate.open()
        wait_until(lambda: events.count("leave") == 2 and events.count("writable") >= 5)
    inner = [event for event in events if event != "writable"]
    assert inner == ["enter", "leave"] * 2


@every_style
def test_on_a_connection_that_is_gone_it_is_false(make_pool, make_client, style):
    """S9: harmless, by socket, by descriptor, by id."""
    pool = serve(make_pool, style, ignore)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    number = sock.sd
    client.close()
    wait_until(lambda: sock.closed)
    wait_until(lambda: len(pool) == 0)
    assert [pool.need_send(target) for target in (sock, number, sock.id, 10**6, -1)] == [False] * 5


@pytest.mark.parametrize("wrong", ["3", None, 1.5])
def test_something_else_is_a_type_error(make_pool, wrong):
    """Bad input."""
    pool = make_pool(handler(on_message=ignore))
    for method in (pool.need_send, pool.closesocket):
        with pytest.raises(TypeError):
            method(wrong)


def test_a_handler_without_on_writable_is_simply_not_called(make_pool, make_client):
    """DESIGN 4: hooks that are not overridden cost nothing, and break nothing."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    assert pool.need_send(sock) is True
    assert round_trip(client, b"hello") == b"hello"
