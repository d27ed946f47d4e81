# cython: language_level=3
"""Shards, workers, batches: who polls, who runs, and how one thread takes over from another.

A *shard* is an epoll set, an eventfd and a stack of requests. Exactly one worker at a time holds its *token*; only the
holder polls it, resolves events and acquires connections. The token also says what its holder is doing:

                     park                         events came, handlers are due
        0 (nobody) --------> (worker, POLLING) <-------------------------------> (worker, RUNNING)
                                                    one CAS each way                   |
                                                                                       | it is stuck in a handler:
                                                       (another, RUNNING) <------------+ one CAS by the watcher

While RUNNING the token may be taken away, so whoever runs handlers finds out by a failing compare-and-swap when it
wants to poll again. While POLLING it can't be. That is all the locking that polling needs.

A *batch* is what one poll brought, with the memory that it was received into. Its entries move by compare-and-swap, so
that each is run once and finished once, whoever does it:

        QUEUED ----> RUNNING ----> RAN ----> DONE
               runner         runner    whoever finishes: the runner after its handlers, or the thread that took over
           ^            |
           +------------+   a compiled handler passes it on to Python

An entry owns its connection (OWNED) from the moment it is made until it is DONE. A thread that takes a shard over runs
the QUEUED entries, finishes the RAN ones, and leaves the RUNNING one to the stuck thread, which finishes it when it
returns.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from tstpool._conn cimport (
    PEND_ROOM, PRESSURE_GONE, STATE_DETACHED, STATE_OPEN, STATE_OWNED, connection_ask, connection_mark,
    generation_of, tst_connection, tst_limits, tst_table, tst_total)
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, RELAXED, RELEASE, SEQ_CST, add32, compare_exchange32, compare_exchange64,
    compare_exchange_pointer, epoll_event, exchange32, exchange_pointer, load32, load64, load_pointer,
    pthread_cond_signal, pthread_cond_t, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store32, store64,
    sub32, tst_rarely, tst_usually)
from tstpool._poll cimport connection_flush, sys_wake
from tstpool._queue cimport tst_shared, tst_stock
from tstpool._stats cimport clock_now, tst_stats, tst_tick_clock
from tstpool._timer cimport tick_before, tst_wheel, wheel_put, wheel_remove

cdef enum:
    BATCH_EVENTS = 256         # events of one epoll_wait
    BATCH_ENTRIES = 512        # those, what a burst of accepts adds, and requests
    SCRATCH_FULL = 2           # a half is full: run what was received before it leaves the cache

# What events of a shard's own descriptors carry: no connection has the generation 0.
cdef enum:
    ID_WAKE = 0                # event_fd: somebody has a request
    ID_ALARM = 1               # timer_fd: a timer is due

cdef enum:
    PHASE_STOPPED = 0
    PHASE_RUNNING = 1
    PHASE_DRAINING = 2         # stop() was called: no more input, output is sent, connections close
    PHASE_ENDING = 3           # nothing is open any more: workers leave

cdef enum:
    ENTRY_QUEUED = 0
    ENTRY_RUNNING = 1
    ENTRY_RAN = 2
    ENTRY_DONE = 3

cdef enum:
    DO_CONNECT = 1             # run on_connect
    DO_WRITABLE = 2            # run on_writable
    DO_INPUT = 4               # run on_message for what is ready
    DO_DISCONNECT = 8          # run on_disconnect
    DO_RETIRE = 16             # the handlers are through with it: free it
    DO_BODY = 32               # make the bytes object that a long message is to be received into
    DO_RELIEF = 64             # beside DO_WRITABLE: only because pressure is gone, which a function does not hear of
    DO_EOF = 128               # run on_eof

cdef enum:
    SLEEPING_NOT = 0
    SLEEPING_LONG = 1          # until an event comes, or a request
    SLEEPING_SHORT = 2         # it looks after other shards too

cdef enum:
    TOKEN_POLLING = 0
    TOKEN_RUNNING = 1


cdef struct tst_entry:
    uint32_t state             # atomic
    uint32_t what              # DO_*; written by the runner
    uint32_t generation
    bint compiled              # its handler is compiled: it may not need the interpreter
    tst_connection *connection  # borrowed; OWNED by this entry until it is DONE


# What a batch's input is received into. Counted, because a handler may keep a view of it (copy=False).
cdef struct tst_scratch:
    uint32_t users             # atomic: the batch, and each view that is kept
    char bytes[4]              # and more: the batch's scratch_size


cdef struct tst_batch:
    tst_batch *next            # owned by the free list
    uint32_t users             # atomic: each thread in it, and the shard's token
    int n_events
    int next_event             # the first that has no entry yet
    int n_entries
    int n_python               # entries that need the interpreter
    int n_compiled             # entries whose handlers are compiled
    size_t scratch_size        # bytes received into in one turn
    size_t scratch_used
    size_t for_compiled        # of it, what compiled handlers are to get
    size_t received_elsewhere  # bytes: into objects or transfers, or to be dropped
    epoll_event events[BATCH_EVENTS]
    tst_entry entries[BATCH_ENTRIES]
    tst_scratch *scratch       # owned, counted; NULL: no memory


cdef struct tst_worker:
    uint64_t calls             # atomic: odd while it runs an entry's handlers, or another hook
    uint64_t waiting_since     # atomic: monotonic nanoseconds, 0 while it has something to do
    int no
    int tid
    unsigned long ident        # threading.get_ident() of its thread
    tst_connection *current    # the connection whose handler it is in
    tst_entry *left            # borrowed: an entry that waits for Python, of a batch that is not its any more
    int last_shard             # that it held, so that it takes another one next
    uint64_t since             # when it took the shard that it holds, or last looked after the others
    tst_tick_clock ticks
    uint64_t group             # quick handler calls that are timed together
    uint64_t group_most
    uint64_t burst             # messages of one connection from which on others may get their turn
    uint64_t clock             # when its last job ended; begin of the next one in the same batch
    int accept_errno           # the last failure of accept, to be logged
    tst_shared *spares         # owned, linked by next: bytes objects for messages to come, all of one size
    size_t spares_left
    size_t spare_size          # bytes in a message that objects are, or are to be, made for
    int spare_votes            # messages of that size less those of others, within bounds
    uint64_t slow_calls        # atomic: `calls` when somebody last looked whether it is in a slow handler ...
    uint64_t slow_since        # atomic: ... and when that call was seen first, monotonic nanoseconds
    uint64_t slow_logged       # atomic: `calls` of the slow handler that was logged last
    uint64_t looked_calls      # watcher only: `calls` at its last look
    int looks                  # watcher only: looks at which it had not moved
    tst_stats stats
    char apart[128]            # keeps two workers' counters off one cache line


cdef struct tst_shard:
    uint64_t token             # atomic: 0, or (worker + 1) << 8 | TOKEN_*
    void *requests             # atomic: stack of connections that somebody wants something of
    uint32_t sleeping          # atomic: SLEEPING_*, the holder is in epoll_wait, or about to be
    uint32_t wakers            # atomic: threads that may be about to write to event_fd
    uint32_t open              # atomic: connections and listeners whose descriptors are not closed yet
    int no
    int epoll_fd               # owned
    int event_fd               # owned
    int timer_fd               # owned
    uint64_t alarm             # holder only: what timer_fd is set to, monotonic nanoseconds; 0: nothing
    uint32_t draining          # atomic, written by the holder: stop() was seen
    uint32_t aborted           # atomic, written by the holder: the time for draining is over
    bint napped                # holder only: the last sleep was shorter than busy_poll
    uint32_t vain              # holder only: busy polls in a row that found nothing, POLLS_VAIN_MOST at most
    uint32_t sit_out           # holder only: naps to come before the next busy poll
    bint requests_first        # holder only: requests and events take turns in being collected first
    uint32_t done              # atomic: all is closed, stop() is through with it
    tst_batch *batch           # holder only
    tst_connection *todo       # holder only: requests taken from the stack, oldest first
    tst_connection *todo_last
    tst_connection *listeners  # holder only, linked by timer_next
    uint64_t accept_again      # holder only: when to accept again after there was too much of something; 0: now
    bint full                  # holder only: it was too many connections
    tst_stock stock            # chunks of output that wait to be used again
    pthread_mutex_t mutex      # guards the wheel
    tst_wheel wheel


cdef struct tst_engine:
    uint32_t phase             # atomic: PHASE_*
    uint32_t watcher_asleep    # atomic: whoever begins to run handlers must wake it
    uint64_t drain_until       # atomic: monotonic nanoseconds
    uint64_t idle_time         # nanoseconds
    uint64_t busy_poll         # nanoseconds of polling before a holder goes to sleep; 0: none
    uint64_t slow_handler      # nanoseconds from which a job is reported
    bint log_slow              # nobody else wants on_slow: handlers that are stuck for that long are logged
    uint64_t slow_look         # atomic: when to look for them, 0: nobody is known to be stuck
    bint call_idle             # a handler wants on_idle
    bint call_longest          # a handler wants on_most_elapsed
    bint close_excess          # connections above the limit are closed, instead of waiting in the kernel's backlog
    uint32_t max_connections   # 0: no limit
    int accepts_per_turn       # of one listener
    uint64_t accept_pause      # nanoseconds to wait after the process ran out of descriptors or memory
    size_t receive_size        # bytes that are received in one turn
    uint64_t messages_per_turn  # of one connection, if they take RUN_TIME
    uint32_t n_listeners       # atomic
    uint32_t complaining       # atomic: a worker logs that accept has failed
    uint64_t complained        # monotonic nanoseconds, for whoever has set that: when it was last logged; 0: never
    uint64_t closed_unserved   # atomic: connections that the pool itself closed, when no worker was left
    tst_total total            # output that waits
    tst_shared *large_spares   # owned, linked by next, under the GIL: objects of large messages, for those to come
    size_t large_size          # bytes of these
    size_t large_wanted[4]     # under the GIL: sizes that the last large messages had; others are not kept
    uint32_t next_wanted       # under the GIL: index of the oldest
    tst_limits *limits         # owned: the pool's first, then those of listeners
    uint8_t trigger
    uint32_t counters_version  # atomic: odd while start() clears the counters
    int n_workers              # atomic: raised after `workers` was made to hold them
    int n_shards               # atomic: changes only while no worker runs; `shards` was made for as many or more
    tst_worker *workers        # owned, atomic; for anybody who reads counters, so never freed while the pool lives
    int workers_room           # so many fit there
    int n_outgrown
    tst_worker *outgrown[32]   # owned: where there was less room. Each has at least twice that of the one before
    tst_shard *shards          # owned
    pthread_mutex_t mutex      # guards all below
    pthread_cond_t standby     # parked workers
    pthread_cond_t watch       # the watcher
    int watcher                # atomic, written under the mutex: worker number, -1: nobody
    uint64_t blocked_at        # monotonic nanoseconds: when a handler was found blocked last, 0: never
    tst_batch *batches         # owned: free ones
    tst_table table


# --------------------------------------------------------------------------------------------------- token

cdef inline uint64_t token_of(int worker, uint64_t activity) noexcept nogil:
    return (<uint64_t>worker + 1) << 8 | activity


cdef inline bint token_move(tst_shard *shard, uint64_t old, uint64_t fresh) noexcept nogil:
    return compare_exchange64(&shard.token, &old, fresh, False, SEQ_CST, ACQUIRE)


cdef inline bint token_held(tst_shard *shard, int worker) noexcept nogil:
    return load64(&shard.token, SEQ_CST) >> 8 == <uint64_t>worker + 1


cdef inline bint shard_leave_running(tst_worker *worker, tst_shard *shard) noexcept nogil:
    """RUNNING -> POLLING. False: the shard was taken over meanwhile."""
    return token_move(shard, token_of(worker.no, TOKEN_RUNNING), token_of(worker.no, TOKEN_POLLING))


cdef inline void shard_enter_running(tst_engine *engine, tst_worker *worker, tst_shard *shard) noexcept nogil:
    """POLLING -> RUNNING. From here on the watcher looks after us, so it must be awake."""
    store64(&shard.token, token_of(worker.no, TOKEN_RUNNING), SEQ_CST)
    if tst_rarely(load32(&engine.watcher_asleep, SEQ_CST) != 0):
        pthread_mutex_lock(&engine.mutex)
        store32(&engine.watcher_asleep, 0, RELAXED)
        pthread_cond_signal(&engine.watch)
        pthread_mutex_unlock(&engine.mutex)
    elif tst_rarely(engine.n_shards > 1) and <int>load32(<uint32_t *>&engine.watcher, SEQ_CST) < 0:
        engine_wake_looker(engine)


cdef inline void engine_wake_looker(tst_engine *engine) noexcept nogil:
    """Nobody is parked to watch: a worker that sleeps in another shard must look after this one, unless one does."""
    cdef int i
    cdef uint32_t sleeping
    cdef tst_shard *sleeper = NULL
    for i in range(engine.n_shards):
        sleeping = load32(&engine.shards[i].sleeping, SEQ_CST)
        if sleeping == SLEEPING_SHORT:
            return
        if sleeping == SLEEPING_LONG:
            sleeper = &engine.shards[i]
    if sleeper != NULL and exchange32(&sleeper.sleeping, SLEEPING_NOT, SEQ_CST):
        sys_wake(sleeper.event_fd)


# ------------------------------------------------------------------------------------------------- batches

cdef inline tst_batch *batch_get(tst_engine *engine) noexcept nogil:
    """A batch of its own for a thread that begins to poll: used by it and by the shard's token. NULL: no memory."""
    cdef tst_batch *batch
    pthread_mutex_lock(&engine.mutex)
    batch = engine.batches
    if batch != NULL:
        engine.batches = batch.next
    pthread_mutex_unlock(&engine.mutex)
    if batch == NULL:
        batch = <tst_batch *>malloc(sizeof(tst_batch))
        if batch == NULL:
            return NULL
        batch.scratch = NULL
    batch.scratch_size = engine.receive_size
    batch.next = NULL
    store32(&batch.users, 2, RELEASE)
    batch.n_events = batch.next_event = 0
    if batch_empty(batch) < 0:
        batch_leave(engine, batch, 2)
        return NULL
    return batch


cdef inline int batch_empty(tst_batch *batch) noexcept nogil:
    """Makes it ready for the next turn. -ENOMEM: it has nothing to receive into."""
    batch.n_entries = batch.n_python = batch.n_compiled = 0
    batch.scratch_used = batch.for_compiled = batch.received_elsewhere = 0
    if batch.scratch != NULL and load32(&batch.scratch.users, ACQUIRE) > 1:
        scratch_leave(batch.scratch)       # somebody still looks at what was received last
        batch.scratch = NULL
    if batch.scratch == NULL:
        batch.scratch = <tst_scratch *>malloc(sizeof(tst_scratch) + batch.scratch_size)
        if batch.scratch == NULL:
            return -ENOMEM
        batch.scratch.users = 1
    return 0


cdef inline void scratch_leave(tst_scratch *scratch) noexcept nogil:
    if scratch != NULL and sub32(&scratch.users, 1, ACQ_REL) == 0:
        free(scratch)


cdef inline void batch_leave(tst_engine *engine, tst_batch *batch, uint32_t users) noexcept nogil:
    """Gives `users` uses back. The last one puts the batch on the free list; memory goes when the pool goes."""
    if sub32(&batch.users, users, ACQ_REL) == 0:
        pthread_mutex_lock(&engine.mutex)
        batch.next = engine.batches
        engine.batches = batch
        pthread_mutex_unlock(&engine.mutex)


cdef inline tst_entry *batch_add(tst_batch *batch, tst_connection *connection, uint32_t what) noexcept nogil:
    cdef tst_entry *entry = &batch.entries[batch.n_entries]
    entry.connection = connection
    entry.generation = generation_of(load64(&connection.state, RELAXED))
    entry.what = what
    entry.compiled = (connection.compiled != NULL and not what & (DO_CONNECT | DO_DISCONNECT | DO_BODY | DO_EOF)
                      and tst_usually(not load32(&connection.rebind, ACQUIRE)))
    store32(&entry.state, ENTRY_QUEUED if what else ENTRY_RAN, RELEASE)
    batch.n_entries += 1
    batch.n_python += what != 0 and not entry.compiled
    return entry


cdef inline bint entry_move(tst_entry *entry, uint32_t old, uint32_t fresh) noexcept nogil:
    if tst_rarely(load32(&entry.state, SEQ_CST) != old):
        return False
    return compare_exchange32(&entry.state, &old, fresh, False, SEQ_CST, ACQUIRE)


cdef inline void entry_detach(tst_entry *entry, tst_stats *stats) noexcept nogil:
    """Its handler runs, and may do so for long: output of the connection waits for it no longer."""
    if connection_mark(entry.connection, STATE_DETACHED, True, STATE_OWNED, entry.generation):
        connection_flush(entry.connection, entry.generation, False, True, clock_now(), stats)
        connection_ask_relief(entry.connection, entry.generation)


cdef inline void batch_detach(tst_batch *batch, tst_stats *stats) noexcept nogil:
    """The shard was taken from a stuck thread: what its handler has sent goes out now, what it sends later will not
    wait."""
    cdef int i
    cdef tst_entry *entry
    for i in range(batch.n_entries):
        entry = &batch.entries[i]
        if load32(&entry.state, SEQ_CST) == ENTRY_RUNNING:
            entry_detach(entry, stats)


# ------------------------------------------------------------------------------------------------ requests

cdef inline void shard_push(tst_shard *shard, tst_connection *connection) noexcept nogil:
    """Puts a connection, whose QUEUED the caller has set, on the stack; wakes the shard if it sleeps."""
    cdef void *top = load_pointer(&shard.requests, RELAXED)
    while True:
        connection.next_request = <tst_connection *>top
        if compare_exchange_pointer(&shard.requests, &top, connection, True, SEQ_CST, RELAXED):
            break
    shard_wake(shard)


cdef inline void shard_wake(tst_shard *shard) noexcept nogil:
    """Ends the holder's sleep, if it sleeps."""
    if load32(&shard.sleeping, SEQ_CST):
        add32(&shard.wakers, 1, SEQ_CST)       # so that the number stays the eventfd's
        if exchange32(&shard.sleeping, 0, SEQ_CST):
            sys_wake(shard.event_fd)
        sub32(&shard.wakers, 1, RELEASE)


cdef inline int shard_ask(tst_connection *connection, uint32_t generation, uint64_t pending) noexcept nogil:
    """connection_ask, with the push that it may need. Returns 0, or GONE."""
    cdef int result = connection_ask(connection, generation, pending)
    if result == 1:
        shard_push(<tst_shard *>connection.shard, connection)
        result = 0
    return result


cdef inline void connection_ask_relief(tst_connection *connection, uint32_t generation) noexcept nogil:
    """After a flush by who does not own it: input that waited for less output goes on.

    An owner sees what is asked when it releases. Nothing must be pushed for one that is stuck: whoever took that from
    the stack could not acquire the connection, and would be here again, over and over until the handler returns.
    """
    if load32(&connection.pressure, ACQUIRE) == PRESSURE_GONE:
        if not connection_mark(connection, PEND_ROOM, True, STATE_OPEN | STATE_OWNED, generation):
            shard_ask(connection, generation, PEND_ROOM)


cdef inline void shard_take_requests(tst_shard *shard) noexcept nogil:
    """Moves the stack to the end of the to-do list, oldest first. Holder only."""
    cdef tst_connection *last = <tst_connection *>exchange_pointer(&shard.requests, NULL, SEQ_CST)
    cdef tst_connection *first = NULL
    cdef tst_connection *newest = last
    cdef tst_connection *older
    while last != NULL:
        older = last.next_request
        last.next_request = first
        first = last
        last = older
    if first == NULL:
        return
    if shard.todo == NULL:
        shard.todo = first
    else:
        shard.todo_last.next_request = first
    shard.todo_last = newest


# -------------------------------------------------------------------------------------------------- timers

cdef inline void shard_set_timer(tst_worker *worker, tst_shard *shard, tst_connection *connection,
                                 uint32_t due) noexcept nogil:
    """Has the wheel ask for the connection (PEND_TIMER) at that tick, or at the next one. Owner only."""
    pthread_mutex_lock(&shard.mutex)
    wheel_remove(&shard.wheel, connection)
    connection.timer_due = due if tick_before(shard.wheel.tick, due) else shard.wheel.tick + 1
    wheel_put(&shard.wheel, connection)
    pthread_mutex_unlock(&shard.mutex)
    connection.has_timer = True
    if not token_held(shard, worker.no):
        shard_wake(shard)                  # it may sleep for longer than that


cdef inline void shard_drop_timer(tst_shard *shard, tst_connection *connection) noexcept nogil:
    pthread_mutex_lock(&shard.mutex)
    wheel_remove(&shard.wheel, connection)
    pthread_mutex_unlock(&shard.mutex)
