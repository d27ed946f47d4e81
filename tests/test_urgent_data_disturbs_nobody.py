"""S30, B23: an out-of-band byte makes EPOLLPRI, which must neither crash nor spin."""

import socket
import time

from contract_helpers import every_style, every_trigger, replying, serve
from helpers import process_cpu_seconds, recv_exact, wait_until


@every_style
@every_trigger
def test_the_bytes_around_it_are_served_and_the_pool_is_quiet(make_pool, make_client, style, trigger):
    """B23: the urgent byte itself is not part of the stream."""
    got = []

    def answer(sock, data):
        got.append(data)
        sock.send(data)

    pool = serve(make_pool, style, answer, trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(b"before")
    assert recv_exact(client, 6) == b"before"
    client.send(b"!", socket.MSG_OOB)
    cpu = process_cpu_seconds()
    time.sleep(0.3)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < 0.15
    client.sendall(b"after")
    assert recv_exact(client, 5) == b"after"
    assert b"".join(got).replace(b"!", b"") == b"beforeafter"
    client.send(b"1", socket.MSG_OOB)
    client.sendall(b"and once more")
    assert recv_exact(client, 13) == b"and once more"
    client.close()
    wait_until(lambda: len(pool) == 0)


def test_urgent_data_with_a_fin(make_pool, make_client):
    """B17, B23: the last thing that the peer does."""
    client = make_client(serve(make_pool, "handler", replying(lambda data: data.upper())))
    client.sendall(b"text")
    client.send(b"!", socket.MSG_OOB)
    client.shutdown(socket.SHUT_WR)
    assert recv_exact(client, 4) == b"TEXT"
    assert client.recv(1) == b""
