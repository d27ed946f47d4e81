"""DESIGN 4: sock.pause() and sock.resume(): the kernel holds what arrives, and the peer is slowed down by it."""

import socket
import threading
import time

import pytest
from contract_helpers import echo, every_style, every_trigger, handler, ignore, round_trip, serve
from helpers import SANITIZER, patient, process_cpu_seconds, recv_exact, reset, wait_until

from tstpool import LengthPrefixed


def talk_to(client, rounds=20):
    """The only worker has been round its loop as many times when this returns."""
    for _ in range(rounds):
        assert round_trip(client, b"tick") == b"tick"


def collector(got):
    def collect(sock, data):
        if sock.user_data == "paused":
            got.append(data)
        else:
            sock.send(data)

    return collect


@every_style
@every_trigger
def test_nothing_is_delivered_until_it_is_resumed(make_pool, make_client, style, trigger):
    """One worker serves another connection meanwhile, so it would have noticed."""
    got = []
    pool = serve(make_pool, style, collector(got), trigger=trigger, workers=1)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.user_data = "paused"
    other = make_client(pool)
    for i in range(5):
        sock.pause()
        client.sendall(b"%d" % i)
        talk_to(other)
        assert len(got) == i
        sock.resume()
        wait_until(lambda i=i: len(got) == i + 1)
    assert b"".join(got) == b"01234"


@every_trigger
@pytest.mark.parametrize("hook", ["on_connect", "on_message"])
def test_a_handler_pauses_its_own_socket(make_pool, make_client, trigger, hook):
    """Data that comes afterwards waits; another thread resumes."""
    got, guests = [], []

    def pause(sock):
        sock.pause()
        sock.user_data = "paused"

    def on_connect(sock):
        guests.append(sock)
        if len(guests) == 1:
            pause(sock)

    def on_message(sock, data):
        if data == b"pause":
            pause(sock)
        else:
            collector(got)(sock, data)

    hooks = {"on_connect": on_connect} if hook == "on_connect" else {}
    pool = make_pool(handler(on_message=on_message, **hooks), trigger=trigger, workers=1)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    if hook == "on_message":
        client.sendall(b"pause")
    wait_until(lambda: sock.user_data == "paused")
    client.sendall(b"later")
    talk_to(make_client(pool))
    assert got == []
    sock.resume()
    wait_until(lambda: got)
    assert got == [b"later"]


@every_trigger
def test_a_paused_socket_still_sends(make_pool, make_client, trigger):
    """Only reading stops; need_send and send work, also four megabytes."""
    fired = threading.Event()
    pool = make_pool(handler(on_message=ignore, on_writable=lambda sock: fired.set()), trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.pause()
    client.sendall(b"unread")
    sock.send(b"z" * (4 << 20))
    assert recv_exact(client, 4 << 20) == b"z" * (4 << 20)
    pool.need_send(sock)
    assert fired.wait(10)


@every_trigger
def test_the_peer_is_slowed_down_and_the_pool_is_quiet(make_pool, make_client, trigger):
    """The kernel's buffers fill up, the sender gets EAGAIN, no CPU is used; everything arrives afterwards."""
    total = [0]

    def count(sock, data):
        total[0] += len(data)

    pool = make_pool(handler(on_message=count), trigger=trigger, workers=2)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.pause()
    client.settimeout(0.2)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            cpu = process_cpu_seconds()  # of the call that waits in vain: the kernel may find room for a little more
            sent += client.send(b"x" * 65536)
    assert process_cpu_seconds() - cpu < 0.15
    assert total[0] == 0
    client.settimeout(patient(10))
    sock.resume()
    client.sendall(b"the rest")
    wait_until(lambda: total[0] == sent + 8)


@every_trigger
def test_data_and_fin_wait_for_resume(make_pool, make_client, trigger):
    """S26, B17: nothing is lost when the peer leaves meanwhile."""
    got, reasons = [], []
    pool = make_pool(
        handler(on_message=collector(got), on_disconnect=lambda s, reason: reasons.append(reason)),
        trigger=trigger,
        workers=1,
    )
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.user_data = "paused"
    sock.pause()
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    talk_to(make_client(pool))
    assert (got, reasons) == ([], [])
    sock.resume()
    wait_until(lambda: reasons)
    assert (b"".join(got), reasons) == (b"last words", [None])


def test_pause_and_resume_any_number_of_times(make_pool, make_client):
    """They don't count: one resume ends any number of pauses, and resuming twice is harmless."""
    pool = make_pool(handler(on_message=echo), workers=1)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    for _ in range(3):
        sock.pause()
    sock.resume()
    assert round_trip(client, b"hello") == b"hello"
    sock.resume()
    assert round_trip(client, b"hello") == b"hello"


@every_trigger
def test_a_reset_while_paused_waits_quietly(make_pool, make_client, trigger):
    """B16, B19: epoll reports an error whatever it was asked for; nobody spins on it, and resume() ends the socket."""
    reasons = []
    pool = make_pool(
        handler(on_message=echo, on_disconnect=lambda sock, reason: reasons.append(type(reason))), trigger=trigger
    )
    client = make_client(pool)
    round_trip(client, b"hello")
    (sock,) = pool.sockets()
    sock.pause()
    reset(client)
    round_trip(make_client(pool), b"the reset has been seen")
    cpu = process_cpu_seconds()
    time.sleep(0.3)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < (0.25 if SANITIZER else 0.1)
    sock.resume()
    wait_until(lambda: reasons)
    assert reasons == [ConnectionResetError]


@every_trigger
def test_a_reset_while_messages_wait_for_resume_is_no_spin(make_pool, make_client, trigger):
    """B21: output breaks while the handler has more messages to come: nothing is done until resume(), then all is."""
    got, reasons, socks = [], [], []

    def on_message(sock, data):
        got.append(bytes(data))
        if data == b"first":
            socks.append(sock)
            sock.pause()
            sock.send(b"x" * (16 << 20))  # more than the kernel takes: the rest waits for the peer

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: reasons.append(reason)),
        trigger=trigger,
        framing=LengthPrefixed(4),
        auto_pause=False,
    )
    client = make_client(pool)
    client.sendall(b"".join(len(data).to_bytes(4, "big") + data for data in (b"first", b"second")))
    client.recv(1)
    wait_until(lambda: pool.stats().bytes_queued)
    reset(client)
    wait_until(lambda: pool.stats().bytes_queued == 0)  # the reset was seen: what could not be sent is dropped
    cpu = process_cpu_seconds()
    time.sleep(0.5)  # a window to measure in, not a wait; who spins gets a fifth of it on a busy machine, too
    assert process_cpu_seconds() - cpu < (0.25 if SANITIZER else 0.05)
    assert (got, reasons) == ([b"first"], [])
    socks[0].resume()
    wait_until(lambda: reasons)
    assert got == [b"first", b"second"]
    assert isinstance(reasons[0], ConnectionError)
