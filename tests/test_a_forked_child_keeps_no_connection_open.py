"""B45: whatever the workers are at when the process forks, a peer sees its end although the child lives on."""

import pytest
from contract_helpers import shim
from helpers import SANITIZER, patient, run_python, scaled

PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, time, warnings
warnings.simplefilter("ignore")  # 3.12 and later warn about fork with threads
from tstpool import TstHandler, TstPool, TstStat

patience = float(sys.argv[1])

def sockets():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink("/proc/self/fd/" + name))
        except FileNotFoundError:
            pass  # the folder that is being listed
    return [link for link in found if link.startswith("socket:")]

def sockets_of_a_child():
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, str(len(sockets())).encode())
        os._exit(0)
    os.close(writing)
    number = int(os.read(reading, 100))
    os.close(reading)
    os.wait()
    return number

class Server(TstHandler):
    def on_message(self, sock, data):
        sock.send(data)
        return TstStat.DISCONNECT
"""

CHURN = """
CLIENTS = '''
import os, socket, sys
while os.getppid() == int(sys.argv[2]):
    clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(8)]
    for client in clients[:4]:
        client.sendall(b"x")
    for client in clients:
        client.close()
'''
pool = TstPool(Server(), workers=4, shards=int(sys.argv[2]))
address = pool.listen("127.0.0.1", 0)
pool.start()
clients = subprocess.Popen([sys.executable, "-c", CLIENTS, str(address[1]), str(os.getpid())],
                           env={**os.environ, "LD_PRELOAD": ""}, stderr=subprocess.DEVNULL)
while pool.stats().closed < 50:
    time.sleep(0.001)
print([number for number in [sockets_of_a_child() for _ in range(int(sys.argv[3]))] if number])
clients.kill()
clients.wait()
pool.stop(0)
"""

ADDRESSES = """
import threading

def ask():
    while not over:
        assert sock.local == "unix:"

over = []
pool = TstPool(Server(), workers=1)
ours, theirs = socket.socketpair()
sock = pool.addsocket(theirs)
pool.start()
thread = threading.Thread(target=ask)
thread.start()
print([number for number in [sockets_of_a_child() for _ in range(int(sys.argv[2]))] if number != 1])
over.append(True)
thread.join()
ours.close()
pool.stop(0)
"""

REST = r"""
/* For LD_PRELOAD. Who accepts a client while tst_rest is 1, or is about to close a socket while it is 2, rests for
   tst_milliseconds first: the first one who does so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/stat.h>

int tst_rest, tst_resting, tst_milliseconds;

static void rest(int where) {
    if (!__sync_bool_compare_and_swap(&tst_rest, where, 0)) return;
    __sync_add_and_fetch(&tst_resting, 1);
    poll(NULL, 0, __atomic_load_n(&tst_milliseconds, __ATOMIC_SEQ_CST));
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    int (*real)(int, struct sockaddr *, socklen_t *, int) = dlsym(RTLD_NEXT, "accept4");
    int accepted = real(fd, address, size, flags);
    if (accepted >= 0) rest(1);
    return accepted;
}

int close(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "close");
    struct stat what;
    if (fstat(fd, &what) == 0 && S_ISSOCK(what.st_mode)) rest(2);
    return real(fd);
}
"""

RESTING = """
library = ctypes.CDLL(None)
rest, resting, milliseconds = (ctypes.c_int.in_dll(library, "tst_" + name)
                               for name in ("rest", "resting", "milliseconds"))
milliseconds.value = int(float(sys.argv[3]) * 1000)
pool = TstPool(Server(), workers=1)
address = pool.listen("127.0.0.1", 0)
pool.start()
with socket.create_connection(address, patience) as client:
    client.sendall(b"x")
    assert client.recv(9) == b"x" and client.recv(9) == b""

while len(pool):  # its close is not the one that is to rest
    time.sleep(0.001)

reading, writing = os.pipe()
peer = os.fork()
if peer == 0:  # before there is a client: it has none of the server's descriptors
    os.close(writing)
    os.read(reading, 1)
    with socket.create_connection(address, patience) as client:
        client.sendall(b"x")
        os._exit((client.recv(9), client.recv(9)) != (b"x", b""))
rest.value = int(sys.argv[2])
os.write(writing, b"x")  # not before: all would be over by then
"""

FORK = """
while not resting.value:
    time.sleep(0.001)
reading, writing = os.pipe()
began = time.monotonic()
child = os.fork()
if child == 0:
    os.write(writing, str(len(sockets())).encode())
    time.sleep(2 * patience)  # it lives on, and not for ever if nobody comes to kill it
took = time.monotonic() - began
print(os.read(reading, 9).decode())
"""

SEES_ITS_END = """
print(os.waitstatus_to_exitcode(os.waitpid(peer, 0)[1]))  # although the child lives
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
pool.stop(0)
"""

TOOK = """
os.kill(child, signal.SIGKILL)
os.kill(peer, signal.SIGKILL)
print(took < milliseconds.value / 2000, flush=True)
os._exit(0)
"""

FAILING = """
import resource
pool = TstPool(Server(), workers=2)
address = pool.listen("127.0.0.1", 0)
pool.start()
try:
    if os.getuid() == 0:  # root is given as many processes as it asks for
        os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.fork() or os._exit(0)
except BlockingIOError:
    pass
else:
    print("this user may fork")
    os._exit(0)
began = time.monotonic()
for _ in range(20):
    with socket.create_connection(address, patience) as client:
        client.sendall(b"x")
        assert client.recv(9) == b"x" and client.recv(9) == b""
print(time.monotonic() - began < patience / 2)
pool.stop(0)
"""

AFTER_ACCEPT, BEFORE_CLOSE = 1, 2


@pytest.mark.parametrize("shards", [1, 3])
def test_while_clients_come_and_go(shards):
    """B45: none of many children has a socket, be it of a client that was being accepted or closed."""
    rounds = scaled(300, minimum=30)
    out = run_python("-c", PRELUDE + CHURN, str(patient(20)), str(shards), str(rounds), timeout=60).stdout
    assert out == "[]\n"


def test_while_a_connection_is_asked_for_its_address():
    """B45: on another thread than the one that forks; the child has this end of the pair, which is no pool's, alone."""
    rounds = scaled(200, minimum=30)
    out = run_python("-c", PRELUDE + ADDRESSES, str(patient(20)), str(rounds), timeout=60).stdout
    assert out == "[]\n"


@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has an accept4 and a close of its own")
@pytest.mark.parametrize("rest", [AFTER_ACCEPT, BEFORE_CLOSE])
def test_in_the_middle_of_accept_or_close(rest):
    """B45: the fork waits until the descriptor has its slot, or is closed; the peer sees its end."""
    env = {"LD_PRELOAD": str(shim("rest", REST))}
    arguments = [str(patient(20)), str(rest), "0.3"]
    out = run_python("-c", PRELUDE + RESTING + FORK + SEES_ITS_END, *arguments, timeout=40, env=env).stdout
    assert out.split() == ["0", "0"]


@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has an accept4 and a close of its own")
@pytest.mark.parametrize("rest", [AFTER_ACCEPT, BEFORE_CLOSE])
def test_a_fork_waits_no_longer_than_it_must(rest):
    """B45: a close, say, that its owner has told to linger for minutes holds no fork up, and nothing hangs."""
    env = {"LD_PRELOAD": str(shim("rest", REST))}
    arguments = [str(patient(20)), str(rest), str(patient(40))]
    out = run_python("-c", PRELUDE + RESTING + FORK + TOOK, *arguments, timeout=40, env=env).stdout
    assert out.split()[1] == "True"


def test_a_fork_that_fails_holds_nobody_up():
    """B45: who comes then is served at once."""
    out = run_python("-c", PRELUDE + FAILING, str(patient(20)), timeout=40).stdout
    if out.startswith("this user"):
        pytest.skip("no limit of processes holds here")
    assert out == "True\n"
