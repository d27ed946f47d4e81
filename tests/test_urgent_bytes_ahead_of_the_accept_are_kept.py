"""B23: a peer may send urgent bytes before its connection has been accepted, or the moment it has accepted ours."""

import contextlib
import socket
import threading

from contract_helpers import every_trigger, handler
from helpers import connect, quick_switches, scaled, wait_until

from tstpool import TstSockType

SENT = b"ABCrest"


def send_urgently(sock):
    """A, B and C are urgent one after the other; of those that are not in line only the last could be had."""
    for byte in b"ABC":
        sock.send(bytes([byte]), socket.MSG_OOB)
    sock.sendall(b"rest")


class Heard:
    """Notes what each peer has sent."""

    def __init__(self):
        self.data = {}
        self.handler = handler(on_message=self.on_message)

    def on_message(self, sock, data):
        self.data[sock.peer] = self.data.get(sock.peer, b"") + data

    def check(self, peers):
        """All of them are heard to the end, with nothing missing."""
        wait_until(lambda: all(self.data.get(peer, b"").endswith(b"rest") for peer in peers))
        assert [self.data[peer] for peer in peers] == [SENT] * len(peers)


@contextlib.contextmanager
def sending_at_once(listener):
    """A server on a thread of its own that speaks first, until the block ends."""

    def serve():
        with contextlib.ExitStack() as accepted, contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                send_urgently(accepted.enter_context(sock))

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        server.join()


@every_trigger
def test_of_a_listener_that_the_pool_made(make_pool, make_client, trigger):
    """B23: all have connected and sent before anybody accepts."""
    heard = Heard()
    pool = make_pool(heard.handler, start=False, trigger=trigger, workers=2)
    clients = [make_client(pool) for _ in range(5)]
    for client in clients:
        send_urgently(client)
    pool.start()
    heard.check([client.getsockname() for client in clients])


@every_trigger
def test_of_a_listener_that_was_handed_over(make_pool, make_client, trigger):
    """B23: addsocket() makes it one like the pool's own."""
    heard = Heard()
    pool = make_pool(heard.handler, listen=None, start=False, trigger=trigger, workers=2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        pool.addsocket(listener, TstSockType.LISTEN)
    clients = [make_client(address) for _ in range(5)]
    for client in clients:
        send_urgently(client)
    pool.start()
    heard.check([client.getsockname() for client in clients])


def test_of_a_pool_that_accepts_at_once(make_pool):
    """B23: it runs, and has nothing else to do; for some of the clients it is not fast enough."""
    heard = Heard()
    pool = make_pool(heard.handler, workers=1)
    peers = []
    with quick_switches():
        for _ in range(scaled(100, minimum=20)):
            with connect(pool) as client:
                send_urgently(client)
                peers.append(client.getsockname())
                heard.check(peers[-1:])


@every_trigger
def test_of_a_server_that_sends_as_soon_as_it_accepts(make_pool, trigger):
    """B23: connect() has not returned when they arrive, some of the times."""
    heard = Heard()
    pool = make_pool(heard.handler, listen=None, trigger=trigger, workers=1)
    with socket.create_server(("127.0.0.1", 0)) as listener, quick_switches(1e-6), sending_at_once(listener):
        for _ in range(scaled(60, minimum=20)):
            heard.data.clear()
            sock = pool.connect(*listener.getsockname())
            heard.check([sock.peer])
            sock.close(abort=True)
