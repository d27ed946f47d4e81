"""Compiled handlers get bytes as they come or whole messages, in order, and leave others their turn."""

import contextlib
import os
import threading

import pytest
from compiled_helpers import FRAMING, pack, receive, say, stream, wait_counts
from contract_helpers import every_trigger, exchange, handler, in_threads, round_trip
from downstream_handlers import Commands, Counting, Echo, FramedEcho, Upper
from helpers import patient, recv_exact, recv_until_eof, scaled, wait_until

from tstpool import Delimited, Fixed, LengthPrefixed, MessageTooLarge, TstNogilHandler, TstStat

# With these, what a handler gets is the whole frame, and bytes echoed as they are make the same stream.
WITH_FRAME = [
    (Fixed(3), b"abcdefghi"),
    (Delimited(b"aab", keep=True), b"aab" + b"xaab" + b"aaaaab" + b"longer than beforeaab"),
    (LengthPrefixed(2, "little", offset=1, adjust=-3, strip=False), b"?\x03\x00" + b"?\x05\x00xy" + b"!\x04\x00z"),
]
WITHOUT_FRAME = [
    (Fixed(1), b"abc"),
    (Delimited(), b"\nx\n" + b"y" * 100 + b"\n"),
    (Delimited(b"\r\n"), b"\r\na\rb\nc\r\n"),
    (LengthPrefixed(1), b"\x00\x01a\x00\x02bc"),
    (LengthPrefixed(3), b"\x00\x00\x00" + b"\x00\x00\x03abc"),
    (LengthPrefixed(8, adjust=-8), bytes(7) + b"\x08" + bytes(7) + b"\x0bxyz"),
]
FRAMINGS = [(Echo, *case) for case in WITH_FRAME] + [(FramedEcho, *case) for case in WITHOUT_FRAME]
each_framing = pytest.mark.parametrize(("kind", "framing", "data"), FRAMINGS, ids=lambda value: repr(value)[:60])


@every_trigger
def test_bytes_go_back_as_they_come(make_pool, make_client, trigger):
    client = make_client(make_pool(Echo(), trigger=trigger))
    for size in (1, 100, 10_000):
        data = os.urandom(size)
        assert round_trip(client, data) == data


@every_trigger
@pytest.mark.parametrize("framing", [None, LengthPrefixed(4, max_message=1 << 22)], ids=repr)
def test_megabytes_go_back_as_they_come(make_pool, make_client, trigger, framing):
    """More than the buffers of the kernel and of a turn hold; with framing, in messages that are longer than those."""
    client = make_client(make_pool(Echo() if framing is None else FramedEcho(), framing=framing, trigger=trigger))
    data = pack(*(os.urandom(scaled(1 << 20, 1 << 17)) for _ in range(3)))
    assert exchange(client, data) == data


@each_framing
@every_trigger
def test_many_messages_at_once(make_pool, make_client, kind, framing, data, trigger):
    client = make_client(make_pool(kind(), framing=framing, trigger=trigger))
    assert round_trip(client, data * 200) == data * 200


@each_framing
def test_messages_in_pieces(make_pool, make_client, kind, framing, data):
    """Each byte arrives alone, and is received before the next one is sent."""
    pool = make_pool(kind(), framing=framing)
    client = make_client(pool)
    for i in range(len(data)):
        client.sendall(data[i : i + 1])
        wait_until(lambda i=i: pool.stats().bytes_in == i + 1)
    assert recv_exact(client, len(data)) == data


def test_each_message_is_one_call(make_pool, make_client):
    counting = Counting()
    client = make_client(make_pool(counting, framing=FRAMING))
    bodies = [b"", b"a", b"b" * 1000, b"", b"c"]
    assert say(client, *bodies) == bodies
    assert wait_counts(counting, received=5)["connected"] == 1


def test_an_extension_class_with_python_hooks(make_pool, make_client):
    """A cdef class below TstHandler: on_message with the GIL, tst_send_message without ceremony."""
    client = make_client(make_pool(Upper(), framing=FRAMING))
    assert say(client, b"one", b"two") == [b"ONE", b"TWO"]


@every_trigger
@pytest.mark.parametrize("shards", [1, 2])
def test_thousands_of_messages_keep_their_order(make_pool, make_client, trigger, shards):
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=4, shards=shards, trigger=trigger)
    clients = [make_client(pool) for _ in range(4)]
    bodies = [b"%d" % i for i in range(scaled(20_000, 1000))]
    assert all(in_threads(*(lambda client=client: stream(client, bodies) for client in clients), timeout=60))


def test_a_flood_of_messages_leaves_others_their_turn(make_pool, make_client):
    """One worker; one connection has always more messages waiting than a turn may take."""
    over = threading.Event()
    rounds = []
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=1, shards=1)
    flooding, other = make_client(pool), make_client(pool)

    def flood():
        while not over.is_set():
            assert stream(flooding, [b"x"] * 50_000)
            rounds.append(None)

    def ping_pong():
        try:
            wait_until(lambda: rounds)  # the flood has begun
            for i in range(50):
                other.settimeout(patient(5))
                assert say(other, b"%d" % i) == [b"%d" % i]
        finally:
            over.set()

    in_threads(flood, ping_pong, timeout=60)


@every_trigger
def test_a_framing_changed_in_on_message_counts_from_the_next_message(make_pool, make_client, trigger):
    """Lengths, then lines, then lengths again, all in one burst."""

    class Switching(Commands):
        def on_message(self, sock, data):
            sock.framing = Delimited() if data == b"r lines" else FRAMING

    client = make_client(make_pool(Switching(), framing=FRAMING, trigger=trigger))
    lengths, lines = pack(b"e one", b"e two"), b"e three\ne four\n"
    for _ in range(scaled(20)):
        client.sendall(lengths + pack(b"r lines") + lines + b"r lengths\n" + lengths)
        expected = lengths + lines + lengths
        assert recv_exact(client, len(expected)) == expected


TOO_LARGE = [
    (LengthPrefixed(4, max_message=10), pack(b"fine"), (11).to_bytes(4, "big")),
    (LengthPrefixed(8), bytes(7) + b"\x04fine", b"\xff" * 8),
    (Delimited(max_message=10), b"fine\n", b"x" * 100),
]


@pytest.mark.parametrize(("framing", "fine", "too_large"), TOO_LARGE, ids=repr)
@pytest.mark.parametrize("verdict", [None, TstStat.SUSPEND])
def test_a_message_that_is_too_large_is_an_error_and_the_end(make_pool, make_client, framing, fine, too_large, verdict):
    """on_error hears of it, the connection ends whatever it says; what came before is answered."""
    errors = []

    class Strict(FramedEcho):
        def on_error(self, sock, exc):
            errors.append(exc)
            return verdict

    client = make_client(make_pool(Strict(), framing=framing))
    client.sendall(fine * 3 + too_large)
    assert recv_until_eof(client) == fine * 3
    assert [type(error) for error in errors] == [MessageTooLarge]


def test_too_large_alone_never_reaches_the_handler(make_pool, make_client):
    counting = Counting()
    client = make_client(make_pool(counting, framing=LengthPrefixed(4, max_message=10)))
    client.sendall((1 << 31).to_bytes(4, "big") + b"x" * 1000)
    with contextlib.suppress(ConnectionResetError):  # unread input makes the kernel reset the connection
        assert recv_until_eof(client) == b""
    wait_counts(counting, connected=1, disconnected=1, released=1, received=0)


def test_a_python_class_may_subclass_the_base_alone(make_pool, make_client):
    """Every hook in C passes on: it is a TstHandler like any other."""
    calls = []

    class Plain(TstNogilHandler):
        def on_connect(self, sock):
            calls.append("connect")

        def on_message(self, sock, data):
            calls.append(data)
            return data

        def on_disconnect(self, sock, reason):
            calls.append(reason)

    pool = make_pool(Plain(), framing=FRAMING)
    client = make_client(pool)
    assert say(client, b"one", b"two") == [b"one", b"two"]
    client.close()
    wait_until(lambda: len(calls) == 4)
    assert calls == ["connect", b"one", b"two", None]


def test_listeners_may_have_framings_of_their_own(make_pool, make_client):
    pool = make_pool(FramedEcho(), framing=FRAMING)
    lines = pool.listen("127.0.0.1", 0, framing=Delimited())
    assert say(make_client(pool), b"one") == [b"one"]
    assert round_trip(make_client(lines), b"a\nb\n") == b"a\nb\n"


def test_a_transfer_that_python_asked_for_arrives_whole(make_pool, make_client):
    """recv_data.req_len set in on_connect: `received` gets exactly those bytes."""

    class Transfer(Echo):
        def on_connect(self, sock):
            sock.recv_data.req_len = 10

    pool = make_pool(Transfer())
    client = make_client(pool)
    for piece in (b"012", b"3456", b"78"):
        received = pool.stats().bytes_in
        client.sendall(piece)
        wait_until(lambda before=received, piece=piece: pool.stats().bytes_in == before + len(piece))
    assert pool.stats().messages == 0
    client.sendall(b"9abc")
    assert recv_exact(client, 10) == b"0123456789"
    wait_until(lambda: pool.stats().messages == 1)  # the reply may be out before its message is counted
    client.sendall(b"defghij")
    assert recv_exact(client, 10) == b"abcdefghij"


def test_both_kinds_of_handler_in_one_process(make_pool, make_client):
    compiled, python = make_pool(FramedEcho(), framing=FRAMING), make_pool(handler(on_message=lambda sock, data: data))
    for _ in range(10):
        assert say(make_client(compiled), b"compiled") == [b"compiled"]
        assert round_trip(make_client(python), b"python") == b"python"


def test_one_handler_may_serve_two_pools(make_pool, make_client):
    counting = Counting()
    for pool in (make_pool(counting, framing=FRAMING), make_pool(counting, framing=FRAMING)):
        assert say(make_client(pool), b"hello") == [b"hello"]
    wait_counts(counting, connected=2, received=2)


def test_replies_wait_for_nobody(make_pool, make_client):
    """A message that is answered while the next one is only half there."""
    client = make_client(make_pool(FramedEcho(), framing=FRAMING))
    data = pack(b"first", b"second")
    client.sendall(data[:-3])
    assert receive(client) == [b"first"]
    client.sendall(data[-3:])
    assert receive(client) == [b"second"]
