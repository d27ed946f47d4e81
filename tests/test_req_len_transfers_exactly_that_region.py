"""S11, S12, S16, S17, S31, S32, S33, defect 8: TstData and the transfers that it asks for."""

import random
import threading
import time

import pytest
from contract_helpers import as_function, echo, every_style, every_trigger, handler, open_sockets, round_trip, serve
from helpers import patient, recv_exact, scaled, wait_until

from tstpool import EPOLLIN, EPOLLOUT, TstData, TstError, TstStat


@every_style
@every_trigger
def test_ten_bytes_are_received_at_position_thirty(make_pool, make_client, style, trigger):
    """S11, S12: req_pos=30, req_len=10: com_len becomes 10, the bytes stand there, nothing else is touched."""
    seen = []

    def ask(sock):
        recv = sock.recv_data
        recv.s[:] = b"." * recv.s_len
        recv.req_pos, recv.req_len = 30, 10
        assert recv.com_len == 0
        return TstStat.SUSPEND

    def check(sock, data):
        recv = sock.recv_data
        seen.append((data, recv.req_pos, recv.req_len, recv.com_len, bytes(recv.s)))

    client = make_client(serve(make_pool, style, check, on_connect=ask, trigger=trigger, max_recv_size=64))
    client.sendall(b"0123456789")
    wait_until(lambda: seen)
    assert seen == [(b"0123456789", 30, 10, 10, b"." * 30 + b"0123456789" + b"." * 24)]


@every_style
@every_trigger
def test_ten_bytes_are_sent_from_position_thirty(make_pool, make_client, style, trigger):
    """S11, S12: SEND sends them, then the handler is called with EPOLLOUT, com_len 10."""
    seen = []

    def answer(sock, data):
        send = sock.send_data
        send.s[30:40] = data
        send.req_pos = 30
        send.req_len = 10
        return TstStat.SEND

    def sent(sock):
        send = sock.send_data
        seen.append((bool(sock.events & EPOLLOUT), send.req_pos, send.req_len, send.com_len))

    client = make_client(serve(make_pool, style, answer, on_writable=sent, trigger=trigger))
    assert round_trip(client, b"0123456789") == b"0123456789"
    wait_until(lambda: seen)
    assert seen == [(True, 30, 10, 10)]


@every_style
def test_no_input_comes_between_send_and_its_epollout(make_pool, make_client, style):
    """S12: the second message waits until the transfer of the first reply is done and reported."""
    order = []

    def answer(sock, data):
        order.append(data)
        sock.send_data.resize(8 << 20)
        sock.send_data.req_len = 8 << 20
        return TstStat.SEND

    def sent(sock):
        order.append("sent")
        assert sock.send_data.com_len == 8 << 20

    def ask(sock):
        sock.recv_data.req_len = 3

    client = make_client(serve(make_pool, style, answer, on_connect=ask, on_writable=sent, workers=2))
    client.sendall(b"onetwo")
    client.recv(1)
    assert order == [b"one"]
    recv_exact(client, (16 << 20) - 1)
    wait_until(lambda: len(order) == 4)
    assert order == [b"one", "sent", b"two", "sent"]


@every_style
@every_trigger
@pytest.mark.parametrize("step", [1, 3, 7, 20])
def test_pieces_accumulate_up_to_req_len(make_pool, make_client, style, trigger, step):
    """S16, defect 8: the handler is called only with all of it; EAGAIN between the pieces never counts."""
    calls, size, rounds = [], 20, 5

    def ask(sock):
        sock.recv_data.req_len = size

    def collect(sock, data):
        calls.append((data, sock.recv_data.com_len))

    pool = serve(make_pool, style, collect, on_connect=ask, trigger=trigger, workers=2)
    client = make_client(pool)
    text = bytes(range(size * rounds))
    for i in range(0, len(text), step):
        client.sendall(text[i : i + step])
        wait_until(lambda i=i: pool.stats().bytes_in == min(i + step, len(text)))  # the pool has met the end of it
    wait_until(lambda: len(calls) == rounds)
    assert calls == [(text[i : i + size], size) for i in range(0, len(text), size)]


@every_trigger
def test_large_pieces_accumulate_in_place(make_pool, make_client, trigger):
    """S16, defect 8: what is received straight into a large transfer; the EAGAIN after each piece never counts."""
    calls, size = [], 200_000

    def ask(sock):
        sock.recv_data.req_len = size

    def collect(sock, data):
        calls.append((data, sock.recv_data.com_len))

    pool = serve(make_pool, "handler", collect, on_connect=ask, trigger=trigger, max_recv_size=size, workers=2)
    client = make_client(pool)
    text = random.Random(16).randbytes(3 * size)
    for i in range(0, len(text), 30_000):
        client.sendall(text[i : i + 30_000])
        wait_until(lambda i=i: pool.stats().bytes_in == min(i + 30_000, len(text)))
    wait_until(lambda: len(calls) == 3)
    assert calls == [(text[i : i + size], size) for i in range(0, len(text), size)]


@every_style
@every_trigger
def test_header_then_body(make_pool, make_client, style, trigger):
    """S17: the handler sees four bytes, sets req_len to the body's size, and gets the body whole."""
    bodies = []

    def ask_header(sock):
        sock.user_data = "header"
        sock.recv_data.req_len = 4

    def both(sock, data):
        if sock.user_data == "header":
            size = int.from_bytes(data, "big")
            if size > sock.recv_data.s_len:
                sock.recv_data.resize(size)
            sock.recv_data.req_len = size
            sock.user_data = "body"
        else:
            bodies.append(data)
            ask_header(sock)

    client = make_client(serve(make_pool, style, both, on_connect=ask_header, trigger=trigger, workers=2))
    expected = [bytes([65 + i % 26]) * (1 + i * i * 7 % 20000) for i in range(scaled(200))]
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in expected)
    for i in range(0, len(stream), 50_001):  # pieces that end anywhere, many messages in each
        client.sendall(stream[i : i + 50_001])
    wait_until(lambda: len(bodies) == len(expected))
    assert bodies == expected


@every_style
def test_the_body_may_be_put_behind_the_header(make_pool, make_client, style):
    """S11, S17: req_pos=4 keeps what was received before it."""
    whole = []

    def ask_header(sock):
        sock.recv_data.req_pos, sock.recv_data.req_len = 0, 4

    def both(sock, data):
        recv = sock.recv_data
        if recv.req_pos == 0:
            recv.req_pos = 4
            recv.req_len = int.from_bytes(data, "big")
        else:
            whole.append(bytes(recv.s[: 4 + recv.com_len]))
            recv.req_len = 0
            ask_header(sock)

    client = make_client(serve(make_pool, style, both, on_connect=ask_header))
    client.sendall(b"\0\0\0\5hello\0\0\0\3you")
    wait_until(lambda: len(whole) == 2)
    assert whole == [b"\0\0\0\5hello", b"\0\0\0\3you"]


@every_style
@every_trigger
def test_one_call_never_carries_more_than_one_message(make_pool, make_client, style, trigger):
    """S33: a hundred messages in one segment are a hundred calls; the request repeats by itself."""
    calls = []

    def ask(sock):
        sock.recv_data.req_len = 5

    pool = serve(make_pool, style, lambda sock, data: calls.append(data), on_connect=ask, trigger=trigger)
    make_client(pool).sendall(b"".join(b"%05d" % i for i in range(100)))
    wait_until(lambda: len(calls) == 100)
    assert calls == [b"%05d" % i for i in range(100)]


@every_trigger
def test_a_read_takes_no_more_than_it_asks_for(make_pool, make_client, trigger):
    """S32, S33: with req_len 0 checked_len says what waits; what the handler leaves makes the next call."""
    calls = []

    def func(sock):
        waiting = sock.recv_data.checked_len
        first = sock.read(3)
        calls.append((waiting, first))

    make_client(make_pool(as_function_of(func), trigger=trigger, workers=2)).sendall(b"0123456789")
    wait_until(lambda: len(calls) == 4)
    assert calls == [(10, b"012"), (7, b"345"), (4, b"678"), (1, b"9")]


def as_function_of(func):
    return lambda sock: func(sock) if sock.events & EPOLLIN else None


@every_trigger
def test_a_handler_that_reads_nothing_is_called_again(make_pool, make_client, trigger):
    """S32, S14: level semantics; the spin shows in stats, and others get their turn on the only worker."""
    calls, read = [], threading.Event()

    def lazy(sock):
        if sock.user_data == "lazy" and not read.is_set():
            calls.append(sock.recv_data.checked_len)
            return
        sock.send(sock.read())

    pool = make_pool(lazy, trigger=trigger, workers=1)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.user_data = "lazy"
    client.sendall(b"hello")
    wait_until(lambda: len(calls) > 20)
    assert set(calls) == {5}
    assert pool.stats().spins > 0
    assert round_trip(make_client(pool), b"others") == b"others"
    read.set()
    assert recv_exact(client, 5) == b"hello"


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_no_more_than_a_limit_is_read_ahead_for_a_handler_that_does_not_read(make_pool, make_client, trigger):
    """S32: 256 KiB and what one more recv brings; TCP holds the rest back, and nothing of it is lost."""
    waiting, reading, total = [0], threading.Event(), [0]

    def lazy(sock):
        waiting[0] = max(waiting[0], sock.recv_data.checked_len)
        if reading.is_set():
            total[0] += len(sock.read())

    pool = make_pool(as_function_of(lazy), trigger=trigger, workers=1)
    client = make_client(pool)
    sent, size = threading.Event(), 16 << 20
    sender = threading.Thread(target=lambda: (client.sendall(b"x" * size), sent.set()))
    sender.start()
    try:
        wait_until(lambda: waiting[0] >= 1 << 18, timeout=3)
        spins = pool.stats().spins
        wait_until(lambda: pool.stats().spins > spins + 100)
    finally:
        reading.set()
        sender.join(patient(10))
    wait_until(lambda: total[0] == size)
    wait_until(sent.is_set)
    assert waiting[0] <= (256 + 64) << 10


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_a_handler_may_wait_until_enough_is_there(make_pool, make_client, trigger):
    """S29, S32: it looks at checked_len and leaves all unread until the message is whole."""
    got = []

    def patient_handler(sock):
        if sock.recv_data.checked_len >= 10:
            got.append(sock.read())

    pool = make_pool(as_function_of(patient_handler), trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(b"01234")
    wait_until(lambda: pool.stats().spins > 10)
    client.sendall(b"56789")
    wait_until(lambda: got, timeout=3)
    assert got == [b"0123456789"]


def test_read_and_read_into(make_pool, make_client):
    """S32: without blocking: b"" and 0 when nothing is there."""
    seen = []

    def func(sock):
        buffer = bytearray(b"....")
        seen.append((sock.read(2), sock.read_into(buffer), bytes(buffer), sock.read(0)))
        seen.append((sock.read(), sock.read(), sock.read(5), sock.read_into(buffer)))

    make_client(make_pool(as_function_of(func))).sendall(b"0123456789")
    wait_until(lambda: len(seen) == 2)
    assert seen == [(b"01", 4, b"2345", b""), (b"6789", b"", b"", 0)]


def test_read_is_for_the_sockets_own_handler(make_pool, make_client):
    """SPEC: from another thread, or another socket's handler, it is a TstError."""
    errors = []

    def peek(sock, data):
        for other in pool.sockets():
            if other is not sock:
                for read in (other.read, lambda other=other: other.read_into(bytearray(4))):
                    with pytest.raises(TstError):
                        read()
                    errors.append(1)

    pool = make_pool(handler(on_message=peek), workers=2)
    clients = [make_client(pool), make_client(pool)]
    sockets = open_sockets(pool, 2)
    for read in (sockets[0].read, lambda: sockets[0].read_into(bytearray(4))):
        with pytest.raises(TstError):
            read()
    clients[0].sendall(b"x")
    wait_until(lambda: len(errors) == 2)


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
@pytest.mark.parametrize("wrong", [-1, -(2**31), 65, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40])
def test_a_request_beyond_the_buffer_is_a_value_error(make_pool, make_client, side, wrong):
    """S31, defect 8, B30: refused at the assignment; nothing changed, the socket is unharmed."""
    sock, client, _pool = open_pair(make_pool, make_client)
    data = getattr(sock, side)
    data.req_pos = 4
    data.req_len = 60
    for name in ("req_len", "req_pos"):
        with pytest.raises(ValueError):
            setattr(data, name, wrong)
        assert (data.req_pos, data.req_len, data.s_len) == (4, 60, 64)
    with pytest.raises(ValueError):
        data.req_len = 61
    with pytest.raises(ValueError):
        data.req_pos = 5
    data.req_len = data.req_pos = 0
    assert round_trip(client, b"hello") == b"hello"


def open_pair(make_pool, make_client):
    pool = make_pool(as_function(echo), max_recv_size=64, max_send_size=64)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    return sock, client, pool


@pytest.mark.parametrize("wrong", ["5", None, 1.5, b"5"])
def test_a_request_that_is_no_number_is_a_type_error(make_pool, make_client, wrong):
    """S31, bad input."""
    sock, _client, _pool = open_pair(make_pool, make_client)
    for name in ("req_len", "req_pos"):
        with pytest.raises(TypeError):
            setattr(sock.recv_data, name, wrong)


@pytest.mark.parametrize("wrong", [2**63, 2**64, 2**100, -(2**63) - 1])
def test_a_request_beyond_any_machine_number_is_an_error(make_pool, make_client, wrong):
    """S31, B30: OverflowError is as good as ValueError, a wrapped-around number is not."""
    sock, _client, _pool = open_pair(make_pool, make_client)
    for name in ("req_len", "req_pos"):
        with pytest.raises((ValueError, OverflowError)):
            setattr(sock.recv_data, name, wrong)
    assert (sock.recv_data.req_pos, sock.recv_data.req_len) == (0, 0)


def test_the_whole_buffer_may_be_asked_for(make_pool, make_client):
    """S31: req_len == s_len is the largest request."""
    got = []

    def ask(sock):
        sock.recv_data.req_len = sock.recv_data.s_len

    pool = make_pool(handler(on_connect=ask, on_message=lambda sock, data: got.append(data)), max_recv_size=64)
    make_client(pool).sendall(b"x" * 64 + b"y" * 64)
    wait_until(lambda: len(got) == 2)
    assert got == [b"x" * 64, b"y" * 64]


def test_assigning_req_len_restarts_the_transfer(make_pool, make_client):
    """S11: com_len becomes 0."""
    seen = []

    def on_message(sock, data):
        recv = sock.recv_data
        before = recv.com_len
        recv.req_len = 4
        seen.append((data, before, recv.com_len))

    pool = make_pool(
        handler(on_connect=lambda sock: setattr(sock.recv_data, "req_len", 4), on_message=on_message), workers=1
    )
    make_client(pool).sendall(b"abcdefgh")
    wait_until(lambda: len(seen) == 2)
    assert seen == [(b"abcd", 4, 0), (b"efgh", 4, 0)]


def test_the_request_may_be_taken_back(make_pool, make_client):
    """S32: req_len = 0 means whatever has arrived, again."""
    got = []

    def on_message(sock, data):
        got.append(data)
        sock.recv_data.req_len = 0
        sock.send(b"ok")

    client = make_client(
        make_pool(handler(on_connect=lambda sock: setattr(sock.recv_data, "req_len", 4), on_message=on_message))
    )
    client.sendall(b"abcd")
    recv_exact(client, 2)
    client.sendall(b"efg")
    recv_exact(client, 2)
    assert got == [b"abcd", b"efg"]


def test_trans_time_is_how_long_the_transfer_took(make_pool, make_client):
    """S11: in seconds, from the first byte (or the request) to the last."""
    times = []

    def ask(sock):
        sock.recv_data.req_len = 8

    pool = make_pool(
        handler(on_connect=ask, on_message=lambda sock, data: times.append(sock.recv_data.trans_time)), workers=1
    )
    client = make_client(pool)
    client.sendall(b"half")
    wait_until(lambda: pool.stats().bytes_in == 4)
    time.sleep(0.05)  # this is the thing that is measured
    client.sendall(b"half")
    wait_until(lambda: times)
    assert 0.04 < times[0] < 10


def test_a_message_that_never_gets_whole_is_not_delivered(make_pool, make_client):
    """S16, S26: 3 of 4 bytes and a FIN: no call for them, one clean disconnect."""
    got, reasons = [], []
    pool = make_pool(
        handler(
            on_connect=lambda sock: setattr(sock.recv_data, "req_len", 4),
            on_message=lambda sock, data: got.append(data),
            on_disconnect=lambda sock, reason: reasons.append(reason),
        )
    )
    client = make_client(pool)
    client.sendall(b"whole" + b"56")
    client.close()
    wait_until(lambda: reasons)
    assert got == [b"whol"]
    assert len(reasons) == 1


def test_data_objects_belong_to_the_socket(make_pool, make_client):
    """S11: the same TstData each time, with the fields of the original."""
    sock, _client, _pool = open_pair(make_pool, make_client)
    for data in (sock.recv_data, sock.send_data):
        assert isinstance(data, TstData)
        assert (data.s_len, data.req_pos, data.req_len, data.com_len) == (64, 0, 0, 0)
        assert data.checked_len == 0
        assert data.trans_time >= 0
        assert (len(data.s), data.s.readonly) == (64, False)
