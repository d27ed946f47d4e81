# cython: language_level=3
"""The table: keys and values in an open hash table that grows without a pause.

    slots     [ hash, entry ][ -, NULL ][ hash, entry ][ hash, entry ] ...      capacity: a power of two
    entry     expires, sizes, users | key | value | room

An entry stands in the slot that its hash names, or behind it, with no empty slot in between (linear probing). Removing
one moves those behind it up, so that there are no marks of what was.

Growth: a new array of twice the size becomes `slots`, the old one stays as `old`, and each insertion moves the next
MOVE_STEP of its slots. A key is then in exactly one of the two. Nothing enters `old`; what leaves it leaves gone()
behind, so that no search in it ends early.

    1. count <= three quarters of capacity, the entries in `old` included.
    2. `old` is empty before the next growth: that comes after capacity * 3/8 insertions, moving takes
       capacity / 2 / MOVE_STEP of them.
    3. used <= maxmemory, whatever clients do; that is MAXMEMORY_LEAST or more. `used` counts slots, entries, and what
       malloc adds to them.

A value that is being sent (_rest.pxd) is neither changed nor freed meanwhile: who sends it is a user of its entry, as
the table is. Once the key is removed or gets another value, the entry belongs to its other users alone, and it remains
part of `used` until the last of them lets go of it.

Times are milliseconds on the monotonic clock. What has expired is removed when somebody asks for it, and by
table_sweep, a little at each insertion, and as much as is needed when memory runs out.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from tstkv._libc cimport kv_rarely
from tstkv._siphash cimport sip_hash

cdef enum:
    CAPACITY_LEAST = 16        # slots
    MOVE_STEP = 8              # slots of `old` looked at for each insertion
    SWEEP_STEP = 4             # slots looked at for expired entries at each insertion ...
    SWEEP_FULL = 4096          # ... and, for each millisecond, when memory has run out
    SWEEP_LEAST = 1000         # milliseconds until all slots are looked at again in vain
    SWEEP_MOST = 60000         # ... and when that is done although no entry was to end so soon
    MALLOC_EXTRA = 16          # bytes that malloc needs beside what was asked for
    MAXMEMORY_LEAST = 1024


cdef extern from * nogil:
    """
    #define NO_MAXMEMORY (UINT64_C(1) << 63)
    """
    const uint64_t NO_MAXMEMORY            # more than there can be


cdef struct kv_entry:
    int64_t expires            # 0: never
    uint32_t key_size
    uint32_t value_size
    uint32_t room              # bytes behind the struct: for the key and, behind it, the value
    uint32_t users             # the table, and each piece of a reply that shows the value; the last one frees the entry


cdef struct kv_slot:
    uint64_t hash
    kv_entry *entry            # shared: the table is one of its users; NULL: empty


cdef struct kv_table:
    kv_slot *slots             # owned
    size_t capacity
    kv_slot *old               # owned; NULL: no growth is under way
    size_t old_capacity
    size_t moved               # slots of `old` that have been emptied
    size_t count               # entries, the expired ones that nobody has noticed yet included
    size_t n_expiring          # of which have an `expires`
    size_t swept               # where table_sweep goes on: a slot of `slots` or, behind those, of `old`
    int64_t soonest            # when the first of the entries that table_sweep has left ends
    int64_t swept_until        # before this time it is not worth while, or too much, to look at all slots
    int64_t squeezed           # when table_squeeze has last found too little
    uint64_t used              # bytes
    uint64_t maxmemory
    uint64_t n_expired         # entries removed because their time was over
    uint64_t key[2]            # of the hash


# Stands in `old` for an entry that has left it. Never looked into.
cdef inline kv_entry *gone() noexcept nogil:
    return <kv_entry *>1


# ------------------------------------------------------------------------------------------------- entries

cdef inline char *entry_key(kv_entry *entry) noexcept nogil:
    return <char *>(entry + 1)


cdef inline char *entry_value(kv_entry *entry) noexcept nogil:
    return <char *>(entry + 1) + entry.key_size


cdef inline uint64_t room_for(size_t key_size, size_t value_size) noexcept nogil:
    """In steps, as malloc does it: a number that grows by a digit then stays where it is."""
    return (<uint64_t>key_size + value_size + 15) & ~<uint64_t>15


cdef inline uint64_t memory_for(uint64_t room) noexcept nogil:
    """Bytes of memory that an entry takes."""
    return sizeof(kv_entry) + room + MALLOC_EXTRA


cdef inline kv_entry *entry_new(kv_table *table, const char *key, size_t key_size, size_t value_size) noexcept nogil:
    """An entry whose value is still to be written. NULL: no memory."""
    cdef uint64_t room = room_for(key_size, value_size)
    cdef kv_entry *entry = <kv_entry *>malloc(sizeof(kv_entry) + room)
    if entry == NULL:
        return NULL
    entry.expires = 0
    entry.key_size = <uint32_t>key_size
    entry.value_size = <uint32_t>value_size
    entry.room = <uint32_t>room            # keys and values have at most 512 MB each
    entry.users = 1
    memcpy(entry_key(entry), key, key_size)
    table.used += memory_for(room)
    return entry


cdef inline void entry_use(kv_entry *entry) noexcept nogil:
    """The caller is one more user, until entry_let_go. (A piece of a reply takes memory: there are no 4 billion.)"""
    entry.users += 1


cdef inline void entry_let_go(kv_table *table, kv_entry *entry) noexcept nogil:
    entry.users -= 1
    if entry.users == 0:
        table.used -= memory_for(entry.room)
        free(entry)


cdef inline void entry_leave(kv_table *table, kv_entry *entry) noexcept nogil:
    """The table lets go of an entry."""
    table.n_expiring -= entry.expires != 0
    entry_let_go(table, entry)


cdef inline void entry_expire(kv_table *table, kv_entry *entry, int64_t expires) noexcept nogil:
    """Sets when it ends; 0: never."""
    table.n_expiring += <size_t>(expires != 0) - <size_t>(entry.expires != 0)
    entry.expires = expires


cdef inline bint entry_is_over(const kv_entry *entry, int64_t now) noexcept nogil:
    return entry.expires != 0 and now > entry.expires


# --------------------------------------------------------------------------------------------------- slots

cdef inline int table_init(kv_table *table, uint64_t maxmemory, const uint64_t *key) noexcept nogil:
    """0 or -ENOMEM. `key`: of the hash, random."""
    table.key[0], table.key[1] = key[0], key[1]
    table.maxmemory = maxmemory
    table.slots = <kv_slot *>calloc(CAPACITY_LEAST, sizeof(kv_slot))
    if table.slots == NULL:
        return -ENOMEM
    table.capacity = CAPACITY_LEAST
    table.used = CAPACITY_LEAST * sizeof(kv_slot)
    return 0


cdef inline uint64_t table_hash(kv_table *table, const char *key, size_t size) noexcept nogil:
    return sip_hash(table.key, key, size)


cdef inline kv_slot *slot_in(kv_slot *slots, size_t capacity, uint64_t hash, const char *key,
                             size_t size) noexcept nogil:
    """The key's slot, or NULL."""
    cdef size_t i = <size_t>hash & (capacity - 1)
    while slots[i].entry != NULL:
        if slots[i].hash == hash and slots[i].entry != gone() and slots[i].entry.key_size == size and (
                memcmp(entry_key(slots[i].entry), key, size) == 0):
            return &slots[i]
        i = (i + 1) & (capacity - 1)
    return NULL


cdef inline void slot_put(kv_table *table, uint64_t hash, kv_entry *entry) noexcept nogil:
    """Puts an entry, whose key is not there, into `slots`."""
    cdef size_t i = <size_t>hash & (table.capacity - 1)
    while table.slots[i].entry != NULL:
        i = (i + 1) & (table.capacity - 1)
    table.slots[i].hash = hash
    table.slots[i].entry = entry


cdef inline void slot_close(kv_table *table, size_t hole) noexcept nogil:
    """Empties a slot of `slots` by moving up what stands behind it because of it."""
    cdef size_t mask = table.capacity - 1
    cdef size_t i = hole
    while True:
        i = (i + 1) & mask
        if table.slots[i].entry == NULL:
            break
        # It may move to the hole unless the slot that its hash names lies between the two.
        if ((i - <size_t>table.slots[i].hash) & mask) >= ((i - hole) & mask):
            table.slots[hole] = table.slots[i]
            hole = i
    table.slots[hole].entry = NULL


cdef inline bint slot_is_old(kv_table *table, kv_slot *slot) noexcept nogil:
    return table.old != NULL and table.old <= slot < table.old + table.old_capacity


cdef inline void table_remove(kv_table *table, kv_slot *slot) noexcept nogil:
    entry_leave(table, slot.entry)
    table.count -= 1
    if slot_is_old(table, slot):
        slot.entry = gone()
    else:
        slot_close(table, <size_t>(slot - table.slots))


cdef inline kv_slot *table_find(kv_table *table, uint64_t hash, const char *key, size_t size,
                                int64_t now) noexcept nogil:
    """The key's slot, valid until the table is changed; NULL: it is not there, or was, and its time is over."""
    cdef kv_slot *slot = slot_in(table.slots, table.capacity, hash, key, size)
    if slot == NULL and table.old != NULL:
        slot = slot_in(table.old, table.old_capacity, hash, key, size)
    if slot != NULL and kv_rarely(entry_is_over(slot.entry, now)):
        table_remove(table, slot)
        table.n_expired += 1
        return NULL
    return slot


# -------------------------------------------------------------------------------------------- growth, memory

cdef inline void table_move(kv_table *table, size_t steps) noexcept nogil:
    """Goes on moving entries from `old` to `slots`."""
    cdef kv_slot *slot
    while steps and table.old != NULL:
        slot = &table.old[table.moved]
        if slot.entry != NULL and slot.entry != gone():
            slot_put(table, slot.hash, slot.entry)
            slot.entry = gone()
        table.moved += 1
        steps -= 1
        if table.moved == table.old_capacity:
            free(table.old)
            table.used -= table.old_capacity * sizeof(kv_slot)
            table.old = NULL


cdef inline size_t all_slots(const kv_table *table) noexcept nogil:
    return table.capacity + (table.old_capacity if table.old != NULL else 0)


cdef inline void table_sweep(kv_table *table, size_t steps, int64_t now) noexcept nogil:
    """Looks at some more slots for entries whose time is over."""
    cdef kv_slot *slot
    while steps and table.n_expiring:
        if table.swept >= all_slots(table):
            table.swept = 0
        if table.swept < table.capacity:
            slot = &table.slots[table.swept]
        else:
            slot = &table.old[table.swept - table.capacity]
        if slot.entry != NULL and slot.entry != gone() and entry_is_over(slot.entry, now):
            table_remove(table, slot)          # another one may stand there now
            table.n_expired += 1
        else:
            if slot.entry != NULL and slot.entry != gone() and slot.entry.expires:
                table.soonest = min(table.soonest, slot.entry.expires)
            table.swept += 1
        steps -= 1


cdef inline size_t capacity_for(kv_table *table, size_t more) noexcept nogil:
    """The capacity that holds `more` further entries."""
    cdef size_t capacity = table.capacity
    while table.count + more > capacity // 4 * 3:
        capacity *= 2
    return capacity


cdef inline bint table_is_short(kv_table *table, size_t more, uint64_t memory) noexcept nogil:
    """There is no room for `more` further entries that need `memory`."""
    cdef size_t capacity = capacity_for(table, more)
    cdef uint64_t slots = capacity * sizeof(kv_slot) if capacity > table.capacity else 0
    return table.used + slots + memory > table.maxmemory


cdef inline bint table_squeeze(kv_table *table, size_t more, uint64_t memory, int64_t now) noexcept nogil:
    """Removes entries whose time is over until there is room. False: there are not enough of them.

    A few requests may not make it look through a large table again and again. So it looks at SWEEP_FULL slots for each
    millisecond, on the average: once it has looked at more, it looks at only that many at a time until as much time has
    passed. And having found too little it does not look again in the same millisecond: a transaction has only one,
    however many requests of it are refused.
    """
    cdef bint at_all = now >= table.swept_until
    cdef size_t most = all_slots(table) + table.n_expiring if at_all else SWEEP_FULL
    cdef size_t left = most
    if not at_all and now == table.squeezed:
        return False
    table.soonest = INT64_MAX
    while left and table.n_expiring and table_is_short(table, more, memory):
        table_sweep(table, min(left, <size_t>SWEEP_FULL), now)
        left -= min(left, <size_t>SWEEP_FULL)
    if at_all:
        table.swept_until = now + <int64_t>((most - left) // SWEEP_FULL)
    if not table_is_short(table, more, memory):
        return True
    table.squeezed = now
    if at_all:
        table.swept_until = max(table.swept_until, now + SWEEP_LEAST, min(table.soonest, now + SWEEP_MOST))
    return False


cdef inline int table_grow(kv_table *table, size_t capacity) noexcept nogil:
    """0 or -ENOMEM."""
    cdef kv_slot *slots
    table_move(table, table.old_capacity)      # a no-op but for a request with very many keys: see 2. above
    slots = <kv_slot *>calloc(capacity, sizeof(kv_slot))
    if slots == NULL:
        return -ENOMEM
    table.used += capacity * sizeof(kv_slot)
    table.old, table.old_capacity, table.moved = table.slots, table.capacity, 0
    table.slots, table.capacity = slots, capacity
    return 0


cdef inline int table_prepare(kv_table *table, size_t more, uint64_t memory, int64_t now) noexcept nogil:
    """Makes room for `more` further entries that need `memory`, both at most. -ENOMEM: there is not so much."""
    cdef size_t capacity = capacity_for(table, more)
    cdef uint64_t slots = capacity * sizeof(kv_slot) if capacity > table.capacity else 0
    table_move(table, MOVE_STEP)
    table_sweep(table, SWEEP_STEP, now)
    if kv_rarely(table.used + slots + memory > table.maxmemory):
        if not table_squeeze(table, more, memory, now):
            return -ENOMEM
        capacity = capacity_for(table, more)               # fewer keys may need no more slots
    return table_grow(table, capacity) if capacity > table.capacity else 0


cdef inline kv_entry *table_set(kv_table *table, uint64_t hash, kv_slot *slot, const char *key, size_t key_size,
                                const char *value, size_t value_size) noexcept nogil:
    """Sets the key's value; when it expires stays. slot: where table_find has found it, or NULL. table_prepare has made
    room. The value may not lie in the entry. NULL: no memory."""
    cdef kv_entry *entry
    # In place, unless the old value is being sent, or most of the room would then be for nothing.
    if slot != NULL and slot.entry.users == 1 and <uint64_t>key_size + value_size <= slot.entry.room and (
            room_for(key_size, value_size) >= slot.entry.room // 2):
        memcpy(entry_value(slot.entry), value, value_size)
        slot.entry.value_size = <uint32_t>value_size
        return slot.entry
    entry = entry_new(table, key, key_size, value_size)
    if entry == NULL:
        return NULL
    memcpy(entry_value(entry), value, value_size)
    if slot == NULL:
        slot_put(table, hash, entry)
        table.count += 1
        return entry
    entry_expire(table, entry, slot.entry.expires)
    entry_leave(table, slot.entry)
    slot.entry = entry
    return entry


cdef inline void slots_free(kv_table *table, kv_slot *slots, size_t capacity) noexcept nogil:
    cdef size_t i
    if slots == NULL:
        return
    for i in range(capacity):
        if slots[i].entry != NULL and slots[i].entry != gone():
            entry_leave(table, slots[i].entry)
    free(slots)
    table.used -= capacity * sizeof(kv_slot)


cdef inline void table_free(kv_table *table) noexcept nogil:
    slots_free(table, table.slots, table.capacity)
    slots_free(table, table.old, table.old_capacity)
    table.slots = table.old = NULL
    table.capacity = table.count = 0


cdef inline int table_clear(kv_table *table) noexcept nogil:
    """Removes all keys and gives their memory back. 0, or -ENOMEM: nothing has changed."""
    cdef kv_slot *slots = <kv_slot *>calloc(CAPACITY_LEAST, sizeof(kv_slot))
    if slots == NULL:
        return -ENOMEM
    table_free(table)
    table.slots, table.capacity = slots, CAPACITY_LEAST
    table.used += CAPACITY_LEAST * sizeof(kv_slot)
    return 0


# Goes through all entries: `i` from 0 on, until it returns False. `entry` NULL: nothing there, or its time is over. The
# table must not be changed meanwhile.
cdef inline bint table_next(kv_table *table, size_t *i, int64_t now, kv_entry **entry) noexcept nogil:
    cdef size_t at = i[0]
    if at < table.capacity:
        entry[0] = table.slots[at].entry
    elif table.old != NULL and at - table.capacity < table.old_capacity:
        entry[0] = table.old[at - table.capacity].entry
    else:
        return False
    i[0] = at + 1
    if entry[0] == gone() or (entry[0] != NULL and entry_is_over(entry[0], now)):
        entry[0] = NULL
    return True
