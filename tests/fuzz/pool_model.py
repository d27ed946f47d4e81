"""One pool with real sockets, and what must be true of it whatever is done to it, in any order.

A World makes a pool and clients; its methods are the operations, of which the fuzzer and the stateful test choose.
Each notes what it does in a Peer, one for each connection, before it does it; `finish()` compares. The rules:

- messages: those that the model cuts from the client's bytes; all of them, unless somebody ended the connection early
- what a handler reads by itself, or asks for by req_len: the bytes that come next
- output: every byte that a send accepted, in order; all of it, unless it was aborted, reset or stopped
- on_connect and on_disconnect: once each; no hook after on_disconnect, none while another runs
- counters: accepted == closed + connections, and the bytes and messages of both sides
"""

import contextlib
import os
import socket
import tempfile
import threading

from fuzz.framing_model import TOO_LARGE, Model, cut
from helpers import patient, reset, wait_until

import tstpool
from tstpool import ConnectionClosed, MessageTooLarge, SendQueueFull, TstStat

DEADLINE = 10.0  # seconds for what is to happen soon
SMALL = 200  # bytes of output that any kernel takes at once: nothing goes before on_writable then


def pattern(n, seed):
    """n bytes that differ from those of another seed, and from what is near them."""
    piece = bytes((i * 7 + i // 251 + seed * 31) % 256 for i in range(min(n, 997)))
    return (piece * (n // 997 + 1))[:n]


class Peer:
    """Both sides of one connection, and what has been done to it."""

    def __init__(self, client, framing):
        self.client = client
        self.lock = threading.Lock()  # held while output is queued, so that its order is known
        self.framing = framing  # the Model in force
        self.first_framing = framing
        self.changes = {}  # number of messages: the Model from there
        self.taken = {}  # number of messages: what the handler has read there
        self.transfer = False  # the next message is what req_len asked for
        self.sent = bytearray()  # by the client
        self.received = bytearray()
        self.replies = bytearray()  # what the server's sends have accepted
        self.messages = []  # what the handler got
        self.script = []  # what the handler is to do, one for each message
        self.room_script = []  # the same, one for each on_writable
        self.sock = None
        self.inside = False
        self.connects = self.disconnects = self.writables = self.asked = 0
        self.reason = None
        self.half_closed = False  # the client has sent its FIN
        self.left = False  # the client's socket is closed
        self.closing = False  # the server's side may refuse output from here on
        self.input_cut = False  # messages may be missing at the end
        self.output_cut = False  # output may be missing at the end
        self.ending = False  # no more pauses
        self.was_reset = False  # the client heard of a RST
        self.sent_late = False  # the client has sent something to a side that was closing
        self.unsure = False  # nobody knows what its last output is
        self.doubtful = False  # what the client has received may still count as waiting: see receive()
        self.faults = []


class Handler(tstpool.TstHandler):
    def __init__(self, world):
        self.world = world

    def on_connect(self, sock):
        peer = wait_until(lambda: self.world.expected)  # the client's thread may not have come that far
        self.world.expected = None
        peer.sock, sock.user_data = sock, peer
        peer.connects += 1

    def on_message(self, sock, data):
        peer = sock.user_data
        with self.alone(peer):
            peer.messages.append(bytes(data))
            if peer.transfer:
                self.world.transfer_is_over(peer)
            return peer.script.pop(0)(peer) if peer.script else None

    def on_writable(self, sock):
        peer = sock.user_data
        with self.alone(peer):
            peer.writables += 1
            if peer.room_script:
                peer.room_script.pop(0)(peer)

    def on_disconnect(self, sock, reason):
        peer = sock.user_data
        with self.alone(peer):
            peer.disconnects += 1
            peer.reason = reason

    def on_error(self, sock, exc):
        if not isinstance(exc, (Planned, MessageTooLarge)):
            sock.user_data.faults.append(repr(exc))

    @contextlib.contextmanager
    def alone(self, peer):
        if peer.inside or peer.disconnects:
            peer.faults.append("a hook during another, or after on_disconnect")
        peer.inside = True
        try:
            yield
        finally:
            peer.inside = False


class Planned(Exception):
    """Raised by a handler because it was told to."""


class World:
    """framing: a Model or None. unix: by a unix socket, else by loopback TCP. Everything else is for TstPool."""

    def __init__(self, framing=None, *, unix=True, **options):
        self.framing = framing
        self.folder = tempfile.mkdtemp(prefix="tst-") if unix else None
        self.peers = []
        self.expected = None  # the Peer whose on_connect is to come
        self.running = False
        self.max_queued = options.get("max_queued", 1 << 20)
        self.overflow_closes = options.get("on_overflow") == "close"
        real = None if framing is None else framing.real()
        self.pool = tstpool.TstPool(Handler(self), framing=real, slow_handler=100, **options)
        self.start()

    # -- the pool

    def start(self):
        if self.running:
            return
        self.address = self.pool.listen(f"unix:{self.folder}/socket" if self.folder else "127.0.0.1")
        self.pool.start()
        self.running = True
        self.before = len(self.peers)  # counters begin anew with each start

    def stop(self, drain=0.2):
        for peer in self.peers:
            with peer.lock:
                peer.closing = peer.input_cut = peer.output_cut = True
        # False: a handler that is held up for longer than `drain` still runs. It returns.
        assert self.pool.stop(drain) or self.pool.stop(patient(5))
        self.running = False
        assert len(self.pool) == 0
        for peer in self.peers:
            assert (peer.connects, peer.disconnects) == (1, 1)

    def broadcast(self, n):
        data = pattern(n, len(self.peers))
        with contextlib.ExitStack() as held:
            for peer in self.peers:
                held.enter_context(peer.lock)
            open_ones = [peer for peer in self.peers if not peer.closing]
            for peer in open_ones:
                self.may_overflow(peer)
            taken = self.pool.broadcast(data, where=lambda sock: sock.user_data in open_ones)
            for peer in open_ones:
                if taken == len(open_ones):
                    peer.replies += data
                else:
                    peer.unsure = True  # one has ended, or its queue is full: which is not told

    # -- the client's side

    def connect(self):
        """Returns the Peer, or None when nobody listens."""
        if not self.running:
            return None
        client = socket.socket(socket.AF_UNIX if self.folder else socket.AF_INET)
        peer = Peer(client, self.framing)
        self.expected = peer
        client.connect(f"{self.folder}/socket" if self.folder else self.address)
        client.setblocking(False)
        wait_until(lambda: peer.connects, DEADLINE, "on_connect")
        self.peers.append(peer)
        return peer

    def send(self, peer, data):
        """As much of it as the kernel takes."""
        if peer.half_closed or peer.left:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            peer.sent += data[: peer.client.send(data)]
        # What comes for a connection that had nothing unread when it was closed, the kernel answers with a reset. With
        # TCP that destroys what the client has not received yet.
        peer.sent_late |= peer.closing
        peer.output_cut |= peer.closing and not self.folder

    def send_framed(self, peer, n):
        """A message of n bytes in the frame of the pool's framing, if it has one."""
        body = pattern(n, len(peer.sent))
        with contextlib.suppress(ValueError):
            self.send(peer, framed(self.framing, body))

    def receive(self, peer):
        """What has arrived. It may have come before the engine knows: a worker's send() has given it to the kernel and
        is not back. Until somebody sees that it is, the queue may seem as full as it was."""
        if peer.left:
            return
        before, doubtful = len(peer.received), peer.doubtful
        peer.doubtful = True
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while piece := peer.client.recv(1 << 16):
                peer.received += piece
        with peer.lock:
            peer.doubtful = doubtful or len(peer.replies) - before >= self.max_queued
            if peer.doubtful:
                with contextlib.suppress(TimeoutError, ConnectionClosed):
                    peer.sock.flush(timeout=0)
                    peer.doubtful = False

    def half_close(self, peer):
        if peer.half_closed or peer.left:
            return
        with peer.lock:
            peer.closing = peer.half_closed = True
        with contextlib.suppress(OSError):
            peer.client.shutdown(socket.SHUT_WR)

    def leave(self, peer, with_reset):
        if peer.left:
            return
        with peer.lock:
            peer.closing = peer.input_cut = peer.output_cut = peer.left = True
        if with_reset:
            reset(peer.client)
        peer.client.close()

    # -- the server's side: each may be called on any thread, also in the handler, where it may return a TstStat

    def reply(self, peer, n):
        with peer.lock:
            self.may_overflow(peer)
            data = pattern(n, len(peer.replies))
            with self.refusals(peer):
                peer.sock.send(data)
                peer.replies += data

    def reply_framed(self, peer, n):
        with peer.lock:
            self.may_overflow(peer)
            data = pattern(n, len(peer.replies))
            try:
                expected = framed(peer.framing, data)
            except ValueError:
                expected = None
            with self.refusals(peer):
                try:
                    peer.sock.send_message(data)
                except (MessageTooLarge, ValueError):
                    assert expected is None, f"{peer.framing} has a frame for {n} bytes"
                else:
                    assert expected is not None, f"{peer.framing} has no frame for {n} bytes"
                    peer.replies += expected

    def is_full(self, peer):
        """So much may wait that no more is taken: all that the client has not received yet, at most."""
        return peer.unsure or peer.doubtful or len(peer.replies) - len(peer.received) >= self.max_queued

    def may_overflow(self, peer):
        if self.overflow_closes and self.is_full(peer):
            peer.closing = peer.input_cut = peer.output_cut = True

    @contextlib.contextmanager
    def refusals(self, peer):
        try:
            yield
        except ConnectionClosed:
            assert peer.closing or self.is_too_large(peer), "refused, although nobody closed it"
        except SendQueueFull:
            assert self.is_full(peer) and not self.overflow_closes

    def flush(self, peer):
        with contextlib.suppress(TimeoutError, ConnectionClosed):
            peer.sock.flush(timeout=0)

    def close(self, peer, abort=False):
        with peer.lock:
            peer.closing = peer.input_cut = True
            peer.output_cut |= abort
        peer.sock.close(abort=abort)

    def need_send(self, peer):
        open_yet = self.running and not peer.closing
        if self.pool.need_send(peer.sock) and open_yet:
            peer.asked += 1

    def pause(self, peer):
        with peer.lock:
            if not peer.ending:
                peer.sock.pause()

    def resume(self, peer):
        peer.sock.resume()

    # -- in the handler only

    def read(self, peer, n):
        """Up to n bytes of what comes next, whatever the framing has seen of it."""
        if kind_of(peer.framing) in (None, tstpool.Raw) or peer.transfer:
            return  # where its messages end depends on the reads, or how much is in the transfer already
        with peer.lock:
            before = peer.taken.get(len(peer.messages), b"")
            peer.taken[len(peer.messages)] = before + peer.sock.read(n)

    def read_in_on_writable(self, peer, n):
        peer.room_script.append(lambda peer: self.read(peer, n))
        self.need_send(peer)

    def ask_in_on_writable(self, peer, n):
        """Also in the midst of a message, of which the framing knows how much it has seen."""
        peer.room_script.append(
            # One with a length that is under way is received into an object of its own, and comes first.
            lambda peer: self.ask(peer, n) if kind_of(peer.framing) is tstpool.Delimited else None
        )
        self.need_send(peer)

    def ask(self, peer, n):
        """The next n bytes come as one message, however the framing would cut them."""
        if kind_of(peer.framing) in (None, tstpool.Raw) or peer.transfer or n == 0:
            return
        with peer.lock:
            recv = peer.sock.recv_data
            if recv.s_len < n:
                recv.resize(n)
            recv.req_len = n
            peer.transfer = True
            peer.changes[len(peer.messages)] = Model(tstpool.Fixed, n, size=n)

    def transfer_is_over(self, peer):
        with peer.lock:
            peer.sock.recv_data.req_len = 0
            peer.transfer = False
            peer.changes[len(peer.messages)] = peer.framing

    def reframe(self, peer, model):
        if kind_of(peer.framing) in (None, tstpool.Raw):
            return  # where its messages end depends on the reads
        with peer.lock:
            peer.sock.framing = model.real()
            peer.framing = peer.changes[len(peer.messages)] = model

    def reframe_twice(self, peer, passing, model):
        """One that is in force for a moment, and may leave its memory to the next."""
        self.reframe(peer, passing)
        self.reframe(peer, model)

    def disconnect(self, peer):
        with peer.lock:
            peer.closing = peer.input_cut = True
        return TstStat.DISCONNECT

    def fail(self, peer):
        with peer.lock:  # what was queued is sent, but a reset may destroy it on its way
            peer.closing = peer.input_cut = peer.output_cut = True
        raise Planned

    # -- what must be true

    def is_too_large(self, peer):
        return cut(peer.first_framing, bytes(peer.sent), peer.changes, peer.taken)[2]

    def check(self, peer):
        """At any time: nothing has come twice, or in another order."""
        assert not peer.faults, peer.faults
        assert (peer.connects, peer.disconnects) in ((1, 0), (1, 1))
        # In this order: a change of framing that comes meanwhile counts for later messages only.
        got = list(peer.messages)
        changes = dict(peer.changes)
        expected, _, _ = cut(peer.first_framing, bytes(peer.sent), changes, peer.taken)
        if any(kind_of(model) in (None, tstpool.Raw) for model in [peer.first_framing, *changes.values()]):
            n = next(iter(changes), 0)  # up to there messages are known; then how the bytes come depends on the reads
            assert got[:n] == expected[: min(n, len(got))]
            assert b"".join(expected).startswith(b"".join(got))
        else:
            assert got == expected[: len(got)], f"{peer.first_framing} {changes} {peer.taken}"
        if not peer.unsure:
            with peer.lock:
                assert peer.replies.startswith(peer.received)

    def finish(self):
        """Lets every connection come to its end, stops the pool, and checks everything."""
        try:
            for peer in self.peers:
                self.end(peer)
            wait_until(lambda: all(peer.disconnects for peer in self.peers), DEADLINE, "on_disconnect")
            self.check_all()
            wait_until(lambda: len(self.pool) == 0, DEADLINE, "no connection")
            self.check_counters()
        finally:
            self.discard()

    def end(self, peer):
        """The client says goodbye and hears the server out."""
        with peer.lock:
            peer.ending = peer.doubtful = True
            peer.sock.resume()
        self.half_close(peer)
        if peer.left:
            return
        peer.client.settimeout(patient(DEADLINE))
        try:
            while piece := peer.client.recv(1 << 16):
                peer.received += piece
        except ConnectionResetError:
            peer.was_reset = True
        peer.client.close()

    def check_all(self):
        for peer in self.peers:
            self.check(peer)
            expected, _, too_large = cut(peer.first_framing, bytes(peer.sent), peer.changes, peer.taken)
            if not peer.input_cut:
                assert b"".join(peer.messages) == b"".join(expected), "messages are missing"
                assert isinstance(peer.reason, MessageTooLarge) == too_large
                assert too_large or peer.reason is None, peer.reason
                assert peer.writables or not peer.asked or too_large or len(peer.replies) > SMALL
            if not peer.output_cut and not peer.unsure and not too_large:
                assert peer.received == peer.replies, "output is missing"
                assert not peer.was_reset or not peer.replies or peer.sent_late, "it was reset, which may lose replies"

    def check_counters(self):
        stats, peers = self.pool.stats(), self.peers[self.before :]
        assert stats.connections == 0
        assert stats.accepted == stats.closed == len(peers)
        assert stats.accept_errors == stats.deadline_closed == stats.idle_closed == stats.bytes_queued == 0
        assert stats.messages == sum(len(peer.messages) for peer in peers)
        assert stats.bytes_in <= sum(len(peer.sent) for peer in peers)
        if not any(peer.input_cut or self.is_too_large(peer) for peer in peers):
            assert stats.bytes_in == sum(len(peer.sent) for peer in peers)
        if not any(peer.output_cut or peer.unsure or self.is_too_large(peer) for peer in peers):
            assert stats.bytes_out == sum(len(peer.replies) for peer in peers)

    def discard(self):
        """Gives everything back, whatever has happened."""
        for peer in self.peers:
            peer.client.close()
        assert self.pool.stop(drain=patient(1.0))
        for peer in self.peers:
            assert peer.disconnects == 1
        if self.folder:
            os.rmdir(self.folder)  # fails if the listener's file is still there


def kind_of(model):
    return None if model is None else model.kind


def framed(model, body):
    """The body in its frame; ValueError when the framing has none for it."""
    if kind_of(model) in (None, tstpool.Raw):
        if model is not None and len(body) > model.max_message:
            raise ValueError("too large")
        return body
    header = model.header(len(body))
    if header is TOO_LARGE:
        raise ValueError("too large, or too small")
    if model.kind is tstpool.Delimited:
        if model.delimiter in body:
            raise ValueError("it holds the delimiter")
        return body + model.delimiter
    return header + body
