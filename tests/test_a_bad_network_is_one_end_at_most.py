"""B64: small segments, packets that are lost or out of order, peers that are gone, sockets aborted from outside."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time

import pytest
from contract_helpers import (
    TRIGGERS,
    Gate,
    echo,
    every_trigger,
    exchange,
    handler,
    in_threads,
    open_sockets,
    round_trip,
)
from helpers import SANITIZER, connect, patient, process_cpu_seconds, recv_exact, wait_until
from network_helpers import (
    FarNetwork,
    configure,
    drop_every_fifth_packet,
    drop_everything,
    in_a_network_of_its_own,
    packets_dropped,
)

from tstpool import TstPool, TstSockType


def ended(make_pool, on_message=echo, **options):
    """A pool, and the list of (socket's id, reason) of all ends."""
    ends = []
    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, reason: ends.append((sock.id, reason))), **options
    )
    return pool, ends


@every_trigger
@pytest.mark.parametrize("size", [88, 536])
def test_small_segments(make_pool, trigger, size):
    """B64: TCP_MAXSEG of 536, and of the least that Linux takes: the same bytes, in thousands of segments."""
    pool, ends = ended(make_pool, trigger=trigger, workers=2)
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, size)
        client.settimeout(patient(20))
        client.connect(pool.addresses[0])
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= size
        data = os.urandom(1_000_000)
        assert exchange(client, data) == data
    wait_until(lambda: ends)
    assert [reason for _, reason in ends] == [None]


def abort(client):
    """ss -K: the kernel ends the server's side of the connection, as an administrator would."""
    port, ours = client.getpeername()[1], client.getsockname()[1]
    command = ["ss", "-K", "-t", "sport", "=", f":{port}", "dport", "=", f":{ours}"]
    subprocess.run(command, capture_output=True, timeout=patient(20))


def skip_unless_sockets_can_be_aborted():
    if shutil.which("ss") is None or os.getuid():
        pytest.skip("needs ss and root")
    with socket.create_server(("127.0.0.1", 0)) as listener, connect(listener.getsockname()) as client:
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(0.5)
            abort(client)
            try:
                theirs.recv(1)
            except ConnectionAbortedError:
                return
            except TimeoutError:
                pass
    pytest.skip("this kernel aborts no sockets (CONFIG_INET_DIAG_DESTROY)")


@every_trigger
def test_a_socket_that_is_aborted_from_outside(make_pool, trigger):
    """B64: idle, with output that waits, and in the middle of a handler: HUP and ERR together; one end each."""
    skip_unless_sockets_can_be_aborted()
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"wait":
                gate.wait()
            sock.send(bytes(32 << 20) if data == b"much" else data)

        pool, ends = ended(make_pool, on_message, trigger=trigger, workers=4)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(pool)) for _ in range(4)]
            for client in clients:
                round_trip(client, b"hello")
            idle, full, busy, other = clients
            full.sendall(b"much")
            recv_exact(full, 1)
            busy.sendall(b"wait")
            wait_until(lambda: gate.inside)
            for client in (idle, full, busy):
                abort(client)
            wait_until(lambda: len(ends) == 2)
            cpu = process_cpu_seconds()
            time.sleep(0.3)  # a window to measure in, not a wait
            assert process_cpu_seconds() - cpu < (0.2 if SANITIZER else 0.1)  # nobody spins on the busy one
            assert len(ends) == 2
            gate.open()
            wait_until(lambda: len(ends) == 3)
            assert round_trip(other, b"others go on") == b"others go on"
            wait_until(lambda: len(pool) == 1)  # the last on_disconnect has begun, and may not have returned
        wait_until(lambda: len(pool) == 0)
    assert len({number for number, _ in ends}) == len(ends) == 4
    assert sum(isinstance(reason, ConnectionError) for _, reason in ends) == 3


def tcp_counter(name):
    """One of the kernel's counters, of this thread's network."""
    with open("/proc/thread-self/net/netstat") as netstat:
        names, numbers = [line.split() for line in netstat if line.startswith("TcpExt:")]
    return int(numbers[names.index(name)])


@every_trigger
def test_a_link_that_drops_packets(make_pool, trigger):
    """B64: a token bucket with a short queue: what does not fit is lost, and TCP sends it again, also out of order."""

    def talk():
        try:
            configure("tc qdisc add dev lo root tbf rate 100mbit burst 4kb limit 12000")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no token bucket: {error.stderr}")
        pool, ends = ended(make_pool, trigger=trigger, workers=2)
        with connect(pool) as first, connect(pool) as second:
            data = os.urandom(2_000_000)
            in_threads(*(lambda client=client: check(client, data) for client in (first, second)))
        wait_until(lambda: len(ends) == 2)
        assert [reason for _, reason in ends] == [None, None]
        dropped = int(re.search(r"dropped (\d+)", configure("tc -s qdisc show dev lo"))[1])
        early = tcp_counter("TCPOFOQueue")
        print(f"{dropped} packets were lost, {early} came before those that they were behind")
        assert dropped > 10
        assert early > 10
        pool.stop()

    def check(client, data):
        assert exchange(client, data) == data

    in_a_network_of_its_own(talk)


@pytest.mark.slow
@every_trigger
def test_a_link_that_loses_every_fifth_packet(make_pool, trigger):
    """B64: messages, acknowledgements, farewells; all of it arrives, in order, and each connection has one end, a clean
    one."""

    def talk():
        pool, ends = ended(make_pool, trigger=trigger, workers=2)
        with contextlib.ExitStack() as stack:
            # TCP waits twice as long after each loss: nine in a row of one packet take two minutes.
            clients = [stack.enter_context(connect(pool, 100)) for _ in range(8)]
            open_sockets(pool, len(clients))
            drop_every_fifth_packet()
            data = os.urandom(60_000)
            in_threads(*(lambda client=client: check(client, data) for client in clients), timeout=100)
        wait_until(lambda: len(ends) == len(clients), 30)
        assert [reason for _, reason in ends] == [None] * len(clients)
        dropped = packets_dropped()
        print(f"{dropped} packets were lost")
        assert dropped > 20
        pool.stop()

    def check(client, data):
        for size in (1, 100, 5000, len(data)):
            assert exchange(client, data[:size]) == data[:size]

    in_a_network_of_its_own(talk)


def test_a_peer_whose_packets_no_longer_come(make_pool):
    """B64: the link goes down in mid-conversation. Who is idle for too long, or takes nothing, is closed, once."""

    def talk():
        pool, ends = ended(
            make_pool,
            lambda sock, data: sock.send(bytes(32 << 20) if data == b"much" else data) and None,
            workers=2,
            idle_timeout=patient(1),
            write_timeout=patient(1),
        )
        with connect(pool) as idle, connect(pool) as full:
            round_trip(idle, b"hello")
            full.sendall(b"much")
            recv_exact(full, 1)
            configure("ip link set lo down")
            idle.sendall(b"a request that does not arrive")
            wait_until(lambda: len(ends) == 2)
            wait_until(lambda: len(pool) == 0)
            configure("ip link set lo up")
            with connect(pool) as client:
                assert round_trip(client, b"hello") == b"hello"
            wait_until(lambda: len(ends) == 3)
            assert len({number for number, _ in ends}) == 3
        pool.stop()

    in_a_network_of_its_own(talk)


def test_a_silent_peer_that_does_not_answer_the_kernels_questions_is_gone(make_pool):
    """B64: keepalive=, with no idle_timeout: what was accepted and what was connected hears of it, once each, with
    every trigger. Without keepalive= a silent peer stays; the other deadlines are off."""

    def talk():
        far = FarNetwork()
        asking = [
            ended(make_pool, listen=(far.NEAR, 0), trigger=trigger, idle_timeout=None, keepalive=1)
            for trigger in TRIGGERS
        ]
        lenient, its_ends = ended(make_pool, listen=(far.NEAR, 0), idle_timeout=None)
        with contextlib.ExitStack() as stack:
            with far:
                clients = [stack.enter_context(connect(pool)) for pool, _ in asking for _ in range(3)]
                clients.append(stack.enter_context(connect(lenient)))
                listener = stack.enter_context(socket.create_server((far.FAR, 0)))
            for client in clients:
                round_trip(client, b"hello")
            for pool, _ in asking:
                pool.connect(*listener.getsockname())
            time.sleep(2.5)  # the kernel asks, and is answered: nobody ends
            assert [ends for _, ends in asking] == [[]] * len(TRIGGERS)
            begin = time.monotonic()
            with far:
                drop_everything("v1")
            for pool, ends in asking:
                wait_until(lambda ends=ends: len(ends) == 4, 30)
                assert time.monotonic() - begin > 2
                wait_until(lambda pool=pool: len(pool) == 0)
                assert {type(reason) for _, reason in ends} == {TimeoutError}
                assert len({number for number, _ in ends}) == 4
            assert (its_ends, len(lenient)) == ([], 1)
            for pool in (*(pool for pool, _ in asking), lenient):
                pool.stop(0.1)
        far.close()

    in_a_network_of_its_own(talk)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), (32768, ValueError), ("1", TypeError)])
def test_a_keepalive_that_the_kernel_does_not_have_is_refused(wrong, error):
    """Bad input: whole seconds, as many as fit."""
    with pytest.raises(error, match=r"keepalive|integer"):
        TstPool(handler(on_message=echo), keepalive=wrong)


def test_keepalive_does_no_harm_to_unix_sockets(make_pool, make_client, tmp_path):
    """B64: they have no such option."""
    path = f"unix:{tmp_path}/socket"
    make_pool(handler(on_message=echo), listen=(path, 0), keepalive=5)
    assert round_trip(make_client(path), b"hello") == b"hello"


def test_output_that_a_dead_peer_never_acknowledges_ends_by_the_users_own_option(make_pool):
    """B64: TCP_USER_TIMEOUT of a listener that the user has made: what it accepts has it too, and the kernel's error is
    the one reason of the end. The write_timeout is no help here: the kernel has taken all of the output."""

    def talk():
        far = FarNetwork()
        pool, ends = ended(make_pool, listen=None, idle_timeout=None)
        listener = socket.create_server((far.NEAR, 0))
        address = listener.getsockname()
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
        pool.addsocket(listener, TstSockType.LISTEN)
        with far, connect(address) as client:
            round_trip(client, b"hello")
            (sock,) = pool.sockets()
            drop_everything("v1")
            sock.send(b"to nobody")
            wait_until(lambda: ends, 20)
            wait_until(lambda: len(pool) == 0)
        assert [type(reason) for _, reason in ends] == [TimeoutError]
        pool.stop()
        far.close()

    in_a_network_of_its_own(talk)
