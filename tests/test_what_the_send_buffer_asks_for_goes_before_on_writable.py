"""S6, S7: need_send() while much waits: what send_data asks for is sent first, then on_writable is called."""

import contextlib
import socket

from contract_helpers import echo, every_trigger, handler, round_trip
from helpers import patient, recv_exact, wait_until

from tstpool import SendQueueFull

MOST = 200_000


@every_trigger
def test_it_waits_for_room_as_the_call_does(make_pool, trigger):
    """S6, S7: when the handler is told that there is room, its request has been met."""
    calls = []

    def on_writable(sock):
        calls.append((sock.send_data.req_len, sock.send_data.com_len))

    pool = make_pool(
        handler(on_message=echo, on_writable=on_writable),
        listen=None,
        workers=1,
        trigger=trigger,
        low_water=100,
        high_water=1000,
        max_queued=MOST,
    )
    (deaf, theirs), (other, others) = socket.socketpair(), socket.socketpair()
    with deaf, other:
        for client in (deaf, other):
            client.settimeout(patient(10))
        sock = pool.addsocket(theirs)
        pool.addsocket(others)
        taken = [0]

        def is_full():
            with contextlib.suppress(SendQueueFull):
                while True:
                    sock.send(bytes(50_000))
                    taken[0] += 50_000
            with contextlib.suppress(TimeoutError):
                sock.flush(0.01)
            return pool.stats().bytes_queued >= MOST

        def settle():
            for _ in range(2):  # then its worker has done whatever it was asked for before
                assert round_trip(other, b"hello") == b"hello"

        wait_until(is_full)
        settle()
        calls.clear()  # while it was filled the kernel may have taken all that waited
        sock.send_data.s[:4] = b"tail"
        sock.send_data.req_len = 4
        assert pool.need_send(sock) is True
        settle()
        assert calls == []
        assert recv_exact(deaf, taken[0] + 4).endswith(b"\0tail")
        wait_until(lambda: calls)
        assert calls[-1] == (4, 4)
