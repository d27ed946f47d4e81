"""The C state of a connection: zeroed at its beginning, in one place all its life, released exactly once."""

import contextlib
import gc
import json
import os
import socket

import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of, wait_counts
from contract_helpers import every_trigger, handler, in_threads
from downstream_handlers import Commands, Counting, Echo, Huge, Refusing, state_of
from helpers import ROOT, SANITIZER, connect, patient, recv_until_eof, reset, run_python, scaled, wait_until

from tstpool import TstPool


def test_it_is_zeroed_for_each_connection_and_stays_in_its_place(make_pool, make_client):
    """Memory is used again and again, with what the last connection left in it."""
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING, workers=2)
    for n in range(1, scaled(30) + 1):
        with connect(pool) as client:
            place = state_of(socket_of(pool, client))
            assert place != 0
            say(client, b"a", b"b")
            say(client, b"c" * 5000)
            assert state_of(socket_of(pool, client)) == place
        counts = wait_counts(counting, released=n)
    assert counts["adopted"] == 0
    assert counts["connected"] == counts["disconnected"] == n
    assert counts["copies_made"] == counts["copies_freed"] == 3 * n


def test_a_handler_without_state_has_none(make_pool, make_client):
    pool = make_pool(Echo())
    client = make_client(pool)
    assert state_of(socket_of(pool, client)) == 0


@every_trigger
def test_connected_comes_before_the_first_message(make_pool, make_client, trigger):
    """Also when the message is there before the connection is accepted: `adopted` counts first sights elsewhere."""
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING, workers=4, shards=2, trigger=trigger)
    for _ in range(scaled(50)):
        with connect(pool) as client:
            assert say(client, b"at once") == [b"at once"]
    wait_counts(counting, connected=scaled(50), adopted=0, released=scaled(50))


def test_it_is_released_after_disconnected_and_on_disconnect(make_pool, make_client):
    seen = []

    class Watching(Counting):
        def on_disconnect(self, sock, reason):
            seen.append((self.counts, state_of(sock), reason))

    watching = Watching()
    pool = make_pool(watching, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    say(client, b"hello")
    client.close()
    wait_counts(watching, released=1)
    ((counts, place, reason),) = seen
    assert (counts["disconnected"], counts["released"], reason) == (1, 0, None)
    assert place != 0
    wait_until(lambda: state_of(sock) == 0)  # what counts `released` runs a moment before


def test_of_a_refused_connection(make_pool, make_client):
    """What the handler said is sent; it is never disconnected, for it was never connected; its state is released."""
    refusing = Refusing()
    pool = make_pool(refusing, framing=FRAMING)
    for n in range(1, 11):
        assert recv_until_eof(make_client(pool)) == b"go away"
        wait_counts(refusing, connected=n, disconnected=0, released=n)
    wait_until(lambda: len(pool) == 0)


def test_of_a_connection_that_python_refuses(make_pool, make_client):
    class Choosy(Counting):
        def on_connect(self, sock):
            sock.send(b"sorry")
            return 4

    choosy = Choosy()
    assert recv_until_eof(make_client(make_pool(choosy))) == b"sorry"
    wait_counts(choosy, connected=1, disconnected=0, released=1)


def test_of_a_connection_that_is_reset(make_pool):
    reasons = []

    class Watching(Counting):
        def on_disconnect(self, sock, reason):
            reasons.append(reason)

    watching = Watching()
    pool = make_pool(watching, framing=FRAMING)
    n = scaled(50)
    for _ in range(n):
        client = connect(pool)
        say(client, b"hello")
        reset(client)
    wait_counts(watching, connected=n, disconnected=n, released=n)
    assert [type(reason) for reason in reasons] == [ConnectionResetError] * n


def test_of_connections_that_are_open_at_stop(make_pool, make_client):
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING, workers=4, shards=2)
    clients = [make_client(pool) for _ in range(20)]
    for client in clients:
        say(client, b"hello")
    assert pool.stop()
    wait_counts(counting, timeout=0, connected=20, disconnected=20, released=20, copies_made=20, copies_freed=20)
    assert [recv_until_eof(client) for client in clients] == [b""] * 20


def test_of_connections_after_the_pool_started_again(make_pool, make_client):
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING, workers=2)
    say(make_client(pool), b"hello")
    pool.stop()
    pool.listen("127.0.0.1", 0)
    pool.start()
    say(make_client(pool.addresses[-1]), b"hello")
    pool.stop()
    wait_counts(counting, timeout=0, connected=2, disconnected=2, released=2)


def test_a_pool_that_never_ran_made_none():
    """Sockets were added, the pool is stopped without a start: the peers see an end, and there was never a state."""
    counting = Counting()
    pool = TstPool(counting, framing=FRAMING)
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(patient(10))
        sock = pool.addsocket(theirs)
        pool.stop()
        assert recv_until_eof(ours) == b""
    assert state_of(sock) == 0
    wait_counts(counting, timeout=0, connected=0, released=0)


def test_connections_keep_a_pool_alive_until_it_is_stopped():
    """A pool that nobody holds any more but that has a connection is not freed under it; stop() ends both."""
    code = """
import gc, socket, tstpool
pool = tstpool.TstPool(tstpool.TstHandler())
ours, theirs = socket.socketpair()
ours.settimeout(0.2)
pool.addsocket(theirs)
(sock,) = pool.sockets()
del pool
gc.collect()
try:
    ours.recv(1)
except TimeoutError:
    print("alive", sock.closed)
"""
    assert run_python("-c", code).stdout == "alive False\n"


def test_a_stopped_pool_that_is_dropped_has_left_none(make_client):
    counting = Counting()
    pool = TstPool(counting, framing=FRAMING)
    pool.listen("127.0.0.1", 0)
    pool.start()
    client = make_client(pool)
    say(client, b"hello")
    sock = socket_of(pool, client)
    pool.stop()
    del pool
    gc.collect()
    assert state_of(sock) == 0
    wait_counts(counting, timeout=0, connected=1, disconnected=1, released=1)


def test_the_interpreter_exits_without_stop():
    code = """
import atexit, json, socket, sys
sys.path.insert(0, sys.argv[1])
import tstpool
from downstream_handlers import Counting
counting = Counting()
atexit.register(lambda: print(json.dumps(counting.counts)))
pool = tstpool.TstPool(counting, framing=tstpool.LengthPrefixed(4), workers=4)
address = pool.listen("127.0.0.1", 0)
pool.start()
clients = [socket.create_connection(address, timeout=10) for _ in range(5)]
for client in clients:
    client.sendall(b"\\x00\\x00\\x00\\x02hi")
    assert client.recv(6, socket.MSG_WAITALL) == b"\\x00\\x00\\x00\\x02hi"
"""
    counts = json.loads(run_python("-c", code, str(ROOT / "tests" / "downstream")).stdout)
    assert counts["connected"] == counts["disconnected"] == counts["released"] == 5
    assert counts["broken"] == 0


def test_another_handler_gets_a_state_of_its_own(make_pool, make_client):
    """At the next message the old one hears that it is through with the socket, and its state is released."""
    first, second = Counting(), Counting()
    pool = make_pool(first, framing=FRAMING)
    client = make_client(pool)
    say(client, b"one")
    sock = socket_of(pool, client)
    sock.handler = second
    say(client, b"two", b"three")
    wait_counts(first, connected=1, received=1, disconnected=1, released=1, copies_freed=1)
    wait_counts(second, connected=0, adopted=1, received=2, released=0)
    client.close()
    wait_counts(second, disconnected=1, released=1, copies_freed=2)
    wait_counts(first, timeout=0, disconnected=1, released=1)


def test_python_in_between_begins_a_new_one(make_pool, make_client):
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    say(client, b"one")
    sock.handler = handler(on_message=lambda sock, data: data)
    say(client, b"two")
    wait_counts(counting, released=1)
    assert state_of(sock) == 0
    sock.handler = None
    say(client, b"three")
    wait_counts(counting, adopted=1, received=2, released=1)
    client.close()
    wait_counts(counting, connected=1, disconnected=2, released=2)


def test_the_same_handler_again_keeps_it(make_pool, make_client):
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    say(client, b"one")
    place = state_of(sock)
    for own in (counting, None, counting):
        sock.handler = own
        say(client, b"two")
    assert state_of(sock) == place
    wait_counts(counting, adopted=0, released=0)


def test_a_handler_assigned_and_never_used_makes_none(make_pool, make_client):
    """The connection ends before the next message."""
    first, second = Counting(), Counting()
    pool = make_pool(first, framing=FRAMING)
    client = make_client(pool)
    say(client, b"one")
    socket_of(pool, client).handler = second
    client.close()
    wait_counts(first, released=1)
    wait_until(lambda: len(pool) == 0)
    counts = second.counts
    assert counts["released"] == counts["adopted"]  # none, or one that `disconnected` saw first
    assert first.counts["disconnected"] == 1


def test_a_handler_assigned_after_the_end_harms_nothing(make_pool, make_client):
    first, second = Counting(), Counting()
    pool = make_pool(first, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.close()
    wait_counts(first, released=1)
    wait_until(lambda: sock.closed)
    sock.handler = second
    wait_until(lambda: state_of(sock) == 0)  # released it was a moment before
    assert second.counts["released"] == 0


def test_many_connections_come_and_go(make_pool):
    """Each ends in another way, on two shards; the books balance."""
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING, workers=4, shards=2)

    def come_and_go(seed):
        for i in range(scaled(60)):
            client = connect(pool)
            with client, contextlib.suppress(ConnectionError):
                client.sendall(pack(b"e", b"e" + os.urandom((seed + i) % 7 * 1000)))
                how = (seed + i) % 5
                if how == 0:
                    reset(client)
                elif how == 1:
                    client.sendall(pack(b"q"))
                    recv_until_eof(client)
                elif how == 2:
                    client.sendall(pack(b"c"))
                    recv_until_eof(client)
                elif how == 3:
                    client.shutdown(socket.SHUT_WR)
                    recv_until_eof(client)
                else:
                    assert receive(client) == [b"e"]

    in_threads(*(lambda seed=seed: come_and_go(seed) for seed in range(4)), timeout=60)
    wait_until(lambda: pool.stats().closed == 4 * scaled(60))  # some were reset before they were accepted
    assert pool.stats().accepted == 4 * scaled(60)
    counts = wait_counts(commands, adopted=0)
    assert counts["connected"] == counts["disconnected"] == counts["released"]
    assert counts["copies_made"] == counts["copies_freed"]


@pytest.mark.parametrize("drain", [0.0, 2.0])
def test_of_a_connection_whose_output_nobody_takes(make_pool, make_client, drain):
    """It can't be sent; stop() cuts it off."""
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    say(client, b"hello")
    sock.send(b"z" * (16 << 20))
    pool.stop(drain)
    wait_counts(counting, connected=1, disconnected=1, released=1)


@pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer's malloc ends the process instead of refusing")
def test_one_for_which_there_is_no_memory_is_logged(make_pool, make_client, caplog):
    """B55: its connection ends; nobody else hears of it."""
    pool = make_pool(Huge(), framing=FRAMING)
    with pytest.raises((EOFError, ConnectionError)):
        say(make_client(pool), b"hello")
    wait_until(lambda: len(pool) == 0)
    (record,) = wait_until(lambda: [record for record in caplog.records if record.name == "tstpool"])
    assert "no memory for the 1125899906842624 bytes of its handler's state" in record.getMessage()
