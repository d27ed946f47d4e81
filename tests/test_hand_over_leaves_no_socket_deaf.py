"""What a model of the hand-over between workers found (tests/model): each left a socket deaf, or a FIN late."""

import contextlib
import socket
import threading
import time

import pytest
from contract_helpers import handler
from helpers import connect, patient, recv_exact, recv_until_eof, scaled, wait_until

from tstpool import ConnectionClosed, TstHandler, TstStat


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_a_send_whose_last_bytes_another_worker_sends_is_finished(make_pool, trigger):
    """The handler blocks, its shard is taken over; it sends, and returns SEND while the other worker is sending."""
    spin = [0.0]

    class Late(TstHandler):
        def on_message(self, sock, data):
            time.sleep(0.012)  # so long that the shard is taken over
            sock.send(b"a" * 200_000)
            until = time.perf_counter() + spin[0]
            while time.perf_counter() < until:
                pass
            sock.send_data.req_len = 4
            sock.send_data.s[:4] = b"part"
            return TstStat.SEND

        def on_writable(self, sock):
            sock.send(b"END")

    pool = make_pool(Late(), workers=4, trigger=trigger)
    for n in range(scaled(80, minimum=20)):
        spin[0] = n % 40 * 5e-6
        with connect(pool, timeout=3) as client:
            client.sendall(b"x")
            time.sleep(0.008)
            client.sendall(b"y")  # comes while the first one's handler is stuck
            got = b""
            while not got.endswith(b"END"):
                got = (got + client.recv(1 << 20))[-8:]


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_a_close_whose_last_bytes_another_thread_sends_ends_at_once(make_pool, trigger):
    pool = make_pool(TstHandler(), workers=4, trigger=trigger)
    for _ in range(scaled(1000, minimum=100)):
        with connect(pool, timeout=3) as client:
            (sock,) = wait_until(pool.sockets)
            sock.send(b"x" * 200_000)
            sock.close()
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                sock.flush(1)
            assert len(recv_until_eof(client)) == 200_000
        wait_until(lambda: not pool.sockets())


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_a_long_queue_that_the_kernel_takes_in_large_pieces_goes_out_whole(make_pool, trigger):
    """After some rounds of send() the others get their turn, and EPOLLOUT carries on, although the kernel has room."""
    size = 64 << 20

    def on_message(sock, data):
        for _ in range(size // 4096):
            sock.send(b"x" * 4096)

    pool = make_pool(handler(on_message=on_message), workers=2, trigger=trigger, max_queued=None)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        client.settimeout(patient(5))
        client.connect(pool.addresses[0])
        client.sendall(b"go")
        received = 0
        while received < size:
            received += len(client.recv(1 << 20))


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_input_that_came_while_on_writable_was_stuck_is_read(make_pool, make_client, trigger):
    got, inside, go_on = [], threading.Event(), threading.Event()

    class Stuck(TstHandler):
        def on_message(self, sock, data):
            got.append(data)

        def on_writable(self, sock):
            if not inside.is_set():
                inside.set()
                go_on.wait(10)
                sock.send_data.req_len = 5
                sock.send_data.s[:5] = b"hello"
                return TstStat.SEND

    pool = make_pool(Stuck(), workers=4, trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    pool.need_send(sock)
    assert inside.wait(10)
    time.sleep(0.05)  # the shard is taken over meanwhile
    client.sendall(b"request")
    time.sleep(0.05)  # and the event has been left to the stuck worker
    go_on.set()
    assert recv_exact(client, 5) == b"hello"
    wait_until(lambda: got == [b"request"])


def test_need_send_before_on_connect_has_run_is_not_forgotten(make_pool):
    events = []
    pool = make_pool(
        handler(
            on_connect=lambda sock: events.append("connect"),
            on_writable=lambda sock: events.append("writable"),
            on_message=lambda sock, data: None,
        ),
        listen=None,
        start=False,
    )
    ours, theirs = socket.socketpair()
    with ours:
        assert pool.need_send(pool.addsocket(theirs)) is True
        pool.start()
        wait_until(lambda: events == ["connect", "writable"])
