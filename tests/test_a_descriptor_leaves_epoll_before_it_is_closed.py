"""B03: close() alone leaves the events of a descriptor that was duplicated, in the epoll set, for ever."""

import os
import re
import time

from contract_helpers import every_trigger, handler, needs_strace, round_trip, system_calls
from helpers import SANITIZER, process_cpu_seconds, wait_until

TRACED = """
import os, socket, sys, time, tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.user_data = sock
        sock.send(data)
        if data == b"leave":
            return tstpool.TstStat.DISCONNECT

with tstpool.TstPool(Echo(), workers=2, trigger=sys.argv[1]) as pool:
    address = pool.listen("127.0.0.1", 0)
    for end in ("leave", "close", "abort", "peer", "peer"):
        with socket.create_connection(address, 10) as client:
            client.sendall(b"leave" if end == "leave" else b"hello")
            assert client.recv(5)
            while end != "leave" and not pool.sockets():
                time.sleep(0.001)
            if end in ("close", "abort"):
                pool.sockets()[0].close(*[True] * (end == "abort"))
            if end != "peer":
                try:
                    assert client.recv(1) == b""
                except ConnectionResetError:
                    pass
        while len(pool):
            time.sleep(0.001)
"""


@needs_strace
@every_trigger
def test_it_is_taken_out_of_epoll_first(tmp_path, trigger):
    """B03: whoever ends the connection: of each descriptor that was accepted, the log has EPOLL_CTL_DEL, then close."""
    registered, ended = {}, 0
    for line in system_calls(tmp_path / "log", "accept4,epoll_ctl,close", TRACED, trigger).splitlines():
        if accepted := re.search(r"accept4.*= (\d+)$", line):
            registered[accepted[1]] = "accepted"
        elif change := re.search(r"epoll_ctl\(\d+, EPOLL_CTL_(ADD|DEL), (\d+)", line):
            if change[2] in registered:
                registered[change[2]] = change[1]
        elif (closed := re.search(r"close\((\d+)", line)) and closed[1] in registered:
            assert registered.pop(closed[1]) == "DEL", line
            ended += 1
    assert (registered, ended) == ({}, 5)


@every_trigger
def test_a_duplicate_whose_peer_goes_on_makes_nobody_spin(make_pool, make_client, trigger):
    """B03: the user's duplicate is readable all the time; no handler is called, no CPU used, others are served."""
    calls = []

    def note(sock, data):
        calls.append(data)
        sock.send(data)

    pool = make_pool(handler(on_message=note), trigger=trigger, workers=2)
    client = make_client(pool)
    round_trip(client, b"hello")
    (sock,) = pool.sockets()
    duplicate = os.dup(sock.sd)
    try:
        assert sock.close() is True
        wait_until(lambda: len(pool) == 0)
        client.sendall(b"to nobody")
        cpu = process_cpu_seconds()
        time.sleep(0.4)  # a window to measure in, not a wait
        assert process_cpu_seconds() - cpu < (0.25 if SANITIZER else 0.1)
        assert calls == [b"hello"]
        assert pool.stats().stale_events == 0
        assert os.read(duplicate, 100) == b"to nobody"  # it is the user's
        assert round_trip(make_client(pool), b"others") == b"others"
    finally:
        os.close(duplicate)
