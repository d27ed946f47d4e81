"""tstpool with its options, and handlers that take time: ``tstpool_options sleep --workers 8``.

echo: nothing else. work: about 50 us of Python (a fixed amount, so that it is the same in each process) before each
reply. sleep: framed; a message of one byte makes the handler sleep for a second.
"""

import argparse
import time

from tstpool import LengthPrefixed, TstHandler, TstPool, TstSocket

from .tstpool_handler import Echo

ROUNDS = 2200  # of the loop below: some 50 us


class Work(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> None:
        x = 0
        for i in range(ROUNDS):
            x ^= i
        sock.send(data)


class Sleep(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        if len(data) == 1:
            time.sleep(1.0)
        return data


HANDLERS = {"echo": Echo, "work": Work, "sleep": Sleep}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("handler", choices=HANDLERS)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--busy-poll", type=float, default=20e-6, metavar="SECONDS")  # the pool's own default
    options = parser.parse_args()
    pool = TstPool(
        HANDLERS[options.handler](),
        framing=LengthPrefixed(4) if options.handler == "sleep" else None,
        workers=options.workers,
        shards=options.shards,
        busy_poll=options.busy_poll,
    )
    print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
    pool.serve_forever()
