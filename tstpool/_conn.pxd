# cython: language_level=3
"""A connection, the table of connections, and who may touch what.

**The table** is keyed by descriptor: slot = descriptor number. The kernel already guarantees that a number belongs to
one open file at a time and hands out the lowest free one, so it is our allocator, and the table stays dense. Slots come
in chunks that are never moved or freed while the pool lives: a stale pointer is always safe to read, and the generation
in the state word says whether it is stale. A slot is free *before* its descriptor is closed, because the moment after
close() another thread may be given the same number.

**The id** of a connection is generation << 32 | slot. It is what epoll hands back with each event; it never repeats
within 2^32 uses of one slot.

**The state word** is one atomic 64-bit number, generation << 32 | flags, so that no compare-and-swap can succeed on a
connection of another generation:

                        accept, addsocket
              FREE ------------------------> OPEN
        generation+1                           |
               ^                               | connection_acquire: one CAS, IDLE -> OWNED
               |                               v
               |        connection_release   OWNED ----------------------+
               |      +------------------  (a worker is in its handlers) |  connection_retire
               |      v                        ^                         |  (on_disconnect has run)
               |     IDLE ---------------------+                         v
               +------------------------------------------------------ OWNED, retired
                 the last of {owner, flusher, request queue} to let go frees the slot and closes the descriptor

    PAUSED      the user wants no input for now
    QUEUED      the connection is in its shard's stack of requests
    DETACHED    its owner is stuck in a handler and has lost its shard: output can't wait for it
    PEND_*      what to do with it as soon as somebody can own it: CONNECT, IN, OUT, CLOSE, ARM, TIMER, ROOM
    DEAD        retired while QUEUED: whoever takes it from the stack frees it

**Who may touch what.** Each field says which of three rules holds for it: `atomic`; `locked` (only with
connection.lock held); `owner` (only by the worker that set OWNED; the compare-and-swap orders one owner's writes before
the next owner's reads).
"""
from cpython.object cimport PyObject
from libc.errno cimport EINVAL, ENOBUFS, ENOMEM, ENOTCONN
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from tstpool._data cimport tst_data, tst_input
from tstpool._frame cimport (
    FRAME_DELIMITED, HEADER_MOST, delimiter_fits, delimiter_kept, frame_header, frame_put_length, tst_frame,
    tst_framing)
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, RELAXED, RELEASE, SEQ_CST, TST_DEBUG, add64, compare_exchange64, compare_exchange_pointer, linger,
    load32, load64, load_pointer, recv, send, store32, store64, tst_bug, tst_rarely, tst_usually, write)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._queue cimport (
    queue_append, queue_commit, queue_drop, queue_held, queue_reserve, queue_room, queue_share, queue_size, tst_chunk,
    tst_queue, tst_shared)
from tstpool._stats cimport clock_now

cdef enum:
    STATE_OPEN = 0x1
    STATE_OWNED = 0x2
    STATE_PAUSED = 0x4
    STATE_QUEUED = 0x8
    STATE_DETACHED = 0x10
    STATE_DEAD = 0x20
    PEND_CONNECT = 0x100
    PEND_IN = 0x200
    PEND_OUT = 0x400
    PEND_CLOSE = 0x800
    PEND_ARM = 0x1000
    PEND_TIMER = 0x2000
    PEND_ROOM = 0x4000
    PEND_ANY = 0x7f00

cdef enum:
    TABLE_CHUNK = 256          # connections in one chunk
    TABLE_CHUNKS = 8192        # 2,097,152 descriptors: twice the usual fs.nr_open


cdef enum:
    TYPE_SUB = 0
    TYPE_LISTEN = 2

cdef enum:
    NO_TIMER = 0xffffffff      # timer_slot of a connection that is in no wheel


# Output that waits for peers, of all connections of a pool. Only what the kernel has refused once is counted, and what
# is more than high_water: the usual, which goes out at once, costs nothing.
cdef struct tst_total:
    uint64_t queued            # atomic: bytes
    uint64_t broadcasts        # atomic: bytes of those that somebody has waiting still, each counted once
    uint64_t most              # 0: no limit
    uint64_t overflow_closed   # atomic: connections that were closed for having too much
    uint64_t overflow_refused  # atomic: how often more was not taken
    uint64_t write_closed      # atomic: those that took nothing for write_timeout, found by a send that waited for room
    uint64_t pressed           # atomic: how often a connection came to have more than high_water waiting


cdef enum:
    PASSED_MESSAGE = 1         # the message at hand
    PASSED_WRITABLE = 2        # that it may write
    PRESSURE_NONE = 0
    PRESSURE_HIGH = 1          # more than high_water waits: no more messages are handed out meanwhile (auto_pause)
    PRESSURE_GONE = 2          # it has fallen to low_water since; the owner is to hear of it

# The end of input: the peer has finished sending, and may still read.
cdef enum:
    HEARS_END = 1              # its handler has a hook that wants to hear of it, and then says how to go on
    HEARD_END = 2              # that one was called

cdef enum:
    OVERFLOW_REFUSE = 0        # send() fails
    OVERFLOW_CLOSE = 1         # the connection ends
    OVERFLOW_BLOCK = 2         # send() waits, if it may


# How much output of a connection may wait, and how many ticks of the pool's clock it may be without something; 0: no
# limit.
cdef struct tst_limits:
    tst_total *total           # borrowed from the engine
    size_t high_water          # bytes
    size_t low_water
    size_t max_queued          # with so much waiting no more is taken: the last message may go beyond
    uint8_t overflow           # OVERFLOW_*
    uint8_t auto_pause
    uint32_t first_byte
    uint32_t message
    uint32_t idle
    uint32_t write
    uint32_t linger
    tst_limits *next           # owned: all that a pool ever made


# What the engine knows of a compiled handler (TstNogilHandler): functions that are called without the interpreter.
ctypedef int (*tst_received)(void *handler, void *sock, const char *data, size_t size) noexcept nogil
ctypedef int (*tst_notified)(void *handler, void *sock) noexcept nogil


cdef struct tst_compiled:
    void *handler              # borrowed: the TstNogilHandler; NULL: there is none
    tst_notified connected
    tst_received received
    tst_notified writable
    tst_notified eof
    tst_notified disconnected


# Room for an IPv6 address. A unix socket's path is longer: of a peer that has one, only the family is here.
cdef struct tst_address:
    uint16_t family
    uint8_t bytes[26]


cdef struct tst_connection:
    uint64_t state             # atomic
    uint32_t lock              # atomic
    int fd                     # fixed while OPEN; equals the slot. From here on all is zeroed for a new connection
    int epoll_fd               # fixed while OPEN
    tst_connection *next_request   # owned by the stack of requests, while QUEUED
    void *shard                # borrowed; fixed while OPEN
    uint32_t *shard_open       # borrowed, atomic: the shard's count of descriptors that are not closed yet
    uint8_t type               # TYPE_*, or another TstSockType; fixed while OPEN
    uint8_t trigger            # TRIGGER_*; fixed while OPEN

    uint8_t registered         # locked: epoll knows the descriptor
    uint8_t flushing           # locked: a worker is sending, with the lock released
    uint8_t want_out           # locked: the kernel took less than all; EPOLLOUT carries on
    uint8_t want_room          # locked: need_send waits for EPOLLOUT
    uint8_t out_closed         # locked: no more output is accepted
    uint8_t out_drop           # locked: the flusher is to forget what is left
    uint8_t retired            # locked: the owner has let go for ever
    uint8_t aborted            # locked: the peer is to get a reset
    uint8_t urgent_off         # locked, written by the owner: EPOLLPRI is not asked for, see connection_mutes_urgent
    uint8_t out_ended          # locked: out_closed is send_eof()'s doing; the peer is told, and the connection goes on
    uint32_t out_error         # atomic, written locked: errno of the send that failed
    uint32_t armed             # locked: the event mask that the kernel holds
    tst_queue out              # locked
    size_t counted             # locked: bytes of it that are in limits.total

    uint8_t connected          # owner: on_connect accepted it; on_disconnect is due
    uint8_t end_of_input       # owner: the peer has finished or the connection broke
    uint8_t closing            # owner: only output remains to be sent
    uint8_t hold_input         # owner: a SEND is under way; input waits until it is done (S12)
    uint8_t call_writable      # owner: call the handler with EPOLLOUT when send_mark is reached
    uint8_t ask_writable       # owner: need_send is waiting for room in the kernel's buffer
    uint8_t readable           # owner: the kernel may hold more, and has reported it already
    uint8_t message_ready      # owner: a whole message waits for the handler
    uint8_t framed             # owner: the message at hand is `frame`
    uint8_t windowed           # owner: the handler has been given `frame` and may read no further
    uint8_t too_large          # owner: the peer has announced, or sent, more than a message may have
    uint8_t has_read           # owner: the handler took some input with read() in this call
    uint8_t passed_on          # owner: PASSED_* that the compiled handler has passed on to Python
    uint8_t heard              # owner: something has arrived
    uint8_t bulky              # owner: much arrived at once when something arrived last
    uint8_t large              # owner: the last message was so long that it got its object before it was there
    uint8_t unfinished         # owner: a message has begun to arrive, at since_tick
    uint8_t close_noted        # owner: since_tick is when closing began
    uint8_t lingering          # owner: it is closed, and what still arrives is dropped
    uint8_t linger_for_room    # owner: only until the peer has acknowledged all that was sent; nothing has come since
    uint8_t has_timer          # owner: it is in the wheel, or the wheel has asked for it
    uint8_t told_pools         # owner: the pool's compiled handler knows it, although it has a handler of its own
    uint8_t in_received        # owner: a compiled handler is in `received`, and has where the input lies
    uint8_t hears_end          # owner: HEARS_*
    uint32_t active_tick       # owner: when something arrived last, or a handler returned
    uint32_t since_tick        # owner: when the unfinished message began, or the closing, or the lingering
    uint8_t tell_room          # owner: a handler has a hook that wants to hear of PRESSURE_GONE
    uint8_t input_first        # owner: the handler was told of its output; what has arrived meanwhile has its turn
    uint8_t owes_relief        # owner: pressure went while nobody knew whether the handler to come wants to hear of it
    uint8_t untouched          # owner: a function was called again for input that it has left unread before
    uint32_t pressure          # atomic, written locked: PRESSURE_*
    uint64_t pressed_since     # locked: when that became PRESSURE_HIGH, or was allowed for last; monotonic nanoseconds
    uint32_t output_tick       # atomic, written locked: when the kernel took output last, or began not to
    uint32_t kernel_holds      # locked: bytes that the peer has not acknowledged, at a look since; 0: there was none
    uint32_t rebind            # atomic: sock.handler was assigned; the owner is to look it up anew
    int reason                 # owner: errno that ended it, 0 for a clean end
    const tst_compiled *compiled   # owner; borrowed from a Binding. NULL: its handler is Python's alone
    uint64_t report            # owner: nanoseconds of a job that on_slow or on_most_elapsed is to hear of
    int thread_no              # owner: the worker that ran it last
    uint32_t events            # owner, read by anybody (atomic): epoll bits shown to the handler
    uint64_t send_mark         # owner: value of out.sent at which the running SEND is done
    tst_input input            # owner
    const tst_framing *framing     # locked, written by the owner; borrowed from a Framing. NULL: bytes as they arrive
    const tst_framing *framed_by   # owner: by which `frame` and `scanned` were made
    tst_frame frame            # owner
    size_t scanned             # owner: see frame_next
    tst_shared *body           # owner; counted: a message that is received straight into its bytes object, or block
    size_t body_size           # owner: bytes of it that have arrived
    size_t expects             # owner: bytes of the last message, if it was large and came in one piece; else 0
    tst_data *recv             # borrowed from the TstSocket; atomic pointer, NULL until the handler asks for it
    tst_data *send             # the same
    PyObject *sock             # owned reference to the TstSocket, while OPEN; locked

    const tst_limits *limits       # borrowed from the engine; fixed while OPEN
    tst_connection *timer_next     # a slot of the shard's wheel, guarded by its mutex; of a listener: the next listener
    tst_connection *timer_previous
    uint32_t timer_due             # written by the owner with the mutex held
    uint32_t timer_slot            # guarded by the mutex; NO_TIMER
    tst_address peer           # fixed while OPEN


cdef struct tst_table:
    void *chunks[TABLE_CHUNKS]     # owned, atomic: NULL or tst_connection[TABLE_CHUNK]


# ----------------------------------------------------------------------------------------------- the table

cdef inline uint32_t generation_of(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 32)


cdef inline uint64_t slot_of(uint64_t id) noexcept nogil:
    return <uint32_t>id


cdef inline uint64_t connection_id(tst_connection *connection) noexcept nogil:
    return <uint64_t>generation_of(load64(&connection.state, ACQUIRE)) << 32 | <uint32_t>connection.fd


cdef inline tst_connection *table_slot(tst_table *table, uint64_t slot) noexcept nogil:
    """The slot's connection, open or not; NULL when no connection was ever near it."""
    cdef void *chunk
    if slot >= <uint64_t>TABLE_CHUNK * TABLE_CHUNKS:
        return NULL
    chunk = load_pointer(&table.chunks[slot // TABLE_CHUNK], ACQUIRE)
    if chunk == NULL:
        return NULL
    return <tst_connection *>chunk + slot % TABLE_CHUNK


cdef inline tst_connection *table_make(tst_table *table, uint64_t slot) noexcept nogil:
    """The same, making its chunk when needed. NULL: no memory, or a descriptor beyond the table."""
    cdef void *chunk
    cdef void *none = NULL
    if slot >= <uint64_t>TABLE_CHUNK * TABLE_CHUNKS:
        return NULL
    if load_pointer(&table.chunks[slot // TABLE_CHUNK], ACQUIRE) == NULL:
        chunk = calloc(TABLE_CHUNK, sizeof(tst_connection))
        if chunk == NULL:
            return NULL
        if not compare_exchange_pointer(&table.chunks[slot // TABLE_CHUNK], &none, chunk, False, ACQ_REL, ACQUIRE):
            free(chunk)        # another thread was faster
    return table_slot(table, slot)


cdef inline tst_connection *table_find(tst_table *table, uint64_t id) noexcept nogil:
    """The open connection of that id; for a bare descriptor (no generation), the one that has it now. NULL: none."""
    cdef uint64_t word
    cdef tst_connection *connection = table_slot(table, slot_of(id))
    if connection == NULL:
        return NULL
    word = load64(&connection.state, ACQUIRE)
    if not word & STATE_OPEN or (generation_of(id) and generation_of(id) != generation_of(word)):
        return NULL
    return connection


cdef inline tst_connection *table_open(tst_table *table, int fd, uint64_t flags, uint64_t *id) noexcept nogil:
    """Gives the slot of a new descriptor to a new connection. NULL: no memory, or somebody closed our descriptor behind
    our back and the kernel has handed its number out again."""
    cdef uint64_t word
    cdef uint64_t generation
    cdef tst_connection *connection = table_make(table, <uint64_t>fd)
    if connection == NULL:
        return NULL
    word = load64(&connection.state, ACQUIRE)
    if <uint32_t>word:
        return NULL
    generation = generation_of(word)
    if generation == 0:
        generation = 1         # an id without a generation means a bare descriptor
    spin_lock(&connection.lock)        # a thread with a stale id may be looking at the slot right now
    memset(&connection.fd, 0, sizeof(tst_connection) - <size_t>(<char *>&connection.fd - <char *>connection))
    connection.fd = fd
    connection.thread_no = -1
    connection.timer_slot = NO_TIMER
    id[0] = generation << 32 | <uint64_t>fd
    store64(&connection.state, generation << 32 | STATE_OPEN | flags, RELEASE)
    spin_unlock(&connection.lock)
    return connection


cdef inline tst_connection *table_chunk(tst_table *table, int number) noexcept nogil:
    """TABLE_CHUNK slots, or NULL when none of them was ever used: for a walk over all connections."""
    return <tst_connection *>load_pointer(&table.chunks[number], ACQUIRE)


# --------------------------------------------------------------------------------------------- transitions

cdef enum:
    ACQUIRED = 1
    BUSY = 0
    GONE = -1


cdef inline int connection_acquire(tst_connection *connection, uint32_t generation, uint64_t *pending) noexcept nogil:
    """IDLE -> OWNED. Takes over the PEND_ bits: the caller is to serve them. BUSY: another worker owns it."""
    cdef uint64_t word = load64(&connection.state, ACQUIRE)
    cdef uint64_t owned
    while True:
        if tst_rarely(not word_is(word, generation)):
            return GONE
        if tst_rarely(word & STATE_OWNED != 0):
            return BUSY
        owned = (word | STATE_OWNED) & ~<uint64_t>(PEND_ANY | STATE_DETACHED)
        if compare_exchange64(&connection.state, &word, owned, True, ACQ_REL, ACQUIRE):
            pending[0] = word & PEND_ANY
            return ACQUIRED


cdef inline bint connection_release(tst_connection *connection, uint64_t pending) noexcept nogil:
    """OWNED -> IDLE, leaving `pending` behind with what others have left. True: the caller must push it as a
    request."""
    cdef uint64_t word = load64(&connection.state, RELAXED)
    cdef uint64_t idle
    cdef bint push
    if TST_DEBUG and not word & STATE_OWNED:
        tst_bug("release of a connection that nobody owns")
    while True:
        idle = (word | pending) & ~<uint64_t>(STATE_OWNED | STATE_DETACHED)
        push = idle & PEND_ANY and not idle & STATE_QUEUED
        if push:
            idle |= STATE_QUEUED
        if compare_exchange64(&connection.state, &word, idle, True, SEQ_CST, RELAXED):
            return push


cdef inline int connection_ask(tst_connection *connection, uint32_t generation, uint64_t pending) noexcept nogil:
    """Leaves a request, from any thread; `pending` 0 asks only for a flush.

    1: the caller must push it on the shard's stack. 0: whoever has the connection now will see it. GONE.
    An owner that is not DETACHED flushes and looks at the pending bits when it releases.
    """
    cdef uint64_t word = load64(&connection.state, SEQ_CST)
    cdef uint64_t asked
    cdef bint push
    while True:
        if generation_of(word) != generation or not word & STATE_OPEN:
            return GONE
        push = not word & STATE_QUEUED and (not word & STATE_OWNED or word & STATE_DETACHED)
        asked = word | pending | (STATE_QUEUED if push else 0)
        if asked == word or compare_exchange64(&connection.state, &word, asked, True, SEQ_CST, SEQ_CST):
            return push


cdef inline bint connection_mark(tst_connection *connection, uint64_t flag, bint on, uint64_t needed,
                                 uint32_t generation) noexcept nogil:
    """Sets or clears a flag, provided the `needed` flags of that generation are set. False: they are not."""
    cdef uint64_t word = load64(&connection.state, ACQUIRE)
    while True:
        if generation_of(word) != generation or (word & needed) != needed:
            return False
        if compare_exchange64(&connection.state, &word, word | flag if on else word & ~flag, True, SEQ_CST, ACQUIRE):
            return True


cdef inline bint connection_is(tst_connection *connection, uint32_t generation) noexcept nogil:
    """The slot still holds the connection of that generation. Sure only while the lock or the ownership is held."""
    return word_is(load64(&connection.state, ACQUIRE), generation)


cdef inline bint word_is(uint64_t word, uint32_t generation) noexcept nogil:
    return tst_usually(generation_of(word) == generation) and tst_usually(word & STATE_OPEN != 0)


# -------------------------------------------------------------------------------------------------- output

cdef inline bint output_is_left(const tst_connection *connection) noexcept nogil:
    """Nobody is on the way to send what was just queued. Lock held, and the state read under it says that nobody owns
    the connection, or that its owner is stuck.

    Any other owner releases, and then looks at the queue, under the lock: it comes after us, or we would have seen it
    gone.
    """
    return not connection.want_out and not connection.flushing


cdef inline void output_account(tst_connection *connection) noexcept nogil:
    """Brings the total and the pressure in line with what waits now. Lock held."""
    cdef const tst_limits *limits = connection.limits
    cdef size_t waits = queue_size(&connection.out)
    cdef size_t counts = 0
    if limits == NULL:
        return
    if tst_rarely(connection.want_out) or tst_rarely(waits > limits.high_water):
        counts = queue_held(&connection.out)
    if tst_rarely(counts != connection.counted):
        add64(&limits.total.queued, <uint64_t>counts - connection.counted, RELAXED)
        connection.counted = counts
    if tst_rarely(waits > limits.high_water):
        if load32(&connection.pressure, RELAXED) != PRESSURE_HIGH:
            if load32(&connection.pressure, RELAXED) == PRESSURE_NONE:
                connection.pressed_since = clock_now()
            store32(&connection.pressure, PRESSURE_HIGH, RELAXED)
            add64(&limits.total.pressed, 1, RELAXED)
    elif tst_rarely(load32(&connection.pressure, RELAXED) == PRESSURE_HIGH) and waits <= limits.low_water:
        store32(&connection.pressure, PRESSURE_GONE, RELEASE)


cdef inline void output_drop(tst_connection *connection) noexcept nogil:
    """Forgets what waits. Lock held, and nobody is sending."""
    queue_drop(&connection.out)
    connection.want_out = False
    output_account(connection)


cdef inline bint output_is_full(const tst_connection *connection, size_t size,
                                const tst_shared *shared) noexcept nogil:
    """So much waits that `size` more bytes are not taken. Lock held.

    Where nothing waits, a message of up to high_water always is: whoever reads must get replies, however little others
    do. A larger one is if the total allows it; or if nothing at all waits, for else it could never be sent; or if it is
    a broadcast's, whose bytes are there once for all who get them, and other broadcasts' are not too many.
    """
    cdef const tst_limits *limits = connection.limits
    cdef size_t waits = queue_size(<tst_queue *>&connection.out)
    cdef uint64_t total
    if limits == NULL or (waits == 0 and size <= limits.high_water):
        return False
    if limits.max_queued and waits >= limits.max_queued:
        return True
    if limits.total.most == 0 or (waits and not connection.want_out and waits + size <= limits.high_water):
        return False
    total = load64(&limits.total.queued, RELAXED)
    if waits == 0 and (total == 0 or (shared != NULL and shared.held != NULL
                                      and load64(shared.held, RELAXED) - shared.size <= limits.total.most)):
        return False
    return total + size > limits.total.most


cdef inline bint connection_take_relief(tst_connection *connection) noexcept nogil:
    """True once, after PRESSURE_GONE. Owner only."""
    cdef bint relief = False
    if load32(&connection.pressure, ACQUIRE) == PRESSURE_GONE:
        spin_lock(&connection.lock)
        relief = load32(&connection.pressure, RELAXED) == PRESSURE_GONE
        if relief:
            store32(&connection.pressure, PRESSURE_NONE, RELAXED)
        spin_unlock(&connection.lock)
    return relief


cdef inline void connection_owe_relief(tst_connection *connection) noexcept nogil:
    """Has PRESSURE_GONE be heard of once more, by a handler that came too late for it. Owner only."""
    spin_lock(&connection.lock)
    if load32(&connection.pressure, RELAXED) == PRESSURE_NONE:
        connection.pressed_since = clock_now()
        store32(&connection.pressure, PRESSURE_GONE, RELEASE)
    spin_unlock(&connection.lock)


cdef inline bint queue_prefixed(tst_queue *queue, const tst_framing *framing, const char *bytes,
                                size_t size) noexcept nogil:
    """Queues a small message with its length before it, in one piece. False: it is another case, nothing was done."""
    cdef char *room
    if tst_rarely(size >= framing.one_piece):
        return False
    room = queue_room(queue, size + framing.header)
    if tst_rarely(room == NULL):
        return False
    frame_put_length(framing, <unsigned char *>room, size - <uint64_t>framing.adjust)
    memcpy(room + framing.header, bytes, size)
    queue_commit(queue, size + framing.header)
    return True


cdef inline int queue_frame(tst_queue *queue, const tst_framing *framing, const char *bytes, size_t size,
                            tst_shared *shared) noexcept nogil:
    """Queues a message with what its framing puts around it; `shared`: its bytes need not be copied.

    -EMSGSIZE: the framing has no frame for so many bytes, -EINVAL: the message holds the delimiter, be it that it was
    kept (Delimited's `keep`) at its end; then nothing was queued. -ENOMEM: a part may be.
    """
    cdef unsigned char header[HEADER_MOST]
    cdef size_t body = size - delimiter_kept(framing, bytes, size)
    cdef int n = frame_header(framing, body, header)
    if n < 0:
        return n
    if framing.kind == FRAME_DELIMITED and not delimiter_fits(framing, bytes, body, size):
        return -EINVAL
    if shared == NULL and queue_reserve(queue, <size_t>n + body + framing.n_delimiter) < 0:
        return -ENOMEM
    if n and queue_append(queue, <char *>header, <size_t>n) < 0:
        return -ENOMEM
    if queue_bytes(queue, bytes, size, shared) < 0:
        return -ENOMEM
    if framing.kind == FRAME_DELIMITED and body == size:
        return queue_append(queue, framing.delimiter, framing.n_delimiter)
    return 0


cdef inline int queue_bytes(tst_queue *queue, const char *bytes, size_t size, tst_shared *shared) noexcept nogil:
    if tst_rarely(shared != NULL):
        return queue_share(queue, shared)
    return queue_append(queue, bytes, size)


cdef inline ssize_t output_take(tst_connection *connection, uint64_t word, const char *bytes, size_t size,
                                tst_shared *shared, bint framed, bint *flush) noexcept nogil:
    """connection_append for one that is open. Lock held; `word`: the state as it was read under it."""
    cdef const tst_limits *limits = connection.limits
    cdef bint owned = word & (STATE_OWNED | STATE_DETACHED) == STATE_OWNED
    # Most often the peer reads, and little waits: then no limit is near.
    cdef bint little = (tst_usually(limits != NULL) and tst_usually(not connection.want_out)
                        and tst_usually(queue_size(&connection.out) + size < limits.high_water))
    cdef ssize_t result = 0
    if tst_rarely(not little) and output_is_full(connection, size, shared):
        return -ENOBUFS
    connection.out.burst = owned
    if not framed or connection.framing == NULL:
        result = queue_bytes(&connection.out, bytes, size, shared)
    elif tst_rarely(shared != NULL) or tst_rarely(
            not queue_prefixed(&connection.out, connection.framing, bytes, size)):
        result = queue_frame(&connection.out, connection.framing, bytes, size, shared)
    if tst_rarely(result == -ENOMEM) and framed:
        connection.out_closed = connection.out_drop = connection.aborted = True
        store32(&connection.out_error, ENOMEM, RELAXED)
        flush[0] = True
    elif tst_usually(result == 0):
        result = <ssize_t>queue_size(&connection.out)
        if tst_rarely(not little) or tst_rarely(<size_t>result > limits.high_water):
            output_account(connection)
        if tst_rarely(not owned):
            flush[0] = output_is_left(connection)
    return result


cdef inline ssize_t output_take_next(tst_connection *connection, uint32_t generation, const char *bytes,
                                     size_t size) noexcept nogil:
    """output_take for what most messages of a handler are: a small one, whose framing puts its length before it, behind
    another one, while no limit is near. Lock held. Returns the bytes that wait now; 0: it is another case, and nothing
    was done.

    All that output_take and what it calls ask one by one is asked at once here.
    """
    cdef uint64_t owned = <uint64_t>generation << 32 | STATE_OPEN | STATE_OWNED
    cdef tst_queue *queue = &connection.out
    cdef const tst_framing *framing = connection.framing
    cdef tst_chunk *last = queue.tail
    cdef char *room
    cdef size_t whole
    if (tst_rarely(load64(&connection.state, ACQUIRE) & ~<uint64_t>(PEND_ANY | STATE_PAUSED | STATE_QUEUED) != owned)
            or tst_rarely(connection.out_closed | connection.want_out)
            or tst_rarely(framing == NULL) or tst_rarely(last == NULL) or tst_rarely(connection.limits == NULL)
            or tst_rarely(size >= framing.one_piece)):
        return 0
    whole = size + framing.header
    if (tst_rarely(last.capacity - last.end < whole)
            or tst_rarely(queue_size(queue) + whole >= connection.limits.high_water)):
        return 0
    room = last.bytes + last.end
    queue_commit(queue, whole)
    frame_put_length(framing, <unsigned char *>room, size - <uint64_t>framing.adjust)
    memcpy(room + framing.header, bytes, size)
    return <ssize_t>queue_size(queue)


cdef inline ssize_t connection_append(tst_connection *connection, uint32_t generation, const char *bytes, size_t size,
                                      tst_shared *shared, bint framed, bint *flush) noexcept nogil:
    """Queues output, from any thread: bytes as they are or, `framed`, as one message of the connection's framing. Bytes
    that are `shared` are not copied. Lock held, and let go of.

    Returns the bytes that wait now, -ENOTCONN when it is closed, -ENOBUFS when too much waits already, -EMSGSIZE or
    -EINVAL when the framing has no frame for them, or -ENOMEM. `flush` becomes True when nobody is on the way to send
    it: the caller must connection_ask() for it. A frame for which memory runs out in the middle breaks the connection:
    the peer could make nothing of the rest.
    """
    cdef ssize_t result = -ENOTCONN
    cdef uint64_t word = load64(&connection.state, ACQUIRE)
    if tst_usually(word_is(word, generation)) and tst_usually(not connection.out_closed):
        result = output_take(connection, word, bytes, size, shared, framed, flush)
    spin_unlock(&connection.lock)
    return result


cdef inline int connection_close_output(tst_connection *connection, uint32_t generation) noexcept nogil:
    """No output is accepted from here on. 1: this call closed it, 0: it was closed already, GONE."""
    cdef int result = GONE
    spin_lock(&connection.lock)
    if connection_is(connection, generation):
        result = not connection_is_closing(connection)
        connection.out_closed = True
        connection.out_ended = False       # close() tells the peer
    spin_unlock(&connection.lock)
    return result


cdef inline bint connection_is_closing(tst_connection *connection) noexcept nogil:
    """It takes no output, and not because of send_eof(). Lock held."""
    return connection.out_closed and not connection.out_ended


cdef inline tst_data *connection_recv(tst_connection *connection) noexcept nogil:
    """The transfer that `recv_data` shows, or NULL; another thread may bring it in at any moment. It goes with the
    TstSocket: owner only, or who holds that."""
    return <tst_data *>load_pointer(<void **>&connection.recv, ACQUIRE)


cdef inline tst_data *connection_send(tst_connection *connection) noexcept nogil:
    """The same of `send_data`."""
    return <tst_data *>load_pointer(<void **>&connection.send, ACQUIRE)


cdef inline bint connection_is_paused(tst_connection *connection) noexcept nogil:
    return load64(&connection.state, RELAXED) & STATE_PAUSED != 0


cdef inline bint connection_is_pressed(tst_connection *connection) noexcept nogil:
    """Its messages have to wait, because too much output does. Owner only."""
    return tst_rarely(load32(&connection.pressure, RELAXED) == PRESSURE_HIGH) and connection.limits.auto_pause


cdef inline bint connection_takes_messages(tst_connection *connection) noexcept nogil:
    """The handler may be called for input. Owner only."""
    if tst_rarely(connection.closing | connection.hold_input) or tst_rarely(connection_is_pressed(connection)):
        return False
    return not load64(&connection.state, RELAXED) & (STATE_PAUSED | PEND_CLOSE)


cdef inline bint connection_wants_input(tst_connection *connection) noexcept nogil:
    """The kernel should report input. Owner only."""
    return tst_usually(not connection.end_of_input) and connection_takes_messages(connection)
