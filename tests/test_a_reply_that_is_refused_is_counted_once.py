"""B35: too much waits already for a peer that does not read: `overflow_refused` counts messages."""

import contextlib

import pytest
from contract_helpers import handler
from helpers import wait_until


@pytest.mark.parametrize("size", [8000, 20000])
@pytest.mark.parametrize("returned", [True, False])
def test_a_reply_that_is_refused(make_pool, make_client, size, returned):
    def on_message(sock, data):
        if returned:
            return b"x" * size
        sock.send(b"x" * size)
        return None

    errors = []
    limits = {"auto_pause": False, "high_water": 40000, "low_water": 0, "max_queued": 40000, "linger_timeout": 0.2}
    pool = make_pool(handler(on_message=on_message, on_error=lambda sock, error: errors.append(error)), **limits)
    client = make_client(pool)
    with contextlib.suppress(ConnectionError):  # the end may come first when this thread is held up
        while not errors:
            client.sendall(b"more")
    wait_until(lambda: len(pool) == 0)
    assert len(errors) == 1
    assert pool.stats().overflow_refused == 1
