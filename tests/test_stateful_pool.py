"""B42, B59, B65: any order of connecting, sending, replying, pausing, closing from either side, stopping and starting:
every message once, on_disconnect once, and counters that balance. The rules that are checked are those of
tests/fuzz/pool_model.py, here chosen and shrunk by hypothesis."""

import threading

from fuzz.framing_model import Model
from fuzz.pool_model import World
from helpers import scaled
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tstpool

FRAMINGS = [
    None,
    Model(tstpool.Fixed, 2**20, size=5),
    Model(tstpool.Delimited, 2**20, delimiter=b"\n"),
    Model(tstpool.LengthPrefixed, 2**20, size=4),
    Model(tstpool.LengthPrefixed, 2**20, size=2, byteorder="little", offset=1, adjust=-3, keep=True),
]
MOST_PEERS = 4

sizes = st.sampled_from([0, 1, 5, 300, 9000, 70000, 150000])
which = st.integers(0, MOST_PEERS - 1)


class Pool(RuleBasedStateMachine):
    world = None

    @initialize(
        framing=st.sampled_from(FRAMINGS),
        unix=st.booleans(),
        trigger=st.sampled_from(["level", "oneshot", "edge"]),
        workers=st.integers(1, 3),
    )
    def begin(self, framing, unix, trigger, workers):
        self.world = World(framing, unix=unix, trigger=trigger, workers=workers)
        self.world.connect()

    def peer(self, number):
        return self.world.peers[number % len(self.world.peers)]

    @precondition(lambda self: len(self.world.peers) < MOST_PEERS)
    @rule()
    def connect(self):
        self.world.connect()

    @rule(number=which, size=sizes)
    def client_sends_a_message(self, number, size):
        self.world.send_framed(self.peer(number), size)

    @rule(number=which, data=st.binary(max_size=9))
    def client_sends_bytes(self, number, data):
        self.world.send(self.peer(number), data)

    @rule(number=which)
    def client_receives(self, number):
        self.world.receive(self.peer(number))

    @rule(number=which)
    def client_half_closes(self, number):
        self.world.half_close(self.peer(number))

    @rule(number=which, with_reset=st.booleans())
    def client_leaves(self, number, with_reset):
        self.world.leave(self.peer(number), with_reset)

    @rule(number=which, size=sizes)
    def handler_replies(self, number, size):
        self.peer(number).script.append(lambda peer: self.world.reply_framed(peer, size))

    @rule(number=which, framing=st.sampled_from(FRAMINGS[1:]))
    def handler_changes_the_framing(self, number, framing):
        self.peer(number).script.append(lambda peer: self.world.reframe(peer, framing))

    @rule(number=which, size=sizes)
    def handler_reads(self, number, size):
        self.peer(number).script.append(lambda peer: self.world.read(peer, size))

    @rule(number=which, size=sizes)
    def handler_asks_for_a_transfer(self, number, size):
        self.peer(number).script.append(lambda peer: self.world.ask(peer, size))

    @rule(number=which, size=sizes)
    def on_writable_asks_for_a_transfer(self, number, size):
        self.world.ask_in_on_writable(self.peer(number), size)

    @rule(number=which, size=sizes)
    def on_writable_reads(self, number, size):
        self.world.read_in_on_writable(self.peer(number), size)

    @rule(number=which, what=st.sampled_from(["disconnect", "fail", "close", "pause"]))
    def handler_ends_it_or_pauses(self, number, what):
        self.peer(number).script.append(getattr(self.world, what))

    @rule(number=which, size=sizes)
    def send(self, number, size):
        self.world.reply(self.peer(number), size)

    @rule(numbers=st.lists(which, min_size=2, max_size=3), size=sizes)
    def threads_send(self, numbers, size):
        """Each on its own connection, or two on the same one."""
        failures = []

        def send(number):
            try:
                self.world.reply_framed(self.peer(number), size)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=send, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    @rule(number=which)
    def pause(self, number):
        self.world.pause(self.peer(number))

    @rule(number=which)
    def resume(self, number):
        self.world.resume(self.peer(number))

    @rule(number=which)
    def need_send(self, number):
        self.world.need_send(self.peer(number))

    @rule(number=which, abort=st.booleans())
    def close(self, number, abort):
        self.world.close(self.peer(number), abort)

    @rule()
    def stop(self):
        self.world.stop(drain=0.05)

    @rule()
    def start(self):
        self.world.start()

    @invariant()
    def nothing_came_twice_or_out_of_order(self):
        if self.world is not None:
            for peer in self.world.peers:
                self.world.check(peer)

    def teardown(self):
        if self.world is not None:
            self.world.finish()


TestPool = Pool.TestCase
TestPool.settings = settings(
    deadline=None,
    max_examples=scaled(150, minimum=6),
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
