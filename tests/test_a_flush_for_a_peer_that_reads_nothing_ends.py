"""B34, B38: write_timeout is for a connection whose own handler waits in flush(), too."""

import pytest
from contract_helpers import handler, round_trip
from helpers import patient, wait_until

from tstpool import ConnectionClosed

MUCH = bytes(32 << 20)


@pytest.mark.parametrize("closing", [False, True], ids=["open", "closing"])
@pytest.mark.parametrize(("workers", "stuck"), [(4, 1), (2, 2)], ids=["one of the workers", "all workers"])
def test_write_timeout_ends_it(make_pool, make_client, workers, stuck, closing):
    """B38: flush() raises, write_closed counts, and the workers serve others again."""
    ends = []

    def on_message(sock, data):
        if data == b"hello":
            return data
        sock.send(MUCH)
        if closing:
            sock.close()
        try:
            sock.flush()
        except Exception as error:
            ends.append(type(error))
            raise

    pool = make_pool(
        handler(on_message=on_message, on_error=lambda sock, error: None),
        write_timeout=patient(0.3),
        linger_timeout=patient(60),
        workers=workers,
        shards=1,
        max_total_queued=None,
        drain=0,
    )
    for _ in range(stuck):
        make_client(pool).sendall(b"much")
    wait_until(lambda: ends == [ConnectionClosed] * stuck, timeout=4)
    wait_until(lambda: pool.stats().write_closed == stuck)
    wait_until(lambda: len(pool) == 0 and pool.stats().bytes_queued == 0)
    assert round_trip(make_client(pool), b"hello") == b"hello"
