"""What the tests of compiled handlers (tests/downstream) share beyond helpers.py and contract_helpers.py."""

from contract_helpers import exchange
from helpers import patient, recv_exact, wait_until

from tstpool import LengthPrefixed

FRAMING = LengthPrefixed(4)


def pack(*bodies):
    """Messages in FRAMING, one behind the other."""
    return b"".join(len(body).to_bytes(4, "big") + body for body in bodies)


def receive(sock, n=1):
    """The next n messages in FRAMING."""
    return [recv_exact(sock, int.from_bytes(recv_exact(sock, 4), "big")) for _ in range(n)]


def say(sock, *bodies):
    """Sends these messages at once, and returns as many."""
    sock.sendall(pack(*bodies))
    return receive(sock, len(bodies))


def stream(sock, bodies):
    """As say(), for more than socket buffers hold, when the same is expected back: True if it comes."""
    data = pack(*bodies)
    return exchange(sock, data) == data


def wait_counts(handler, timeout=10, **expected):
    """Waits until the counts of a downstream_handlers.Counting are these, and nothing is broken."""

    def found():
        counts = handler.counts
        return all(counts[name] == value for name, value in expected.items())

    wait_until(found, timeout, lambda: f"{expected} in {handler.counts}")
    counts = handler.counts
    assert counts["broken"] == 0
    return counts


def socket_of(pool, client):
    """The pool's socket for this client."""
    return wait_until(
        lambda: next((sock for sock in pool.sockets() if sock.peer == client.getsockname()), None), patient(10)
    )
