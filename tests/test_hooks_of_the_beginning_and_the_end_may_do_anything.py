"""S22, S23, B52: on_connect and on_disconnect close themselves and others, send, block, raise, and stop the pool."""

import contextlib
import threading
import time

import pytest
from contract_helpers import every_trigger, handler
from helpers import connect, patient, recv_until_eof, wait_until

from tstpool import ConnectionClosed

CLIENTS = 6


class Deeds:
    """What a hook does; `log` has (hook, its begin or end, id) in the order in which it happened."""

    def __init__(self, where, what):
        self.where, self.what = where, what
        self.lock = threading.Lock()
        self.log = []
        self.answers = []
        self.pool = None

    def note(self, *entry):
        with self.lock:
            self.log.append(entry)

    def on_connect(self, sock):
        self.hook("connect", sock)

    def on_disconnect(self, sock, reason):
        self.hook("disconnect", sock)

    def on_message(self, sock, data):
        self.note("message", "begin", sock.id)
        with contextlib.suppress(ConnectionClosed):
            sock.send(data)
        self.note("message", "end", sock.id)

    def hook(self, name, sock):
        self.note(name, "begin", sock.id)
        try:
            if name == self.where:
                getattr(self, self.what)(sock)
        finally:
            self.note(name, "end", sock.id)

    def raises(self, sock):
        raise ValueError("on purpose")

    def closes_itself(self, sock):
        self.answers.append(sock.close())
        sock.close(abort=True)

    def closes_others(self, sock):
        for other in self.pool.sockets():
            if other is not sock:
                self.pool.closesocket(other)

    def sends(self, sock):
        with contextlib.suppress(ConnectionClosed):  # at the end nobody listens any more
            sock.send(b"from the hook")
        self.pool.broadcast(b"!")

    def blocks(self, sock):
        time.sleep(0.05)

    def stops(self, sock):
        self.answers.append(self.pool.stop(1.0))


@every_trigger
@pytest.mark.parametrize("what", ["raises", "closes_itself", "closes_others", "sends", "blocks", "stops"])
@pytest.mark.parametrize("where", ["connect", "disconnect"])
def test_whatever_they_do(make_pool, trigger, where, what):
    """B52: each connection has one on_connect and one on_disconnect, before and after everything else of its own, and
    never beside it; also one whose on_connect raises, for it has not refused it. Then the pool is empty, or stopped."""
    deeds = Deeds(where, what)
    hooks = {name: getattr(deeds, name) for name in ("on_connect", "on_message", "on_disconnect")}
    pool = deeds.pool = make_pool(handler(**hooks), trigger=trigger, workers=3)
    address = pool.addresses[0]

    def talk():
        for _ in range(3):
            with contextlib.suppress(OSError), connect(address) as client:
                client.sendall(b"hello")
                client.recv(5)

    threads = [threading.Thread(target=talk) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * patient(10) + 10)  # each client's time-out: see visitor() in test_chaos_*
        assert not thread.is_alive()
    wait_until(lambda: len(pool) == 0)
    assert pool.stop() is True
    check_order(deeds)
    if what == "stops":
        assert deeds.answers and set(deeds.answers) == {False}  # on a worker: it has begun, and is not waited for
    else:
        assert len({number for name, _, number in deeds.log if name == "connect"}) >= CLIENTS


def check_order(deeds):
    by_connection = {}
    for name, step, number in deeds.log:
        by_connection.setdefault(number, []).append((name, step))
    for number, log in by_connection.items():
        pairs = [(log[i], log[i + 1]) for i in range(0, len(log), 2)]
        assert all(begin == (end[0], "begin") and end[1] == "end" for begin, end in pairs), log
        names = [begin[0] for begin, _ in pairs]
        assert names.count("connect") == names.count("disconnect") == 1, (number, log)
        assert (names[0], names[-1]) == ("connect", "disconnect"), (number, log)


def test_what_on_connect_and_on_disconnect_send(make_pool):
    """S22: the peer reads it: before everything else, and, if it has only finished sending, after everything else."""
    pool = make_pool(
        handler(
            on_connect=lambda sock: sock.send(b"welcome ") and None,
            on_message=lambda sock, data: sock.send(data) and None,
        )
    )
    with connect(pool) as client:
        client.sendall(b"hello")
        client.shutdown(1)
        assert recv_until_eof(client) == b"welcome hello"
