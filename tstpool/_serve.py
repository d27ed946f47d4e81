"""`tstpool.serve`: a server in one call, with the signals that a service gets."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from tstpool._core import TstHandler, TstPool, TstSocket
from tstpool._types import TstStat

_Result: TypeAlias = TstStat | bytes | bytearray | memoryview | None


def serve(
    handler: TstHandler | Callable[[TstSocket], _Result] | Callable[[TstSocket, Any], _Result],
    host: str | None = "127.0.0.1",
    port: int = 20001,
    *,
    drain: float = 5.0,
    **options: Any,
) -> None:
    """Listens, serves, and returns when SIGINT or SIGTERM has come and the pool has stopped.

    handler, options: as TstPool takes them. host, port: as TstPool.listen takes them. drain: seconds for the stop.
    Called on another thread than the main one it leaves signals alone and ends when somebody stops the pool.
    Raises OSError with the address in its text when it can't listen.

    It listens where it was told to, so port 0 is of little use here: nobody but a handler (`sock.local`) gets to know
    which port that became. To know it, make a TstPool; its listen() returns the address, `pool.addresses` has it on any
    thread, and serve_forever() does the rest.
    """
    pool = TstPool(handler, **options)
    if threading.current_thread() is not threading.main_thread():
        pool.listen(host, port)
        pool.serve_forever(drain)
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signal.default_int_handler)
        pool.listen(host, port)  # not before: who sees that it listens may send the signal
        pool.serve_forever(drain)
    except KeyboardInterrupt:  # the pool has stopped: that is how a server is ended
        if pool.addresses:  # but for a signal that came before serve_forever() could see to it
            pool.stop(0)
    finally:
        for number, action in before.items():
            if action is not None:  # else it is none of Python's
                signal.signal(number, action)
