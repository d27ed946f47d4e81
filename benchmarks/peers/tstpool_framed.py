"""Framed echo with tstpool: the engine cuts, the handler gets whole messages and returns the replies."""

from tstpool import LengthPrefixed, TstHandler, TstPool, TstSocket


class Echo(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    pool = TstPool(Echo(), framing=LengthPrefixed(4))
    print(pool.listen("127.0.0.1", 0)[1], flush=True)
    pool.serve_forever()
