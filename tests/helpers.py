"""What the tests share: waiting on conditions, client sockets, pools that always stop, fresh interpreters.

Import it as `from helpers import wait_until, connect, ...`: pyproject.toml puts tests/ on pytest's path.
No test may rely on sleeping "long enough": it waits on a condition with a deadline, and `wait_until` is how.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# How many rounds a looping test makes (see scaled) and how long it may wait (see patient): sanitizers make the engine
# several times slower, so `make asan` and `make tsan` lower the first and raise the second.
SCALE = float(os.environ.get("TSTPOOL_TEST_SCALE", "1.0"))
PATIENCE = float(os.environ.get("TSTPOOL_TEST_PATIENCE", "1.0"))

# "", "address,undefined" or "thread": which sanitizer the extension under test was built with.
SANITIZER = os.environ.get("TSTPOOL_SANITIZE", "")

# True where the interpreter itself was built with ThreadSanitizer.
INSTRUMENTED = "--with-thread-sanitizer" in (sysconfig.get_config_var("CONFIG_ARGS") or "")

# True on a python3.13t: handlers really run in parallel there.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def scaled(n, minimum=1):
    """n rounds normally, fewer under TSTPOOL_TEST_SCALE, never less than `minimum`."""
    return max(minimum, int(n * SCALE))


def patient(seconds):
    """A deadline that is right on a plain build, stretched by TSTPOOL_TEST_PATIENCE on a slow one."""
    return seconds * PATIENCE


@contextlib.contextmanager
def quick_switches(seconds=1e-4):
    """The interpreter changes threads so often that a thread which never blocks can't starve the others."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def wait_until(cond, timeout=10, message=None):
    """Call `cond()` until it returns something true, and return that; AssertionError after `timeout` seconds.

    `message` (a string, or a function called only on failure) says what was waited for.
    """
    deadline = time.monotonic() + patient(timeout)
    pause = 0.0005
    while True:
        value = cond()
        if value:
            return value
        if time.monotonic() > deadline:
            text = message() if callable(message) else message
            raise AssertionError(f"not within {patient(timeout):g} s: {text or getattr(cond, '__name__', cond)}")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)  # quick answers are seen quickly, long waits cost no CPU


def connect(addr, timeout=10):
    """A blocking client socket with a time-out. `addr`: (host, port), "unix:/path", ("unix:/path", 0), or a pool."""
    if hasattr(addr, "addresses"):
        addr = addr.addresses[0]
    host, port = (addr, 0) if isinstance(addr, str) else addr[:2]
    if host.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(patient(timeout))
            sock.connect(host[len("unix:") :])
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((host, port), timeout=patient(timeout))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def recv_exact(sock, n):
    """Exactly n bytes, however many pieces they come in; EOFError names what had arrived if the peer closes first."""
    buf = bytearray()
    while len(buf) < n:
        piece = sock.recv(min(n - len(buf), 1 << 20))
        if not piece:
            raise EOFError(f"closed after {len(buf)} of {n} bytes: ...{bytes(buf[-64:])!r}")
        buf += piece
    return bytes(buf)


class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def mapped_memory():
    """Bytes of this process in malloc's blocks of their own (glibc 2.33): what it has resident may be Python's, which
    gives back when it likes."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    return mallinfo().hblkhd


def recv_until_eof(sock):
    """Everything up to the peer's FIN."""
    pieces = []
    while piece := sock.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def reset(sock):
    """Close with a RST instead of a FIN (SO_LINGER of zero)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class RunningPool:
    """A pool that listens on a free loopback port and runs for as long as the `with` block.

        with RunningPool(Echo(), workers=2) as pool:
            with connect(pool) as client: ...

    Entering gives the TstPool itself; its address is `pool.addresses[0]`. `listen=None` makes no listener, another
    tuple is passed to listen(); `start=False` leaves starting to the test. Everything else goes to TstPool.
    Leaving stops the pool, whatever state the test left it in.
    """

    def __init__(self, handler=None, *, listen=("127.0.0.1", 0), start=True, drain=2.0, **options):
        import tstpool  # here and not above: tests of the unbuilt package use these helpers too

        self.drain = drain
        self.pool = tstpool.TstPool(handler, **options)
        try:
            if listen is not None:
                self.pool.listen(*listen)
            if start:
                self.pool.start()
        except BaseException:
            self.stop()
            raise

    def stop(self):
        self.pool.stop(drain=patient(self.drain))

    def __enter__(self):
        return self.pool

    def __exit__(self, *exc_info):
        self.stop()


def run_python(*args, timeout=60, check=True, env=None, **kwargs):
    """Run this interpreter in a new process from the repository's root: run_python("-c", code), run_python("-m", ...).

    Returns the CompletedProcess with text stdout and stderr. A failure (unless check=False) shows both.
    """
    merged = {**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})}
    kwargs.setdefault("cwd", ROOT)
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, *args], timeout=patient(timeout), env=merged, capture_output=True, text=True, **kwargs
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode} of {args}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}")
    return done


def open_fds():
    """{descriptor: what it refers to} of this process, without the one that reads the list."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor is gone by now
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return fds


def native_threads():
    """The kernel's ids of this process's threads: also those that Python does not know of.

    While one ends, a listing may leave out another one (that of faulthandler's watchdog for this test, say, while that
    of the test before is ending): it is asked again until it says the same twice.
    """
    before = None
    while (found := {int(name) for name in os.listdir("/proc/self/task")}) != before:
        before = found
    return found


def process_cpu_seconds():
    """CPU time, user and system, of all threads of this process so far: a spin shows here."""
    return time.process_time()
