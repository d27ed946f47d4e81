"""The engine's logger. A handler may raise an exception whose text a peer has chosen: neither its line ends nor its
control characters are to reach a log as they are."""

from __future__ import annotations

import contextlib
import logging
import textwrap

logger = logging.getLogger("tstpool")


def escaped(text: str) -> str:
    """`text` with everything but line ends that is not printable written as \\x1b and the like."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def escape_traceback(record: logging.LogRecord) -> bool:
    """Writes the record's traceback before a formatter does, escaped and indented: a line that came from a peer can't
    pass for a record of its own. The exception itself stays with the record."""
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        record.exc_text = textwrap.indent(escaped(logging.Formatter().formatException(record.exc_info)), "  ")
    return True


logger.addFilter(escape_traceback)


def log(level: int, text: str, *arguments: object, exc_info: BaseException | bool | None = None) -> None:
    """As logger.log(), for the engine's own records: a handler of the log that fails must not take a worker with it."""
    try:
        logger.log(level, text, *arguments, exc_info=exc_info)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            logger.error("a record could not be logged", exc_info=error)
