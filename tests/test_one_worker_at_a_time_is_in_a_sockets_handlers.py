"""S15, S23, defect 7, B06, B52: at most one worker in the handlers of a socket, whatever others ask of it."""

import threading

from contract_helpers import Gate, every_style, every_trigger, in_threads, open_sockets, serve
from helpers import scaled, wait_until


class Crowd:
    """Hooks that count who is inside, for each connection."""

    def __init__(self):
        self.inside, self.most, self.calls = {}, 0, []
        self.lock = threading.Lock()

    def hook(self, name):
        def visit(sock, *args):
            with self.lock:
                count = self.inside[sock.id] = self.inside.get(sock.id, 0) + 1
                self.most = max(self.most, count)
                self.calls.append((name, sock.id))
            threading.Event().wait(0)  # gives the other workers a chance to come in, too
            with self.lock:
                self.inside[sock.id] -= 1

        return visit


@every_style
@every_trigger
def test_however_many_events_come_for_it(make_pool, make_client, style, trigger):
    """S15, defect 7: messages, need_send from four threads and the end, on eight workers."""
    crowd = Crowd()
    pool = serve(
        make_pool,
        style,
        crowd.hook("message"),
        on_connect=crowd.hook("connect"),
        on_writable=crowd.hook("writable"),
        on_disconnect=crowd.hook("disconnect"),
        trigger=trigger,
        workers=8,
    )
    clients = [make_client(pool) for _ in range(3)]
    sockets = open_sockets(pool, 3)
    rounds = scaled(200)

    def poke():
        for i in range(rounds):
            pool.need_send(sockets[i % 3])

    def talk():
        for i in range(rounds):
            clients[i % 3].send(b"x")

    in_threads(poke, poke, poke, poke, talk)
    # Workers that were held up may have called nobody yet; and who is at its end is not called for need_send.
    wait_until(lambda: len({call for call in crowd.calls[:] if call[0] in ("message", "writable")}) == 6)
    for client in clients:
        client.close()
    wait_until(lambda: sum(name == "disconnect" for name, _ in crowd.calls) == 3)
    assert crowd.most == 1
    for sock in sockets:
        own = [name for name, number in crowd.calls if number == sock.id]
        assert own[0] == "connect"
        assert own[-1] == "disconnect"
        assert own.count("connect") == own.count("disconnect") == 1
        assert own.count("message") > 0 < own.count("writable")


@every_style
@every_trigger
def test_closing_waits_for_the_running_handler(make_pool, make_client, style, trigger):
    """S23, B52: closesocket from outside while the handler runs; on_disconnect comes after it, once."""
    order = []
    with Gate() as gate:

        def slow(sock, data):
            gate.wait()
            order.append("handler ends")

        pool = serve(
            make_pool,
            style,
            slow,
            on_disconnect=lambda sock, reason: order.append("disconnect"),
            trigger=trigger,
            workers=4,
        )
        make_client(pool).sendall(b"x")
        (sock,) = wait_until(pool.sockets)
        wait_until(lambda: gate.inside)
        assert sorted(in_threads(*[lambda: pool.closesocket(sock)] * 4)) == [False, False, False, True]
        assert order == []
        gate.open()
        wait_until(lambda: len(order) == 2)
    wait_until(lambda: len(pool) == 0)
    assert order == ["handler ends", "disconnect"]


@every_style
def test_a_users_lock_works_between_workers(make_pool, make_client, style):
    """S39: threading.Lock takes the place of m_mutexWork."""
    lock, total = threading.Lock(), [0]

    def count(sock, data):
        with lock:
            before = total[0]
            threading.Event().wait(0)
            total[0] = before + len(data)

    pool = serve(make_pool, style, count, workers=8)
    rounds = scaled(100)
    clients = [make_client(pool) for _ in range(8)]
    for _ in range(rounds):
        for client in clients:
            client.send(b"x")
    wait_until(lambda: total[0] == 8 * rounds)
