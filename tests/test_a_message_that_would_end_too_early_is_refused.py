"""B61: a message of which a peer would get another one, because its end and the delimiter hold an earlier one."""

import socket

import pytest
from contract_helpers import handler, ignore
from helpers import recv_exact, scaled, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tstpool import Delimited

BIG = 1 << 16  # bytes of this size are shared with the caller, not copied
MESSAGE = st.text("\r\n", max_size=6).map(str.encode)
DELIMITER = st.text("\r\n", min_size=1, max_size=4).map(str.encode)
END = b"!"  # in no delimiter


def ends_too_early(message, delimiter):
    return (message + delimiter).index(delimiter) < len(message)


@pytest.mark.parametrize(
    ("message", "delimiter"),
    [(b"line1\n", b"\n\n"), (b"ba", b"aa"), (b"xab", b"abab"), (b"a" * 3, b"a" * 5), (b"x" * BIG + b"\n", b"\n\n")],
    ids=["lines", "aa", "abab", "shorter", "big"],
)
def test_its_end_may_be_no_beginning_of_the_delimiter(make_pool, make_client, message, delimiter):
    """B61: and nothing of it is sent."""
    pool = make_pool(handler(on_message=ignore), framing=Delimited(delimiter))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(ValueError, match="delimiter"):
        sock.send_message(message)
    sock.send_message(b".")
    assert recv_exact(client, 1 + len(delimiter)) == b"." + delimiter


@pytest.mark.parametrize("size", [1, BIG])
def test_a_reply_of_the_kind_is_an_error_of_the_handler(make_pool, make_client, size):
    """B61: on_error gets it, and the peer nothing but the end."""
    errors = []
    reply = b"x" * size + b"\n"
    hooks = handler(on_message=lambda sock, data: reply, on_error=lambda sock, error: errors.append(error))
    client = make_client(make_pool(hooks, framing=Delimited(b"\n\n")))
    client.sendall(b"hello\n\n")
    assert client.recv(100) == b""
    assert [type(error) for error in errors] == [ValueError]


def test_what_is_taken_arrives_as_it_is(make_pool):
    """B61: refused is what would end too early, and nothing else; b"a\\r" before b"\\r\\n" does not."""
    got = []
    pool = make_pool(handler(on_message=lambda sock, data: got.append(data)), listen=None, workers=2)

    @example([b"a\r"], b"\r\n", False)
    @example([b"a\r\n", b"\r\n"], b"\r\n", True)
    @given(st.lists(MESSAGE, max_size=8), DELIMITER, st.booleans())
    @settings(
        deadline=None,
        max_examples=scaled(100, minimum=20),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def check(messages, delimiter, keep):
        got.clear()
        sender, receiver = (pool.addsocket(end, framing=Delimited(delimiter, keep)) for end in socket.socketpair())
        taken = []
        for message in [*messages, END]:
            try:
                sender.send_message(message)
            except ValueError:
                assert ends_too_early(message.removesuffix(delimiter) if keep else message, delimiter)
            else:
                taken.append(message)
        wait_until(lambda: len(got) >= len(taken), message=lambda: f"{got} of {taken}")
        sender.close()
        wait_until(lambda: receiver.closed)
        assert got == [message.removesuffix(delimiter) + delimiter if keep else message for message in taken]

    check()
