"""S7, S8, S10, B29, B54: sock.send."""

import array
import contextlib
import gc
import mmap
import random
import threading
from collections import Counter

import pytest
from contract_helpers import (
    echo,
    every_style,
    every_trigger,
    handler,
    ignore,
    in_threads,
    open_sockets,
    round_trip,
    serve,
)
from helpers import connect, patient, recv_exact, scaled, wait_until

from tstpool import LengthPrefixed, MessageTooLarge, SendQueueFull, TstStat


@every_style
@every_trigger
def test_a_handler_sends_directly(make_pool, make_client, style, trigger):
    """S10, S13: several sends in one call arrive in order; nothing has to be returned."""

    def answer(sock, data):
        for piece in (b"<", data, b">"):
            count = sock.send(piece)
            assert isinstance(count, int)
            assert count >= 0

    client = make_client(serve(make_pool, style, answer, trigger=trigger))
    for _ in range(20):
        client.sendall(b"hello")
        assert recv_exact(client, 7) == b"<hello>"


@every_style
def test_a_handler_sends_through_its_buffer(make_pool, make_client, style):
    """S10: setting send_data.req_len is enough; SUSPEND sends it without an EPOLLOUT call."""
    writable = []

    def answer(sock, data):
        sock.send_data.s[: len(data)] = data.upper()
        sock.send_data.req_pos = 0
        sock.send_data.req_len = len(data)
        return TstStat.SUSPEND

    client = make_client(serve(make_pool, style, answer, on_writable=lambda sock: writable.append(sock)))
    for text in (b"one", b"fourteen", b"two"):
        client.sendall(text)
        assert recv_exact(client, len(text)) == text.upper()
    assert writable == []


@every_style
@every_trigger
def test_another_thread_sends(make_pool, make_client, style, trigger):
    """S7, S8: one call, no lock, while no handler runs."""
    pool = serve(make_pool, style, ignore, trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    for i in range(50):
        sock.send(b"news %04d" % i)
        assert recv_exact(client, 9) == b"news %04d" % i


@every_style
def test_eight_threads_send_to_one_connection(make_pool, make_client, style):
    """S8, B57, DESIGN 3: never interleaved inside one call, in order for each thread."""
    pool = serve(make_pool, style, ignore, workers=2)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    rounds, length = scaled(300), 60

    def speak(who):
        for i in range(rounds):
            sock.send(b"%d:%05d" % (who, i) + b"." * (length - 7))

    received = []
    in_threads(
        *(lambda who=who: speak(who) for who in range(8)),
        lambda: received.append(recv_exact(client, 8 * rounds * length)),
    )
    messages = [received[0][i : i + length] for i in range(0, len(received[0]), length)]
    for who in range(8):
        own = [message for message in messages if message.startswith(b"%d:" % who)]
        assert own == [b"%d:%05d" % (who, i) + b"." * (length - 7) for i in range(rounds)]


def test_a_thread_sends_while_the_handler_does(make_pool, make_client):
    """B06: both get through, neither inside the other."""
    rounds = scaled(500)

    def answer(sock, data):
        for _ in data:
            sock.send(b"H" * 32)

    pool = make_pool(handler(on_message=answer))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)

    def from_outside():
        for _ in range(rounds):
            sock.send(b"T" * 32)

    def ask():
        for _ in range(rounds):
            client.send(b"?")

    _, _, received = in_threads(from_outside, ask, lambda: recv_exact(client, 2 * rounds * 32))
    pieces = [received[i : i + 32] for i in range(0, len(received), 32)]
    assert pieces.count(b"H" * 32) == pieces.count(b"T" * 32) == rounds


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        (b"bytes", b"bytes"),
        (bytearray(b"bytearray"), b"bytearray"),
        (memoryview(b"a memoryview")[2:], b"memoryview"),
        (memoryview(b"a-b-c-d-")[::2], b"abcd"),
        (memoryview(b"abcd")[::-1], b"dcba"),
        (array.array("H", [0x4142, 0x4344]), array.array("H", [0x4142, 0x4344]).tobytes()),
        (memoryview(bytes(range(24))).cast("B", (4, 6)), bytes(range(24))),
        (b"", b""),
    ],
    ids=["bytes", "bytearray", "slice", "strided", "reversed", "array", "2d", "empty"],
)
def test_any_buffer_may_be_sent(make_pool, make_client, data, sent):
    """B29: what is not contiguous is copied first."""
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    assert isinstance(sock.send(data), int)
    sock.send(b"|")
    assert recv_exact(client, len(sent) + 1) == sent + b"|"


PATTERN = random.Random(29).randbytes(1 << 20)


def filled(size):
    """A bytearray of that size: PATTERN, over and over."""
    data = bytearray(size)
    for begin in range(0, size, len(PATTERN)):
        data[begin : begin + len(PATTERN)] = PATTERN[: min(len(PATTERN), size - begin)]
    return data


def receive_pattern(client, size):
    """Receives so many bytes and compares them with PATTERN, keeping none."""
    twice, buffer, done = memoryview(PATTERN * 2), memoryview(bytearray(len(PATTERN))), 0
    while done < size:
        n = client.recv_into(buffer[: min(len(PATTERN), size - done)])
        assert n, f"closed after {done} of {size} bytes"
        place = done % len(PATTERN)
        assert buffer[:n] == twice[place : place + n], f"wrong after {done} bytes"
        done += n


def memory_is_there(size):
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable")) * 1024 > size


@pytest.mark.slow
@pytest.mark.parametrize("how", ["memoryview", "bytes", "message"])
@pytest.mark.parametrize("size", [2**31 - 1, 2**31 + 1])
def test_two_gigabytes_in_one_send(make_pool, make_client, how, size):
    """B29: at and above the limit of a C int: a view, which is copied; bytes, which are not; a message with its length
    in four bytes. Every byte arrives, and what is sent next is behind them."""
    if not memory_is_there(5 << 30):
        pytest.skip("needs 5 GiB of memory")
    framing = LengthPrefixed(4, max_message=2**32 - 1)
    pool = make_pool(handler(on_message=ignore), framing=framing, max_total_queued=None, first_byte_timeout=None)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    data = filled(size)
    if how == "memoryview":
        queued = sock.send(memoryview(data)[:])
    else:
        copy = bytes(data)
        del data
        queued = sock.send(copy) if how == "bytes" else sock.send_message(copy)
        del copy
    header = 4 if how == "message" else 0
    assert queued == size + header
    with contextlib.suppress(SendQueueFull):  # max_queued; unless the kernel has taken all of it already
        sock.send(b"too much")
        pytest.fail("nothing of two gigabytes waits")
    assert int.from_bytes(recv_exact(client, header), "big") == (size if header else 0)
    receive_pattern(client, size)
    sock.flush(10)
    sock.send(b"|")
    assert recv_exact(client, 1) == b"|"
    wait_until(lambda: pool.stats().bytes_queued == 0)


def test_more_than_a_header_can_say_is_refused(make_pool, make_client):
    """B29: 4 GiB and one byte, of which none exists, as a message with its length in four bytes; the connection goes
    on."""
    pool = make_pool(handler(on_message=echo), framing=LengthPrefixed(4, max_message=2**32 - 1))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    much = mmap.mmap(-1, 2**32 + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with much, pytest.raises(MessageTooLarge, match=str(2**32 + 1)):
        sock.send_message(much)
    sock.send_message(b"hello")
    assert recv_exact(client, 9) == b"\0\0\0\5hello"


@pytest.mark.parametrize("wrong", ["text", 5, None, ["list"], object()], ids=["str", "int", "None", "list", "object"])
def test_something_that_is_no_buffer_is_a_type_error(make_pool, make_client, wrong):
    """Bad input: and the connection goes on."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(TypeError):
        sock.send(wrong)
    assert round_trip(client, b"hello") == b"hello"


def test_a_bytearray_may_be_changed_after_send(make_pool, make_client):
    """B54: what was there at the call is sent, whatever the sender does to its buffer afterwards."""
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    size = 4 << 20
    data = bytearray(b"a" * size)
    sock.send(data)
    data[:] = b"b" * size
    data.clear()  # no export is left on it
    assert recv_exact(client, size) == b"a" * size


@pytest.mark.parametrize("shards", [1, 2])
def test_threads_that_send_and_die_while_garbage_is_collected(make_pool, make_client, shards):
    """B55, B57: they leave cycles behind, and held sockets that have closed meanwhile: nothing is lost, or kept."""
    pool = make_pool(handler(on_message=lambda sock, data: data), workers=4, shards=shards, framing=LengthPrefixed(1))
    clients = [make_client(pool) for _ in range(4)]
    socks = open_sockets(pool, len(clients))
    expected, over = Counter(), threading.Event()

    def send_and_die(sock, frame):
        cycle = [pool.sockets()]
        cycle.append(cycle)
        sock.send_message(frame)

    def live_and_die():
        for number in range(scaled(200)):
            sock = socks[number % len(socks)]
            short = connect(pool)
            thread = threading.Thread(target=send_and_die, args=(sock, b"from a thread"))
            thread.start()
            short.close()
            expected[sock.peer] += 1
            if number % 4 == 3:  # so many at a time
                thread.join()
        over.set()

    def collect():
        while not over.is_set():
            gc.collect()

    def talk(client):
        frames = Counter()

        def frame():
            return recv_exact(client, recv_exact(client, 1)[0])

        while not over.is_set():
            client.sendall(b"\4echo")
            while (data := frame()) != b"echo":
                frames[data] += 1
        while frames[b"from a thread"] < expected[client.getsockname()]:
            frames[frame()] += 1
        assert set(frames) <= {b"from a thread"}
        client.sendall(b"\3end")
        assert frame() == b"end"

    in_threads(live_and_die, collect, *(lambda client=client: talk(client) for client in clients), timeout=60)
    wait_until(lambda: len(pool) == len(clients))


@every_style
def test_one_handler_sends_to_every_other_connection(make_pool, make_client, style):
    """S7, S8: a chat room, without a lock."""

    def tell_all(sock, data):
        for other in pool.sockets():
            if other is not sock:
                other.send(data)

    pool = serve(make_pool, style, tell_all, workers=4)
    clients = [make_client(pool) for _ in range(10)]
    wait_until(lambda: len(pool) == 10)
    for i, client in enumerate(clients):
        client.sendall(b"%d says hello" % i)
        for other in clients:
            if other is not client:
                assert recv_exact(other, 12) == b"%d says hello" % i


def test_two_handlers_send_to_each_other_at_once(make_pool, make_client):
    """S8, defect 6: crossed sends of owned sockets neither block nor get lost."""
    rounds = scaled(500)
    pair = {}

    def cross(sock, data):
        pair[sock.id].send(data)

    pool = make_pool(handler(on_message=cross), workers=4)
    one, two = make_client(pool), make_client(pool)
    first, second = open_sockets(pool, 2)
    pair.update({first.id: second, second.id: first})
    barrier = threading.Barrier(2)

    def talk(client):
        for _ in range(rounds):
            barrier.wait(patient(10))
            client.sendall(b"0123456789")
            assert recv_exact(client, 10) == b"0123456789"

    in_threads(lambda: talk(one), lambda: talk(two))
