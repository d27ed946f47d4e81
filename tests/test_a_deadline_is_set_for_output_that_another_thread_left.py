"""B38, B35: a worker has looked for the last time and found nothing to send; then another thread sends what the peer
does not take. It is the worker that sends it, once more, and sets the deadline for it."""

import pytest
from contract_helpers import ServerProcess, shim
from helpers import SANITIZER, connect

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="the shim would rest in its runtime's own calls, too")

REST = r"""
/* The extension's next pthread_mutex_lock after tst_rest was set is late: by a second. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

int tst_rest, tst_rests;
static char *low, *high;

void tst_watch(char *from, char *to) { low = from; high = to; }

int pthread_mutex_lock(pthread_mutex_t *mutex) {
    static int (*real)(pthread_mutex_t *);
    char *caller = __builtin_return_address(0);
    if (!real) real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (caller >= low && caller < high && __sync_bool_compare_and_swap(&tst_rest, 1, 0)) {
        __sync_add_and_fetch(&tst_rests, 1);
        usleep(1000000);
    }
    return real(mutex);
}
"""

SERVER = """
import ctypes
shim = ctypes.CDLL(None)
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if tstpool._core.__file__ in line]
shim.tst_watch(ctypes.c_void_p(int(places[0][0], 16)), ctypes.c_void_p(int(places[-1][1], 16)))
rest, rests = (ctypes.c_int.in_dll(shim, name) for name in ("tst_rest", "tst_rests"))
ended = threading.Event()

class Server(TstHandler):
    def on_message(self, sock, data):
        threading.Thread(target=send, args=(sock,)).start()
        rest.value = 1

    def on_disconnect(self, sock, reason):
        print(type(reason).__name__, flush=True)
        ended.set()

def send(sock):
    while not rests.value:
        time.sleep(0.001)
    sock.send(bytes(8 << 20))

pool = TstPool(Server(), workers=1, first_byte_timeout=None, idle_timeout=600, write_timeout=0.5, max_queued=None)
print(pool.listen("127.0.0.1", 0)[1])
pool.start()
ended.wait(20)
print(ended.is_set(), rests.value)
pool.stop(0)
"""


def test_a_peer_that_takes_nothing_of_it_is_cut_off():
    with ServerProcess(SERVER, preload=shim("rest", REST)) as server, connect(server.addr) as client:
        client.sendall(b"hello")
        assert server.process.stdout.readline() == "TimeoutError\n"
        assert server.process.stdout.readline() == "True 1\n"  # finish() would not see what came with the first
        server.finish()
