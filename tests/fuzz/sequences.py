"""Fuzz target: operations on one pool with real sockets, in any order; tests/fuzz/pool_model.py says what must hold.

The bytes: a framing, options of the pool, then up to 48 operations, each with its operands.
"""

from fuzz.framing_model import Model
from fuzz.pool_model import World
from fuzz.source import Source

import tstpool

MOST_OPERATIONS = 48
MOST_PEERS = 4
SIZES = [0, 1, 2, 3, 4, 7, 8, 50, 51, 300, 2000, 8192, 20000, 70000, 131073, 200000]

FRAMINGS = [
    None,
    Model(tstpool.Raw, 97),
    Model(tstpool.Fixed, 2**20, size=7),
    Model(tstpool.Fixed, 2**20, size=300),
    Model(tstpool.Delimited, 2**20, delimiter=b"\n"),
    Model(tstpool.Delimited, 50, delimiter=b"\0\x01", keep=True),
    Model(tstpool.LengthPrefixed, 2**20, size=4),
    Model(tstpool.LengthPrefixed, 50, size=1, keep=True),
    Model(tstpool.LengthPrefixed, 2**20, size=3, byteorder="little", offset=2, adjust=-5),
    Model(tstpool.LengthPrefixed, 2**18, size=4, keep=True),
]


def target(data):
    source = Source(data)
    world = World(
        source.choose(FRAMINGS),
        unix=source.choose([True, True, True, False]),
        trigger=source.choose(["level", "oneshot", "edge"]),
        workers=source.choose([1, 2, 3]),
        copy=source.choose([True, False]),
        on_overflow=source.choose(["raise", "close"]),
        **source.choose([{}, {"high_water": 300, "low_water": 100, "max_queued": 3000}]),
    )
    try:
        world.connect()
        for _ in range(MOST_OPERATIONS):
            if not source:
                break
            operate(world, source)
    except BaseException:
        world.discard()
        raise
    world.finish()


def operate(world, source):
    choice = source.number()
    if choice >= 240:
        return operate_pool(world, source, choice)
    peer = source.choose(world.peers) if world.peers else None
    if peer is None:
        return world.connect()
    if choice >= 150:
        return operate_client(world, source, peer)
    operation = server_operation(world, source, in_handler=choice >= 75)
    if choice >= 75:
        return peer.script.append(operation)
    return operation(peer)


def operate_pool(world, source, choice):
    if choice == 255:
        return world.stop()
    if choice >= 253:
        return world.start()
    if choice >= 250:
        return world.broadcast(source.choose(SIZES))
    return world.connect() if len(world.peers) < MOST_PEERS else None


def operate_client(world, source, peer):
    choice = source.below(16)
    if choice < 5:
        return world.send(peer, source.some(40))
    if choice < 10:
        return world.send_framed(peer, source.choose(SIZES))
    if choice < 13:
        return world.receive(peer)
    if choice == 13:
        return world.half_close(peer)
    if choice == 14:
        return world.leave(peer, with_reset=source.flag())
    return world.check(peer)


def server_operation(world, source, in_handler):
    """A function of a Peer, to be called now or in its handler."""
    choice = source.below(16 if in_handler else 11)
    n = source.choose(SIZES)
    if choice < 3:
        return lambda peer: world.reply(peer, n)
    if choice < 6:
        return lambda peer: world.reply_framed(peer, n)
    if choice == 15:  # what came to the operations when the corpus was there already
        return {
            1: lambda peer: world.read(peer, n),
            2: lambda peer: world.ask(peer, n),
            3: lambda peer: world.read_in_on_writable(peer, n),
            4: lambda peer: world.ask_in_on_writable(peer, n),
        }.get(source.below(5), lambda peer: None)
    if choice in (11, 12):
        later, passing = source.choose(FRAMINGS[1:]), source.choose(FRAMINGS[1:])
        return lambda peer: world.reframe(peer, later) if choice == 11 else world.reframe_twice(peer, passing, later)
    return {
        6: world.pause,
        7: world.resume,
        8: world.need_send,
        9: world.flush,
        10: lambda peer: world.close(peer, abort=n % 2 == 1),
        13: world.disconnect,
        14: world.fail,
    }[choice]
