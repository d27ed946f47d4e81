"""on_slow hears of a slow handler once it has returned, wherever its message stands in a group of quick ones."""

import time

from helpers import wait_until

from tstpool import LengthPrefixed, TstHandler, TstStat


class Server(TstHandler):
    """Takes quick messages, and slow ones; a slow one's result is `ends_with`."""

    def __init__(self, ends_with=None):
        self.ends_with = ends_with
        self.handled = 0
        self.slow = []

    def on_message(self, sock, data):
        self.handled += 1
        if data == b"slow":
            time.sleep(0.1)
            return self.ends_with
        return None

    def on_slow(self, sock, seconds):
        self.slow.append(seconds)


def is_heard_of(make_pool, make_client, server):
    """Quick messages, after which a worker looks at its clock once for several; then a slow one, and nothing more."""
    pool = make_pool(server, workers=1, slow_handler=0.05, framing=LengthPrefixed(1))
    client = make_client(pool)
    client.sendall(b"\x05quick" * 500)
    wait_until(lambda: server.handled == 500)
    client.sendall(b"\x04slow")
    wait_until(lambda: server.handled == 501)
    # Not any: on a busy machine a quick one may have been slow, too.
    wait_until(lambda: any(seconds > 0.09 for seconds in server.slow), message="on_slow was not called")
    return client


def test_a_slow_message_after_quick_ones_is_reported_without_further_traffic(make_pool, make_client):
    """The connection says nothing afterwards, and on_slow is called all the same."""
    is_heard_of(make_pool, make_client, Server())


def test_a_slow_message_that_ends_its_connection_is_reported(make_pool, make_client):
    """Nobody but on_slow would be told: there is no on_disconnect."""
    assert is_heard_of(make_pool, make_client, Server(TstStat.DISCONNECT)).recv(1) == b""
