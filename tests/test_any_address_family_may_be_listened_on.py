"""S2, S19, B62, bad input: IPv4, IPv6, dual-stack, unix sockets, ports, and addresses that are no good."""

import contextlib
import os
import socket
import subprocess

import pytest
from contract_helpers import (
    ServerProcess,
    as_function,
    echo,
    every_trigger,
    free_port,
    handler,
    ignore,
    round_trip,
)
from helpers import connect, open_fds, run_python, wait_until
from network_helpers import configure, in_a_network_of_its_own

from tstpool import TstPool, TstSockType, _net


@pytest.fixture
def pool(make_pool):
    return make_pool(handler(on_message=echo), listen=None, workers=2)


@pytest.fixture
def path(tmp_path):
    return f"unix:{tmp_path}/socket"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_ipv4(pool, make_client, host):
    """B62: by number, by name, all."""
    _host, port = pool.listen(host, 0)
    assert round_trip(make_client(("127.0.0.1", port)), b"hello") == b"hello"


def test_ipv6(pool, make_client):
    """B62: two-part addresses, also for peers."""
    host, port = pool.listen("::1", 0)
    assert host == "::1"
    client = make_client(("::1", port))
    assert round_trip(client, b"hello") == b"hello"
    (sock,) = pool.sockets()
    assert sock.local == ("::1", port)
    assert sock.peer == client.getsockname()[:2]
    with pytest.raises(ConnectionRefusedError):
        make_client(("127.0.0.1", port))


@pytest.mark.parametrize("host", [None, "::"])
def test_dual_stack(pool, make_client, host):
    """Issue 2, B62: None and "::" take IPv4 and IPv6 on one port."""
    port = pool.listen(host, 0)[1]
    for address in ("127.0.0.1", "::1"):
        assert round_trip(make_client((address, port)), b"hello") == b"hello"
    assert len(pool.addresses) == pool.stats().listeners


def test_create_on_all_addresses_is_dual_stack(make_pool, make_client):
    """S2, B62: bind_ip None."""
    pool, port = make_pool(listen=None, start=False), free_port()
    pool.create(2, None, port, as_function(echo))
    for address in ("127.0.0.1", "::1"):
        assert round_trip(make_client((address, port)), b"hello") == b"hello"


@pytest.mark.parametrize("arguments", [(), (0,)])
@every_trigger
def test_unix_sockets(make_pool, make_client, path, arguments, trigger):
    """B62: the address is (path, 0); many clients, many messages."""
    pool = make_pool(handler(on_message=echo), listen=None, trigger=trigger)
    assert pool.listen(path, *arguments) == (path, 0)
    assert pool.addresses == [(path, 0)]
    for _ in range(5):
        client = make_client(path)
        for i in range(20):
            assert round_trip(client, b"%d" % i) == b"%d" % i
    sock = pool.sockets()[0]
    assert sock.local == path
    assert sock.peer is None or sock.peer.startswith("unix:")


def test_two_pools_talk_over_a_unix_socket(make_pool, path):
    """S5, B62: pool.connect("unix:...")."""
    got = []
    server = make_pool(handler(on_message=echo), listen=(path, 0))
    client = make_pool(handler(on_message=lambda sock, data: got.append((sock.peer, data))), listen=None)
    client.connect(path, 0).send(b"hello")
    wait_until(lambda: got)
    assert got == [(path, b"hello")]
    assert len(server) == 1


def test_tcp_and_unix_listeners_in_one_pool(pool, make_client, path):
    """S19: several listeners of any kind."""
    pool.listen("127.0.0.1", 0)
    pool.listen("::1", 0)
    pool.listen(path)
    assert len(pool.addresses) == 3
    for address in pool.addresses:
        assert round_trip(make_client(address), b"hello") == b"hello"


def test_addresses_of_both_ends(pool, make_client):
    """DESIGN 4: sock.peer, sock.local."""
    address = pool.listen("127.0.0.1", 0)
    client = make_client(address)
    (sock,) = wait_until(pool.sockets)
    assert sock.peer == client.getsockname()
    assert sock.local == address


def test_an_interface_that_is_gone_is_named_by_its_number():
    """It may be removed while its connections go on."""
    (number, name), *_ = socket.if_nameindex()
    assert [_net.scoped("fe80::1", scope) for scope in (0, number)] == ["fe80::1", f"fe80::1%{name}"]
    assert _net.scoped("fe80::1", 2**31 - 1) == f"fe80::1%{2**31 - 1}"


def is_reachable(host):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(socket.getaddrinfo(host, 9, socket.AF_INET6, socket.SOCK_DGRAM)[0][4]) == 0


@pytest.mark.parametrize("interface", ["lo", "v0"])
def test_an_address_of_one_interface(make_pool, interface):
    """B62: "fe80::1%lo", and the same on one end of a pair of devices: listen, connect, and the names of both ends,
    which can be connected to as they are; on another interface, or on none, it is an error that names the address."""

    def talk():
        try:
            configure("ip link add v0 type veth peer name v1")
            for device in ("v0", "v1"):
                configure(f"ip link set {device} up")
            configure(f"ip -6 addr add fe80::1:1/64 dev {interface} nodad")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no such devices: {error.stderr}")
        wait_until(lambda: is_reachable(f"fe80::1:1%{interface}"))  # the kernel makes the route a little later
        pool = make_pool(handler(on_message=echo), listen=None)
        host, port = pool.listen(f"fe80::1:1%{interface}", 0)
        assert host == f"fe80::1:1%{interface}"
        assert pool.addresses == [(host, port)]
        with connect((host, port)) as client:
            assert round_trip(client, b"hello") == b"hello"
            (sock,) = pool.sockets()
            assert (sock.local, sock.peer) == ((host, port), (host, client.getsockname()[1]))
        other = make_pool(handler(on_message=ignore), listen=None)
        assert other.connect(host, port).peer == (host, port)
        for wrong in ("fe80::1:1%v1", "fe80::1:1", "fe80::1:1%nothing"):
            with pytest.raises(OSError, match=wrong.replace("%", ".")):
                pool.listen(wrong, 0)
        pool.stop()
        other.stop()

    in_a_network_of_its_own(talk)


def shared_listener(address):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(address)
    listener.listen(100)
    return listener


@every_trigger
def test_two_pools_share_a_port(make_pool, trigger):
    """B62: SO_REUSEPORT is the user's to set, on listeners that addsocket() adopts: the kernel shares the clients out,
    and when one pool has stopped, all come to the other."""
    pools = [make_pool(handler(on_message=echo), listen=None, trigger=trigger) for _ in range(2)]
    listeners = [shared_listener(("127.0.0.1", 0))]
    address = listeners[0].getsockname()
    listeners.append(shared_listener(address))
    for pool, listener in zip(pools, listeners, strict=True):
        pool.addsocket(listener, TstSockType.LISTEN)
        assert pool.addresses == [address]

    def visit(number):
        for _ in range(number):
            with connect(address) as client:
                assert round_trip(client, b"hello") == b"hello"

    visit(100)
    accepted = [pool.stats().accepted for pool in pools]
    assert sum(accepted) == 100
    assert min(accepted) > 10
    pools[0].stop()
    visit(20)
    assert pools[1].stats().accepted == accepted[1] + 20


SHARING = """
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("127.0.0.1", int(os.environ["PORT"])))
listener.listen(100)
pool = TstPool(Echo(), workers=2)
print(listener.getsockname()[1])
pool.addsocket(listener, TstSockType.LISTEN)
pool.start()
sys.stdin.read()
print(pool.stats().accepted)
pool.stop()
"""


def test_two_processes_share_a_port():
    """B62: as above."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(ServerProcess(SHARING, env={"PORT": "0"}))
        second = stack.enter_context(ServerProcess(SHARING, env={"PORT": str(first.addr[1])}))
        assert second.addr == first.addr
        for _ in range(100):
            with connect(first.addr) as client:
                assert round_trip(client, b"hello") == b"hello"
        accepted = [int(server.finish()) for server in (first, second)]
    assert sum(accepted) == 100
    assert min(accepted) > 10


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("no-such-host.invalid", 0, "no-such-host.invalid"),
        ("192.0.2.1", 0, "192.0.2.1"),
        ("unix:/no/such/directory/socket", 0, "/no/such/directory"),
        ("unix:/" + "x" * 200, 0, "x"),
    ],
)
def test_an_address_that_is_no_good_is_an_oserror_that_names_it(pool, host, port, text):
    """Bad input, B44: and no descriptor stays behind; the pool can listen elsewhere."""
    before = open_fds()
    with pytest.raises(OSError, match=text):
        pool.listen(host, port)
    assert open_fds() == before
    assert pool.addresses == []
    pool.listen("127.0.0.1", 0)


def test_a_port_in_use_is_an_oserror_that_names_it(make_pool):
    """Bad input, B44: the first pool goes on."""
    first = make_pool(handler(on_message=echo))
    host, port = first.addresses[0]
    pool = TstPool(handler(on_message=echo))
    before = open_fds()
    with pytest.raises(OSError, match=f"{host}.*{port}"):
        pool.listen(host, port)
    assert open_fds() == before
    with socket.create_connection((host, port), 10) as client:
        assert round_trip(client, b"hello") == b"hello"


@pytest.mark.parametrize("host", [None, "::"])
def test_a_port_that_is_taken_for_ipv6_alone_is_an_oserror(pool, host):
    """Bad input, B62: half of the addresses are not all of them. IPv4 alone is for machines without IPv6."""
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("::", 0))
        taken.listen()
        with pytest.raises(OSError, match=str(taken.getsockname()[1])):
            pool.listen(host, taken.getsockname()[1])


def test_a_unix_path_in_use_is_an_oserror(make_pool, path):
    """Bad input: a path where another server listens is not taken from it."""
    make_pool(handler(on_message=echo), listen=(path, 0))
    with pytest.raises(OSError, match="socket"):
        TstPool(handler(on_message=echo)).listen(path)
    assert os.path.exists(path.removeprefix("unix:"))


UNNAMED = """
import os, sys, tstpool
pool = tstpool.TstPool(lambda sock: None, workers=2)
try:
    pool.listen("unix:" + %r)
except (OSError, ValueError) as error:
    print("refused")
else:
    pool.start()
    print("stopped", pool.stop(1), pool.running)
sys.stdout.flush()
os._exit(0)  # a pool that never ends would hold the interpreter
"""


@pytest.mark.parametrize("name", ["", "\0name"])
def test_a_unix_socket_without_a_file_is_refused_or_stops_like_any_other(name):
    """Bad input: "unix:" alone makes Linux choose a name that begins with a zero byte."""
    assert run_python("-c", UNNAMED % name).stdout in ("refused\n", "stopped True False\n")


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_a_port_that_cannot_be_is_refused(pool, port):
    """Bad input."""
    with pytest.raises((ValueError, OverflowError, OSError)):
        pool.listen("127.0.0.1", port)


@pytest.mark.parametrize("arguments", [("127.0.0.1", "http-but-not-really"), (5, 0), (b"127.0.0.1", 0.5)])
def test_addresses_of_the_wrong_type_are_refused(pool, arguments):
    """Bad input."""
    with pytest.raises((TypeError, ValueError, OSError)):
        pool.listen(*arguments)
    assert pool.addresses == []


def test_a_port_may_be_used_again_at_once(make_client):
    """B43: SO_REUSEADDR: connections in TIME_WAIT don't block the next start."""
    port = free_port()
    for _ in range(3):
        pool = TstPool(handler(on_message=echo))
        pool.listen("127.0.0.1", port)
        with pool:
            client = make_client(("127.0.0.1", port))
            round_trip(client, b"x")  # the pool closes first: TIME_WAIT is on its side


def test_a_unix_socket_that_a_dead_server_left_is_used_again(pool, make_client, path):
    """B62: nobody listens there any more."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path.removeprefix("unix:"))
    pool.listen(path)
    assert round_trip(make_client(path), b"hello") == b"hello"


def test_a_file_that_is_no_socket_is_left_alone(pool, path):
    """Bad input: listening there is an OSError, and the file is as it was."""
    name = path.removeprefix("unix:")
    with open(name, "w") as file:
        file.write("somebody's")
    with pytest.raises(OSError, match="socket"):
        pool.listen(path)
    with open(name) as file:
        assert file.read() == "somebody's"


def test_without_ipv6_all_addresses_are_those_of_ipv4(pool, make_client, monkeypatch):
    """B62."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    host, port = pool.listen(None, 0)
    assert host == "0.0.0.0"
    assert round_trip(make_client(("127.0.0.1", port)), b"hello") == b"hello"


def addresses(*hosts):
    """What getaddrinfo() would find for a name with these addresses."""
    return lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]


def test_all_addresses_of_a_name_get_one_port(pool, make_client, monkeypatch):
    """B62: the one that the first was given."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "127.0.0.2"))
        port = pool.listen("two.example", 0)[1]
    assert [port for _, port in pool.addresses] == [port, port]
    for host in ("127.0.0.1", "127.0.0.2"):
        assert round_trip(make_client((host, port)), b"hello") == b"hello"


def others_take_the_port(monkeypatch, host, most):
    """The first `most` times that somebody would listen on `host`, another socket has just taken that port."""
    taken, listen_on = [], _net._listen_on

    def too_late(family, address, backlog, **options):
        if address[0] == host and len(taken) < most:
            taken.append(socket.create_server(address))
        return listen_on(family, address, backlog, **options)

    monkeypatch.setattr(_net, "_listen_on", too_late)
    return taken


def test_a_port_that_is_free_at_one_address_of_a_name_only_is_not_chosen(pool, make_client, monkeypatch):
    """B44, B62: the system knows of the first address alone when it chooses."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "127.0.0.2"))
        taken = others_take_the_port(patch, "127.0.0.2", 3)
        port = pool.listen("two.example", 0)[1]
    assert port not in [each.getsockname()[1] for each in taken]
    assert pool.addresses == [("127.0.0.1", port), ("127.0.0.2", port)]
    for host in ("127.0.0.1", "127.0.0.2"):
        assert round_trip(make_client((host, port)), b"hello") == b"hello"
    for each in taken:
        each.close()


def test_where_no_port_is_free_at_all_addresses_of_a_name_it_is_an_oserror(pool, monkeypatch):
    """B44: after some tries; no descriptor stays behind."""
    before = open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "127.0.0.2"))
        taken = others_take_the_port(patch, "127.0.0.2", 1000)
        with pytest.raises(OSError, match=r"two\.example:0: Address already"):
            pool.listen("two.example", 0)
    assert 1 < len(taken) < 1000
    for each in taken:
        each.close()
    assert open_fds() == before
    assert pool.addresses == []


def test_a_name_of_which_one_address_is_taken_is_refused_whole(pool, monkeypatch):
    """B62: nobody listens on the first of them afterwards."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "127.0.0.2"))
            with pytest.raises(OSError, match=f"two.example:{port}"):
                pool.listen("two.example", port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 10)


@pytest.mark.parametrize("act", ["listen", "connect"])
def test_a_name_that_no_resolver_could_be_asked_is_an_oserror(pool, act):
    """Bad input: a label of 100 letters."""
    with pytest.raises(OSError, match="aaa"):
        getattr(pool, act)("a" * 100 + ".example", 80)
