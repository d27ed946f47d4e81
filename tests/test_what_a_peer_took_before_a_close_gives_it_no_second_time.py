"""linger_timeout begins with the close: what the peer took while write_timeout was running does not prolong it."""

import contextlib
import fcntl
import socket
import struct
import termios
import time

from contract_helpers import TRIGGERS, handler, ignore, open_sockets
from helpers import patient, recv_exact, wait_until

from tstpool import TstSockType

WRITE, LINGER = patient(2.0), patient(0.5)
SOME = 1 << 16
MUCH = bytes(8 << 20)


def kernel_holds(sock):
    """Bytes that the peer has not acknowledged: SIOCOUTQ."""
    return struct.unpack("i", fcntl.ioctl(sock.sd, termios.TIOCOUTQ, bytes(4)))[0]


class Connection:
    """One whose send buffer does not grow, in a pool of its own, and its peer, whose kernel takes little."""

    def __init__(self, make_pool, stack, trigger):
        self.ends = []
        hooks = handler(
            on_message=ignore, on_disconnect=lambda sock, reason: self.ends.append((time.monotonic(), reason))
        )
        self.pool = make_pool(
            hooks,
            listen=None,
            workers=2,
            trigger=trigger,
            write_timeout=WRITE,
            linger_timeout=LINGER,
            max_queued=None,
            drain=0,
        )
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.pool.addsocket(listener, TstSockType.LISTEN)
        self.peer = stack.enter_context(socket.socket())
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOME)
        self.peer.settimeout(patient(10))
        self.peer.connect(self.pool.addresses[0])
        (self.sock,) = open_sockets(self.pool, 1)
        self.sock.send(MUCH)

    def take_some(self):
        """Less than what makes the kernel take more, so that only a look tells that something was taken."""
        held, sent = kernel_holds(self.sock), self.pool.stats().bytes_out
        recv_exact(self.peer, SOME)
        wait_until(lambda: kernel_holds(self.sock) < held)
        assert self.pool.stats().bytes_out == sent


def test_it_is_cut_off_when_its_time_is_over(make_pool):
    """With each trigger: it takes something after the engine has looked at it for write_timeout, and never again."""
    with contextlib.ExitStack() as stack:
        connections = [Connection(make_pool, stack, trigger) for trigger in TRIGGERS]
        looked_at = time.monotonic() + 0.55 * WRITE
        wait_until(lambda: time.monotonic() > looked_at)
        for connection in connections:
            connection.take_some()
        begins = []
        for connection in connections:
            begins.append(time.monotonic())
            assert connection.sock.close() is True
        wait_until(lambda: all(connection.ends for connection in connections), 4)
        for trigger, connection, begin in zip(TRIGGERS, connections, begins, strict=True):
            ((ended, reason),) = connection.ends
            print(f"{trigger}: limit {LINGER} s, took {ended - begin:.3f} s")
            assert isinstance(reason, TimeoutError)
            assert connection.pool.stats().linger_closed == 1
            assert LINGER <= ended - begin < 1.3 * LINGER + patient(0.2)
