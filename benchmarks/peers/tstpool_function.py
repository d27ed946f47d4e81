"""Echo with tstpool in the original's style: a plain function that reads and sends."""

from tstpool import TstPool, TstSocket


def echo(sock: TstSocket) -> None:
    sock.send(sock.read())


if __name__ == "__main__":
    pool = TstPool(echo)
    print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
    pool.serve_forever()
