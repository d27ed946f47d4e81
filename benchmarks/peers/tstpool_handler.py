"""Echo with tstpool: a handler object, everything else by default."""

from tstpool import TstHandler, TstPool, TstSocket


class Echo(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> None:
        sock.send(data)


if __name__ == "__main__":
    pool = TstPool(Echo())
    print(pool.listen("127.0.0.1", 0)[1], flush=True)
    pool.serve_forever()
