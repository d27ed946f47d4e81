"""S7, S8, defect 6, B58, B59: pool.broadcast."""

import pytest
from contract_helpers import every_style, handler, ignore, in_threads, open_sockets, round_trip, serve
from helpers import recv_exact, recv_until_eof, reset, scaled, wait_until


def open_clients(pool, make_client, count):
    clients = [make_client(pool) for _ in range(count)]
    by_peer = {sock.peer: sock for sock in open_sockets(pool, count)}
    return clients, [by_peer[client.getsockname()] for client in clients]


@every_style
def test_everybody_gets_it(make_pool, make_client, style):
    """S7: the number of sockets that it was queued on is returned."""
    pool = serve(make_pool, style, ignore)
    assert pool.broadcast(b"nobody hears this") == 0
    clients, _sockets = open_clients(pool, make_client, 20)
    assert pool.broadcast(b"news") == 20
    assert [recv_exact(client, 4) for client in clients] == [b"news"] * 20


def test_except_those_who_are_excluded(make_pool, make_client):
    """DESIGN 4: one socket, or several."""
    pool = make_pool(handler(on_message=ignore))
    clients, sockets = open_clients(pool, make_client, 5)
    assert pool.broadcast(b"one", exclude=sockets[0]) == 4
    assert pool.broadcast(b"two", exclude=sockets[:2]) == 3
    assert pool.broadcast(b"thr", exclude=iter(sockets[:3])) == 2
    assert pool.broadcast(b"nil", exclude=set(sockets)) == 0
    assert pool.broadcast(b"all", exclude=()) == 5
    expected = [b"all", b"oneall", b"onetwoall", b"onetwothrall", b"onetwothrall"]
    assert [recv_exact(client, len(text)) for client, text in zip(clients, expected, strict=True)] == expected


def test_only_those_who_are_wanted(make_pool, make_client):
    """DESIGN 4: where= is asked for each socket."""
    pool = make_pool(handler(on_message=ignore))
    clients, sockets = open_clients(pool, make_client, 6)
    for i, sock in enumerate(sockets):
        sock.user_data = i
    assert pool.broadcast(b"even", where=lambda sock: sock.user_data % 2 == 0) == 3
    assert pool.broadcast(b"four", where=lambda sock: sock.user_data % 2 == 0, exclude=sockets[0]) == 2
    pool.broadcast(b"|")
    expected = [b"even|", b"|", b"evenfour|", b"|", b"evenfour|", b"|"]
    assert [recv_exact(client, len(text)) for client, text in zip(clients, expected, strict=True)] == expected


def test_an_error_in_where_reaches_the_caller(make_pool, make_client):
    """Bad input: and harms nothing."""

    def tell(sock, data):
        pool.broadcast(data)

    pool = make_pool(handler(on_message=tell))
    clients, _sockets = open_clients(pool, make_client, 2)
    with pytest.raises(ZeroDivisionError):
        pool.broadcast(b"x", where=lambda sock: 1 / 0)
    with pytest.raises(TypeError):
        pool.broadcast("text")
    assert round_trip(clients[0], b"hello") == b"hello"
    assert recv_exact(clients[1], 5) == b"hello"


@every_style
def test_from_a_handler(make_pool, make_client, style):
    """B59: to all, itself included."""

    def tell(sock, data):
        pool.broadcast(data)

    pool = serve(make_pool, style, tell, workers=4)
    clients, _sockets = open_clients(pool, make_client, 10)
    for i, client in enumerate(clients):
        client.sendall(b"%d speaks" % i)
        assert {recv_exact(other, 8) for other in clients} == {b"%d speaks" % i}


def test_a_walk_sees_who_was_there_when_it_began(make_pool, make_client):
    """B59: the handler sends to each of sockets() and closes it, itself too, in the middle of the walk; and so does the
    `where` of a broadcast."""
    walked = []

    def tell(sock, data):
        if data == b"walk":
            walk = pool.sockets()
            for other in walk:
                other.send(b"bye")
                assert other.close() is True
                walked.append(other)
            assert len(walk) == 5
        else:
            walked.append(pool.broadcast(b"news", where=lambda other: other.send(b"first ") and not other.close()))

    pool = make_pool(handler(on_message=tell), workers=4)
    for data, expected in ((b"walk", b"bye"), (b"broadcast", b"first ")):
        walked.clear()
        clients, sockets = open_clients(pool, make_client, 5)
        clients[2].sendall(data)
        assert [recv_until_eof(client) for client in clients] == [expected] * 5
        wait_until(lambda: len(pool) == 0)
        assert set(walked) == set(sockets) or walked == [0]


def test_from_several_threads_each_message_whole_and_in_its_threads_order(make_pool, make_client):
    """B58, DESIGN 3: four threads, all sockets; every client hears each thread in order."""
    rounds, length, speakers = scaled(300), 100, 4
    pool = make_pool(handler(on_message=ignore), workers=2)
    clients, _sockets = open_clients(pool, make_client, 8)

    def speak(who):
        for i in range(rounds):
            assert pool.broadcast(b"%d:%06d" % (who, i) + b"." * (length - 8)) == 8

    def listen():
        return [recv_exact(client, speakers * rounds * length) for client in clients]

    *_, heard = in_threads(*(lambda who=who: speak(who) for who in range(speakers)), listen)
    for text in heard:
        messages = [text[i : i + length] for i in range(0, len(text), length)]
        for who in range(speakers):
            own = [message for message in messages if message.startswith(b"%d:" % who)]
            assert own == [b"%d:%06d" % (who, i) + b"." * (length - 8) for i in range(rounds)]


def test_while_connections_come_and_go(make_pool, make_client):
    """B58, defect 6: those who leave are simply not counted; those who stay miss nothing."""
    rounds = scaled(300)
    pool = make_pool(handler(on_message=ignore), workers=2)
    (stays,), _ = open_clients(pool, make_client, 1)

    def speak():
        for i in range(rounds):
            assert pool.broadcast(b"%06d" % i) >= 1

    def churn():
        for i in range(rounds):
            client = make_client(pool)
            reset(client) if i % 2 else client.close()

    *_, heard = in_threads(speak, churn, churn, lambda: recv_exact(stays, 6 * rounds))
    assert heard == b"".join(b"%06d" % i for i in range(rounds))
    wait_until(lambda: len(pool) == 1)


def test_where_is_asked_about_all_before_anything_is_sent(make_pool, make_client):
    asked = []

    def where(sock):
        asked.append(sock)
        return 1 // (4 - len(asked))  # it raises for the last

    pool = make_pool(handler(on_message=ignore))
    clients = [make_client(pool) for _ in range(4)]
    wait_until(lambda: len(pool.sockets()) == 4)
    with pytest.raises(ZeroDivisionError):
        pool.broadcast(b"never", where=where)
    assert pool.broadcast(b"all") == 4
    assert [recv_exact(client, 3) for client in clients] == [b"all"] * 4


def test_where_is_a_function_also_when_nobody_is_there(make_pool):
    with pytest.raises(TypeError, match="where must be a function"):
        make_pool(handler(on_message=ignore)).broadcast(b"x", where=5)
