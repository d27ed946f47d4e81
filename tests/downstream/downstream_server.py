"""Serves this package's handlers: prints each one's port, and ends when its standard input does."""

import json
import sys

import downstream_handlers

import tstpool


def main():
    counting = downstream_handlers.Counting()
    framing = tstpool.LengthPrefixed(4)
    pools = {
        "raw": tstpool.TstPool(downstream_handlers.Echo()),
        "framed": tstpool.TstPool(counting, framing=framing),
        "upper": tstpool.TstPool(downstream_handlers.Upper(), framing=framing),
    }
    for name, pool in pools.items():
        print(name, pool.listen("127.0.0.1", 0)[1], flush=True)
        pool.start()
    sys.stdin.read()
    for pool in pools.values():
        pool.stop()
    print(json.dumps(counting.counts))


if __name__ == "__main__":
    main()
