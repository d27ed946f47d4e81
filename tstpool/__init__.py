"""tstpool: a compiled TCP engine for Python on Linux. Event-loop speed, and handlers that may block.

See `TstPool` for a start; README.md and ARCHITECTURE.md for the rest.
"""

import os as _os
import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError(f"tstpool runs on Linux only: its engine is built on epoll, which {_sys.platform} does not have")

try:
    from tstpool._core import (
        EPOLLERR,
        EPOLLET,
        EPOLLHUP,
        EPOLLIN,
        EPOLLONESHOT,
        EPOLLOUT,
        EPOLLPRI,
        EPOLLRDHUP,
        Delimited,
        Fixed,
        LengthPrefixed,
        Raw,
        TstData,
        TstHandler,
        TstNogilHandler,
        TstPool,
        TstSocket,
    )
except ModuleNotFoundError as _error:
    if _error.name != "tstpool._core":
        raise
    raise ImportError(
        "tstpool's compiled part is missing for this interpreter: install the package with "
        "'pip install .' from its source folder, or build it in place with 'make build'"
    ) from _error

from tstpool._serve import serve
from tstpool._types import (
    ConnectionClosed,
    MessageTooLarge,
    PoolStats,
    SendQueueFull,
    TstError,
    TstSockType,
    TstStat,
    WorkerStats,
)

__version__ = "0.1.0"


def get_include() -> str:
    """The directory in which Cython finds `tstpool/__init__.pxd`, for `cythonize(..., include_path=[...])`."""
    return _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))


__all__ = [
    "EPOLLERR",
    "EPOLLET",
    "EPOLLHUP",
    "EPOLLIN",
    "EPOLLONESHOT",
    "EPOLLOUT",
    "EPOLLPRI",
    "EPOLLRDHUP",
    "ConnectionClosed",
    "Delimited",
    "Fixed",
    "LengthPrefixed",
    "MessageTooLarge",
    "PoolStats",
    "Raw",
    "SendQueueFull",
    "TstData",
    "TstError",
    "TstHandler",
    "TstNogilHandler",
    "TstPool",
    "TstSockType",
    "TstSocket",
    "TstStat",
    "WorkerStats",
    "__version__",
    "get_include",
    "serve",
]
