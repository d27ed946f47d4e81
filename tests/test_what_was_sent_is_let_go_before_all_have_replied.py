"""B34, B35: a large object that was sent is held no longer, although handlers of others have yet to run."""

import contextlib
import selectors
import time

import pytest
from contract_helpers import ServerProcess
from helpers import SANITIZER, connect, patient, recv_exact

PEERS = 250  # as many as one epoll_wait tells of
REPLY = 1 << 20
MOST = 32 << 20  # that may wait for all peers together

SERVER = """
def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

class Handler(TstHandler):
    def on_connect(self, sock):
        sock.send(b"h")

    def on_message(self, sock, data):
        if data == b"block":
            sys.stdin.readline()       # until all have asked
            before.append(memory("VmRSS"))
            go.set()
        elif {pieces} == 1:
            return b"r" * {reply}
        else:
            for _ in range({pieces}):
                sock.send(b"r" * ({reply} // {pieces}))

before, go = [], threading.Event()
pool = TstPool(Handler(), workers=1, max_total_queued={most}, slow_handler=60)
print(pool.listen("127.0.0.1", 0)[1])
pool.start()
go.wait()
sys.stdin.read()
print(memory("VmHWM") - before[0], pool.stats().overflow_refused)
pool.stop(0)
"""


def read_replies(clients):
    """Reads from all of them at once, until each has had its reply."""
    missing = dict.fromkeys(clients, REPLY)
    deadline = time.monotonic() + patient(20)
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        while missing:
            assert time.monotonic() < deadline, f"{len(missing)} replies do not come"
            for key, _ in selector.select(1):
                client = key.fileobj
                data = client.recv(1 << 18)
                assert data == b"r" * len(data) != b""
                missing[client] -= len(data)
                if missing[client] == 0:
                    selector.unregister(client)
                    del missing[client]


@pytest.mark.parametrize("pieces", [1, 4, 64], ids=["returned", "sent in 4 pieces", "sent in 64 pieces"])
def test_many_that_ask_at_once(pieces):
    """B34, B35: for a megabyte each, which they read."""
    code = SERVER.format(pieces=pieces, reply=REPLY, most=MOST)
    with ServerProcess(code) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.addr)) for _ in range(PEERS + 1)]
        for client in clients:
            assert recv_exact(client, 1) == b"h"
        blocker = clients.pop()
        blocker.sendall(b"block")
        for client in clients:
            client.sendall(b"?")
        server.process.stdin.write("go\n")
        server.process.stdin.flush()
        read_replies(clients)
        more, refused = map(int, server.finish().split())
    print(f"at most {more >> 20} MiB more than before")
    assert refused == 0
    assert SANITIZER or more < 2 * MOST
