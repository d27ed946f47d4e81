"""S1, S4, S29: all three re-arm rules, any number of workers and both entry styles give the same bytes."""

import fcntl
import os
import random
import threading

import pytest
from contract_helpers import (
    TRIGGERS,
    echo,
    every_style,
    every_trigger,
    exchange,
    in_threads,
    one_two_and_eight_workers,
    round_trip,
    serve,
)
from helpers import scaled, wait_until


@every_style
@every_trigger
@one_two_and_eight_workers
def test_small_messages_come_back_in_order(make_pool, make_client, style, trigger, workers):
    """S4, S29: each message reaches the handler, and its reply the client."""
    pool = serve(make_pool, style, echo, trigger=trigger, workers=workers)
    client = make_client(pool)
    for i in range(scaled(300)):
        text = f"message {i}".encode()
        assert round_trip(client, text) == text


@every_style
@every_trigger
@one_two_and_eight_workers
def test_a_megabyte_comes_back_unchanged(make_pool, make_client, style, trigger, workers):
    """S1, S29: far more than any buffer, sent and received at once."""
    pool = serve(make_pool, style, echo, trigger=trigger, workers=workers)
    data = random.Random(1).randbytes(scaled(2 << 20))
    assert exchange(make_client(pool), data) == data


@every_style
@every_trigger
@one_two_and_eight_workers
def test_many_clients_at_once_each_get_their_own_bytes(make_pool, make_client, style, trigger, workers):
    """S3, S4: fifty connections talking at the same time are kept apart."""
    pool = serve(make_pool, style, echo, trigger=trigger, workers=workers)
    clients = [make_client(pool) for _ in range(50)]

    def talk(part):
        for i in range(scaled(20)):
            for client in part:
                client.sendall(b"%08d-%08d" % (client.fileno(), i))
            for client in part:
                assert client.recv(17) == b"%08d-%08d" % (client.fileno(), i)

    in_threads(*(lambda part=clients[i::5]: talk(part) for i in range(5)))


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_byte_at_a_time_arrives_whole(make_pool, make_client, trigger):
    """S16, S29: a message in single bytes loses none of them, whichever event brings each."""
    got, done = bytearray(), threading.Event()

    def collect(sock, data):
        got.extend(data)
        if len(got) == 500:
            done.set()

    client = make_client(serve(make_pool, "handler", collect, trigger=trigger, workers=2))
    text = bytes(range(250)) * 2
    for i in range(500):
        client.send(text[i : i + 1])
    assert done.wait(10)
    assert got == text


@every_style
def test_accepted_sockets_do_not_block_and_are_not_inherited(make_pool, make_client, style):
    """S1, defect 5: O_NONBLOCK and FD_CLOEXEC are set on every accepted descriptor."""
    pool = serve(make_pool, style, echo)
    make_client(pool)
    (sock,) = wait_until(pool.sockets)
    assert fcntl.fcntl(sock.sd, fcntl.F_GETFL) & os.O_NONBLOCK
    assert fcntl.fcntl(sock.sd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert sock.fileno() == sock.sd
