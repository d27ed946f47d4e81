"""TST_RUN hands what is at hand to the Python hook of the same handler; sock.handler changes between the two kinds."""

import socket
import threading

import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of, stream, wait_counts
from contract_helpers import every_trigger, handler, in_threads, round_trip
from downstream_handlers import Commands, Counting, Echo, FramedEcho, PassesOn
from helpers import patient, quick_switches, recv_exact, recv_until_eof, scaled, wait_until

from tstpool import TstNogilHandler, TstSockType, TstStat


class Mixed(Commands):
    """Messages that begin with r are answered in Python, those that begin with e in C."""

    def on_message(self, sock, data):
        return data


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(patient(10))
    with ours, theirs:
        yield ours, theirs


@every_trigger
@pytest.mark.parametrize("shards", [1, 2])
def test_fast_and_slow_messages_of_one_burst_keep_their_order(make_pool, make_client, trigger, shards):
    pool = make_pool(Mixed(), framing=FRAMING, workers=4, shards=shards, trigger=trigger)
    bodies = [b"er"[i % 7 // 3 % 2 :][:1] + b"%d" % i for i in range(scaled(6000, 600))]
    assert {body[:1] for body in bodies} == {b"e", b"r"}
    clients = [make_client(pool) for _ in range(3)]
    assert all(in_threads(*(lambda client=client: stream(client, bodies) for client in clients), timeout=60))
    wait_until(lambda: pool.stats().messages == 3 * len(bodies))


@pytest.mark.parametrize("pattern", [b"r", b"er", b"re", b"errrrrreee", b"e" * 100 + b"r"])
def test_any_pattern_of_fast_and_slow(make_pool, make_client, pattern):
    client = make_client(make_pool(Mixed(), framing=FRAMING, workers=2))
    bodies = [pattern[i % len(pattern) :][:1] + b"%d" % i for i in range(500)]
    assert stream(client, bodies)


def test_python_gets_each_byte_that_was_passed_on(make_pool, make_client):
    """Messages of all sizes, empty ones too, and what lies around them in the same burst."""
    got = []

    class All(TstNogilHandler):
        def on_message(self, sock, data):
            got.append(data)
            return b"ok"

    client = make_client(make_pool(All(), framing=FRAMING))
    bodies = [b"", b"x", bytes(range(256)) * 300, b"", b"y" * 100_000, b"z" * 1_000_000, b"end"]
    client.sendall(pack(*bodies))
    assert receive(client, len(bodies)) == [b"ok"] * len(bodies)
    assert got == bodies


def test_python_may_be_lent_what_is_passed_on(make_pool, make_client):
    """copy=False: on_message gets a view, valid inside the call; messages in C do not change."""
    kinds = set()

    class Viewing(Commands):
        def on_message(self, sock, data):
            kinds.add(type(data))
            sock.send_message(data)

    client = make_client(make_pool(Viewing(), framing=FRAMING, copy=False, workers=2))
    assert stream(client, [b"er"[i % 5 // 3 :][:1] + b"%d" % i for i in range(1000)])
    assert stream(client, [b"e" * 500_000, b"r" * 500_000, b"e"])
    assert kinds == {memoryview}


def test_without_framing_all_that_has_arrived_is_passed_on(make_pool, make_client):
    class Raw(Commands):
        def on_message(self, sock, data):
            return b"python:" + data

    client = make_client(make_pool(Raw()))
    client.sendall(b"r one")
    assert recv_exact(client, 12) == b"python:r one"
    assert round_trip(client, b"e two") == b"e two"


def test_a_message_nobody_wants_is_dropped(make_pool, make_client):
    """Passed on, and there is no on_message; the next ones are answered."""
    client = make_client(make_pool(Commands(), framing=FRAMING))
    client.sendall(pack(b"e1", b"r2", b"r3", b"e4", b"r5", b"e6"))
    assert receive(client, 3) == [b"e1", b"e4", b"e6"]


def test_what_on_message_returns_counts(make_pool, make_client):
    class Ending(Commands):
        def on_message(self, sock, data):
            sock.send_message(b"last")
            return TstStat.DISCONNECT

    ending = Ending()
    client = make_client(make_pool(ending, framing=FRAMING))
    client.sendall(pack(b"e1", b"r2", b"e3"))
    assert recv_until_eof(client) == pack(b"e1", b"last")
    wait_counts(ending, received=1, disconnected=1, released=1)


def test_what_on_message_raises_costs_only_its_connection(make_pool, make_client):
    errors, reasons = [], []

    class Failing(Commands):
        def on_message(self, sock, data):
            raise KeyError(data)

        def on_error(self, sock, exc):
            errors.append(repr(exc))
            return TstStat.SUSPEND if b"again" in exc.args[0] else None

        def on_disconnect(self, sock, reason):
            reasons.append(repr(reason))

    pool = make_pool(Failing(), framing=FRAMING)
    client, other = make_client(pool), make_client(pool)
    client.sendall(pack(b"e1", b"r again", b"e2", b"r", b"e3"))
    assert recv_until_eof(client) == pack(b"e1", b"e2")
    wait_until(lambda: reasons)
    assert errors == ["KeyError(b'r again')", "KeyError(b'r')"]
    assert reasons == ["KeyError(b'r')"]
    assert say(other, b"e1") == [b"e1"]


def test_on_connect_follows_connected(make_pool, make_client):
    """It may send; it is called once, and before the first message."""
    calls = []

    class Greeting(Mixed):
        def on_connect(self, sock):
            calls.append(self.counts["connected"])
            sock.send_message(b"welcome")

    client = make_client(make_pool(Greeting(), framing=FRAMING))
    client.sendall(pack(b"e1"))
    assert receive(client, 2) == [b"welcome", b"e1"]
    assert calls == [1]


def test_on_writable_follows_writable(make_pool, make_client):
    calls = []

    class Writing(Commands):
        def on_writable(self, sock):
            calls.append(self.counts["writable"])
            sock.send(b"python")

    client = make_client(make_pool(Writing(), framing=FRAMING))
    client.sendall(pack(b"n"))
    assert recv_exact(client, 15) == b"writable;python"
    assert calls == [1]


def test_on_disconnect_follows_disconnected(make_pool, make_client):
    seen = []

    class Watching(Commands):
        def on_disconnect(self, sock, reason):
            seen.append(self.counts["disconnected"])

    watching = Watching()
    pool = make_pool(watching, framing=FRAMING)
    for n in range(1, 6):
        make_client(pool).close()
        wait_counts(watching, disconnected=n)
        wait_until(lambda n=n: len(seen) == n)
    assert seen == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------ sock.handler


@every_trigger
def test_a_change_takes_effect_with_the_next_message_of_the_same_burst(make_pool, make_client, trigger):
    """From C to Python, to another compiled handler, and back to the pool's, all in what arrived at once."""
    other = Counting()

    class Upgrading(Commands):
        def on_message(self, sock, data):
            sock.handler = python

    def answer(sock, data):
        if data == b"compiled":
            sock.handler = other
        elif data == b"back":
            sock.handler = None
        return b"python:" + data

    python = handler(on_message=answer)
    client = make_client(make_pool(Upgrading(), framing=FRAMING, trigger=trigger, workers=2))
    client.sendall(pack(b"e1", b"r upgrade", b"e2", b"back", b"e3", b"r upgrade", b"compiled", b"q4", b"q5"))
    expected = [b"e1", b"python:e2", b"python:back", b"e3", b"python:compiled", b"q4", b"q5"]
    assert receive(client, len(expected)) == expected
    wait_counts(other, adopted=1, received=2)  # a Counting echoes what Commands would take for "quit"


def test_a_change_in_on_connect_takes_effect_with_the_first_message(make_pool, make_client):
    class Choosing(Commands):
        def on_connect(self, sock):
            sock.handler = FramedEcho()

    choosing = Choosing()
    client = make_client(make_pool(choosing, framing=FRAMING))
    assert say(client, b"q not quit", b"r not Python") == [b"q not quit", b"r not Python"]
    wait_counts(choosing, connected=1, received=0, released=1)


def test_a_change_by_another_thread_takes_effect_with_the_next_message(make_pool, make_client):
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=2)
    client = make_client(pool)
    sock = socket_of(pool, client)
    python = handler(on_message=lambda sock, data: b"python:" + data)
    for _ in range(scaled(50)):
        assert say(client, b"a") == [b"a"]
        sock.handler = python
        client.sendall(pack(b"b"))
        assert receive(client) == [b"python:b"]
        sock.handler = None


def test_a_function_may_follow_a_compiled_handler(make_pool, make_client):
    """The original's style reads by itself."""
    pool = make_pool(Echo())
    client = make_client(pool)
    assert round_trip(client, b"compiled") == b"compiled"
    sock = socket_of(pool, client)

    def function(sock):
        sock.send(sock.read().upper())

    sock.handler = function
    client.sendall(b"function")
    assert recv_exact(client, 8) == b"FUNCTION"
    sock.handler = None
    assert round_trip(client, b"compiled") == b"compiled"


@pytest.mark.parametrize("shards", [1, 2])
def test_changes_at_any_moment_lose_nothing(make_pool, make_client, shards):
    """A thread assigns handlers of both kinds while messages stream: each is answered once, in order, and each state
    that was made is released."""
    counting, pools_own = Counting(), Counting()
    kinds = [counting, handler(on_message=lambda sock, data: data), FramedEcho(), Mixed(), None]
    pool = make_pool(pools_own, framing=FRAMING, workers=4, shards=shards)
    client = make_client(pool)
    sock = socket_of(pool, client)
    over = threading.Event()
    changes = []

    def change():
        while not over.is_set():
            sock.handler = kinds[len(changes) % len(kinds)]
            changes.append(None)

    thread = threading.Thread(target=change)
    with quick_switches():
        thread.start()
        try:
            for n in range(scaled(20, 3)):
                assert stream(client, [b"e%d.%d" % (n, i) for i in range(500)])
        finally:
            over.set()
            thread.join()
    assert len(changes) > 5
    client.close()
    wait_until(lambda: len(pool) == 0)
    for each in (counting, pools_own):
        counts = wait_counts(each)
        assert counts["released"] == counts["adopted"] + counts["connected"]
        assert counts["disconnected"] == counts["released"]  # each has heard that it was through with the socket
        assert counts["copies_made"] == counts["copies_freed"]


# ------------------------------------------------------------------------------------------------- client mode


@every_trigger
def test_an_added_socket_may_have_a_compiled_handler_of_its_own(make_pool, pair, trigger):
    """In a pool whose handler is Python's."""
    ours, theirs = pair
    counting = Counting()
    pool = make_pool(handler(on_message=lambda sock, data: b"pool"), listen=None, framing=FRAMING, trigger=trigger)
    ours.sendall(pack(b"early"))
    sock = pool.addsocket(theirs, TstSockType.USER1, counting, "mine")
    assert receive(ours) == [b"early"]
    assert say(ours, b"one", b"two") == [b"one", b"two"]
    assert (sock.type, sock.handler, sock.user_data) == (TstSockType.USER1, counting, "mine")
    wait_counts(counting, connected=1, adopted=0, received=3)
    ours.close()
    wait_counts(counting, disconnected=1, released=1)


def test_an_added_socket_may_have_a_python_handler_of_its_own(make_pool, pair):
    """In a pool whose handler is compiled: that one hears nothing of it."""
    ours, theirs = pair
    counting = Counting()
    pool = make_pool(counting, listen=None, framing=FRAMING)
    pool.addsocket(theirs, handler=handler(on_message=lambda sock, data: b"own"))
    assert say(ours, b"one") == [b"own"]
    ours.close()
    wait_until(lambda: len(pool) == 0)
    wait_counts(counting, connected=0, adopted=0, received=0, disconnected=0, released=0)


def test_sockets_added_before_start(make_pool, pair):
    ours, theirs = pair
    counting = Counting()
    pool = make_pool(None, listen=None, start=False, framing=FRAMING)
    pool.addsocket(theirs, handler=counting)
    ours.sendall(pack(b"early"))
    pool.create(2, None, 0, handler(on_message=lambda sock, data: b"pool"))
    assert receive(ours) == [b"early"]
    wait_counts(counting, connected=1, received=1)


def test_a_client_and_a_server_in_one_pool(make_pool):
    """connect(): both ends of a connection have compiled handlers; what one sends the other counts."""
    client_side = Counting()
    pool = make_pool(Commands(), framing=FRAMING, workers=2)
    host, port = pool.addresses[0]
    sock = pool.connect(host, port, handler=client_side, timeout=patient(10))
    sock.send_message(b"e ping-pong for ever")
    wait_until(lambda: client_side.counts["received"] > 100)
    sock.close()
    wait_counts(client_side, connected=1, disconnected=1, released=1)


def test_run_from_a_sockets_own_handler_reaches_a_python_pool(make_pool, pair):
    """Passed on twice: from C to the handler's own on_message, from there (TstStat.RUN) to the pool's."""
    ours, theirs = pair

    class Own(Commands):
        def on_message(self, sock, data):
            return TstStat.RUN

    pool = make_pool(handler(on_message=lambda sock, data: b"pool:" + data), listen=None, framing=FRAMING)
    pool.addsocket(theirs, handler=Own())
    assert say(ours, b"e1", b"r2", b"e3") == [b"e1", b"pool:r2", b"e3"]


@pytest.mark.parametrize("own", ["python", "compiled"])
def test_run_from_a_sockets_own_handler_reaches_a_compiled_pool(make_pool, pair, own):
    """TstStat.RUN passes the same event on to the pool's handler, of whichever kind that is."""
    ours, theirs = pair

    class Own(Commands):
        def on_message(self, sock, data):
            return TstStat.RUN

    pool = make_pool(FramedEcho(), listen=None, framing=FRAMING)
    passing = Own() if own == "compiled" else handler(on_message=lambda sock, data: TstStat.RUN)
    pool.addsocket(theirs, handler=passing)
    ours.settimeout(patient(1))
    assert say(ours, b"r1") == [b"r1"]


@pytest.mark.parametrize("compiled", [True, False])
def test_room_for_output_that_a_sockets_own_handler_passes_on_reaches_the_pools(make_pool, pair, compiled):
    """TstStat.RUN from its on_writable, as from its on_message."""
    ours, theirs = pair
    calls = []

    ask = handler(on_message=lambda sock, data: TstStat.SEND, on_writable=lambda sock: TstStat.RUN)
    pools = PassesOn() if compiled else handler(on_writable=calls.append)
    pool = make_pool(pools, listen=None)
    pool.addsocket(theirs, handler=ask)
    ours.sendall(b"room?")
    wait_until(lambda: pools.writable_calls == 1 if compiled else len(calls) == 1)
