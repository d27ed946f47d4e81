"""S7: exclude= takes what stands for a connection anywhere else: a TstSocket, its id, its descriptor."""

import pytest
from contract_helpers import handler, ignore, open_sockets
from helpers import recv_exact

EXCLUDED = {  # of three sockets, and who of them still gets it
    "an id": (lambda a, b, c: a.id, [False, True, True]),
    "a descriptor": (lambda a, b, c: b.sd, [True, False, True]),
    "ids": (lambda a, b, c: [a.id, b.id], [False, False, True]),
    "descriptors": (lambda a, b, c: {a.sd, c.sd}, [False, True, False]),
    "a mixture": (lambda a, b, c: iter((a, b.id, c.sd)), [False, False, False]),
    "one twice": (lambda a, b, c: (a.id, a.id, a.sd), [False, True, True]),
    "strangers": (lambda a, b, c: [a.id + (1 << 40), 2**70, -1, b.id], [True, False, True]),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_ids_and_descriptors_alone_or_among_others(make_pool, make_client, name):
    """S7: the others get it, and are counted."""
    pool = make_pool(handler(on_message=ignore))
    clients = [make_client(pool) for _ in range(3)]
    by_peer = {sock.peer: sock for sock in open_sockets(pool, 3)}
    excluded, expected = EXCLUDED[name]
    sockets = [by_peer[client.getsockname()] for client in clients]
    assert pool.broadcast(b"news", exclude=excluded(*sockets)) == sum(expected)
    assert pool.broadcast(b"|ends") == 3
    texts = [b"news|ends" if gets else b"|ends" for gets in expected]
    assert [recv_exact(client, len(text)) for client, text in zip(clients, texts, strict=True)] == texts


@pytest.mark.parametrize("wrong", ["1", [None], [1.5]], ids=repr)
def test_anything_else_is_refused(make_pool, make_client, wrong):
    """S7: and nobody gets it."""
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    open_sockets(pool, 1)
    with pytest.raises(TypeError):
        pool.broadcast(b"news", exclude=wrong)
    assert pool.broadcast(b"|ends") == 1
    assert recv_exact(client, 5) == b"|ends"
