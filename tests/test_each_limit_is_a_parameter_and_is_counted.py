"""SECURITY.md's table of limits: each can be set, for the pool or for one listener, and is counted when it strikes."""

import contextlib
import socket
import threading
import time

import pytest
from contract_helpers import Gate, ServerProcess, echo, handler, ignore, in_threads, open_sockets, round_trip
from helpers import connect, patient, recv_exact, wait_until

from tstpool import ConnectionClosed, LengthPrefixed, SendQueueFull, TstSockType

PIECE = b"p" * 65536
MUCH = 16 << 20  # more than the socket buffers of a loopback connection hold
FRAMES = LengthPrefixed(4, max_message=MUCH)
DEADLINES = ("idle_closed", "first_byte_closed", "message_closed", "write_closed", "linger_closed")


def only_socket(pool, address, make_client):
    """A client of that listener, and the pool's socket for it."""
    before = set(pool.sockets())
    client = make_client(address)
    return client, wait_until(lambda: set(pool.sockets()) - before).pop()


# ----------------------------------------------------------------------------------------- of one listener


def test_a_listener_may_have_its_own_output_limits(make_pool, make_client):
    """What is too much, and what happens then: for its connections alone, the others have the pool's."""
    pool = make_pool(handler(on_message=ignore))
    strict = pool.listen("127.0.0.1", 0, max_queued=131072, on_overflow="close")
    _usual_client, usual = only_socket(pool, pool.addresses[0], make_client)
    _strict_client, hostile = only_socket(pool, strict, make_client)
    most = [0, 0]
    with pytest.raises(SendQueueFull):
        while True:
            most[0] = max(most[0], usual.send(PIECE))
    with pytest.raises(ConnectionClosed):
        while True:
            most[1] = max(most[1], hostile.send(PIECE))
    assert 131072 + 2 * len(PIECE) < most[0] <= (1 << 20) + len(PIECE)
    assert 131072 <= most[1] <= 131072 + len(PIECE)
    wait_until(lambda: hostile not in pool.sockets())
    stats = pool.stats()
    assert (stats.overflow_closed, stats.overflow_refused) == (1, 1)
    assert not usual.closed


def a_client_of(server, pool, added, **limits):
    """The pool's socket for a connection to that server, by connect() or addsocket(), and the other end."""
    if added:
        sock = pool.addsocket(socket.create_connection(server.getsockname()), **limits)
    else:
        sock = pool.connect(*server.getsockname(), **limits)
    peer, _ = server.accept()
    peer.settimeout(patient(10))
    return sock, peer


@pytest.mark.parametrize("added", [False, True], ids=["connect", "addsocket"])
def test_so_may_one_connection_to_elsewhere(make_pool, added):
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        usual, usual_peer = a_client_of(server, pool, added)
        strict, strict_peer = a_client_of(server, pool, added, max_queued=131072, on_overflow="close")
        with usual_peer, strict_peer:
            with pytest.raises(SendQueueFull):
                while True:
                    usual.send(PIECE)
            with pytest.raises(ConnectionClosed):
                while True:
                    strict.send(PIECE)
            wait_until(lambda: strict not in pool.sockets())
            assert not usual.closed


def test_a_connection_of_ours_may_have_deadlines_and_need_not_pause(make_pool):
    """Of type SUB it is treated like one that was accepted."""
    pool = make_pool(handler(on_message=echo), listen=None, auto_pause=True, max_queued=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, silent = a_client_of(server, pool, True, type=TstSockType.SUB, first_byte_timeout=0.3)
        _, other = a_client_of(server, pool, False, auto_pause=False)
        with silent, other:
            assert silent.recv(1) == b""
            sender = threading.Thread(target=other.sendall, args=(PIECE * (MUCH // len(PIECE)),))
            sender.start()  # all of it is read, although nobody takes the echo
            sender.join(patient(10))
            assert not sender.is_alive() and pool.stats().first_byte_closed == 1


def test_a_listener_that_was_handed_over_may_have_limits_too(make_pool):
    pool = make_pool(handler(on_message=echo), listen=None)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    pool.addsocket(listener, TstSockType.LISTEN, first_byte_timeout=0.3)
    with connect(address) as client:
        assert client.recv(1) == b""
    wait_until(lambda: pool.stats().first_byte_closed == 1)


@pytest.mark.parametrize(
    "limits", [{"max_queue": 1}, {"high_water": -1}, {"low_water": 1 << 30}, {"on_overflow": "drop"}]
)
def test_limits_that_are_none_are_refused_before_anybody_is_troubled(make_pool, limits):
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as own:
        server.accept()[0].close()
        for call in (lambda: pool.connect(*server.getsockname(), **limits), lambda: pool.addsocket(own, **limits)):
            with pytest.raises((TypeError, ValueError), match=next(iter(limits))):
                call()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert own.fileno() >= 0


def test_a_listener_may_block_where_the_pool_raises(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore))
    patient_address = pool.listen("127.0.0.1", 0, max_queued=131072, high_water=65536, on_overflow="block")
    client, sock = only_socket(pool, patient_address, make_client)
    sender = threading.Thread(target=lambda: [sock.send(PIECE) for _ in range(MUCH // len(PIECE))])
    sender.start()
    wait_until(lambda: pool.stats().overflow_refused)
    assert sender.is_alive()
    recv_exact(client, MUCH)
    sender.join(patient(10))
    assert not sender.is_alive()
    assert not sock.closed


def test_a_listener_may_pause_earlier_or_never(make_pool, make_client):
    """The same flood, and nobody reads the replies: one client is held back at its listener's high water."""
    calls = {}

    def answer(sock, data):
        calls[sock] = calls.get(sock, 0) + 1
        sock.send(PIECE)

    pool = make_pool(handler(on_message=answer), framing=LengthPrefixed(1), max_queued=None)
    early = pool.listen("127.0.0.1", 0, high_water=1000, low_water=0)
    never = pool.listen("127.0.0.1", 0, auto_pause=False)
    held_client, held = only_socket(pool, early, make_client)
    free_client, free = only_socket(pool, never, make_client)
    for client in (held_client, free_client):
        client.sendall(b"\1a" * 1000)
    wait_until(lambda: calls.get(free) == 1000)
    wait_until(lambda: pool.stats().auto_pauses >= 2)  # auto_pause=False counts it, too: nobody waits for it
    assert 0 < calls[held] < 1000
    in_threads(*(lambda client=client: recv_exact(client, 1000 * len(PIECE)) for client in (held_client, free_client)))
    assert calls == {held: 1000, free: 1000}


WRONG = {
    "high_water": [-1, 2**63, 16383, 2**30],
    "low_water": [-1, 65537],
    "max_queued": [0, -1, 65535],
    "on_overflow": ["wait", None, ""],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, wrongs in WRONG.items() for wrong in wrongs])
def test_a_wrong_output_limit_leaves_no_listener(make_pool, name, wrong):
    """Against the pool's other limits, too: low_water <= high_water <= max_queued."""
    pool = make_pool(handler(on_message=echo))
    with pytest.raises(ValueError, match="must"):
        pool.listen("127.0.0.1", 0, **{name: wrong})
    assert len(pool.addresses) == 1
    with pytest.raises(TypeError):
        pool.listen("127.0.0.1", 0, high_water=None)


# --------------------------------------------------------------------------------------------- fair shares


@pytest.mark.parametrize(
    ("name", "wrongs"),
    [
        ("accepts_per_turn", [0, -1, 1025]),
        ("accept_pause", [-0.1, float("nan")]),
        ("receive_size", [0, 4095, 16777217]),
        ("messages_per_turn", [0, -1]),
    ],
)
def test_a_wrong_share_is_refused(make_pool, name, wrongs):
    for wrong in wrongs:
        with pytest.raises(ValueError, match=name):
            make_pool(handler(on_message=echo), **{name: wrong})


@pytest.mark.parametrize("share", [1, 16])
def test_who_is_there_waits_for_so_many_accepts_at_most(make_pool, make_client, share):
    """Twenty clients and a message wait: between two of its turns a listener accepts no more than its share."""
    order = []
    with Gate() as gate:

        def answer(sock, data):
            if data == b"block":
                gate.wait()
            order.append(data)

        hooks = handler(on_connect=lambda sock: order.append("connect"), on_message=answer)
        pool = make_pool(hooks, workers=1, accepts_per_turn=share)
        blocker, other = make_client(pool), make_client(pool)
        open_sockets(pool, 2)
        wait_until(lambda: order == ["connect", "connect"])
        order.clear()
        blocker.sendall(b"block")
        wait_until(lambda: gate.inside)
        clients = [make_client(pool) for _ in range(20)]
        other.sendall(b"there")
    wait_until(lambda: len(order) == 22)
    assert order.index(b"there") <= share + 1, order
    assert len(clients) == 20


@pytest.mark.parametrize("share", [1, 8, 32])
def test_others_wait_for_so_many_messages_at_most(make_pool, make_client, share):
    """Hundred messages of one connection, each slow enough to be worth a turn, and then one of another."""
    order = []
    with Gate() as gate:

        def answer(sock, data):
            if data == b"block":
                gate.wait()
            order.append(data)
            time.sleep(0.0002)

        pool = make_pool(handler(on_message=answer), workers=1, framing=LengthPrefixed(1), messages_per_turn=share)
        eager, other = make_client(pool), make_client(pool)
        open_sockets(pool, 2)
        eager.sendall(b"\5block" + b"\1e" * 100)
        wait_until(lambda: gate.inside)
        other.sendall(b"\5other")
    wait_until(lambda: len(order) == 102)
    assert share <= order.index(b"other") <= 2 * share, order


def test_a_small_receive_size_changes_no_byte(make_pool, make_client):
    """More than it holds arrives in pieces, or as one message all the same."""
    pieces = []
    pool = make_pool(handler(on_message=lambda sock, data: pieces.append(data)), receive_size=4096)
    framed = pool.listen("127.0.0.1", 0, framing=LengthPrefixed(4))
    client = make_client(pool)
    data = bytes(range(256)) * 4096
    client.sendall(data)
    wait_until(lambda: sum(map(len, pieces)) == len(data))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 4096
    pieces.clear()
    client = make_client(framed)
    client.sendall(len(data).to_bytes(4, "big") + data + b"\0\0\0\1x")
    wait_until(lambda: pieces == [data, b"x"])


STARVING = """
pool = TstPool(Echo(), workers=1, accept_pause=0.2)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
print(port)
for line in sys.stdin:
    print(pool.stats().accept_pauses, flush=True)
pool.stop()
"""


def test_accepting_pauses_for_as_long_as_it_was_told_to():
    """Out of descriptors: the next try is accept_pause later, not 100 ms."""
    with ServerProcess(STARVING) as server, contextlib.ExitStack() as stack:

        def pauses():
            server.process.stdin.write("\n")
            server.process.stdin.flush()
            return int(server.process.stdout.readline())

        for _ in range(60):
            stack.enter_context(connect(server.addr))
        wait_until(pauses)
        begin = time.monotonic()  # before the look that is counted from, however late its answer comes
        first = pauses()
        last = wait_until(lambda: (now := pauses()) >= first + 4 and now)
        took = time.monotonic() - begin
        assert took >= 0.2 * (last - first - 1)
        server.finish()


# ------------------------------------------------------------------------------------------------ counters


def wait_silent(client):
    """Nothing at all."""


def begin_message(client):
    client.sendall(b"\0\0\0\5ab")


def say_and_wait(client):
    assert round_trip(client, b"\0\0\0\2hi") == b"\0\0\0\2hi"


def read_nothing(client):
    client.sendall(b"\0\0\0\4much")


def read_no_farewell(client):
    client.sendall(b"\0\0\0\2go")


@pytest.mark.parametrize(
    ("timeout", "act", "counter"),
    [
        ("first_byte_timeout", wait_silent, "first_byte_closed"),
        ("message_timeout", begin_message, "message_closed"),
        ("idle_timeout", say_and_wait, "idle_closed"),
        ("write_timeout", read_nothing, "write_closed"),
        ("linger_timeout", read_no_farewell, "linger_closed"),
    ],
)
def test_each_deadline_has_its_counter(make_pool, make_client, timeout, act, counter):
    def answer(sock, data):
        sock.send_message(b"x" * MUCH if data in (b"much", b"go") else data)
        if data == b"go":
            sock.close()

    pool = make_pool(handler(on_message=answer), framing=FRAMES, **{timeout: 0.2})
    client = make_client(pool)
    act(client)
    wait_until(lambda: pool.stats().closed == 1)
    stats = pool.stats()
    assert {name: getattr(stats, name) for name in DEADLINES} == {name: int(name == counter) for name in DEADLINES}
    assert stats.deadline_closed == int(counter != "idle_closed")


def test_a_farewell_that_the_peer_never_ends_is_counted_as_lingering(make_pool, make_client):
    """All output is out; the peer has sent what nobody read, and neither reads nor closes."""

    def answer(sock, data):
        sock.send(b"bye")
        sock.close()

    pool = make_pool(handler(on_message=answer), framing=LengthPrefixed(1), linger_timeout=0.2)
    client = make_client(pool)
    client.sendall(b"\1a" + b"b" * 100_000)
    wait_until(lambda: pool.stats().closed == 1)
    assert pool.stats().linger_closed == 1


def test_pauses_and_slow_calls_are_counted(make_pool, make_client):
    slow = []

    def answer(sock, data):
        if data == b"slow":
            time.sleep(0.05)
        sock.send_message(b"x" * MUCH if data == b"much" else data)

    hooks = handler(on_message=answer, on_slow=lambda sock, seconds: slow.append(seconds))
    pool = make_pool(hooks, framing=FRAMES, slow_handler=0.04)
    client = make_client(pool)
    for n in (1, 2):
        assert round_trip(client, b"\0\0\0\4slow") == b"\0\0\0\4slow"
        wait_until(lambda n=n: len(slow) >= n and pool.stats().slow_calls == len(slow))
    assert pool.stats().auto_pauses == 0
    client.sendall(b"\0\0\0\4much")
    recv_exact(client, 4 + MUCH)
    wait_until(lambda: pool.stats().auto_pauses == 1)


def test_a_refused_transfer_is_counted_as_overflow(make_pool, make_client):
    """A handler that asks for output by send_data, of a peer that never reads: it ends at max_queued."""

    def answer(sock):
        sock.read()
        sock.send_data.req_len = 60_000

    pool = make_pool(answer, max_send_size=60_000, max_queued=131072, auto_pause=False)
    client = make_client(pool)
    client.settimeout(patient(20))
    with contextlib.suppress(ConnectionError):
        while not pool.stats().closed:
            with contextlib.suppress(socket.timeout):
                client.sendall(b"more")
            time.sleep(0.0005)
    wait_until(lambda: pool.stats().closed == 1)
    assert pool.stats().overflow_closed == 1
