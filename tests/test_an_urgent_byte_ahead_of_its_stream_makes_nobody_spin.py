"""B23: an urgent byte that overtakes what is in front of it is reported while there is nothing to receive yet."""

import socket
import struct
import time

import pytest
from contract_helpers import ServerProcess, round_trip
from helpers import SANITIZER, connect, recv_exact, recv_until_eof, wait_until

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECEIVED, SENT = 1, 2
GAP = b"g" * 100

SERVER = """
import fcntl, termios
class Handler(TstHandler):
    def on_message(self, sock, data):
        if data == b"close":
            sock.send(b"c")
            sock.flush()
            while not fcntl.ioctl(sock.sd, termios.FIONREAD, bytes(4)).strip(b"\\0"):  # so that it lingers
                time.sleep(0.001)
            sock.close()
        elif data == b"?":
            sock.send(b"U" if sock.events & EPOLLPRI else b"-")
        else:
            sock.send(data)
pool = TstPool(Handler(), trigger={trigger!r}, workers=2)
print(pool.listen("127.0.0.1", 0)[1])
pool.start()
sys.stdin.read()
print(pool.stats().controls)
pool.stop(0)
"""
every_trigger_that_repeats = pytest.mark.parametrize("trigger", ["level", "oneshot"])


@pytest.fixture
def raw():
    """What sends segments that no kernel has made."""
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    except PermissionError:
        pytest.skip("raw sockets are not permitted here")
    with sock:
        yield sock


def sequence_numbers(client):
    """Those of the next byte that the client sends, and of the next that it expects."""
    try:
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except PermissionError:
        pytest.skip("sequence numbers are not shown here")
    numbers = []
    for queue in (SENT, RECEIVED):
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(client.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)
    return numbers


def segment_behind_a_gap(client):
    """An urgent byte as the client would send it behind GAP."""
    send, receive = sequence_numbers(client)
    ports = client.getsockname()[1], client.getpeername()[1]
    address = socket.inet_aton("127.0.0.1")
    head = struct.pack("!HHIIBBH", *ports, (send + len(GAP)) & 0xFFFFFFFF, receive, 5 << 4, 0x38, 64240)
    pseudo = address * 2 + struct.pack("!HH", 6, 21) + head + struct.pack("!HH", 0, 0) + b"!\0"
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    tcp = head + struct.pack("!HH", ~total & 0xFFFF, 0) + b"!"
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, address, address) + tcp


def check_that_it_is_quiet(server):
    cpu = server.cpu_seconds()
    time.sleep(0.3)  # a window to measure in, not a wait
    assert server.cpu_seconds() - cpu < (0.25 if SANITIZER else 0.1)


@every_trigger_that_repeats
def test_it_waits_for_the_gap_to_be_filled_and_comes_in_its_place(raw, trigger):
    """B23: no worker spins meanwhile, and later urgent bytes are in sock.events as ever."""
    with ServerProcess(SERVER.format(trigger=trigger)) as server, connect(server.addr) as client:
        assert round_trip(client, b"before") == b"before"
        raw.sendto(segment_behind_a_gap(client), ("127.0.0.1", 0))
        check_that_it_is_quiet(server)
        client.sendall(GAP)
        client.sendall(b".")  # the kernel here knows nothing of the other one, which the server has in its place
        assert recv_exact(client, len(GAP) + 1) == GAP + b"!"
        assert round_trip(client, b"after") == b"after"

        def shown():
            client.send(b"?", socket.MSG_OOB)
            return recv_exact(client, 1) == b"U"

        wait_until(shown)
        assert round_trip(client, b"end") == b"end"
        assert int(server.finish()) < 100


@every_trigger_that_repeats
def test_a_connection_that_lingers_does_not_spin_either(raw, trigger):
    """B23: it has been closed, and waits for the end of what its peer sends."""
    with ServerProcess(SERVER.format(trigger=trigger)) as server, connect(server.addr) as client:
        assert round_trip(client, b"before") == b"before"
        client.sendall(b"close")
        assert recv_exact(client, 1) == b"c"
        client.sendall(b"more")
        assert recv_until_eof(client) == b""
        raw.sendto(segment_behind_a_gap(client), ("127.0.0.1", 0))
        check_that_it_is_quiet(server)
        assert int(server.finish()) < 100
