"""What the tests of examples/ share: an example as a process of its own, and clients that somebody else wrote."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from contract_helpers import free_port
from helpers import ROOT, patient, wait_until

FOREIGN = {**os.environ, "LD_PRELOAD": ""}  # other people's programs do without the sanitizers

# Debian's packages have the names of the programs.
COMMANDS = {
    "ncat": ["ncat", "127.0.0.1", "{port}"],
    "socat": ["socat", "-", "TCP:127.0.0.1:{port}"],
    "telnet": ["telnet", "127.0.0.1", "{port}"],
}


def is_listening(port):
    """True once somebody listens on a loopback port, without connecting to it."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table]
    return any(row[1] == f"0100007F:{port:04X}" and row[3] == "0A" for row in rows)


class Example:
    """`python examples/NAME --port ...`; leaving the block ends it with a signal and checks how it ended."""

    def __init__(self, name, *arguments, end_by=signal.SIGINT):
        port = free_port()
        self.addr = ("127.0.0.1", port)
        self.end_by = end_by
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / name), "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until(lambda: is_listening(port) or self.process.poll() is not None, 30)
            assert self.process.poll() is None, self.output
        except BaseException:
            self.kill()
            raise

    @property
    def output(self):
        """What it has printed and logged so far."""
        return os.pread(self.file.fileno(), 1 << 24, 0)

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                self.process.send_signal(self.end_by)
                assert self.process.wait(patient(20)) == 0, self.output
                assert b"Traceback" not in self.output, self.output
        finally:
            self.kill()


class Tool:
    """A client from Debian that is typed into: `tool.type("hello")`, `tool.wait_for("hello")`. Skips where it is
    missing."""

    def __init__(self, name, addr):
        command = [part.format(port=addr[1]) for part in COMMANDS[need(name)]]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=FOREIGN, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        self.seen = b""  # shown, and not waited for yet
        self.before = b""

    def type(self, text):
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def read(self, timeout):
        """Takes what it shows within a time; False when it has ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        piece = os.read(self.process.stdout.fileno(), 1 << 16) if ready else None
        self.seen += piece or b""
        return piece != b""

    def wait_for(self, text, timeout=10):
        """Waits until it shows `text`; the next wait begins behind it."""
        wanted = text.encode()
        deadline = time.monotonic() + patient(timeout)
        while wanted not in self.seen:
            assert time.monotonic() < deadline and self.read(0.1), f"{text!r} is not in {self.seen!r}"
        end = self.seen.index(wanted) + len(wanted)
        self.before += self.seen[:end]
        self.seen = self.seen[end:]

    @property
    def shown(self):
        """All that it has shown, the terminal's own line ends apart."""
        return (self.before + self.seen).decode()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def need(name):
    """The name of a tool; skips the test where it is not installed."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed (Debian: apt-get install {name})")
    return name
