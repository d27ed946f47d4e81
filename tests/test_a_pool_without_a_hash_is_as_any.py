"""B14, B51: a subclass that defines equality, as a dataclass does, has no hash: the log can do without."""

import logging
import time

from contract_helpers import handler, round_trip
from helpers import connect, wait_until

from tstpool import TstPool


class App(TstPool):
    def __eq__(self, other):
        return self is other

    __hash__ = None


def test_what_is_slow_or_fails_is_logged_and_the_slow_ones_go_on(caplog):
    """B14, B51: no connection is broken by it."""

    def on_message(sock, data):
        if data == b"fail":
            raise ValueError("the handler's own")
        if data == b"slow":
            time.sleep(0.1)
        return data

    pool = App(handler(on_message=on_message), workers=2, slow_handler=0.02)
    address = pool.listen("127.0.0.1", 0)
    with caplog.at_level(logging.INFO):
        pool.start()
        try:
            with connect(address) as client:
                assert round_trip(client, b"slow") == b"slow"
                assert round_trip(client, b"next") == b"next"
                client.sendall(b"fail")
                assert client.recv(4) == b""
            wait_until(lambda: "a handler raised" in caplog.text and "a handler took" in caplog.text)
        finally:
            pool.stop()
    assert "the handler's own" in caplog.text
    assert "broke" not in caplog.text
    assert "unhashable" not in caplog.text
