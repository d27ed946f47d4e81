"""S1, S12, defects 5 and 8, B28: partial writes."""

import random
import socket
import threading
import time

import pytest
from contract_helpers import (
    ServerProcess,
    every_style,
    every_trigger,
    handler,
    ignore,
    in_threads,
    replying,
    round_trip,
    serve,
    shim,
)
from helpers import patient, scaled, wait_until

from tstpool import ConnectionClosed, TstStat

DATA = random.Random(8).randbytes(scaled(8 << 20, minimum=1 << 20))
# More than the kernel's buffers of both sides take, however many rounds a test makes.
MORE_THAN_BUFFERS = random.Random(9).randbytes(8 << 20)


def slow_client(address, receive_buffer=4096):
    """A client whose kernel takes little: SO_RCVBUF must be set before it connects."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(patient(10))
    client.connect(address)
    return client


def receive(client, size, step=1 << 14):
    received = bytearray()
    while len(received) < size:
        piece = client.recv(step)
        assert piece, f"closed after {len(received)} bytes"
        received += piece
    return received


@every_style
@every_trigger
def test_eight_megabytes_to_a_slow_reader_arrive_exactly(make_pool, style, trigger):
    """B28: one sock.send of 8 MiB, sent in thousands of writes."""
    pool = serve(make_pool, style, replying(lambda data: DATA), trigger=trigger, workers=2)
    with slow_client(pool.addresses[0]) as client:
        client.sendall(b"go")
        assert receive(client, len(DATA)) == DATA


@every_style
@every_trigger
def test_a_send_transfer_to_a_slow_reader_arrives_exactly(make_pool, style, trigger):
    """S12, defect 8: TstStat.SEND takes as many EPOLLOUTs as needed; EAGAIN never moves com_len; then one call."""
    size, finished = 1 << 20, []

    def start(sock, data):
        sock.send_data.resize(size)
        sock.send_data.s[:] = DATA[:size]
        sock.send_data.req_len = size
        return TstStat.SEND

    def sent(sock):
        finished.append(sock.send_data.com_len)

    pool = serve(make_pool, style, start, on_writable=sent, trigger=trigger, workers=2)
    with slow_client(pool.addresses[0]) as client:
        client.sendall(b"go")
        assert receive(client, size) == DATA[:size]
        wait_until(lambda: finished)
    assert finished == [size]


@every_style
@every_trigger
def test_a_peer_that_does_not_read_does_not_park_the_only_worker(make_pool, make_client, style, trigger):
    """Defect 5: the output of a deaf peer is queued; the one worker goes on serving others."""
    pool = serve(
        make_pool,
        style,
        replying(lambda data: DATA if data == b"flood" else data),
        trigger=trigger,
        workers=1,
    )
    deaf, other = make_client(pool), make_client(pool)
    deaf.sendall(b"flood")
    deaf.recv(1)
    for i in range(50):
        assert round_trip(other, b"%d" % i) == b"%d" % i


def test_many_sends_from_one_thread_arrive_in_order(make_pool):
    """DESIGN 3: sends of one thread keep their order, queued or not."""
    pool = make_pool(handler(on_message=ignore), workers=2)
    with slow_client(pool.addresses[0]) as client:
        (sock,) = wait_until(pool.sockets)
        expected = b"".join(b"%06d," % i * 50 for i in range(2000))
        for i in range(2000):
            sock.send(b"%06d," % i * 50)
        assert receive(client, len(expected)) == expected


def test_flush_returns_when_the_kernel_has_everything(make_pool):
    """SPEC: flush blocks the calling thread until the queue is empty."""
    pool = make_pool(handler(on_message=ignore))
    with slow_client(pool.addresses[0]) as client:
        (sock,) = wait_until(pool.sockets)
        sock.flush(timeout=1)  # nothing queued: at once
        sock.send(DATA[: 4 << 20])
        reader = threading.Thread(target=receive, args=(client, len(DATA[: 4 << 20])))
        reader.start()
        sock.flush(timeout=patient(20))
        reader.join(10)
        assert pool.stats().bytes_out == len(DATA[: 4 << 20])


@every_trigger
def test_threads_that_flush_at_once_send_each_byte_once(make_pool, make_client, trigger):
    """DESIGN 3: four threads and the workers flush one queue: one of them at a time, or bytes go out twice."""
    rounds, size, threads = scaled(40, minimum=10), 50_000, 4
    pool = make_pool(handler(on_message=ignore), workers=2, trigger=trigger)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)

    def speak(who):
        for i in range(rounds):
            sock.send(b"%d:%05d," % (who, i) * (size // 8))
            sock.flush(patient(20))

    total = threads * rounds * (size // 8) * 8
    *_, received = in_threads(
        *(lambda who=who: speak(who) for who in range(threads)), lambda: receive(client, total, 1 << 18)
    )
    calls = [bytes(received[i : i + size]) for i in range(0, total, size)]
    assert sorted(calls) == sorted(b"%d:%05d," % (w, i) * (size // 8) for w in range(threads) for i in range(rounds))
    assert pool.stats().bytes_out == total


def test_flush_gives_up_after_its_timeout(make_pool):
    """SPEC: TimeoutError, and the connection goes on."""
    pool = make_pool(handler(on_message=ignore))
    with slow_client(pool.addresses[0]) as client:
        (sock,) = wait_until(pool.sockets)
        sock.send(MORE_THAN_BUFFERS)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            sock.flush(timeout=0.1)
        assert 0.09 < time.monotonic() - begin < patient(3)
        assert receive(client, len(MORE_THAN_BUFFERS)) == MORE_THAN_BUFFERS


def test_flush_ends_when_the_connection_does(make_pool, make_client):
    """SPEC: ConnectionClosed, not a hang."""
    pool = make_pool(handler(on_message=ignore))
    client = slow_client(pool.addresses[0])
    (sock,) = wait_until(pool.sockets)
    sock.send(MORE_THAN_BUFFERS)
    closer = threading.Timer(0.05, client.close)  # unread data: a reset
    closer.start()
    with pytest.raises(ConnectionClosed):
        sock.flush(timeout=10)
    closer.join()
    with pytest.raises(ConnectionClosed):
        sock.flush()


TIMED_SENDS = r"""
/* For LD_PRELOAD: looks at each send and sendmsg. Is its descriptor non-blocking, has the thread gone to sleep in it,
   and how much of the processor's time has it taken? (Not how long: that is also time in which others were running.) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

int tst_sends, tst_full, tst_blocking, tst_slept, tst_slow;

static long microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static long sleeps(void) {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

#define TIMED(call, size) \
    long before = sleeps(), begin = microseconds(); \
    ssize_t result = call; \
    __sync_add_and_fetch(&tst_slow, microseconds() - begin > 1000); \
    __sync_add_and_fetch(&tst_slept, sleeps() != before); \
    __sync_add_and_fetch(&tst_full, result < (ssize_t)(size)); \
    __sync_add_and_fetch(&tst_blocking, !(fcntl(fd, F_GETFL) & O_NONBLOCK)); \
    __sync_add_and_fetch(&tst_sends, 1); \
    return result;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t send(int fd, const void *p, size_t n, int f) { TIMED(REAL(send)(fd, p, n, f), n) }
ssize_t sendmsg(int fd, const struct msghdr *m, int f) {
    size_t i, all = 0;
    for (i = 0; i < m->msg_iovlen; i++) all += m->msg_iov[i].iov_len;
    TIMED(REAL(sendmsg)(fd, m, f), all)
}
"""

MUCH = """
import ctypes
names = ("sends", "full", "blocking", "slept", "slow")
counts = [ctypes.c_int.in_dll(ctypes.CDLL(None), "tst_" + name) for name in names]
size = int(os.environ["SIZE"])

class Much(TstHandler):
    def on_message(self, sock, data):
        sock.send(bytes(range(256)) * (size // 256) if data == b"much" else data)

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what it accepts inherits that
listener.bind(("127.0.0.1", 0))
listener.listen()
pool = TstPool(Much(), workers=1, trigger=os.environ["TRIGGER"])
print(listener.getsockname()[1])
pool.addsocket(listener, TstSockType.LISTEN)
pool.start()
sys.stdin.read()
print(*(count.value for count in counts))
pool.stop()
"""


@every_trigger
@pytest.mark.parametrize(("size", "pause"), [(1 << 20, 0.0005), pytest.param(8 << 20, 0.01, marks=pytest.mark.slow)])
def test_a_worker_never_waits_in_send(make_client, trigger, size, pause):
    """B28: to a peer that reads a kilobyte now and then, with the least buffers there are: each send is to a
    descriptor that does not block, none puts the worker to sleep, hardly any takes it a millisecond; others are served
    meanwhile."""
    env = {"TRIGGER": trigger, "SIZE": str(size)}
    with ServerProcess(MUCH, env=env, preload=shim("timed-sends", TIMED_SENDS)) as server:
        other = make_client(server.addr)
        with slow_client(server.addr, 2048) as client:
            client.sendall(b"much")
            received = 0
            while received < size:
                piece = client.recv(1024)
                assert piece == (bytes(range(256)) * 5)[received % 256 :][: len(piece)]
                received += len(piece)
                if received // 1024 % 16 == 0:
                    assert round_trip(other, b"hello") == b"hello"
                time.sleep(pause)  # what makes the peer slow
        sends, full, blocking, slept, slow = map(int, server.finish().split())
    print(f"{sends} sends, {full} of them cut short, {slept} slept, {slow} took a millisecond of a processor")
    assert sends > 100
    assert full > 10
    assert blocking == 0
    assert slept <= sends // 100  # the kernel may have to wait for the lock of a socket that its other end holds
    assert slow <= sends // 100
