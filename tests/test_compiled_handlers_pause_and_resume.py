"""S26, B18: tst_pause() and tst_resume(): a compiled handler holds its peer back, and answers later."""

import errno
import socket
import threading

import downstream_handlers
import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of
from contract_helpers import every_trigger
from downstream_handlers import Commands
from helpers import patient, recv_until_eof, wait_until


def talk_to(client, rounds=20):
    """The only worker has been round its loop as many times when this returns."""
    for _ in range(rounds):
        assert say(client, b"echo") == [b"echo"]


@every_trigger
@pytest.mark.parametrize("together", [True, False], ids=["in-a-burst", "later"])
def test_it_gets_no_message_until_it_is_resumed(make_pool, make_client, trigger, together):
    handler = Commands()
    pool = make_pool(handler, framing=FRAMING, workers=1, trigger=trigger)
    client, other = make_client(pool), make_client(pool)
    sock = socket_of(pool, client)
    if together:
        client.sendall(pack(b"h", b"e1", b"e2"))
        wait_until(lambda: handler.counts["received"] == 1)
    else:
        client.sendall(pack(b"h"))
        wait_until(lambda: handler.counts["received"] == 1)
        client.sendall(pack(b"e1", b"e2"))
    talk_to(other)
    assert handler.counts["received"] == 21  # the other's, and the one that has paused it
    assert downstream_handlers.answer_and_resume(sock, b"answer") == 0
    assert receive(client, 3) == [b"answer", b"e1", b"e2"]


@every_trigger
def test_a_half_closed_peer_gets_what_another_thread_answers(make_pool, make_client, trigger):
    """It would be let go as soon as its messages are handled."""
    handler = Commands()
    pool = make_pool(handler, framing=FRAMING, workers=1, trigger=trigger)
    client, other = make_client(pool), make_client(pool)
    sock = socket_of(pool, client)
    client.send(pack(b"h"), socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: handler.counts["received"] == 1)
    talk_to(other)
    thread = threading.Thread(target=downstream_handlers.answer_and_resume, args=(sock, b"answer"))
    thread.start()
    assert recv_until_eof(client) == pack(b"answer")
    thread.join(patient(10))


def test_a_socket_that_is_gone_is_not_paused(make_pool, make_client):
    pool = make_pool(Commands(), framing=FRAMING)
    client = make_client(pool)
    sock = socket_of(pool, client)
    client.close()
    wait_until(lambda: sock.fileno() == -1)
    assert downstream_handlers.pause(sock) == -errno.ENOTCONN
    assert downstream_handlers.answer_and_resume(sock, b"answer") == -errno.ENOTCONN


@every_trigger
def test_what_it_passes_on_is_handed_out_although_it_has_paused(make_pool, make_client, trigger):
    """Python's on_message starts whoever answers and resumes: it would never be called. The next message waits."""
    got = []

    class Later(Commands):
        def on_message(self, sock, data):
            got.append(data)
            waiting.append(sock)

    waiting = []
    pool = make_pool(Later(), framing=FRAMING, workers=2, trigger=trigger)
    client, other = make_client(pool), make_client(pool)
    client.sendall(pack(b"e0", b"H1", b"H2", b"e3"))
    assert receive(client) == [b"e0"]
    wait_until(lambda: waiting)
    talk_to(other)
    assert got == [b"H1"]
    waiting.pop().resume()
    wait_until(lambda: waiting)
    talk_to(other)
    assert got == [b"H1", b"H2"]
    assert downstream_handlers.answer_and_resume(waiting.pop(), b"answer") == 0
    assert receive(client, 2) == [b"answer", b"e3"]


def test_what_it_passes_on_is_handed_out_although_its_peer_reads_nothing(make_pool, make_client):
    """More than high_water waits when it returns TST_RUN."""
    got = []

    class Both(downstream_handlers.PassesOn):
        def on_message(self, sock, data):
            got.append(data)

    both = Both()
    pool = make_pool(both, framing=FRAMING, workers=1, high_water=1000, low_water=0, max_queued=None)
    client = make_client(pool)

    def ask():
        before = len(got)
        client.sendall(pack(b"more"))
        wait_until(lambda: len(got) > before)
        return pool.stats().bytes_queued

    while ask() < 1000:
        pass
    assert len(got) == both.received_calls
