"""B20, B24, B25: a close while the peer still sends; its end; and close(abort=True), which is the other way to end."""

import contextlib
import functools
import select
import socket
import threading
import time

import pytest
from compiled_helpers import pack
from contract_helpers import every_trigger, handler, in_threads, open_sockets
from downstream_handlers import Commands
from helpers import PATIENCE, connect, open_fds, patient, recv_exact, recv_until_eof, reset, scaled, wait_until

from tstpool import ConnectionClosed, Delimited, LengthPrefixed, TstStat

FRAMES = LengthPrefixed(4, max_message=4 << 20)
UPLOAD = b"u" * (1 << 20)
REPLY = b"413 too much" * 5000
MUCH = b"x" * (16 << 20)


def unhurried(seconds):
    """A deadline of the peer's: on a busy machine it is not to miss that for being held up."""
    return seconds if PATIENCE == 1 else patient(2 * seconds)


framed_or_not = pytest.mark.parametrize("framing", [None, FRAMES], ids=["raw", "framed"])


def rejecting(how="close", ends=None):
    """Replies to the first message and ends the connection. ends: a list for (when, reason) of each on_disconnect."""

    def on_message(sock, data):
        sock.send(REPLY)
        if how == "disconnect":
            return TstStat.DISCONNECT
        sock.close()

    def on_disconnect(sock, reason):
        if ends is not None:
            ends.append((time.monotonic(), reason))

    return handler(on_message=on_message, on_disconnect=on_disconnect)


def upload(framing):
    return UPLOAD if framing is None else pack(b"PUT", UPLOAD)


def has_its_end(pool, make_client, number=1):
    """Clients that have read the reply and its end, and do not close; the server had not read all they sent."""
    clients = [make_client(pool) for _ in range(number)]
    for client in clients:
        client.sendall(pack(b"PUT", b"some")[:-1])  # of the second message one byte is to come
    for client in clients:
        assert recv_until_eof(client) == REPLY
    return clients


def lingering(pool, make_client, number=1):
    """The same, while the server waits for them."""
    clients = has_its_end(pool, make_client, number)
    wait_until(lambda: len(pool) == number)
    return clients


# ------------------------------------------------------------------------------------------------ the reply


@framed_or_not
@pytest.mark.parametrize("how", ["close", "disconnect"])
@every_trigger
def test_a_megabyte_that_is_rejected_early(make_pool, framing, how, trigger):
    """B24: 200 times: all can be sent, the whole reply arrives, and a clean end."""
    ends = []
    pool = make_pool(rejecting(how, ends), framing=framing, trigger=trigger)
    rounds = scaled(200 if trigger == "level" else 30, 5)
    for _ in range(rounds):
        with connect(pool) as client:
            client.sendall(upload(framing))
            assert recv_until_eof(client) == REPLY
    wait_until(lambda: len(pool) == 0)
    assert [reason for _, reason in ends] == [None] * rounds


@framed_or_not
def test_several_at_once(make_pool, framing):
    """B24: each has its own end."""
    pool = make_pool(rejecting(), framing=framing, workers=3)

    def client():
        for _ in range(scaled(20, 3)):
            with connect(pool, 30) as sock:
                sock.sendall(upload(framing))
                assert recv_until_eof(sock) == REPLY

    in_threads(*[client] * 4)
    wait_until(lambda: len(pool) == 0)


@framed_or_not
@pytest.mark.parametrize("first", [1, 8, 8192, 100_000])
def test_the_rest_comes_after_the_reply(make_pool, make_client, framing, first):
    """B24: when the server closes, nothing is unread; the message that has begun says that there is more to come.

    Without framing only a large piece says so.
    """
    if framing is None and first < 4096:
        pytest.skip("nobody can know that more is to come")
    pool = make_pool(rejecting(), framing=framing)
    data = upload(framing)
    first += len(pack(b"PUT")) if framing else 0
    for _ in range(10):
        client = make_client(pool)
        begin = time.monotonic()
        client.sendall(data[:first])
        assert recv_exact(client, len(REPLY)) == REPLY
        assert client.recv(1) == b""
        if framing is not None or time.monotonic() - begin < 0.9:
            break  # what a large piece says holds for a second
        client.close()
    for _ in range(5):
        client.sendall(data[first : first + 100_000])
        time.sleep(0.01)  # a reset would come back meanwhile
    client.sendall(data[first:])
    assert client.recv(1) == b""
    client.close()
    wait_until(lambda: len(pool) == 0)


def test_who_is_through_is_not_waited_for(make_pool, make_client):
    """B24: one that has sent whole messages costs no descriptor while it does not close."""
    for framing in (None, FRAMES):
        pool = make_pool(rejecting(), framing=framing, linger_timeout=30)
        client = make_client(pool)
        client.sendall(pack(b"PUT"))
        assert recv_until_eof(client) == REPLY
        wait_until(lambda pool=pool: len(pool) == 0, 2)


def test_a_compiled_handler_that_closes(make_pool):
    """B24: tst_close() and TST_DISCONNECT."""
    pool = make_pool(Commands(), framing=FRAMES, workers=2, shards=2)
    for command, reply in [(b"q", b"bye"), (b"c", b"closed")] * scaled(20, 3):
        with connect(pool) as client:
            client.sendall(pack(command, UPLOAD))
            assert recv_until_eof(client) == reply
    wait_until(lambda: len(pool) == 0)


def test_on_disconnect_does_not_wait(make_pool, make_client):
    """B24: for the handler it is over; only the engine knows that there is a descriptor left."""
    ends = []
    pool = make_pool(rejecting(ends=ends), framing=FRAMES, linger_timeout=30)
    begin = time.monotonic()
    (client,) = lingering(pool, make_client)
    wait_until(lambda: ends)
    assert ends[0][1] is None
    assert ends[0][0] - begin < patient(1)
    client.sendall(b"x" * 1000)
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert len(ends) == 1


# ---------------------------------------------------------------------------------------------------- its end


@pytest.mark.parametrize("limit", [0.2, 1.0])
def test_a_peer_that_does_nothing_is_waited_for_until_the_deadline(make_pool, make_client, limit):
    """B24, B38: then the descriptor is closed."""
    limit = unhurried(limit)
    pool = make_pool(rejecting(), framing=FRAMES, linger_timeout=limit)
    begin = time.monotonic()
    has_its_end(pool, make_client)
    wait_until(lambda: len(pool) == 0)
    took = time.monotonic() - begin
    assert limit <= took < limit * 1.1 + unhurried(0.3)
    assert pool.stats().deadline_closed == 1


def test_a_peer_that_goes_on_sending_is_cut_off(make_pool, make_client):
    """B24, B38: six times linger_timeout, however steadily it sends."""
    limit = unhurried(0.2)
    pool = make_pool(rejecting(), framing=FRAMES, linger_timeout=limit)
    begin = time.monotonic()
    (client,) = lingering(pool, make_client)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while time.monotonic() - begin < 50 * limit:
            client.send(b"x")
            time.sleep(0.02)
    assert 6 * limit <= time.monotonic() - begin < 6 * limit * 1.1 + patient(0.4)
    wait_until(lambda: len(pool) == 0)


def test_arrivals_prolong_it(make_pool, make_client):
    """B24: linger_timeout is between two of them: an upload that takes longer survives."""
    limit = unhurried(0.6)
    pool = make_pool(rejecting(), framing=FRAMES, linger_timeout=limit)
    (client,) = lingering(pool, make_client)
    for _ in range(20):
        client.sendall(b"x" * 1000)
        time.sleep(limit / 12)
    assert len(pool) == 1
    client.close()
    wait_until(lambda: len(pool) == 0)


def test_a_flood_does_not_keep_the_others_waiting(make_pool, make_client):
    """B24: what is dropped is dropped in small turns."""
    over = threading.Event()

    def on_message(sock, data):
        if data.startswith(b"flood"):
            sock.send(REPLY)
            sock.close()
        else:
            sock.send(data)

    pool = make_pool(handler(on_message=on_message), workers=1, linger_timeout=0.5)
    flood, good = make_client(pool), make_client(pool)

    def run():
        with contextlib.suppress(OSError):
            while not over.is_set():
                flood.sendall(b"flood" * 20000)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert recv_exact(flood, len(REPLY)) == REPLY
        took = []
        for _ in range(scaled(100, 20)):
            begin = time.monotonic()
            good.sendall(b"hello")
            assert recv_exact(good, 5) == b"hello"
            took.append(time.monotonic() - begin)
        took.sort()
        assert took[len(took) // 2] < patient(0.05)
    finally:
        over.set()
        thread.join()


def test_stop_ends_it(make_pool, make_client):
    """B24: a peer that never closes does not hold up stop() for longer than the drain."""
    pool = make_pool(rejecting(), framing=FRAMES, linger_timeout=60)
    clients = lingering(pool, make_client, 5)
    begin = time.monotonic()
    pool.stop(drain=0.3)
    assert time.monotonic() - begin < 0.3 + patient(0.7)
    for client in clients:
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_descriptors_come_back(make_pool, make_client):
    """B20, B24: peers that close, that reset, and that are cut off while they are waited for."""
    pool = make_pool(rejecting(), framing=FRAMES, linger_timeout=unhurried(0.5))
    before = len(open_fds())
    number = scaled(60, 12)
    with contextlib.ExitStack() as stack:
        clients = lingering(pool, lambda pool: stack.enter_context(connect(pool)), number)
        assert len(open_fds()) == before + 2 * number
        for client in clients[::3]:
            client.close()
        for client in clients[1::3]:
            reset(client)
        wait_until(lambda: len(pool) == 0)
    assert len(open_fds()) == before
    assert pool.stats().closed == number


# ------------------------------------------------------------------------------------------------------- abort


def ends_with_reset(client, within=2.0):
    """True when the connection ends with a reset, whatever had arrived before; False: with a FIN."""
    client.settimeout(patient(within))
    try:
        recv_until_eof(client)
    except ConnectionResetError:
        return True
    return False


@every_trigger
@pytest.mark.parametrize("said", [b"", b"hello", b"much"], ids=["silent", "talked", "output waits"])
def test_abort_resets_at_once(make_pool, make_client, said, trigger):
    """B25: also while output waits, with a peer that reads nothing."""
    ends = []

    def on_message(sock, data):
        sock.send(MUCH if data == b"much" else data)

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: ends.append(reason)),
        trigger=trigger,
        linger_timeout=30,
    )
    client = make_client(pool)
    client.sendall(said)
    if said:
        assert select.select([client], [], [], patient(10))[0]
    (ours,) = open_sockets(pool, 1)
    if said == b"much":
        wait_until(lambda: pool.stats().bytes_out > 0)
    begin = time.monotonic()
    assert ours.close(abort=True) is True
    assert ours.close(abort=True) is False
    assert ours.close() is False
    wait_until(lambda: ends and len(pool) == 0)
    assert ends_with_reset(client)
    assert time.monotonic() - begin < patient(1)
    assert ours.close(abort=True) is False
    assert ends == [None]
    with pytest.raises(ConnectionClosed):
        ours.send(b"x")


def test_abort_in_the_handler(make_pool, make_client):
    """B25: nothing that the handler has queued arrives behind it."""

    def on_message(sock, data):
        sock.close(abort=True)
        with pytest.raises(ConnectionClosed):
            sock.send(b"never")

    pool = make_pool(handler(on_message=on_message))
    for _ in range(scaled(20, 3)):
        client = make_client(pool)
        client.sendall(b"x")
        assert ends_with_reset(client)
    wait_until(lambda: len(pool) == 0)


def test_abort_after_close_does_not_wait_for_the_peer(make_pool, make_client):
    """B25: a close that waits for its output becomes an abort; it had begun before."""
    ends = []

    def on_message(sock, data):
        sock.send(MUCH)
        sock.close()

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: ends.append(reason)), linger_timeout=30
    )
    client = make_client(pool)
    client.sendall(b"x")
    assert select.select([client], [], [], patient(10))[0]
    (ours,) = open_sockets(pool, 1)
    wait_until(lambda: ours.closed)
    time.sleep(0.2)  # a window in which it would end by itself
    assert len(pool) == 1
    assert ours.close(abort=True) is False
    wait_until(lambda: len(pool) == 0, 2)
    assert ends_with_reset(client)
    assert ends == [None]


def test_abort_ends_lingering(make_pool, make_client):
    """B25: what is left is the descriptor; on_disconnect was called and is not called again."""
    ends, sockets = [], []

    def on_message(sock, data):
        sockets.append(sock)
        sock.send(REPLY)
        sock.close()

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: ends.append(reason)),
        framing=FRAMES,
        linger_timeout=30,
    )
    (client,) = lingering(pool, make_client)
    assert sockets[0].close(abort=True) is False
    wait_until(lambda: len(pool) == 0, 2)
    assert ends_with_reset(client) or client.recv(1) == b""  # its FIN had come first
    assert ends == [None]


def test_threads_that_abort_and_close_at_once(make_pool, make_client):
    """B25: one of them began it; it ends once."""
    ends = []
    pool = make_pool(handler(on_disconnect=lambda sock, reason: ends.append(reason)))
    for i in range(scaled(30, 5)):
        client = make_client(pool)
        (ours,) = open_sockets(pool, 1)
        in_threads(*(functools.partial(ours.close, abort=abort) for abort in (True, False, True, False)))
        wait_until(lambda: len(pool) == 0)
        wait_until(lambda i=i: len(ends) == i + 1)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_abort_over_a_unix_socket(make_pool):
    """B25: where there is no reset, it is at least the end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(patient(10))
    with ours:
        pool = make_pool(handler())
        added = pool.addsocket(theirs)
        added.send(MUCH)
        assert added.close(abort=True) is True
        with contextlib.suppress(ConnectionResetError):
            assert len(recv_until_eof(ours)) < len(MUCH)
        wait_until(lambda: len(pool) == 0)


# ------------------------------------------------------------------------------------------ it ends with an error

UNBOUNDED = pack(bytes(64 << 20))[:4]  # announces a message of 64 MiB: more than any framing here allows


def complaining(raises=False, ends=None):
    """Replies to messages; on_error says what was wrong, and the connection ends."""

    def on_message(sock, data):
        if raises:
            raise LookupError("no such thing")
        sock.send_message(b"got " + data[:10])

    def on_error(sock, error):
        sock.send_message(type(error).__name__.encode())

    def on_disconnect(sock, reason):
        if ends is not None:
            ends.append(reason)

    return handler(on_message=on_message, on_error=on_error, on_disconnect=on_disconnect)


def goes_on_sending(client, size, pause=0.0):
    """A thread that sends so many bytes, whatever comes back. Returns it, and the list for the error that stops it."""
    stopped = []

    def send():
        try:
            for _ in range(size // len(UPLOAD)):
                client.sendall(UPLOAD)
                time.sleep(pause)
        except OSError as error:
            stopped.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    return thread, stopped


@pytest.mark.parametrize("before", [0, 3])
@every_trigger
def test_who_sends_too_large_a_message_is_told_so(make_pool, trigger, before):
    """B24, B30: the peer is in the middle of it; the replies that were due, and that of on_error, arrive, then the end.
    None of what it sends meanwhile is kept."""
    ends = []
    pool = make_pool(complaining(ends=ends), framing=FRAMES, trigger=trigger)
    rounds = scaled(10, 2)
    replies = pack(*[b"got hello"] * before, b"MessageTooLarge")
    for _ in range(rounds):
        with connect(pool, 30) as client:
            client.sendall(pack(*[b"hello"] * before) + UNBOUNDED)
            thread, stopped = goes_on_sending(client, 8 << 20)
            try:
                assert recv_until_eof(client) == replies
            finally:
                thread.join()
            assert stopped == []
    wait_until(lambda: len(pool) == 0)
    assert [type(reason).__name__ for reason in ends] == ["MessageTooLarge"] * rounds


def test_who_has_announced_too_much_is_told_so_before_it_sends_it(make_pool, make_client):
    """B24, B30: when the server closes nothing is unread; that the peer goes on is known all the same."""
    pool = make_pool(complaining(), framing=FRAMES)
    client = make_client(pool)
    client.sendall(UNBOUNDED)
    reply = pack(b"MessageTooLarge")
    assert recv_exact(client, 1) == reply[:1]
    thread, stopped = goes_on_sending(client, 8 << 20, 0.01)  # a reset would come back meanwhile
    thread.join()
    assert stopped == []
    assert recv_until_eof(client) == reply[1:]
    client.close()
    wait_until(lambda: len(pool) == 0)


def test_a_compiled_handlers_peer_is_told_too(make_pool):
    """B24, B30: the same where no handler of Python's is called for messages."""

    class Told(Commands):
        def on_error(self, sock, error):
            sock.send_message(type(error).__name__.encode())

    pool = make_pool(Told(), framing=FRAMES, workers=2, shards=2)
    for _ in range(scaled(10, 2)):
        with connect(pool, 30) as client:
            client.sendall(UNBOUNDED)
            thread, stopped = goes_on_sending(client, 4 << 20)
            try:
                assert recv_until_eof(client) == pack(b"MessageTooLarge")
            finally:
                thread.join()
            assert stopped == []
    wait_until(lambda: len(pool) == 0)


def test_a_line_that_never_ends(make_pool):
    """B24, B30: with a delimiter, too."""
    pool = make_pool(complaining(), framing=Delimited(max_message=100_000))
    for _ in range(scaled(10, 2)):
        with connect(pool, 30) as client:
            thread, stopped = goes_on_sending(client, 8 << 20)
            try:
                assert recv_until_eof(client) == b"MessageTooLarge\n"
            finally:
                thread.join()
            assert stopped == []
    wait_until(lambda: len(pool) == 0)


@every_trigger
def test_a_handlers_exception_is_told_to_a_peer_that_still_sends(make_pool, trigger):
    """B24, B51: what on_error sends arrives, and then a clean end."""
    ends = []
    pool = make_pool(complaining(raises=True, ends=ends), framing=FRAMES, trigger=trigger)
    rounds = scaled(10, 2)
    for _ in range(rounds):
        with connect(pool, 30) as client:
            client.sendall(pack(b"first") + UPLOAD[:1000])
            thread, stopped = goes_on_sending(client, 8 << 20)
            try:
                assert recv_until_eof(client) == pack(b"LookupError")
            finally:
                thread.join()
            assert stopped == []
    wait_until(lambda: len(pool) == 0)
    assert [type(reason).__name__ for reason in ends] == ["LookupError"] * rounds


def test_who_sends_too_much_for_ever_is_cut_off(make_pool):
    """B24, B38: six times linger_timeout, as anybody else whose connection was closed."""
    limit = unhurried(0.2)
    pool = make_pool(complaining(), framing=FRAMES, linger_timeout=limit)
    begin = time.monotonic()
    with connect(pool, 30) as client:
        client.sendall(UNBOUNDED)
        thread, stopped = goes_on_sending(client, 1 << 40, 0.01)
        thread.join(patient(20))
        assert stopped, "it was not cut off"
    assert time.monotonic() - begin >= 6 * limit
    wait_until(lambda: len(pool) == 0)
    assert pool.stats().deadline_closed == 1
