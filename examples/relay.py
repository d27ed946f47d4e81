"""A TCP relay: what a client sends goes on to a server, and what that answers comes back. In front of examples/echo.py:
``python examples/relay.py --to 127.0.0.1:20001``, then ``nc 127.0.0.1 20004``.

Each direction ends by itself: who finishes its request and then reads, as ``nc -N`` does, gets all of the answer. Who
sends faster than the other side reads is held back by TCP, as no more than HIGH_WATER and one receive wait here. Where
one side breaks, or takes nothing for a minute (write_timeout), the other one is told with a reset, so that it does not
take half an answer for the whole; and so are those who have something waiting when that is max_total_queued for all.

on_connect blocks while it connects. That holds one worker of the pool, and nobody else's connection.
"""

import argparse
import contextlib
import logging
import signal

from tstpool import ConnectionClosed, TstError, TstHandler, TstPool, TstSocket, TstSockType, TstStat

RECEIVE = 64 * 1024  # bytes at once
HIGH_WATER = 64 * 1024  # bytes that wait for one side, from which on the other is not read ...
LOW_WATER = 16 * 1024  # ... until no more wait than that


class Relay(TstHandler):
    """The two connections of a pair are each other's user_data."""

    def __init__(self, host: str, port: int, workers: int | None = None) -> None:
        self.server = (host, port)
        self.pool = TstPool(
            self,
            workers=workers,
            receive_size=RECEIVE,
            high_water=HIGH_WATER,
            low_water=LOW_WATER,
            auto_pause=False,  # what waits for a side must hold back the other one, not this one
            first_byte_timeout=None,  # the server may be the one that speaks first
            idle_timeout=3600.0,
        )

    def on_connect(self, sock: TstSocket) -> TstStat | None:
        if sock.type == TstSockType.SUB:  # the others are ours: their clients are here
            try:
                sock.user_data = self.pool.connect(*self.server, user_data=sock)
            except (OSError, TstError) as error:
                logging.warning("%s is turned away: %s", sock.peer, error)
                return TstStat.DISCONNECT
        return None

    def on_message(self, sock: TstSocket, data: bytes) -> None:
        other: TstSocket = sock.user_data
        with contextlib.suppress(ConnectionClosed):  # its on_disconnect is on its way, and closes this one
            if other.send(data) > HIGH_WATER:
                sock.pause()
                # Another thread may have sent it all by now, and called on_writable before the pause.
                if other.queued <= LOW_WATER:
                    sock.resume()

    def on_writable(self, sock: TstSocket) -> None:
        sock.user_data.resume()

    def on_eof(self, sock: TstSocket) -> None:
        sock.user_data.send_eof()

    def on_disconnect(self, sock: TstSocket, reason: BaseException | None) -> None:
        if reason is not None and sock.user_data is not None:
            sock.user_data.close(abort=True)
        # Else both directions have ended, here and there; what waits for the other side still has its time.


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A TCP relay.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=20004)
    parser.add_argument("--to", type=address, required=True, metavar="HOST:PORT", help="the server")
    parser.add_argument("--workers", type=int, help="threads; each connects for one client at a time")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does
    server, port = options.to
    pool = Relay(server, port, options.workers).pool
    pool.listen(options.host, options.port)
    with contextlib.suppress(KeyboardInterrupt):
        print(f"relay from {options.host}:{options.port} to {server}:{port}; Ctrl-C ends it", flush=True)
        pool.serve_forever()
