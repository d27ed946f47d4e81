"""The engine's logger. A handler may raise an exception whose text a peer has chosen: neither its line ends nor its
control characters are to reach a log as they are, nor as many records as the peer likes."""

from __future__ import annotations

import contextlib
import logging
import os
import textwrap
import threading
import time
import weakref

from tstpool._types import MessageTooLarge

logger = logging.getLogger("tstpool")

# Of what a peer can cause, this many records of a kind in a second: enough to see what goes wrong, and too few to fill
# a disk in a day.
RECORDS_A_SECOND = 10
TEXT_MOST = 8192  # characters of a traceback: an exception's text may be a peer's message, however long
KINDS_MOST = 100  # classes of exceptions that are counted each by itself: handlers may make new ones as they go


def escaped(text: str) -> str:
    """`text` with everything but line ends that is not printable written as \\x1b and the like."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def escape_traceback(record: logging.LogRecord) -> bool:
    """Writes the record's traceback before a formatter does, escaped and indented: a line that came from a peer can't
    pass for a record of its own. The exception itself stays with the record."""
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        text = logging.Formatter().formatException(record.exc_info)
        if len(text) > TEXT_MOST:
            left_out = len(text) - TEXT_MOST
            text = f"{text[: TEXT_MOST // 2]}\n... {left_out} characters are left out ...\n{text[-TEXT_MOST // 2 :]}"
        record.exc_text = textwrap.indent(escaped(text), "  ")
    return True


logger.addFilter(escape_traceback)


def log(level: int, text: str, *arguments: object, exc_info: BaseException | bool | None = None) -> None:
    """As logger.log(), for the engine's own records: a handler of the log that fails must not take a worker with it."""
    try:
        logger.log(level, text, *arguments, exc_info=exc_info)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            logger.error("a record could not be logged", exc_info=error)


class Allowance:
    """What may be logged of one kind in this second."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.records = 0
        self.left_out = 0


# By the pool's id, with what tells of its end: a pool of a user's class may have no hash.
_allowances: dict[int, tuple[weakref.ref[object], dict[object, Allowance]]] = {}
_lock = threading.RLock()  # a finalizer may come while the same thread holds it


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def left_out(pool: object, kind: object) -> int | None:
    """Asks for a record that a peer has caused. None: there are too many of that kind, this one is to be left out; else
    how many were left out since the last one. On any thread."""
    now = time.monotonic()
    with _lock:
        number = id(pool)
        if number not in _allowances:
            _allowances[number] = weakref.ref(pool, lambda _: _allowances.pop(number, None)), {}
        kinds = _allowances[number][1]
        if len(kinds) >= KINDS_MOST and kind not in kinds:
            kind = BaseException  # the rest together
        allowance = kinds.setdefault(kind, Allowance())
        if now - allowance.since >= 1.0:
            allowance.since, allowance.records = now, 0
        allowance.records += 1
        if allowance.records > RECORDS_A_SECOND:
            allowance.left_out += 1
            return None
        before, allowance.left_out = allowance.left_out, 0
        return before


def log_caused(
    pool: object, kind: object, level: int, text: str, *arguments: object, exc_info: BaseException | None = None
) -> None:
    """A record that a peer has caused, unless there are too many of that kind."""
    try:
        before = left_out(pool, kind)
    except MemoryError:  # then one record less: whoever has it written is dealing with worse
        return
    if before is not None:
        text += f" ({before} like it were left out)" if before else ""
        log(level, text, *arguments, exc_info=exc_info)


def log_failure(pool: object, sd: int, exc: BaseException) -> None:
    """What TstHandler.on_error does unless it is overridden."""
    if isinstance(exc, MessageTooLarge) and exc.__traceback__ is None:  # the engine's own: nobody has raised it
        log_caused(pool, type(exc), logging.WARNING, "socket %d is closed: %s", sd, exc)
    else:
        log_caused(pool, type(exc), logging.ERROR, "a handler raised on socket %d", sd, exc_info=exc)
