"""B34, B35: max_queued bounds the memory that waits for a peer, not only its bytes, however small the pieces are."""

from helpers import SANITIZER, patient, run_python

MOST = 16 << 20

SCENE = """
import socket, sys, time
from tstpool import Fixed, TstHandler, TstPool, TstSockType

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def small(sock):
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
    return sock
"""

IDLE_PEERS = """
pool = TstPool(TstHandler(), workers=1, max_queued=65536)
peers = []
for _ in range(16):
    ours, theirs = map(small, socket.socketpair())
    peers.append(ours)
    pool.addsocket(theirs)
pool.start()
assert pool.broadcast(b"x") == 16
before, taken = resident(), 1
while taken < 100_000 and pool.broadcast(b"x"):
    taken += 1
grown = resident() - before
assert taken < 100_000, "there was no limit"
# What the kernel took of a piece is counted until all of the piece is gone: 1,000 bytes at most, of one byte each.
assert pool.stats().bytes_queued <= 16 * (65536 + 1000), pool.stats().bytes_queued
for ours in peers:
    ours.close()
assert pool.stop(2) is True
print(grown, taken)
"""

BUSY_PEER = """
class Chat(TstHandler):
    def on_message(self, sock, data):
        pool.broadcast(b"x")
        return b"y"

pool = TstPool(Chat(), workers=1, framing=Fixed(1))
listener = small(socket.socket())
listener.bind(("127.0.0.1", 0))
listener.listen()
address = listener.getsockname()
pool.addsocket(listener, TstSockType.LISTEN)
pool.start()
client = small(socket.socket())
client.connect(address)
client.setblocking(False)
while not pool.sockets():
    time.sleep(0.001)
before, deadline = resident(), time.monotonic() + float(sys.argv[1])
while pool.stats().auto_pauses == 0:
    assert time.monotonic() < deadline, pool.stats()
    try:
        client.send(b"?" * 1000)
    except BlockingIOError:
        time.sleep(0.001)
grown, messages = resident() - before, pool.stats().messages
client.close()
assert pool.stop(2) is True
print(grown, messages)
"""


def grown(code):
    """By how many bytes the memory grew that a server in a process of its own had in use."""
    grown, count = map(int, run_python("-c", SCENE + code, str(patient(30))).stdout.split())
    print(f"{grown >> 20} MiB more after {count} pieces")
    return grown


def test_broadcasts_of_one_byte_to_peers_that_do_not_read():
    """B34, B35: 64 KiB may wait for each of sixteen peers, in pieces of one byte."""
    more = grown(IDLE_PEERS)
    assert SANITIZER or more < MOST, f"{more >> 20} MiB"


def test_replies_between_broadcasts_to_a_peer_that_does_not_read():
    """B34, B35: the peer's own requests make both, so that each reply begins a chunk behind a broadcast's piece."""
    more = grown(BUSY_PEER)
    assert SANITIZER or more < MOST, f"{more >> 20} MiB"
