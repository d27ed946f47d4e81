"""Networks that a test makes for itself, to break them: nothing outside notices."""

import ctypes
import os
import re
import shutil
import subprocess
import threading

import pytest
from helpers import patient


def in_a_network_of_its_own(function):
    """Runs function() on a thread that has a network of its own, with nothing but `lo`; skips where that may not be."""
    outcome = []

    def run():
        try:
            if shutil.which("ip") is None or shutil.which("tc") is None:
                pytest.skip("needs ip and tc")
            if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
                pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
            configure("ip link set lo mtu 1500 up")
            function()
        except BaseException as error:  # pytest.skip, too
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(patient(60))
    assert not thread.is_alive()
    if outcome:
        raise outcome[0]


def configure(command):
    return subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=patient(20)).stdout


def drop_every_fifth_packet():
    """From here on a fifth of what arrives in this network is lost, by chance."""
    if shutil.which("nft") is None:
        pytest.skip("needs nft")
    # A peer that was not heard is asked again after 5 ms instead of 200.
    configure("ip route replace table local local 127.0.0.0/8 dev lo rto_min 5ms")
    configure("nft add table ip loss")
    configure("nft add chain ip loss arriving { type filter hook input priority 0 ; }")
    configure("nft add rule ip loss arriving numgen random mod 5 0 counter drop")


def packets_dropped():
    return int(re.search(r"counter packets (\d+)", configure("nft list table ip loss"))[1])


def drop_everything(device):
    """From here on no packet leaves by that device: its queue has room for none."""
    try:
        configure(f"tc qdisc replace dev {device} root tbf rate 8bit burst 1 limit 1")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no token bucket: {error.stderr}")


class FarNetwork:
    """A second network for the thread of in_a_network_of_its_own, at the other end of a cable: NEAR, on the device v0,
    is here, FAR, on v1, is there. What runs in `with far:` is there, and so are the sockets that are made in it."""

    NEAR, FAR = "10.0.0.1", "10.0.0.2"

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        if self.libc.unshare(0x40000000):  # CLONE_NEWNET
            pytest.skip("no second network namespace")
        self.far = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        configure(f"ip link add v1 type veth peer name v0 netns /proc/{os.getpid()}/fd/{self.near}")
        configure(f"ip addr add {self.FAR}/24 dev v1")
        configure("ip link set v1 up")
        self.go(self.near)
        configure(f"ip addr add {self.NEAR}/24 dev v0")
        configure("ip link set v0 up")

    def go(self, network):
        if self.libc.setns(network, 0):
            raise OSError(ctypes.get_errno(), "setns")

    def __enter__(self):
        self.go(self.far)

    def __exit__(self, *exc_info):
        self.go(self.near)

    def close(self):
        os.close(self.near)
        os.close(self.far)
