"""Echo with tstpool: a handler object, everything else by default (but for the backlog, as all have it)."""

from tstpool import TstHandler, TstPool, TstSocket


class Echo(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    pool = TstPool(Echo())
    print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
    pool.serve_forever()
