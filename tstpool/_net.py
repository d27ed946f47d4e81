"""Addresses and sockets before they enter the pool: resolving, listening, connecting. Plain Python over `socket`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import operator
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any

UNIX_PREFIX = "unix:"
PORTS_TRIED = 32  # of those that the system chooses for a name, until one is free at all of its addresses
FOLDER_PATIENCE = 1.0  # seconds: somebody else may keep a folder locked, for reasons of their own
LOOK_AGAIN = 0.005  # seconds
SKIPPED_ERRORS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def named(error: OSError, action: str, host: str | None, port: int) -> OSError:
    """The same error, of the same class, with the address in its text."""
    where = host if host is not None and host.startswith(UNIX_PREFIX) else f"{host or '*'}:{port}"
    renamed = type(error)(error.errno, f"can't {action} {where}: {error.strerror or error}")
    return renamed


def check_address(host: str | None, port: int) -> None:
    """TypeError or ValueError for what can't be an address. getaddrinfo() alone would take a port of 65536 for 0."""
    if host is not None and not isinstance(host, str):
        raise TypeError(f"host must be a string or None, not {type(host).__name__}")
    path = host[len(UNIX_PREFIX) :] if host is not None and host.startswith(UNIX_PREFIX) else ""
    if "\0" in path and not path.startswith("\0"):  # an abstract address may hold any
        raise ValueError(f"a unix socket's path can't hold a null character: {host!r}")
    if not 0 <= operator.index(port) <= 65535:
        raise ValueError(f"port must be from 0 to 65535: {port}")


def listening_sockets(host: str | None, port: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on every address that `host` stands for; None, "" and "::" are all of this machine's.

    Raises OSError naming the address. An address that this machine does not have is passed over
    as long as another works.
    """
    check_address(host, port)
    try:
        if host is not None and host.startswith(UNIX_PREFIX):
            return [_listen_unix(host[len(UNIX_PREFIX) :], backlog)]
        if host in (None, "", "::"):
            return [_listen_all(port, backlog)]
        return _listen_named(host, port, backlog)
    except OSError as error:
        raise named(error, "listen on", host, port) from error
    except (UnicodeError, OverflowError) as error:  # a name that can't be encoded, a port beyond 65535
        raise named(OSError(errno.EINVAL, str(error)), "listen on", host, port) from error


def _listen_all(port: int, backlog: int) -> socket.socket:
    """One socket for IPv6 and IPv4; for IPv4 alone where the machine has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return _listen_on(socket.AF_INET6, ("::", port), backlog, dual_stack=True)
        except OSError as error:
            if error.errno not in SKIPPED_ERRORS:
                raise
    return _listen_on(socket.AF_INET, ("0.0.0.0", port), backlog)


def _listen_named(host: str | None, port: int, backlog: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for _ in range(PORTS_TRIED - 1 if port == 0 else 0):
        try:
            return _listen_found(found, port, backlog)
        except OSError as error:  # the port that the first address was given is somebody else's at another one
            if error.errno != errno.EADDRINUSE:
                raise
    return _listen_found(found, port, backlog)


def _listen_found(found: list[Any], port: int, backlog: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in {(entry[0], entry[4]): None for entry in found}:  # each once, in their order
        if port == 0 and sockets:  # all addresses of one name share the port that the first was given
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_listen_on(family, address, backlog))
        except OSError as error:
            failure = error
            if error.errno not in SKIPPED_ERRORS:
                break
    if failure is not None and (not sockets or failure.errno not in SKIPPED_ERRORS):
        for opened in sockets:
            opened.close()
        raise failure
    return sockets


def _listen_on(family: int, address: tuple[Any, ...], backlog: int, dual_stack: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual_stack else 1)
        keep_urgent(listener)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_unix(path: str, backlog: int) -> socket.socket:
    if not path or path.startswith("\0"):
        raise OSError(errno.EINVAL, "a unix socket must have a path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone_in(os.path.dirname(path) or "."):
            try:
                listener.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                    raise
                os.unlink(path)
                listener.bind(path)
            try:
                listener.listen(backlog)
            except BaseException:
                discard_listener(listener)
                raise
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """One server at a time: between bind() and listen() a live file looks abandoned, and who has found an abandoned one
    would remove what another has put in its place.

    Without that where the folder can't be opened, or somebody else keeps it locked.
    """
    number = -1
    try:
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            _lock_folder(number)
        yield
    finally:
        if number >= 0:
            with contextlib.suppress(OSError):  # a child that was forked meanwhile would keep the lock
                fcntl.flock(number, fcntl.LOCK_UN)
            os.close(number)


def _lock_folder(number: int) -> None:
    """Waits for at most FOLDER_PATIENCE."""
    until = time.monotonic() + FOLDER_PATIENCE
    while True:
        try:
            return fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(LOOK_AGAIN)


def _is_abandoned(path: str) -> bool:
    """A socket file on which nobody listens any more, left by a server that was killed."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def address_of(sock: socket.socket) -> tuple[str, int]:
    """(host, port), or ("unix:/path", 0)."""
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return UNIX_PREFIX + os.fsdecode(address), 0
    return scoped(address[0], address[3] if sock.family == socket.AF_INET6 else 0), address[1]


def scoped(host: str, scope: int) -> str:
    """An IPv6 address with the interface that it belongs to, if to one alone: "fe80::1%eth0"."""
    if not scope:
        return host
    try:
        return f"{host}%{socket.if_indextoname(scope)}"
    except OSError:
        return f"{host}%{scope}"


def keep_alive(sock: socket.socket, seconds: int) -> None:
    """Has the kernel ask a silent peer whether it is still there. What a listener accepts inherits it.

    The first question comes after so many seconds, and two more with a third of that between them; with no answer to
    any, the connection ends.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def keep_urgent(sock: socket.socket) -> None:
    """Has the kernel leave urgent bytes in the stream, in their place. What a listener accepts inherits it, so that
    those which come before the accept stay there, too: of several in a row the kernel else forgets all but one."""
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # the engine sets it once more, and nothing is worse than it was
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def connected_socket(host: str, port: int, timeout: float | None) -> socket.socket:
    """Connects, in the calling thread. Raises OSError naming the address."""
    if host is None:
        raise TypeError("host must be a string: None stands for no address to connect to")
    check_address(host, port)
    try:
        if host.startswith(UNIX_PREFIX):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                _connect_unix(client, host[len(UNIX_PREFIX) :], timeout)
            except BaseException:
                client.close()
                raise
            return client
        return _connect_named(host, port, timeout)
    except OSError as error:
        raise named(error, "connect to", host, port) from error
    except (UnicodeError, OverflowError) as error:
        raise named(OSError(errno.EINVAL, str(error)), "connect to", host, port) from error


def _connect_unix(client: socket.socket, path: str, timeout: float | None) -> None:
    """Where the server's backlog is full the kernel would wait for a blocking socket alone, and not on after a signal,
    which Python takes for success: it is asked again and again."""
    until = None if timeout is None else time.monotonic() + timeout
    client.setblocking(False)
    while True:
        try:
            return client.connect(path)
        except BlockingIOError:
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        time.sleep(LOOK_AGAIN)


def _connect_named(host: str, port: int, timeout: float | None) -> socket.socket:
    """As socket.create_connection(), but what keep_urgent() says holds for the first byte that comes."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        client: socket.socket | None = None
        try:
            client = socket.socket(family, kind, protocol)
            client.settimeout(timeout)
            keep_urgent(client)
            client.connect(address)
            return client
        except BaseException as error:
            if client is not None:
                client.close()
            if not isinstance(error, OSError):
                raise
            failure = failure or error
    raise failure or OSError(errno.ENOENT, "the name has no address")


def discard_listener(listener: socket.socket) -> None:
    """Closes a listener that nobody was told of, and removes its file. Nothing is left to do for one that was
    detached."""
    if listener.fileno() >= 0:
        address = address_of(listener)
        unlink_socket(address, file_of(address))
        listener.close()


def file_of(address: tuple[str, int]) -> tuple[int, int] | None:
    """Which file a unix listener's address names now; None when it names none."""
    host = address[0]
    if not host.startswith(UNIX_PREFIX) or host.startswith(UNIX_PREFIX + "\0"):
        return None  # an abstract unix address has no file
    with contextlib.suppress(OSError):
        found = os.stat(host[len(UNIX_PREFIX) :])
        return found.st_dev, found.st_ino
    return None


def rooted(address: tuple[str, int]) -> tuple[str, int]:
    """A unix listener's address that stands for the same file after a chdir(). Links in it stay, and so do dots."""
    host = address[0]
    path = host[len(UNIX_PREFIX) :]
    if not host.startswith(UNIX_PREFIX) or path.startswith(("/", "\0")):
        return address
    with contextlib.suppress(OSError):
        return UNIX_PREFIX + os.path.join(os.getcwd(), path), address[1]
    return address


def unlink_socket(address: tuple[str, int], file: tuple[int, int] | None) -> None:
    """Removes a unix listener's file (see file_of), if it is still there: somebody may have put another in its place.
    The listener is still open, or the other one could be taken for it."""
    if file is not None and file_of(address) == file:
        with contextlib.suppress(OSError):
            os.unlink(address[0][len(UNIX_PREFIX) :])


def text_address(family: int, raw: bytes) -> tuple[str, int] | str | None:
    """What follows the family field of a sockaddr_in or sockaddr_in6, as (host, port), or of a sockaddr_un, as
    "unix:path"; None for other families."""
    if family == socket.AF_INET:
        return socket.inet_ntop(family, raw[2:6]), int.from_bytes(raw[:2], "big")
    if family == socket.AF_INET6:
        host = scoped(socket.inet_ntop(family, raw[6:22]), int.from_bytes(raw[22:26], sys.byteorder))
        return host, int.from_bytes(raw[:2], "big")
    if family == socket.AF_UNIX:  # an abstract name begins with a zero byte, a path ends before one
        return UNIX_PREFIX + os.fsdecode(raw if raw.startswith(b"\0") else raw.partition(b"\0")[0])
    return None
