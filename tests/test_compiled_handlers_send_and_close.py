"""The tst_ functions: output from hooks, from other connections' hooks and from foreign threads; closing."""

import contextlib
import errno
import socket
import struct
import threading

import downstream_handlers
import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of, wait_counts
from contract_helpers import Gate, every_trigger, handler, in_threads
from downstream_handlers import Commands, Defaults, Echo, Empty, FramedEcho, Relay, Writing
from helpers import connect, patient, recv_exact, recv_until_eof, reset, scaled, wait_until

from tstpool import Delimited, Fixed, TstStat

FULL = 16 << 20


@pytest.fixture
def full(make_pool, make_client):
    """(pool, client, socket): the client reads nothing, the kernel takes no more output."""
    pool = make_pool(Commands(), framing=FRAMING, max_queued=None)
    client = make_client(pool)
    sock = socket_of(pool, client)
    sock.send(b"z" * FULL)
    before, waits = None, pool.stats().bytes_queued
    while before != waits:  # a worker that is held up may not have come to it yet
        with contextlib.suppress(TimeoutError):
            sock.flush(patient(0.05))
        before, waits = waits, pool.stats().bytes_queued
    yield pool, client, sock
    client.close()


# ------------------------------------------------------------------------------------------------ tst_send


@pytest.mark.parametrize("shards", [1, 2])
def test_threads_that_python_knows_nothing_of_may_send(make_pool, make_client, shards):
    """Each thread's messages come whole and in its order."""
    n = scaled(5000, 500)
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=2, shards=shards)
    client = make_client(pool)
    sock = socket_of(pool, client)
    results, messages = in_threads(lambda: downstream_handlers.push(sock, 4, n), lambda: receive(client, 4 * n))
    assert [sent for sent, _ in results] == [n] * 4
    numbers = [struct.unpack("qq", message) for message in messages]
    for thread in range(4):
        assert [number for sender, number in numbers if sender == thread] == list(range(n))


def test_threads_send_while_the_handler_does(make_pool, make_client):
    """Replies and what another thread sends are mixed message by message, never inside one."""
    n = scaled(3000, 300)
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=2)
    client = make_client(pool)
    sock = socket_of(pool, client)
    bodies = [b"reply %d" % i for i in range(n)]
    _, _, messages = in_threads(
        lambda: downstream_handlers.push(sock, 2, n),
        lambda: client.sendall(pack(*bodies)),
        lambda: receive(client, 3 * n),
    )
    assert [message for message in messages if message.startswith(b"reply")] == bodies
    assert len([message for message in messages if len(message) == 16 and message[:5] != b"reply"]) == 2 * n


@pytest.mark.parametrize("ending", [lambda sock, client: sock.close(), lambda sock, client: reset(client)])
def test_a_thread_that_sends_finds_out_that_the_socket_is_closed(make_pool, make_client, ending):
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=2, max_queued=None)
    client = connect(pool)
    with client:
        sock = socket_of(pool, client)

        def end():
            receive(client, 100)
            ending(sock, client)

        results, _ = in_threads(lambda: downstream_handlers.push(sock, 2, 1 << 40), end)
    assert [result for _, result in results] == [-errno.ENOTCONN] * 2


def test_it_returns_how_many_bytes_wait(make_pool, make_client):
    """In a hook, where nothing goes out before it returns."""
    results = []

    def answer(sock, data):
        results.extend([downstream_handlers.send(sock, b"x" * 100), downstream_handlers.send_message(sock, b"y" * 50)])

    # One worker: of a hook that is held up another would send what it has sent.
    client = make_client(make_pool(handler(on_message=answer), framing=FRAMING, workers=1))
    client.sendall(pack(b"go"))
    assert recv_exact(client, 154) == b"x" * 100 + pack(b"y" * 50)
    assert results == [100, 154]


def test_it_returns_more_while_the_peer_does_not_read(full):
    _, client, sock = full
    waiting = downstream_handlers.send(sock, b"abc")
    assert 0 < waiting <= FULL + 3
    assert downstream_handlers.send(sock, b"de") == waiting + 2
    assert recv_exact(client, FULL + 5)[-5:] == b"abcde"


def test_sending_nothing_is_no_error(make_pool, make_client):
    pool = make_pool(FramedEcho(), framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    assert downstream_handlers.send(sock, b"") == 0
    assert downstream_handlers.send_message(sock, b"") >= 0
    assert receive(client) == [b""]


@pytest.mark.parametrize("call", ["send", "send_message"])
def test_on_a_closed_socket(make_pool, make_client, call):
    pool = make_pool(Echo())
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert getattr(downstream_handlers, call)(sock, b"late") == -errno.ENOTCONN
    assert downstream_handlers.close(sock) == -errno.ENOTCONN
    assert downstream_handlers.need_send(sock) == -errno.ENOTCONN


def test_on_a_socket_whose_successor_has_the_same_descriptor(make_pool, make_client):
    """It gets nothing: not a byte, not an end."""
    pool = make_pool(Echo())
    first = make_client(pool)
    old = socket_of(pool, first)
    first.close()
    wait_until(lambda: len(pool) == 0)
    second = make_client(pool)
    new = socket_of(pool, second)
    if new.sd != old.sd:
        pytest.skip("the kernel has given out another descriptor")
    assert downstream_handlers.send(old, b"late") == -errno.ENOTCONN
    assert downstream_handlers.close(old) == -errno.ENOTCONN
    assert downstream_handlers.need_send(old) == -errno.ENOTCONN
    second.sendall(b"hello")
    assert recv_exact(second, 5) == b"hello"


def test_on_a_socket_that_is_closing(full):
    """What was queued is sent before; nothing more is taken."""
    _, client, sock = full
    assert downstream_handlers.close(sock) == 1
    assert downstream_handlers.close(sock) == 0
    assert downstream_handlers.send(sock, b"late") == -errno.ENOTCONN
    assert downstream_handlers.need_send(sock) == -errno.ENOTCONN
    assert recv_until_eof(client) == b"z" * FULL


@pytest.mark.parametrize(
    ("framing", "body", "result"),
    [
        (Fixed(4), b"12345", -errno.EMSGSIZE),
        (Fixed(4), b"123", -errno.EMSGSIZE),
        (Delimited(), b"two\nlines", -errno.EINVAL),
        (FRAMING, b"x" * (FRAMING.max_message + 1), -errno.EMSGSIZE),
    ],
    ids=["longer", "shorter", "delimiter", "too large"],
)
def test_a_message_that_has_no_frame(make_pool, make_client, framing, body, result):
    """Nothing is sent of it, and the connection goes on."""
    pool = make_pool(FramedEcho(), framing=framing)
    client = make_client(pool)
    sock = socket_of(pool, client)
    assert downstream_handlers.send_message(sock, body) == result
    assert downstream_handlers.send(sock, b"next") >= 0
    assert recv_exact(client, 4) == b"next"


# --------------------------------------------------------------------------------------- writable, TST_SEND


@every_trigger
def test_need_send_calls_writable(make_pool, make_client, trigger):
    """Asked for by the hook itself, once for each request."""
    commands = Commands()
    client = make_client(make_pool(commands, framing=FRAMING, trigger=trigger))
    for n in range(1, scaled(50) + 1):
        client.sendall(pack(b"n"))
        assert recv_exact(client, 9) == b"writable;"
        assert commands.counts["writable"] == n


@every_trigger
def test_writable_that_returns_something_else_than_run_is_the_end_of_it(make_pool, make_client, trigger):
    """Python's on_writable hears nothing then."""
    passed_on = []

    class Own(Writing):
        def on_writable(self, sock):
            passed_on.append(sock)

    client = make_client(make_pool(Own(), trigger=trigger))
    for _ in range(5):
        client.sendall(b"x")
        assert recv_exact(client, 4) == b"room"
    assert passed_on == []


@every_trigger
def test_a_handler_without_writable_passes_it_on_to_python(make_pool, make_client, trigger):
    class Own(Defaults):
        def on_writable(self, sock):
            sock.send(b"python")

    client = make_client(make_pool(Own(), trigger=trigger))
    for _ in range(5):
        client.sendall(b"x")
        assert recv_exact(client, 6) == b"python"


@pytest.mark.parametrize(("kind", "answer"), [(Writing, b"room"), (Commands, b"writable;")])
def test_need_send_before_the_connections_first_turn(make_pool, kind, answer):
    """A worker that comes to it late finds both: the newcomer, and that it is to write."""
    ours, theirs = socket.socketpair()
    with ours, Gate() as gate:
        ours.settimeout(patient(10))
        pool = make_pool(kind(), listen=None, workers=1)
        others, busy = socket.socketpair()
        with others:
            pool.addsocket(busy, handler=handler(on_message=lambda sock, data: gate.wait()))
            others.sendall(b"x")
            wait_until(lambda: gate.inside)
            sock = pool.addsocket(theirs)
            assert pool.need_send(sock) is True
            gate.open()
            assert recv_exact(ours, len(answer)) == answer


def test_need_send_from_another_thread(make_pool, make_client):
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    for n in range(1, scaled(50) + 1):
        assert downstream_handlers.need_send(sock) == 0
        assert recv_exact(client, 9) == b"writable;"
        assert commands.counts["writable"] == n


def test_need_send_waits_while_the_kernel_takes_nothing(full):
    pool, client, sock = full
    commands = sock.handler
    assert downstream_handlers.need_send(sock) == 0
    other = connect(pool)
    with other:
        other.sendall(pack(b"n"))
        assert recv_exact(other, 9) == b"writable;"
    assert commands.counts["writable"] == 1
    assert recv_exact(client, FULL + 9)[-9:] == b"writable;"
    assert commands.counts["writable"] == 2


@every_trigger
def test_send_sends_what_send_data_asks_for(make_pool, make_client, trigger):
    """TST_SEND: then `writable` is called, and only then the next message of the burst is handed out."""

    class Sending(Commands):
        def on_message(self, sock, data):
            sock.send_data.s[:5] = b"01234"
            sock.send_data.req_pos = 1
            sock.send_data.req_len = 3
            return TstStat.SUSPEND if data == b"r fill" else TstStat.SEND

    sending = Sending()
    client = make_client(make_pool(sending, framing=FRAMING, trigger=trigger))
    client.sendall(pack(b"r send", b"e1"))
    assert recv_exact(client, 12 + 6) == b"123writable;" + pack(b"e1")
    for n in range(2, 12):
        # A req_len that stands is sent at the end of the call; the SEND that follows has nothing left to send.
        client.sendall(pack(b"r fill", b"s", b"e2"))
        assert recv_exact(client, 12 + 6) == b"123writable;" + pack(b"e2")
        assert sending.counts["writable"] == n


def test_send_with_nothing_to_send_calls_writable_at_once(make_pool, make_client):
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING)
    client = make_client(pool)
    client.sendall(pack(b"s", b"e1"))
    assert recv_exact(client, 9 + 6) == b"writable;" + pack(b"e1")
    assert pool.stats().spins == 1


def test_a_long_send_is_done_before_writable(make_pool, make_client):
    """More than the kernel takes at once; the peer reads it slowly."""
    size = scaled(4 << 20, 1 << 20)

    class Sending(Commands):
        def on_connect(self, sock):
            sock.send_data.req_len = size

    sending = Sending()
    pool = make_pool(sending, framing=FRAMING, max_send_size=size)
    client = make_client(pool)
    client.sendall(pack(b"s", b"e1"))
    recv_exact(client, size // 2)
    assert sending.counts["writable"] <= 1
    rest = recv_exact(client, size - size // 2 + 9 + 6)
    assert rest == bytes(size - size // 2) + b"writable;" + pack(b"e1")


# ----------------------------------------------------------------------------------------------------- closing


def test_without_framing_a_hook_may_disconnect_too(make_pool, make_client):
    client = make_client(make_pool(Commands()))
    client.sendall(b"q")
    assert recv_until_eof(client) == b"bye"


@every_trigger
def test_disconnect_sends_what_is_queued_and_drops_what_comes_behind(make_pool, make_client, trigger):
    commands = Commands()
    client = make_client(make_pool(commands, framing=FRAMING, trigger=trigger))
    client.sendall(pack(b"e1", b"q", b"e2"))
    assert recv_until_eof(client) == pack(b"e1") + b"bye"
    wait_counts(commands, received=2, disconnected=1, released=1)


@every_trigger
def test_closing_itself_sends_what_is_queued_and_drops_what_comes_behind(make_pool, make_client, trigger):
    commands = Commands()
    client = make_client(make_pool(commands, framing=FRAMING, trigger=trigger))
    client.sendall(pack(b"e1", b"c", b"e2"))
    assert recv_until_eof(client) == pack(b"e1") + b"closed"
    wait_counts(commands, received=2, disconnected=1, released=1)


def test_closing_by_another_thread(make_pool, make_client):
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING)
    client = make_client(pool)
    assert say(client, b"e1") == [b"e1"]
    assert downstream_handlers.close(socket_of(pool, client)) == 1
    assert recv_until_eof(client) == b""
    wait_counts(commands, disconnected=1, released=1)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hook_sends_to_other_connections(make_pool, make_client, shards):
    """Each hears what the others say, each speaker's messages in order; all speak at once."""
    n, speakers = scaled(1000, 100), 3
    relay = Relay()
    pool = make_pool(relay, framing=FRAMING, workers=4, shards=shards)
    clients = [make_client(pool) for _ in range(speakers)]
    wait_until(lambda: len(relay) == speakers)

    def speak(number):
        clients[number].sendall(pack(*(b"%d:%d" % (number, i) for i in range(n))))

    def listen(number):
        return receive(clients[number], n * (speakers - 1))

    jobs = [lambda i=i: speak(i) for i in range(speakers)] + [lambda i=i: listen(i) for i in range(speakers)]
    for listener, heard in enumerate(in_threads(*jobs, timeout=60)[speakers:]):
        for speaker in set(range(speakers)) - {listener}:
            own = [message for message in heard if message.startswith(b"%d:" % speaker)]
            assert own == [b"%d:%d" % (speaker, i) for i in range(n)]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hook_closes_other_connections(make_pool, make_client, shards):
    relay = Relay()
    pool = make_pool(relay, framing=FRAMING, workers=4, shards=shards)
    for _ in range(scaled(20, 2)):
        clients = [make_client(pool) for _ in range(6)]
        wait_until(lambda: len(relay) == 6)
        clients[0].sendall(pack(b"last words"))
        assert receive(clients[2]) == [b"last words"]
        clients[2].sendall(pack(b"close"))
        for client in clients:
            said = client not in (clients[0], clients[2])
            assert recv_until_eof(client) == (pack(b"last words") if said else b"")
            client.close()
        wait_until(lambda: len(pool) == 0)


def test_all_close_each_other_at_once(make_pool):
    relay = Relay()
    pool = make_pool(relay, framing=FRAMING, workers=4, shards=2)
    for _ in range(scaled(20, 2)):
        clients = [connect(pool) for _ in range(8)]
        wait_until(lambda: len(relay) == 8)

        def close(client):
            with client, contextlib.suppress(ConnectionError):
                client.sendall(pack(b"close"))
                assert recv_until_eof(client) == b""

        in_threads(*(lambda client=client: close(client) for client in clients))
        wait_until(lambda: len(pool) == 0)


BEHIND = [(0, ()), (0, (b"e2", b"e3")), (2, (b"e2", b"e3"))]


@every_trigger
@pytest.mark.parametrize(("first", "behind"), BEHIND, ids=["alone", "in a burst", "in a burst that was kept"])
def test_reconnected_forgets_the_old_connections_bytes(make_pool, make_client, trigger, first, behind):
    """dup2 in the hook, then TST_RECONNECTED: what the old peer sent behind is dropped, the fresh one is served.

    `first`: bytes that are received alone, so that the engine keeps them in memory of the connection.
    """
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING, trigger=trigger)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(patient(5))
        theirs.setblocking(False)
        commands.new_descriptor = theirs.fileno()
        client = make_client(pool)
        assert say(client, b"e1") == [b"e1"]
        data = pack(b"x", *behind)
        client.sendall(data[:first])
        wait_until(lambda: pool.stats().bytes_in == 6 + first)
        client.sendall(data[first:])
        with contextlib.suppress(ConnectionResetError):  # nobody has it open any more, and it held unread input
            assert recv_until_eof(client) == b""
        wait_until(lambda: commands.counts["received"] >= 2)
        theirs.close()
        assert say(ours, b"e4", b"e5") == [b"e4", b"e5"]
    wait_counts(commands, connected=1, received=4, disconnected=1, released=1)


def test_two_threads_close_while_hooks_send(make_pool):
    """No byte is lost before the end, and nobody hangs."""
    pool = make_pool(FramedEcho(), framing=FRAMING, workers=4, shards=2)
    for _ in range(scaled(30, 3)):
        with connect(pool) as client:
            sock = socket_of(pool, client)
            barrier = threading.Barrier(3)

            def close(sock=sock, barrier=barrier):
                barrier.wait(patient(10))
                return downstream_handlers.close(sock)

            def talk(client=client, barrier=barrier):
                client.sendall(pack(*(b"%d" % i for i in range(200))))
                barrier.wait(patient(10))
                with contextlib.suppress(ConnectionResetError):
                    return recv_until_eof(client)
                return b""

            first, second, got = in_threads(close, close, talk)
            assert sorted((first, second))[1] == 1  # one of them began it
            assert sorted((first, second))[0] in (0, -errno.ENOTCONN)
            assert pack(*(b"%d" % i for i in range(200))).startswith(got)


def test_an_empty_message_may_be_no_memory_at_all(make_pool, make_client):
    client = make_client(make_pool(Empty(), framing=FRAMING))
    assert say(client, b"x", b"y") == [b"", b""]


def test_a_negative_number_that_it_returns_disconnects(make_pool, make_client):
    """One of -errno, say; what it had sent before goes out."""
    client = make_client(make_pool(Commands(), framing=FRAMING))
    client.sendall(pack(b"e", b"-", b"e"))
    assert receive(client) == [b"e"]
    assert client.recv(1) == b""


def test_one_that_takes_the_gil_reads_nothing_and_changes_no_framing(make_pool, make_client):
    """The engine has where the input lies and how it is cut in local variables meanwhile."""
    client = make_client(make_pool(Commands(), framing=FRAMING))
    assert say(client, b"g", b"e", b"g", b"e") == [b"TstError TstError", b"e"] * 2
