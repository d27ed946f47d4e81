"""S5, S19, S20: addsocket and connect; the main socket may be one that does not listen."""

import contextlib
import gc
import os
import resource
import socket
import threading
from pathlib import Path

import pytest
from contract_helpers import Gate, as_function, echo, every_trigger, exchange, handler, ignore, round_trip
from helpers import connect, open_fds, patient, recv_exact, scaled, wait_until

from tstpool import TstError, TstPool, TstSockType


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(patient(10))
    with ours, theirs:
        yield ours, theirs


def start_client_pool(make_pool, style, on_message):
    if style == "handler":
        return make_pool(handler(on_message=on_message), listen=None, workers=2)
    pool = make_pool(listen=None, start=False)
    pool.create(2, "127.0.0.1", 0, as_function(on_message))
    return pool


@pytest.mark.parametrize("style", ["create", "handler"])
def test_each_message_of_an_added_socket_goes_through_the_workers(make_pool, pair, style):
    """S5: a connected socket.socket changes hands; its object is detached."""
    pool = start_client_pool(make_pool, style, echo)
    ours, theirs = pair
    number = theirs.fileno()
    sock = pool.addsocket(theirs)
    assert theirs.fileno() == -1
    assert sock.sd == number
    assert sock.type is TstSockType.CLIENT
    assert not os.get_blocking(number)
    assert pool[number] is sock
    assert round_trip(ours, b"hello") == b"hello"


@every_trigger
def test_a_socketpair_carries_a_megabyte(make_pool, pair, trigger):
    """S5, S29: not TCP, but the same engine."""
    pool = make_pool(handler(on_message=echo), listen=None, trigger=trigger)
    ours, theirs = pair
    pool.addsocket(theirs)
    data = os.urandom(scaled(1 << 20))
    assert exchange(ours, data) == data


def test_a_bare_descriptor_may_be_added(make_pool, pair):
    """SPEC: an int is taken over as it is."""
    pool = make_pool(handler(on_message=echo), listen=None)
    ours, theirs = pair
    sock = pool.addsocket(theirs.detach(), type=TstSockType.USER1)
    assert sock.type is TstSockType.USER1
    assert round_trip(ours, b"hello") == b"hello"


def test_bytes_that_waited_before_it_was_added_are_delivered(make_pool, pair):
    """S5: also with a FIN behind them."""
    ended = threading.Event()
    got = []
    pool = make_pool(
        handler(on_message=lambda sock, data: got.append(data), on_disconnect=lambda sock, reason: ended.set()),
        listen=None,
    )
    ours, theirs = pair
    ours.sendall(b"early")
    ours.shutdown(socket.SHUT_WR)
    pool.addsocket(theirs)
    assert ended.wait(10)
    assert b"".join(got) == b"early"


def test_on_connect_is_called_for_an_added_socket(make_pool, pair):
    """S22: like for an accepted one, before its first message."""
    order = []
    pool = make_pool(
        handler(on_connect=lambda sock: order.append("connect"), on_message=lambda sock, data: order.append(data)),
        listen=None,
    )
    ours, theirs = pair
    ours.sendall(b"early")
    pool.addsocket(theirs)
    wait_until(lambda: len(order) == 2)
    assert order == ["connect", b"early"]


def test_on_connect_type_handler_and_user_data_of_an_added_socket(make_pool, pair):
    """S5, S20, S22, S38: user groups, a handler of its own, user_data that is there in on_connect."""
    connects, calls = [], []
    pool = make_pool(handler(on_message=lambda sock, data: calls.append("pool")), listen=None)
    ours, theirs = pair
    own = handler(on_connect=lambda sock: connects.append((sock.type, sock.user_data)), on_message=echo)
    sock = pool.addsocket(theirs, TstSockType.USER3, own, "mine")
    assert (sock.type, sock.handler, sock.user_data) == (TstSockType.USER3, own, "mine")
    assert round_trip(ours, b"hello") == b"hello"
    assert connects == [(TstSockType.USER3, "mine")]
    assert calls == []


def test_a_listening_socket_is_adopted_as_a_listener(make_pool, make_client):
    """S19: type=LISTEN; it never reaches the handler, and what it accepts is of type SUB."""
    seen = []

    def note(sock, data):
        seen.append(sock.type)
        sock.send(data)

    pool = make_pool(handler(on_message=note), listen=None)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    pool.addsocket(listener, type=TstSockType.LISTEN)
    assert round_trip(make_client(address), b"hello") == b"hello"
    assert seen == [TstSockType.SUB]
    assert pool.stats().listeners == 1
    assert [sock.type for sock in pool.sockets()] == [TstSockType.SUB]


def test_connect_joins_two_pools(make_pool):
    """S5: pool.connect has the pool do it; ten ping-pongs between two engines."""
    done, count = threading.Event(), []

    def bounce(sock, data):
        count.append(data)
        if len(count) == 10:
            done.set()
        else:
            sock.send(data)

    server = make_pool(handler(on_message=echo), workers=2)
    client = make_pool(handler(on_message=bounce), listen=None, workers=2)
    sock = client.connect(*server.addresses[0])
    assert sock.type is TstSockType.CLIENT
    assert sock.peer == server.addresses[0]
    sock.send(b"ball")
    assert done.wait(10)
    assert count == [b"ball"] * 10
    (other,) = server.sockets()
    assert (other.peer, other.local) == (sock.local, sock.peer)


def test_a_pool_connects_to_itself(make_pool):
    """S5, S20: one pool holds both ends, told apart by type."""
    got = threading.Event()

    def answer(sock, data):
        if sock.type is TstSockType.SUB:
            sock.send(data)
        elif data == b"hello":
            got.set()

    pool = make_pool(handler(on_message=answer), workers=1)
    pool.connect(*pool.addresses[0], type=TstSockType.CLIENT).send(b"hello")
    assert got.wait(10)


def test_a_connect_that_is_interrupted_leaves_nothing_behind(make_pool, monkeypatch):
    """Ctrl-C comes in the middle of it."""
    pool = make_pool(handler(on_message=echo))
    before = open_fds()

    def interrupt(sock):
        raise KeyboardInterrupt

    monkeypatch.setattr("tstpool._net.keep_urgent", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.connect(*pool.addresses[0])
    assert open_fds() == before


def test_connect_failures_name_the_address(make_pool):
    """Bad input: nobody listens there, or the name does not exist; no descriptor stays behind."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            pool.connect("127.0.0.1", port)
    with pytest.raises(OSError):
        pool.connect("no-such-host.invalid", 80)
    with pytest.raises(OSError):
        pool.connect("unix:/no/such/path", 0)
    with pytest.raises(TypeError, match="host"):
        pool.connect(None)
    assert len(pool) == 0


def test_connect_gives_up_after_its_timeout(make_pool):
    """SPEC: a backlog that is full never answers; TimeoutError is an OSError."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(TimeoutError):
            pool.connect(*listener.getsockname(), timeout=0.2)
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("wrong", ["text", None, 1.5, object()])
def test_addsocket_of_something_else_is_a_type_error(make_pool, wrong):
    """Bad input."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with pytest.raises(TypeError):
        pool.addsocket(wrong)


def test_addsocket_with_a_wrong_handler_leaves_the_socket_with_its_owner(make_pool, pair):
    """Bad input: a failed call takes nothing away."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    ours, theirs = pair
    with pytest.raises(TypeError):
        pool.addsocket(theirs, handler=42)
    theirs.sendall(b"still mine")
    assert recv_exact(ours, 10) == b"still mine"


def test_addsocket_of_a_closed_descriptor_is_an_oserror(make_pool):
    """Bad input: EBADF, not a connection that is never heard of."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    with pytest.raises(OSError):
        pool.addsocket(number)
    assert len(pool) == 0


def test_a_listener_that_does_not_listen_is_refused(make_pool):
    """Bad input: type=LISTEN of a socket on which nobody called listen()."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.socket() as deaf:
        with pytest.raises((OSError, ValueError)):
            pool.addsocket(deaf, type=TstSockType.LISTEN)
        assert deaf.fileno() >= 0
    assert pool.stats().listeners == 0


def test_a_descriptor_that_the_pool_has_already_is_refused(make_pool, make_client):
    """Bad input: the connection that has it goes on, and so does accepting (the number must not be freed)."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with pytest.raises((ValueError, TstError)):
        pool.addsocket(sock.fileno())
    assert round_trip(client, b"hello") == b"hello"


def test_the_other_side_sees_the_end_of_an_added_socket(make_pool, pair):
    """S5, S27: the pool owns the descriptor, closing it ends the conversation."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    ours, theirs = pair
    sock = pool.addsocket(theirs)
    assert pool.closesocket(sock) is True
    assert ours.recv(1) == b""
    wait_until(lambda: len(pool) == 0)


def test_addsocket_of_a_closed_socket_is_a_value_error(make_pool):
    """Bad input."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        pool.addsocket(closed)


def test_a_socket_that_is_not_connected_ends_at_once(make_pool):
    """Bad input: the kernel reports a hang-up; there is no peer to name. (It has a port, as one that was reset has:
    without one it would be refused.)"""
    ended = []
    pool = make_pool(handler(on_disconnect=lambda sock, reason: ended.append(sock)), listen=None)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    sock = pool.addsocket(bound)
    assert sock.peer is None
    wait_until(lambda: ended)
    assert ended == [sock]


def test_the_peer_of_an_added_socket_may_have_an_ipv6_address(make_pool):
    """S5, B62."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        client = socket.create_connection(server.getsockname()[:2])
        assert pool.addsocket(client).peer == server.getsockname()[:2]
        server.accept()[0].close()


def test_a_pool_that_is_stopping_takes_no_more_sockets(make_pool, pair):
    """S5: a TstError, and the socket stays with its owner."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=lambda sock, data: gate.wait()), listen=None, workers=1)
        others, busy = socket.socketpair()
        with others:
            pool.addsocket(busy)
            others.sendall(b"x")
            wait_until(lambda: gate.inside)
            assert pool.stop(0.05) is False
            ours, theirs = pair
            with pytest.raises(TstError, match="stopping"):
                pool.addsocket(theirs)
            theirs.sendall(b"still mine")
            assert recv_exact(ours, 10) == b"still mine"


# ------------------------------------------------------------------------------- a call that fails takes nothing


@contextlib.contextmanager
def untouched(sock):
    """Afterwards `sock` is open, its descriptor still names the same file, and blocks as before."""
    number = sock.fileno()
    before = os.fstat(number), os.get_blocking(number), os.get_inheritable(number)
    yield
    gc.collect()
    assert sock.fileno() == number
    assert (os.fstat(number), os.get_blocking(number), os.get_inheritable(number)) == before


by_number_or_object = pytest.mark.parametrize(
    "given", [socket.socket.fileno, lambda sock: sock], ids=["number", "object"]
)


@by_number_or_object
@pytest.mark.parametrize("make", [socket.socket, lambda: socket.socket(socket.AF_UNIX)], ids=["tcp", "unix"])
def test_what_does_not_listen_stays_its_owners(make_pool, make, given):
    """S5, S19: type=LISTEN of a socket that does not."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with make() as deaf, untouched(deaf), pytest.raises(ValueError, match="listen"):
        pool.addsocket(given(deaf), TstSockType.LISTEN)
    assert pool.stats().listeners == 0


@pytest.mark.parametrize("type", [TstSockType.LISTEN, TstSockType.CLIENT])
def test_what_is_no_socket_stays_its_owners(make_pool, type):
    """S5: a file's descriptor, or a pipe's."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with open(os.devnull) as file, untouched(file), pytest.raises(OSError):
        pool.addsocket(file.fileno(), type)


@by_number_or_object
@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"type": 99}, ValueError), ({"handler": 42}, TypeError), ({"framing": 42}, TypeError)],
    ids=["type", "handler", "framing"],
)
def test_wrong_arguments_leave_the_socket_with_its_owner(make_pool, pair, given, wrong, error):
    """Bad input: by number, too."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    _, theirs = pair
    with untouched(theirs), pytest.raises(error):
        pool.addsocket(given(theirs), **wrong)


@by_number_or_object
@pytest.mark.parametrize("listens", [False, True])
def test_a_pool_that_cannot_be_opened_leaves_the_socket_with_its_owner(pair, given, listens):
    """S5, B31: there is no descriptor left for its epoll: the socket is as it was, and can be added later."""
    pool = TstPool(handler(on_message=echo), workers=1)
    ours, theirs = pair
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock, type = (listener, TstSockType.LISTEN) if listens else (theirs, TstSockType.CLIENT)
        with no_more_descriptors(), untouched(sock), pytest.raises(OSError):
            pool.addsocket(given(sock), type)
        assert len(pool) == 0 and pool.stats().listeners == 0
        pool.addsocket(sock, type)
        try:
            pool.start()
            client = connect(pool.addresses[0]) if listens else ours
            with client:
                assert round_trip(client, b"later") == b"later"
        finally:
            assert pool.stop() is True


@by_number_or_object
def test_a_full_pool_takes_it_and_a_stopped_one_keeps_it_for_its_next_start(make_pool, pair, given):
    """S5, B33: max_connections is for clients that come by themselves."""
    pool = make_pool(handler(on_message=echo), listen=None, max_connections=1)
    others, first = socket.socketpair()
    ours, theirs = pair
    with others:
        pool.addsocket(first)
        pool.addsocket(given(theirs))
        assert round_trip(ours, b"second") == b"second"
        if theirs.fileno() >= 0:
            theirs.detach()
        assert pool.stop() is True
    ours, theirs = socket.socketpair()
    ours.settimeout(patient(10))
    with ours:
        pool.addsocket(given(theirs))
        if theirs.fileno() >= 0:
            theirs.detach()
        pool.start()
        assert round_trip(ours, b"third") == b"third"


def test_a_connect_that_fails_after_all_leaves_no_connection(make_pool):
    """S5: the server sees the end at once, not when some garbage is collected."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ValueError, match="does not listen"):
            pool.connect(*server.getsockname(), type=TstSockType.LISTEN)
        peer, _ = server.accept()
        with peer:
            peer.settimeout(patient(10))
            assert peer.recv(1) == b""


@pytest.mark.parametrize(
    "wrong", [{"type": 77}, {"framing": 42}, {"handler": 5}, {"handler": lambda: None}, {"timeout": "1"}], ids=str
)
def test_what_is_wrong_is_said_before_a_server_is_troubled(make_pool, wrong):
    """S5."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        with pytest.raises((TypeError, ValueError)):
            pool.connect(*server.getsockname(), **wrong)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_pool_that_is_stopping_leaves_a_number_with_its_owner(make_pool, pair):
    """S5: as above, by number, and for a listener."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=lambda sock, data: gate.wait()), listen=None, workers=1)
        others, busy = socket.socketpair()
        with others, socket.create_server(("127.0.0.1", 0)) as listener:
            pool.addsocket(busy)
            others.sendall(b"x")
            wait_until(lambda: gate.inside)
            assert pool.stop(0.05) is False
            _, theirs = pair
            for sock, type in ((theirs, TstSockType.CLIENT), (listener, TstSockType.LISTEN)):
                with untouched(sock), pytest.raises(TstError, match="stopping"):
                    pool.addsocket(sock.fileno(), type)


@contextlib.contextmanager
def no_more_descriptors():
    """The process can open no other file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_added_sockets_are_spread_over_the_shards(make_pool):
    """Each goes where the fewest are: every epoll instance watches as many of them as the others."""

    def watched():
        """How many of the added descriptors each epoll instance has."""
        found = []
        for fd, target in open_fds().items():
            if target == "anon_inode:[eventpoll]":
                text = Path(f"/proc/self/fdinfo/{fd}").read_text()
                found.append(sum(int(line.split()[1]) in added for line in text.splitlines() if line[:4] == "tfd:"))
        return [n for n in found if n]  # without those of somebody else

    pool = make_pool(handler(on_message=echo), listen=None, workers=3, shards=3)
    pairs = [socket.socketpair() for _ in range(6)]
    added = set()
    for ours, theirs in pairs:
        ours.settimeout(patient(10))
        added.add(theirs.fileno())
        pool.addsocket(theirs)
        assert round_trip(ours, b"hello") == b"hello"  # it has arrived where it belongs
    wait_until(lambda: watched() == [2, 2, 2], message=lambda: str(watched()))
    for ours, _ in pairs:
        ours.close()
