"""B63: the text of an exception may be a peer's message, which is no reason to write megabytes."""

import logging
import re
import textwrap

import pytest
from contract_helpers import handler
from helpers import wait_until

from tstpool._log import escaped

LONG = "begin\x1b " + "m" * 300_000 + " end\x07"
SHORT = "short\x1b"


@pytest.fixture
def records(caplog):
    """Those of failed handlers that were logged so far."""
    caplog.set_level(logging.DEBUG, "tstpool")
    return lambda: [record for record in caplog.records if record.levelno == logging.ERROR]


def test_the_first_and_the_last_part_are_there_and_what_is_between_is_counted(make_pool, make_client, records):
    """B63: control characters are escaped in both parts. A short one is written whole."""

    def on_message(sock, data):
        raise ValueError(LONG if data == b"long" else SHORT)

    pool = make_pool(handler(on_message=on_message))
    make_client(pool).sendall(b"long")
    (long,) = wait_until(records)
    whole = logging.Formatter().formatException(long.exc_info)
    assert LONG in whole
    text = "\n".join(line[2:] for line in long.exc_text.split("\n"))
    assert len(text) < 20_000
    first, left_out, last = re.split(r"\n\.\.\. (\d+) characters are left out \.\.\.\n", text)
    assert "ValueError: begin\\x1b mmm" in first and escaped(whole).startswith(first)
    assert last.endswith("mmm end\\x07") and escaped(whole).endswith(last)
    kept = (first + last).replace("\\x1b", "\x1b").replace("\\x07", "\x07")
    assert len(kept) + int(left_out) == len(whole)

    make_client(pool).sendall(b"short")
    _, short = wait_until(lambda: len(records()) == 2 and records())
    whole = logging.Formatter().formatException(short.exc_info)
    assert SHORT in whole
    assert short.exc_text == textwrap.indent(whole.replace("\x1b", "\\x1b"), "  ")
