"""SPEC: flush() raises ConnectionClosed when output is lost, and not because the connection is over."""

import pytest
from contract_helpers import handler, ignore, open_sockets
from helpers import patient, recv_exact, reset, wait_until

from tstpool import ConnectionClosed

MUCH = bytes(16 << 20)  # more than the kernel takes for a peer that does not read


@pytest.mark.parametrize("who", ["the peer", "close", "stop"])
def test_it_returns_when_the_kernel_had_all_and_raises_when_something_was_lost(make_pool, make_client, who):
    """SPEC: whoever ends the connections."""
    pool = make_pool(handler(on_message=ignore), max_queued=None)
    reader = make_client(pool)
    (whole,) = open_sockets(pool, 1)
    deaf = make_client(pool)
    (cut,) = (sock for sock in open_sockets(pool, 2) if sock is not whole)
    whole.send(b"hello")
    whole.flush(patient(10))
    assert recv_exact(reader, 5) == b"hello"
    cut.send(MUCH)
    if who == "the peer":
        reader.close()
        reset(deaf)
    elif who == "close":
        whole.close()
        cut.close(abort=True)
        reader.close()
    else:
        pool.stop(0)
    wait_until(lambda: len(pool) == 0)
    whole.flush(patient(10))
    with pytest.raises(ConnectionClosed):
        cut.flush(patient(10))
