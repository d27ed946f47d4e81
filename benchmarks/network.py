"""A network of the benchmarks' own, with nothing in it but loopback.

What a machine has been set up with for the internet would be measured, too: firewall rules, other programs' traffic,
and, most of all, a congestion control that paces. With `bbr` the kernel sets timers between packets even on loopback:
they took a tenth of the CPU time of an echo of 1 MiB, whose rate went up by a third without them, and from run to run
differed less. So there is a namespace, with `cubic` in it, Linux's default, or with `reno` where only that may be
chosen; without loss both do the same.
"""

from __future__ import annotations

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
    outside = CONTROL.read_text().strip()
    if not _unshare():
        return f"{OUTSIDE} ({outside})"
    _up("lo")
    for name in DO_NOT_PACE:
        if CONTROL.read_text().strip() in DO_NOT_PACE:
            break
        try:
            CONTROL.write_text(name)
        except OSError:  # only this machine's administrator may choose that one
            continue
    control = CONTROL.read_text().strip()
    return f"a network namespace ({control}" + (f"; this machine's own has {outside})" if control != outside else ")")


def _unshare() -> bool:
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNET) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(line)
    return True


def _up(name: str) -> None:
    """A new namespace's loopback is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", name.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), flags | IFF_UP))
