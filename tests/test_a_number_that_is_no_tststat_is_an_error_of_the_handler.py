"""S40: what a handler returns by mistake, the count that send() has returned, say, goes to on_error."""

import contextlib

import pytest
from contract_helpers import handler, round_trip
from helpers import connect, recv_until_eof, wait_until

from tstpool import TstStat


@pytest.mark.parametrize("number", [5, -1, 2**70])
@pytest.mark.parametrize("hook", ["on_connect", "on_message", "on_writable"])
def test_it_ends_the_connection_with_a_type_error(make_pool, make_client, hook, number):
    """S40: whichever hook returns it."""
    errors, reasons = [], []
    hooks = {
        "on_message": lambda sock, data: TstStat.SEND,  # then on_writable is called
        "on_error": lambda sock, error: errors.append(error),
        "on_disconnect": lambda sock, reason: reasons.append(reason),
        hook: lambda sock, *data: number,
    }
    client = make_client(make_pool(handler(**hooks), workers=2))
    client.sendall(b"hello")
    with contextlib.suppress(ConnectionResetError):  # it may not have read the message
        assert recv_until_eof(client) == b""
    assert [type(error) for error in errors] == [TypeError]
    assert "TstStat" in str(errors[0])
    wait_until(lambda: reasons)
    assert reasons == errors


def test_on_error_may_let_the_connection_go_on(make_pool, make_client):
    """S40: as after any other error."""
    errors = []

    def on_error(sock, error):
        errors.append(type(error))
        return TstStat.SUSPEND

    pool = make_pool(handler(on_message=lambda sock, data: sock.send(data), on_error=on_error))
    client = make_client(pool)
    for _ in range(2):
        assert round_trip(client, b"hello") == b"hello"
    wait_until(lambda: len(errors) == 2)
    assert errors == [TypeError] * 2


def test_a_function_that_returns_the_count_has_replied_and_is_disconnected(make_pool, make_client):
    """S40: the shortest echo server that one might write, and what it is told."""
    reasons = []
    pool = make_pool(lambda sock: sock.send(sock.read()), start=False)
    pool.setEventDisconnected(lambda sock, reason: reasons.append(reason))
    pool.start()
    client = make_client(pool)
    client.sendall(b"hello")
    assert recv_until_eof(client) == b"hello"
    wait_until(lambda: reasons)
    assert [type(reason) for reason in reasons] == [TypeError]


def test_tststats_numbers_are_no_errors(make_pool):
    """S40: neither are its members; each other number is one."""
    reasons = {}

    def on_message(sock, data):
        sock.user_data = data
        return TstStat[data.decode()] if data.isalpha() else int(data)

    hooks = handler(
        on_message=on_message,
        on_error=lambda sock, error: None,
        on_disconnect=lambda sock, reason: reasons.update({sock.user_data: type(reason)}),
    )
    pool = make_pool(hooks, workers=2)
    verdicts = [b"%d" % number for number in range(-2, 13)] + [stat.name.encode() for stat in TstStat]
    for verdict in verdicts:
        with connect(pool) as client:
            client.sendall(verdict)
    wait_until(lambda: len(reasons) == len(verdicts), message=lambda: reasons)
    assert {v for v in verdicts if reasons[v] is TypeError} == set(b"-2 -1 5 6 7 8 11 12".split())
    assert set(reasons.values()) == {TypeError, type(None)}
