# cython: language_level=3
"""Runs compiled handlers, without the interpreter.

A compiled handler is a set of C functions (`tst_compiled`). It is given pointers into the input where it was received,
and returns a TstStat. What it can't or will not do itself needs Python, and its entry then waits for the interpreter:

    - a message that it passes on (TST_RUN), or that is longer than its framing allows
    - a connection that is new or at its end: its TstSocket is made and let go there
    - a job that on_slow or on_most_elapsed is to hear of
    - a connection whose handler was assigned anew (`rebind`)

While a compiled handler runs, the connection is OWNED and the shard's token is RUNNING, so that a function which blocks
is noticed and the shard taken over, exactly as with handlers in Python.
"""
from libc.stdint cimport uint32_t, uint64_t

from tstpool._conn cimport (
    PASSED_MESSAGE, PASSED_WRITABLE, connection_recv, connection_send, connection_takes_messages, tst_compiled,
    tst_connection)
from tstpool._data cimport data_hold, data_unpin, input_consume, tst_data
from tstpool._entry cimport (
    STAT_RECONNECTED, STAT_RUN, batch_finish, connection_apply, connection_awaits_transfer, connection_cut,
    connection_due, connection_had_body, connection_has_nothing_due, connection_keep_input)
from tstpool._frame cimport frame_next, tst_frame, tst_framing
from tstpool._libc cimport (
    ACQUIRE, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, RELAXED, RELEASE, load32, load64, store32, store64, tst_rarely)
from tstpool._queue cimport shared_leave, tst_shared
from tstpool._shard cimport (
    DO_DISCONNECT, DO_EOF, DO_WRITABLE, ENTRY_QUEUED, ENTRY_RAN, ENTRY_RUNNING, entry_detach, entry_move,
    shard_enter_running, shard_leave_running, token_held, tst_batch, tst_engine, tst_entry, tst_shard, tst_worker)
from tstpool._stats cimport QUICK_CALL, count, stats_job, tick_now

cdef enum:
    RUN_TIME = 100000          # nanoseconds after which the other connections get their turn


cdef inline void worker_enter(tst_worker *worker) noexcept nogil:
    """Code of the user's begins: a handler, or whatever else an entry runs, such as the finalizer of an object that it
    lets go. Until worker_leave the watcher may find that it is stuck."""
    store64(&worker.calls, load64(&worker.calls, RELAXED) + 1, RELEASE)


cdef inline void worker_goes_on(tst_worker *worker) noexcept nogil:
    """In between: one call has returned, so that what follows is another one."""
    store64(&worker.calls, load64(&worker.calls, RELAXED) + 2, RELEASE)


cdef inline void worker_leave(tst_worker *worker) noexcept nogil:
    store64(&worker.calls, load64(&worker.calls, RELAXED) + 1, RELEASE)


cdef inline void worker_job(tst_engine *engine, tst_worker *worker, tst_connection *connection,
                            uint64_t calls) noexcept nogil:
    """Enters the handler calls that end now, and leaves a note at the connection if Python is to hear of one.

    Reading a clock takes as long as a quick handler's tenth part, so that as long as calls are quick the next ones are
    timed together; the slower they are the more exact it is.
    """
    cdef uint64_t begin = worker.clock
    cdef uint64_t elapsed, longest
    worker.clock = tick_now(&worker.ticks)
    begin = min(begin, worker.clock)       # ticks are an estimate, which was ahead of the clock perhaps
    elapsed = worker.clock - begin
    longest = stats_job(&worker.stats, calls, begin, worker.clock)
    if tst_rarely(elapsed >= engine.slow_handler):
        count(&worker.stats.slow_count, 1)
        connection.report = elapsed
    elif tst_rarely(longest != 0) and engine.call_longest:
        connection.report = longest
    if tst_rarely(elapsed >= calls * QUICK_CALL):
        worker.group = 1
    elif tst_rarely(worker.group < worker.group_most):
        worker.group *= 2


cdef inline size_t message_at_hand(tst_connection *connection, const char **bytes) noexcept nogil:
    """Where the message lies that connection_cut has found, and its size. Owner only."""
    if connection.framed:
        bytes[0] = connection.input.view + connection.frame.begin
        return connection.frame.size
    if connection_awaits_transfer(connection):
        bytes[0] = connection_recv(connection).s + connection_recv(connection).req_pos
        return connection_recv(connection).req_len
    bytes[0] = connection.input.view
    return connection.input.size


cdef inline bint run_frames(tst_worker *worker, tst_connection *connection, uint64_t *n) noexcept nogil:
    """The messages of a framing, beginning with the one at hand, as run_messages; `n` counts them.

    Only Python code changes the framing or reads input by itself, so that both stay in local variables meanwhile; and
    only TST_RECONNECTED makes the engine forget the input.
    """
    cdef const tst_compiled *compiled = connection.compiled
    cdef const tst_framing *framing = connection.framing
    cdef const char *view = connection.input.view
    cdef size_t left = connection.input.size
    cdef tst_frame frame = connection.frame
    cdef uint64_t look = n[0] + worker.burst   # reading the clock for each message would cost too much
    cdef int stat = 0, found = 1
    connection.framed = connection.message_ready = False
    while True:
        stat = compiled.received(compiled.handler, connection.sock, view + frame.begin, frame.size)
        worker_goes_on(worker)
        if tst_rarely(stat == STAT_RUN):
            break
        n[0] += 1
        if tst_rarely(stat == STAT_RECONNECTED):
            connection.frame.needed = connection.scanned = 0
            connection_apply(connection, worker, stat)
            return False
        view += frame.whole
        left -= frame.whole
        frame.needed = 0           # that was this one's: nothing is known of the next yet
        found = 0
        if tst_rarely(stat != 0) or tst_rarely(connection_send(connection) != NULL):
            connection_apply(connection, worker, stat)
        if tst_rarely(not connection_takes_messages(connection)):
            break
        if tst_rarely(n[0] >= look):
            if tick_now(&worker.ticks) - worker.clock >= RUN_TIME:
                break
            look += worker.burst
        found = frame_next(framing, view, left, &connection.scanned, &frame)
        if found <= 0:
            break
    connection.frame = frame
    input_consume(&connection.input, connection.input.size - left)
    if stat == STAT_RUN:
        connection.passed_on |= PASSED_MESSAGE
    connection.too_large = found < 0
    connection.framed = connection.message_ready = found != 0
    return found != 0


cdef inline bint run_body(tst_worker *worker, tst_connection *connection, uint64_t *n) noexcept nogil:
    """The same for a long message, which has arrived in memory of its own."""
    cdef tst_shared *body = connection.body
    cdef int stat = connection.compiled.received(connection.compiled.handler, connection.sock, body.bytes, body.size)
    worker_goes_on(worker)
    if tst_rarely(stat == STAT_RUN):
        connection.passed_on |= PASSED_MESSAGE
        return True
    n[0] += 1
    connection_had_body(connection)
    connection.message_ready = connection.framed = False
    connection.frame.needed = connection.scanned = 0
    shared_leave(body, connection.out.stock)
    if stat != 0 or connection_send(connection) != NULL:
        connection_apply(connection, worker, stat)
    return False


cdef inline bint run_bytes(tst_worker *worker, tst_connection *connection, uint64_t *n) noexcept nogil:
    """The same for what has no framing: all that has arrived, or the transfer that was asked for."""
    cdef const char *bytes = NULL
    cdef tst_data *transfer = connection_recv(connection) if connection_awaits_transfer(connection) else NULL
    cdef size_t size
    cdef int stat
    if tst_rarely(transfer != NULL):
        data_hold(transfer)        # resize() on another thread would move it
    size = message_at_hand(connection, &bytes)
    stat = connection.compiled.received(connection.compiled.handler, connection.sock, bytes, size)
    if tst_rarely(transfer != NULL):
        data_unpin(transfer, 0, 0)
    worker_goes_on(worker)
    if tst_rarely(stat == STAT_RUN):
        connection.passed_on |= PASSED_MESSAGE
        return True
    n[0] += 1
    connection.message_ready = False
    if not connection_awaits_transfer(connection):
        input_consume(&connection.input, size)
    if tst_rarely(stat != 0) or tst_rarely(connection_send(connection) != NULL):
        connection_apply(connection, worker, stat)
    return False


cdef inline bint run_messages(tst_engine *engine, tst_worker *worker, tst_connection *connection) noexcept nogil:
    """Gives the compiled handler whole messages, up to a fair share of time. True: the one at hand needs Python.
    Between worker_enter and worker_leave."""
    cdef uint64_t n = 0
    cdef bint passed = False
    store32(&connection.events, (connection.events & (EPOLLPRI | EPOLLRDHUP)) | EPOLLIN, RELAXED)
    connection.in_received = True
    while not passed and connection_cut(connection):
        if tst_rarely(connection.body != NULL):
            passed = run_body(worker, connection, &n)
        elif not connection.framed:
            passed = run_bytes(worker, connection, &n)
        else:
            passed = connection.too_large or run_frames(worker, connection, &n)
        if tst_rarely(n >= worker.burst) and tick_now(&worker.ticks) - worker.clock >= RUN_TIME:
            break
    connection.in_received = False
    count(&worker.stats.messages, n)
    worker_job(engine, worker, connection, n + (passed and not connection.too_large))
    return passed


cdef inline bint run_writable(tst_engine *engine, tst_worker *worker, tst_connection *connection) noexcept nogil:
    """True: Python is to be told instead. Between worker_enter and worker_leave."""
    cdef int stat
    store32(&connection.events, EPOLLOUT, RELAXED)
    stat = connection.compiled.writable(connection.compiled.handler, connection.sock)
    worker_goes_on(worker)
    if stat == STAT_RUN:
        connection.passed_on |= PASSED_WRITABLE
        return True
    worker_job(engine, worker, connection, 1)
    connection_apply(connection, worker, stat)
    return False


cdef inline bint run_compiled(tst_engine *engine, tst_worker *worker, tst_entry *entry) noexcept nogil:
    """All that a compiled handler can do for one connection. True: the entry needs Python too."""
    cdef tst_connection *connection = entry.connection
    if tst_rarely(load32(&connection.rebind, ACQUIRE) != 0):
        return True                        # since it was collected another handler was assigned
    store32(<uint32_t *>&connection.thread_no, <uint32_t>worker.no, RELAXED)
    if tst_rarely(entry.what & DO_WRITABLE != 0) and not connection.closing and (
            not connection.passed_on & PASSED_WRITABLE):
        if run_writable(engine, worker, connection):
            return True
        entry.what &= ~<uint32_t>DO_WRITABLE
    if (tst_rarely(connection.passed_on & PASSED_MESSAGE != 0) or tst_rarely(run_messages(engine, worker, connection))
            or tst_rarely(connection.report != 0)):
        return True
    if tst_rarely(not connection_has_nothing_due(connection)) and connection_due(connection) & (DO_DISCONNECT | DO_EOF):
        return True
    connection_keep_input(connection)
    return False


cdef inline bint entry_pass_on(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                               tst_entry *entry) noexcept nogil:
    """Has Python go on with an entry that is RUNNING. False: the shard was taken over meanwhile."""
    cdef bint kept = shard_leave_running(worker, shard)
    if kept:
        batch.n_python += 1
    else:
        # Who has taken the shard over may have looked at this entry while it was RUNNING: we try it ourselves.
        worker.left = entry
    store32(&entry.state, ENTRY_QUEUED, RELEASE)
    if kept:
        shard_enter_running(engine, worker, shard)
    return kept


cdef inline bint entry_run_compiled(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                    tst_entry *entry) noexcept nogil:
    """Runs an entry's compiled handler, unless another thread does. False: the shard was taken over while it ran."""
    cdef bint python
    if tst_rarely(not entry_move(entry, ENTRY_QUEUED, ENTRY_RUNNING)):
        return True
    if tst_rarely(not token_held(shard, worker.no)):
        # Who took the shard over may have looked at the entry before it was RUNNING.
        entry_detach(entry, &worker.stats)
    worker.current = entry.connection
    worker_enter(worker)
    python = run_compiled(engine, worker, entry)
    worker_leave(worker)
    worker.current = NULL
    if tst_rarely(python):
        worker.clock = tick_now(&worker.ticks)     # what it took is not the next one's time
        return entry_pass_on(engine, worker, shard, batch, entry)
    store32(&entry.state, ENTRY_RAN, RELEASE)
    return token_held(shard, worker.no)


cdef inline bint batch_run_compiled(tst_engine *engine, tst_worker *worker, tst_shard *shard,
                                    tst_batch *batch) noexcept nogil:
    """Runs the compiled handlers of all that was collected, then sends their replies, the first ones earlier if that
    takes long. False: the shard was taken over meanwhile, and is not to be touched any more.

    Receiving from all, running all, sending to all is faster than all three for one after the other. Each system call
    leaves little of our code in the processor's first cache, so that what is done between two of them should be short.
    """
    cdef int i
    cdef uint64_t flushed
    shard_enter_running(engine, worker, shard)
    worker.clock = flushed = tick_now(&worker.ticks)
    for i in range(batch.n_entries):
        if tst_rarely(not batch.entries[i].compiled):
            continue
        if tst_rarely(not entry_run_compiled(engine, worker, shard, batch, &batch.entries[i])):
            return False
        if tst_rarely(worker.clock - flushed >= RUN_TIME):
            batch_finish(worker, batch, worker.clock)
            worker.clock = flushed = tick_now(&worker.ticks)
    if tst_rarely(not shard_leave_running(worker, shard)):
        return False
    batch_finish(worker, batch, worker.clock)
    return True
