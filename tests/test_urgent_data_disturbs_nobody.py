"""S30, B23: an out-of-band byte makes EPOLLPRI, which must neither crash nor spin."""

import socket
import time

from contract_helpers import every_style, every_trigger, replying, serve
from helpers import SANITIZER, process_cpu_seconds, recv_exact, recv_until_eof, wait_until


@every_style
@every_trigger
def test_it_is_part_of_the_stream_and_the_pool_is_quiet(make_pool, make_client, style, trigger):
    """B23: the engine asks for urgent bytes in line, so none is lost and none is out of its place."""
    got = []

    def answer(sock, data):
        got.append(data)
        sock.send(data)

    pool = serve(make_pool, style, answer, trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(b"before")
    assert recv_exact(client, 6) == b"before"
    client.send(b"!", socket.MSG_OOB)
    assert recv_exact(client, 1) == b"!"
    cpu = process_cpu_seconds()
    time.sleep(0.3)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < (0.25 if SANITIZER else 0.1)
    client.sendall(b"after")
    assert recv_exact(client, 5) == b"after"
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert b"".join(got) == b"before!after"


@every_trigger
def test_urgent_bytes_in_the_middle_of_a_stream(make_pool, make_client, trigger):
    """B23, S29: recv stops at each of them; with edge triggering, too, nothing is left lying."""
    client = make_client(serve(make_pool, "handler", replying(lambda data: data.upper()), trigger=trigger))
    expected = b""
    for i in range(50):
        client.send(b"a%d" % i)
        client.send(b"!", socket.MSG_OOB)
        client.send(b"b%d" % i)
        expected += b"A%d!B%d" % (i, i)
    assert recv_exact(client, len(expected)) == expected


@every_trigger
def test_urgent_data_with_a_fin(make_pool, make_client, trigger):
    """B17, B23: the last thing that the peer does."""
    client = make_client(serve(make_pool, "handler", replying(lambda data: data.upper()), trigger=trigger))
    client.sendall(b"text")
    client.send(b"!", socket.MSG_OOB)
    client.shutdown(socket.SHUT_WR)
    assert recv_until_eof(client) == b"TEXT!"
