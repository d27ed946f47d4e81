"""Output goes out while the handler that made it, or another one, blocks; and what happens unseen meanwhile is seen."""

import contextlib
import threading

from contract_helpers import Gate, round_trip
from helpers import connect, patient, recv_exact, wait_until

from tstpool import LengthPrefixed, TstHandler


def test_a_transfer_of_a_blocked_handler_does_not_wait_for_its_next_message(make_pool):
    """Its worker has lost the shard in the first message; the transfer that this one leaves goes out while the second
    one blocks."""
    first, second = Gate(), Gate()

    class Handler(TstHandler):
        def on_message(self, sock, data):
            if data == b"other":
                return data
            if data == b"1":
                first.wait()
                sock.send_data.s[:5] = b"reply"
                sock.send_data.req_len = 5
            else:
                second.wait()
            return None

    pool = make_pool(Handler(), framing=LengthPrefixed(1), workers=2)
    with first, second, connect(pool) as client, connect(pool) as other:
        client.sendall(b"\x011\x012")
        wait_until(lambda: first.inside)
        assert round_trip(other, b"\x05other") == b"\x05other"  # by the worker that has taken the shard over
        first.open()
        wait_until(lambda: second.inside)
        assert recv_exact(client, 5) == b"reply"


def test_a_reply_does_not_wait_for_handlers_of_others_that_block_after_it(make_pool):
    """Three messages of one turn: the first is answered, in the second its worker blocks, in the third the one that has
    taken the shard over. Nobody is left, and the answer has gone out all the same."""
    gates = {b"second": Gate(), b"third": Gate()}
    clients = []

    class Handler(TstHandler):
        def on_message(self, sock, data):
            if data == b"first":
                return b"answer"
            if data == b"go":  # so that all three are there when the next turn begins
                for client, word in zip(clients, (b"first", *gates), strict=True):
                    client.sendall(word)
            else:
                gates[data].wait()
            return None

    pool = make_pool(Handler(), workers=2, shards=1)
    with contextlib.ExitStack() as stack:
        for gate in gates.values():
            stack.enter_context(gate)
        clients += [stack.enter_context(connect(pool)) for _ in range(3)]
        starter = stack.enter_context(connect(pool))
        wait_until(lambda: len(pool) == 4)
        starter.sendall(b"go")
        wait_until(lambda: all(gate.inside for gate in gates.values()))
        assert recv_exact(clients[0], 6) == b"answer"


def test_an_idle_connection_is_closed_though_another_thread_sent_its_last_output(make_pool):
    """There is no limit for output that waits. While the only worker is in another handler, flush() sends all of it,
    and no event comes that would tell, nor relief: little waits, as limits go."""
    gate, sockets, flushed = Gate(), [], threading.Event()

    class Handler(TstHandler):
        def on_message(self, sock, data):
            if data == b"block":
                gate.wait()
            else:
                sockets.append(sock)
                sock.send(bytes(20_000_000))

    def flush():
        sockets[0].flush(patient(30))
        flushed.set()

    limits = {"idle_timeout": patient(0.5), "write_timeout": None, "high_water": 1 << 26, "max_queued": 1 << 27}
    pool = make_pool(Handler(), workers=1, **limits)
    with gate, connect(pool) as client, connect(pool) as other:
        client.sendall(b"much")
        wait_until(lambda: sockets)
        recv_exact(client, 100_000)
        other.sendall(b"block")
        wait_until(lambda: gate.inside)
        thread = threading.Thread(target=flush)
        thread.start()
        recv_exact(client, 19_900_000)
        thread.join(patient(30))
        assert flushed.is_set()
        gate.open()
        assert client.recv(1) == b""  # within the time-out that connect() has set
