"""S26, defect 4, B18: a client that shuts its writing side down still receives everything."""

import socket
import threading

import pytest
from contract_helpers import Gate, echo, every_style, every_trigger, replying, serve
from helpers import recv_until_eof, scaled, wait_until


@every_style
@every_trigger
def test_the_reply_to_a_half_closed_client_arrives_whole(make_pool, make_client, style, trigger):
    """B18: request and FIN at once, half a megabyte of reply, then EOF."""
    reasons = []
    pool = serve(
        make_pool,
        style,
        replying(lambda data: data * (128 << 10)),
        on_disconnect=lambda sock, reason: reasons.append(reason),
        trigger=trigger,
        workers=2,
    )
    for i in range(scaled(20)):
        client = make_client(pool)
        client.send(b"ab%02d" % i, socket.MSG_MORE)
        client.shutdown(socket.SHUT_WR)
        assert recv_until_eof(client) == b"ab%02d" % i * (128 << 10)
        client.close()
    wait_until(lambda: len(reasons) == scaled(20))
    assert set(reasons) == {None}


@every_style
def test_a_handler_that_is_still_running_at_the_fin_may_answer(make_pool, make_client, style):
    """B18: the FIN comes while the handler works; its answer is sent, on_disconnect waits for it."""
    order = []
    with Gate() as gate:

        def slow(sock, data):
            gate.wait()
            order.append("handler")
            sock.send(b"answer to " + data)

        pool = serve(make_pool, style, slow, on_disconnect=lambda sock, reason: order.append("disconnect"), workers=2)
        client = make_client(pool)
        client.sendall(b"question")
        wait_until(lambda: gate.inside)
        client.shutdown(socket.SHUT_WR)
        gate.open()
        assert recv_until_eof(client) == b"answer to question"
        wait_until(lambda: len(order) == 2)
    assert order == ["handler", "disconnect"]


@pytest.mark.parametrize("size", [1, 100_000])
def test_input_of_any_size_before_the_half_close_is_answered(make_pool, make_client, size):
    """B18: everything that came before the FIN is echoed before the pool closes."""
    pool = serve(make_pool, "handler", echo, workers=2)
    client = make_client(pool)
    sender = threading.Thread(target=lambda: (client.sendall(b"q" * size), client.shutdown(socket.SHUT_WR)))
    sender.start()
    received = recv_until_eof(client)
    sender.join(10)
    assert received == b"q" * size
