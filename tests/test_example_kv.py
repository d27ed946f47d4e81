"""examples/kv is a server that Redis's own tools, its Python client and its protocol take for a Redis.

The judge is a real redis-server: both get the same bytes, and must answer with the same bytes.
"""

import contextlib
import functools
import importlib.util
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import PATIENCE, ROOT, connect, patient, recv_exact, recv_until_eof, reset, run_python, scaled, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_example import (
    MISSING,
    PLAIN_ENVIRONMENT,
    SOURCE,
    WHY_MISSING,
    array,
    arrays,
    built_site,
    cut,
    elements,
    inline,
    probe,
    replies,
    running_redis,
    running_tstkv,
    talk,
)

pytestmark = [
    pytest.mark.skipif(not SOURCE.is_dir(), reason="needs examples/"),
    pytest.mark.skipif(bool(MISSING), reason=WHY_MISSING),
]

README = SOURCE / "README.md"
ENOUGH = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def kv():
    with running_tstkv() as address:
        yield address


@pytest.fixture(scope="module")
def redis_server():
    with running_redis() as address:
        yield address


# --------------------------------------------------------------------------- the same bytes as Redis sends

# Each a conversation that begins with an empty server. QUIT is added.
CONVERSATIONS = {
    "ping and echo": [(b"PING",), (b"ping", b"hello"), (b"PiNg", b"a", b"b"), (b"ECHO", b"x\r\ny"), (b"ECHO",)],
    "get and set": [
        (b"GET", b"a"),
        (b"SET", b"a", b"1"),
        (b"GET", b"a"),
        (b"SET", b"a", b""),
        (b"GET", b"a"),
        (b"SET", b"", b"empty key"),
        (b"GET", b""),
        (b"SET", b"\x00\xff", b"\r\n\x00"),
        (b"GET", b"\x00\xff"),
        (b"GET",),
        (b"GET", b"a", b"b"),
        (b"SET", b"a"),
        (b"SET", b"long", b"x" * 100_000),
        (b"GET", b"long"),
        (b"SET", b"long", b"y" * 70_000),
        (b"GET", b"long"),
    ],
    "options of set": [
        (b"SET", b"a", b"1", b"XX"),
        (b"SET", b"a", b"1", b"NX"),
        (b"SET", b"a", b"2", b"nx"),
        (b"SET", b"a", b"3", b"xX"),
        (b"SET", b"a", b"4", b"NX", b"XX"),
        (b"SET", b"a", b"4", b"NX", b"NX", b"GET"),
        (b"GET", b"a"),
        (b"SET", b"a", b"5", b"EX", b"100"),
        (b"TTL", b"a"),
        (b"SET", b"a", b"6", b"KEEPTTL"),
        (b"TTL", b"a"),
        (b"SET", b"a", b"7", b"GET"),
        (b"TTL", b"a"),
        (b"SET", b"new", b"7", b"GET", b"PX", b"100000", b"NX"),
        (b"TTL", b"new"),
        (b"SET", b"a", b"8", b"EX", b"10", b"PX", b"10"),
        (b"SET", b"a", b"8", b"EX", b"10", b"EX", b"500"),
        (b"TTL", b"a"),
        (b"SET", b"a", b"8", b"EX", b"10", b"KEEPTTL"),
        (b"SET", b"a", b"8", b"KEEPTTL", b"PX", b"10"),
        (b"SET", b"a", b"8", b"EX"),
        (b"SET", b"a", b"8", b"PX"),
        (b"SET", b"a", b"8", b"what"),
        (b"SET", b"a", b"8", b"NX\x00", b"GET\x00what"),  # for Redis a NUL ends an option
        (b"SET", b"a", b"8", b"PX\x00", b"100000", b"KEEPTTL\x00"),
        (b"SET", b"a", b"8", b"N\x00X"),
        *((b"SET", b"a", b"8", b"EX", bad) for bad in (b"0", b"-1", b"x", b"", b"1.0", b"01", b"9223372036854775807")),
        *((b"SET", b"a", b"8", b"PX", bad) for bad in (b"0", b"-5", b"9223372036854775807", b"9223372036854775808")),
        (b"GET", b"a"),
        (b"SET", b"a", b"9", b"PX", b"9223372030000000000"),  # with the time of day it is more than 64 bits
        (b"SET", b"a", b"9", b"EX", b"9223372030000000"),
        (b"SET", b"a", b"9", b"PX", b"9000000000000000000"),
        (b"GET", b"a"),
    ],
    "times of day as options of set": [
        (b"SET", b"a", b"1", b"EXAT", b"9000000000"),
        (b"EXISTS", b"a"),
        (b"SET", b"a", b"2", b"PXAT", b"9223372036854775807", b"GET"),
        (b"GET", b"a"),
        (b"SET", b"a", b"3", b"EXAT", b"10", b"EXAT", b"9000000000"),
        (b"GET", b"a"),
        (b"SET", b"a", b"4", b"exat", b"1"),
        (b"GET", b"a"),
        (b"SET", b"a", b"5", b"pxat", b"1", b"NX", b"GET"),
        (b"EXISTS", b"a"),
        *((b"SET", b"a", b"8", b"EXAT", bad) for bad in (b"0", b"-1", b"x", b"", b"9223372036854775")),
        *((b"SET", b"a", b"8", b"EXAT", bad) for bad in (b"9223372036854776", b"9223372036854775808")),
        *((b"SET", b"a", b"8", b"PXAT", bad) for bad in (b"0", b"-5", b"x", b"9223372036854775808")),
        *((b"SET", b"a", b"8", b"EX", b"10", word, b"9000000000") for word in (b"PX", b"EXAT", b"PXAT", b"KEEPTTL")),
        *((b"SET", b"a", b"8", word, b"9000000000", b"PX", b"10") for word in (b"EX", b"EXAT", b"PXAT", b"PX")),
        (b"SET", b"a", b"8", b"PXAT", b"10", b"KEEPTTL"),
        (b"SET", b"a", b"8", b"KEEPTTL", b"EXAT", b"10"),
        (b"SET", b"a", b"8", b"EXAT"),
    ],
    "numbers": [
        (b"INCR", b"n"),
        (b"INCR", b"n"),
        (b"DECR", b"n"),
        (b"DECRBY", b"n", b"100"),
        (b"INCRBY", b"n", b"-5"),
        (b"GET", b"n"),
        *((b"INCRBY", b"n", bad) for bad in (b"x", b"", b"1.5", b"+1", b" 1", b"00", b"-0", b"9223372036854775808")),
        *((word, b"n", b"-9223372036854775808") for word in (b"DECRBY", b"INCRBY", b"INCRBY")),
        (b"SET", b"n", b"9223372036854775807"),
        (b"INCR", b"n"),
        (b"DECR", b"n"),
        (b"SET", b"n", b"-9223372036854775808"),
        (b"DECR", b"n"),
        (b"DECRBY", b"n", b"-9223372036854775807"),
        *((b"SET", b"n", bad, b"EX", b"100") for bad in (b"x", b"", b" 1", b"1 ", b"01", b"9223372036854775808")),
        (b"INCR", b"n"),
        (b"TTL", b"n"),
        (b"SET", b"n", b"9", b"EX", b"100"),
        (b"INCR", b"n"),
        (b"TTL", b"n"),
        (b"INCR",),
        (b"INCRBY", b"n"),
    ],
    "many keys": [
        (b"MSET", b"a", b"1", b"b", b"2", b"a", b"3"),
        (b"MSET", b"a", b"1", b"b"),
        (b"MSET",),
        (b"MGET", b"a", b"b", b"c", b"a"),
        (b"MGET",),
        (b"EXISTS", b"a", b"a", b"c", b"b"),
        (b"EXISTS",),
        (b"DBSIZE",),
        (b"DBSIZE", b"x"),
        (b"DEL", b"a", b"a", b"c"),
        (b"DEL",),
        (b"DBSIZE",),
        (b"MSET", *(b"k%d" % i for i in range(1000))),
        (b"MGET", *(b"k%d" % i for i in range(1000))),
        (b"DBSIZE",),
        (b"FLUSHDB", b"what"),
        (b"FLUSHDB", b"SYNC", b"ASYNC"),
        (b"FLUSHDB", b"async"),
        (b"DBSIZE",),
        (b"FLUSHALL",),
    ],
    "expiry": [
        (b"EXPIRE", b"a", b"100"),
        (b"TTL", b"a"),
        (b"SET", b"a", b"1"),
        (b"TTL", b"a"),
        (b"EXPIRE", b"a", b"100", b"XX"),
        (b"EXPIRE", b"a", b"100", b"GT"),
        (b"EXPIRE", b"a", b"100", b"LT"),
        (b"EXPIRE", b"a", b"200", b"nx"),
        (b"EXPIRE", b"a", b"200", b"LT"),
        (b"EXPIRE", b"a", b"200", b"gt"),
        (b"EXPIRE", b"a", b"300", b"XX", b"GT"),
        (b"TTL", b"a"),
        (b"EXPIRE", b"a", b"300", b"NX", b"XX"),
        (b"EXPIRE", b"a", b"300", b"GT", b"LT"),
        (b"EXPIRE", b"a", b"300", b"or\r\nelse\r\n"),
        *((b"EXPIRE", b"a", bad) for bad in (b"x", b"", b"9223372036854775807", b"-9223372036854775807", b"1.5")),
        (b"PEXPIRE", b"a", b"9223372036854775807"),
        (b"PEXPIRE", b"a", b"9223372030000000000"),
        (b"EXPIRE", b"a", b"9223372030000000"),
        (b"PEXPIRE", b"a", b"500000"),
        (b"TTL", b"a"),
        (b"SET", b"a", b"1"),
        (b"TTL", b"a"),
        (b"EXPIRE", b"a", b"0"),
        (b"EXISTS", b"a"),
        (b"SET", b"a", b"1"),
        (b"EXPIRE", b"a", b"-5"),
        (b"GET", b"a"),
        (b"SET", b"a", b"1"),
        (b"PEXPIRE", b"a", b"-9223372036854775808"),
        (b"GET", b"a"),
        (b"PTTL", b"a"),
    ],
    "transactions": [
        (b"EXEC",),
        (b"DISCARD",),
        (b"MULTI",),
        (b"EXEC",),
        (b"MULTI",),
        (b"MULTI",),
        (b"SET", b"a", b"1"),
        (b"INCR", b"a"),
        (b"SET", b"a", b"1", b"what"),
        (b"GET", b"a"),
        (b"EXEC",),
        (b"GET", b"a"),
        (b"MULTI",),
        (b"SET", b"a", b"100"),
        (b"DISCARD",),
        (b"MULTI",),
        (b"GET",),
        (b"SET", b"a", b"100"),
        (b"EXEC",),
        (b"MULTI",),
        (b"NOSUCH",),
        (b"EXEC",),
        (b"GET", b"a"),
        (b"MULTI",),
        (b"SET", b"b", b"not set: QUIT comes before EXEC"),
    ],
    "transactions that a wrong EXEC ends": [
        (b"EXEC", b"x"),
        (b"MULTI",),
        (b"eXeC", b"x"),
        (b"PING",),
        (b"DISCARD",),
        (b"MULTI",),
        (b"SET", b"a", b"1"),
        (b"NOSUCH",),
        (b"EXEC", b"x", b"y"),
        (b"GET", b"a"),
        (b"EXEC",),
        (b"MULTI",),
        (b"DISCARD", b"x"),
        (b"MULTI", b"x"),
        (b"SET", b"a", b"1"),
        (b"EXEC",),
        (b"MULTI",),
        (b"SET", b"a", b"1"),
        (b"EXEC",),
    ],
    "what is unknown": [
        (b"NOSUCH",),
        (b"nosuch", b"a", b"b c", b"\r\nd", b"e\x00f"),
        (b"x" * 200, b"y" * 50, b"z" * 200, b"not shown"),
        (b"x\x00y", b"1"),
        (b"",),
        (b" GET", b"a"),
        (b"\x00GET", b"a"),
        (b"!FLUSHDB",),
        (b"GET\x00", b"a"),
        (b"CONFIG",),
        (b"CONFIG", b"NOSUCH"),
        (b"config", b"no\r\nsuch", b"x"),
        (b"CONFIG", b"GET"),
        (b"CLIENT",),
        (b"CLIENT", b"NOSUCH"),
        (b"CLIENT", b"GETNAME", b"x"),
        (b"COMMAND", b"NOSUCH"),
        (b"COMMAND", b"INFO", b"nosuch", b"get\x00"),
    ],
    "what clients ask first": [
        (b"CONFIG", b"GET", b"save"),
        (b"CONFIG", b"GET", b"AppendOnly"),
        (b"CONFIG", b"GET", b"nosuch"),
        (b"CONFIG", b"GET", b"APPENDON[l]*", b"nosuch"),
        *((b"CONFIG", b"GET", words + b"ppendonly") for words in (b"[Z-a]", b"[a-Z]", b"[B-a]", b"[z-A]", b"[A-b]")),
        (b"SELECT", b"0"),
        (b"SELECT", b"1"),
        (b"SELECT", b"-1"),
        (b"SELECT", b"x"),
        *((b"SELECT", far) for far in (b"2147483647", b"2147483648", b"-2147483648", b"-2147483649", b"4294967296")),
        (b"SELECT",),
        (b"CLIENT", b"GETNAME"),
        (b"CLIENT", b"SETNAME", b"tester"),
        (b"CLIENT", b"GETNAME"),
        (b"CLIENT", b"SETNAME", b"two words"),
        (b"CLIENT", b"SETNAME", b""),
        (b"CLIENT", b"GETNAME"),
        (b"HELLO", b"x"),
        (b"HELLO", b"1"),
        (b"HELLO", b"4"),
        (b"HELLO", b"2", b"what"),
        (b"AUTH",),
        (b"AUTH", b"secret"),
        (b"AUTH", b"default", b"secret"),
        (b"AUTH", b"nobody", b"secret"),
        (b"AUTH", b"Default", b"secret"),
        (b"AUTH", b"default", b"secret", b"what"),
        (b"HELLO", b"2", b"AUTH", b"nobody", b"secret", b"SETNAME", b"not set"),
        (b"HELLO", b"2", b"AUTH", b"default"),
        (b"HELLO", b"2", b"AUTH", b"default", b"secret", b"what"),
        (b"CLIENT", b"GETNAME"),
    ],
    "the nulls and maps of RESP3": [
        (b"HELLO", b"3"),
        (b"GET", b"a"),
        (b"MGET", b"a", b"b"),
        (b"SET", b"a", b"1", b"XX"),
        (b"CLIENT", b"GETNAME"),
        (b"CONFIG", b"GET", b"save"),
        (b"CONFIG", b"GET", b"nosuch"),
        (b"COMMAND", b"INFO", b"nosuch"),
        (b"HELLO", b"2"),
        (b"GET", b"a"),
    ],
}


def told_apart(words, reply):
    """What may differ between two right servers taken out: the order of keys, a second more or less, an id."""
    name = words[0].upper()
    if name == b"KEYS" and reply.startswith(b"*"):
        return sorted(elements(reply))
    if name == b"TTL" and reply[:1] == b":" and int(reply[1:]) > 0:
        return round(int(reply[1:]) / 10)  # the tests' own times are far from the halves of tens
    if name == b"HELLO" and reply[:1] in b"*%":
        return re.sub(rb"(\$2\r\nid\r\n):\d+", rb"\1", reply)
    return reply


def assert_same(address, redis_address, requests, pieces_of):
    """Both servers get the same requests, ours in the given pieces, and answer the same."""
    requests = [(b"FLUSHALL",), *requests, (b"QUIT",)]
    stream = arrays(requests)
    theirs = replies(talk(redis_address, [stream]))
    for pieces in pieces_of(stream):
        ours = replies(talk(address, pieces))
        compare(requests, ours, theirs)
        compare(requests, replies(fed_exactly(pieces)), theirs)


def fed_exactly(pieces):
    """The replies of a server that gets exactly these pieces: the kernel can't join any."""
    module = probe()
    client = module.Client(module.Server())
    for piece in pieces:
        outcome = client.feed(piece)
        while outcome == module.PAUSED:  # the clock says that it was much work
            outcome = client.again()
        if outcome == module.CLOSE:
            break
    return client.take()


def compare(requests, ours, theirs):
    assert len(ours) == len(theirs), (ours, theirs)
    for words, our, their in zip(requests, ours, theirs, strict=False):
        assert told_apart(words, our) == told_apart(words, their), words


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_answers_as_redis_does_however_the_requests_are_split(name, kv, redis_server):
    chance = random.Random(name)

    def pieces_of(stream):
        yield [stream]
        yield cut(stream, [chance.randrange(len(stream)) for _ in range(20)])
        if len(stream) < 5000:
            yield cut(stream, range(len(stream)))  # byte by byte

    assert_same(kv, redis_server, CONVERSATIONS[name], pieces_of)


KEYS = st.sampled_from([b"a", b"b", b"c", b"abc", b"b[a]c", b"A", b"", b"k" * 40, b"\x00\xff", b"*"])
NUMBERS = st.sampled_from([b"0", b"1", b"-1", b"12", b"-9223372036854775808", b"9223372036854775807", b"01", b"x", b""])
VALUES = NUMBERS | st.binary(max_size=30) | st.integers(1000, 40_000).map(lambda n: b"v" * n)
TIMES = st.sampled_from([b"100", b"2000", b"100000000", b"0", b"-1", b"x", b"9223372036854775807"])
PATTERN = st.lists(
    st.sampled_from([b"*", b"?", b"a", b"b", b"c", b"k", b"[", b"]", b"^", b"-", b"\\", b"[ab]", b"[^a]", b"[a-c]"]),
    max_size=6,
).map(b"".join)
SET_OPTIONS = st.lists(
    st.sampled_from([(b"NX",), (b"XX",), (b"GET",), (b"KEEPTTL",)])
    | st.tuples(st.sampled_from([b"EX", b"px"]), TIMES)
    | st.tuples(VALUES),
    max_size=3,
).map(lambda options: sum(options, ()))
EXPIRE_OPTIONS = st.lists(st.sampled_from([b"NX", b"XX", b"GT", b"lt", b"what"]), max_size=2).map(tuple)
REQUESTS = st.one_of(
    st.tuples(st.sampled_from([b"GET", b"get", b"INCR", b"Decr", b"TTL", b"DEL", b"EXISTS", b"GET", b"DEL"]), KEYS),
    st.tuples(st.just(b"SET"), KEYS, VALUES),
    st.builds(lambda key, value, options: (b"SET", key, value, *options), KEYS, VALUES, SET_OPTIONS),
    st.builds(lambda key, time, options: (b"EXPIRE", key, time, *options), KEYS, TIMES, EXPIRE_OPTIONS),
    st.tuples(st.sampled_from([b"INCRBY", b"DECRBY"]), KEYS, NUMBERS),
    st.builds(lambda name, keys: (name, *keys), st.sampled_from([b"MGET", b"DEL", b"EXISTS"]), st.lists(KEYS)),
    st.builds(lambda words: (b"MSET", *words), st.lists(KEYS | VALUES, max_size=7)),
    st.tuples(st.just(b"KEYS"), PATTERN),
    st.sampled_from([(b"DBSIZE",), (b"PING",), (b"FLUSHDB",), (b"KEYS", b"*")]),
    # Whatever name with whatever arguments, but CONFIG GET and the like, which tell of the server.
    st.builds(
        lambda name, words: (name, *words),
        st.sampled_from([b"GET", b"SET", b"PING", b"ECHO", b"KEYS", b"SELECT", b"INCR", b"TTL", b"DBSIZE", b"FLUSHDB"])
        | st.binary(max_size=10).filter(lambda name: name.strip(b"\0")[:1] not in b"cChHiI"),
        st.lists(VALUES, max_size=4),
    ),
)


@settings(max_examples=scaled(200, minimum=10), **ENOUGH)
@given(st.data())
def test_it_answers_any_requests_as_redis_does(kv, redis_server, data):
    requests = data.draw(st.lists(REQUESTS, max_size=25))
    places = data.draw(st.lists(st.integers(1, 2000), max_size=15))
    assert_same(kv, redis_server, requests, lambda stream: [cut(stream, places)])


LINES = st.lists(st.sampled_from(b"ab\"'\\x41nrt ;\v\f\r\t\xff"), max_size=20).map(bytes)


@settings(max_examples=scaled(200, minimum=10), **ENOUGH)
@given(LINES, st.lists(st.integers(1, 25), max_size=5))
def test_any_line_is_split_into_words_as_redis_does_it(kv, redis_server, words, places):
    line = b"ECHO " + words + b"\n"
    theirs = talk(redis_server, [line + b"QUIT\r\n"])
    # Nothing is sent after an error: who closes while bytes come in resets the connection, and the reply may be lost.
    stream = line if b"Protocol error" in theirs else line + b"QUIT\r\n"
    assert talk(kv, cut(stream, places)) == theirs
    assert fed_exactly(cut(stream, places)) == theirs


@settings(max_examples=scaled(60, minimum=10), **ENOUGH)
@given(st.lists(st.tuples(st.just(b"ECHO"), st.binary(max_size=40)), max_size=5))
def test_a_quoted_line_says_the_same_as_an_array(kv, requests):
    stream = b"".join(inline(*words) for words in requests) + inline(b"QUIT")
    assert talk(kv, [stream]) == talk(kv, [arrays([*requests, (b"QUIT",)])])


# ------------------------------------------------------------------------------------------ protocol errors

BROKEN = {
    "count that is no number": b"*x\r\n",
    "count without digits": b"*\r\n",
    "count with a sign": b"*+1\r\n",
    "count that is too large": b"*2147483648\r\n",
    "count beyond 64 bits": b"*99999999999999999999\r\n",
    "count that never ends": b"*" + b"1" * 70_000,
    "no size before an argument": b"*1\r\nPING\r\n",
    "line end instead of a size": b"*1\r\n\r\n",
    "line feed instead of a size": b"*1\r\n\n$\r\n",
    "size that is no number": b"*1\r\n$x\r\n",
    "size that is empty": b"*1\r\n$\r\n",
    "size that is negative": b"*1\r\n$-1\r\n",
    "size that is too large": b"*1\r\n$33554433\r\n",
    "size beyond 64 bits": b"*1\r\n$18446744073709551616\r\n",
    "size that never ends": b"*1\r\n$" + b"1" * 70_000,
    "wrong second argument": b"*2\r\n$4\r\nECHO\r\n:5\r\n",
    "line that never ends": b"x" * 100_000,
    "quote that never ends": b'ECHO "abc\r\n',
    "quote that goes on": b'ECHO "abc"d\r\n',
    "single quote that never ends": b"ECHO 'abc\\'\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_protocol_is_answered_in_redis_words_and_ends_the_connection(name, kv, redis_server):
    stream = array(b"ECHO", b"before") + BROKEN[name]
    ours = talk(kv, [stream])
    assert ours.startswith(b"$6\r\nbefore\r\n-ERR Protocol error: ")
    assert ours == talk(redis_server, [stream])
    if len(stream) < 1000:
        assert talk(kv, cut(stream, range(len(stream)))) == ours
        assert fed_exactly(cut(stream, range(len(stream)))) == ours


HARMLESS = {
    "empty arrays": b"*0\r\n*-1\r\n*-10\r\n",
    "empty lines": b"\r\n\n  \r\n",
    "bare line feeds": b"PING\nECHO hello\n",
    "whatever stands where a line ends": b"*1\rX$4\rXPINGXX",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_redis_lets_pass_passes(name, kv, redis_server):
    stream = HARMLESS[name] + array(b"PING") + array(b"QUIT")
    ours = talk(kv, [stream])
    assert ours.endswith(b"+PONG\r\n+OK\r\n")
    assert ours == talk(redis_server, [stream])
    assert fed_exactly(cut(stream, range(len(stream)))) == ours


@pytest.mark.parametrize(
    "line", [b"POST / HTTP/1.1\r\n", b"post\n", b"hOsT: x\r\n", array(b"POST"), b"MULTI\r\nHost: x\n"]
)
def test_what_a_browser_sends_for_a_web_page_runs_nothing(line, kv, redis_server):
    """The page chooses the body of the request, but not the lines in front of it."""
    stream = line + b"Host: x\r\nContent-Length: 11\r\n\r\nSET web 1\r\n"
    ours, theirs = talk(kv, [stream]), talk(redis_server, [stream])
    assert ours.removeprefix(b"+OK\r\n") == theirs.removeprefix(b"+OK\r\n") == b""  # that of MULTI
    for address in (kv, redis_server):
        assert talk(address, [array(b"EXISTS", b"web") + array(b"QUIT")]) == b":0\r\n+OK\r\n"


# ------------------------------------------------------------------------------------- Redis's own programs


def redis_tool(address, name, *arguments, stdin=""):
    command = [name, "-h", address[0], "-p", str(address[1]), *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=patient(60), env=PLAIN_ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_redis_cli_works(kv):
    assert redis_tool(kv, "redis-cli", "flushall").stdout == "OK\n"
    lines = "set a 1\nincr a\nget nothing\nset b 'two words' ex 100\nmget a b\nnosuch x\n"
    done = redis_tool(kv, "redis-cli", "--no-raw", stdin=lines)
    assert (
        done.stdout.splitlines()
        == [
            *("OK", "(integer) 2", "(nil)", "OK", '1) "2"', '2) "two words"'),
            "(error) ERR unknown command 'nosuch', with args beginning with: 'x' ",
            "",
        ][: len(done.stdout.splitlines())]
    )
    assert len(done.stdout.splitlines()) >= 7
    assert redis_tool(kv, "redis-cli", "-3", "get", "a").stdout.strip() == "2"
    assert "redis_version:" in redis_tool(kv, "redis-cli", "info").stdout


def test_redis_cli_inserts_masses_through_its_pipe(kv):
    n = scaled(50_000, minimum=1000)
    redis_tool(kv, "redis-cli", "flushall")
    requests = "".join(f"SET key:{i} {i}\r\n" for i in range(n))
    done = redis_tool(kv, "redis-cli", "--pipe", stdin=requests)
    assert f"errors: 0, replies: {n}" in done.stdout
    assert redis_tool(kv, "redis-cli", "dbsize").stdout.strip() == str(n)
    assert redis_tool(kv, "redis-cli", "get", f"key:{n - 1}").stdout.strip() == str(n - 1)


@pytest.mark.parametrize("depth", [1, 16, 64])
def test_redis_benchmark_works(kv, depth):
    n = scaled(20_000, minimum=1000)
    tests = "ping,set,get,incr,mset"
    done = redis_tool(
        kv, "redis-benchmark", "-t", tests, "-P", str(depth), "-c", "50", "-n", str(n), "-r", "1000", "--csv"
    )
    rates = dict(re.findall(r'^"([^"]+)","([0-9.]+)"', done.stdout, re.MULTILINE))
    assert set(rates) == {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"}
    assert all(float(rate) > 0 for rate in rates.values())
    assert "WARNING" not in done.stderr and "rror" not in done.stderr


def test_the_benchmark_measures_no_redis_but_its_own(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])  # it adds the repository
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # see PLAIN_ENVIRONMENT
    spec = importlib.util.spec_from_file_location("kv_bench", SOURCE / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kv_bench", bench)
    spec.loader.exec_module(bench)
    with bench.redis(os.sched_getaffinity(0), bench.free_port()) as server:
        assert bench.process_that_answers(server.port) == server.process.pid
        with pytest.raises(SystemExit), bench.redis(os.sched_getaffinity(0), server.port):
            pass


# ------------------------------------------------------------------------------------ the client of PyPI


@contextlib.contextmanager
def redis_client(address, **options):
    redis = pytest.importorskip("redis", reason="the redis package is not installed")
    with redis.Redis(host=address[0], port=address[1], socket_timeout=patient(20), **options) as client:
        client.flushall()
        yield client


@pytest.mark.parametrize(
    "options", [{}, {"protocol": 2}, {"protocol": 3}, {"protocol": 3, "password": "secret"}], ids=str
)
def test_the_redis_client_works_unchanged(kv, options):
    with redis_client(kv, client_name="tester", **options) as client:
        assert client.ping() is True
        assert client.client_getname() in ("tester", b"tester")
        assert client.set("a", "1") is True
        assert client.set("a", "2", nx=True) is None
        assert client.set("b", "x", ex=100) is True
        assert 98 <= client.ttl("b") <= 100
        assert client.get("a") == b"1" and client.get("nothing") is None
        assert client.incr("a") == 2 and client.incr("a", 10) == 12 and client.decr("a") == 11
        assert client.mset({"c": b"\x00\xff", "d": ""}) is True
        assert client.mget("a", "nothing", "c") == [b"11", None, b"\x00\xff"]
        assert client.exists("a", "nothing", "a") == 2
        assert client.expire("a", 50) is True and client.expire("nothing", 50) is False
        assert sorted(client.keys("[a-c]")) == [b"a", b"b", b"c"]
        assert client.dbsize() == 4 and client.delete("a", "b") == 2
        assert client.echo("hello") == b"hello"
        assert client.config_get("save") == {"save": ""}
        assert client.info()["redis_version"].startswith("7.")
        assert client.command_count() > 20 and "get" in client.command()
        assert client.flushdb() is True and client.keys() == []


def test_it_knows_client_setinfo_and_says_since_which_redis_there_is_one(kv, redis_server):
    requests = array(b"CLIENT", b"SETINFO", b"LIB-NAME", b"x") + array(b"QUIT")
    assert talk(kv, [requests]) == b"+OK\r\n+OK\r\n"
    found = re.search(rb"redis_version:(\d+)\.(\d+)", talk(redis_server, [b"INFO\r\nQUIT\r\n"]))
    known = (int(found[1]), int(found[2])) >= (7, 2)
    assert talk(redis_server, [requests]).startswith(b"+OK\r\n" if known else b"-ERR unknown subcommand 'SETINFO'")
    assert "`CLIENT SETINFO` is one of Redis 7.2" in README.read_text()


def test_a_pattern_that_would_take_for_ever_is_refused(kv):
    """What is gone through for each byte of each key may have 1,024 bytes; what is compared, as many as a key."""
    redis = pytest.importorskip("redis", reason="the redis package is not installed")
    with redis_client(kv) as client:
        name = b"k" * 5000
        assert client.set(name, "found") is True
        for pattern in (b"[" + name, b"*" + name, name + b"[a]"):
            with pytest.raises(redis.ResponseError, match="pattern is too long"):
                client.keys(pattern)
            assert client.config_get(pattern) == {}
        assert client.keys(name) == [name]
        assert client.keys(b"?" * 5000) == [name]
        assert client.keys(b"[k]*") == [name]
        assert client.delete(name) == 1


LITTLE_FOR_ALL = """
import functools
import tstkv.__main__ as main
main.MAX_TOTAL_QUEUED = 500_000
main.KeyValueHandler = functools.partial(main.KeyValueHandler, max_waiting=8 << 20)
main.parse_arguments.__defaults__ = (["--port", "0", "--shards", "{shards}"],)
main.main()
"""


def test_replies_that_nobody_reads_have_a_limit_together():
    """A few bytes ask for a lot: the client that would bring the sum above the limit is closed, the others go on."""
    script = LITTLE_FOR_ALL.format(shards=1)
    with running_tstkv(script=script) as address, redis_client(address) as client, contextlib.ExitStack() as stack:
        assert client.mset({b"%d" % i + b"k" * 100_000: b"" for i in range(40)}) is True  # keys are copied, not values
        assert client.set("less", b"y" * 50_000) is True
        for _ in range(10):
            stack.enter_context(connect(address)).sendall(array(b"KEYS", b"*"))
        wait_until(lambda: client.info()["connected_clients"] <= 6)
        assert client.get("less") == b"y" * 50_000


LARGE = bytes(range(251)) * 4178  # a megabyte and some more


def read_slowly(client, n):
    data = b""
    while len(data) < n:
        piece = client.recv(min(20_000, n - len(data)))
        assert piece, f"closed after {len(data)} of {n} bytes"
        data += piece
        time.sleep(0.001)
    return data


def who_reads_nothing(stack, address, requests):
    """A client that has got the beginning of a reply, so that it is known to be under way."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.settimeout(patient(30))
    client.connect(address)
    client.sendall(requests)
    assert client.recv(1, socket.MSG_PEEK) in (b"$", b"*")
    return client


IMPATIENT = """
import tstkv.__main__ as main
main.WRITE_TIMEOUT = {timeout}
main.parse_arguments.__defaults__ = (["--port", "0"],)
main.main()
"""


def test_who_goes_on_asking_and_reads_nothing_is_reset_and_who_asks_nothing_is_not():
    """20 KB at a time, each once those before are done: of more, a part would wait in the handler, and untimed."""
    assert re.search(r"^WRITE_TIMEOUT = 60 ", (SOURCE / "tstkv" / "__main__.py").read_text(), re.MULTILINE)
    assert re.search(r"^\| time in which a client reads nothing.* \| 60 s, then", README.read_text(), re.MULTILINE)
    requests = array(b"GET", b"small") * 20 + array(b"INCR", b"asked")
    with running_tstkv(script=IMPATIENT.format(timeout=patient(0.3))) as address, contextlib.ExitStack() as stack:
        silent = stack.enter_context(connect(address))
        assert talk(address, [array(b"SET", b"small", b"x" * 1000) + array(b"QUIT")]) == b"+OK\r\n" * 2
        client = who_reads_nothing(stack, address, requests)

        def is_done_or_closed(n):
            told = talk(address, [array(b"GET", b"asked") + b"INFO\r\nQUIT\r\n"])
            return told.startswith(b"$%d\r\n%d\r\n" % (len(str(n)), n)) or b"connected_clients:2\r\n" in told

        with pytest.raises(ConnectionResetError):
            for n in range(1, 2000):
                wait_until(functools.partial(is_done_or_closed, n))
                client.sendall(requests)
        silent.sendall(array(b"PING"))
        assert recv_exact(silent, 7) == b"+PONG\r\n"


@pytest.mark.parametrize("shards", [1, 3])
def test_who_reads_gets_large_replies_however_little_others_read(shards):
    requests = array(b"GET", b"large") + array(b"MGET", *[b"large"] * 5) + array(b"ECHO", b"e" * 70_000)
    requests += array(b"GET", b"small") + array(b"EXISTS", b"large")
    bulk = b"$%d\r\n%s\r\n" % (len(LARGE), LARGE)
    expected = bulk + b"*5\r\n" + bulk * 5 + b"$70000\r\n%s\r\n" % (b"e" * 70_000) + b"$1\r\n1\r\n:1\r\n"
    wrong = []

    def ask(address, read):
        try:
            with connect(address, timeout=60) as client:
                client.sendall(requests)
                assert read(client, len(expected)) == expected
        except BaseException as error:
            wrong.append(error)

    with running_tstkv(script=LITTLE_FOR_ALL.format(shards=shards)) as address, contextlib.ExitStack() as stack:
        assert talk(address, [array(b"SET", b"large", LARGE) + array(b"SET", b"small", b"1") + array(b"QUIT")])
        idle = [who_reads_nothing(stack, address, requests) for _ in range(10)]
        threads = [
            threading.Thread(target=ask, args=(address, read_slowly if i % 5 == 0 else recv_exact))
            for i in range(scaled(20, minimum=5))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        for client in idle:  # nor was one of them closed
            assert recv_exact(client, len(expected)) == expected


@pytest.mark.parametrize("what", ["DEL", "SET", "shorter SET", "FLUSHALL", "EXPIRE"])
def test_a_value_that_is_being_sent_stays_whole_whatever_happens_to_its_key(kv, what):
    requests = {
        "DEL": array(b"DEL", b"large"),
        "SET": array(b"SET", b"large", LARGE[::-1]),
        "shorter SET": array(b"SET", b"large", b"1"),
        "FLUSHALL": array(b"FLUSHALL"),
        "EXPIRE": array(b"EXPIRE", b"large", b"-1"),
    }[what] + array(b"QUIT")
    with contextlib.ExitStack() as stack:
        assert talk(kv, [array(b"SET", b"large", LARGE) + array(b"QUIT")]) == b"+OK\r\n" * 2
        clients = [who_reads_nothing(stack, kv, array(b"MGET", b"large", b"large")) for _ in range(3)]
        assert talk(kv, [requests]) in (b":1\r\n+OK\r\n", b"+OK\r\n+OK\r\n")
        reset(clients.pop())
        for client in clients:
            bulk = b"$%d\r\n%s\r\n" % (len(LARGE), LARGE)
            assert recv_exact(client, 4 + 2 * len(bulk)) == b"*2\r\n" + bulk * 2
    assert talk(kv, [array(b"FLUSHALL") + array(b"QUIT")]) == b"+OK\r\n" * 2
    wait_until(lambda: b"\r\nmem_clients_normal:0\r\n" in talk(kv, [b"INFO\r\nQUIT\r\n"]))
    wait_until(lambda: b"\r\nused_memory:256\r\n" in talk(kv, [b"INFO\r\nQUIT\r\n"]))  # of an empty table


def test_who_shuts_down_its_side_gets_the_whole_of_a_large_reply(kv):
    with connect(kv, timeout=30) as client:
        client.sendall(array(b"SET", b"large", LARGE) + array(b"GET", b"large") * 3 + array(b"DEL", b"large"))
        client.shutdown(socket.SHUT_WR)
        assert recv_until_eof(client) == b"+OK\r\n" + b"$%d\r\n%s\r\n" % (len(LARGE), LARGE) * 3 + b":1\r\n"


@pytest.mark.parametrize("transaction", [True, False])
def test_the_redis_clients_pipeline_works(kv, transaction):
    with redis_client(kv) as client, client.pipeline(transaction=transaction) as pipeline:
        for i in range(1000):
            pipeline.set(f"k{i}", i)
        pipeline.incr("k7").get("k7").get("nothing")
        assert pipeline.execute() == [True] * 1000 + [8, b"8", None]


def test_the_redis_client_raises_what_the_server_says(kv):
    redis = pytest.importorskip("redis", reason="the redis package is not installed")
    with redis_client(kv) as client:
        client.set("a", "x")
        with pytest.raises(redis.ResponseError, match="value is not an integer or out of range"):
            client.incr("a")
        with pytest.raises(redis.ResponseError, match="unknown command 'LPUSH'"):
            client.lpush("a", "1")


# ------------------------------------------------------------------------------------------- time and limits


def test_a_key_is_gone_when_its_time_is_over(kv):
    with connect(kv) as client:
        # So long that it is not over between the two, where the server is held up.
        client.sendall(array(b"SET", b"soon", b"x", b"PX", b"%d" % patient(500)) + array(b"GET", b"soon"))
        assert recv_exact(client, 12) == b"+OK\r\n$1\r\nx\r\n"

        def is_gone():
            client.sendall(array(b"EXISTS", b"soon"))
            return recv_exact(client, 4) == b":0\r\n"

        wait_until(is_gone)
        client.sendall(array(b"TTL", b"soon") + array(b"SET", b"soon", b"y", b"NX"))
        assert recv_exact(client, 10) == b":-2\r\n+OK\r\n"


def test_memory_that_is_full_is_refused_in_redis_words_and_freed_by_del():
    refusal = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    with running_redis("--maxmemory", "1") as address:
        assert talk(address, [array(b"SET", b"a", b"1") + array(b"QUIT")]) == refusal + b"+OK\r\n"
    with running_tstkv("--maxmemory", "64kb") as address, connect(address) as client:
        for name, *words in ((b"SET", b"a"), (b"MSET", b"a"), (b"MSET", b"b", b"1", b"a")):
            client.sendall(array(name, *words, b"x" * 66_000))
            assert recv_exact(client, len(refusal)) == refusal
        client.sendall(
            array(b"MGET", b"a", b"b") + array(b"SET", b"a", b"x" * 40_000) + array(b"SET", b"b", b"x" * 40_000)
        )
        assert recv_exact(client, 14 + 5 + len(refusal)) == b"*2\r\n$-1\r\n$-1\r\n+OK\r\n" + refusal
        client.sendall(array(b"DEL", b"a") + array(b"SET", b"b", b"x" * 40_000) + array(b"GET", b"b"))
        assert recv_exact(client, 40_000 + 19) == b":1\r\n+OK\r\n$40000\r\n" + b"x" * 40_000 + b"\r\n"


def test_no_maxmemory_is_no_limit_and_too_little_of_it_is_refused_at_the_start():
    with running_tstkv("--maxmemory", "0") as address, running_redis("--maxmemory", "0") as redis_address:
        requests = [(b"SET", b"a", b"x" * 1_000_000), (b"CONFIG", b"GET", b"maxmemory"), (b"QUIT",)]
        ours = talk(address, [arrays(requests)])
        assert ours == talk(redis_address, [arrays(requests)])
        assert ours == b"+OK\r\n*2\r\n$9\r\nmaxmemory\r\n$1\r\n0\r\n+OK\r\n"
        assert b"\r\nmaxmemory:0\r\n" in talk(address, [b"INFO\r\nQUIT\r\n"])
    for amount in ("1", "1023", "99999999999gb"):
        arguments = ("-m", "tstkv", "--port", "0", "--maxmemory", amount)
        done = run_python(*arguments, env={"PYTHONPATH": f"{built_site()}:{ROOT}"}, check=False)
        assert done.returncode == 1 and done.stderr.startswith("tstkv: maxmemory may be 0")


def test_one_client_more_than_maxclients_is_told_so_and_a_place_is_free_again_after_a_close():
    with running_tstkv("--maxclients", "2") as address:

        def answers():
            with connect(address) as client:
                client.sendall(array(b"PING"))
                return client.recv(100) == b"+PONG\r\n"

        with connect(address) as first, connect(address) as second:
            for client in (first, second):
                client.sendall(array(b"PING"))
                assert recv_exact(client, 7) == b"+PONG\r\n"
            with connect(address) as third:
                assert recv_until_eof(third) == b"-ERR max number of clients reached\r\n"
        wait_until(answers)


FEW_DESCRIPTORS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
import tstkv.__main__ as main
main.parse_arguments.__defaults__ = (["--port", "0", "--maxclients", "40"],)
main.main()
"""


@pytest.mark.parametrize(("soft", "hard", "n"), [(64, 256, 40), (64, 64, 32)])
def test_as_many_clients_as_it_says_have_descriptors_and_the_next_is_told_so(soft, hard, n, capfd):
    with (
        running_tstkv(script=FEW_DESCRIPTORS.format(soft=soft, hard=hard)) as address,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(address)) for _ in range(n)]
        for client in clients:
            client.sendall(array(b"PING"))
            assert recv_exact(client, 7) == b"+PONG\r\n"
        with connect(address) as refused:
            assert recv_until_eof(refused) == b"-ERR max number of clients reached\r\n"
        clients[0].sendall(array(b"CONFIG", b"GET", b"maxclients"))
        assert recv_exact(clients[0], 29) == b"*2\r\n$10\r\nmaxclients\r\n$2\r\n%d\r\n" % n
    assert ("descriptors" in capfd.readouterr().err) == (n < 40)


STANDSTILL = """
import socket, threading, time
import tstpool
from tstkv import KeyValueHandler

def reply(client, last):
    received = b""
    while not received.endswith(last):
        piece = client.recv(65536)
        assert piece
        received += piece

def ask():
    global longest_call
    while not ended:
        begin, turns_before = time.monotonic(), turns
        handler.stats()
        longest_call = max(longest_call, (time.monotonic() - begin, turns - turns_before))
        time.sleep(0.001)

handler, ended, longest_call, longest_gap, turns = KeyValueHandler(), False, (0.0, 0), 0.0, 0
with tstpool.TstPool(handler, workers=1, shards=1, idle_timeout=None) as pool:
    with socket.create_connection(pool.listen("127.0.0.1", 0)) as client:
        for begin in range(0, 300000, 2500):
            words = b"".join(b" %d %d" % (i, i) for i in range(begin, begin + 2500))
            client.sendall(b"MSET" + words + b"\\r\\n")
            reply(client, b"+OK\\r\\n")
        asker = threading.Thread(target=ask)
        asker.start()
        client.sendall(b"MULTI\\r\\n" + b"KEYS *x*y\\r\\n" * 16 + b"EXEC\\r\\n")
        other = threading.Thread(target=reply, args=(client, b"*16\\r\\n" + b"*0\\r\\n" * 16))
        other.start()
        while other.is_alive():
            begin = time.monotonic()
            time.sleep(0.001)
            longest_gap = max(longest_gap, time.monotonic() - begin)
            turns += 1
        ended = True
        asker.join()
print(*longest_call, longest_gap)
"""


def test_who_asks_for_stats_during_a_long_command_waits_without_stopping_the_interpreter():
    done = run_python("-c", STANDSTILL, env={"PYTHONPATH": f"{built_site()}:{ROOT}"})
    longest_call, turns, longest_gap = map(float, done.stdout.split())
    assert longest_call > 0.03  # it did wait
    assert turns > 3  # and another thread went on meanwhile
    if PATIENCE == 1:  # beside other suites any thread may be held up
        assert longest_gap < longest_call / 2


def test_requests_of_who_does_not_read_wait_and_all_are_answered_once_it_reads(kv):
    value = bytes(range(256)) * 4096  # a megabyte
    n = scaled(40, minimum=10)
    request = array(b"GET", b"large")
    with connect(kv, timeout=30) as slow, connect(kv) as other:
        slow.sendall(array(b"SET", b"large", value))
        assert recv_exact(slow, 5) == b"+OK\r\n"
        slow.sendall(request * n + array(b"INCR", b"after"))
        for _ in range(100):  # nobody else waits for it, and what it asked for has not all been done
            other.sendall(array(b"PING"))
            assert recv_exact(other, 7) == b"+PONG\r\n"
        other.sendall(array(b"EXISTS", b"after"))
        assert recv_exact(other, 4) == b":0\r\n"
        for _ in range(n):
            assert recv_exact(slow, 10 + len(value) + 2) == b"$1048576\r\n" + value + b"\r\n"
        assert recv_exact(slow, 4) == b":1\r\n"
        slow.sendall(array(b"FLUSHALL"))
        assert recv_exact(slow, 5) == b"+OK\r\n"


LITTLE_UNREAD = """
import functools
import tstkv.__main__ as main
main.KeyValueHandler = functools.partial(main.KeyValueHandler, max_argument=1 << 20, max_request=2 << 20)
main.parse_arguments.__defaults__ = (["--port", "0"],)
main.main()
"""


def test_who_reads_may_send_faster_than_it_can_be_answered():
    """It is held back where what is not run yet would become too much."""
    request = array(b"ECHO", bytes(range(250)) * 40)
    n = scaled(3000, minimum=600)  # three times as much as may wait
    with running_tstkv(script=LITTLE_UNREAD) as address, connect(address, timeout=60) as client:
        sender = threading.Thread(target=client.sendall, args=(request * n,))
        sender.start()
        reply = request.partition(b"ECHO\r\n")[2]
        for _ in range(n):
            assert recv_exact(client, len(reply)) == reply
        sender.join()
        client.sendall(array(b"PING"))
        assert recv_exact(client, 7) == b"+PONG\r\n"


def test_others_are_served_while_a_client_has_sent_much_work(kv):
    n = round(patient(1000))  # so much that the other one is served also where it is held up
    with connect(kv, timeout=30) as busy, connect(kv) as other:
        words = (word for i in range(40_000) for word in (b"%d" % i, b""))
        busy.sendall(array(b"MSET", *words))
        assert recv_exact(busy, 5) == b"+OK\r\n"
        busy.sendall(b"KEYS x\r\n" * n + b"SET after 1\r\n")
        served = 0
        other.sendall(array(b"EXISTS", b"after"))
        while recv_exact(other, 4) == b":0\r\n":
            served += 1
            other.sendall(array(b"EXISTS", b"after"))
        assert served > 2
        assert recv_exact(busy, 4 * n + 5) == b"*0\r\n" * n + b"+OK\r\n"
        busy.sendall(array(b"FLUSHALL"))
        assert recv_exact(busy, 5) == b"+OK\r\n"


def test_what_a_client_had_sent_before_it_left_is_done_although_nobody_reads_the_replies(kv):
    value = b"x" * 1_000_000
    with connect(kv, timeout=30) as other:
        with connect(kv, timeout=30) as leaver:
            leaver.sendall(array(b"SET", b"large", value))
            assert recv_exact(leaver, 5) == b"+OK\r\n"
            leaver.sendall(array(b"GET", b"large") * 20 + array(b"SET", b"left", b"1"))

        def is_done():
            other.sendall(array(b"EXISTS", b"left"))
            return recv_exact(other, 4) == b":1\r\n"

        wait_until(is_done, timeout=20)
        other.sendall(array(b"FLUSHALL"))
        assert recv_exact(other, 5) == b"+OK\r\n"


def test_many_clients_on_several_threads_see_one_table():
    rounds, depth, n_clients = scaled(100, minimum=10), 50, 8
    failures = []

    def count(address):
        try:
            with connect(address) as client:
                for _ in range(rounds):
                    client.sendall(array(b"INCR", b"n") * depth + array(b"SET", b"s", b"x" * 100) + array(b"GET", b"s"))
                    received = recv_count(client, depth + 2)
                    assert received[-1] == b"$100\r\n" + b"x" * 100 + b"\r\n"
        except Exception as error:
            failures.append(error)

    with running_tstkv("--shards", "3") as address:
        threads = [threading.Thread(target=count, args=(address,)) for _ in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        total = b"%d" % (rounds * depth * n_clients)
        assert talk(address, [array(b"GET", b"n") + array(b"QUIT")]) == b"$%d\r\n%s\r\n+OK\r\n" % (len(total), total)


def recv_count(client, n):
    """The next n replies; no more may come."""
    data = b""
    while True:
        with contextlib.suppress(ValueError, IndexError):
            found = replies(data)
            if len(found) == n and sum(map(len, found)) == len(data):
                return found
        piece = client.recv(65536)
        assert piece, "closed"
        data += piece


def test_it_serves_on_a_unix_socket(tmp_path_factory):
    where = tmp_path_factory.mktemp("s")
    path = where / "kv"
    with running_tstkv("--host", f"unix:{path}"), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(patient(10))
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        assert recv_exact(client, 7) == b"+PONG\r\n"


def test_what_is_installed_has_types():
    """They are right: `make lint`."""
    assert {"_kv.pyi", "py.typed"} <= {path.name for path in (built_site() / "tstkv").iterdir()}


def test_the_repository_says_how_to_run_it():
    text = README.read_text()
    assert "python -m tstkv" in text and "pip install" in text
