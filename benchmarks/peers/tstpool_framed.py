"""Framed echo with tstpool: the engine cuts, the handler gets whole messages and returns the replies.

With the argument `lend` the handler gets memoryviews of the messages where they were received (copy=False).
"""

import sys

from tstpool import LengthPrefixed, TstHandler, TstPool, TstSocket


class Echo(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        return data


class EchoOfLent(TstHandler):
    def on_message(self, sock: TstSocket, data: memoryview) -> None:  # type: ignore[override]
        sock.send_message(data)


if __name__ == "__main__":
    lend = sys.argv[1:] == ["lend"]
    pool = TstPool(EchoOfLent() if lend else Echo(), framing=LengthPrefixed(4), copy=not lend)
    print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
    pool.serve_forever()
