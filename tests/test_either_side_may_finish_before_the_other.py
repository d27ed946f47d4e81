"""A connection has two directions, and each ends by itself: on_eof, send_eof()."""

import os
import socket
import threading

import downstream_handlers
import pytest
from compiled_helpers import FRAMING, pack, say, socket_of
from contract_helpers import echo, every_trigger, handler, ignore, round_trip
from helpers import RunningPool, connect, patient, recv_exact, recv_until_eof, reset, scaled, wait_until

import tstpool
from tstpool import ConnectionClosed, Delimited, TstHandler, TstStat

LARGE = bytes(range(256)) * 65536  # more than the socket buffers of a loopback connection hold


class Notes(TstHandler):
    """An echo that stays open when its peer has finished; notes what it is told, in order."""

    def __init__(self, verdict=None):
        self.told = []
        self.verdict = verdict

    def on_message(self, sock, data):
        self.told.append(data)
        sock.send_message(data)

    def on_eof(self, sock):
        self.told.append("eof")
        return self.verdict(sock) if self.verdict else None

    def on_disconnect(self, sock, reason):
        self.told.append(("gone", reason if reason is None else type(reason)))

    def wait_for(self, *told):
        wait_until(lambda: self.told[-len(told) :] == [*told], patient(10), lambda: f"{told} in {self.told}")


def end(sock):
    sock.send_eof()


def nobody(pool):
    return lambda: len(pool) == 0


# --------------------------------------------------------------------------------------- the peer finishes first


@every_trigger
@pytest.mark.parametrize("framing", [None, Delimited(b"\n")], ids=["raw", "lines"])
@pytest.mark.parametrize("end", ["close", "send_eof"])
def test_a_handler_with_on_eof_sends_on_for_as_long_as_it_likes(make_pool, make_client, trigger, framing, end):
    """B18, S26."""
    notes = Notes()
    pool = make_pool(notes, workers=2, trigger=trigger, framing=framing)
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.send(b"q\n", socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    assert recv_exact(client, 2) == b"q\n"
    notes.wait_for(b"q\n" if framing is None else b"q", "eof")
    for _ in range(20):  # from this thread, piece by piece
        sock.send(b"piece")
        assert recv_exact(client, 5) == b"piece"
    assert not sock.closed and len(pool) == 1
    sock.send(LARGE)
    assert getattr(sock, end)() is True
    assert recv_until_eof(client) == LARGE
    notes.wait_for("eof", ("gone", None))
    wait_until(nobody(pool))


@pytest.mark.parametrize("half_way", [False, True], ids=["from the beginning", "of the one that it gets instead"])
def test_without_on_eof_it_closes(make_pool, make_client, half_way):
    ends = []
    without = handler(on_message=echo, on_disconnect=lambda sock, reason: ends.append(reason))
    pool = make_pool(Notes() if half_way else without)
    client = make_client(pool)
    if half_way:
        socket_of(pool, client).handler = without
    assert round_trip(client, b"hello") == b"hello"
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    wait_until(lambda: ends == [None])


@pytest.mark.parametrize("verdict", ["disconnect", "closes", "raises", "replies"])
def test_what_on_eof_returns_counts_as_with_any_hook(make_pool, make_client, verdict, caplog):
    def decide(sock):
        if verdict == "disconnect":
            sock.send(b"reply\n")
            return TstStat.DISCONNECT
        if verdict == "closes":
            sock.send(b"reply\n")
            sock.close()
        if verdict == "raises":
            sock.send(b"reply\n")
            raise RuntimeError("from on_eof")
        return b"reply" if verdict == "replies" else None

    notes = Notes(decide)
    pool = make_pool(notes, framing=Delimited(b"\n"))
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.shutdown(socket.SHUT_WR)
    assert recv_exact(client, 6) == b"reply\n"
    if verdict == "replies":
        notes.wait_for("eof")
        assert not sock.closed
        sock.send_eof()
    assert client.recv(1) == b""
    notes.wait_for("eof", ("gone", RuntimeError if verdict == "raises" else None))
    assert notes.told.count("eof") == 1


def test_on_eof_comes_after_the_last_message_and_may_read_what_is_no_whole_one(make_pool, make_client):
    rests = []
    notes = Notes(lambda sock: rests.append((sock.events, sock.read())))
    pool = make_pool(notes, framing=Delimited(b"\n"), workers=1)
    client = make_client(pool)
    client.send(b"one\ntwo\nthr", socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    notes.wait_for(b"one", b"two", "eof")
    assert rests == [(tstpool.EPOLLRDHUP, b"thr")]
    pool.sockets()[0].close()
    assert recv_until_eof(client) == b"one\ntwo\n"


@pytest.mark.parametrize("held_by", ["pause", "pressure"])
def test_on_eof_waits_like_a_message(make_pool, make_client, held_by):
    def hold(sock):
        if len(pool) == 1:
            if held_by == "pause":
                sock.pause()
            else:
                sock.send(LARGE)

    notes = Notes()
    notes.on_connect = hold
    pool = make_pool(notes, workers=1, max_queued=None, high_water=1000, low_water=0, start=False)
    pool.start()
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.shutdown(socket.SHUT_WR)
    other = make_client(pool)
    for _ in range(20):  # the only worker has been round its loop as many times after this
        assert round_trip(other, b"x") == b"x"
    assert "eof" not in notes.told
    if held_by == "pause":
        sock.resume()
    else:
        recv_exact(client, len(LARGE))
    notes.wait_for("eof")
    sock.close()
    recv_until_eof(client)


def test_a_function_hears_of_no_end(make_pool, make_client):
    calls = []
    pool = make_pool(lambda sock: calls.append(sock.read()))
    client = make_client(pool)
    client.sendall(b"x")
    wait_until(lambda: calls == [b"x"])
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    wait_until(nobody(pool))


def test_a_handler_that_is_assigned_hears_of_it_if_nobody_has(make_pool, make_client):
    first, second = handler(on_message=echo), Notes()
    pool = make_pool(first)
    client = make_client(pool)
    sock = socket_of(pool, client)
    assert round_trip(client, b"x") == b"x"
    sock.handler = second
    client.shutdown(socket.SHUT_WR)
    second.wait_for("eof")
    sock.handler = first  # too late: it goes on
    sock.send(b"more")
    assert recv_exact(client, 4) == b"more"
    sock.close()
    assert client.recv(1) == b""


def test_a_sockets_own_handler_passes_it_on_to_the_pools(make_pool, make_client):
    notes = Notes()
    pool = make_pool(notes)
    client = make_client(pool)
    own = handler(on_message=echo, on_eof=lambda sock: TstStat.RUN)
    sock = socket_of(pool, client)
    sock.handler = own
    assert round_trip(client, b"x") == b"x"
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    sock.close()
    assert client.recv(1) == b""


@pytest.mark.parametrize("hook", [None, "on_message"], ids=["no handler at all", "no on_eof"])
def test_passed_on_to_a_pool_that_has_no_on_eof_it_closes(make_pool, make_client, hook):
    pool = make_pool(handler(**({} if hook is None else {hook: ignore})))
    client = make_client(pool)
    socket_of(pool, client).handler = handler(on_message=ignore, on_eof=lambda sock: TstStat.RUN)
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    wait_until(nobody(pool))


# --------------------------------------------------------------------------------------------- how it ends after that


@every_trigger
def test_a_peer_that_goes_altogether_is_noticed_without_a_send(make_pool, make_client, trigger):
    """B21."""
    notes = Notes()
    pool = make_pool(notes, trigger=trigger)
    client = make_client(pool)
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    assert len(pool) == 1
    reset(client)
    wait_until(nobody(pool))
    assert notes.told[-1][0] == "gone" and issubclass(notes.told[-1][1], ConnectionError)


@every_trigger
def test_so_is_one_of_a_unix_socket(make_pool, tmp_path, trigger):
    notes = Notes()
    pool = make_pool(notes, trigger=trigger, listen=(f"unix:{tmp_path}/socket",))
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"{tmp_path}/socket")
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    client.close()
    wait_until(nobody(pool))
    notes.wait_for("eof", ("gone", None))


@every_trigger
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
@pytest.mark.parametrize("when", ["at once", "while paused", "in on_eof"])
def test_so_is_one_that_went_before_anybody_could_look(make_pool, tmp_path, trigger, family, when):
    """B21: the kernel says so before the end of input is known, or while its handler runs and another worker polls."""
    blocked, free, paused = threading.Event(), threading.Event(), threading.Event()

    def block(sock):
        blocked.set()
        free.wait(patient(10))

    def on_message(sock, data):
        if when == "while paused":
            sock.read(100)  # meets the end
            sock.pause()
            paused.set()
        if when == "at once":
            block(sock)

    notes = Notes(block if when == "in on_eof" else None)
    notes.on_message = on_message
    where = ("127.0.0.1", 0) if family == socket.AF_INET else (f"unix:{tmp_path}/socket",)
    pool = make_pool(notes, trigger=trigger, workers=1 if when == "at once" else 3, listen=where, idle_timeout=None)
    client = socket.socket(family)
    client.connect(pool.addresses[0] if family == socket.AF_INET else f"{tmp_path}/socket")
    if when == "at once":
        client.send(b"q")
        assert blocked.wait(patient(10))
    else:
        client.send(b"q", socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    if when != "at once":
        assert (paused if when == "while paused" else blocked).wait(patient(10))
    reset(client)
    free.set()
    if when == "while paused":
        pool.sockets()[0].resume()
    wait_until(nobody(pool))
    possible = [["eof"], []] if when == "at once" else [["eof"]]  # then it may be known as broken from the beginning
    assert notes.told[:-1] in possible and notes.told[-1][0] == "gone"


def test_who_says_nothing_after_it_has_idle_timeout(make_pool, make_client):
    notes = Notes()
    pool = make_pool(notes, idle_timeout=0.3, first_byte_timeout=None)
    client = make_client(pool)
    assert round_trip(client, b"x") == b"x"
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    assert client.recv(1) == b""
    notes.wait_for("eof", ("gone", TimeoutError))
    assert pool.stats().idle_closed == 1


def test_idle_timeout_counts_also_when_another_thread_has_sent_the_output(make_pool, make_client):
    """And there is no write_timeout whose timer would look."""
    blocked, free = threading.Event(), threading.Event()

    def stream(sock):
        sock.send(LARGE)

    def block(sock, data):
        blocked.set()
        free.wait(patient(10))

    notes = Notes(stream)
    options = {"idle_timeout": 0.4, "write_timeout": None, "max_queued": None, "high_water": 1 << 26}
    pool = make_pool(notes, workers=1, **options)
    client, other = make_client(pool), make_client(pool)
    sock, blocker = socket_of(pool, client), socket_of(pool, other)
    blocker.handler = handler(on_message=block)
    client.sendall(b"x")
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    wait_until(lambda: sock.queued < len(LARGE) + 1)
    other.sendall(b"block")
    blocked.wait(patient(10))
    flusher = threading.Thread(target=sock.flush)
    flusher.start()
    assert recv_exact(client, len(LARGE) + 1) == b"x" + LARGE
    flusher.join(patient(10))
    free.set()
    assert client.recv(1) == b""
    notes.wait_for(("gone", TimeoutError))


@pytest.mark.parametrize("first", ["peer", "this side"])
def test_output_that_waits_when_both_have_finished_has_its_time(make_pool, make_client, first):
    """It is not a connection that closes: linger_timeout is for those. S26."""
    notes = Notes(end)
    pool = make_pool(notes, linger_timeout=0.2, max_queued=None, auto_pause=False)
    client = make_client(pool)
    sock = socket_of(pool, client)
    sock.send(LARGE)
    if first == "this side":
        sock.send_eof()
    client.shutdown(socket.SHUT_WR)
    notes.wait_for("eof")
    with pytest.raises(AssertionError):  # three times linger_timeout
        wait_until(nobody(pool), 0.6)
    assert recv_until_eof(client) == LARGE
    notes.wait_for("eof", ("gone", None))


def test_who_has_ended_its_output_is_not_kept_by_a_pause(make_pool, make_client):
    """If its peer has finished, too, there is nobody to be answered later. on_eof comes all the same."""

    paused = threading.Event()

    def wait_for_the_answer(sock, data):
        sock.read(100)  # meets the end
        sock.pause()
        paused.set()

    notes = Notes()
    notes.on_message = wait_for_the_answer
    pool = make_pool(notes)
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.send(b"q", socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    assert paused.wait(patient(10))
    sock.send(b"answer")
    sock.send_eof()
    assert recv_until_eof(client) == b"answer"
    notes.wait_for("eof", ("gone", None))


def test_stop_waits_for_nobody_who_only_might_send(make_client):
    notes = Notes()
    with RunningPool(notes, drain=60) as pool:
        client = make_client(pool)
        client.shutdown(socket.SHUT_WR)
        notes.wait_for("eof")
        pool.sockets()[0].send(LARGE)
        reader = threading.Thread(target=lambda: notes.told.append(len(recv_until_eof(client))))
        reader.start()
    reader.join(patient(10))
    assert len(LARGE) in notes.told and ("gone", None) in notes.told


def test_each_connection_under_a_descriptor_has_its_own_end(make_pool, make_client):
    """TstStat.RECONNECTED: also where the first end was passed on to nobody."""
    told = []
    fresh, ours = socket.socketpair()
    with fresh, ours:

        def on_disconnect(sock, reason):
            told.append("gone")
            if told.count("gone") == 1:
                os.dup2(fresh.fileno(), sock.sd)
                fresh.close()
                return TstStat.RECONNECTED
            return None

        def on_eof(sock):
            told.append("eof")
            return TstStat.RUN

        pool = make_pool(handler(on_message=echo, on_eof=on_eof, on_disconnect=on_disconnect))
        client = make_client(pool)
        client.shutdown(socket.SHUT_WR)
        ours.settimeout(patient(10))
        assert round_trip(ours, b"x") == b"x"
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        wait_until(nobody(pool))
        assert told == ["eof", "gone", "eof", "gone"]


# --------------------------------------------------------------------------------------- this side finishes first


@every_trigger
def test_after_send_eof_messages_go_on_coming(make_pool, make_client, trigger):
    """B18."""
    told = []

    def on_message(sock, data):
        told.append((data, sock.send_eof() if data == b"end" else None))

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: told.append(reason)),
        trigger=trigger,
        framing=Delimited(b"\n"),
    )
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.sendall(b"end\n")
    assert client.recv(1) == b""
    for i in range(3):
        client.sendall(b"%d\n" % i)
        wait_until(lambda i=i: told[-1] == (b"%d" % i, None))
    assert told[0] == (b"end", True) and not sock.closed and sock.send_eof() is False
    for send in (sock.send, sock.send_message):
        with pytest.raises(ConnectionClosed):
            send(b"more")
    assert pool.need_send(sock) is False
    assert pool.broadcast(b"more") == 0
    sock.flush()
    client.close()
    wait_until(lambda: told[-1] is None)
    wait_until(nobody(pool))


def test_output_that_waits_goes_out_before_the_end(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore), max_queued=None)
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.sendall(b"x")
    sock.send(LARGE)
    assert sock.send_eof() is True
    assert 0 < sock.queued <= len(LARGE)
    assert recv_until_eof(client) == LARGE
    assert not sock.closed and len(pool) == 1 and sock.queued == 0


@pytest.mark.parametrize("how", ["close", "abort", "closesocket"])
def test_close_after_send_eof_is_the_close(make_pool, make_client, how):
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    sock = socket_of(pool, client)
    assert sock.send_eof() is True
    assert client.recv(1) == b""
    close = {
        "close": sock.close,
        "abort": lambda: sock.close(abort=True),
        "closesocket": lambda: pool.closesocket(sock),
    }
    assert close[how]() is True
    assert sock.closed and sock.send_eof() is False and sock.close() is False
    wait_until(nobody(pool))
    assert sock.send_eof() is False  # another connection may have the descriptor by now


def test_a_peer_that_has_gone_can_be_told_of_no_end(make_pool, make_client):
    """The shutdown fails: it is as if a send had."""
    told, gone = [], threading.Event()

    def on_message(sock, data):
        assert gone.wait(patient(10))
        told.append(sock.send_eof())

    hooks = {"on_message": on_message, "on_disconnect": lambda sock, reason: told.append(type(reason))}
    pool = make_pool(handler(**hooks))
    client = make_client(pool)
    client.sendall(b"x")
    wait_until(lambda: pool.stats().bytes_in)
    reset(client)
    gone.set()
    wait_until(nobody(pool))
    assert told in ([True, ConnectionResetError], [True, BrokenPipeError])


def test_a_client_of_the_pool_asks_finishes_and_gets_the_answer(make_pool):
    """As `nc -N` and HTTP/1.0 clients do it, with somebody else's server."""
    answers = []
    with socket.create_server(("127.0.0.1", 0)) as server, RunningPool(ignore_all(), listen=None) as pool:
        got = handler(
            on_message=lambda sock, data: answers.append(data),
            on_disconnect=lambda sock, reason: answers.append(reason),
        )
        sock = pool.connect(*server.getsockname(), handler=got)
        peer, _ = server.accept()
        with peer:
            sock.send(b"request")
            sock.send_eof()
            assert recv_until_eof(peer) == b"request"
            peer.sendall(b"answer")
        wait_until(lambda: answers[-1:] == [None])
    assert b"".join(answers[:-1]) == b"answer"


def ignore_all():
    return handler(on_message=ignore)


def test_both_may_finish_at_the_same_time(make_pool, make_client):
    """Whatever comes first: each connection ends by itself, cleanly, and is told of its peer's end once at most."""
    ends = []

    class Both(Notes):
        def on_disconnect(self, sock, reason):
            ends.append(reason)

    pool = make_pool(Both(), workers=3)
    rounds = scaled(300, 30)
    for _ in range(rounds):
        client = connect(pool)
        sock = socket_of(pool, client)
        barrier = threading.Barrier(2)

        def other(barrier=barrier, sock=sock):
            barrier.wait()
            sock.send_eof()

        thread = threading.Thread(target=other)
        thread.start()
        barrier.wait()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        thread.join()
        client.close()
    wait_until(nobody(pool), patient(10))
    wait_until(lambda: len(ends) == rounds)
    assert set(ends) == {None}


# ------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("verdict", ["end", "keep", "close", "pass"])
def test_a_compiled_handler_decides_likewise(make_pool, make_client, verdict):
    ending = downstream_handlers.Ending(verdict)
    pool = make_pool(ending, framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    assert say(client, b"hello") == [b"hello"]
    client.shutdown(socket.SHUT_WR)
    assert recv_exact(client, 4) == b"over"
    if verdict == "keep":
        wait_until(lambda: ending.eof_calls)
        sock.send(b"more")
        assert recv_exact(client, 4) == b"more"
        sock.close()
    assert client.recv(1) == b""
    wait_until(lambda: ending.disconnected_calls == 1)
    assert (ending.eof_calls, ending.wrong_results) == (1, 0)


def test_what_it_passes_on_reaches_on_eof(make_pool, make_client):
    told = []

    class Both(downstream_handlers.Ending):
        def on_eof(self, sock):
            told.append(sock.send_eof())

    ending = Both("pass")
    pool = make_pool(ending, framing=FRAMING)
    client = make_client(pool)
    client.sendall(pack(b"hello"))
    client.shutdown(socket.SHUT_WR)
    assert recv_until_eof(client) == pack(b"hello") + b"over"
    wait_until(nobody(pool))
    assert told == [True] and ending.eof_calls == 1


def test_one_that_was_compiled_without_the_hook_closes(make_pool, make_client):
    pool = make_pool(downstream_handlers.Hearing(), framing=FRAMING)
    client = make_client(pool)
    assert say(client, b"hello") == [b"hello"]
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    wait_until(nobody(pool))


def test_one_that_waits_for_room_is_still_told_of_it(make_pool, make_client):
    """B18: it has no `eof`, so the end of its peer's input changes nothing of that."""
    pool = make_pool(downstream_handlers.Commands(), framing=FRAMING, max_queued=None, auto_pause=False)
    client = make_client(pool)
    bodies = [b"e" + LARGE[: 1 << 19]] * 16
    sender = threading.Thread(target=lambda: (client.sendall(pack(*bodies, b"n")), client.shutdown(socket.SHUT_WR)))
    sender.start()
    sender.join(patient(10))  # all of it is read, although nobody takes the echoes
    wait_until(lambda: pool.stats().messages == len(bodies) + 1)
    assert recv_until_eof(client) == pack(*bodies) + b"writable;"


@pytest.mark.parametrize("late", [None, "resume"], ids=["at once", "while it is paused"])
def test_a_handler_that_comes_in_the_middle_of_a_long_message_is_told_of_its_end(make_pool, make_client, late):
    """Nobody gets what has come of that message."""
    notes = Notes()
    pool = make_pool(handler(on_message=ignore), framing=FRAMING)
    client = make_client(pool)
    client.sendall(pack(LARGE[: 1 << 20])[: 1 << 19])
    sock = socket_of(pool, client)
    wait_until(lambda: pool.stats().bytes_in == 1 << 19)
    sock.handler = notes
    if late:
        sock.pause()
    client.shutdown(socket.SHUT_WR)
    if late:
        sock.resume()
    notes.wait_for("eof")
    sock.send(b"over")
    sock.close()
    assert recv_until_eof(client) == b"over"


def test_a_sockets_own_handler_passes_it_on_to_a_compiled_one(make_pool, make_client):
    ending = downstream_handlers.Ending("close")
    pool = make_pool(ending, framing=FRAMING)
    client = make_client(pool)
    socket_of(pool, client).handler = handler(on_message=ignore, on_eof=lambda sock: TstStat.RUN)
    client.shutdown(socket.SHUT_WR)
    assert recv_until_eof(client) == b"over"
    wait_until(lambda: ending.disconnected_calls == 2)  # when the other one came, and at the end
    assert ending.eof_calls == 1
