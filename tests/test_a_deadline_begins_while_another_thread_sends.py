"""B38: a handler returns while another thread is still giving the connection's output to the kernel. Whatever comes of
that, a deadline has begun: nobody else would look.

A library before libc makes the moment longer: one large send() rests behind what it has done. With a GIL that thread
would keep the handler from returning; there it takes a worker that has taken over to bring this about, and luck.
"""

import select
import socket

import pytest
from contract_helpers import ServerProcess, shim
from helpers import FREE_THREADED, SANITIZER, patient

SLOW_SEND = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/socket.h>
#include <unistd.h>

int tst_rests, tst_at_rest;  /* the next large send shall rest; it does */

ssize_t send(int fd, const void *bytes, size_t size, int flags) {
    static ssize_t (*real)(int, const void *, size_t, int);
    if (!real) real = (ssize_t (*)(int, const void *, size_t, int))dlsym(RTLD_NEXT, "send");
    ssize_t result = real(fd, bytes, size, flags);
    if (size >= 100000 && __sync_bool_compare_and_swap(&tst_rests, 1, 0)) {
        __sync_lock_test_and_set(&tst_at_rest, 1);
        usleep(1000000);
    }
    return result;
}
"""

SERVER = """
import ctypes, threading
rests, at_rest = (ctypes.c_int.in_dll(ctypes.CDLL(None), name) for name in ("tst_rests", "tst_at_rest"))

class Careless(Echo):
    def on_message(self, sock, data):
        with socket.socket(fileno=os.dup(sock.fileno())) as same:  # its buffer shall not grow, either
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        rests.value = 1
        threading.Thread(target=self.send_much, args=(sock,)).start()
        while not at_rest.value:  # that thread has sent something, and does not know yet how much was taken
            time.sleep(0.001)

    def send_much(self, sock):
        try:
            while True:
                sock.send(bytes(4 << 20))
        except TstError:
            pass

    def on_disconnect(self, sock, reason):
        print("end", flush=True)

pool = TstPool(Careless(), workers=3, write_timeout=0.5, first_byte_timeout=600, idle_timeout=600, **OPTIONS)
print(pool.listen("127.0.0.1", 0)[1], flush=True)
pool.start()
sys.stdin.read()
pool.stop(0)
"""


@pytest.mark.skipif(not FREE_THREADED, reason="who sends has the GIL")
@pytest.mark.skipif(bool(SANITIZER), reason="its runtime has a send of its own")
@pytest.mark.parametrize("on_overflow", ["raise", "block"])
def test_a_peer_that_takes_nothing_of_what_another_thread_sends(on_overflow):
    """It has half a second, counted from when that thread began."""
    code = SERVER.replace("OPTIONS", repr({"on_overflow": on_overflow}))
    with ServerProcess(code, preload=shim("slow-send", SLOW_SEND)) as server:
        with socket.socket() as client:
            # So that its buffer is full at once: room for more would bring an event, and somebody would look.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.addr)
            client.sendall(b"much")
            assert select.select([server.process.stdout], [], [], 3 + patient(5))[0], "it is still there"
        server.finish()
