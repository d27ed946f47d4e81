"""B38: a worker that has lost its shard moves a timer while the shard's holder is about to sleep, and that
one hears of it.

The moment is a few instructions long. A library before libc makes it longer: the extension's threads rest, for a time
that is drawn, behind each pthread_mutex_unlock.
"""

import time

import pytest
from contract_helpers import ServerProcess, shim
from helpers import SANITIZER, connect, patient, recv_exact, recv_until_eof, scaled

SLOW_UNLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

int tst_rest;  /* microseconds at most */
static char *low, *high;

void tst_watch(char *from, char *to) { low = from; high = to; }

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    static __thread unsigned seed;
    static int (*real)(pthread_mutex_t *);
    char *caller = __builtin_return_address(0);
    if (!real) real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    int result = real(mutex);
    if (caller >= low && caller < high) {
        if (!seed) seed = (unsigned)(size_t)&seed >> 4;
        usleep(rand_r(&seed) % (tst_rest + 1));
    }
    return result;
}
"""

SERVER = """
import ctypes
shim = ctypes.CDLL(None)
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if tstpool._core.__file__ in line]
shim.tst_watch(ctypes.c_void_p(int(places[0][0], 16)), ctypes.c_void_p(int(places[-1][1], 16)))

class Sleeper(Echo):
    def on_message(self, sock, data):
        if data == b"sleep":
            time.sleep(0.03)  # it is taken over from
        sock.send(data)

pool = TstPool(Sleeper(), workers=3, shards=1, first_byte_timeout=5, idle_timeout=0.1)
port = pool.listen("127.0.0.1", 0)[1]
quiet = pool.listen("127.0.0.1", 0, first_byte_timeout=None, idle_timeout=None)[1]  # whose timers would wake it, too
pool.start()
print(port)
print(quiet)
ctypes.c_int.in_dll(shim, "tst_rest").value = 2000
sys.stdin.read()
pool.stop()
"""


@pytest.mark.skipif(bool(SANITIZER), reason="the shim would rest in its runtime's own calls, too")
def test_a_deadline_that_begins_as_the_holder_falls_asleep():
    """Else the connection would stay until the holder's own next deadline."""
    with ServerProcess(SERVER, preload=shim("slow-unlock", SLOW_UNLOCK)) as server:
        quiet = ("127.0.0.1", int(server.process.stdout.readline()))
        with connect(quiet) as other:
            for i in range(scaled(40, minimum=20)):
                with connect(server.addr) as client:
                    client.sendall(b"sleep")
                    time.sleep(0.028 + 0.0002 * (i % 20))  # to come at different places of its return
                    other.sendall(b"x")
                    recv_exact(other, 1)
                    recv_exact(client, 5)
                    begin = time.monotonic()
                    assert recv_until_eof(client) == b""
                    took = time.monotonic() - begin
                    assert took < 0.1 + patient(1), (i, took)
        server.finish()
