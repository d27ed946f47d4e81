"""stats(), addresses and a socket's handler may be asked for on any thread, also while another one starts the pool anew
or stops it: what they look at is still there."""

import functools
import itertools
import threading
import time

from contract_helpers import echo, handler, in_threads
from helpers import connect, quick_switches, run_python

from tstpool import TstPool

SHRINK = """
import socket
import tstpool._core as core
from tstpool import TstHandler, TstPool, WorkerStats

class Echo(TstHandler):
    def on_message(self, sock, data):
        return data

pool = TstPool(Echo(), workers=100)
pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(pool.addresses[0]) as client:
    client.sendall(b"x")
    assert client.recv(1) == b"x"
assert pool.stop() is True
assert pool.stats().messages == 1

def in_between(**numbers):
    if not pool.running:  # the other thread is here by now
        pool.create(1, None, 0, Echo())
    return WorkerStats(**numbers)

core.WorkerStats = in_between
stats = pool.stats()
core.WorkerStats = WorkerStats
assert pool.stop() is True
assert stats.messages == stats.bytes_in == stats.accepted == stats.closed == 0, (stats.messages, stats.bytes_in)
assert len(stats.workers) == 1
for worker in stats.workers:
    assert (worker.exec_count, worker.sum_time, worker.most_elapsed, worker.end_time) == (0, 0, 0, 0), worker
"""


def test_a_restart_with_fewer_workers_in_the_middle_of_stats():
    """S36, B43: numbers of workers that are gone can be read, but they are not added to those of the next run."""
    run_python("-c", SHRINK)


def beside(pool, change, *looks):
    """Does `change` again and again, for two seconds, and until each look has begun, on a thread of its own, too."""
    over = threading.Event()
    looked = [0] * len(looks)

    def changing():
        until = time.monotonic() + 2
        try:
            for number in itertools.count():
                change(number)
                if time.monotonic() > until and all(looked):
                    break
        finally:
            over.set()

    def looking(number):
        while not over.is_set():
            looked[number] += 1
            looks[number]()

    with quick_switches():
        in_threads(changing, *[functools.partial(looking, number) for number in range(len(looks))])
    assert all(looked)


def test_others_look_while_listeners_come_and_go():
    """B43, B57: for a free-threaded Python: the list that is looked through stays the same."""
    pool = TstPool(handler(on_message=echo), workers=3)

    def change(number):
        pool.listen("127.0.0.1", 0)
        assert pool.stop() is True

    def look():
        assert len(pool.addresses) <= 1

    beside(pool, change, look, look)


def test_others_look_while_a_pool_starts_and_stops():
    """B43, B57: the same with workers, now more, now fewer, and with another handler each time."""
    pool = TstPool(handler(on_message=echo), workers=3)

    def change(number):
        pool.listen("127.0.0.1", 0)
        if number % 2:
            pool.create(1 + number % 5, None, 0, handler(on_message=echo))
        else:
            pool.start()
        with connect(pool) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert pool.stop() is True

    def look():
        stats = pool.stats()
        assert 0 <= stats.messages <= 1 and 0 <= stats.listeners <= 1
        assert len(pool.addresses) <= 1 and len(pool) >= 0 and repr(pool)
        for sock in pool.sockets():
            assert sock.handler is not None and sock.recv_data is not None

    beside(pool, change, look, look)
