"""S3, S8, S9, defects 6 and 9, B01, B02: identity of connections whose descriptor number is used again."""

import contextlib
import os
import struct
import threading

import pytest
from contract_helpers import Gate, echo, every_style, every_trigger, handler, ignore, round_trip, serve
from helpers import connect, recv_exact, reset, scaled, wait_until

from tstpool import ConnectionClosed, TstError


@every_style
def test_sending_on_a_closed_socket_raises_connection_closed(make_pool, make_client, style):
    """S8, bad input: whoever holds the TstSocket may go on asking it things."""
    pool = serve(make_pool, style, echo)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    peer = sock.peer
    client.close()
    wait_until(lambda: sock.fileno() == -1)  # closed alone may be a moment before its slot is free
    for _ in range(3):
        with pytest.raises(ConnectionClosed):
            sock.send(b"x")
    sock.flush(1)  # all that was sent is
    assert sock.close() is False
    assert sock.peer == peer
    assert sock not in pool.sockets()
    assert (sock.thread_no, sock.local, sock.events) == (-1, None, 0)
    assert sock.recv_data.checked_len == 0
    assert issubclass(ConnectionClosed, TstError)
    repr(sock)


def successor(pool, make_client):
    """A closed TstSocket, its old descriptor, and the open TstSocket (with its client) that got the same descriptor."""
    for _ in range(50):
        before = set(pool.sockets())
        first = make_client(pool)
        (old,) = wait_until(lambda before=before: set(pool.sockets()) - before)
        number = old.sd
        first.close()
        wait_until(lambda old=old: old.closed and old not in pool.sockets())
        second = make_client(pool)
        (new,) = wait_until(lambda before=before: set(pool.sockets()) - before)
        if new.sd == number:
            return old, new, second
    raise AssertionError("the kernel never gave the same descriptor again")


@every_style
def test_a_stale_socket_never_reaches_the_new_connection(make_pool, make_client, style):
    """S9, defect 9, B02: need_send, closesocket, send through the old object or the old id."""
    writable = []
    pool = serve(make_pool, style, echo, on_writable=lambda sock: writable.append(sock))
    old, new, client = successor(pool, make_client)
    assert old.id != new.id
    assert pool[new.sd] is new
    for stale in (old, old.id):
        assert pool.need_send(stale) is False
        assert pool.closesocket(stale) is False
    with pytest.raises(ConnectionClosed):
        old.send(b"for the old one")
    with contextlib.suppress(ConnectionClosed):
        old.pause()
    assert old.close() is False
    assert round_trip(client, b"hello") == b"hello"
    assert writable == []
    assert not new.closed


def test_ids_are_never_used_twice(make_pool):
    """S3: 64-bit ids, unique over thousands of connections on few descriptors."""
    ids, numbers = [], set()

    def note(sock):
        ids.append(sock.id)
        numbers.add(sock.sd)

    pool = make_pool(handler(on_connect=note, on_message=ignore), workers=1)
    rounds = scaled(2000)
    for i in range(rounds):
        with connect(pool) as client:
            wait_until(lambda i=i: len(ids) == i + 1)
            reset(client)
    assert len(set(ids)) == rounds
    assert len(numbers) < rounds / 10 + 10
    assert all(0 < number < 2**64 for number in ids)


MESSAGE = struct.Struct(">QQ")  # the sender's connection id, and the id of a connection to close (or 0)


def check_descriptor_reuse(make_pool, rounds, **options):
    """Each round: B speaks while A has B closed, and C comes at once on the freed descriptor.

    Every byte carries the id of the connection that it belongs to; a mismatch anywhere is an error.
    """
    errors, stale, over, spoken = [], [], threading.Event(), threading.Event()
    numbers = set()

    def on_connect(sock):
        numbers.add(sock.sd)
        sock.recv_data.req_len = MESSAGE.size
        sock.send(MESSAGE.pack(sock.id, 0))

    def on_message(sock, data):
        owner, victim = MESSAGE.unpack(data)
        if owner != sock.id:
            errors.append(f"handler of {sock.id:x} got bytes of {owner:x}")
        if victim:
            pool.closesocket(victim)
        with contextlib.suppress(ConnectionClosed):
            sock.send(MESSAGE.pack(sock.id, victim))
        stale.append(sock)
        del stale[:-20]
        spoken.set()

    def disturb():
        while not over.is_set():
            spoken.wait(0.1)
            spoken.clear()
            for sock in list(stale):
                pool.need_send(sock.id)
                if sock.closed:
                    try:
                        sock.send(MESSAGE.pack(sock.id, 1))
                        errors.append(f"{sock.id:x} is closed and takes data")
                    except ConnectionClosed:
                        pass

    pool = make_pool(handler(on_connect=on_connect, on_message=on_message), **options)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for i in range(rounds):
            a, b = connect(pool), connect(pool)
            a_id, b_id = (MESSAGE.unpack(recv_exact(client, MESSAGE.size))[0] for client in (a, b))
            b.sendall(MESSAGE.pack(b_id, 0))
            a.sendall(MESSAGE.pack(a_id, b_id))
            c = connect(pool)
            c_id = MESSAGE.unpack(recv_exact(c, MESSAGE.size))[0]
            c.sendall(MESSAGE.pack(c_id, 0))
            assert MESSAGE.unpack(recv_exact(c, MESSAGE.size)) == (c_id, 0)
            assert MESSAGE.unpack(recv_exact(a, MESSAGE.size)) == (a_id, b_id)
            rest = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := b.recv(100):
                    rest += piece
            assert rest in (b"", MESSAGE.pack(b_id, 0))
            for client in (a, b, c):
                client.close() if i % 8 == 0 else reset(client)
    finally:
        over.set()
        thread.join(10)
    reused = rounds * 3 - len(numbers)
    print(
        f"{rounds} rounds, {3 * rounds} connections on {len(numbers)} descriptors, "
        f"{pool.stats().stale_events} stale events dropped; errors: {errors[:3]}"
    )
    assert errors == []
    assert reused > rounds  # else nothing was tested


@every_trigger
@pytest.mark.parametrize("workers", [1, 2])
def test_no_byte_reaches_the_wrong_connection(make_pool, trigger, workers):
    """Defect 9, B01: 300 rounds in each of the ways."""
    check_descriptor_reuse(make_pool, scaled(300), trigger=trigger, workers=workers)


@pytest.mark.parametrize("rounds", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_byte_reaches_the_wrong_connection_in_many_rounds(make_pool, rounds):
    """Defect 9, B01: the figure that issue 2 asks for."""
    check_descriptor_reuse(make_pool, scaled(rounds), workers=2)


@every_trigger
def test_closing_a_connection_whose_event_waits_in_the_same_batch(make_pool, make_client, trigger):
    """B01: with one worker, held until both have spoken, A's handler closes B; B's event must reach nobody."""
    got = []
    with Gate() as gate:

        def on_message(sock, data):
            got.append(data)
            if data == b"hold":
                gate.wait()
            elif data == b"close others":
                for other in pool.sockets():
                    if other is not sock and other.user_data == "victim":
                        pool.closesocket(other)

        def on_connect(sock):
            sock.user_data = "victim" if len(pool) > 2 else "first two"

        pool = make_pool(handler(on_connect=on_connect, on_message=on_message), workers=1, trigger=trigger)
        holder, closer = make_client(pool), make_client(pool)
        # Not for len(pool): both may be accepted, and victims as well, before on_connect is called for them.
        wait_until(lambda: sum(sock.user_data == "first two" for sock in pool.sockets()) == 2)
        victims = [make_client(pool) for _ in range(20)]
        wait_until(lambda: len(pool) == 22)
        wait_until(lambda: sum(sock.user_data == "victim" for sock in pool.sockets()) == 20)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        closer.sendall(b"close others")
        for victim in victims:
            victim.sendall(b"victim speaks")
        heirs = [make_client(pool) for _ in range(20)]  # they wait for the descriptors in the backlog
        gate.open()
        for heir in heirs:
            heir.sendall(b"heir speaks")
        wait_until(lambda: got.count(b"heir speaks") == 20)
        wait_until(lambda: len(pool) == 22)
    assert got.count(b"close others") == 1
    assert got.count(b"heir speaks") == 20
    assert b"victim speaks" not in got[got.index(b"close others") :]


@every_trigger
def test_events_that_are_left_over_for_a_connection_that_has_ended_are_dropped(make_pool, make_client, trigger):
    """Defect 9, B01, B10: one poll brings more than a turn receives; before the rest is looked at, victims are closed
    and heirs accepted on their descriptors. The victims' events are counted as stale and reach nobody."""
    got = {"victim": 0, "heir": 0}
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"hold":
                gate.wait()
            elif data == b"close victims":
                for other in pool.sockets():
                    if other.user_data == "victim":
                        pool.closesocket(other)
            elif data in (b"victim", b"heir"):
                got[data.decode()] += 1
                sock.send(data)

        def on_connect(sock):
            sock.user_data = roles[min(len(accepted), len(roles) - 1)]
            accepted.append(sock.sd)

        roles = ["holder", "closer", *["filler"] * 40, *["victim"] * 20, "heir"]
        accepted = []
        pool = make_pool(handler(on_connect=on_connect, on_message=on_message), workers=1, trigger=trigger)
        clients = []
        for i in range(len(roles) - 1):
            clients.append(make_client(pool))
            wait_until(lambda i=i: len(accepted) == i + 1)
        holder, closer, fillers, victims = clients[0], clients[1], clients[2:42], clients[42:]
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        # The kernel reports in the order in which descriptors became readable: the listener before the victims.
        closer.sendall(b"close victims")
        for filler in fillers:
            filler.sendall(b"x" * 60_000)
        heirs = [make_client(pool) for _ in victims]
        for victim in victims:
            victim.sendall(b"victim")
        gate.open()
        for heir in heirs:
            assert round_trip(heir, b"heir") == b"heir"
        wait_until(lambda: len(pool) == len(clients))
        assert set(accepted[len(clients) :]) & set(accepted[42 : len(clients)])  # numbers were used again
        stats = pool.stats()
        assert 0 < stats.stale_reused <= stats.stale_events
    assert got == {"victim": 0, "heir": len(heirs)}


@every_trigger
def test_a_duplicate_that_outlives_its_connection_makes_no_events(make_pool, make_client, trigger):
    """Defect 9, B03, B45: epoll forgets a descriptor with its last duplicate only; the pool must take it out itself."""
    pool = make_pool(handler(on_message=echo), trigger=trigger, workers=1)
    client = make_client(pool)
    round_trip(client, b"hello")
    (sock,) = pool.sockets()
    duplicate = os.dup(sock.sd)
    try:
        pool.closesocket(sock)
        wait_until(lambda: len(pool) == 0)
        client.sendall(b"to nobody")
        client.close()
        for _ in range(20):
            assert round_trip(make_client(pool), b"hello") == b"hello"
        assert pool.stats().stale_events == 0
    finally:
        os.close(duplicate)


def test_the_table_finds_by_descriptor(make_pool, make_client):
    """S3: pool[sd], len(pool), sockets(); listeners are not in it."""
    pool = make_pool(handler(on_message=ignore))
    clients = [make_client(pool) for _ in range(5)]
    wait_until(lambda: len(pool.sockets()) == 5)
    assert len(pool) == 5
    snapshot = pool.sockets()
    assert {sock.peer for sock in snapshot} == {client.getsockname() for client in clients}
    assert all(pool[sock.sd] is sock for sock in snapshot)
    assert len({sock.id for sock in snapshot}) == 5
    for wrong in (10**6, -1, clients[0].fileno()):
        with pytest.raises(KeyError):
            pool[wrong]
    clients.pop().close()
    wait_until(lambda: len(pool) == 4)
    assert len(snapshot) == 5  # a snapshot does not change


def test_the_table_grows_far_beyond_its_first_size(make_pool, make_client):
    """S3: hundreds at once, all found."""
    pool = make_pool(handler(on_message=echo), workers=2)
    clients = [make_client(pool) for _ in range(600)]
    wait_until(lambda: len(pool) == 600)
    assert all(pool[sock.sd] is sock for sock in pool.sockets())
    for client in clients[::37]:
        assert round_trip(client, b"hello") == b"hello"
