"""B44: an address that may not be used, and threads that can't be had."""

import contextlib
import errno
import os
import resource
import tempfile

import pytest
from contract_helpers import faults
from helpers import SANITIZER, open_fds, run_python

import tstpool

THREADS = """
import os, socket, threading, time
import tstpool

def counted():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

ADDRESS = ("127.0.0.1", 0)
tstpool.TstPool(Echo()).stop()  # what the first pool of a process keeps is not a leak
before = counted()
pool = tstpool.TstPool(Echo(), workers=8, shards=2)
pool.listen(*ADDRESS)
try:
    pool.start()
except (RuntimeError, OSError) as error:
    print(type(error).__name__, pool.running)
else:
    raise SystemExit("started, although a thread could not be had")
pool.stop()
deadline = time.monotonic() + 10
while counted() != before and time.monotonic() < deadline:
    time.sleep(0.01)
print(before == counted(), before, counted())
address = pool.listen(*ADDRESS)  # now there are threads
pool.start()
with socket.create_connection(address, 10) as client:
    client.sendall(b"hello")
    print(client.recv(5).decode())
pool.stop()
"""


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_a_thread_that_cannot_be_had(after):
    """B44: the first, or one in the middle, or the last of eight: the others end, and the pool may start again."""
    env = {
        "LD_PRELOAD": str(faults()),
        "FAIL_CALL": "pthread_create",
        "FAIL_ERRNO": str(errno.EAGAIN),
        "FAIL_COUNT": "1",
        "FAIL_AFTER": str(after),
    }
    if SANITIZER:
        pytest.skip("its runtime must be the first library, and makes threads of its own")
    first, second, third = run_python("-c", THREADS, env=env).stdout.splitlines()
    assert first == "RuntimeError False"
    assert second.startswith("True"), second
    assert third == "hello"


BUSY = """
import socket, threading, tstpool

inside, failing = threading.Event(), threading.Event()

class Stopping(tstpool.TstHandler):
    def on_message(self, sock, data):
        inside.set()
        failing.wait(10)
        pool.WHAT

pool = tstpool.TstPool(Stopping(), workers=3)
client = socket.create_connection(pool.listen("127.0.0.1", 0))
client.sendall(b"x")
start = threading.Thread.start

def fails(thread):
    if thread.name != "tstpool-1":
        return start(thread)
    inside.wait(10)  # the first worker is in a handler
    failing.set()
    raise RuntimeError("can't start new thread")

threading.Thread.start = fails
try:
    pool.start()
except RuntimeError as error:
    print(error, pool.running, pool.addresses)
threading.Thread.start = start
print(pool.stop())
"""


@pytest.mark.parametrize("what", ["stop()", "listen('127.0.0.1', 0)"])
def test_a_thread_that_cannot_be_had_while_a_handler_uses_the_pool(what):
    """B42, B44: who gives up waits for the handler, so the handler must not wait for who gives up."""
    first, second = run_python("-c", BUSY.replace("WHAT", what), timeout=20).stdout.splitlines()
    assert first == "can't start new thread False []"
    assert second == "True"


LIMITED = """
import os, resource, sys, threading
import tstpool
pool = tstpool.TstPool(lambda sock: None, workers=16)
pool.listen("127.0.0.1", 0)
os.setresuid(54321, 54321, 54321)  # a user who has no process but this one
resource.setrlimit(resource.RLIMIT_NPROC, (6, 6))
try:
    pool.start()
except RuntimeError:
    print("refused", pool.running, threading.active_count())
pool.stop()
"""

FORBIDDEN = """
import encodings.idna  # where a user may not look for it
import os, sys, threading
import tstpool
if os.getuid() == 0:
    os.setresuid(54321, 54321, 54321)
pool = tstpool.TstPool(lambda sock: None, workers=4)
before = len(os.listdir("/proc/self/fd"))
try:
    pool.listen("unix:" + sys.argv[1] + "/socket")
except PermissionError as error:
    print(sys.argv[1] in str(error), len(os.listdir("/proc/self/fd")) - before, threading.active_count())
pool.listen("127.0.0.1", 0)
pool.start()
print(pool.stop())
"""


def test_a_limit_on_threads_that_is_real():
    """B44: RLIMIT_NPROC, which does not hold for root."""
    if SANITIZER:
        pytest.skip("its runtime makes threads of its own")
    done = run_python("-c", LIMITED, check=False)
    if "setresuid" in done.stderr and "PermissionError" in done.stderr:
        pytest.skip("only root can become a user who has no processes")
    assert (done.returncode, done.stdout) == (0, "refused False 1\n"), done.stderr


def test_a_place_where_one_may_not_listen():
    """B44: EACCES: the error names the address, no descriptor and no thread stays, and the pool listens elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert run_python("-c", FORBIDDEN, folder).stdout == "True 0 1\nTrue\n"


@contextlib.contextmanager
def descriptors_left(n):
    """This process may open n more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(n)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_listener_that_fails_takes_its_file_with_it(tmp_path):
    """B44: a backlog that is none, found when the socket has its name; no descriptor for epoll; then it works."""
    pool = tstpool.TstPool(lambda sock: None)
    before = open_fds()
    with pytest.raises(TypeError):
        pool.listen(f"unix:{tmp_path}/socket", backlog="many")
    assert not (tmp_path / "socket").exists()
    with descriptors_left(1), pytest.raises(OSError, match="epoll"):
        pool.listen(f"unix:{tmp_path}/socket")
    assert not (tmp_path / "socket").exists()
    assert open_fds() == before
    assert pool.addresses == []
    pool.listen(f"unix:{tmp_path}/socket")
    pool.stop()
