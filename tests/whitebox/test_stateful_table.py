"""White box, B01, B02, B10: the table of connections under any order of opening, freeing and looking up, against a
dictionary."""

from _whitebox import CHUNK, OWNED, SLOTS, Engine, clear
from helpers import scaled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

GONE = -1

# Few enough that slots are used again, and the ends of chunks and of the table.
slots = st.sampled_from([0, 1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK - 1, 5 * CHUNK, SLOTS - 1])


class Table(RuleBasedStateMachine):
    connections = Bundle("connections")
    freed = Bundle("freed")

    def __init__(self):
        super().__init__()
        self.engine = Engine()
        self.open = {}  # slot: the Connection that has it
        self.uses = {}  # slot: how many connections it has had
        self.chunks = set()

    @rule(target=connections, slot=slots)
    def open_one(self, slot):
        made = self.engine.open(slot)
        if slot in self.open:
            assert made is None, "a slot was given away twice"
            return self.open[slot]
        self.chunks.add(slot // CHUNK)
        self.uses[slot] = self.uses.get(slot, 0) + 1
        assert made.id == self.uses[slot] << 32 | slot, "generations are counted, one by one"
        self.open[slot] = made
        return made

    @rule(slot=st.sampled_from([SLOTS, SLOTS + 1, 2**31 - 1]))
    def open_beyond_the_table(self, slot):
        assert self.engine.open(slot) is None

    @rule(target=freed, connection=consumes(connections))
    def free(self, connection):
        if self.is_open(connection):
            clear(connection)
            del self.open[slot_of(connection)]
        return connection

    @rule(connection=connections)
    def look_up(self, connection):
        self.check(connection)

    @rule(connection=freed)
    def look_up_a_stale_id(self, connection):
        """Its slot may have another connection by now."""
        assert not self.is_open(connection)
        self.check(connection)
        state = self.state_of(slot_of(connection))
        assert connection.acquire()[0] == GONE
        assert not connection.mark(4)
        assert connection.ask(1 << 9) == GONE
        assert connection.append(b"to nobody")[0] < 0
        assert self.state_of(slot_of(connection)) == state, "a stale id has changed its successor"

    @rule(connection=connections)
    def own_and_release(self, connection):
        if self.is_open(connection):
            assert connection.acquire()[0] == 1
            assert connection.acquire()[0] == 0
            assert connection.state & OWNED
            assert not connection.release()

    @rule(slot=slots)
    def look_up_a_bare_descriptor(self, slot):
        assert self.engine.finds(slot) == (slot if slot in self.open else None)

    @rule(slot=slots, generation=st.sampled_from([2**31, 2**32 - 1]))
    def look_up_what_never_was(self, slot, generation):
        assert self.engine.finds(generation << 32 | slot) is None

    @invariant()
    def chunks_are_there_when_they_were_needed(self):
        for chunk in (0, 1, 4, 5, SLOTS // CHUNK - 1):
            assert self.engine.has_slot(chunk * CHUNK) == (chunk in self.chunks)

    @invariant()
    def every_open_one_is_found(self):
        for slot, connection in self.open.items():
            assert self.engine.finds(connection.id) == slot

    def check(self, connection):
        found = self.is_open(connection)
        assert self.engine.finds(connection.id) == (slot_of(connection) if found else None)
        assert connection.alive == found

    def is_open(self, connection):
        return self.open.get(slot_of(connection)) is connection

    def state_of(self, slot):
        return self.open[slot].state if slot in self.open else None

    def teardown(self):
        for connection in self.open.values():
            clear(connection)
        self.engine.close()


def slot_of(connection):
    return connection.id & 0xFFFFFFFF


TestTable = Table.TestCase
TestTable.settings = settings(deadline=None, max_examples=scaled(300, minimum=15), stateful_step_count=40)
