"""B14, S38: what is called when a connection's object goes may block, as its finalizer may."""

import contextlib
import weakref

import pytest
from contract_helpers import Gate, handler, round_trip
from helpers import FREE_THREADED, patient, wait_until


def is_answered(client):
    """A round trip, within a second on a quiet machine."""
    client.settimeout(patient(1))
    with contextlib.suppress(TimeoutError):
        return round_trip(client, b"hello") == b"hello"
    return False


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
@pytest.mark.parametrize("how", ["callback", "finalize"])
def test_a_callback_that_blocks_when_its_socket_goes_is_not_felt_by_others(make_pool, make_client, how):
    """B14, S38: the connection that it waited for is over, and its shard goes to another worker meanwhile."""
    kept = []
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"watch" and how == "callback":
                kept.append(weakref.ref(sock, lambda _: gate.wait()))
            elif data == b"watch":
                weakref.finalize(sock, gate.wait).atexit = False
            return data

        pool = make_pool(handler(on_message=on_message), workers=4, shards=1)
        client = make_client(pool)
        others = [make_client(pool) for _ in range(4)]
        assert all(is_answered(other) for other in others)
        assert round_trip(client, b"watch") == b"watch"
        client.close()
        wait_until(lambda: gate.inside)
        assert all(is_answered(other) for other in others)
        assert is_answered(make_client(pool))
        assert gate.inside == 1
    wait_until(lambda: len(pool) == 5)
