"""S22, S23: setEventNewConnected / on_connect, setEventDisconnected / on_disconnect."""

import threading

import pytest
from contract_helpers import (
    Gate,
    as_function,
    echo,
    every_style,
    every_trigger,
    handler,
    ignore,
    round_trip,
    serve,
)
from helpers import patient, recv_exact, scaled, wait_until

from tstpool import TstError, TstStat


@every_style
@every_trigger
@pytest.mark.parametrize("answer", [None, TstStat.SUSPEND])
def test_suspend_goes_on_and_comes_before_the_first_message(make_pool, make_client, style, trigger, answer):
    """S22: on_connect once, before the first event, even if data came with the connection."""
    order = []

    def greet(sock):
        order.append(("connect", sock.id))
        return answer

    def note(sock, data):
        order.append(("message", sock.id))
        sock.send(data)

    pool = serve(make_pool, style, note, on_connect=greet, trigger=trigger, workers=4)
    for _ in range(20):
        client = make_client(pool)
        assert round_trip(client, b"hello") == b"hello"
    numbers = [number for name, number in order if name == "connect"]
    assert len(set(numbers)) == len(numbers) == 20
    assert all(order.index(("connect", number)) < order.index(("message", number)) for number in numbers)


@every_style
@every_trigger
def test_it_may_send_directly(make_pool, make_client, style, trigger):
    """S22: a greeting from on_connect, before the client has said anything."""

    def greet(sock):
        sock.send(b"welcome %s" % sock.peer[0].encode())

    client = make_client(serve(make_pool, style, echo, on_connect=greet, trigger=trigger))
    assert recv_exact(client, 17) == b"welcome 127.0.0.1"
    assert round_trip(client, b"hello") == b"hello"


@every_style
@every_trigger
def test_send_transmits_what_the_buffer_holds(make_pool, make_client, style, trigger):
    """S22: a worker sends it, then the handler is called with EPOLLOUT."""
    finished = []

    def greet(sock):
        sock.send_data.s[:7] = b"welcome"
        sock.send_data.req_len = 7
        return TstStat.SEND

    def sent(sock):
        finished.append(sock.send_data.com_len)

    pool = serve(make_pool, style, echo, on_connect=greet, on_writable=sent, trigger=trigger)
    client = make_client(pool)
    assert recv_exact(client, 7) == b"welcome"
    wait_until(lambda: finished)
    assert finished == [7]
    assert round_trip(client, b"hello") == b"hello"


@every_style
@every_trigger
def test_send_with_nothing_set_calls_the_handler_with_epollout(make_pool, make_client, style, trigger):
    """S22: so that the handler speaks first."""

    def speak(sock):
        sock.send(b"hello first")

    pool = serve(make_pool, style, ignore, on_connect=lambda sock: TstStat.SEND, on_writable=speak, trigger=trigger)
    assert recv_exact(make_client(pool), 11) == b"hello first"


@every_style
@every_trigger
@pytest.mark.parametrize("answer", [TstStat.RECONNECTED, TstStat.DISCONNECT, TstStat.EXIT, TstStat.EXITED])
def test_anything_greater_refuses_the_connection(make_pool, make_client, style, trigger, answer):
    """S22, S23: the client sees the end, the handler nothing, and there is no on_disconnect for it."""
    calls, guests = [], []

    def judge(sock):
        guests.append(sock)
        return answer if len(guests) == 1 else None

    pool = serve(
        make_pool,
        style,
        echo,
        on_connect=judge,
        on_disconnect=lambda sock, reason: calls.append(sock),
        trigger=trigger,
        workers=2,
    )
    refused = make_client(pool)
    assert refused.recv(1) == b""
    accepted = make_client(pool)
    assert round_trip(accepted, b"hello") == b"hello"
    wait_until(lambda: pool.sockets() == [guests[1]])
    assert guests[0].closed
    accepted.close()
    wait_until(lambda: calls)
    assert calls == [guests[1]]


@every_style
def test_a_blocking_on_connect_holds_up_nobody_else(make_pool, make_client, style):
    """S22: it never runs on a thread that others wait for."""
    with Gate() as gate:
        first = threading.Event()

        def slow(sock):
            if not first.is_set():
                first.set()
                gate.wait()

        pool = serve(make_pool, style, echo, on_connect=slow, workers=4)
        stuck = make_client(pool)
        stuck.sendall(b"patience")
        assert first.wait(patient(10))
        for _ in range(10):
            assert round_trip(make_client(pool), b"hello") == b"hello"
        wait_until(lambda: gate.inside == 1)
        gate.open()
        assert recv_exact(stuck, 8) == b"patience"


@every_style
@every_trigger
def test_disconnect_is_called_once_for_every_connection(make_pool, make_client, style, trigger):
    """S23: closed by the peer, by the handler, by another thread: each exactly once, after all else."""
    opened, ended = [], []

    def answer(sock, data):
        if data == b"bye":
            return TstStat.DISCONNECT
        sock.send(data)
        return None

    pool = serve(
        make_pool,
        style,
        answer,
        on_connect=lambda sock: opened.append(sock.id),
        on_disconnect=lambda sock, reason: ended.append((sock.id, reason)),
        trigger=trigger,
        workers=2,
    )
    for i in range(scaled(90, minimum=9)):
        client = make_client(pool)
        round_trip(client, b"hello")
        if i % 3 == 0:
            client.close()
        elif i % 3 == 1:
            client.sendall(b"bye")
        else:
            (sock,) = (sock for sock in pool.sockets() if sock.peer == client.getsockname())
            pool.closesocket(sock)
    wait_until(lambda: len(pool) == 0)
    wait_until(lambda: len(ended) == len(opened))
    assert sorted(number for number, _ in ended) == sorted(opened)
    assert {reason for _, reason in ended} == {None}


def test_connections_that_are_open_at_stop_are_disconnected_too(make_pool, make_client):
    """S23, S34: stop ends them, each with its on_disconnect, before it returns."""
    ended = []
    pool = make_pool(handler(on_message=echo, on_disconnect=lambda sock, reason: ended.append(reason)))
    for _ in range(10):
        round_trip(make_client(pool), b"x")
    assert pool.stop() is True
    assert ended == [None] * 10


def test_the_disconnect_event_may_take_one_argument(make_pool, make_client):
    """S23: the original's f(sock), and f(sock, reason)."""
    for collect in (lambda calls: lambda sock: calls.append(1), lambda calls: lambda sock, reason: calls.append(1)):
        calls = []
        pool = make_pool(as_function(echo), start=False)
        pool.setEventDisconnected(collect(calls))
        pool.start()
        client = make_client(pool)
        round_trip(client, b"x")
        client.close()
        wait_until(lambda calls=calls: calls)
        assert calls == [1]


def test_an_event_whose_arguments_python_cannot_tell_gets_all_of_them(make_pool, make_client):
    """S23: as a function in C may be."""

    class Unknown:
        __signature__ = "none that inspect understands"

        def __init__(self):
            self.calls = []

        def __call__(self, *arguments):
            self.calls.append(len(arguments))

    event = Unknown()
    pool = make_pool(as_function(echo), start=False)
    pool.setEventDisconnected(event)
    pool.start()
    make_client(pool).close()
    wait_until(lambda: event.calls)
    assert event.calls == [2]


def test_an_event_may_be_taken_back(make_pool, make_client):
    """S22: None before the start; the handler's own hook is called again."""
    calls = []
    pool = make_pool(handler(on_connect=lambda sock: calls.append("hook"), on_message=echo), start=False)
    pool.setEventNewConnected(lambda sock: calls.append("event"))
    pool.setEventNewConnected(None)
    pool.start()
    round_trip(make_client(pool), b"x")
    assert calls == ["hook"]


def test_a_set_event_wins_over_the_handlers_own_hook(make_pool, make_client):
    """SPEC: beside a TstHandler, the function that was set is called."""
    calls = []
    pool = make_pool(
        handler(
            on_connect=lambda sock: calls.append("hook"),
            on_message=echo,
            on_disconnect=lambda sock, reason: calls.append("hook"),
        ),
        start=False,
    )
    pool.setEventNewConnected(lambda sock: calls.append("event"))
    pool.setEventDisconnected(lambda sock: calls.append("event"))
    pool.start()
    client = make_client(pool)
    round_trip(client, b"x")
    client.close()
    wait_until(lambda: len(calls) == 2)
    assert calls == ["event", "event"]


@pytest.mark.parametrize(
    "setter", ["setEventNewConnected", "setEventDisconnected", "setEventMostElapsed", "setEventIdle"]
)
def test_events_are_set_before_start(make_pool, setter):
    """SPEC: later is a TstError; something that can't be called is a TypeError."""
    pool = make_pool(handler(on_message=echo), start=False)
    with pytest.raises(TypeError):
        getattr(pool, setter)("not callable")
    with pytest.raises(TypeError, match="arguments"):
        getattr(pool, setter)(lambda: None)
    getattr(pool, setter)(lambda *args: None)
    pool.start()
    with pytest.raises(TstError):
        getattr(pool, setter)(lambda *args: None)


def test_user_data_is_still_there_in_on_disconnect(make_pool, make_client):
    """S23, S38: the clean-up function gets what it shall clean up."""
    seen = []
    pool = make_pool(
        handler(
            on_connect=lambda sock: setattr(sock, "user_data", "mine"),
            on_message=ignore,
            on_disconnect=lambda sock, reason: seen.append((sock.user_data, sock.closed)),
        )
    )
    make_client(pool).close()
    wait_until(lambda: seen)
    assert seen[0][0] == "mine"
