"""sock.read() in a function's call: what was read ahead, then what the kernel has; it may see the peer's end."""

import socket

import pytest
from contract_helpers import Gate, every_trigger
from helpers import recv_exact, reset, wait_until


class Reader:
    """A function that takes one byte, waits at its gate, and then reads again; it notes both, and the end."""

    def __init__(self, make_pool, **options):
        self.gate = Gate()
        self.got, self.ends = [], []
        self.pool = make_pool(self, workers=1, start=False, **options)
        self.pool.setEventDisconnected(lambda sock, reason: self.ends.append(type(reason)))
        self.pool.start()

    def __call__(self, sock):
        self.got.append(sock.read(1))
        self.gate.wait()
        self.got.append(sock.read(100))


@every_trigger
def test_what_arrives_during_the_call_may_be_read_in_it(make_pool, make_client, trigger):
    reader = Reader(make_pool, trigger=trigger)
    client = make_client(reader.pool)
    client.sendall(b"hello")
    with reader.gate:
        wait_until(lambda: reader.gate.inside)
        client.sendall(b" world")
    wait_until(lambda: len(reader.got) >= 2)
    assert reader.got[:2] == [b"h", b"ello world"]
    assert reader.pool.stats().bytes_in == 11


@every_trigger
@pytest.mark.parametrize(
    ("end", "reason"),
    [(lambda client: client.shutdown(socket.SHUT_WR), type(None)), (reset, ConnectionResetError)],
    ids=["fin", "reset"],
)
def test_an_end_that_a_read_has_seen_is_reported_once(make_pool, make_client, trigger, end, reason):
    """B17, B19: the call that finds it reads nothing more; then comes one disconnect, with its reason."""
    reader = Reader(make_pool, trigger=trigger)
    client = make_client(reader.pool)
    client.sendall(b"x")
    with reader.gate:
        wait_until(lambda: reader.gate.inside)
        end(client)
    wait_until(lambda: not len(reader.pool))
    assert reader.got == [b"x", b""]
    assert reader.ends == [reason]


@every_trigger
def test_input_that_a_function_never_reads_does_not_outlive_its_connection(make_pool, make_client, trigger):
    """It is called again and again while more may come, and no more after the peer's FIN."""
    calls, ends = [], []

    def deaf(sock):
        calls.append(sock.id)
        sock.send(b"!")

    pool = make_pool(deaf, workers=1, start=False, trigger=trigger)
    pool.setEventDisconnected(lambda sock: ends.append(sock.id))
    pool.start()
    client = make_client(pool)
    client.sendall(b"hello")
    recv_exact(client, 3)
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: ends)
    n = len(calls)
    wait_until(lambda: not len(pool))
    assert (len(calls), len(ends)) == (n, 1)
