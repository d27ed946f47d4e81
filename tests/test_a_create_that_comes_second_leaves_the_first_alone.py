"""B42: another thread starts the pool in the middle of create()."""

import threading

import pytest
from contract_helpers import echo, free_port, handler, round_trip
from helpers import connect

from tstpool import TstError, TstPool


def test_that_threads_run_goes_on():
    """B42: create() raises, and has stopped nothing."""

    class Raced(TstPool):
        def listen(self, *args, **options):
            address = super().listen(*args, **options)
            thread = threading.Thread(target=self.start)
            thread.start()
            thread.join()
            return address

    pool = Raced(handler(on_message=echo), workers=2)
    try:
        with pytest.raises(TstError, match="running already"):
            pool.create(2, "127.0.0.1", free_port(), handler(on_message=echo))
        assert pool.running
        with connect(pool) as client:
            assert round_trip(client, b"hello") == b"hello"
    finally:
        pool.stop()
