"""B15: eight workers sleep; who comes, or says something, wakes those who are needed."""

import re
import time

import pytest
from contract_helpers import echo, every_trigger, handler, needs_strace, round_trip, system_calls
from helpers import PATIENCE, connect, scaled, wait_until
from test_a_blocked_handler_blocks_nobody_else import voluntary_switches

CLIENTS = 50

COUNTED = """
import socket, sys, tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

with tstpool.TstPool(Echo(), workers=8, trigger=sys.argv[1], shards=int(sys.argv[2])) as pool:
    address = pool.listen("127.0.0.1", 0)
    for _ in range(int(sys.argv[3])):
        with socket.create_connection(address, 10) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
"""


@needs_strace
@every_trigger
@pytest.mark.parametrize("shards", [1, 4])
def test_accept_is_called_twice_for_each_client_at_most(tmp_path, trigger, shards):
    """B15: once for the client, and once to hear that there is no other; not once more by each worker.

    The call with -1 only asks whether the kernel has it.
    """
    lines = system_calls(tmp_path / "log", "accept4", COUNTED, trigger, shards, CLIENTS)
    calls = re.findall(r"accept4\((?!-1,)", lines)
    assert CLIENTS <= len(calls) <= 2 * CLIENTS


@pytest.mark.parametrize("shards", [1, 4])
def test_a_client_that_comes_wakes_no_more_than_it_needs(make_pool, shards):
    """B15: the workers' own count of how often they went to sleep; a herd would make it eight times as much."""
    pool = make_pool(handler(on_message=echo), workers=8, shards=shards, name="herd")
    with connect(pool) as client:
        round_trip(client, b"x")

    def quiet():
        before = voluntary_switches("herd")
        time.sleep(0.1)  # a window to measure in, not a wait
        return voluntary_switches("herd") == before > 0

    wait_until(quiet)
    rounds = scaled(20, minimum=5)

    def measure():
        before = voluntary_switches("herd")
        for _ in range(rounds):
            with connect(pool) as client:
                assert round_trip(client, b"hello") == b"hello"
            wait_until(lambda: len(pool) == 0)
        wait_until(quiet)
        each = (voluntary_switches("herd") - before) / rounds
        print(f"{each:.1f} times to sleep for each client ({shards} shards)")
        return each

    # Who waits for the GIL wakes up every 5 ms: a thread that is held up while it has it adds to that, but not always.
    assert any(measure() < 8 for _ in range(1 if PATIENCE == 1 else 3))
