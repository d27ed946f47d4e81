"""A network of the benchmarks' own, with nothing in it but loopback.

What a machine has been set up with for the internet would be measured, too: firewall rules, other programs' traffic,
and, most of all, a congestion control that paces. With `bbr` the kernel sets timers between packets even on loopback:
they took a tenth of the CPU time of an echo of 1 MiB, whose rate went up by a third without them, and from run to run
differed less. So there is a namespace, with `cubic` in it, Linux's default, or with `reno` where only that may be
chosen; without loss both do the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
DO_NOT_PACE = ("cubic", "reno")
OUTSIDE = "this machine's own network"


def enter() -> str:
    """Moves the process, and those that it starts from now on, into a network of their own, if they may have one.
    Returns what to say of the network that they have. Before the process has threads."""
    if not CONTROL.exists():
        return OUTSIDE
    outside = _control()
    if not _may_leave():
        return f"{OUTSIDE} ({outside})"
    _leave()
    for name in DO_NOT_PACE:
        if _control() in DO_NOT_PACE:
            break
        with contextlib.suppress(OSError):  # only this machine's administrator may choose that one
            CONTROL.write_text(name)
    inside = _control()
    return f"a network namespace ({inside}" + (f"; this machine's own has {outside})" if inside != outside else ")")


def _control() -> str:
    return CONTROL.read_text().strip()


def _may_leave() -> bool:
    """Tried in a child: some machines let anybody begin it, and nobody end it."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(OSError):
            _leave()
            code = 0
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _leave() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{name}").write_text(line)
    _up("lo")


def _up(name: str) -> None:
    """A new namespace's loopback is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", name.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), flags | IFF_UP))
