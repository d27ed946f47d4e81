"""S26, defect 4, B17: what arrives together with a FIN is delivered, then the socket is closed, once."""

import socket

import pytest
from contract_helpers import every_style, every_trigger, handler, serve
from helpers import connect, scaled, wait_until


def burst(address, text, cork):
    """Data and FIN at once: in one segment (MSG_MORE holds the data back), or one right after the other."""
    with connect(address) as client:
        client.send(text, socket.MSG_MORE if cork else 0)
        client.shutdown(socket.SHUT_WR)


def check_bursts(make_pool, style, rounds, **options):
    ended = []

    def collect(sock, data):
        sock.user_data = (sock.user_data or b"") + data

    pool = serve(
        make_pool, style, collect, on_disconnect=lambda sock, reason: ended.append((sock.user_data, reason)), **options
    )
    address = pool.addresses[0]
    texts = [b"message %06d " % i * (1 + i % 7) for i in range(rounds)]
    for i, text in enumerate(texts):
        burst(address, text, cork=i % 2)
    wait_until(lambda: len(ended) >= rounds, 30, lambda: f"{len(ended)} of {rounds} disconnects")
    wait_until(lambda: len(pool) == 0)
    lost = set(texts) - {text for text, _ in ended}
    print(f"{rounds} bursts, {len(ended)} disconnects, {len(lost)} messages lost")
    assert sorted(ended) == sorted((text, None) for text in texts)


@every_style
@every_trigger
@pytest.mark.parametrize("workers", [1, 2])
def test_every_message_is_delivered_before_one_disconnect(make_pool, style, trigger, workers):
    """S26, defect 4, B17: 200 bursts in each of the ways."""
    check_bursts(make_pool, style, scaled(200), trigger=trigger, workers=workers)


@pytest.mark.parametrize("rounds", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_bursts_lose_nothing(make_pool, rounds):
    """S26, defect 4, B17: the figure that issue 2 asks for."""
    check_bursts(make_pool, "handler", scaled(rounds), workers=2)


@every_trigger
def test_a_megabyte_with_fin_is_delivered_whole(make_pool, trigger):
    """S26, B17: more than one turn reads, and the FIN waits in the socket meanwhile."""
    size, ended = 1 << 20, []

    def collect(sock, data):
        sock.user_data = (sock.user_data or 0) + len(data)

    def end(sock, reason):
        ended.append((sock.user_data, reason))

    pool = make_pool(handler(on_message=collect, on_disconnect=end), trigger=trigger)
    with connect(pool) as client:
        client.sendall(b"x" * size)
    wait_until(lambda: ended)
    assert ended == [(size, None)]
