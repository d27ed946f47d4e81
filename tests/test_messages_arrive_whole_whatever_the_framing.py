"""Framing over real sockets: any split of a stream gives the same messages; limits hold; it may change on the way."""

import contextlib
import pickle
import struct
import threading
import time

import pytest
from contract_helpers import handler, round_trip
from helpers import connect, patient, recv_exact, recv_until_eof, scaled, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tstpool import Delimited, Fixed, LengthPrefixed, MessageTooLarge, Raw, TstError, TstHandler

FRAMINGS = [
    Fixed(1),
    Fixed(7),
    Delimited(),
    Delimited(b"\r\n"),
    Delimited(b"aab", keep=True),
    LengthPrefixed(1),
    LengthPrefixed(2, "little"),
    LengthPrefixed(3, offset=2, adjust=-5, strip=False),
    LengthPrefixed(8, adjust=-8),
    LengthPrefixed(),
]


def model(framing, stream):
    """The messages in a stream: what the engine must hand out."""
    options = parse(framing)
    if isinstance(framing, Fixed):
        size = options["n"]
        return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    if isinstance(framing, Delimited):
        *messages, _ = stream.split(options["delimiter"])
        return [message + options["delimiter"] * options["keep"] for message in messages]
    messages, header = [], options["offset"] + options["size"]
    while len(stream) >= header:
        body = int.from_bytes(stream[options["offset"] : header], options["byteorder"]) + options["adjust"]
        if len(stream) < header + body:
            break
        messages.append(stream[header * options["strip"] : header + body])
        stream = stream[header + body :]
    return messages


def parse(framing):
    return eval(repr(framing).replace(type(framing).__name__, "dict", 1))  # its repr is how it was made


def frame(framing, body):
    """A message as a peer would send it; for Fixed, cut or filled to its size."""
    options = parse(framing)
    if isinstance(framing, Fixed):
        return body[: options["n"]].ljust(options["n"], b".")
    if isinstance(framing, Delimited):
        return body.replace(options["delimiter"], b"") + options["delimiter"]
    number = (len(body) - options["adjust"]).to_bytes(options["size"], options["byteorder"])
    return bytes(options["offset"]) + number + body


class Collector(TstHandler):
    def __init__(self):
        self.messages, self.errors, self.reasons = [], [], []

    def on_message(self, sock, data):
        self.messages.append(data)

    def on_error(self, sock, exc):
        self.errors.append(exc)

    def on_disconnect(self, sock, reason):
        self.reasons.append(reason)


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
def test_any_split_gives_the_same_messages(make_pool, framing):
    """B61: the engine against a model of ten lines, over loopback, with the stream cut anywhere."""
    collector = Collector()
    pool = make_pool(collector, framing=framing, workers=2)

    @given(bodies=st.lists(st.binary(max_size=30), max_size=8), places=st.lists(st.floats(0, 1), max_size=6))
    @settings(
        deadline=None,
        max_examples=scaled(60, minimum=10),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def check(bodies, places):
        collector.messages, collector.reasons = [], []
        stream = b"".join(frame(framing, body) for body in bodies)
        cuts = sorted(int(place * len(stream)) for place in places)
        with connect(pool) as client:
            for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                if begin != end:
                    client.sendall(stream[begin:end])
        wait_until(lambda: collector.reasons)
        assert collector.messages == model(framing, stream)
        assert collector.errors == []

    check()


def test_unfinished_messages_of_many_connections_are_not_mixed_up(make_pool, make_client):
    """The first half of each connection's message waits while others receive into the same scratch buffer."""
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=2)
    clients = [make_client(pool) for _ in range(20)]
    bodies = [bytes([number]) * 10 for number in range(len(clients))]
    for n in range(1, 13):
        received = pool.stats().bytes_in
        for client, body in zip(clients, bodies, strict=True):
            client.sendall((len(body).to_bytes(4, "big") + body)[:n])
            wait_until(lambda before=received, n=n: pool.stats().bytes_in == before + n)
            received += n
        for client, body in zip(clients, bodies, strict=True):
            client.sendall((len(body).to_bytes(4, "big") + body)[n:])
        for client, body in zip(clients, bodies, strict=True):
            assert recv_exact(client, 14) == len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_a_reply_is_framed_like_the_message(make_pool, make_client, framing, trigger):
    """Returning bytes, and send_message(): both come back as they went."""
    sizes = [7] if isinstance(framing, Fixed) else [0, 1, 100, 250]
    bodies = [bytes(65 + i % 20 for i in range(size)) for size in sizes for _ in range(3)]

    class Echo(TstHandler):
        n = 0

        def on_message(self, sock, data):
            options = parse(framing)
            if not options.get("strip", True):
                data = data[options["offset"] + options["size"] :]
            if options.get("keep"):
                data = data[: -len(options["delimiter"])]
            self.n += 1
            if self.n % 2:
                return data
            sock.send_message(data)

    client = make_client(make_pool(Echo(), framing=framing, trigger=trigger))
    stream = b"".join(frame(framing, body) for body in bodies)
    client.sendall(stream)
    assert recv_exact(client, len(stream)) == stream


def test_without_framing_bytes_go_back_as_they_are(make_pool, make_client):
    client = make_client(make_pool(handler(on_message=lambda sock, data: data)))
    assert round_trip(client, b"hello") == b"hello"


def test_a_message_in_many_reads_is_cut_once(make_pool, make_client):
    """1 MiB in many reads: it is not searched from its beginning at each."""
    size = scaled(1 << 20, minimum=1 << 16)
    body = b"x" * size
    for framing in (LengthPrefixed(max_message=1 << 21), Delimited(max_message=1 << 21)):
        collector = Collector()
        pool = make_pool(collector, framing=framing, workers=1)
        client = make_client(pool)
        stream = frame(framing, body)
        for i in range(0, len(stream), 1 << 12):
            client.sendall(stream[i : i + (1 << 12)])
        wait_until(lambda collector=collector: collector.messages, 30)
        assert collector.messages == [body]


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 262143, 262144, 262145, 1 << 20])
@pytest.mark.parametrize("framing", [LengthPrefixed(), Delimited(b"\r\n")], ids=repr)
def test_long_messages_arrive_whole(make_pool, make_client, framing, size):
    body = bytes(range(65, 91)) * (size // 26 + 1)
    client = make_client(make_pool(handler(on_message=lambda sock, data: data), framing=framing))
    for _ in range(2):
        stream = frame(framing, body[:size])
        threading.Thread(target=client.sendall, args=(stream,)).start()
        assert recv_exact(client, len(stream)) == stream


TOO_LONG = [
    (LengthPrefixed(4, max_message=1000), struct.pack(">I", 1001)),
    (LengthPrefixed(4, max_message=1000), b"\xff\xff\xff\xff"),
    (LengthPrefixed(8, max_message=1000), b"\xff" * 8),
    (LengthPrefixed(8, adjust=8, max_message=1000), b"\xff" * 8),
    (LengthPrefixed(2, adjust=-3), b"\0\2"),
    (Delimited(max_message=1000), b"x" * 1001),
    (Delimited(b"\r\n", max_message=1000), b"x" * 1001 + b"\r\n"),
]


@pytest.mark.parametrize(("framing", "stream"), TOO_LONG, ids=repr)
@pytest.mark.parametrize("keep_open", [False, True])
def test_too_long_a_message_closes_its_connection_and_harms_nobody(make_pool, make_client, framing, stream, keep_open):
    """B30, B61: MessageTooLarge to on_error; whatever that returns, the connection ends; others go on."""
    errors, reasons = [], []

    def on_error(sock, exc):
        errors.append(exc)
        return 0 if keep_open else None

    pool = make_pool(
        handler(
            on_message=lambda sock, data: data,
            on_error=on_error,
            on_disconnect=lambda sock, reason: reasons.append(reason),
        ),
        framing=framing,
    )
    good, bad = make_client(pool), make_client(pool)
    message = frame(framing, b"x" * 10)
    bad.sendall(message + stream)
    assert recv_until_eof(bad) == message
    bad.close()  # else it lingers, for linger_timeout
    (error,) = errors
    assert isinstance(error, MessageTooLarge)
    assert isinstance(error, TstError)
    good.sendall(message)
    assert recv_exact(good, len(message)) == message
    wait_until(lambda: reasons)
    wait_until(lambda: len(pool) == 1)  # its slot is free only after on_disconnect


def test_a_connection_that_sends_nonsense_holds_little_memory(make_pool, make_client):
    """A header that announces the largest message makes the engine hold nothing until its bytes come."""
    pool = make_pool(Collector(), framing=LengthPrefixed(4, max_message=1 << 30), workers=1)
    clients = [make_client(pool) for _ in range(8)]
    for client in clients:
        client.sendall(struct.pack(">I", 1 << 30) + b"x" * 10)
    wait_until(lambda: pool.stats().bytes_in == 14 * 8)
    assert resident_bytes() < 2 << 30


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_framing_changes_in_mid_stream(make_pool, make_client):
    """An upgrade: what was read already is cut by the new framing."""
    got = []

    class Upgrade(TstHandler):
        def on_message(self, sock, data):
            got.append(data)
            if data == b"UPGRADE":
                sock.framing = LengthPrefixed(2)
            elif data == b"RAW":
                sock.framing = None
            elif data == b"LINES":
                sock.framing = Delimited(b"\r\n")

    pool = make_pool(Upgrade(), framing=Delimited(b"\r\n"))
    client = make_client(pool)
    client.sendall(b"hello\r\nUPGRADE\r\n\0\3abc\0\0\0\5LINES" + b"a line\r\nRAW\r\nthe rest\r\n\0\1")
    wait_until(lambda: len(got) == 8)
    assert got == [b"hello", b"UPGRADE", b"abc", b"", b"LINES", b"a line", b"RAW", b"the rest\r\n\0\1"]


def test_framings_that_come_and_go_in_the_midst_of_a_message(make_pool, make_client):
    """The last one counts, from the first byte of what is unread, also where it lies at a freed one's address."""

    class Fickle(Collector):
        def on_connect(self, sock):
            sock.framing = Delimited(b"\n")

        def on_writable(self, sock):
            sock.framing = Delimited(b"nobody sends this")  # frees the first one, so that the next may lie there
            sock.framing = Delimited(b"a")

    got = Fickle()
    pool = make_pool(got, workers=1)
    client = make_client(pool)
    client.sendall(b"1a2a3")
    wait_until(lambda: pool.stats().bytes_in == 5)
    pool.need_send(pool.sockets()[0])
    wait_until(lambda: got.messages == [b"1", b"2"])
    client.sendall(b"4a")
    wait_until(lambda: got.messages == [b"1", b"2", b"34"])


def test_framing_is_changed_in_the_handler_only(make_pool, make_client):
    pool = make_pool(Collector(), framing=Delimited())
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    assert sock.framing == Delimited()
    with pytest.raises(TstError):
        sock.framing = Fixed(3)
    assert sock.framing == Delimited()


def test_each_listener_and_each_socket_may_have_its_own(make_pool, make_client):
    collector = Collector()
    pool = make_pool(collector, framing=Delimited(), listen=None)
    lines = pool.listen("127.0.0.1", 0)
    threes = pool.listen("127.0.0.1", 0, framing=Fixed(3))
    raw = pool.listen("127.0.0.1", 0, framing=None)
    for address, stream in ((lines, b"abc\nde"), (threes, b"abcde"), (raw, b"abcde")):
        client = make_client(address)
        before = len(collector.messages)
        client.sendall(stream)
        wait_until(lambda before=before: len(collector.messages) > before)
    assert collector.messages == [b"abc", b"abc", b"abcde"]
    ours = pool.connect(*threes, framing=Fixed(2))
    ours.send_message(b"xy")
    assert ours.framing == Fixed(2)
    assert pool.framing == Delimited()


def test_a_function_reads_within_its_message(make_pool, make_client):
    """Whatever it leaves unread is dropped; it is called once for each message."""
    got = []

    def function(sock):
        got.append((sock.recv_data.checked_len, sock.read(3), sock.read_into(bytearray(1)), sock.read()))

    client = make_client(make_pool(function, framing=Delimited()))
    client.sendall(b"abcdefg\n\nab\n")
    wait_until(lambda: len(got) == 3)
    assert [entry[1:] for entry in got] == [(b"abc", 1, b"efg"), (b"", 0, b""), (b"ab", 0, b"")]
    assert got[1][0] == 0
    assert got[2][0] == 2


def test_a_request_goes_before_the_framing(make_pool, make_client):
    """req_len > 0: the next bytes are a transfer; then the framing goes on."""
    got = []

    class Mixed(TstHandler):
        def on_message(self, sock, data):
            got.append(data)
            sock.recv_data.req_len = 5 if data == b"five" else 0

    client = make_client(make_pool(Mixed(), framing=Delimited()))
    client.sendall(b"one\nfive\na\nb\nctwo\n")
    wait_until(lambda: len(got) == 4)
    assert got == [b"one", b"five", b"a\nb\nc", b"two"]


def test_messages_that_have_no_frame_are_refused(make_pool, make_client):
    pool = make_pool(Collector(), framing=LengthPrefixed(1), listen=None)
    address = pool.listen("127.0.0.1", 0)
    pool.listen("127.0.0.1", 0, framing=Delimited())
    fixed = pool.listen("127.0.0.1", 0, framing=Fixed(3))
    client = make_client(address)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises(MessageTooLarge):
        sock.send_message(b"x" * 256)
    with pytest.raises(TypeError):
        sock.send_message("text")
    sock.send_message(bytearray(b"y" * 255))
    assert recv_exact(client, 256) == b"\xff" + b"y" * 255
    lines = pool.connect(*pool.addresses[1], framing=Delimited())
    with pytest.raises(ValueError, match="delimiter"):
        lines.send_message(b"two\nlines")
    threes = pool.connect(*fixed, framing=Fixed(3))
    with pytest.raises(ValueError, match="4 bytes"):
        threes.send_message(b"four")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Fixed(0), ValueError),
        (lambda: Fixed(-1), ValueError),
        (lambda: Fixed("3"), TypeError),
        (lambda: Fixed(10, max_message=9), ValueError),
        (lambda: Delimited(b""), ValueError),
        (lambda: Delimited(b"x" * 256), ValueError),
        (lambda: Delimited("\n"), TypeError),
        (lambda: Delimited(max_message=0), ValueError),
        (lambda: LengthPrefixed(5), ValueError),
        (lambda: LengthPrefixed(4, "middle"), ValueError),
        (lambda: LengthPrefixed(4, offset=-1), ValueError),
        (lambda: LengthPrefixed(4, offset=65536), ValueError),
        (lambda: LengthPrefixed(4, adjust=2**41), ValueError),
        (lambda: LengthPrefixed(4, max_message=2**41), ValueError),
        (lambda: type(Raw()).__mro__[1](), TypeError),
        (lambda: Raw().__init__(), TypeError),
    ],
)
def test_framings_that_make_no_sense_are_refused(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("framing", [*FRAMINGS, Raw(), Raw(max_message=5)], ids=repr)
def test_framings_are_values(framing):
    again = pickle.loads(pickle.dumps(framing))
    assert again == framing
    assert hash(again) == hash(framing)
    assert repr(again) == repr(framing)
    assert framing != Fixed(99)
    assert eval(repr(framing)) == framing


def test_raw_hands_out_no_more_than_its_limit(make_pool, make_client):
    collector = Collector()
    make_client(make_pool(collector, framing=Raw(max_message=4))).sendall(b"abcdefghij")
    wait_until(lambda: b"".join(collector.messages) == b"abcdefghij")
    assert max(map(len, collector.messages)) <= 4


def test_an_unfinished_message_is_dropped_when_the_peer_leaves(make_pool):
    collector = Collector()
    pool = make_pool(collector, framing=LengthPrefixed())
    with connect(pool) as client:
        client.sendall(b"\0\0\0\1a\0\0\0\5abc")
    wait_until(lambda: collector.reasons)
    assert collector.messages == [b"a"]
    assert collector.reasons == [None]


def test_a_deep_pipeline_is_answered_in_order(make_pool, make_client):
    """Many messages in one read: more than one turn's fair share."""
    client = make_client(make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(2)))
    stream = b"".join(struct.pack(">HI", 4, i) for i in range(5000))
    sender = threading.Thread(target=client.sendall, args=(stream,))
    sender.start()
    assert recv_exact(client, len(stream)) == stream
    sender.join(10)


def test_a_paused_socket_keeps_its_messages(make_pool, make_client):
    collector = Collector()
    pool = make_pool(collector, framing=Delimited())
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.pause()
    client.sendall(b"one\ntwo\n")
    deadline = time.monotonic() + patient(0.2)
    while time.monotonic() < deadline:
        assert collector.messages == []
        time.sleep(0.01)
    sock.resume()
    wait_until(lambda: len(collector.messages) == 2)
    with contextlib.suppress(TstError):
        sock.pause()


def test_messages_that_are_kept_stay_as_they_were(make_pool, make_client):
    """An object that nobody kept may come again with the next message in it; one that was kept, or hashed, may not."""
    kept, hashes = [], []

    def on_message(sock, data):
        number = int(data)
        if number % 3 == 0:
            kept.append(data)
        if number % 5 == 0:
            hashes.append((hash(data), {data: number}))
        return data if number % 7 else None

    client = make_client(make_pool(handler(on_message=on_message), framing=Fixed(6), workers=1))
    numbers = range(10_000)
    client.sendall(b"".join(b"%06d" % n for n in numbers))
    answered = [n for n in numbers if n % 7]
    assert recv_exact(client, 6 * len(answered)) == b"".join(b"%06d" % n for n in answered)
    assert kept == [b"%06d" % n for n in numbers if n % 3 == 0]
    for n, (hashed, entry) in zip((n for n in numbers if n % 5 == 0), hashes, strict=True):
        assert hashed == hash(b"%06d" % n)
        assert entry == {b"%06d" % n: n}
