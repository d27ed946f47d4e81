"""S2, S4, S34: the original's entry style."""

import os
import socket
import threading

import pytest
from contract_helpers import as_function, echo, free_port, round_trip
from helpers import connect, patient, wait_until

from tstpool import TstError, TstPool


def workers_of(name):
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(name + "-"))


@pytest.fixture
def pool(make_pool):
    return make_pool(listen=None, start=False, name="created")


@pytest.mark.parametrize("bind_ip", ["127.0.0.1", None, "", "0.0.0.0"])
def test_create_listens_and_starts_the_threads(pool, make_client, bind_ip):
    """S2: the arguments in the original's order; None and "" are all addresses."""
    port = free_port()
    assert pool.create(3, bind_ip, port, as_function(echo)) is True
    assert workers_of("created") == ["created-0", "created-1", "created-2"]
    assert (pool.workers, pool.running) == (3, True)
    assert [address[1] for address in pool.addresses] == [port]
    assert round_trip(make_client(("127.0.0.1", port)), b"hello") == b"hello"


def test_buffer_sizes_default_to_4096_and_are_as_asked(pool, make_pool, make_client):
    """S2, S21: s_len reads what create was told."""
    seen = []

    def func(sock):
        seen.append((sock.recv_data.s_len, sock.send_data.s_len))
        sock.send(sock.read())

    port = free_port()
    pool.create(1, "127.0.0.1", port, func)
    round_trip(make_client(("127.0.0.1", port)), b"x")
    other, port = make_pool(listen=None, start=False), free_port()
    other.create(1, "127.0.0.1", port, func, 100, 200)
    round_trip(make_client(("127.0.0.1", port)), b"x")
    assert seen == [(4096, 4096), (100, 200)]


def test_destroy_ends_threads_connections_and_the_listener(pool, make_client):
    """S34: everything is freed; a client sees the end of its connection, a new one is refused."""
    port = free_port()
    pool.create(2, "127.0.0.1", port, as_function(echo))
    client = make_client(("127.0.0.1", port))
    round_trip(client, b"hello")
    assert pool.destroy(5.0) is True
    assert client.recv(1) == b""
    assert workers_of("created") == []
    assert (len(pool), pool.running) == (0, False)
    with pytest.raises(ConnectionRefusedError):
        connect(("127.0.0.1", port))


def test_a_port_in_use_is_an_oserror_with_the_address_and_leaves_no_thread(pool, make_client):
    """S2: the failure says where; afterwards the same pool can be created elsewhere."""
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1.*{port}"):
            pool.create(4, "127.0.0.1", port, as_function(echo))
    assert threading.active_count() == before
    assert not pool.running
    port = free_port()
    pool.create(4, "127.0.0.1", port, as_function(echo))
    assert round_trip(make_client(("127.0.0.1", port)), b"hello") == b"hello"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, "127.0.0.1", 0, print), ValueError),
        ((-1, "127.0.0.1", 0, print), ValueError),
        ((1, "127.0.0.1", 0, print, 0), ValueError),
        ((1, "127.0.0.1", 0, print, 4096, -1), ValueError),
        ((1, "127.0.0.1", 0, "not callable"), TypeError),
        ((1, "127.0.0.1", 0, None), TypeError),
        ((1, "no-such-host.invalid", 80, print), OSError),
    ],
)
def test_bad_arguments_are_refused_and_leave_no_thread(arguments, error):
    """S2, bad input: nothing was started."""
    pool, before = TstPool(), threading.active_count()
    with pytest.raises(error):
        pool.create(*arguments)
    assert threading.active_count() == before
    assert not pool.running
    assert pool.addresses == []


def test_port_zero_means_no_listener(pool):
    """S5: client mode has workers, but listens nowhere."""
    assert pool.create(2, "127.0.0.1", 0, as_function(echo)) is True
    assert pool.running
    assert pool.addresses == []
    assert pool.stats().listeners == 0


def test_fewer_workers_than_shards_serve_every_connection(make_pool, make_client):
    """S2: thread_count of create() comes after shards= of TstPool(): no shard may be left without a worker."""
    pool, port = make_pool(listen=None, start=False, shards=4, workers=8), free_port()
    pool.create(1, "127.0.0.1", port, as_function(echo))
    clients = [make_client(("127.0.0.1", port), timeout=1) for _ in range(8)]
    assert [round_trip(client, b"hello") for client in clients] == [b"hello"] * 8


def test_create_on_a_pool_that_runs_is_an_error_and_changes_nothing(pool, make_client):
    """S2."""
    port = free_port()
    pool.create(2, "127.0.0.1", port, as_function(echo))
    with pytest.raises(TstError, match="running"):
        pool.create(3, "127.0.0.1", 0, print)
    assert pool.workers == 2
    assert round_trip(make_client(("127.0.0.1", port)), b"hello") == b"hello"


def test_create_without_threads_leaves_no_listener(pool, monkeypatch):
    """S2, B44: the listener was there already when the threads could not be had."""
    port = free_port()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            pool.create(2, "127.0.0.1", port, as_function(echo))
    assert pool.addresses == []
    with pytest.raises(ConnectionRefusedError):
        connect(("127.0.0.1", port))
    assert pool.create(2, "127.0.0.1", port, as_function(echo)) is True


def test_a_pool_is_true_however_few_connections_it_has_and_is_initialised_once(pool):
    """len() of it is 0, and yet `if pool:` asks whether there is one."""
    assert bool(pool) is True
    assert len(pool) == 0
    assert repr(pool) == "<TstPool created stopped []>"
    with pytest.raises(TstError, match="once"):
        pool.__init__()


def test_a_socket_of_another_pool_is_not_found(make_pool):
    """Bad input: although a connection of this pool has the same descriptor and the same id by now."""
    one, two = (make_pool(as_function(echo), listen=None) for _ in range(2))
    first, given = socket.socketpair()
    with first:
        stranger = one.addsocket(given)
        number = stranger.sd
        stranger.close(abort=True)
        wait_until(lambda: not len(one))
    second, given = socket.socketpair()
    with second, given:
        second.settimeout(patient(10))
        if given.fileno() != number:
            os.dup2(given.fileno(), number)
            given.close()
        sock = two.addsocket(number if given.fileno() < 0 else given)
        assert sock.id == stranger.id
        assert two.closesocket(stranger) is False
        assert two.need_send(stranger) is False
        assert round_trip(second, b"hello") == b"hello"
