"""Issue 2, defects 1 and 2, B11, B12, B14: blocking handlers, and the wake-ups of those who are free."""

import contextlib
import random
import socket
import threading
import time

import pytest
from contract_helpers import (
    TRIGGERS,
    Gate,
    ServerProcess,
    blocking,
    echo,
    every_style,
    every_trigger,
    handler,
    ignore,
    in_threads,
    round_trip,
    serve,
)
from helpers import PATIENCE, SANITIZER, connect, patient, process_cpu_seconds, recv_exact, scaled, wait_until


@every_style
@every_trigger
def test_seven_of_eight_workers_are_blocked_and_the_others_are_served(make_pool, make_client, style, trigger):
    """B14: new and old connections; the blocked ones get their answers afterwards."""
    with Gate() as gate:
        pool = serve(make_pool, style, blocking(gate), trigger=trigger, workers=8)
        old = [make_client(pool) for _ in range(5)]
        for client in old:
            round_trip(client, b"hello")
        stuck = [make_client(pool) for _ in range(7)]
        for client in stuck:
            client.sendall(b"block")
        wait_until(lambda: gate.inside == 7)
        for client in [*old, *(make_client(pool) for _ in range(5))]:
            for i in range(20):
                assert round_trip(client, b"%d" % i) == b"%d" % i
        assert gate.inside == 7
        gate.open()
        assert [recv_exact(client, 5) for client in stuck] == [b"block"] * 7


@every_style
@every_trigger
def test_a_block_in_the_middle_of_a_batch(make_pool, make_client, style, trigger):
    """B14: fifty clients speak at once, one of their handlers blocks; the other 49 are answered."""
    for _ in range(scaled(5)):
        with Gate() as gate:
            pool = serve(make_pool, style, blocking(gate), trigger=trigger, workers=2)
            clients = [make_client(pool) for _ in range(50)]
            wait_until(lambda pool=pool: len(pool) == 50)
            for i, client in enumerate(clients):
                client.sendall(b"block" if i == 20 else b"hello")
            for i, client in enumerate(clients):
                if i != 20:
                    assert recv_exact(client, 5) == b"hello"
            gate.open()
            assert recv_exact(clients[20], 5) == b"block"
            for client in clients:
                client.close()
            pool.stop()


@every_style
@every_trigger
def test_all_workers_blocked_is_quiet_and_everything_is_served_afterwards(make_pool, make_client, style, trigger):
    """Defect 2, B12: a thousand messages and new connections wait, no CPU is used; then all are served.

    They wait in the kernel, which nobody asks as long as nobody is free: so the number of them is no counter of
    stats(), but pool.waiting() asks.
    """
    with Gate() as gate:
        pool = serve(make_pool, style, blocking(gate), trigger=trigger, workers=4)
        stuck = [make_client(pool) for _ in range(4)]
        waiting = [make_client(pool) for _ in range(1000)]
        wait_until(lambda: len(pool) == 1004)
        for client in stuck:
            client.sendall(b"block")
        wait_until(lambda: gate.inside == 4)
        assert pool.waiting() == 0
        waiting += [make_client(pool) for _ in range(100)]
        for i, client in enumerate(waiting):
            client.sendall(b"%05d" % i)
        wait_until(lambda: pool.waiting() == 1000)  # nobody has accepted the last hundred
        cpu = process_cpu_seconds()
        time.sleep(0.5)  # a window to measure in, not a wait
        assert process_cpu_seconds() - cpu < (0.4 if SANITIZER else 0.1)
        gate.open()
        assert [recv_exact(client, 5) for client in waiting] == [b"%05d" % i for i in range(1100)]
        assert [recv_exact(client, 5) for client in stuck] == [b"block"] * 4
        assert pool.waiting() == 0


@every_trigger
def test_a_handler_that_sends_much_and_then_blocks_takes_no_cpu(make_pool, make_client, trigger):
    """B12: another worker sends it meanwhile. That relieves the connection, of which only the stuck one can take note:
    the others must not try over and over."""

    def answer(sock, _data):
        sock.send(bytes(200_000))
        gate.wait()

    with Gate() as gate:
        client = make_client(make_pool(handler(on_message=answer), trigger=trigger, workers=3))
        client.sendall(b"hello")
        assert recv_exact(client, 200_000) == bytes(200_000)
        cpu = process_cpu_seconds()
        time.sleep(0.5)  # a window to measure in, not a wait
        assert process_cpu_seconds() - cpu < (0.4 if SANITIZER else 0.1)


def test_input_of_a_paused_connection_waits_for_no_worker(make_pool, make_client):
    """B12: pool.waiting() counts what is late, not what nobody wants yet."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=blocking(gate)), workers=1)
        stuck, paused, other = (make_client(pool) for _ in range(3))
        wait_until(lambda: len(pool.sockets()) == 3)
        (sock,) = (sock for sock in pool.sockets() if sock.peer == paused.getsockname())
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside)
        sock.pause()
        paused.sendall(b"nobody wants this")
        other.sendall(b"hello")
        wait_until(lambda: pool.waiting() == 1)
        sock.resume()
        assert pool.waiting() == 2
        gate.open()
        assert recv_exact(other, 5) == b"hello"
        assert recv_exact(paused, 17) == b"nobody wants this"
    assert pool.waiting() == 0


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_others_do_not_feel_a_handler_that_blocks(make_pool, make_client, trigger):
    """B14: the slowest in a hundred round trips of four others, with one of four workers blocked and without, in turns:
    the medians of seven rounds each."""
    seen = {False: [], True: []}
    pools = {}
    with Gate() as gate:
        for blocked in (False, True):
            pools[blocked] = make_pool(handler(on_message=blocking(gate)), trigger=trigger, workers=4)
        others = {blocked: [make_client(pool) for _ in range(4)] for blocked, pool in pools.items()}
        stuck = make_client(pools[True])
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside)
        for _ in range(7):
            for blocked, clients in others.items():
                took = sorted(second for client in clients for second in ping_pong(client, scaled(100, minimum=25)))
                seen[blocked].append(took[len(took) * 99 // 100])
        assert gate.inside == 1
        gate.open()
        assert recv_exact(stuck, 5) == b"block"
    free, beside = (sorted(seen[blocked])[3] for blocked in (False, True))
    print(f"p99 {free * 1e3:.2f} ms without, {beside * 1e3:.2f} ms beside the handler that blocks")
    assert beside < 3 * free + patient(0.005)


def test_blocking_more_often_than_there_are_workers(make_pool, make_client):
    """B12: twenty blocking requests on four workers; each gets its turn when one is free."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=blocking(gate)), workers=4)
        clients = [make_client(pool) for _ in range(20)]
        for client in clients:
            client.sendall(b"block")
        wait_until(lambda: gate.inside == 4)
        gate.open()
        assert [recv_exact(client, 5) for client in clients] == [b"block"] * 20


def test_sends_of_a_blocked_handler_and_of_others_to_it_go_out(make_pool, make_client):
    """DESIGN 3: what a stuck handler has sent so far is not held back for ever: other workers send it."""
    with Gate() as gate:

        def answer(sock, data):
            if data == b"block":
                sock.send(b"in progress;")
                gate.wait()
            sock.send(data)

        pool = make_pool(handler(on_message=answer), workers=4)
        stuck, other = make_client(pool), make_client(pool)
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside)
        assert recv_exact(stuck, 12) == b"in progress;"
        (sock,) = (sock for sock in pool.sockets() if sock.peer == stuck.getsockname())
        sock.send(b"from outside;")
        assert recv_exact(stuck, 13) == b"from outside;"
        assert round_trip(other, b"hello") == b"hello"
        gate.open()
        assert recv_exact(stuck, 5) == b"block"


def ping_pong(client, rounds):
    """How long each of so many round trips took, in seconds."""
    times = []
    for i in range(rounds):
        text = b"%04d" % (i % 10000)
        begin = time.perf_counter()
        assert round_trip(client, text) == text
        times.append(time.perf_counter() - begin)
    return times


@every_trigger
@pytest.mark.parametrize("where", ["on_message", "on_writable"])
def test_input_for_a_blocked_handler_waits_quietly(make_pool, make_client, trigger, where):
    """B14, B16, S15: the kernel reports it to the others, who must neither spin nor forget it."""
    with Gate() as gate:
        pool = make_pool(
            handler(on_message=blocking(gate), on_writable=lambda sock: gate.wait()), workers=2, trigger=trigger
        )
        stuck, other = make_client(pool), make_client(pool)
        wait_until(lambda: len(pool.sockets()) == 2)
        (sock,) = (sock for sock in pool.sockets() if sock.peer == stuck.getsockname())
        if where == "on_message":
            stuck.sendall(b"block")
        else:
            pool.need_send(sock)
        wait_until(lambda: gate.inside)
        round_trip(other, b"taken over")
        stuck.sendall(b"more input")
        for _ in range(5):
            round_trip(other, b"later than that")
        cpu = process_cpu_seconds()
        time.sleep(0.3)  # a window to measure in, not a wait
        assert process_cpu_seconds() - cpu < (0.25 if SANITIZER else 0.1)
        gate.open()
        expected = b"blockmore input" if where == "on_message" else b"more input"
        assert recv_exact(stuck, len(expected)) == expected


@pytest.mark.parametrize("rounds", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("style", ["create", "handler"])
def test_no_ping_pong_takes_longer_than_100_ms(make_pool, make_client, style, rounds):
    """Defect 1, B11: four connections on two workers; a lost wake-up shows as a round trip of seconds."""
    pool = serve(make_pool, style, echo, workers=2)
    clients = [make_client(pool, timeout=10) for _ in range(4)]
    each = in_threads(*(lambda client=client: ping_pong(client, scaled(rounds)) for client in clients), timeout=600)
    times = sorted(time for one in each for time in one)
    p50, p99, slowest = (times[i] * 1e3 for i in (len(times) // 2, -len(times) // 100, -1))
    lost = sum(2.9 <= t <= 3.1 for t in times)
    print(f"{len(times)} round trips: p50 {p50:.3f} ms, p99 {p99:.3f} ms, max {slowest:.3f} ms; {lost} of 2.9 to 3.1 s")
    assert len(times) == 4 * scaled(rounds)
    assert p99 < patient(0.1) * 1e3
    # On a machine of its own, all of them. Beside other suites one may take longer, but not as long as a lost wake-up.
    assert times[-1] < (0.1 if PATIENCE == 1 else 2.5)


@every_trigger
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_no_wake_up_is_lost_with_pauses_between_the_messages(make_pool, make_client, trigger, workers):
    """Defect 1: the workers go to sleep and are woken again and again."""
    pool = make_pool(handler(on_message=echo), workers=workers, trigger=trigger)
    client = make_client(pool)
    for i in range(scaled(150)):
        begin = time.perf_counter()
        assert round_trip(client, b"ping") == b"ping"
        assert time.perf_counter() - begin < patient(0.5)
        time.sleep(0.0001 * (i % 20))  # the pauses are what is tested


@pytest.mark.parametrize("rounds", [30_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_no_send_is_lost_while_the_worker_falls_asleep(make_pool, rounds):
    """Defect 1, B11: between "nothing to do" and epoll_wait; nothing after it would wake the worker.

    The first send wakes it; the second comes up to 50 microseconds later, when it may be about to sleep again.
    """
    pool = make_pool(handler(on_message=ignore), listen=None, workers=1)
    client, theirs = socket.socketpair()  # TCP would hold the second byte back until the first is acknowledged
    with client:
        client.settimeout(patient(5))
        sock = pool.addsocket(theirs)
        dice = random.Random(11)
        for _ in range(scaled(rounds, minimum=1000)):
            moment = dice.randrange(1500)
            sock.send(b"a")
            for _ in range(moment):
                pass
            sock.send(b"b")
            assert recv_exact(client, 2) == b"ab"


@every_style
@every_trigger
def test_a_handler_that_blocks_after_a_long_silence_blocks_nobody_else(make_pool, make_client, style, trigger):
    """B14, B16: after 50 ms without work nobody watches any more; the first job must wake the watcher."""
    with Gate() as gate:
        pool = serve(make_pool, style, blocking(gate), trigger=trigger, workers=2)
        stuck, other = make_client(pool), make_client(pool)
        round_trip(stuck, b"hello")
        time.sleep(0.2)  # the silence is what is tested
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside)
        assert round_trip(other, b"hello") == b"hello"
        gate.open()
        assert recv_exact(stuck, 5) == b"block"


def test_an_idle_pool_uses_no_cpu(make_pool, make_client):
    """B16: with connections, without traffic."""
    pool = make_pool(handler(on_message=echo), workers=8)
    for _ in range(50):
        round_trip(make_client(pool), b"x")
    cpu = process_cpu_seconds()
    time.sleep(0.5)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < (0.3 if SANITIZER else 0.05)


@every_trigger
def test_a_hundred_messages_of_one_peer_do_not_keep_another_waiting(make_pool, make_client, trigger):
    """B13: they are there at once, cut into messages by req_len; the other's turn comes after some of them."""
    order = []
    with Gate() as gate:

        def note(sock, data):
            if data == b"hold":
                gate.wait()
            order.append(data)
            until = time.perf_counter() + 2e-5  # a share is one of time
            while time.perf_counter() < until:
                pass

        def ask(sock):
            sock.recv_data.req_len = 4

        pool = make_pool(handler(on_connect=ask, on_message=note), workers=1, trigger=trigger)
        holder, first, second = (make_client(pool) for _ in range(3))
        wait_until(lambda: len(pool.sockets()) == 3)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        first.sendall(b"many" * 500)
        second.sendall(b"once")
        gate.open()
        wait_until(lambda: len(order) == 502)
    assert order.index(b"once") < 100


@every_trigger
def test_early_replies_do_not_wait_for_late_handlers(make_pool, make_client, trigger):
    """B13: twenty messages come in one batch, each takes a while; the first reply is out before the last is handled."""
    done = []
    with Gate() as gate, Gate() as answered:

        def work(sock, data):
            if data == b"hold":
                gate.wait()
            if len(done) == 14:
                answered.wait()  # whoever asks for the first reply may be held up for longer than all of this takes
            time.sleep(0.02)
            sock.send(data)
            done.append(data)

        pool = make_pool(handler(on_message=work), workers=1, trigger=trigger)
        holder, *clients = (make_client(pool) for _ in range(21))
        wait_until(lambda: len(pool.sockets()) == 21)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        for client in clients:
            client.sendall(b"work")
        gate.open()
        assert recv_exact(clients[0], 4) == b"work"
        assert len(done) < 15
        answered.open()
        for client in clients[1:]:
            assert recv_exact(client, 4) == b"work"


@every_trigger
def test_each_connection_of_a_slow_batch_is_finished_once(make_pool, make_client, trigger):
    """S23: twenty peers leave at once, and the batch is looked at after each on_disconnect: nothing is closed twice."""
    ended = []
    with Gate() as gate:

        def end(sock, reason):
            time.sleep(0.001)
            ended.append(sock)

        pool = make_pool(
            handler(on_message=lambda sock, data: gate.wait(), on_disconnect=end), workers=1, trigger=trigger
        )
        holder, *clients = (make_client(pool) for _ in range(21))
        wait_until(lambda: len(pool.sockets()) == 21)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        for client in clients:
            client.close()
        gate.open()
        wait_until(lambda: len(ended) == 20)
    wait_until(lambda: pool.stats().closed >= 20 and len(pool) == 1)
    assert len(set(ended)) == len(ended) == pool.stats().closed == 20
    assert len(pool) == len(pool.sockets()) == 1
    heirs = [make_client(pool) for _ in range(20)]
    wait_until(lambda: len(pool) == len(pool.sockets()) == 1 + len(heirs))


@every_trigger
def test_a_flood_of_clients_does_not_keep_a_message_waiting(make_pool, make_client, trigger):
    """B13, B39: a hundred wait to be accepted; the message of one who is there comes after some of them."""
    order = []
    with Gate() as gate:

        def note(sock, data):
            if data == b"hold":
                gate.wait()
            order.append(data)

        pool = make_pool(
            handler(on_connect=lambda sock: order.append(b"connect"), on_message=note), workers=1, trigger=trigger
        )
        holder, speaker = make_client(pool), make_client(pool)
        wait_until(lambda: len(pool.sockets()) == 2)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        for _ in range(100):
            make_client(pool)
        speaker.sendall(b"speak")
        gate.open()
        wait_until(lambda: len(order) == 104)
    assert order.index(b"speak") < 50


@every_trigger
@pytest.mark.parametrize("what", ["need_send", "close"])
def test_a_flood_of_input_does_not_keep_a_request_waiting(make_pool, make_client, trigger, what):
    """S6, S27, B13: forty peers have sent what ten turns receive; another thread's request comes in between."""
    order = []
    with Gate() as gate:

        def note(sock, data):
            if data == b"hold":
                gate.wait()
            order.append("message")

        def asked(sock, *reason):
            order.append("asked")

        pool = make_pool(handler(on_message=note, on_writable=asked, on_disconnect=asked), workers=1, trigger=trigger)
        holder, target = make_client(pool), make_client(pool)
        wait_until(lambda: len(pool.sockets()) == 2)
        (sock,) = (sock for sock in pool.sockets() if sock.peer == target.getsockname())
        fillers = [make_client(pool) for _ in range(40)]
        wait_until(lambda: len(pool.sockets()) == 42)
        holder.sendall(b"hold")
        wait_until(lambda: gate.inside)
        for filler in fillers:
            filler.sendall(b"x" * 60_000)
        assert pool.need_send(sock) if what == "need_send" else pool.closesocket(sock)
        gate.open()
        wait_until(lambda: order.count("message") > 40 and "asked" in order)
    assert order.index("asked") < 25


def voluntary_switches(name):
    """How often the threads of that name have gone to sleep so far."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith(name):
            with open(f"/proc/self/task/{thread.native_id}/status") as status:
                total += next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return total


def test_an_idle_pool_makes_no_wake_ups(make_pool, make_client):
    """B16: after a while nobody watches; not one of the workers wakes up in a quarter of a second."""
    pool = make_pool(handler(on_message=echo), workers=4, name="sleeper")
    round_trip(make_client(pool), b"x")

    def asleep():
        before = voluntary_switches("sleeper")
        time.sleep(0.25)  # a window to measure in, not a wait
        return voluntary_switches("sleeper") == before > 0

    wait_until(asleep)


def test_one_flood_does_not_starve_the_others(make_pool, make_client):
    """B13, S14: a peer that streams at line rate gets its share, no more: the only worker serves others, too, and the
    slowest in a hundred of their round trips takes no more than five times as long, and a few switches of the
    interpreter, which the flooding thread shares with them."""
    over, total = threading.Event(), [0]

    def count(sock, data):
        if len(data) == 4:
            sock.send(data)
        else:
            total[0] += len(data)

    pool = make_pool(handler(on_message=count), workers=1)
    flood, *others = (make_client(pool) for _ in range(9))

    def slowest():
        took = sorted(second for other in others for second in ping_pong(other, scaled(100, minimum=25)))
        return took[len(took) * 99 // 100]

    def stream():
        while not over.is_set():
            flood.sendall(b"x" * (1 << 20))

    free = slowest()

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        wait_until(lambda: total[0] > 1 << 20)
        beside = slowest()
        print(f"p99 {free * 1e3:.2f} ms without, {beside * 1e3:.2f} ms beside the flood of {total[0] >> 20} MiB")
        assert beside < 5 * free + patient(0.06)
    finally:
        over.set()
        thread.join(10)


@pytest.mark.parametrize("shards, workers", [(2, 2), (2, 8), (3, 3), (4, 5)])
def test_with_fewer_free_workers_than_shards_all_shards_are_served(make_pool, make_client, shards, workers):
    """All workers but one are blocked: the last one takes turns between the shards, and sleeps when nothing comes."""
    for _ in range(scaled(3)):
        with Gate() as gate:
            pool = make_pool(handler(on_message=blocking(gate)), workers=workers, shards=shards)
            others = [make_client(pool) for _ in range(4 * shards)]
            stuck = [make_client(pool) for _ in range(workers - 1)]
            for client in [*others, *stuck]:
                round_trip(client, b"hello")
            for n, client in enumerate(stuck):
                client.sendall(b"block")
                wait_until(lambda n=n: gate.inside == n + 1)
                for other in others:
                    round_trip(other, b"meanwhile")
            for client in (make_client(pool) for _ in range(2 * shards)):
                round_trip(client, b"new")
            gate.open()
            assert [recv_exact(client, 5) for client in stuck] == [b"block"] * len(stuck)
            for client in [*others, *stuck]:
                round_trip(client, b"afterwards")
            pool.stop()


def test_shards_that_share_a_worker_are_not_starved_by_a_busy_one(make_pool, make_client):
    """A flood on one shard while the other one's worker is blocked: the last worker gives both their time."""
    with Gate() as gate:
        pool = make_pool(handler(on_message=blocking(gate)), workers=2, shards=2)
        stuck, flood, *others = [make_client(pool) for _ in range(8)]
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside == 1)
        over = threading.Event()

        def keep_going():
            while not over.is_set():
                round_trip(flood, b"x" * 1000)

        def talk():
            try:
                for _ in range(scaled(20)):
                    for client in others:
                        round_trip(client, b"meanwhile")
            finally:
                over.set()

        in_threads(keep_going, talk)
        gate.open()
        assert recv_exact(stuck, 5) == b"block"


def test_an_idle_pool_with_a_worker_for_each_shard_uses_no_cpu(make_pool, make_client):
    """Nobody is parked to watch, and nobody wakes up to look either."""
    pool = make_pool(handler(on_message=echo), workers=2, shards=2)
    for _ in range(4):
        round_trip(make_client(pool), b"x")
    time.sleep(0.1)  # the last looks after the last message
    cpu = process_cpu_seconds()
    time.sleep(0.5)  # a window to measure in, not a wait
    assert process_cpu_seconds() - cpu < (0.3 if SANITIZER else 0.01)


MANY = """
pool = TstPool(Echo(), workers=4, trigger=os.environ["TRIGGER"], max_connections=12_000, idle_timeout=300)
print(pool.listen("127.0.0.1", 0)[1])
pool.start()
for line in sys.stdin:
    print(len(pool), pool.stats().messages)
pool.stop()
"""


@pytest.mark.parametrize(
    ("trigger", "number"),
    [("level", 1000), *(pytest.param(trigger, 10_000, marks=pytest.mark.slow) for trigger in TRIGGERS)],
)
def test_idle_connections_cost_the_active_ones_nothing(trigger, number):
    """B16: ten thousand idle connections use less than 1 % of a processor, and a message of one of ten active ones
    costs no more than it did before they came."""

    def talk(rounds):
        """Processor time of the server for a message of the active ones."""
        before = server.cpu_seconds()
        for _ in range(rounds):
            for client in active:
                client.send(b"hello")
            for client in active:
                assert client.recv(5) == b"hello"
        return (server.cpu_seconds() - before) / rounds / len(active)

    rounds = scaled(1500, minimum=300)
    with ServerProcess(MANY, env={"TRIGGER": trigger}) as server, contextlib.ExitStack() as stack:
        active = [stack.enter_context(connect(server.addr)) for _ in range(10)]
        talk(100)
        alone = sorted(talk(rounds) for _ in range(3))[1]
        for _ in range(number):
            round_trip(stack.enter_context(connect(server.addr)), b"hello")
        beside = sorted(talk(rounds) for _ in range(3))[1]
        wait_until(lambda: server_rests(server), 20)
        begin = server.cpu_seconds()
        time.sleep(3)  # a window to measure in, not a wait
        idle = (server.cpu_seconds() - begin) / 3
        server.process.stdin.write("?\n")
        server.process.stdin.flush()
        assert int(server.process.stdout.readline().split()[0]) == number + 10
        server.finish(60)
    print(
        f"{trigger}, {number} idle connections: {idle:.2%} of a processor; "
        f"{alone * 1e6:.1f} us a message without them, {beside * 1e6:.1f} us beside them"
    )
    assert idle < 0.01 * PATIENCE
    assert beside < 2 * alone + 20e-6


def server_rests(server):
    """It has used no processor time for a tenth of a second."""
    before = server.cpu_seconds()
    time.sleep(0.1)
    return server.cpu_seconds() == before
