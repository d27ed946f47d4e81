"""need_send() and a peer that reads nothing: what waits in the handler has a deadline like what waits in the pool."""

import pytest
from contract_helpers import every_trigger, handler
from helpers import patient, wait_until

LIMIT = patient(0.4)  # the client is to half-close before it is over


@every_trigger
@pytest.mark.parametrize("ask", ["need_send", "half-closed"])
def test_it_ends_with_a_timeout(make_pool, make_client, trigger, ask):
    ends = []

    pool = make_pool(
        handler(
            on_message=lambda sock, data: pool.need_send(sock) and None,
            on_writable=lambda sock: (sock.send(bytes(65536)), pool.need_send(sock))[0] and None,
            on_disconnect=lambda sock, reason: ends.append(reason),
        ),
        write_timeout=LIMIT,
        idle_timeout=None,
        message_timeout=None,
        trigger=trigger,
    )
    client = make_client(pool)
    client.sendall(b"go")
    if ask == "half-closed":
        client.shutdown(1)
    wait_until(lambda: ends)
    assert isinstance(ends[0], TimeoutError)
    assert pool.stats().write_closed == 1
