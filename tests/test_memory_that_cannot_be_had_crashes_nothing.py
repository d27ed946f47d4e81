"""B36: each malloc, calloc and realloc of the engine fails once, in a server process of its own; Python's own, too."""

import pytest
from contract_helpers import shim
from helpers import FREE_THREADED, SANITIZER, run_python

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a malloc of its own")

NO_MEMORY = r"""
/* Memory that can't be had, for LD_PRELOAD: of the calls that come from the extension, number tst_fail fails, or, when
   that is negative, each -tst_fail'th; or of those of malloc for tst_large bytes or more number tst_fail_large. Others
   (Python's own) never do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
int tst_fail, tst_calls, tst_failed, tst_large, tst_fail_large;
static char *low, *high;

void tst_watch(char *from, char *to) { low = from; high = to; }

static int fails(char *caller) {
    if (caller < low || caller >= high) return 0;
    int fail = __atomic_load_n(&tst_fail, __ATOMIC_SEQ_CST), n = __sync_add_and_fetch(&tst_calls, 1);
    if (!(fail > 0 ? n == fail : fail < 0 && n % -fail == 0)) return 0;
    __sync_add_and_fetch(&tst_failed, 1);
    errno = ENOMEM;
    return 1;
}

static int is_that_large_one(char *caller, size_t n) {
    if (caller < low || caller >= high || !tst_large || n < (size_t)tst_large) return 0;
    return __sync_sub_and_fetch(&tst_fail_large, 1) == 0;
}

void *malloc(size_t n) {
    char *caller = __builtin_return_address(0);
    return is_that_large_one(caller, n) || fails(caller) ? NULL : __libc_malloc(n);
}
void *calloc(size_t n, size_t m) { return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n); }
"""


def no_memory():
    return shim("no-memory", NO_MEMORY, "-fno-optimize-sibling-calls")


SCENE = """
import ctypes, gc, logging, os, socket, sys, threading, time
import tstpool
from tstpool import LengthPrefixed, TstHandler, TstPool, TstStat

sys.path[:0] = ["tests/downstream"]
from downstream_handlers import FramedEcho

PATIENCE = float(os.environ.get("TSTPOOL_TEST_PATIENCE", "1"))

logging.disable(logging.CRITICAL)
shim = ctypes.CDLL(None)
fail, calls, failed = (ctypes.c_int.in_dll(shim, name) for name in ("tst_fail", "tst_calls", "tst_failed"))
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if tstpool._core.__file__ in line]
shim.tst_watch(ctypes.c_void_p(int(places[0][0], 16)), ctypes.c_void_p(int(places[-1][1], 16)))
errors = {}

def note(error):
    errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1

class Server(TstHandler):
    compiled = False

    def on_connect(self, sock):
        if self.compiled:
            sock.handler = FramedEcho()

    def on_message(self, sock, data):
        if data[:1] == b"t":
            sock.send_data.s[:4] = b"\\0\\0\\0\\4"
            sock.send_data.resize(20000)
            sock.send_data.s[4:8] = data[:4]
            sock.send_data.req_len = 8
            return TstStat.SEND
        if data[:1] == b"b":
            pool_of[0].broadcast(len(data).to_bytes(4, "big") + data)
            return None
        return data

    def on_error(self, sock, error):
        note(error)

pool_of = [None]
MESSAGES = [b"echo", b"t123", b"b" * 5000, b"e" * 20000, b"B" * 300000, b"e" * 3000]

def framed(message):
    return len(message).to_bytes(4, "big") + message

def expect(client, data):
    got = b""
    while len(got) < len(data):
        piece = client.recv(1 << 20)
        if not piece:
            raise EOFError
        got += piece
    assert got == data, (got[:20], len(got), data[:20])

def dial(address):
    return socket.create_connection(address, 10 * PATIENCE)

def talk(address, whole):
    # Nobody may wait for ever: an answer or the end.
    try:
        with dial(address) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for message in MESSAGES * 2:
                client.sendall(len(message).to_bytes(4, "big"))
                client.sendall(message)
                expect(client, framed(message))
            client.sendall(framed(b"with a part of the next") + framed(b"next")[:6])  # kept when a handler has run
            expect(client, framed(b"with a part of the next"))
            client.sendall(framed(b"next")[6:])
            expect(client, framed(b"next"))
            whole.append(1)
    except TimeoutError:
        raise AssertionError("a client waits for ever") from None
    except (ConnectionError, EOFError) as error:
        note(error)

def play(number):
    fail.value, calls.value, failed.value = number, 0, 0
    whole, server = [], Server()
    try:
        pool = pool_of[0] = TstPool(server, workers=2, framing=LengthPrefixed(4))
        try:
            address = pool.listen("127.0.0.1", 0, idle_timeout=50)
            pool.start()  # a worker that gets no batch tries again
            for server.compiled in (False, True):
                talk(address, whole)
            ours, theirs = socket.socketpair()
            with ours:
                sock = pool.addsocket(theirs)
                sock.send_message(bytearray(30000))
                sock.send_message(b"x" * 2000)
                assert len(sock.send_data.s) > 0
                sock.send(b"y" * 100000)
        finally:
            running = pool.running
            assert pool.stop(5 * PATIENCE) is True
    except (MemoryError, OSError, tstpool.TstError) as error:
        note(error)
    pool_of[0] = None
    gc.collect()
    return calls.value, failed.value, len(whole)
"""

EACH = """
most, failures, hit, number = play(0)[0], 0, 0, 1
assert errors == {}, errors
while number <= most + 3:
    _, done, whole = play(number)
    hit += done
    number += 1
fail.value = 0
errors.clear()
assert play(0)[2] == 2 and errors == {}, errors
print(most, hit)
"""

OFTEN = """
for every in (2, 3, 5, 7, 11):
    play(-every)
fail.value = 0
noted = dict(errors)
errors.clear()
assert play(0)[2] == 2 and errors == {}, errors
print(noted)
"""

PAUSED = """
class Pausing(TstHandler):
    def on_message(self, sock, data):
        got.setdefault(sock.peer[1], []).append(bytes(data))
        if data == b"first":
            sock.pause()
            paused.append(sock)
            return None
        return data

def held(number):
    # The second message is in the kernel's answer, but its handler does not take it yet; then another client speaks.
    got.clear()
    paused.clear()
    pool = TstPool(Pausing(), workers=1, framing=LengthPrefixed(4))
    address = pool.listen("127.0.0.1", 0)
    pool.start()
    try:
        with dial(address) as client, dial(address) as other:
            for guest in (client, other):
                guest.sendall(framed(b"hello"))
                expect(guest, framed(b"hello"))
            fail.value, calls.value, failed.value = number, 0, 0
            client.sendall(framed(b"first") + framed(b"second"))
            try:
                while not paused and not failed.value:
                    time.sleep(0.001)
                other.sendall(framed(b"other") + framed(b"secret"))  # where the others lay, if nobody kept them
                expect(other, framed(b"other") + framed(b"secret"))
                if paused:
                    paused[0].resume()
                expect(client, framed(b"second"))
            except (ConnectionError, EOFError) as error:
                note(error)
            finally:
                fail.value = 0
                mine = got.get(client.getsockname()[1])
                assert mine == [b"hello", b"first", b"second"][: len(mine)], (number, mine)
    finally:
        assert pool.stop(5 * PATIENCE) is True
    return failed.value

got, paused = {}, []
assert held(0) == 0 and errors == {}, errors
print(sum(held(number) for number in range(1, 12)))
"""


LONG = """
fail_large, large = (ctypes.c_int.in_dll(shim, name) for name in ("tst_fail_large", "tst_large"))

def long(number):
    # A long message to a compiled handler: its block, its reply. Returns whether that came.
    pool = TstPool(FramedEcho(), workers=1, framing=LengthPrefixed(4))
    address = pool.listen("127.0.0.1", 0)
    pool.start()
    whole = framed(os.urandom(300_000))
    try:
        with dial(address) as client:
            fail_large.value, large.value = number, 300_000
            client.sendall(whole[:1000])
            while pool.stats().bytes_in < 1000:
                time.sleep(0.001)
            client.sendall(whole[1000:])
            expect(client, whole)
            return True
    except (ConnectionError, EOFError):
        return False
    finally:
        large.value = 0
        assert fail_large.value <= 0, number
        assert pool.stop(5 * PATIENCE) is True

print([long(number) for number in (1, 2)], long(0))
"""


PYTHONS = """
import _testcapi

def strike(code, n):
    # Allocation number n from here on fails, whichever thread's it is.
    _testcapi.set_nomemory(n, n + 1)
    try:
        return code()
    except (MemoryError, RuntimeError):  # "can't allocate lock"
        return None
    finally:
        _testcapi.remove_mem_hooks()

class Careless(Server):
    n = 0
    ready = threading.Event()

    def on_message(self, sock, data):
        if data == b"strike" and self.ready.wait(10 * PATIENCE):
            _testcapi.set_nomemory(self.n, self.n + 1)  # here, or in what the worker does behind this call
        return data

    def on_error(self, sock, error):
        _testcapi.remove_mem_hooks()
        note(error)

def visit(address):
    # Thirty others are there, with a message, when the first one's handler returns: the worker, the only one, goes on
    # with them. (For the first few of them it has used TstSocket objects.) Returns how many have ended unanswered.
    buffer, ends, clients = bytearray(10), 0, []
    try:
        for text in [b"strike"] + [b"number"] * 30:
            clients.append(dial(address))
            clients[-1].sendall(b"\\0\\0\\0\\6" + text)
        server.ready.set()
        for client in clients:
            try:
                ends += client.recv_into(buffer) == 0
            except ConnectionError:
                ends += 1
            except TimeoutError:
                raise AssertionError(f"a client waits for ever: {n}") from None
    finally:
        _testcapi.remove_mem_hooks()
        for client in clients:
            client.close()
    return ends

ended = 0
for n in range(1, 60):
    # The user's own calls, as long as no worker runs ...
    server = Careless()
    pool = strike(lambda: TstPool(server, workers=1, framing=LengthPrefixed(4)), n)
    pool = pool or TstPool(server, workers=1, framing=LengthPrefixed(4))
    address = strike(lambda: pool.listen("127.0.0.1", 0), n) or pool.listen("127.0.0.1", 0)
    ours, theirs = socket.socketpair()
    sock = strike(lambda: pool.addsocket(theirs), n)
    assert (sock is None) == (theirs.fileno() >= 0)
    for use in (lambda: sock.send_message(b"x" * 2000), lambda: len(sock.send_data.s), pool.stats, pool.sockets):
        if sock is not None:
            strike(use, n)
    pool.start()
    # ... and a worker's, when a handler has returned.
    Careless.n = n
    server.ready.clear()
    try:
        ended += visit(address)
    except MemoryError:  # it was this thread's
        pass
    finally:
        _testcapi.remove_mem_hooks()
    Careless.n = 10**9
    assert visit(address) == 0  # the worker lives
    _testcapi.remove_mem_hooks()
    assert pool.stop(5 * PATIENCE) is True
    ours.close()
    theirs.close()
errors.clear()
fail.value = 0
assert play(0)[2] == 2 and errors == {}, errors
print(ended)
"""

SMUGGLE = """
import _testcapi

class Own(TstHandler):
    def on_message(self, sock, data):
        if data == b"strike":
            _testcapi.set_nomemory(self.n, self.n + 1)  # in what the worker does for the next message
        elif data == INNER:
            got.append(self.n)
        else:
            smuggled.append(bytes(data))

    def on_disconnect(self, sock, reason):
        _testcapi.remove_mem_hooks()

smuggled, got, buffer = [], [], bytearray(10)
INNER = framed(b"evil") * 1000  # what a relay carries for others
STREAM = framed(b"strike") + framed(INNER)
for copy in (True, False):
    for n in range(1, 30):
        pool = TstPool(Server(), workers=1, framing=LengthPrefixed(4), copy=copy)
        address = pool.listen("127.0.0.1", 0)
        pool.start()
        with dial(address) as client:
            while not pool.sockets():
                time.sleep(0.001)
            (sock,) = pool.sockets()
            sock.handler = Own()
            sock.handler.n = n
            del sock
            try:  # it may be this thread's own
                client.sendall(STREAM)
                client.shutdown(socket.SHUT_WR)
                client.recv_into(buffer)
            except (ConnectionError, MemoryError):
                pass
            _testcapi.remove_mem_hooks()
        assert pool.stop(5 * PATIENCE) is True
assert smuggled == [], len(smuggled)
print(2 * 29 - len(got))
"""

NOTHING_TO_RECEIVE_INTO = """
class Keeper(TstHandler):
    def on_message(self, sock, data):
        sock.user_data = data[:1]
        sock.send(bytes(data))

records = []
logging.disable(logging.NOTSET)
logging.getLogger("tstpool").addFilter(lambda record: records.append(record.getMessage()))
pool = TstPool(Keeper(), workers=1, copy=False)
address = pool.listen("127.0.0.1", 0)
pool.start()
with dial(address) as client:
    client.sendall(b"first")
    expect(client, b"first")
    fail.value, calls.value, failed.value = -1, 0, 0  # each from here on
    begin = time.monotonic()
    client.sendall(b"second")
    while failed.value < 20:
        time.sleep(0.001)
    fail.value = 0
    lasted = time.monotonic() - begin
    expect(client, b"second")
    client.sendall(b"third")
    expect(client, b"third")
    assert pool.running
assert pool.stop(5 * PATIENCE) is True
assert 1 <= len(records) <= 10 * (2 + int(lasted)), records  # ten a second
print(records[0])
"""


def play(code):
    return run_python("-c", SCENE + code, env={"LD_PRELOAD": str(no_memory())}, timeout=100).stdout


def test_each_allocation_fails_once():
    """B36: MemoryError or the end of a connection, nobody waits for ever; then all is as before."""
    tried, failed = map(int, play(EACH).split())
    print(f"{tried} allocations in the scene, {failed} of them failed")
    assert tried > 20
    assert failed > 20  # how many a scene has depends on how its bytes come


def test_many_allocations_fail():
    """B36: each second, third, ... of them: several at once, also those of an end that another failure has brought."""
    assert "Error" in play(OFTEN)


def test_a_compiled_handlers_long_message_needs_no_block():
    """B36: without memory for one it is received like others; without memory for its reply it is the last one."""
    assert play(LONG) == "[True, False] True\n"


def test_input_that_cannot_be_kept_is_nobody_elses():
    """B36: a paused connection without memory for what waits ends; its handler never gets what came for another."""
    failed = int(play(PAUSED))
    print(f"{failed} allocations failed")
    assert failed > 0


def test_a_worker_that_has_nothing_to_receive_into_tries_again():
    """B36: a handler keeps what was received last, so that it needs new memory; the pool goes on when there is some."""
    assert play(NOTHING_TO_RECEIVE_INTO) == "worker 0 of tstpool has no memory to poll with\n"


def has_failing_allocations():
    try:
        import _testcapi
    except ImportError:
        return False
    return hasattr(_testcapi, "set_nomemory")


@pytest.mark.skipif(FREE_THREADED, reason="CPython 3.13t itself crashes when an allocation fails")
@pytest.mark.skipif(not has_failing_allocations(), reason="this Python was built without _testcapi")
def test_each_allocation_of_python_fails():
    """B36: those of the user's calls, and those of a worker when a handler has returned: MemoryError, or the end of a
    connection; nobody waits for ever, and then all is as before."""
    ended = int(play(PYTHONS))
    print(f"{ended} connections ended by it")
    assert ended > 10


@pytest.mark.skipif(FREE_THREADED, reason="CPython 3.13t itself crashes when an allocation fails")
@pytest.mark.skipif(not has_failing_allocations(), reason="this Python was built without _testcapi")
def test_what_is_left_of_a_message_is_no_message():
    """B36: memory fails when its header is gone already: nobody gets as messages what is in it."""
    failures = int(play(SMUGGLE))
    print(f"{failures} messages were lost")
    assert failures > 0
