"""S14: SEND with nothing to send calls the handler with EPOLLOUT again at once; others still get their turn."""

import threading

from contract_helpers import every_style, every_trigger, one_two_and_eight_workers, round_trip, serve
from helpers import wait_until

from tstpool import EPOLLOUT, TstStat


@every_style
@every_trigger
def test_the_handler_is_called_again_until_it_returns_something_else(make_pool, make_client, style, trigger):
    """S14: a hundred EPOLLOUT calls in a row, counted in stats().spins."""
    events = []

    def again(sock):
        events.append(sock.events)
        return TstStat.SEND if len(events) < 100 else TstStat.SUSPEND

    pool = serve(make_pool, style, lambda sock, data: TstStat.SEND, on_writable=again, trigger=trigger, workers=1)
    client = make_client(pool)
    client.sendall(b"x")
    wait_until(lambda: len(events) == 100)
    assert all(bits & EPOLLOUT for bits in events)
    assert pool.stats().spins >= 90
    pool.need_send(pool.sockets()[0])
    wait_until(lambda: len(events) == 101)


@every_style
@every_trigger
@one_two_and_eight_workers
def test_others_are_served_beside_a_busy_loop(make_pool, make_client, style, trigger, workers):
    """S14: also on the only worker."""
    over, spins = threading.Event(), []

    def spin(sock):
        spins.append(1)
        return TstStat.DISCONNECT if over.is_set() else TstStat.SEND

    def answer(sock, data):
        if data == b"spin":
            return TstStat.SEND
        sock.send(data)
        return None

    pool = serve(make_pool, style, answer, on_writable=spin, trigger=trigger, workers=workers)
    spinner, other = make_client(pool), make_client(pool)
    spinner.sendall(b"spin")
    wait_until(lambda: len(spins) > 10)
    for i in range(30):
        assert round_trip(other, b"%d" % i) == b"%d" % i
    wait_until(lambda: len(spins) > 30)  # its worker may have been held up
    over.set()
    assert spinner.recv(1) == b""


@every_style
def test_input_of_the_spinning_socket_itself_is_delivered_afterwards(make_pool, make_client, style):
    """S12, S14: what arrived meanwhile is not lost."""
    got, over = [], threading.Event()

    def answer(sock, data):
        got.append(data)
        return TstStat.SEND if data == b"spin" else None

    pool = serve(make_pool, style, answer, on_writable=lambda sock: None if over.is_set() else TstStat.SEND, workers=2)
    client = make_client(pool)
    client.sendall(b"spin")
    wait_until(lambda: pool.stats().spins > 5)
    client.sendall(b"more")
    over.set()
    wait_until(lambda: len(got) == 2)
    assert got == [b"spin", b"more"]
