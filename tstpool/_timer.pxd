# cython: language_level=3
"""Deadlines: a wheel of timers for each shard, and what a connection's deadline is.

**The wheel** costs the same for ten connections and ten thousand. It has four levels of 64 slots; a slot of the lowest
level is one tick (4.2 ms), one of the next is 64 ticks, and so on:

    level 0   [ ][x][ ][ ] ... [ ]     due within 0.27 s, to the tick
    level 1   [ ][ ][x][x] ... [ ]     due within 17 s: moves down when its time comes near
    level 2   [x][ ][ ][ ] ... [x]     due within 18 minutes
    level 3   [ ][ ][ ][ ] ... [ ]     due within 19 hours; what is later waits here and is put in again

A slot is a list of connections through `timer_next`; `occupied` has a bit for each slot that is not empty, so that the
next one is found by counting zeros. Times are ticks of 32 bits that wrap after 208 days: only differences count.

**Lazy.** A connection has one timer for all its deadlines and does not touch it when something arrives: it notes the
time, no more. When the timer fires, its owner looks what the deadline is now, and usually puts it in again. Only a
deadline that is nearer than the timer moves it at once.

    first byte    accepted, and nothing has come yet             limits.first_byte
    message       the first byte of a message is there, not all  limits.message: from that byte on, whatever comes
    idle          between messages, nothing received or sent     limits.idle
    write         output waits, and the peer takes none          limits.write
    close         the same after close()                         limits.linger
    linger        closed: what the peer still sends is dropped   limits.linger between two arrivals, 6 times that in all
"""
from libc.stdint cimport uint32_t, uint64_t

from tstpool._conn cimport HEARD_END, NO_TIMER, TYPE_SUB, tst_connection, tst_limits
from tstpool._libc cimport RELAXED, load32

cdef enum:
    TICK_BITS = 22             # a tick is 2**22 nanoseconds: a twentieth of the shortest deadline that is useful
    WHEEL_LEVELS = 4
    WHEEL_SLOTS = 64
    WHEEL_LEVEL_BITS = 6
    WHEEL_MOST = 16777215      # ticks ahead that the wheel holds

cdef extern from * nogil:
    """
    static inline int tst_lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }
    """
    int tst_lowest_bit(uint64_t bits)


cdef struct tst_wheel:
    uint32_t tick              # all timers up to this one have fired
    uint64_t occupied[WHEEL_LEVELS]
    tst_connection *slots[WHEEL_LEVELS * WHEEL_SLOTS]  # borrowed


cdef inline uint32_t tick_of(uint64_t nanoseconds) noexcept nogil:
    return <uint32_t>(nanoseconds >> TICK_BITS)


cdef inline bint tick_before(uint32_t one, uint32_t other) noexcept nogil:
    """`one` is earlier. They are less than 104 days apart."""
    return <uint32_t>(one - other) >> 31 != 0


cdef inline void wheel_put(tst_wheel *wheel, tst_connection *connection) noexcept nogil:
    """Enters it at its timer_due, which is the present tick or later; else the present tick."""
    cdef uint32_t ahead = connection.timer_due - wheel.tick
    cdef uint32_t place
    cdef int level = 0
    if ahead >> 31:
        ahead = 0
    if ahead > WHEEL_MOST:
        ahead = WHEEL_MOST
    while ahead >> (WHEEL_LEVEL_BITS * (level + 1)):
        level += 1
    place = (wheel.tick + ahead) >> (WHEEL_LEVEL_BITS * level) & (WHEEL_SLOTS - 1)
    wheel.occupied[level] |= <uint64_t>1 << place
    place += <uint32_t>level * WHEEL_SLOTS
    connection.timer_slot = place
    connection.timer_previous = NULL
    connection.timer_next = wheel.slots[place]
    if connection.timer_next != NULL:
        connection.timer_next.timer_previous = connection
    wheel.slots[place] = connection


cdef inline void wheel_remove(tst_wheel *wheel, tst_connection *connection) noexcept nogil:
    """Takes it out, if it is in."""
    cdef uint32_t place = connection.timer_slot
    if place == NO_TIMER:
        return
    if connection.timer_previous != NULL:
        connection.timer_previous.timer_next = connection.timer_next
    else:
        wheel.slots[place] = connection.timer_next
        if connection.timer_next == NULL:
            wheel.occupied[place // WHEEL_SLOTS] &= ~(<uint64_t>1 << (place % WHEEL_SLOTS))
    if connection.timer_next != NULL:
        connection.timer_next.timer_previous = connection.timer_previous
    connection.timer_slot = NO_TIMER


cdef inline bint wheel_next(tst_wheel *wheel, uint32_t *tick) noexcept nogil:
    """The next tick at which a slot is due: to fire, or to move its timers down. False: the wheel is empty."""
    cdef int level
    cdef uint32_t at, base
    cdef uint64_t bits
    cdef bint found = False
    for level in range(WHEEL_LEVELS):
        bits = wheel.occupied[level]
        if bits == 0:
            continue
        base = wheel.tick >> (WHEEL_LEVEL_BITS * level)
        at = (base + 1) & (WHEEL_SLOTS - 1)            # the slot of the present tick comes last: it is a round ahead
        if at:
            bits = bits >> at | bits << (WHEEL_SLOTS - at)
        at = (base + 1 + <uint32_t>tst_lowest_bit(bits)) << (WHEEL_LEVEL_BITS * level)
        if not found or tick_before(at, tick[0]):
            tick[0] = at
        found = True
    return found


cdef inline void wheel_move_down(tst_wheel *wheel) noexcept nogil:
    """The present tick begins slots of higher levels: their timers go where they belong now."""
    cdef int level
    cdef uint32_t place
    cdef tst_connection *connection
    cdef tst_connection *next
    for level in range(WHEEL_LEVELS - 1, 0, -1):
        if wheel.tick & ((<uint32_t>1 << (WHEEL_LEVEL_BITS * level)) - 1):
            continue
        place = wheel.tick >> (WHEEL_LEVEL_BITS * level) & (WHEEL_SLOTS - 1)
        if not wheel.occupied[level] >> place & 1:
            continue
        wheel.occupied[level] &= ~(<uint64_t>1 << place)
        place += <uint32_t>level * WHEEL_SLOTS
        connection = wheel.slots[place]
        wheel.slots[place] = NULL
        while connection != NULL:
            next = connection.timer_next
            wheel_put(wheel, connection)
            connection = next


cdef inline tst_connection *wheel_fire(tst_wheel *wheel, uint32_t now) noexcept nogil:
    """Takes out one connection whose timer is due; NULL when there is none up to `now`. To be repeated until then."""
    cdef uint32_t tick
    cdef tst_connection *connection
    while True:
        connection = wheel.slots[wheel.tick & (WHEEL_SLOTS - 1)]
        if connection != NULL:
            wheel_remove(wheel, connection)
            return connection
        if not wheel_next(wheel, &tick):
            wheel.tick = now                           # however long nothing was in it: differences may be too large
            return NULL
        if tick_before(now, tick):
            if tick_before(wheel.tick, now):
                wheel.tick = now
            return NULL
        wheel.tick = tick
        wheel_move_down(wheel)


# ------------------------------------------------------------------------------------------------ deadlines

cdef enum:
    DEADLINE_NONE = 0
    DEADLINE_IDLE = 1
    DEADLINE_FIRST_BYTE = 2
    DEADLINE_MESSAGE = 3       # the rest of it
    DEADLINE_WRITE = 4         # from here on the peer is to take output
    DEADLINE_CLOSE = 5         # the same, of a connection that is closing
    DEADLINE_LINGER = 6        # after that

cdef enum:
    LINGER_TIMES = 6           # nginx lingers 5 s between two arrivals, and 30 s at most
    TICKS_MOST = 1 << 30       # 52 days: longer than any limit; half of what two ticks may be apart


cdef inline uint32_t tick_later(uint32_t one, uint32_t other) noexcept nogil:
    return other if tick_before(one, other) else one


cdef inline uint32_t tick_earlier(uint32_t one, uint32_t other) noexcept nogil:
    return one if tick_before(one, other) else other


cdef inline uint32_t tick_not_older(uint32_t tick, uint32_t now) noexcept nogil:
    """The tick, or one that is long enough ago for each limit, but not so long that it would count as one to come."""
    return tick if now - tick < TICKS_MOST else now - TICKS_MOST


cdef inline void deadline_add(int *kind, uint32_t *due, int this_kind, uint32_t since, uint32_t limit) noexcept nogil:
    """The nearer of two deadlines stays; a limit of 0 is none."""
    if limit and (kind[0] == DEADLINE_NONE or tick_before(since + limit, due[0])):
        kind[0] = this_kind
        due[0] = since + limit


cdef inline int connection_deadline(const tst_connection *connection, bint waits, bint wants_input,
                                    uint32_t *due) noexcept nogil:
    """The nearest deadline, as DEADLINE_* and its tick. `waits`: output does; `wants_input`: we would read what came,
    for while we do not the peer is not to blame. Owner only."""
    cdef const tst_limits *limits = connection.limits
    cdef uint32_t sent = load32(&connection.output_tick, RELAXED)
    cdef int kind = DEADLINE_NONE
    if limits == NULL:
        return DEADLINE_NONE
    if connection.lingering:
        deadline_add(&kind, due, DEADLINE_LINGER, connection.active_tick, limits.linger)
        deadline_add(&kind, due, DEADLINE_LINGER, connection.since_tick,
                     <uint32_t>min(<uint64_t>limits.linger * LINGER_TIMES, <uint64_t>TICKS_MOST))
        return kind
    if connection.closing:
        deadline_add(&kind, due, DEADLINE_CLOSE, tick_later(sent, connection.since_tick), limits.linger)
        return kind
    if waits:
        deadline_add(&kind, due, DEADLINE_WRITE, sent, limits.write)
    elif connection.ask_writable:          # its handler has more, and the kernel no room
        deadline_add(&kind, due, DEADLINE_WRITE, tick_later(sent, connection.active_tick), limits.write)
    if connection.type == TYPE_SUB and connection.hears_end & HEARD_END and not waits:
        deadline_add(&kind, due, DEADLINE_IDLE, tick_later(sent, connection.active_tick), limits.idle)
    if connection.type != TYPE_SUB or not wants_input:
        return kind
    if connection.unfinished:
        deadline_add(&kind, due, DEADLINE_MESSAGE, connection.since_tick, limits.message)
    elif not connection.heard:
        deadline_add(&kind, due, DEADLINE_FIRST_BYTE, connection.active_tick, limits.first_byte)
    elif not waits:
        deadline_add(&kind, due, DEADLINE_IDLE, tick_later(sent, connection.active_tick), limits.idle)
    return kind
