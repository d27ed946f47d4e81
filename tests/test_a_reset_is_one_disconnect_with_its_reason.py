"""S26, B19, B20, B21, B22: RST in every place a peer can put one."""

import contextlib
import time

from contract_helpers import echo, every_style, every_trigger, handler, ignore, replying, round_trip, serve
from helpers import SANITIZER, process_cpu_seconds, reset, scaled, wait_until


@every_style
@every_trigger
def test_a_reset_mid_conversation(make_pool, make_client, style, trigger):
    """S26, B19: on_disconnect once, with ConnectionResetError."""
    reasons = []
    pool = serve(
        make_pool,
        style,
        echo,
        on_disconnect=lambda sock, reason: reasons.append(reason),
        trigger=trigger,
    )
    client = make_client(pool)
    round_trip(client, b"hello")
    reset(client)
    wait_until(lambda: reasons)
    wait_until(lambda: len(pool) == 0)
    assert [type(reason) for reason in reasons] == [ConnectionResetError]
    assert round_trip(make_client(pool), b"others go on") == b"others go on"


@every_trigger
def test_data_before_the_reset_is_delivered_first(make_pool, make_client, trigger):
    """B19: the bytes had arrived, so the handler gets them."""
    ended, rounds = [], scaled(100)

    def collect(sock, data):
        sock.user_data = (sock.user_data or b"") + data

    def end(sock, reason):
        ended.append((sock.user_data, type(reason)))

    pool = make_pool(handler(on_message=collect, on_disconnect=end), trigger=trigger, workers=2)
    for i in range(rounds):
        client = make_client(pool)
        client.sendall(b"last words %d" % i)
        reset(client)
    wait_until(lambda: len(ended) >= rounds)
    wait_until(lambda: len(pool) == 0)
    assert sorted(ended, key=str) == sorted(
        ((b"last words %d" % i, ConnectionResetError) for i in range(rounds)), key=str
    )


def test_a_reset_while_output_is_queued(make_pool, make_client):
    """B21: the peer goes away while the pool waits to write; the output is dropped, on_disconnect comes once."""
    reasons = []
    pool = make_pool(
        handler(
            on_message=replying(lambda data: b"z" * (16 << 20)),
            on_disconnect=lambda sock, reason: reasons.append(reason),
        )
    )
    client = make_client(pool)
    client.sendall(b"x")
    client.recv(1)
    reset(client)
    wait_until(lambda: len(pool) == 0)
    wait_until(lambda: reasons)
    assert [isinstance(reason, ConnectionError) for reason in reasons] == [True]


def test_a_storm_of_resets_leaves_a_quiet_pool_that_serves(make_pool, make_client):
    """B20, B21, B22: resets before accept, before and after a request; no spin afterwards, counters balance."""
    connects, ends = [], []
    pool = make_pool(
        handler(
            on_connect=lambda sock: connects.append(sock.id),
            on_message=echo,
            on_disconnect=lambda sock, reason: ends.append(sock.id),
        ),
        workers=2,
    )
    for i in range(scaled(1000)):
        client = make_client(pool)
        with contextlib.suppress(ConnectionError):
            if i % 3:
                client.send(b"request")
            if i % 3 == 2:
                client.recv(7)
        reset(client)
    assert round_trip(make_client(pool), b"hello") == b"hello"
    wait_until(lambda: len(pool) == 1)
    wait_until(lambda: len(ends) == len(connects) - 1)
    assert len(set(ends)) == len(ends)
    stats = pool.stats()
    assert stats.accepted == stats.closed + 1
    cpu = process_cpu_seconds()
    time.sleep(0.4)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < (0.2 if SANITIZER else 0.05)


def test_the_disconnect_of_a_clean_close_has_no_reason(make_pool, make_client):
    """S23: None means that the peer closed cleanly."""
    reasons = []
    pool = make_pool(handler(on_disconnect=lambda sock, reason: reasons.append(reason), on_message=ignore))
    make_client(pool).close()
    wait_until(lambda: reasons)
    assert reasons == [None]
