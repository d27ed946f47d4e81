"""B63: log lines hold what the engine says, never bytes of a peer; and what fails again and again is not logged so."""

import contextlib
import logging
import os
import re
import socket
import time

import pytest
from contract_helpers import ServerProcess, echo, faults, handler, round_trip
from helpers import connect, patient, reset, wait_until

from tstpool import Delimited, LengthPrefixed, MessageTooLarge, TstStat
from tstpool._log import _allowances, escape_traceback, left_out

EVIL = b"\r\nCRITICAL forged \x1b[31m\x00\x07 secret \xff\xfe"


@pytest.fixture
def log(caplog):
    """log(): all lines that were logged so far, with tracebacks, as a formatter writes them."""
    caplog.set_level(logging.DEBUG, "tstpool")
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    return lambda: "\n".join(formatter.format(record) for record in caplog.records)


def check_lines(text, expected):
    """As many records as expected, and none of the peer's bytes, escaped or not."""
    assert text.count("tstpool") >= expected
    for trace in ("forged", "secret", "\x1b", "\x00", "\x07", "\xff"):
        assert trace not in text


@pytest.mark.parametrize(
    ("framing", "stream"),
    [
        (Delimited(b"\n\n", max_message=64), EVIL * 20),
        (LengthPrefixed(4, max_message=64), b"\xff" + EVIL * 20),
    ],
    ids=["delimited", "length"],
)
def test_a_message_that_is_too_large(make_pool, make_client, log, framing, stream):
    """B63: the log says that it was too large, not what it was."""
    pool = make_pool(handler(on_message=echo), framing=framing)
    client = make_client(pool)
    client.sendall(stream)
    with contextlib.suppress(ConnectionError):
        assert client.recv(1) == b""
    wait_until(lambda: "longer than" in log())
    check_lines(log(), 1)
    assert "raised" not in log()
    assert pool.stats().too_large_closed == 1


def test_exceptions_and_slow_handlers(make_pool, make_client, log):
    """B63: while the handler has such a message in its hands: it raises, is slow, returns nonsense, the peer resets."""

    def misbehave(sock, data):
        if data.startswith(b"1"):
            raise ZeroDivisionError
        if data.startswith(b"2"):
            time.sleep(0.02)
            return TstStat.DISCONNECT
        if data.startswith(b"3"):
            return data.decode("latin1")
        sock.send(data)
        return None

    pool = make_pool(handler(on_message=misbehave), slow_handler=0.01)
    for what in (b"1", b"2", b"3"):
        client = make_client(pool)
        client.sendall(what + EVIL)
        assert client.recv(1) == b""
    client = make_client(pool)
    assert round_trip(client, b"4" + EVIL) == b"4" + EVIL
    reset(client)
    wait_until(lambda: len(pool) == 0)
    # Not any three records: on a busy machine others may have been slow, too.
    wait_until(lambda: all(words in log() for words in ("ZeroDivisionError", "a handler took", "TypeError")))
    check_lines(log(), 3)


@pytest.mark.parametrize("kind", [ValueError, MessageTooLarge])
def test_what_a_handlers_exception_says_forges_no_line(make_pool, make_client, log, kind):
    """B63: the handler has put the peer's bytes into it, as handlers do; and into the one that this one comes from."""

    def fail(sock, data):
        text = data.decode("latin1") + "\u2028\x85\u202e"
        try:
            raise KeyError(text)
        except KeyError:
            raise kind(f"unknown command: {text}") from LookupError(text)

    pool = make_pool(handler(on_message=fail), slow_handler=60)  # that would be a record of its own
    client = make_client(pool)
    client.sendall(EVIL)
    assert client.recv(1) == b""
    wait_until(lambda: "unknown command" in log())
    first, *rest = log().split("\n")
    assert first.startswith("ERROR tstpool a handler raised on socket ")
    assert rest and all(line.startswith("  ") or line == "" for line in rest)
    assert "".join(rest).isprintable()
    assert "\\x1b[31m\\x00\\x07 secret" in log()


def test_the_exception_stays_with_its_record(caplog):
    """B63: who collects exceptions gets this one; a formatter that has written it already is not overruled."""
    try:
        raise ZeroDivisionError("\x1b")
    except ZeroDivisionError as error:
        logging.getLogger("tstpool").error("one", exc_info=error)
        (record,) = caplog.records
        assert record.exc_info[1] is error
    assert record.exc_text.endswith("ZeroDivisionError: \\x1b")
    record.exc_text = "written already"
    assert escape_traceback(record) and record.exc_text == "written already"
    record.exc_text, record.exc_info = None, (None, None, None)
    assert escape_traceback(record) and record.exc_text is None


@pytest.mark.parametrize("data", [b"raise", b"slow", b"twice", b"x" * 100], ids=["raise", "slow", "twice", "too large"])
def test_no_peer_fills_the_log(make_pool, log, data):
    """B63: ten records a second, and one that says how many were left out; on_error and the counters have them all."""

    def fail(sock, data):
        if data == b"slow":
            time.sleep(0.002)
            sock.close()
        else:
            raise ZeroDivisionError

    def fail_again(sock, error):
        raise KeyError

    def provoke(times):
        for _ in range(times):
            with connect(pool.addresses[0]) as client, contextlib.suppress(ConnectionError):
                client.sendall(data + b"\n")
                assert client.recv(1) == b""

    def records():
        return log().count("on socket") + log().count("is closed")

    hooks = {"on_error": fail_again} if data == b"twice" else {}
    slow = 0.001 if data == b"slow" else 60  # or one that raises is reported for being slow, too
    pool = make_pool(handler(on_message=fail, **hooks), framing=Delimited(b"\n", max_message=64), slow_handler=slow)
    begin = time.monotonic()
    provoke(50)
    seconds = time.monotonic() - begin
    wait_until(lambda: records() >= 10)  # the peer may see its end before the record is written
    assert records() <= 10 * (seconds + 1)
    time.sleep(1.1)  # a window to measure in, not a wait
    logged = records()
    provoke(1)
    wait_until(lambda: records() == logged + 1)
    # Of these alone: on a busy machine it is also logged where a handler is, while it takes its time.
    left_out_of_these = re.findall(r"(?:on socket|is closed).*\((\d+) like it were left out", log())
    assert sum(map(int, left_out_of_these)) + records() == 51


def test_what_others_cause_is_counted_by_itself(make_pool):
    """B63: a flood of one kind hides no other, of one pool none of another's; kinds that never end take no memory."""
    one, other = make_pool(handler()), make_pool(handler())
    assert [left_out(one, ValueError) for _ in range(12)] == [0] * 10 + [None] * 2
    assert left_out(one, KeyError) == left_out(other, ValueError) == 0
    answers = [left_out(one, type(f"Error{n}", (Exception,), {})) for n in range(200)]
    assert answers.count(None) > 80
    assert len(_allowances[id(one)][1]) <= 101


def test_the_name_of_a_peers_socket(make_pool, tmp_path, log):
    """B63: a client of a unix socket chooses its address; neither the log nor repr() has it raw."""
    path = f"unix:{tmp_path}/listener"

    def fail(sock, data):
        raise ZeroDivisionError(repr(sock))

    make_pool(handler(on_message=fail), listen=(path, 0))
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(os.fsencode(tmp_path) + b"/\nCRITICAL forged \x1b[31m")
        client.connect(f"{tmp_path}/listener")
        client.sendall(b"hello")
        client.settimeout(patient(10))
        assert client.recv(1) == b""
    wait_until(lambda: "ZeroDivisionError" in log())
    check_lines(log(), 1)


FAILING = """
import logging
records = []
logging.getLogger("tstpool").addFilter(lambda record: records.append(record.getMessage()))
pool = TstPool(Echo(), workers=4)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
print(port)
sys.stdin.read()
deadline = time.monotonic() + 10
while pool.stats().accept_errors <= 50 and time.monotonic() < deadline:  # the workers may have been held up
    time.sleep(0.001)
print(pool.stats().accept_errors)
pool.stop()
print(chr(10).join(records))
"""


def test_a_failure_of_accept_that_repeats_is_logged_once_a_second():
    """B63: also one that each new try brings back at once; each worker has its own second."""
    env = {"FAIL_CALL": "accept4", "FAIL_ERRNO": "1", "FAIL_COUNT": "2000000000"}  # EPERM: 16 in a row before a pause
    with ServerProcess(FAILING, env=env, preload=faults()) as server, contextlib.ExitStack() as stack:
        begin = time.monotonic()
        for _ in range(5):
            stack.enter_context(connect(server.addr))
        time.sleep(1.5)  # a window to measure in, not a wait
        errors, *lines = server.finish().splitlines()
        seconds = time.monotonic() - begin
    assert int(errors) > 50
    assert 1 <= len(lines) <= 4 * (seconds + 1)
    assert {line.partition(":")[2] for line in lines} == {" Operation not permitted"}
