"""A function of a socket and a message is a handler, and what it returns is the reply: `lambda sock, data: data` is an
echo, however messages are framed and lent."""

import functools
import socket
import threading

import pytest
from contract_helpers import handler, ignore
from helpers import recv_exact, wait_until

from tstpool import (
    ConnectionClosed,
    Delimited,
    Fixed,
    LengthPrefixed,
    MessageTooLarge,
    Raw,
    TstHandler,
    TstPool,
    TstStat,
)

LONG = 600_000  # bytes: received in an object, or a block, of its own


def echo(sock, data):
    return data


def framed(framing, body):
    if isinstance(framing, LengthPrefixed):
        return len(body).to_bytes(4, "big") + body
    return body + b"\r\n" if isinstance(framing, Delimited) else body


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    ("framing", "size"),
    [
        (None, 5),
        (Raw(), 5),
        (Fixed(5), 5),
        (Delimited(b"\r\n"), 5),
        (Delimited(b"\r\n", keep=True), 5),
        (LengthPrefixed(4), 5),
        (LengthPrefixed(4), LONG),
    ],
    ids=repr,
)
def test_an_echo(make_pool, make_client, framing, size, copy):
    client = make_client(make_pool(echo, framing=framing, copy=copy))
    stream = framed(framing, b"m" * size)
    for _ in range(3):
        sender = threading.Thread(target=client.sendall, args=(stream,))
        sender.start()
        assert recv_exact(client, len(stream)) == stream
        sender.join()


class Method:
    def answer(self, sock, data):
        return data


class Called:
    def __call__(self, sock, data):
        return data


@pytest.mark.parametrize(
    "function",
    [
        Method().answer,
        Called(),
        functools.partial(lambda what, sock, data: data, None),
        lambda sock, data, more=1: data,
    ],
    ids=["method", "object", "partial", "with a default"],
)
def test_any_callable_of_two(make_pool, make_client, function):
    client = make_client(make_pool(function))
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"


@pytest.mark.parametrize(
    "function",
    [
        lambda sock: sock.read(100),
        lambda sock, data=None: sock.read(100),
        lambda *arguments: arguments[0].read(100),
        lambda sock, *, more=1: sock.read(100),
    ],
    ids=["one", "second has a default", "any number", "keyword"],
)
def test_who_takes_a_socket_alone_reads_itself(make_pool, make_client, function):
    client = make_client(make_pool(function))
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"


def test_one_that_does_not_say_what_it_takes_reads_itself(make_pool, make_client):
    class Silent:
        __signature__ = "none"  # inspect.signature() raises TypeError for that

        def __call__(self, *arguments):
            (sock,) = arguments
            return sock.read(100)

    client = make_client(make_pool(Silent()))
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"


@pytest.mark.parametrize("function", [lambda: None, lambda sock, data, more: None, lambda *, sock: None])
def test_any_other_number_is_refused_at_once(make_pool, make_client, function):
    with pytest.raises(TypeError, match="takes a socket, or a socket and a message"):
        TstPool(function)
    pools = handler(on_message=ignore)
    pool = make_pool(pools)
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(TypeError, match="takes a socket, or a socket and a message"):
        sock.handler = function
    assert sock.handler is pools


def test_a_sockets_own_function_and_what_it_passes_on(make_pool, make_client):
    """S38: TstStat.RUN goes to the pool's handler, and so do its errors."""
    errors = []

    def own(sock, data):
        if data == b"wrong":
            raise KeyError(data)
        return TstStat.RUN if data == b"other" else b"own:" + bytes(data)

    pool = make_pool(
        handler(on_message=lambda sock, data: b"pool:" + data, on_error=lambda sock, exc: errors.append(exc)),
        framing=Delimited(b"\n"),
    )
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = own
    assert sock.handler is own
    client.sendall(b"a\nother\nwrong\n")
    assert recv_exact(client, 6 + 11) == b"own:a\npool:other\n"
    assert client.recv(1) == b""
    assert [type(exc) for exc in errors] == [KeyError]


def test_a_pool_of_a_function_gets_what_a_socket_passes_on(make_pool, make_client):
    pool = make_pool(lambda sock, data: b"pool:" + data, framing=Delimited(b"\n"))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = lambda sock, data: TstStat.RUN
    client.sendall(b"x\n")
    assert recv_exact(client, 7) == b"pool:x\n"


def test_one_that_is_added_with_a_socket(make_pool):
    ours, theirs = socket.socketpair()
    with theirs:
        make_pool(handler(on_message=ignore), listen=None).addsocket(ours, handler=echo)
        theirs.settimeout(10)
        theirs.sendall(b"hello")
        assert recv_exact(theirs, 5) == b"hello"


class Bytes(bytes):
    pass


@pytest.mark.parametrize("reply", [Bytes(b"abc"), bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a-b-c")[::2]])
@pytest.mark.parametrize("copy", [True, False])
def test_a_reply_is_any_bytes(make_pool, make_client, reply, copy):
    client = make_client(make_pool(lambda sock, data: reply, framing=LengthPrefixed(4), copy=copy))
    client.sendall(b"\0\0\0\1x")
    assert recv_exact(client, 7) == b"\0\0\0\3abc"


def test_a_part_of_what_is_lent(make_pool, make_client):
    client = make_client(make_pool(lambda sock, data: data[2:], framing=LengthPrefixed(4), copy=False))
    client.sendall(b"\0\0\0\5hello" * 3)
    assert recv_exact(client, 21) == b"\0\0\0\3llo" * 3


def test_a_view_that_is_gone_is_an_error_of_the_handler(make_pool, make_client):
    errors, kept = [], []

    def late(sock, data):
        kept.append(data)
        return kept[0]  # the second time it is no more

    pool = make_pool(
        handler(on_message=late, on_error=lambda sock, exc: errors.append(exc)), framing=Fixed(2), copy=False
    )
    client = make_client(pool)
    client.sendall(b"abcd")
    assert recv_exact(client, 2) == b"ab"
    assert client.recv(1) == b""
    assert [type(exc) for exc in errors] == [ValueError]


# -- a delimiter that is kept


@pytest.fixture
def lines(make_pool, make_client):
    """A socket whose framing keeps delimiters, and its peer."""
    pool = make_pool(handler(on_message=ignore), framing=Delimited(b"aba", keep=True, max_message=8))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    return sock, client


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (b"xaba", b"xaba"),
        (b"aba", b"aba"),
        (b"x", b"xaba"),
        (b"", b"aba"),
        (b"12345678aba", b"12345678aba"),
        (bytearray(b"xaba"), b"xaba"),
    ],
)
def test_a_kept_delimiter_goes_back_once(lines, message, sent):
    sock, client = lines
    sock.send_message(message)
    sock.send(b"|")
    assert recv_exact(client, len(sent) + 1) == sent + b"|"


@pytest.mark.parametrize("message", [b"abaxaba", b"xabax", b"ababa", b"xab", b"abaaba"])
def test_another_delimiter_is_refused(lines, message):
    """With what is kept, or put behind it, the peer would see two messages, or another one."""
    sock, client = lines
    with pytest.raises(ValueError, match="holds the delimiter"):
        sock.send_message(message)
    sock.send(b"|")
    assert client.recv(10) == b"|"


def test_a_kept_delimiter_does_not_count_as_length(lines):
    sock, client = lines
    for message in (b"123456789", b"123456789aba"):
        with pytest.raises(MessageTooLarge):
            sock.send_message(message)
    sock.close()
    with pytest.raises(ConnectionClosed):
        sock.send_message(b"x")
    assert client.recv(10) == b""


def test_elsewhere_a_framing_is_refused_with_the_way_to_set_it(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore))
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(Exception, match=r"in the socket's own handler.*connect\(\), addsocket\(\) and listen\(\)"):
        sock.framing = Fixed(3)
    assert sock.framing is None or isinstance(sock.framing, Raw)


def test_a_handler_object_is_asked_as_before(make_pool, make_client):
    class Echo(TstHandler):
        on_message = staticmethod(echo)

    client = make_client(make_pool(Echo()))
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"
