"""B31: sock.local and sock.peer ask the kernel about the connection's own descriptor."""

import contextlib
import os
import resource
import secrets
import socket

import pytest
from contract_helpers import handler, ignore
from helpers import connect, wait_until


@contextlib.contextmanager
def no_descriptor_left():
    """This process can't open any more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match="open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(params=["127.0.0.1", "::1", "unix"])
def server(request, tmp_path):
    """A listening socket, and its address as a pool shows it."""
    if request.param == "unix":
        path = str(tmp_path / "server")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            yield listener, f"unix:{path}"
    else:
        family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
        with socket.create_server((request.param, 0), family=family) as listener:
            yield listener, listener.getsockname()[:2]


def test_of_a_connection_that_is_there(make_pool, make_client):
    """B31: `local` is that of before."""
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    with no_descriptor_left():
        assert (sock.local, sock.peer) == (client.getpeername(), client.getsockname())


def test_of_one_that_is_added_then(make_pool, server):
    """B31, S5: `peer` would be unknown for ever, for it is asked for once."""
    listener, address = server
    pool = make_pool(handler(on_message=ignore))
    client = socket.socket(listener.family)
    client.connect(listener.getsockname())
    local = client.getsockname()[:2] if listener.family != socket.AF_UNIX else "unix:"
    with no_descriptor_left():
        sock = pool.addsocket(client)
        assert (sock.peer, sock.local) == (address, local)
    sock.close()
    wait_until(lambda: len(pool) == 0)
    assert (sock.peer, sock.local) == (address, None)


@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_a_unix_client_that_has_a_name(make_pool, tmp_path, abstract):
    """B62: it is `peer` from the beginning, and after the end, on both sides."""
    name = f"\0tstpool-{secrets.token_hex(8)}" if abstract else str(tmp_path / ("client" + "-" * 80))[:107]
    seen = []
    hooks = {
        "on_connect": lambda sock: seen.append(sock.peer),
        "on_disconnect": lambda sock, reason: seen.append(sock.peer),
    }
    pool = make_pool(handler(**hooks), listen=(f"unix:{tmp_path}/server", 0))
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(name)
        client.connect(f"{tmp_path}/server")
        (sock,) = wait_until(pool.sockets)
        assert sock.local == f"unix:{tmp_path}/server"
    wait_until(lambda: len(seen) == 2)
    assert seen == [f"unix:{name}"] * 2
    assert (sock.peer, sock.local) == (f"unix:{name}", None)


def test_a_unix_client_that_has_none(make_pool, tmp_path):
    """B62: as nearly all: None."""
    pool = make_pool(handler(on_message=ignore), listen=(f"unix:{tmp_path}/server", 0))
    with connect(pool) as client:
        (sock,) = wait_until(pool.sockets)
        assert sock.peer is None
        client.sendall(b"x")
    ours, theirs = socket.socketpair()
    with ours:
        assert pool.addsocket(theirs).peer is None
