"""A handler with on_writable is told when little waits; a function that takes over from it has never asked for that."""

import threading

import pytest
from compiled_helpers import pack, receive, say, wait_counts
from contract_helpers import every_trigger, handler
from downstream_handlers import Counting
from helpers import recv_exact, wait_until

from tstpool import EPOLLIN, LengthPrefixed

SIZE = 6_000_000  # more than a socket buffer holds
FRAMING = LengthPrefixed(4, max_message=SIZE)
BODIES = [b"b" * 130_000, b"c", b""]


def hands_over_to(successor):
    """It replies with SIZE bytes, and has an on_writable of its own; `successor` serves from the next message on."""

    def on_message(sock, data):
        sock.handler = successor
        return bytes(SIZE)

    return handler(on_message=on_message, on_writable=lambda sock: None)


class Function:
    """Echoes messages, and keeps what it was called for: each call is one whole message, and no other comes."""

    def __init__(self):
        self.calls = []

    def __call__(self, sock):
        data = sock.read()
        self.calls.append((sock.events, data))
        sock.send_message(data)

    def was_called_for(self, *bodies):
        return self.calls == [(EPOLLIN, body) for body in bodies]


def let_much_wait(pool, client, message):
    """The client has asked, and reads nothing yet."""
    client.sendall(message)
    wait_until(lambda: pool.stats().bytes_queued > 65536)


@every_trigger
@pytest.mark.parametrize("ahead", [False, True], ids=["afterwards", "ahead"])
def test_a_function(make_pool, make_client, trigger, ahead):
    """Also when messages had come before there was room: it reads each of them whole."""
    function = Function()
    pool = make_pool(hands_over_to(function), framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    let_much_wait(pool, client, pack(b"a"))
    sender = threading.Thread(target=client.sendall, args=(pack(*BODIES),))
    if ahead:
        sender.start()
    assert receive(client) == [bytes(SIZE)]
    if not ahead:
        sender.start()
    sender.join()
    assert receive(client, len(BODIES)) == BODIES
    assert say(client, b"last") == [b"last"]
    assert function.was_called_for(*BODIES, b"last")


@every_trigger
def test_a_function_without_framing(make_pool, make_client, trigger):
    function = Function()
    pool = make_pool(hands_over_to(function), trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    let_much_wait(pool, client, b"a")
    assert recv_exact(client, SIZE) == bytes(SIZE)
    for body in (b"one", b"two"):
        client.sendall(body)
        assert recv_exact(client, 3) == body
    assert function.was_called_for(b"one", b"two")


@every_trigger
def test_the_pools_function_to_which_none_goes_back(make_pool, make_client, trigger):
    """The socket's own handler had an on_writable, and gives the socket back."""
    function = Function()
    own = hands_over_to(None)
    pool = make_pool(function, framing=FRAMING, trigger=trigger, workers=2, start=False)
    pool.setEventNewConnected(lambda sock: setattr(sock, "handler", own))
    pool.start()
    client = make_client(pool, timeout=3)
    let_much_wait(pool, client, pack(b"a"))
    assert receive(client) == [bytes(SIZE)]
    for body in (b"one", b"two"):
        assert say(client, body) == [body]
    assert function.was_called_for(b"one", b"two")


@every_trigger
def test_a_compiled_handler(make_pool, make_client, trigger):
    """tst_need_send() asks for `writable`, and nothing else does."""
    counting = Counting()
    pool = make_pool(hands_over_to(counting), framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    let_much_wait(pool, client, pack(b"a"))
    assert receive(client) == [bytes(SIZE)]
    for body in (b"one", b"two"):
        assert say(client, body) == [body]
    client.close()
    wait_counts(counting, timeout=3, received=2, writable=0, disconnected=1)
