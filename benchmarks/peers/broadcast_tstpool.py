"""What comes on standard input goes to all connections: tstpool, from the main thread, which is none of its workers."""

import os

from tstpool import TstPool

from .tstpool_handler import Echo

if __name__ == "__main__":
    with TstPool(Echo()) as pool:
        print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
        while data := os.read(0, 65536):
            pool.broadcast(data)
