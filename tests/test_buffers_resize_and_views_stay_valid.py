"""S18, S21, B53: TstData.resize, and memoryviews that outlive what they were taken from."""

import gc

import pytest
from contract_helpers import as_function, echo, every_style, handler, replying, round_trip, serve
from downstream_handlers import Commands
from helpers import recv_exact, scaled, wait_until


@pytest.fixture
def open_socket(make_pool, make_client):
    pool = make_pool(handler(on_message=echo), max_recv_size=64, max_send_size=64)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    return sock, client, pool


@every_style
def test_the_handler_resizes_during_the_call_and_contents_are_kept(make_pool, make_client, style):
    """S18: a 20-byte header asks for a 100,000-byte body behind it; the header still stands there."""
    whole = []

    def ask(sock):
        sock.recv_data.req_len = 20

    def grow(sock, data):
        recv = sock.recv_data
        if recv.req_pos == 0:
            recv.resize(100_020)
            assert (recv.s_len, bytes(recv.s[:20])) == (100_020, data)
            recv.req_pos = 20
            recv.req_len = 100_000
        else:
            whole.append(bytes(recv.s))

    pool = serve(make_pool, style, grow, on_connect=ask, max_recv_size=20)
    client = make_client(pool)
    text = bytes(range(20)) + b"body" * 25_000
    client.sendall(text)
    wait_until(lambda: whole)
    assert whole == [text]


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
def test_growing_and_shrinking_keep_what_fits(open_socket, side):
    """S18: s_len follows, contents stay."""
    sock, _client, _pool = open_socket
    data = getattr(sock, side)
    data.s[:] = bytes(range(64))
    data.resize(1 << 20)
    assert data.s_len == len(data.s) == 1 << 20
    assert bytes(data.s[:64]) == bytes(range(64))
    data.resize(10)
    assert (data.s_len, bytes(data.s)) == (10, bytes(range(10)))


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
def test_a_new_buffer_is_zero_whatever_the_memory_held_before(make_pool, make_client, side):
    """S18, S21: nothing of another life of the memory can reach a peer."""
    pool = make_pool(handler(on_message=echo), max_recv_size=700, max_send_size=700)
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    junk = [bytearray(b"\xff" * size) for size in (700, 900) for _ in range(100)]
    del junk
    data = getattr(sock, side)
    assert bytes(data.s) == bytes(700)
    data.resize(900)
    assert bytes(data.s) == bytes(900)


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
@pytest.mark.parametrize("wrong", [0, -1, 39])
def test_a_size_that_is_too_small_is_a_value_error(open_socket, side, wrong):
    """S18, bad input: 0, negative, or less than what is asked for now."""
    sock, _client, _pool = open_socket
    data = getattr(sock, side)
    data.req_pos = 30
    data.req_len = 10
    with pytest.raises(ValueError):
        data.resize(wrong)
    assert (data.s_len, data.req_pos, data.req_len) == (64, 30, 10)
    data.resize(40)
    assert data.s_len == 40


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
def test_a_live_view_refuses_the_resize(open_socket, side):
    """S18, B53: BufferError, and the view goes on; after its release the buffer may move."""
    sock, client, _pool = open_socket
    data = getattr(sock, side)
    view = data.s
    part = view[10:20]
    for _ in range(2):
        with pytest.raises(BufferError):
            data.resize(128)
    view.release()
    with pytest.raises(BufferError):
        data.resize(128)
    part[:] = b"0123456789"
    part.release()
    data.resize(128)
    assert bytes(data.s[10:20]) == b"0123456789"
    assert round_trip(client, b"hello") == b"hello"


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
def test_a_view_is_valid_after_the_connection_closed(open_socket, side):
    """S18, B53, defect 6: the memory lives for as long as the view does."""
    sock, client, pool = open_socket
    view = getattr(sock, side).s
    view[:5] = b"early"
    client.close()
    wait_until(lambda: sock.closed)
    wait_until(lambda: len(pool) == 0)
    view[5:10] = b" late"
    gc.collect()
    assert bytes(view[:10]) == b"early late"
    pool.stop()
    gc.collect()
    view[-1] = 1
    assert len(view) == 64


def test_views_of_received_messages_stay_valid(make_pool, make_client):
    """B53: kept after the handler returned, over more messages and after the end."""
    views = []

    def ask(sock):
        sock.recv_data.req_len = 8

    def keep(sock, data):
        views.append(sock.recv_data.s)
        sock.send(data)

    pool = make_pool(handler(on_connect=ask, on_message=keep))
    client = make_client(pool)
    for i in range(scaled(50, minimum=5)):
        assert round_trip(client, b"%08d" % i) == b"%08d" % i
    client.close()
    wait_until(lambda: len(pool) == 0)
    gc.collect()
    assert all(len(view) == 4096 for view in views)
    assert bytes(views[-1][:8]) == b"%08d" % (len(views) - 1)


def test_a_view_of_data_that_is_being_sent_harms_nothing(make_pool, make_client):
    """B53: the engine sends from a buffer that the user still looks at."""
    views = []

    def answer(sock, data):
        view = sock.send_data.s
        view[: len(data)] = data
        views.append(view)
        sock.send_data.req_len = len(data)

    client = make_client(make_pool(handler(on_message=answer)))
    for _ in range(20):
        assert round_trip(client, b"hello") == b"hello"
    assert all(bytes(view[:5]) == b"hello" for view in views)


def test_the_data_that_a_handler_got_is_its_own(make_pool, make_client):
    """DESIGN 4: on_message gets bytes; later messages don't change them."""
    kept = []

    def keep(sock, data):
        assert type(data) is bytes
        kept.append(data)
        sock.send(data)

    client = make_client(make_pool(handler(on_message=keep)))
    for i in range(50):
        round_trip(client, b"%04d" % i)
    assert kept == [b"%04d" % i for i in range(50)]


def data_size():
    """Private writable memory of this process, in bytes: malloc shows here, touched or not."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


@every_style
def test_an_idle_connection_costs_no_buffers(make_pool, make_client, style):
    """S21: 300 idle connections with 128 KiB of buffers each take less than 16 KiB each, client objects included."""
    pool = serve(make_pool, style, echo, max_recv_size=64 << 10, max_send_size=64 << 10, workers=2)
    round_trip(make_client(pool), b"warm up")
    clients = 300
    before = data_size()
    for _ in range(clients):
        make_client(pool)
    wait_until(lambda: len(pool) == clients + 1)
    assert data_size() - before < clients * (16 << 10)
    assert {(sock.recv_data.s_len, sock.send_data.s_len) for sock in pool.sockets()} == {(64 << 10, 64 << 10)}


@pytest.mark.parametrize("name", ["max_recv_size", "max_send_size"])
def test_buffers_of_one_byte_work(make_pool, make_client, name):
    """S21: the smallest size; messages and replies are not limited by it."""
    pool = make_pool(handler(on_message=replying(lambda data: data * 2)), **{name: 1})
    client = make_client(pool)
    client.sendall(b"hello")
    assert recv_exact(client, 10) == b"hellohello"
    pool = make_pool(as_function(echo), **{name: 1})
    assert round_trip(make_client(pool), b"hello") == b"hello"


@pytest.mark.parametrize("side", ["recv_data", "send_data"])
def test_a_buffer_says_what_it_is_and_counts_no_more_done_than_was_asked_for(open_socket, side):
    """S18: com_len may be assigned, as in the original, up to req_len."""
    sock, _client, _pool = open_socket
    data = getattr(sock, side)
    data.resize(100)
    data.req_pos = 20
    data.req_len = 30
    data.com_len = 10
    assert len(data) == 100
    assert repr(data) == "<TstData s_len=100 req_pos=20 req_len=30 com_len=10 checked_len=0>"
    with pytest.raises(ValueError, match="com_len"):
        data.com_len = 31
    assert data.com_len == 10


def test_what_a_compiled_handler_is_given_stays_where_it_is(make_pool, make_client):
    """Another thread's resize() while it runs is refused: it would move the bytes."""
    waits = Commands()
    pool = make_pool(waits)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.recv_data.req_len = 8
    client.sendall(b"b1234567")
    wait_until(lambda: waits.waiting)
    with pytest.raises(BufferError):
        sock.recv_data.resize(1 << 20)
    waits.open_gate()
    wait_until(lambda: waits.counts["received"] == 1)
    wait_until(lambda: resized(sock.recv_data, 1 << 20))
    assert bytes(sock.recv_data.s[:8]) == b"b1234567"


def resized(data, size):
    try:
        data.resize(size)
    except BufferError:  # the handler is about to return
        return False
    return True
