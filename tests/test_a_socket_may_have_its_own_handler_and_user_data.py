"""S38, B55: sock.handler, TstStat.RUN, sock.user_data; nothing is kept alive longer than needed."""

import gc
import os
import socket
import threading
import time
import weakref

import pytest
from contract_helpers import (
    as_function,
    echo,
    every_style,
    every_trigger,
    exchange,
    handler,
    ignore,
    open_sockets,
    replying,
    round_trip,
    serve,
)
from helpers import connect, recv_exact, scaled, wait_until

from tstpool import EPOLLIN, Fixed, LengthPrefixed, TstPool, TstStat


@every_style
@every_trigger
def test_a_protocol_upgrade(make_pool, make_client, style, trigger):
    """S38: from the next message on, the socket's own handler is called; other sockets keep the pool's."""
    upgraded = replying(lambda data: b"new:" + data)
    own = handler(on_message=upgraded) if style == "handler" else as_function(upgraded)

    def first(sock, data):
        if data == b"upgrade":
            sock.handler = own
        sock.send(b"old:" + data)

    pool = serve(make_pool, style, first, trigger=trigger)
    client, other = make_client(pool), make_client(pool)
    client.sendall(b"upgrade")
    assert recv_exact(client, 11) == b"old:upgrade"
    client.sendall(b"hello")
    assert recv_exact(client, 9) == b"new:hello"
    other.sendall(b"hello")
    assert recv_exact(other, 9) == b"old:hello"


@every_style
def test_none_goes_back_to_the_pools_handler(make_pool, make_client, style):
    """S38: sock.handler = None."""
    pool = serve(make_pool, style, replying(lambda data: b"pool"))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = handler(on_message=replying(lambda data: b"mine"))
    assert round_trip(client, b"ping") == b"mine"
    sock.handler = None
    assert round_trip(client, b"ping") == b"pool"


@every_style
@every_trigger
def test_run_passes_the_same_event_on_to_the_pools_handler(make_pool, make_client, style, trigger):
    """S38: the pool's handler gets the message that the socket's own one had no use for."""
    seen = []

    def own_message(sock, data):
        seen.append(("own", data))
        return TstStat.RUN if data != b"mine" else None

    def own_function(sock):
        if sock.events & EPOLLIN:
            seen.append(("own", sock.recv_data.checked_len))
            if sock.recv_data.checked_len == len(b"mine"):
                sock.read()
                return None
        return TstStat.RUN

    def pools(sock, data):
        seen.append(("pool", data))

    pool = serve(make_pool, style, pools, on_writable=lambda sock: seen.append(("pool", "writable")), trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    if style == "handler":
        sock.handler = handler(on_message=own_message, on_writable=lambda sock: TstStat.RUN)
    else:
        sock.handler = own_function
    client.sendall(b"mine")
    wait_until(lambda: len(seen) == 1)
    client.sendall(b"yours")
    wait_until(lambda: len(seen) == 3)
    pool.need_send(sock)
    wait_until(lambda: len(seen) == 4)
    mine, yours = (b"mine", b"yours") if style == "handler" else (4, 5)
    assert seen == [("own", mine), ("own", yours), ("pool", b"yours"), ("pool", "writable")]


def test_run_of_a_function_hands_a_message_to_the_pools_handler_object(make_pool, make_client):
    """S38: the two styles mixed: what the function left unread is on_message's data."""
    got = []
    pool = make_pool(handler(on_message=lambda sock, data: got.append(data)))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = lambda sock: TstStat.RUN
    client.sendall(b"hello")
    wait_until(lambda: got)
    assert got == [b"hello"]


def test_run_from_the_pools_handler_itself_is_suspend(make_pool, make_client):
    """S38: there is nobody further to pass it on to."""
    calls = []

    def run(sock, data):
        calls.append(data)
        sock.send(data)
        return TstStat.RUN

    client = make_client(make_pool(handler(on_message=run)))
    for i in range(5):
        assert round_trip(client, b"%d" % i) == b"%d" % i
    assert calls == [b"%d" % i for i in range(5)]


def test_the_own_handlers_hooks_are_called(make_pool, make_client):
    """S38: on_writable and on_disconnect belong to the socket's handler, too."""
    calls = []
    own = handler(
        on_message=ignore,
        on_writable=lambda sock: calls.append("writable"),
        on_disconnect=lambda sock, reason: calls.append("disconnect"),
    )
    pool = make_pool(handler(on_message=echo, on_disconnect=lambda sock, reason: calls.append("pool's")))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = own
    assert sock.handler is own
    pool.need_send(sock)
    wait_until(lambda: calls)
    client.close()
    wait_until(lambda: len(calls) == 2)
    assert calls == ["writable", "disconnect"]


@pytest.mark.parametrize("wrong", [42, "text", TstStat.RUN])
def test_something_that_is_no_handler_is_a_type_error(make_pool, make_client, wrong):
    """Bad input: a handler that is not callable; the old one stays."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(TypeError):
        sock.handler = wrong
    assert round_trip(client, b"hello") == b"hello"


@every_style
@every_trigger
def test_reconnected_serves_the_fresh_connection_under_the_same_descriptor(make_pool, make_client, style, trigger):
    """S40, SPEC: after dup2 the handler returns RECONNECTED; what belonged to the old one is forgotten."""
    fresh, got, replaced = [], [], threading.Event()

    def answer(sock, data):
        got.append(data)
        if data != b"reconnect":
            sock.send(data)
            return None
        sock.send(b"never sent")
        os.dup2(fresh[0], sock.sd)
        replaced.set()
        return TstStat.RECONNECTED

    # One worker: if the handler were held up, another one would send what it has sent so far.
    pool = serve(make_pool, style, answer, trigger=trigger, workers=1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.setblocking(False)
        fresh.append(theirs.fileno())
        client = make_client(pool)
        client.sendall(b"reconnect")
        assert client.recv(20) == b""  # nobody has the old connection open any more
        assert replaced.wait(10)  # dup2 has also returned: it must not run beside the close of what it copies
        theirs.close()
        (sock,) = pool.sockets()
        for _ in range(3):
            assert round_trip(ours, b"hello") == b"hello"
        sock.send(b"from outside")
        assert recv_exact(ours, 12) == b"from outside"
    assert got == [b"reconnect"] + [b"hello"] * 3
    wait_until(lambda: len(pool) == 0)


@every_trigger
def test_reconnected_in_on_disconnect_serves_the_fresh_connection(make_pool, make_client, trigger):
    """S40: the end of one connection is the beginning of the next under its descriptor; requests are forgotten."""
    fresh, ends, replaced = [], [], threading.Event()

    def reconnect(sock, reason):
        ends.append(sock)
        if len(ends) > 1:
            return None
        sock.recv_data.req_len = 100
        sock.send_data.req_len = 50
        os.dup2(fresh[0], sock.sd)
        replaced.set()
        return TstStat.RECONNECTED

    pool = make_pool(handler(on_message=echo, on_disconnect=reconnect), trigger=trigger)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        fresh.append(theirs.fileno())
        make_client(pool).close()
        assert replaced.wait(10)
        theirs.close()
        for _ in range(3):
            assert round_trip(ours, b"hello") == b"hello"
        assert ends[0].recv_data.req_len == ends[0].send_data.req_len == 0
    wait_until(lambda: len(pool) == 0)
    assert len(ends) == 2
    assert ends[0] is ends[1]


@every_trigger
def test_a_close_that_has_been_heard_is_not_the_fresh_connections(make_pool, make_client, trigger):
    """S40: the handler closes, the peer has finished, too, and on_disconnect reconnects."""
    fresh, ends, replaced = [], [], threading.Event()

    def close_last(sock, data):
        time.sleep(0.001)  # so that the end is there before the last message is handed out
        if data == b"q":
            sock.close()
        elif replaced.is_set():
            sock.send(data)

    def reconnect(sock, reason):
        ends.append(sock)
        if len(ends) > 1:
            return None
        os.dup2(fresh[0], sock.sd)
        replaced.set()
        return TstStat.RECONNECTED

    pool = make_pool(handler(on_message=close_last, on_disconnect=reconnect), trigger=trigger, framing=Fixed(1))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        fresh.append(theirs.fileno())
        client = make_client(pool)
        client.sendall(b"." * 63 + b"q")
        client.shutdown(socket.SHUT_WR)
        assert replaced.wait(10)
        theirs.close()
        assert round_trip(ours, b"hello") == b"hello"
    wait_until(lambda: len(pool) == 0)
    assert len(ends) == 2


@every_trigger
@pytest.mark.parametrize("framing", [None, LengthPrefixed(4)], ids=repr)
@pytest.mark.parametrize("size", [5, 1 << 20])
def test_run_of_a_handler_hands_a_message_to_the_pools_function(make_pool, make_client, trigger, framing, size):
    """S38: the two styles mixed the other way round: the function reads what on_message was given."""
    own = handler(on_message=lambda sock, data: TstStat.RUN)

    def adopt(sock):
        sock.handler = own

    pool = make_pool(listen=None, start=False, trigger=trigger, framing=framing, max_queued=None)
    pool.setEventNewConnected(adopt)
    pool.create(2, "127.0.0.1", 0, lambda sock: sock.send_message(sock.read()) and None)
    client = make_client(pool.listen("127.0.0.1", 0))
    body = os.urandom(size)
    message = body if framing is None else size.to_bytes(4, "big") + body
    for _ in range(2):
        assert exchange(client, message) == message


class Thing:
    """Something that can be referred to weakly."""


@every_style
def test_user_data_is_released_at_close(make_pool, make_client, style):
    """S38: although somebody still holds the socket."""
    things = []

    def keep(sock):
        sock.user_data = Thing()
        things.append(weakref.ref(sock.user_data))

    pool = serve(make_pool, style, echo, on_connect=keep)
    client = make_client(pool)
    round_trip(client, b"x")
    (sock,) = pool.sockets()
    assert isinstance(sock.user_data, Thing)
    assert things[0]() is not None
    client.close()
    wait_until(lambda: things[0]() is None)
    assert sock.user_data is None


def test_user_data_is_none_at_first_and_may_be_anything(make_pool, make_client):
    """S38: it belongs to its own connection."""
    pool = make_pool(handler(on_message=echo))
    for _ in range(2):
        make_client(pool)
    first, second = open_sockets(pool, 2)
    assert first.user_data is None
    for anything in (0, "text", [1], {}, Thing(), first, None):
        first.user_data = anything
        assert first.user_data is anything
        assert second.user_data is None


def test_a_cycle_of_socket_handler_and_user_data_is_collected_after_close(make_pool, make_client):
    """B55: sock -> handler -> sock, and sock -> user_data -> sock."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    own = handler(on_message=echo)
    own.sock, own.thing = sock, Thing()
    sock.handler = own
    sock.user_data = [sock, own]
    alive = weakref.ref(own.thing)
    del own, sock
    round_trip(client, b"x")
    gc.collect()
    assert alive() is not None  # the connection keeps its handler
    client.close()

    def collected():
        gc.collect()
        return alive() is None

    wait_until(collected)


def test_a_stopped_pool_and_its_handler_are_collected():
    """B48, B55: handler -> pool -> handler, with open connections at stop."""
    own = handler(on_message=echo)
    own.thing = Thing()
    alive = weakref.ref(own.thing)
    pool = TstPool(own, workers=2)
    own.pool = pool
    pool.listen("127.0.0.1", 0)
    pool.start()
    with connect(pool) as client:
        round_trip(client, b"x")
        pool.stop()
    del own, pool

    def collected():
        gc.collect()
        return alive() is None

    wait_until(collected)


def test_a_running_pool_that_nobody_holds_serves_on(make_client):
    """B48: its workers hold it, until it is stopped."""

    def begin():
        pool = TstPool(handler(on_message=lambda sock, data: (gc.collect() and None) or data))
        held.append(weakref.ref(pool))
        address = pool.listen("127.0.0.1", 0)
        pool.start()
        return address

    held = []
    address = begin()
    gc.collect()
    client = make_client(address)
    for _ in range(3):
        assert round_trip(client, b"hello") == b"hello"
        gc.collect()
    assert held[0]().stop() is True


def test_a_pool_that_was_never_started_is_collected():
    """B48: with its listeners."""
    own = handler(on_message=echo)
    own.thing = Thing()
    alive = weakref.ref(own.thing)
    pool = TstPool(own)
    own.pool = pool
    pool.listen("127.0.0.1", 0)
    del own, pool
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("events", [30, pytest.param(100_000, marks=pytest.mark.slow)])
def test_collecting_in_every_callback_harms_nothing(make_pool, make_client, events):
    """B55: gc.collect() while the engine is in the middle of things."""

    def collect_and_echo(sock, data):
        gc.collect()
        sock.send(data)

    def cycle(sock):
        sock.user_data = [sock]
        gc.collect()

    pool = make_pool(
        handler(on_connect=cycle, on_message=collect_and_echo, on_disconnect=lambda sock, reason: gc.collect())
    )
    for _ in range(10):
        client = make_client(pool)
        for _ in range(scaled(events // 10 - 2, minimum=1)):
            assert round_trip(client, b"hello") == b"hello"
        client.close()
    wait_until(lambda: len(pool) == 0)


def test_sockets_are_equal_only_to_themselves(make_pool, make_client):
    """SPEC: identity; the same object each time, hashable."""
    seen = set()
    pool = make_pool(handler(on_message=lambda sock, data: seen.add(sock), on_writable=lambda sock: seen.add(sock)))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    client.sendall(b"x")
    wait_until(lambda: seen)
    pool.need_send(sock)
    wait_until(lambda: pool.stats().messages == 1)
    assert seen == {sock}
    assert pool.sockets()[0] is sock
