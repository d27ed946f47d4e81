"""What the contract tests share beyond helpers.py: both entry styles behind one call, a server in a process of its own,
and a library of failing system calls to preload into it."""

import atexit
import contextlib
import faulthandler
import functools
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from helpers import INSTRUMENTED, ROOT, SANITIZER, patient, recv_exact, wait_until

from tstpool import EPOLLIN, EPOLLOUT, TstHandler, TstStat

STYLES = ("create", "handler")
TRIGGERS = ("level", "oneshot", "edge")

every_style = pytest.mark.parametrize("style", STYLES)
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS)
one_two_and_eight_workers = pytest.mark.parametrize("workers", (1, 2, 8))


def free_port():
    """A loopback port that nobody uses now, outside the range that the kernel gives to outgoing connections."""
    for _ in range(1000):
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def handler(**hooks):
    """A TstHandler whose class has exactly the hooks given: handler(on_message=lambda sock, data: None)."""

    def method(function):
        return lambda self, *args: function(*args)

    return type("Handler", (TstHandler,), {name: method(function) for name, function in hooks.items()})()


def echo(sock, data):
    """on_message of an echo server (returns None: what sock.send returns is a count, not a TstStat)."""
    sock.send(data)


def replying(reply):
    """on_message that sends reply(data)."""

    def on_message(sock, data):
        sock.send(reply(data))

    return on_message


def ignore(sock, data):
    """on_message of a server that only listens."""


def message(sock):
    """What a plain function handler was called for: the region that req_len asked for, or all that waits."""
    recv = sock.recv_data
    if recv.req_len:
        return bytes(recv.s[recv.req_pos : recv.req_pos + recv.req_len])
    return sock.read()


def as_function(on_message=None, on_writable=None):
    """The original's style: one function, driven by sock.events."""

    def func(sock):
        stat = None
        if on_message is not None and sock.events & EPOLLIN:
            stat = on_message(sock, message(sock))
        if on_writable is not None and sock.events & EPOLLOUT:
            stat = on_writable(sock) or stat
        return stat

    return func


def serve(make_pool, style, on_message=None, *, on_connect=None, on_writable=None, on_disconnect=None, **options):
    """A running pool in either entry style, with the same behaviour: create(function) or TstPool(handler).listen."""
    hooks = {"on_connect": on_connect, "on_message": on_message, "on_writable": on_writable}
    hooks = {name: hook for name, hook in {**hooks, "on_disconnect": on_disconnect}.items() if hook is not None}
    if style == "handler":
        return make_pool(handler(**hooks), **options)
    workers = options.pop("workers", 4)
    sizes = [options.pop(name, 4096) for name in ("max_recv_size", "max_send_size")]
    pool = make_pool(listen=None, start=False, **options)
    if on_connect is not None:
        pool.setEventNewConnected(on_connect)
    if on_disconnect is not None:
        pool.setEventDisconnected(on_disconnect)
    assert pool.create(workers, "127.0.0.1", free_port(), as_function(on_message, on_writable), *sizes) is True
    return pool


def round_trip(sock, data):
    """Send, and receive as many bytes."""
    sock.sendall(data)
    return recv_exact(sock, len(data))


def is_answered(client):
    """A round trip succeeds, within a second on a quiet machine."""
    client.settimeout(patient(1))
    with contextlib.suppress(TimeoutError):
        return round_trip(client, b"hello") == b"hello"
    return False


def exchange(sock, data):
    """round_trip for more than the socket buffers hold: sends on a thread of its own while receiving here."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    try:
        return recv_exact(sock, len(data))
    finally:
        sender.join()


def open_sockets(pool, count):
    """The pool's sockets, when all `count` connections have been accepted."""
    return wait_until(lambda: len(pool.sockets()) == count and pool.sockets())


def is_open(sock):
    """True while the peer has neither closed nor reset; waits for nothing."""
    readable, _, _ = select.select([sock], [], [], 0)
    return not readable or sock.recv(1, socket.MSG_PEEK) != b""


class Gate:
    """Blocks handlers until the test opens it, and says how many are inside."""

    def __init__(self):
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.inside = 0

    def wait(self):
        with self._lock:
            self.inside += 1
        try:
            assert self._open.wait(patient(30)), "the test never opened the gate"
        finally:
            with self._lock:
                self.inside -= 1

    def open(self):
        self._open.set()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._open.set()


def blocking(gate):
    """on_message that echoes, and for b"block" waits at the gate first."""

    def answer(sock, data):
        if data == b"block":
            gate.wait()
        sock.send(data)

    return answer


def send_slowly(pool, client, stream, upto=None):
    """In pieces, each of which the engine receives by itself."""
    received = pool.stats().bytes_in
    sent = 0
    for piece in (100_000, 300_000, 1, 200_000, len(stream)):
        piece = min(piece, (upto or len(stream)) - sent)
        client.sendall(stream[sent : sent + piece])
        sent += piece
        wait_until(lambda sent=sent: pool.stats().bytes_in == received + sent)


def in_threads(*functions, timeout=30):
    """Run all at once, each on a thread; returns their results, re-raises the first exception."""
    results, errors = [None] * len(functions), []
    barrier = threading.Barrier(len(functions))

    def run(i, function):
        try:
            barrier.wait(patient(timeout))
            results[i] = function()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(timeout))
        if thread.is_alive():
            faulthandler.dump_traceback(sys.__stderr__)  # shows where
            raise AssertionError(f"a thread hangs: {thread}")
    if errors:
        raise errors[0]
    return results


def needs_strace(test):
    """Marks a test that calls system_calls()."""
    test = pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer's runtime does not like to be traced")(test)
    return pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")(test)


def system_calls(log, calls, code, *arguments):
    """Runs Python code in a new process; returns strace's lines about these system calls ("sendmsg,close") of all its
    threads, which go by way of the file `log`. Skips the test where strace may not trace."""
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}"]
    allowed = subprocess.run([*command, "true"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"strace may not trace here: {allowed.stderr.strip()}")
    python = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run([*command, *python], cwd=ROOT, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr
    return log.read_text()


def read_line(fd, timeout=20):
    """One line, and not a byte more: a file object would keep what follows, where communicate() does not see it. What
    has come within `timeout` seconds, if that is no line."""
    line = b""
    deadline = time.monotonic() + patient(timeout)
    watched = select.poll()
    watched.register(fd, select.POLLIN)
    while not line.endswith(b"\n") and watched.poll(max(0, deadline - time.monotonic()) * 1000):
        if not (byte := os.read(fd, 1)):
            break
        line += byte
    return line.decode()


class ServerProcess:
    """A server in a process of its own: `code` prints its port, serves until its stdin ends, prints what it likes.

    with ServerProcess(code) as server:
        connect(server.addr) ...
        out = server.finish()
    """

    PRELUDE = (
        "import os, sys, time, threading, socket, resource, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "import tstpool\n"
        "from tstpool import *\n"
        "class Echo(TstHandler):\n"
        "    def on_message(self, sock, data):\n"
        "        sock.send(data)\n"
    )

    def __init__(self, code, env=None, preload=None):
        env = {**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})}
        if preload is not None:  # a sanitizer's library must stay the first one
            env["LD_PRELOAD"] = " ".join(filter(None, [env.get("LD_PRELOAD"), str(preload)]))
        pipe = subprocess.PIPE
        command = [sys.executable, "-u", "-c", self.PRELUDE + code]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        line = read_line(self.process.stdout.fileno())
        if not line.strip().isdigit():
            self.process.kill()
            raise AssertionError(f"no port but {line!r}\n{self.process.communicate()[1]}")
        self.addr = ("127.0.0.1", int(line))

    def finish(self, timeout=20, check=True):
        """End of stdin: returns what the server still printed; its exit code must be 0."""
        try:
            out, err = self.process.communicate(timeout=patient(timeout))
        except subprocess.TimeoutExpired:
            self.process.send_signal(6)  # faulthandler shows every thread's stack
            out, err = self.process.communicate()
            raise AssertionError(f"the server did not end\n{out}\n{err}") from None
        if check:
            assert self.process.returncode == 0, f"exit code {self.process.returncode}\n{out}\n{err}"
        return out

    def cpu_seconds(self):
        """User and system time that the process has used so far."""
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


FAULTS = r"""
/* System calls that misbehave on order, for LD_PRELOAD. FAIL_CALL=accept4 FAIL_ERRNO=24 FAIL_COUNT=3: the first 3 fail,
   with FAIL_AFTER=2 the first 3 behind 2 that work. "epoll_add" and "epoll_mod" are epoll_ctl, "send" is sendmsg, too.
   FAIL_EVERY=n: instead, each nth of them. EINTR_EVERY=n: each nth recv, send, accept4, epoll_wait is interrupted.
   SHORT=1: recv and send move 1 to 3 bytes. DELAY_MOD=n: EPOLL_CTL_MOD waits for n milliseconds before it begins. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int number(const char *name) { const char *s = getenv(name); return s ? atoi(s) : 0; }
static int failures, calls, lengths;
int tst_mods, tst_failures;  /* read by the tests through ctypes */

static int interrupted(const char *call) {  /* only what signal(7) says may be */
    return !strcmp(call, "recv") || !strcmp(call, "send") || !strcmp(call, "accept4") || !strcmp(call, "epoll_wait");
}

static int fails(const char *call) {
    static int interrupt = -1, count, after, every;
    static const char *failing;
    if (interrupt < 0) {
        failing = getenv("FAIL_CALL");
        count = number("FAIL_COUNT");
        after = number("FAIL_AFTER");
        every = number("FAIL_EVERY");
        interrupt = number("EINTR_EVERY");
    }
    if (failing && !strcmp(failing, call)) {
        int n = __sync_add_and_fetch(&failures, 1);
        if (every ? n % every == 0 : n > after && n - after <= count) {
            __sync_add_and_fetch(&tst_failures, 1);
            errno = number("FAIL_ERRNO");
            return 1;
        }
    }
    if (interrupt > 0 && interrupted(call) && __sync_add_and_fetch(&calls, 1) % interrupt == 0) {
        errno = EINTR;
        return 1;
    }
    return 0;
}

static size_t shortened(size_t n) {
    static int on = -1;
    if (on < 0) on = number("SHORT");
    size_t limit = 1 + (size_t)__sync_add_and_fetch(&lengths, 1) % 3;
    return on && n > limit ? limit : n;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int accept4(int fd, struct sockaddr *a, socklen_t *l, int f) {
    return fails("accept4") ? -1 : REAL(accept4)(fd, a, l, f);
}
int epoll_create1(int flags) { return fails("epoll_create1") ? -1 : REAL(epoll_create1)(flags); }
int epoll_wait(int fd, struct epoll_event *e, int n, int t) {
    return fails("epoll_wait") ? -1 : REAL(epoll_wait)(fd, e, n, t);
}
int epoll_ctl(int fd, int op, int target, struct epoll_event *e) {
    if (op == EPOLL_CTL_MOD) {
        __sync_add_and_fetch(&tst_mods, 1);
        usleep(1000 * number("DELAY_MOD"));
    }
    if (fails("epoll_ctl") || (op == EPOLL_CTL_MOD && fails("epoll_mod"))) return -1;
    return op == EPOLL_CTL_ADD && fails("epoll_add") ? -1 : REAL(epoll_ctl)(fd, op, target, e);
}
ssize_t recv(int fd, void *p, size_t n, int f) { return fails("recv") ? -1 : REAL(recv)(fd, p, shortened(n), f); }
ssize_t send(int fd, const void *p, size_t n, int f) { return fails("send") ? -1 : REAL(send)(fd, p, shortened(n), f); }
ssize_t sendmsg(int fd, const struct msghdr *m, int f) {
    struct msghdr less = *m;
    struct iovec first = *m->msg_iov;
    if (fails("send")) return -1;
    if (first.iov_len == shortened(first.iov_len)) return REAL(sendmsg)(fd, m, f);
    first.iov_len = shortened(first.iov_len);
    less.msg_iov = &first;
    less.msg_iovlen = 1;
    return REAL(sendmsg)(fd, &less, f);
}
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *p) {
    return fails("pthread_create") ? errno : REAL(pthread_create)(t, a, f, p);
}
"""


@functools.cache
def shim(name, source, *options):
    """Compile a library that goes before libc, once; its path is for LD_PRELOAD, and ServerProcess(preload=...)."""
    if INSTRUMENTED:
        pytest.skip("the interpreter has the sanitizer's calls in itself, and these go before any library's")
    folder = Path(tempfile.mkdtemp(prefix=f"tstpool-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "shim.c").write_text(source)
    target = folder / "shim.so"
    command = ["cc", "-O1", *options, "-shared", "-fPIC", "-o", str(target), str(folder / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "LD_PRELOAD": ""})
    return target


def faults():
    """The library of FAULTS."""
    return shim("faults", FAULTS)


def replying_once(reply, how, reasons):
    """Hooks that answer the first message and end the connection, by "disconnect" (returned) or "close" (called).
    reasons: a list for what on_disconnect is given."""

    def on_message(sock, data):
        sock.send(reply)
        if how == "disconnect":
            return TstStat.DISCONNECT
        sock.close()

    return handler(on_message=on_message, on_disconnect=lambda sock, reason: reasons.append(reason))
