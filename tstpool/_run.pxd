# cython: language_level=3
"""Runs compiled handlers: what becomes of the entries of a batch before anybody attaches to the interpreter.

A compiled handler is a set of C functions (`tst_compiled`). It is given pointers into the input where it was received,
and returns a TstStat. What it can't or will not do itself needs Python, and its entry then waits for the interpreter:

    - a message that it passes on (TST_RUN), or that is longer than its framing allows
    - a connection that is new or at its end: its TstSocket is made and let go there
    - a job that on_slow or on_most_elapsed is to hear of
    - a connection whose handler was assigned anew (`rebind`)

Everything here runs with the connection OWNED and the shard's token RUNNING, so that a function which blocks is noticed
and the shard taken over, exactly as with handlers in Python.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from tstpool._conn cimport tst_compiled, tst_connection
from tstpool._data cimport data_requested, input_consume, input_keep
from tstpool._entry cimport STAT_RUN, batch_finish, connection_apply, connection_break, connection_cut, connection_due
from tstpool._libc cimport EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, RELAXED, RELEASE, SEQ_CST, load64, store32, store64
from tstpool._shard cimport (
    DO_DISCONNECT, DO_WRITABLE, ENTRY_QUEUED, ENTRY_RAN, ENTRY_RUNNING, entry_move, token_held, tst_batch, tst_engine,
    tst_entry, tst_shard, tst_worker)
from tstpool._stats cimport clock_now, count, stats_job

cdef enum:
    RUN_BURST = 32             # messages of one connection between two looks at the clock ...
    RUN_TIME = 100000          # ... and nanoseconds after which the other connections get their turn


cdef inline void worker_enter(tst_worker *worker) noexcept nogil:
    """A handler begins: until worker_leave the watcher may find that it is stuck."""
    store64(&worker.calls, load64(&worker.calls, RELAXED) + 1, RELEASE)


cdef inline void worker_leave(tst_worker *worker) noexcept nogil:
    store64(&worker.calls, load64(&worker.calls, RELAXED) + 1, RELEASE)


cdef inline void worker_job(tst_engine *engine, tst_worker *worker, tst_connection *connection,
                            uint64_t calls) noexcept nogil:
    """Enters the job that ends now, and leaves a note at the connection if Python is to hear of it."""
    cdef uint64_t begin = worker.clock
    cdef uint64_t longest
    worker.clock = clock_now()
    longest = stats_job(&worker.stats, calls, begin, worker.clock)
    if worker.clock - begin >= engine.slow_handler or (longest and engine.call_longest):
        connection.report = worker.clock - begin


cdef inline size_t message_at_hand(tst_connection *connection, const char **bytes) noexcept nogil:
    """Where the message lies that connection_cut has found, and its size. Owner only."""
    if connection.framed:
        bytes[0] = connection.input.view + connection.frame.begin
        return connection.frame.size
    if connection.recv != NULL and data_requested(connection.recv):
        bytes[0] = connection.recv.s + connection.recv.req_pos
        return connection.recv.req_len
    bytes[0] = connection.input.view
    return connection.input.size


cdef inline void message_done(tst_connection *connection, size_t size) noexcept nogil:
    """The message at hand, of `size` bytes, has been handled. Owner only."""
    connection.message_ready = False
    if connection.framed:
        input_consume(&connection.input, connection.frame.whole)
        connection.framed = False
        connection.frame.needed = 0
    elif connection.recv == NULL or not data_requested(connection.recv):
        input_consume(&connection.input, size)


cdef inline bint run_messages(tst_engine *engine, tst_worker *worker, tst_connection *connection) noexcept nogil:
    """Gives the compiled handler whole messages, up to a fair share of time. True: the one at hand needs Python."""
    cdef const tst_compiled *compiled = connection.compiled
    cdef const char *bytes = NULL
    cdef size_t size
    cdef uint64_t n = 0
    cdef uint64_t began = worker.clock
    cdef int stat
    cdef bint passed = False
    store32(&connection.events, (connection.events & (EPOLLPRI | EPOLLRDHUP)) | EPOLLIN, RELAXED)
    worker_enter(worker)
    while connection_cut(connection):
        if connection.framed and connection.too_large:
            passed = True
            break
        size = message_at_hand(connection, &bytes)
        stat = compiled.received(compiled.handler, connection.sock, bytes, size)
        store64(&worker.calls, worker.calls + 2, RELEASE)      # the next message is another call
        if stat == STAT_RUN:
            passed = connection.passed_on = True
            break
        n += 1
        message_done(connection, size)
        if stat or connection.send != NULL:
            connection_apply(connection, worker, stat)
        if n % RUN_BURST == 0 and clock_now() - began >= RUN_TIME:
            break
    worker_leave(worker)
    count(&worker.stats.messages, n)
    worker_job(engine, worker, connection, n + passed)
    return passed


cdef inline bint run_writable(tst_engine *engine, tst_worker *worker, tst_connection *connection) noexcept nogil:
    """True: Python is to be told instead."""
    cdef int stat
    store32(&connection.events, EPOLLOUT, RELAXED)
    worker_enter(worker)
    stat = connection.compiled.writable(connection.compiled.handler, connection.sock)
    worker_leave(worker)
    if stat == STAT_RUN:
        connection.passed_on = True
        return True
    worker_job(engine, worker, connection, 1)
    connection_apply(connection, worker, stat)
    return False


cdef inline bint run_compiled(tst_engine *engine, tst_worker *worker, tst_entry *entry) noexcept nogil:
    """All that a compiled handler can do for one connection. True: the entry needs Python too."""
    cdef tst_connection *connection = entry.connection
    store32(<uint32_t *>&connection.thread_no, <uint32_t>worker.no, RELAXED)
    if entry.what & DO_WRITABLE and not connection.closing and not connection.passed_on:
        if run_writable(engine, worker, connection):
            return True
        entry.what &= ~<uint32_t>DO_WRITABLE
    if connection.passed_on or run_messages(engine, worker, connection) or connection.report:
        return True
    if connection_due(connection) & DO_DISCONNECT:
        return True
    if input_keep(&connection.input) < 0:
        connection_break(connection, ENOMEM)
    return False


cdef inline void batch_run_compiled(tst_engine *engine, tst_worker *worker, tst_shard *shard,
                                    tst_batch *batch) noexcept nogil:
    """Runs the entries that may not need the interpreter; those that do stay QUEUED, and n_python counts them."""
    cdef int i
    cdef tst_entry *entry
    cdef bint python
    cdef uint64_t flushed = clock_now()
    worker.clock = flushed
    for i in range(batch.n_entries):
        entry = &batch.entries[i]
        if not entry.compiled or not entry_move(entry, ENTRY_QUEUED, ENTRY_RUNNING):
            continue
        worker.current = entry.connection
        python = run_compiled(engine, worker, entry)
        worker.current = NULL
        if python:
            batch.n_python += 1
        store32(&entry.state, ENTRY_QUEUED if python else ENTRY_RAN, SEQ_CST)
        if not token_held(shard, worker.no):
            # Who took the shard over may have looked at this entry while it was RUNNING: we must try it ourselves. (It
            # moves the token, then looks; we store, then look at the token: one of us sees the other.)
            worker.left = entry if python else NULL
            return
        if worker.clock - flushed >= RUN_TIME:
            batch_finish(worker, batch, worker.clock)
            flushed = worker.clock
