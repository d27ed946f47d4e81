"""Fuzz target: addresses and options of any type and value. Only documented exceptions come, and nothing leaks.

The bytes: options of a TstPool; then some calls of listen() with an address and options, some of connect().
Names are never looked up, and nobody is connected to but this machine: see `numeric_only`.
"""

import contextlib
import gc
import math
import os
import socket
import tempfile
import warnings

from fuzz.framing_model import edge
from fuzz.source import Source
from helpers import open_fds

import tstpool
from tstpool import _net

# What TstPool(), listen() and connect() say that they raise; OverflowError is what int and float themselves raise.
DOCUMENTED = (OSError, TypeError, ValueError, tstpool.TstError, OverflowError)

HOSTS = [
    None, "", "::", "0.0.0.0", "127.0.0.1", "127.0.0.2", "::1", "localhost", "127.1", "0x7f.1", "127.0.0.1%lo",
    "::1%lo", "fe80::1%lo", "::ffff:127.0.0.1", "[::1]", "300.1.1.1", "192.0.2.1", "unix:", "unix:new",
    "unix:abandoned", "unix:alive", "unix:file", "unix:folder", "unix:missing/new", "unix:new\0x", "unix:alive\0x",
    "unix:abandoned\0x", "unix:" + "x" * 107, "unix:" + "x" * 108, "UNIX:new",
]  # fmt: skip
SIZES = [
    "max_recv_size",
    "max_send_size",
    "max_connections",
    "high_water",
    "low_water",
    "max_queued",
    "max_total_queued",
]
TIMES = ["first_byte_timeout", "message_timeout", "idle_timeout", "write_timeout", "linger_timeout"]
WORDS = ["trigger", "when_full", "on_overflow", "name"]
OTHER = ["workers", "shards", "idle_time", "slow_handler", "copy", "auto_pause", "framing", "handler"]


def target(data):
    source = Source(data)
    with folder(), numeric_only():
        gc_before = open_fds()
        use_pool(source)
        if open_fds() != gc_before:
            gc.collect()  # an exception's traceback may be a cycle
        assert open_fds() == gc_before, f"leaked: {open_fds()}, before: {gc_before}"
        assert not os.path.lexists("new"), "the file of a listener is left"


def use_pool(source):
    options = {source.choose(SIZES + TIMES + WORDS + OTHER): value(source) for _ in range(source.below(4))}
    try:
        pool = tstpool.TstPool(**options)
    except DOCUMENTED:
        return
    try:
        for _ in range(source.below(4) + 1):
            use_address(pool, source)
        repr(pool)
    finally:
        assert pool.stop(drain=0)
    assert pool.addresses == []


def use_address(pool, source):
    call = source.choose([pool.listen, pool.listen, pool.listen, pool.connect])
    names = [*TIMES, "backlog", "framing"] if call == pool.listen else ["timeout", "framing", "type", "handler"]
    options = {source.choose(names): value(source) for _ in range(source.below(3))}
    before = pool.addresses
    try:
        made = call(host(source), port(source), **options)
    except DOCUMENTED as error:
        assert str(error)
        # Of a name with several addresses some may listen already.
        assert call == pool.connect or pool.addresses[: len(before)] == before
        return
    if call == pool.listen:
        assert made == pool.addresses[len(before)]
        assert made[0].startswith("unix:") or 0 < made[1] <= 65535


def host(source):
    choice = source.below(len(HOSTS) + 4)
    if choice < len(HOSTS):
        return HOSTS[choice]
    if choice == len(HOSTS):
        return value(source)
    prefix = "" if choice == len(HOSTS) + 1 else "unix:"
    text = source.some(120).decode("utf-8", "surrogateescape" if source.flag() else "replace").replace("/", "_")
    return prefix + text.lstrip(".")


def port(source):
    """Mostly 0; else any number that is none of a real port beyond 1023, which somebody may be using."""
    choice = source.below(8)
    if choice < 5:
        return 0
    made = value(source)
    return 0 if isinstance(made, int) and 1023 < made < 65536 else made


def value(source):
    """Anything that somebody may give by mistake."""
    kind = source.below(12)
    if kind < 4:
        return source.choose([-1, 1]) * edge(source)
    if kind == 4:
        return source.choose([0.0, -0.0, 0.001, 1.0, 1e-12, 4e6, 4e6 + 1, 1e9, 1e300, math.inf, -math.inf, math.nan])
    if kind == 5:
        return source.choose(
            ["level", "oneshot", "edge", "wait", "close", "raise", "block", "", "x", "127.0.0.1", "\0"]
        )
    if kind == 6:
        return source.some(12).decode("latin-1")
    if kind == 7:
        return source.some(12)
    if kind == 8:
        return source.choose(
            [tstpool.Raw(), tstpool.Fixed(3), tstpool.Delimited(), tstpool.LengthPrefixed(), tstpool.Fixed]
        )
    if kind == 9:
        return source.choose([tstpool.TstHandler(), tstpool.TstHandler, print, lambda sock: None, lambda: None])
    return source.choose([None, True, False, [], {}, object(), Odd(), 3 + 4j, -(2**70), 2**70, "a" * 300])


class Odd:
    """Raises, where somebody asks what it is."""

    def __index__(self):
        raise ValueError("no number")

    __float__ = __index__

    def __str__(self):
        raise ValueError("no text")

    def __repr__(self):
        return "Odd()"


@contextlib.contextmanager
def folder():
    """A folder to work in, with what a unix address may hit."""
    before = os.open(".", os.O_RDONLY)
    with tempfile.TemporaryDirectory(prefix="tst-") as path:
        os.chdir(path)
        alive = socket.socket(socket.AF_UNIX)
        try:
            os.mkdir("folder")
            with open("file", "w"):
                pass
            with socket.socket(socket.AF_UNIX) as abandoned:
                abandoned.bind("abandoned")
            alive.bind("alive")
            alive.listen(8)
            yield
            assert os.path.isdir("folder") and os.path.isfile("file"), "not ours to remove"
            assert os.path.exists("alive"), "somebody listened there"
        finally:
            alive.close()
            os.fchdir(before)
            os.close(before)


@contextlib.contextmanager
def numeric_only():
    """getaddrinfo() for `localhost` and for numbers alone; nothing is asked of a name server. To connect only to this
    machine. What a socket that nobody closed says when it is collected is an error."""
    real, connected = socket.getaddrinfo, _net.connected_socket

    def numeric(host, port, family=0, type=0, proto=0, flags=0):
        if host == "localhost":
            return real(host, port, family, type, proto, flags)
        return real(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)

    def to_this_machine(host, port, timeout):
        named = host in ("localhost", "127.0.0.1", "127.0.0.2", "::1") or str(host).startswith("unix:")
        return connected(host if named or not isinstance(host, str) else "127.0.0.1", port, timeout)

    socket.getaddrinfo, _net.connected_socket = numeric, to_this_machine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        socket.getaddrinfo, _net.connected_socket = real, connected
