"""`disconnected` ends what `connected` began: also where another handler takes the connection over, and once."""

import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of, wait_counts
from contract_helpers import every_trigger, handler
from downstream_handlers import Commands, Counting, Hearing, Relay, state_of
from helpers import ROOT, reset, run_python, wait_until

from tstpool import TstStat


class Python:
    """An echo in Python that keeps the reasons it is told at the end."""

    def __init__(self):
        self.reasons = []
        self.handler = handler(
            on_message=lambda sock, data: data, on_disconnect=lambda sock, reason: self.reasons.append(reason)
        )


def function(sock):
    sock.send_message(sock.read())


@every_trigger
@pytest.mark.parametrize("style", ["object", "function"])
def test_a_python_handler_that_takes_over(make_pool, make_client, trigger, style):
    """From another thread, between two messages; the end of the connection is the new handler's alone."""
    counting, python = Counting(), Python()
    pool = make_pool(counting, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    assert say(client, b"compiled") == [b"compiled"]
    sock = socket_of(pool, client)
    sock.handler = python.handler if style == "object" else function
    assert say(client, b"python") == [b"python"]
    wait_counts(counting, timeout=3, connected=1, received=1, disconnected=1, released=1)
    assert state_of(sock) == 0
    client.close()
    wait_until(lambda: len(pool) == 0)
    wait_counts(counting, timeout=0, connected=1, adopted=0, disconnected=1, released=1)
    assert style == "function" or python.reasons == [None]


@every_trigger
def test_one_that_its_own_python_hook_assigns(make_pool, make_client, trigger):
    """In the middle of a burst: on_disconnect of the handler before it, which is Python's, is for the real end."""
    python, told = Python(), []

    class Upgrading(Commands):
        def on_message(self, sock, data):
            sock.handler = python.handler

        def on_disconnect(self, sock, reason):
            told.append(reason)

    commands = Upgrading()
    pool = make_pool(commands, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(pack(b"e1", b"r upgrade", b"two", b"three"))
    assert receive(client, 3) == [b"e1", b"two", b"three"]
    wait_counts(commands, timeout=3, connected=1, received=1, disconnected=1, released=1)
    reset(client)
    wait_until(lambda: len(pool) == 0)
    wait_counts(commands, timeout=0, connected=1, adopted=0, disconnected=1, released=1)
    assert [type(reason) for reason in python.reasons] == [ConnectionResetError]
    assert told == []


@every_trigger
def test_another_compiled_handler_that_takes_over(make_pool, make_client, trigger):
    """Each is told once, with its own state."""
    first, second = Counting(), Counting()
    pool = make_pool(first, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    say(client, b"one")
    socket_of(pool, client).handler = second
    say(client, b"two", b"three")
    wait_counts(first, timeout=3, connected=1, received=1, disconnected=1, released=1, copies_freed=1)
    wait_counts(second, timeout=3, adopted=1, received=2, disconnected=0, released=0)
    client.close()
    wait_counts(second, timeout=3, connected=0, adopted=1, disconnected=1, released=1, copies_freed=2)
    wait_counts(first, timeout=0, disconnected=1, released=1)


@every_trigger
@pytest.mark.parametrize("how", ["python", "compiled", "none"])
def test_one_that_was_assigned_and_is_replaced(make_pool, make_client, trigger, how):
    """The pool's handler is told when the second takes over, the second when the third does. Back at the pool's, the
    connection is new to it, and its end is told again."""
    first, second, third, python = Counting(), Counting(), Counting(), Python()
    pool = make_pool(first, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    sock = socket_of(pool, client)
    say(client, b"one")
    sock.handler = second
    say(client, b"two")
    sock.handler = {"python": python.handler, "compiled": third, "none": None}[how]
    say(client, b"three")
    wait_counts(second, timeout=3, adopted=1, received=1, disconnected=1, released=1)
    wait_counts(first, timeout=3, connected=1, disconnected=1, released=1)
    client.close()
    wait_until(lambda: len(pool) == 0)
    ends = 2 if how == "none" else 1
    wait_counts(first, timeout=3, connected=1, adopted=ends - 1, disconnected=ends, released=ends)
    wait_counts(second, timeout=0, adopted=1, disconnected=1, released=1)
    told = int(how == "compiled")
    wait_counts(third, timeout=3, adopted=told, disconnected=told, released=told)
    assert python.reasons == ([None] if how == "python" else [])


@pytest.mark.parametrize("end", ["close", "reset", "stop"])
def test_that_the_connection_ends_before_the_next_message(make_pool, make_client, end):
    """The new handler has had no message: the one before it is told all the same, and each of them once."""
    counting, python = Counting(), Python()
    pool = make_pool(counting, framing=FRAMING, workers=2)
    client = make_client(pool)
    say(client, b"one")
    sock = socket_of(pool, client)
    sock.handler = python.handler
    {"close": client.close, "reset": lambda: reset(client), "stop": pool.stop}[end]()
    wait_counts(counting, timeout=3, connected=1, adopted=0, disconnected=1, released=1)
    wait_until(lambda: len(python.reasons) == 1)


def test_what_it_has_noted_about_the_connection_is_given_up(make_pool, make_client):
    """A relay forgets a member that is upgraded: it sends nothing more to it, and the others go on."""
    relay, python = Relay(), Python()
    pool = make_pool(relay, framing=FRAMING, workers=2)
    clients = []
    for n in (1, 2, 3):
        clients.append(make_client(pool))
        wait_until(lambda n=n: len(relay) == n)
    socket_of(pool, clients[0]).handler = python.handler
    assert say(clients[0], b"hello") == [b"hello"]
    wait_until(lambda: len(relay) == 2, timeout=3)
    clients[1].sendall(pack(b"to all"))
    assert receive(clients[2]) == [b"to all"]
    assert say(clients[0], b"nothing else") == [b"nothing else"]
    for n, client in ((2, clients[0]), (1, clients[1]), (0, clients[2])):
        client.close()
        wait_until(lambda n=n: len(relay) == n)


def test_a_message_to_one_that_was_upgraded_and_has_left_harms_nothing():
    """A relay that still had the connection would send into freed memory."""
    code = """
import socket, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/downstream"]
from downstream_handlers import Relay
from helpers import wait_until
from tstpool import TstHandler, TstPool

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

relay = Relay()
pool = TstPool(relay, workers=2)
address = pool.listen("127.0.0.1", 0)
pool.start()
members = 0
for _ in range(3):
    client = socket.create_connection(address, timeout=10)
    wait_until(lambda: len(relay) == members + 1)
    members += 1
    (sock,) = pool.sockets()
    sock.handler = Echo()
    del sock
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    client.close()
    wait_until(lambda: len(pool) == 0)
    members = len(relay)
litter = [bytearray(b"\\xff" * n) for n in range(16, 600, 8) for _ in range(50)]
first, second = (socket.create_connection(address, timeout=10) for _ in range(2))
wait_until(lambda: len(relay) == members + 2)
for _ in range(50):
    first.sendall(b"m")
    assert second.recv(1) == b"m"
print("members", len(relay))
pool.stop()
"""
    done = run_python("-c", code, str(ROOT / "tests"))
    assert done.stdout == "members 2\n"


@every_trigger
@pytest.mark.parametrize("passed", ["messages", "room"])
def test_the_pools_handler_is_told_again_what_it_was_passed(make_pool, make_client, trigger, passed):
    """It has heard of the end with the takeover; by TstStat.RUN it gets to know the socket anew."""
    hearing = Hearing()
    pool = make_pool(hearing, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    assert say(client, b"first") == [b"first"]
    sock = socket_of(pool, client)
    sock.handler = handler(
        on_message=lambda sock, data: TstStat.RUN if data == b"pass" else data, on_writable=lambda sock: TstStat.RUN
    )
    assert say(client, b"own") == [b"own"]
    assert (hearing.received_calls, hearing.disconnected_calls) == (1, 1)
    if passed == "messages":
        assert say(client, b"pass", b"pass") == [b"pass"] * 2
    else:
        pool.need_send(sock)
        wait_until(lambda: hearing.writable_calls)
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert (hearing.connected_calls, hearing.disconnected_calls) == (1, 2)


@pytest.mark.parametrize("back", [lambda hearing: None, lambda hearing: hearing], ids=["none", "the same"])
def test_the_pools_handler_that_is_the_connections_again_is_told_once(make_pool, make_client, back):
    hearing = Hearing()
    pool = make_pool(hearing, framing=FRAMING, workers=2)
    client = make_client(pool)
    sock = socket_of(pool, client)
    sock.handler = handler(on_message=lambda sock, data: TstStat.RUN)
    assert say(client, b"passed") == [b"passed"]
    sock.handler = back(hearing)
    assert say(client, b"its own") == [b"its own"]
    assert hearing.disconnected_calls == 1
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert hearing.disconnected_calls == 2


def test_a_pools_handler_that_was_passed_nothing_is_told_once(make_pool, make_client):
    hearing = Hearing()
    pool = make_pool(hearing, framing=FRAMING, workers=2)
    client = make_client(pool)
    sock = socket_of(pool, client)
    sock.handler = handler(on_message=lambda sock, data: data)
    assert say(client, b"own") == [b"own"]
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert (hearing.received_calls, hearing.disconnected_calls) == (0, 1)
