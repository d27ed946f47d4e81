"""Clients of the fault matrix, one generator for each kind.

A kind makes ready what it needs, yields while nobody's system calls fail yet, and then goes on. It returns None when
it got every byte that it should get, "late" when it had to do something for it; it raises Ended when its connection
ended, having checked what came before, and Hangs when neither came.
"""

import contextlib
import itertools
import os
import select
import socket

from helpers import patient, reset

NUDGED_AFTER = 1.5  # seconds after which a client that hears nothing sends once more
TOO_LATE = 3.0  # for a deadline of 0.3 seconds (QUICK of server.py)
PATIENCE = 5.0
names = itertools.count()


class Ended(Exception):
    pass


class Hangs(Exception):
    pass


class Wrong(Exception):
    pass


class Client:
    """A socket that tells apart how a connection can fail it."""

    def __init__(self, address, buffer=0):
        self.sock = socket.socket()
        self.sock.settimeout(patient(PATIENCE))
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.connect(tuple(address))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data):
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise Hangs("the server takes no more") from None
        except OSError as error:
            raise Ended from error

    def expect(self, data):
        """Receives exactly `data`."""
        got = 0
        while got < len(data):
            try:
                piece = self.sock.recv(min(len(data) - got, 1 << 20))
            except TimeoutError:
                raise Hangs(f"{got} of {len(data)} bytes came, then neither more nor the end") from None
            except OSError as error:
                raise Ended from error
            if not piece:
                raise Ended
            if piece != data[got : got + len(piece)]:
                raise Wrong(f"{piece[:40]!r} at {got} instead of {data[got : got + 40]!r}")
            got += len(piece)

    def expect_end(self):
        """Nothing more than the end."""
        try:
            if self.sock.recv(1):
                raise Wrong("more than was asked for")
        except TimeoutError:
            raise Hangs("no end") from None
        except OSError as error:
            raise Ended from error

    def silent(self, seconds=NUDGED_AFTER):
        """Nothing comes for a while."""
        return not select.select([self.sock], [], [], patient(seconds))[0]

    def talk(self, data):
        self.send(data)
        late = "late" if self.silent() else None
        if late:
            self.send(data)
        self.expect(data * 2 if late else data)
        return late

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.close()


def framed(data):
    return len(data).to_bytes(4, "big") + data


def newcomer(server):
    """Connects, talks, leaves."""
    yield
    with Client(server.raw) as client:
        return client.talk(b"hello") or client.talk(b"once more")


def echo(server):
    with Client(server.raw) as client:
        client.talk(b"before")
        yield
        late = client.talk(os.urandom(300))
        return client.talk(os.urandom(30000)) or late


def framed_echo(server):
    """Many messages at once; one long; one in two parts."""
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        late = client.talk(framed(b"e" + os.urandom(99)) * 20)
        client.talk(framed(b"e" + os.urandom(50000)))
        message = framed(b"e in two parts")
        client.send(message[:6])
        client.send(message[6:])
        client.expect(message)
        return late


def alike(server):
    """Large messages of one size, each sent when the last was answered: they come straight into objects before long."""
    message = framed(b"e" + os.urandom(20000))
    with Client(server.framed) as client:
        for _ in range(30):
            client.talk(message)
        yield
        return client.talk(message)


def long(server):
    """Messages that get buffers of their own."""
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        for size in (200_000, 1_500_000, 3_000_000):
            message = framed(b"e" + os.urandom(8) * (size // 8))
            client.send(message)
            client.expect(message)


def large(server):
    """An answer that needs EPOLLOUT, as its reader begins late."""
    size = 6 << 20
    asked = b"l%d " % size
    with Client(server.framed, buffer=65536) as client:
        client.talk(framed(b"e before"))
        yield
        client.send(framed(asked))
        answer = framed(asked * (size // len(asked)))
        select.select([client.sock], [], [], patient(PATIENCE))
        client.expect(answer)


def pieces(server, command=b"p", times=4):
    message = command + os.urandom(8000)
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        client.send(framed(message))
        client.expect(framed(message * times))


def many_pieces(server):
    yield from pieces(server, b"m", 32)


def half_close(server):
    """Sends, shuts its side, reads to the end."""
    data = os.urandom(30000)
    with Client(server.raw) as client:
        client.talk(b"before")
        yield
        client.send(data)
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        client.expect(data)
        client.expect_end()


def leaver(server):
    """Leaves, and waits for the server to notice; where close() fails that can't be seen."""
    with Client(server.raw) as client:
        client.talk(b"before")
        yield
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        if not client.silent(0.2):
            client.expect_end()


def told_to_end(server):
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        client.send(framed(b"c good-bye") + b"\0")  # a byte of a message that is unfinished: it lingers
        client.expect(framed(b"c good-bye"))
        client.expect_end()


def told_to_end_whole(server):
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        client.send(framed(b"c good-bye"))
        client.expect(framed(b"c good-bye"))
        client.expect_end()


def finisher(server):
    """The server finishes first."""
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        client.send(framed(b"f last"))
        client.expect(framed(b"f last"))
        client.expect_end()
        client.send(framed(b"c"))


def goner(server):
    """Has finished long ago when it goes altogether, without having been sent anything. Nobody sees that but who counts
    the connections."""
    with Client(server.framed) as client:
        client.talk(framed(b"k before"))
        client.sock.shutdown(socket.SHUT_WR)
        yield
        reset(client.sock)


def writable(server):
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        for _ in range(3):
            client.send(framed(b"n"))
            client.expect(framed(b"writable"))


def transfer(server):
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        for _ in range(3):
            client.send(framed(b"s" * 9000))
            client.expect(framed(b"s" * 9000))


def outsider(server):
    """Is answered by a thread that is no worker."""
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        for i in range(5):
            client.send(framed(b"t%d" % i))
            client.expect(framed(b"t%d" % i))


def spoken_to(server):
    """Hears from such a thread without having asked, while nobody has anything to do."""
    name = f"ispoken{next(names)}"
    with Client(server.framed) as client:
        client.talk(framed(name.encode()))
        yield
        server.command(f"speak {name}")
        late = "late" if client.silent() else None
        if late:
            client.send(framed(b"e nudge"))
            client.expect(framed(b"spoken") + framed(b"e nudge"))
        else:
            client.expect(framed(b"spoken"))
        return late


def broadcast(server):
    """What one of three says is heard by all."""
    room = b"%04d" % (next(names) % 10000)
    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(Client(server.framed)) for _ in range(3)]
        for i, member in enumerate(members):
            member.talk(framed(b"i%s%d" % (room, i)))
        yield
        for _ in range(3):
            members[0].send(framed(b"b" + room))
            for member in members:
                member.expect(framed(b"b" + room))


def blocker(server):
    """Its handler sleeps: another worker takes over."""
    with Client(server.framed) as client:
        client.talk(framed(b"e before"))
        yield
        for _ in range(2):
            client.send(framed(b"h"))
            client.expect(framed(b"h"))


def too_slow(server):
    """Says nothing more until it is closed for that, in time: each newcomer has a deadline before all others'."""
    with Client(server.raw) as client:
        client.talk(b"before")
    yield
    for _ in range(2):
        with Client(server.quick) as client:
            client.talk(b"hello")
            if client.silent(TOO_LATE):
                raise Hangs("its deadline is forgotten")
            with contextlib.suppress(Ended):  # which nobody makes a difference of: a reset is an end
                client.expect_end()


KINDS = [
    newcomer, echo, framed_echo, long, large, pieces, many_pieces, half_close, leaver, told_to_end, told_to_end_whole,
    finisher, goner, writable, transfer, outsider, spoken_to, broadcast, blocker, too_slow,
]  # fmt: skip
