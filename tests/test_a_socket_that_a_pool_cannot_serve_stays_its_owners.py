"""S5, S19, bad input: addsocket() refuses what it could only spoil, and what it refuses is as it was."""

import contextlib
import os
import select
import socket
import ssl
import threading

import pytest
from contract_helpers import handler, ignore
from helpers import connect, patient, recv_exact, reset, wait_until

from tstpool import TstPool, TstSockType


def condition(sock):
    """What adding a socket would change."""
    fd = sock.fileno()
    return fd, sock.gettimeout(), os.get_blocking(fd), os.get_inheritable(fd)


def refused(pool, error, text, sock, *arguments, **named):
    """Whether addsocket() raises this, and does nothing else."""
    sock.set_inheritable(True)
    before = condition(sock)
    with pytest.raises(error, match=text):
        pool.addsocket(sock, *arguments, **named)
    return condition(sock) == before and pool.sockets() == [] and pool.addresses == []


def tls(protocol):
    """Of the version that needs no certificate."""
    context = ssl.SSLContext(protocol)
    if protocol is ssl.PROTOCOL_TLS_CLIENT:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(patient(10))
        yield listener


def accepts(listener):
    """Whether it still does."""
    with connect(listener.getsockname()) as client:
        accepted, address = listener.accept()
        accepted.close()
        return address == client.getsockname()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_one_that_nobody_has_connected_is_refused(make_pool, family):
    """S5."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with socket.socket(family) as sock:
        assert refused(pool, OSError, "not connected", sock)


def test_one_that_was_reset_meanwhile_is_taken_and_told_of(make_pool):
    """B22: it was connected."""
    reasons = []
    pool = make_pool(handler(on_message=ignore, on_disconnect=lambda sock, reason: reasons.append(reason)), listen=None)
    with listening() as listener:
        client = connect(listener.getsockname())
        accepted, _ = listener.accept()
    reset(accepted)
    with select.epoll() as poll:
        poll.register(client)
        wait_until(lambda: any(events & select.EPOLLHUP for _, events in poll.poll(0)))
    pool.addsocket(client)
    (reason,) = wait_until(lambda: reasons)
    assert isinstance(reason, ConnectionResetError)


def test_an_ssl_socket_is_refused_and_goes_on(make_pool):
    """S5: its bytes would have gone out unencrypted, beneath TLS."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    server, client = socket.socketpair()
    server = tls(ssl.PROTOCOL_TLS_SERVER).wrap_socket(server, server_side=True, do_handshake_on_connect=False)
    client = tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(client, do_handshake_on_connect=False)
    with server, client:
        for end in (server, client):
            end.settimeout(patient(10))
            assert refused(pool, TypeError, "TLS", end)
        greeting = threading.Thread(target=server.do_handshake)
        greeting.start()
        try:
            client.do_handshake()
        finally:
            greeting.join()
        assert refused(pool, TypeError, "TLS", server)
        client.sendall(b"hello")
        assert recv_exact(server, 5) == b"hello"


def test_a_listening_ssl_socket_is_refused_and_goes_on(make_pool):
    """S19: its clients would not have been asked for TLS."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    context = tls(ssl.PROTOCOL_TLS_SERVER)
    with listening() as listener:
        listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
        with listener:
            assert refused(pool, TypeError, "TLS", listener, TstSockType.LISTEN)
            assert accepts(listener)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=lambda kind: kind.name)
def test_a_socket_of_messages_is_refused_and_goes_on(make_pool, kind):
    """S5: a pool serves streams: an empty datagram would have been the end of one."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        theirs.settimeout(patient(10))
        assert refused(pool, ValueError, "stream", theirs)
        with pytest.raises(ValueError, match="stream"):
            pool.addsocket(theirs.fileno())
        ours.send(b"hello")
        assert theirs.recv(100) == b"hello"


@pytest.mark.parametrize("kind", [TstSockType.CLIENT, TstSockType.SUB, TstSockType.USER1], ids=lambda kind: kind.name)
def test_a_listening_socket_is_added_as_a_listener_alone(make_pool, kind):
    """S19: else it would be a connection that ends at once, and its clients would be reset."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with listening() as listener:
        assert refused(pool, ValueError, "listens", listener, kind)
        assert accepts(listener)


@pytest.mark.parametrize("named", [{"handler": handler()}, {"user_data": 0}], ids=["handler", "user_data"])
def test_a_listener_has_no_handler_and_no_user_data(named):
    """S19: handlers never see it; who gives one is told so."""
    pool = TstPool(handler(on_message=ignore))
    with listening() as listener:
        assert refused(pool, ValueError, "user_data", listener, TstSockType.LISTEN, **named)
        assert accepts(listener)


class Kept(socket.socket):
    """Its owner does not let it go."""

    def detach(self):
        raise PermissionError("it is mine")


def test_a_listener_that_cannot_be_detached_is_as_it_was():
    """S19: that is the last step of all."""
    pool = TstPool(handler(on_message=ignore))
    with Kept() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        before = condition(listener)
        with pytest.raises(PermissionError):
            pool.addsocket(listener, TstSockType.LISTEN)
        assert condition(listener) == before
        assert pool.addresses == []
