"""Types of the compiled part. The docstrings are in the files that _core.pyx includes."""

import socket
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias, TypedDict, final, overload

from typing_extensions import Buffer, Self, Unpack, disjoint_base

from tstpool._types import PoolStats, TstSockType, TstStat

EPOLLIN: Final[int]
EPOLLOUT: Final[int]
EPOLLPRI: Final[int]
EPOLLRDHUP: Final[int]
EPOLLERR: Final[int]
EPOLLHUP: Final[int]
EPOLLET: Final[int]
EPOLLONESHOT: Final[int]

_Verdict: TypeAlias = TstStat | None
_Reply: TypeAlias = bytes | bytearray | memoryview
_Handler: TypeAlias = (
    "TstHandler | Callable[[TstSocket], _Verdict | _Reply] | Callable[[TstSocket, Any], _Verdict | _Reply]"
)
_Which: TypeAlias = "TstSocket | int"

@disjoint_base
class Framing:
    @property
    def max_message(self) -> int: ...

@final
class Raw(Framing):
    def __init__(self, max_message: int | None = None) -> None: ...

@final
class Fixed(Framing):
    def __init__(self, n: int, *, max_message: int | None = None) -> None: ...

@final
class Delimited(Framing):
    def __init__(self, delimiter: Buffer = b"\n", keep: bool = False, *, max_message: int | None = None) -> None: ...

@final
class LengthPrefixed(Framing):
    def __init__(
        self,
        size: Literal[1, 2, 3, 4, 8] = 4,
        byteorder: Literal["big", "little"] = "big",
        offset: int = 0,
        adjust: int = 0,
        strip: bool = True,
        *,
        max_message: int | None = None,
    ) -> None: ...

@final
class TstData:
    req_pos: int
    req_len: int
    com_len: int
    @property
    def s(self) -> memoryview: ...
    @property
    def s_len(self) -> int: ...
    @property
    def checked_len(self) -> int: ...
    @property
    def trans_time(self) -> float: ...
    def resize(self, n: int) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class TstSocket:
    user_data: Any
    handler: _Handler | None
    framing: Framing | None
    @property
    def id(self) -> int: ...
    @property
    def sd(self) -> int: ...
    def fileno(self) -> int: ...
    @property
    def type(self) -> TstSockType: ...
    @property
    def closed(self) -> bool: ...
    @property
    def events(self) -> int: ...
    @property
    def thread_no(self) -> int: ...
    @property
    def peer(self) -> tuple[str, int] | str | None: ...
    @property
    def local(self) -> tuple[str, int] | str | None: ...
    @property
    def recv_data(self) -> TstData: ...
    @property
    def send_data(self) -> TstData: ...
    @property
    def queued(self) -> int: ...
    def send(self, data: Buffer) -> int: ...
    def send_message(self, data: Buffer) -> int: ...
    def flush(self, timeout: float | None = None) -> None: ...
    def read(self, n: int = -1) -> bytes: ...
    def read_into(self, buf: Buffer) -> int: ...
    def close(self, abort: bool = False) -> bool: ...
    def send_eof(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...

class TstHandler:
    def on_connect(self, sock: TstSocket) -> _Verdict: ...
    # `data` is bytes; in a pool with copy=False a memoryview. Any, so that a handler may say which of them it takes.
    def on_message(self, sock: TstSocket, data: Any) -> _Verdict | _Reply: ...
    def on_writable(self, sock: TstSocket) -> _Verdict: ...
    def on_eof(self, sock: TstSocket) -> _Verdict: ...
    def on_disconnect(self, sock: TstSocket, reason: BaseException | None) -> _Verdict: ...
    def on_idle(self, worker_no: int) -> None: ...
    def on_slow(self, sock: TstSocket, seconds: float) -> None: ...
    def on_error(self, sock: TstSocket, exc: BaseException) -> _Verdict: ...

@disjoint_base
class TstNogilHandler(TstHandler): ...

class _Limits(TypedDict, total=False):
    """Of a connection, by the names of TstPool's parameters."""

    first_byte_timeout: float | None
    message_timeout: float | None
    idle_timeout: float | None
    write_timeout: float | None
    linger_timeout: float
    high_water: int
    low_water: int
    max_queued: int | None
    on_overflow: Literal["raise", "block", "close"]
    auto_pause: bool

@disjoint_base
class TstPool:
    def __init__(
        self,
        handler: _Handler | None = None,
        *,
        framing: Framing | None = None,
        workers: int | None = None,
        copy: bool = True,
        trigger: Literal["level", "oneshot", "edge"] = "level",
        max_recv_size: int = 4096,
        max_send_size: int = 4096,
        shards: int | None = None,
        idle_time: float = 3.0,
        slow_handler: float = 0.1,
        name: str = "tstpool",
        max_connections: int | None = None,
        when_full: Literal["wait", "close"] = "wait",
        first_byte_timeout: float | None = 15.0,
        message_timeout: float | None = 60.0,
        idle_timeout: float | None = 75.0,
        write_timeout: float | None = 60.0,
        linger_timeout: float = 5.0,
        high_water: int = 65536,
        low_water: int = 16384,
        max_queued: int | None = 1048576,
        on_overflow: Literal["raise", "block", "close"] = "raise",
        auto_pause: bool = True,
        max_total_queued: int | None = 268435456,
        busy_poll: float = 20e-6,
        keepalive: int | None = None,
        accepts_per_turn: int = 16,
        accept_pause: float = 0.1,
        receive_size: int = 262144,
        messages_per_turn: int = 32,
    ) -> None: ...
    @property
    def running(self) -> bool: ...
    @property
    def workers(self) -> int: ...
    @property
    def trigger(self) -> Literal["level", "oneshot", "edge"]: ...
    @property
    def addresses(self) -> list[tuple[str, int]]: ...
    @property
    def framing(self) -> Framing | None: ...
    def setEventNewConnected(self, f: Callable[[TstSocket], _Verdict] | None) -> None: ...
    def setEventDisconnected(self, f: Callable[..., _Verdict] | None) -> None: ...
    def setEventMostElapsed(self, f: Callable[..., None] | None) -> None: ...
    def setEventIdle(self, f: Callable[[int], None] | None) -> None: ...
    def listen(
        self,
        host: str | None,
        port: int = 0,
        backlog: int = 1024,
        framing: Framing | None = ...,
        *,
        first_byte_timeout: float | None = ...,
        message_timeout: float | None = ...,
        idle_timeout: float | None = ...,
        write_timeout: float | None = ...,
        linger_timeout: float = ...,
        high_water: int = ...,
        low_water: int = ...,
        max_queued: int | None = ...,
        on_overflow: Literal["raise", "block", "close"] = ...,
        auto_pause: bool = ...,
    ) -> tuple[str, int]: ...
    def connect(
        self,
        host: str,
        port: int = 0,
        timeout: float | None = 10.0,
        type: int = ...,
        handler: _Handler | None = None,
        user_data: Any = None,
        framing: Framing | None = ...,
        **limits: Unpack[_Limits],
    ) -> TstSocket: ...
    @overload
    def addsocket(  # type: ignore[overload-overlap]
        self,
        sock: socket.socket | int,
        type: Literal[TstSockType.LISTEN],
        handler: None = None,
        user_data: None = None,
        framing: Framing | None = ...,
        **limits: Unpack[_Limits],
    ) -> None: ...
    @overload
    def addsocket(
        self,
        sock: socket.socket | int,
        type: int = ...,
        handler: _Handler | None = None,
        user_data: Any = None,
        framing: Framing | None = ...,
        **limits: Unpack[_Limits],
    ) -> TstSocket: ...
    def start(self) -> None: ...
    def stop(self, drain: float = 5.0) -> bool: ...
    def serve_forever(self, drain: float = 5.0) -> None: ...
    def create(
        self,
        thread_count: int,
        bind_ip: str | None,
        bind_port: int,
        func: _Handler,
        max_recv_size: int = 4096,
        max_send_size: int = 4096,
    ) -> bool: ...
    def destroy(self, wait_time: float = 5.0) -> bool: ...
    def need_send(self, sock_or_sd: _Which) -> bool: ...
    def closesocket(self, sock_or_sd: _Which) -> bool: ...
    def broadcast(
        self,
        data: Buffer,
        exclude: _Which | Iterable[_Which] | None = None,
        where: Callable[[TstSocket], bool] | None = None,
    ) -> int: ...
    def sockets(self) -> list[TstSocket]: ...
    def stats(self) -> PoolStats: ...
    def waiting(self) -> int: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __iter__(self) -> Iterator[TstSocket]: ...
    def __contains__(self, sock_or_sd: _Which) -> bool: ...
    def __getitem__(self, sd: int) -> TstSocket: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
