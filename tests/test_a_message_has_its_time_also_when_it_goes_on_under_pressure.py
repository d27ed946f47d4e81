"""message_timeout is for each message, also where each of its bytes comes while the server has too much to send."""

import contextlib
import socket
import time

import pytest
from contract_helpers import every_trigger, handler, open_sockets
from helpers import patient, recv_exact, wait_until

from tstpool import ConnectionClosed, Delimited, LengthPrefixed, TstSockType

LIMIT = patient(0.4)
PUSH = bytes(400_000)  # more than high_water and the socket buffers


@pytest.mark.parametrize(
    ("framing", "first"),
    [(Delimited(b"\n"), b"begin"), (LengthPrefixed(4), b"\0\0\x10\0begin")],
    ids=["delimited", "length"],
)
@every_trigger
def test_a_byte_under_pressure_gives_it_no_new_time(make_pool, trigger, framing, first):
    """The peer reads all that it is sent, but first it sends one more byte of a message that does not end."""
    ends, messages = [], []
    hooks = handler(
        on_message=lambda sock, data: messages.append(bytes(data)),
        on_disconnect=lambda sock, reason: ends.append((time.monotonic(), reason)),
    )
    pool = make_pool(
        hooks,
        listen=None,
        framing=framing,
        workers=2,
        trigger=trigger,
        message_timeout=LIMIT,
        write_timeout=patient(5),
        max_queued=None,
        drain=0,
    )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        pool.addsocket(listener, TstSockType.LISTEN)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.settimeout(patient(10))
        client.connect(pool.addresses[0])
        (sock,) = open_sockets(pool, 1)
        begin = time.monotonic()
        client.sendall(first)
        wait_until(lambda: pool.stats().bytes_in == len(first))
        pauses = 0
        with contextlib.suppress(OSError, EOFError, ConnectionClosed):
            while not ends and time.monotonic() - begin < 5 * LIMIT:
                sock.send(PUSH)
                client.sendall(b"x")
                wait_until(lambda pauses=pauses: ends or pool.stats().auto_pauses > pauses)
                pauses = pool.stats().auto_pauses
                recv_exact(client, len(PUSH))
                following = time.monotonic() + LIMIT / 2
                wait_until(lambda following=following: ends or time.monotonic() > following)
        assert pauses, "it was never pressed"
        wait_until(lambda: ends, 0.2, "its time is over, but it is not closed")
    ((ended, reason),) = ends
    print(f"limit {LIMIT} s, took {ended - begin:.3f} s")
    assert isinstance(reason, TimeoutError)
    assert LIMIT <= ended - begin < 4 * LIMIT
    assert pool.stats().message_closed == 1
    assert messages == []
