"""B14, B16: handlers block, so that shards have no worker of their own; whoever is left looks after all of them."""

import contextlib
import itertools
import threading
import time
from collections import defaultdict

import pytest
from contract_helpers import Gate, ServerProcess, handler, round_trip, shim
from helpers import connect, patient, recv_exact, wait_until

from tstpool import Fixed


def answer(sock):
    """One byte: the number of the worker."""
    sock.send(bytes([sock.thread_no]))


def by_worker(clients):
    """{worker: those whom it has answered}."""
    answered = defaultdict(list)
    for client in clients:
        answered[round_trip(client, b"?")[0]].append(client)
    return answered


def shards_of(clients, number):
    """{worker: the connections of its shard}, once each shard has a worker of its own. The listener counts as one."""
    least = (len(clients) + 1) // number - 1
    return wait_until(
        lambda: len(found := by_worker(clients)) == number and min(map(len, found.values())) >= least and found, 2
    )


def is_answered(client, seconds):
    client.settimeout(patient(seconds))
    with contextlib.suppress(TimeoutError):
        round_trip(client, b"?")
        return True
    return False


@pytest.mark.parametrize("shard", range(3))
def test_a_shard_whose_worker_helps_another_one_is_polled_by_a_third(make_pool, make_client, shard):
    """B14: two handlers of one batch block, and the last of three workers slept in a third shard all the while."""
    with Gate() as gate:
        stuck = []

        def on_message(sock, data):
            if data == b"b":
                gate.wait()
            elif data == b"2":
                for client in stuck:
                    client.sendall(b"b")  # they come while this handler runs, so the next poll brings both
                time.sleep(0.0007)  # the one who was woken to look after this shard falls asleep again
            answer(sock)

        pool = make_pool(handler(on_message=on_message), workers=3, shards=3, busy_poll=0)
        clients = [make_client(pool) for _ in range(12)]
        shards = shards_of(clients, 3)
        first, *rest = shards.pop(shard)
        stuck[:] = rest[:2]
        others = [first, *rest[2:]]
        others += itertools.chain(*shards.values())  # these are last: one of them would wake the worker who sleeps
        first.sendall(b"2")
        recv_exact(first, 1)
        wait_until(lambda: gate.inside == 2)
        for client in others:
            assert is_answered(client, 1)
        assert gate.inside == 2
        gate.open()
        for client in stuck:
            recv_exact(client, 1)


def test_a_shard_that_runs_is_looked_after_when_the_watcher_leaves_for_on_idle(make_pool, make_client):
    """B14: on_idle blocks, and the handler, too, as soon as the watcher has left; the last worker slept meanwhile."""
    idle_time = patient(1.2)
    begin = time.monotonic()
    blocked = threading.Event()
    with Gate() as gate:
        asleep = idle_counts = None

        def watcher_has_left(worker):
            now = [each.idle_count for each in pool.stats().workers]
            return any(now[no] > idle_counts[no] for no in range(3) if no not in (worker, asleep))

        def on_message(sock, data):
            if data == b"?":
                return answer(sock)
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:  # not for longer: the shard of a call that is long is taken over
                if watcher_has_left(sock.thread_no):
                    blocked.set()
                    return gate.wait()

        def on_idle(worker):
            if idle_counts and worker != asleep:
                gate.wait()

        hooks = handler(on_message=on_message, on_idle=on_idle)
        pool = make_pool(hooks, workers=3, shards=2, framing=Fixed(1), idle_time=idle_time, busy_poll=0)
        clients = [make_client(pool) for _ in range(6)]
        wait_until(lambda: time.monotonic() > begin + 0.75 * idle_time)  # so that the watcher is idle first
        shards = shards_of(clients, 2)
        asleep, running = shards
        idle_counts = [worker.idle_count for worker in pool.stats().workers]
        computing, *others = shards[running]
        computing.sendall(b"c" * int(patient(500)))
        blocked.wait(idle_time / 2)  # not where threads wait so long for a processor that their shards change hands
        for client in others + shards[asleep]:
            assert is_answered(client, 0.5)


REST = r"""
/* For LD_PRELOAD. Who finds first that a thread sleeps (/proc/self/task/N/stat) rests behind the pthread_mutex_unlock
   that follows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

int tst_found;
static __thread int tired;

ssize_t read(int fd, void *to, size_t n) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    ssize_t got = real(fd, to, n);
    if (got > 0 && memmem(to, got, ") S ", 4) && __sync_bool_compare_and_swap(&tst_found, 0, 1)) tired = 1;
    return got;
}

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    static int (*real)(pthread_mutex_t *);
    if (!real) real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    int result = real(mutex);
    if (tired) {
        tired = 0;
        usleep(200000);
    }
    return result;
}
"""

SERVER = """
import ctypes
found = ctypes.c_int.in_dll(ctypes.CDLL(None), "tst_found")

class Blocking(TstHandler):
    def on_message(self, sock, data):
        while data == b"b" and not found.value:
            time.sleep(0.001)
        sock.send(bytes([sock.thread_no]))

pool = TstPool(Blocking(), workers=2, shards=2, busy_poll=0)
print(pool.listen("127.0.0.1", 0)[1])
pool.start()
sys.stdin.read()
print(found.value)
pool.stop()
"""


def test_a_shard_that_is_given_up_while_a_worker_is_parked_gets_that_one():
    """B16: that one was parked first, as the watcher; else two shards share a worker for good, which never sleeps."""
    with ServerProcess(SERVER, preload=shim("rest-after-look", REST)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.addr)) for _ in range(4)]
        stuck = shards_of(clients, 2)[0][0]
        stuck.sendall(b"b")
        recv_exact(stuck, 1)
        shards_of(clients, 2)
        assert server.finish() == "1\n"
