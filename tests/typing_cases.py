"""What type checkers must accept and refuse of tstpool: `make lint` has mypy read this file, nothing runs it.

A line that must be refused carries an `ignore`, and mypy complains about one that is not needed.
"""

from typing_extensions import assert_type

import tstpool
from tstpool import (
    Delimited,
    LengthPrefixed,
    MessageTooLarge,
    PoolStats,
    TstHandler,
    TstNogilHandler,
    TstPool,
    TstSocket,
    TstStat,
)


class Replying(TstHandler):
    def on_connect(self, sock: TstSocket) -> TstStat | None:
        return TstStat.DISCONNECT if len(sock.peer or "") > 100 else None

    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        return data.upper()

    def on_error(self, sock: TstSocket, exc: BaseException) -> TstStat | None:
        return TstStat.SUSPEND if isinstance(exc, MessageTooLarge) else None


class Viewing(TstHandler):
    def on_message(self, sock: TstSocket, data: memoryview) -> None:
        sock.send_message(data[1:])


class Deciding(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> TstStat | bytes | None:
        return data or TstStat.DISCONNECT


class Compiled(TstNogilHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> bytes:
        return data


class Wrong(TstHandler):
    def on_message(self, sock: TstSocket, data: bytes) -> str:  # type: ignore[override]
        return data.decode()

    def on_connect(self) -> None:  # type: ignore[override]
        pass


def function(sock: TstSocket) -> TstStat:
    sock.send(sock.read(10))
    return TstStat.SUSPEND


def not_a_handler(sock: TstSocket) -> str:
    return sock.read().decode()


def pools() -> None:
    pool = TstPool(Replying(), framing=LengthPrefixed(4, "little"), workers=4, shards=2, copy=False)
    assert_type(pool.listen("127.0.0.1", 0, framing=Delimited()), tuple[str, int])
    assert_type(pool.stats(), PoolStats)
    assert_type(pool.sockets(), list[TstSocket])
    assert_type(pool[3], TstSocket)
    assert_type(pool.connect("localhost", 1, handler=Compiled()).send(bytearray(3)), int)
    with pool as same:
        assert_type(same.broadcast(b"x", exclude=pool[3], where=lambda sock: sock.closed), int)
    TstPool(function)
    TstPool(not_a_handler)  # type: ignore[arg-type]
    TstPool(Replying)  # type: ignore[arg-type]
    TstPool(framing="lines")  # type: ignore[arg-type]
    LengthPrefixed(5)  # type: ignore[arg-type]
    tstpool.serve(Compiled(), port=1)
    assert_type(tstpool.get_include(), str)


def sockets(sock: TstSocket) -> None:
    sock.handler = Viewing()
    sock.handler = function
    sock.handler = None
    sock.handler = 3  # type: ignore[assignment]
    sock.framing = Delimited()
    sock.user_data = {"any": "thing"}
    assert_type(sock.read(), bytes)
    assert_type(sock.recv_data.s, memoryview)
    sock.id = 3  # type: ignore[misc]
    sock.send("text")  # type: ignore[arg-type]
