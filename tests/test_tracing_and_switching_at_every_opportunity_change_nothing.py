"""B60: the hooks of a debugger or a profiler in every worker, and a thread switch whenever there can be one."""

import os
import sys
import threading

import pytest
from contract_helpers import exchange, handler, in_threads, round_trip
from helpers import connect, quick_switches, recv_until_eof, scaled, wait_until


def check_all(make_pool):
    """Echoes, sends from outside, errors and ends on eight connections at once; all is as it is without hooks."""
    connects, ends, errors = [], [], []

    def on_message(sock, data):
        if data.endswith(b"raise"):
            raise ZeroDivisionError
        sock.send(data)

    pool = make_pool(
        handler(
            on_connect=lambda sock: connects.append(sock.id),
            on_message=on_message,
            on_error=lambda sock, error: errors.append(type(error)),
            on_disconnect=lambda sock, reason: ends.append(sock.id),
        ),
        workers=4,
        shards=2,
    )

    def client(number):
        with connect(pool) as sock:
            for i in range(scaled(50)):
                assert round_trip(sock, b"%d %d" % (number, i)) == b"%d %d" % (number, i)
            data = os.urandom(200_000)
            if number % 2:
                assert exchange(sock, data) == data
            sock.sendall(b"raise")
            assert recv_until_eof(sock) == b""

    def disturb():
        for _ in range(scaled(200)):
            for sock in pool.sockets():
                pool.need_send(sock)
                sock.pause()
                sock.resume()
            pool.stats()

    in_threads(*(lambda number=number: client(number) for number in range(8)), disturb)
    wait_until(lambda: len(ends) == 8)
    assert sorted(ends) == sorted(connects)
    assert errors == [ZeroDivisionError] * 8
    assert pool.stop() is True


@pytest.fixture
def hooked():
    """hooked(set_hook): a hook that lists the functions it sees, in all threads that start from now on."""
    seen, unset = [], []

    def hook(frame, event, argument):
        if event == "call":
            seen.append(frame.f_code.co_name)
        return hook

    def begin(name):
        before = getattr(sys, "get" + name)()
        unset.append(lambda: (getattr(threading, "set" + name)(None), getattr(sys, "set" + name)(before)))
        getattr(threading, "set" + name)(hook)
        return seen

    yield begin
    for function in unset:
        function()


@pytest.mark.parametrize("name", ["trace", "profile"])
def test_a_hook_in_every_thread(make_pool, hooked, name):
    """B60: the hook sees each message of each worker, and changes nothing."""
    seen = hooked(name)
    check_all(make_pool)
    assert seen.count("on_message") > 8 * scaled(50)


def test_switching_at_every_opportunity(make_pool):
    """B60: sys.setswitchinterval(1e-6)."""
    with quick_switches(1e-6):
        assert sys.getswitchinterval() < 1e-5
        check_all(make_pool)


def test_both_at_once(make_pool, hooked):
    """B60."""
    seen = hooked("trace")
    with quick_switches(1e-6):
        check_all(make_pool)
    assert seen.count("on_message") > 8 * scaled(50)


def test_a_hook_that_raises_is_the_handlers_exception(make_pool, make_client):
    """B60: it costs the connection whose handler it interrupts; Python takes the hook away, the worker lives."""
    errors = []

    def hook(frame, event, argument):
        if frame.f_code.co_name == "marked":
            raise ZeroDivisionError
        return hook

    def marked(sock, data):
        sock.send(data)

    threading.settrace(hook)
    try:
        pool = make_pool(handler(on_message=marked, on_error=lambda sock, error: errors.append(type(error))), workers=1)
        assert recv_until_eof_after(make_client(pool), b"hello") == b""
        assert round_trip(make_client(pool), b"hello") == b"hello"
    finally:
        threading.settrace(None)
    assert errors == [ZeroDivisionError]


def recv_until_eof_after(client, data):
    client.sendall(data)
    return recv_until_eof(client)
