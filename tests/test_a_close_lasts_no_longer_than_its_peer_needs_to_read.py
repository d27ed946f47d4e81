"""After a long reply only the peer's reading is waited for: not by stop(), and by the next client only until it is
done."""

import select
import socket
import time

import pytest
from contract_helpers import every_trigger, handler
from helpers import patient, recv_exact, recv_until_eof, wait_until

from tstpool import Delimited, TstStat

LINGER = patient(5.0)  # more than any time-out below
LONG = 1 << 20

framed_or_not = pytest.mark.parametrize("framing", [None, Delimited()], ids=["raw", "framed"])


class Replies:
    """Replies to the first message, and disconnects."""

    def __init__(self, size):
        self.reply = bytes(range(256)) * (size // 256)
        self.ends = []
        self.handler = handler(on_message=self.on_message, on_disconnect=self.on_disconnect)

    def on_message(self, sock, data):
        sock.send(self.reply)
        return TstStat.DISCONNECT

    def on_disconnect(self, sock, reason):
        self.ends.append(reason)


@pytest.fixture
def make_reader():
    """make_reader(pool) -> a client whose kernel takes little, that has asked."""
    readers = []

    def make(pool):
        reader = socket.socket()
        readers.append(reader)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reader.settimeout(patient(10))
        reader.connect(pool.addresses[0])
        reader.sendall(b"go\n")
        return reader

    yield make
    for reader in readers:
        reader.close()


def closed_before_it_was_read(make_pool, make_reader, replies, **options):
    """A pool, and a client of it whose reply is in the kernel's hands, and whose handler is through with it."""
    pool = make_pool(replies.handler, workers=2, linger_timeout=LINGER, max_queued=None, drain=0, **options)
    reader = make_reader(pool)
    wait_until(lambda: replies.ends)
    assert replies.ends == [None]
    return pool, reader


@pytest.mark.parametrize("size", [LONG, LONG + (1 << 19)])
@framed_or_not
@every_trigger
def test_stop_does_not_wait_for_a_peer_that_has_sent_nothing_more(make_pool, make_reader, trigger, framing, size):
    """The kernel has it all and goes on sending: the peer gets every byte, and a clean end."""
    replies = Replies(size)
    pool, reader = closed_before_it_was_read(make_pool, make_reader, replies, framing=framing, trigger=trigger)
    begin = time.monotonic()
    assert pool.stop(patient(1.5)) is True
    took = time.monotonic() - begin
    print(f"stop() took {took:.3f} s")
    assert took < patient(0.7)
    assert recv_until_eof(reader) == replies.reply


@framed_or_not
@every_trigger
def test_who_has_read_it_all_holds_no_slot(make_pool, make_reader, trigger, framing):
    """It keeps its side open. Until it has read, the next one waits."""
    replies = Replies(LONG)
    pool, reader = closed_before_it_was_read(
        make_pool, make_reader, replies, framing=framing, trigger=trigger, max_connections=1
    )
    following = make_reader(pool)
    assert not select.select([following], [], [], 0.15)[0]
    assert len(pool) == 1
    assert recv_exact(reader, LONG) == replies.reply
    begin = time.monotonic()
    following.settimeout(patient(1.0))
    assert recv_exact(following, 1) == replies.reply[:1]
    print(f"the next was served after {time.monotonic() - begin:.3f} s")
    assert reader.recv(1) == b""
    assert pool.stats().linger_closed == 0
