# cython: language_level=3
"""Events and requests become entries of a batch: accept, or acquire, receive, cut.

All are collected before any is run: see _run.pxd for those whose handlers are compiled; the others wait for one
attachment to the interpreter.
"""
from libc.errno cimport EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM, EUSERS
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from tstpool._conn cimport (
    ACQUIRED, GONE, PEND_ANY, PEND_ARM, PEND_CLOSE, PEND_CONNECT, PEND_IN, PEND_OUT, PEND_TIMER, PRESSURE_GONE,
    STATE_DEAD, STATE_OPEN, STATE_OWNED, STATE_QUEUED, TYPE_LISTEN, TYPE_SUB, connection_acquire, connection_is,
    connection_release, connection_take_relief, generation_of, slot_of, table_open, table_slot, tst_connection)
from tstpool._entry cimport (
    connection_begin_close, connection_due, connection_expire, connection_has_room, connection_keep_input,
    connection_linger, connection_make_block, connection_may_reset, connection_sent, connection_tells_room,
    connection_transfer, connection_wants_body, take_input)
from tstpool._fork cimport descriptor_moved, descriptor_moves
from tstpool._libc cimport (
    ACQUIRE, AF_INET, AF_INET6, EPOLLERR, EPOLLHUP, EPOLLOUT, OUTQ, RELAXED, RELEASE, SEQ_CST, add32, close,
    epoll_event, fetch_and64, load32, load64, sockaddr, sockaddr_storage, socklen_t, store32, store_pointer, sub32,
    tst_rarely, tst_usually)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._poll cimport (
    TRIGGER_EDGE, TRIGGER_LEVEL, TRIGGER_ONESHOT, connection_arm, connection_fired, connection_flush, connection_free,
    connection_retire, connection_silence, flush_arm, input_mask, sys_accept, sys_drain, sys_holds, sys_prepare)
from tstpool._shard cimport (
    BATCH_ENTRIES, BATCH_EVENTS, DO_BODY, DO_CONNECT, DO_RELIEF, DO_RETIRE, DO_WRITABLE, ID_ALARM, PHASE_RUNNING,
    SCRATCH_FULL, batch_add, connection_ask_relief, shard_ask, shard_push, tst_batch, tst_engine, tst_entry, tst_shard,
    tst_worker)
from tstpool._stats cimport count, tst_stats
from tstpool._timer cimport DEADLINE_LINGER, connection_deadline, tick_before, tick_earlier, tick_of

cdef enum:
    ENTRIES_SPARE = 16                     # of a batch, for clients that are accepted
    FULL_LOOK = 100000000                  # nanoseconds between two looks whether there is room for one more again


# ------------------------------------------------------------------------------------------------- connect

cdef inline tst_shard *engine_least_loaded(tst_engine *engine) noexcept nogil:
    cdef int i
    cdef tst_shard *best = &engine.shards[0]
    for i in range(1, engine.n_shards):
        if load32(&engine.shards[i].open, RELAXED) < load32(&best.open, RELAXED):
            best = &engine.shards[i]
    return best


cdef inline void connection_settle_in(tst_connection *connection, tst_engine *engine, tst_shard *shard,
                                      int type) noexcept nogil:
    """A fresh connection, which nobody else can ask for anything yet, moves into its shard."""
    spin_lock(&connection.lock)            # somebody may be looking its descriptor up right now
    store_pointer(&connection.shard, shard, RELEASE)
    connection.shard_open = &shard.open
    connection.epoll_fd = shard.epoll_fd
    connection.out.stock = &shard.stock
    connection.type = <unsigned char>type
    connection.trigger = TRIGGER_LEVEL if type == TYPE_LISTEN else engine.trigger
    spin_unlock(&connection.lock)
    add32(&shard.open, 1, SEQ_CST)


cdef inline bint accept_here_after_all(tst_engine *engine, tst_shard *shard, tst_connection *connection,
                                       tst_shard *home) noexcept nogil:
    """True while stopping: the connection's shard may have ended, if it looked before it was counted there. So it moves
    into the shard that accepted it, which has not. We count, then look at the phase; a shard that ends, the reverse."""
    if load32(&engine.phase, SEQ_CST) == PHASE_RUNNING:
        return False
    connection_settle_in(connection, engine, shard, TYPE_SUB)
    sub32(&home.open, 1, RELEASE)
    return True


cdef inline void keep_peer(tst_connection *connection, sockaddr_storage *address, socklen_t size) noexcept nogil:
    """Remembers an internet peer's address: it can't be asked for any more once the peer has reset the connection. Of a
    unix socket, that it has a name: most clients have none, and need not be asked again."""
    connection.peer.family = address.ss_family if size > sizeof(connection.peer.family) else 0
    if address.ss_family == AF_INET or address.ss_family == AF_INET6:
        memcpy(connection.peer.bytes, <char *>address + sizeof(connection.peer.family), sizeof(connection.peer.bytes))


cdef inline bint engine_is_full(tst_engine *engine) noexcept nogil:
    """There are as many connections as there may be."""
    cdef int i
    cdef uint64_t n = 0
    if engine.max_connections == 0:
        return False
    for i in range(engine.n_shards):
        n += load32(&engine.shards[i].open, RELAXED)
    return n >= <uint64_t>engine.max_connections + load32(&engine.n_listeners, RELAXED)


cdef inline void accept_pause(tst_engine *engine, tst_worker *worker, tst_shard *shard, int reason,
                              uint64_t now) noexcept nogil:
    """No more for a while."""
    shard.accept_again = now + (FULL_LOOK if shard.full else engine.accept_pause)
    worker.accept_errno = reason
    count(&worker.stats.accept_pauses, 1)
    listeners_silence(shard)


cdef inline void accept_refuse(tst_worker *worker, int fd, bint full) noexcept nogil:
    """Closes a client that is one too many, or for whom there is no memory. It is counted when the peer sees that."""
    if full:
        count(&worker.stats.rejected, 1)
    else:
        count(&worker.stats.accept_errors, 1)
        worker.accept_errno = ENOMEM
    close(fd)


cdef inline int accept_one(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_connection *listener,
                           sockaddr_storage *address, bint full, tst_connection **accepted,
                           tst_shard **home) noexcept nogil:
    """The next client's descriptor, in a slot (`accepted`), for the shard that is to have it (`home`); or -errno. NULL
    in `accepted`: it was refused, being one too many (`full`), or for want of memory for a slot."""
    cdef socklen_t size = sizeof(sockaddr_storage)
    cdef uint64_t id
    cdef int fd
    accepted[0] = NULL
    home[0] = shard
    address.ss_family = 0
    descriptor_moves()
    fd = sys_accept(listener.fd, <sockaddr *>address, &size)
    if fd >= 0 and not full:
        home[0] = engine_least_loaded(engine)
        accepted[0] = table_open(
            &engine.table, fd, STATE_OWNED if home[0] == shard else STATE_QUEUED | PEND_CONNECT, &id)
    if fd >= 0 and accepted[0] == NULL:
        accept_refuse(worker, fd, full)
    descriptor_moved()
    if accepted[0] != NULL:
        keep_peer(accepted[0], address, size)
    return fd


cdef inline void accept_burst(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                              tst_connection *listener, uint64_t now) noexcept nogil:
    cdef sockaddr_storage address
    cdef tst_connection *connection
    cdef tst_shard *home
    cdef int fd, _n, failures = 0
    cdef bint full
    if shard.accept_again:                 # another listener's event of this turn has brought the pause
        return
    for _n in range(engine.accepts_per_turn):
        if batch.n_entries == BATCH_ENTRIES:
            return
        full = engine_is_full(engine)
        if full and not engine.close_excess:
            shard.full = True
            accept_pause(engine, worker, shard, EUSERS, now)   # no call has failed: complain() has its own words
            return
        fd = accept_one(engine, worker, shard, listener, &address, full, &connection, &home)
        if fd == -EAGAIN:
            return
        if fd < 0:
            count(&worker.stats.accept_errors, 1)
            worker.accept_errno = -fd      # to be logged
            failures += 1
            # That client is gone (ECONNABORTED ...), and the next one is not; unless it goes on like that.
            if (fd == -EMFILE or fd == -ENFILE or fd == -ENOBUFS or fd == -ENOMEM
                    or failures == engine.accepts_per_turn):
                accept_pause(engine, worker, shard, -fd, now)
                return
            continue
        if connection == NULL:
            continue
        count(&worker.stats.accepted, 1)
        if address.ss_family == AF_INET or address.ss_family == AF_INET6:
            sys_prepare(fd)
        connection_settle_in(connection, engine, home, TYPE_SUB)
        store_pointer(<void **>&connection.framing, <void *>listener.framing, RELEASE)
        connection.limits = listener.limits
        connection.active_tick = connection.output_tick = tick_of(now)
        if home == shard:
            batch_add(batch, connection, DO_CONNECT)
        else:
            shard_push(shard if accept_here_after_all(engine, shard, connection, home) else home, connection)


cdef inline void listeners_silence(tst_shard *shard) noexcept nogil:
    cdef tst_connection *listener = shard.listeners
    while listener != NULL:
        spin_lock(&listener.lock)
        connection_silence(listener, NULL)
        spin_unlock(&listener.lock)
        listener = listener.timer_next


cdef inline bint accepting_may_resume(tst_engine *engine, tst_shard *shard, uint64_t now) noexcept nogil:
    """A pause is over: its time, or, when there were too many connections, because one has gone."""
    if shard.accept_again == 0:
        return False
    if shard.full:
        return not engine_is_full(engine)
    return now >= shard.accept_again


cdef inline void listeners_resume(tst_engine *engine, tst_shard *shard, uint64_t now) noexcept nogil:
    cdef tst_connection *listener = shard.listeners
    cdef int result
    if not accepting_may_resume(engine, shard, now):
        if shard.full and now >= shard.accept_again:
            shard.accept_again = now + FULL_LOOK       # again: who goes in another shard does not wake this one
        return
    shard.full = False
    shard.accept_again = 0
    while listener != NULL:
        spin_lock(&listener.lock)
        result = connection_arm(listener, True, NULL)
        spin_unlock(&listener.lock)
        if result < 0:
            shard.accept_again = now + engine.accept_pause     # nobody else would try again
        listener = listener.timer_next


cdef inline void listener_request(tst_engine *engine, tst_worker *worker, tst_shard *shard,
                                  tst_connection *listener, uint64_t pending, uint64_t now) noexcept nogil:
    """A listener is new, or is to go. Owned."""
    cdef int result
    cdef tst_connection **place = &shard.listeners
    if pending & PEND_CLOSE or shard.draining:
        while place[0] != NULL and place[0] != listener:
            place = &place[0].timer_next
        if place[0] == listener:
            place[0] = listener.timer_next
        connection_retire(listener, &worker.stats)
        return
    if pending & PEND_CONNECT:
        listener.timer_next = shard.listeners
        shard.listeners = listener
    connection_release(listener, 0)
    if shard.accept_again == 0:
        spin_lock(&listener.lock)
        result = connection_arm(listener, True, NULL)
        spin_unlock(&listener.lock)
        if result < 0:                         # /proc/sys/fs/epoll/max_user_watches is used up, for instance
            accept_pause(engine, worker, shard, -result, now)


# ------------------------------------------------------------------------------------------------- collect

cdef inline bint connection_sends_late(tst_worker *worker, tst_connection *connection, uint64_t now) noexcept nogil:
    """What the handler's send buffer asks for goes out before it hears that there is room; when it asked, too much may
    have waited already. True: there was something. Owner only."""
    if connection_transfer(connection, now, True) != 1:
        return False
    connection_flush(connection, generation_of(load64(&connection.state, RELAXED)), False, False, now, &worker.stats)
    return True


cdef inline void collect_need_send(tst_worker *worker, tst_connection *connection, uint64_t now) noexcept nogil:
    """need_send was asked: what the send buffer asks for goes out first. Owner only."""
    connection.ask_writable = True
    connection_transfer(connection, now, True)
    connection_flush(connection, generation_of(load64(&connection.state, RELAXED)), False, False, now, &worker.stats)


cdef inline uint32_t collect_writable(tst_worker *worker, tst_connection *connection, uint64_t now) noexcept nogil:
    """DO_WRITABLE when the handler is to hear of its output: need_send, a SEND that is done, or pressure that is gone.
    Else 0. Owner only."""
    cdef uint32_t what = 0
    if connection_take_relief(connection) and connection_tells_room(connection) and not connection.closing and not (
            connection.ask_writable or connection.call_writable):      # else it will be called for that
        what = DO_WRITABLE | DO_RELIEF
    if connection.ask_writable and connection_has_room(connection) and (
            not connection_sends_late(worker, connection, now) or connection_has_room(connection)):
        connection.ask_writable = False
        what = DO_WRITABLE
    if connection_sent(connection, now):
        what = DO_WRITABLE
    return what


cdef inline void connection_was_pressed(tst_connection *connection, uint64_t now) noexcept nogil:
    """Its messages had to wait, because too much output did: that time is not the peer's. Owner only."""
    cdef uint32_t held = 0
    spin_lock(&connection.lock)
    if connection.pressed_since < now:
        held = tick_of(now) - tick_of(connection.pressed_since)
        connection.pressed_since = now
    spin_unlock(&connection.lock)
    connection.active_tick = tick_earlier(connection.active_tick + held, tick_of(now))
    if connection.unfinished and not connection.closing:
        connection.since_tick = tick_earlier(connection.since_tick + held, tick_of(now))


cdef inline uint32_t collect_input(tst_worker *worker, tst_batch *batch, tst_connection *connection, bint arrived,
                                   uint64_t now) noexcept nogil:
    """Receives, and says what is to be done for what there is. Owner only."""
    cdef uint32_t what
    take_input(connection, batch, worker, arrived, now)
    what = connection_due(connection)
    if tst_rarely(what == 0) and connection_wants_body(connection):
        if connection.compiled == NULL or load32(&connection.rebind, ACQUIRE):
            return DO_BODY
        if connection_make_block(connection):
            # Most of the rest is likely to be there. Received, run and sent at once, it stays in the cache meanwhile.
            take_input(connection, batch, worker, True, now)
            what = connection_due(connection)
    return what


cdef inline uint32_t collect_both(tst_worker *worker, tst_batch *batch, tst_connection *connection, bint arrived,
                                  uint64_t now) noexcept nogil:
    """What is due to output and input of a connection that its handler knows.

    The handler is told of its output first: it may ask for another transfer, and input must not go into the old one.
    But one that has always more to send must not keep waiting for ever what has arrived: that is first the next time.
    Owner only.
    """
    cdef bint first = connection.input_first
    cdef uint32_t what = 0
    connection.input_first = False
    if tst_rarely(first):
        what = collect_input(worker, batch, connection, arrived, now)
    if tst_usually(what == 0):
        what = collect_writable(worker, connection, now)
        if tst_rarely(what != 0):
            connection.readable |= arrived and not first
            connection.input_first = connection.readable or connection.message_ready or connection.input.size != 0
        elif tst_usually(not first):
            what = collect_input(worker, batch, connection, arrived, now)
    return what


cdef inline void collect_connection(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                    tst_connection *connection, uint64_t pending, uint32_t events,
                                    uint64_t now) noexcept nogil:
    """Makes the entry of a connection that was just acquired: what requests and events ask for becomes DO_ bits."""
    cdef tst_entry *entry
    cdef size_t scratch_used = batch.scratch_used
    cdef uint32_t what = 0
    cdef bint arrived = events & (input_mask() | EPOLLERR | EPOLLHUP) != 0
    if tst_rarely(connection.lingering):
        collect_lingering(worker, shard, batch, connection, pending, arrived or pending & PEND_IN != 0, now)
        return
    store32(&connection.events, events, RELAXED)
    if tst_rarely(pending & PEND_ARM != 0):
        connection.active_tick = tick_of(now)      # while it was paused the peer was not to blame
        connection.unfinished = False              # a message that had begun gets its time anew, too
    elif tst_rarely(load32(&connection.pressure, RELAXED) == PRESSURE_GONE) and connection.limits.auto_pause:
        connection_was_pressed(connection, now)
    if tst_rarely(pending & PEND_TIMER != 0):
        connection_expire(worker, connection, now)
    if tst_rarely(pending & PEND_CLOSE != 0) or (
            tst_rarely(shard.draining) and pending & PEND_CONNECT):
        connection_begin_close(connection)
    if tst_rarely(load32(&connection.out_error, RELAXED) != 0):
        connection.hold_input = connection.call_writable = connection.ask_writable = False
    if tst_rarely(pending & PEND_CONNECT != 0):
        what |= DO_CONNECT
        if pending & PEND_OUT and not connection.closing:      # asked for before on_connect: told after it
            connection.ask_writable = True
            connection_transfer(connection, now, True)
    else:
        if tst_rarely(pending & PEND_OUT != 0) and not connection.closing:
            collect_need_send(worker, connection, now)
        arrived |= tst_rarely(connection.trigger == TRIGGER_EDGE) and pending & PEND_IN != 0
        what = collect_both(worker, batch, connection, arrived, now)
        if tst_rarely(what == 0) and not connection_keep_input(connection):        # no handler runs: nobody else does
            what = connection_due(connection)
    entry = batch_add(batch, connection, what)
    if tst_rarely(what == 0):
        batch.scratch_used = scratch_used      # nothing that is still needed lies there
    elif entry.compiled:
        batch.n_compiled += 1
        batch.for_compiled += batch.scratch_used - scratch_used


cdef inline void collect_lingering(tst_worker *worker, tst_shard *shard, tst_batch *batch, tst_connection *connection,
                                   uint64_t pending, bint arrived, uint64_t now) noexcept nogil:
    """A connection that its handler is through with: only what the peer still sends is left."""
    cdef uint32_t due = 0
    cdef bint over = pending & PEND_CLOSE != 0 and (
        shard.aborted or connection_may_reset(connection) or (shard.draining and connection.linger_for_room))
    cdef tst_entry *entry
    if arrived and not connection_linger(connection, batch, now):
        over = True
    if connection.linger_for_room and pending & PEND_TIMER and sys_holds(connection.fd, OUTQ) == 0:
        over = True
    if pending & PEND_TIMER:
        connection.has_timer = False
        connection_deadline(connection, False, True, &due)
        if not over and not tick_before(tick_of(now), due):
            count(&worker.stats.deadline_closed[DEADLINE_LINGER], 1)
            over = True
    entry = batch_add(batch, connection, 0)
    if over:
        entry.what = DO_RETIRE


cdef inline void shard_woken(tst_shard *shard, uint64_t id) noexcept nogil:
    """An event of one of the shard's own descriptors has ended the sleep, which was its purpose."""
    if id == ID_ALARM:
        shard.alarm = 0
        sys_drain(shard.timer_fd)
    else:
        sys_drain(shard.event_fd)


cdef inline void count_stale(tst_stats *stats, tst_connection *connection) noexcept nogil:
    """An event came too late. `connection`: who has its descriptor's slot now; NULL: nobody ever had."""
    if connection != NULL and load64(&connection.state, ACQUIRE) & STATE_OPEN:
        count(&stats.stale_reused, 1)
    else:
        count(&stats.stale_gone, 1)


cdef inline void collect_event(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                               uint64_t id, uint32_t events, uint64_t now) noexcept nogil:
    """Resolves one event to its connection and acquires it; an event of a connection that is gone is counted and
    dropped."""
    cdef tst_connection *connection
    cdef uint32_t generation = generation_of(id)
    cdef uint64_t pending = 0
    cdef int got
    if tst_rarely(generation == 0):
        shard_woken(shard, id)
        return
    connection = table_slot(&engine.table, slot_of(id))
    if tst_rarely(connection == NULL) or tst_rarely(not connection_is(connection, generation)):
        count_stale(&worker.stats, connection)
        return
    if tst_rarely(connection.type == TYPE_LISTEN):
        accept_burst(engine, worker, shard, batch, connection, now)
        return
    if tst_rarely(connection.trigger != TRIGGER_LEVEL):
        spin_lock(&connection.lock)
        connection_fired(connection, events)
        spin_unlock(&connection.lock)
    if tst_rarely(events & (EPOLLOUT | EPOLLERR | EPOLLHUP) != 0):
        connection_flush(connection, generation, True, connection.trigger != TRIGGER_ONESHOT, now, &worker.stats)
    while True:
        got = connection_acquire(connection, generation, &pending)
        if tst_usually(got == ACQUIRED):
            collect_connection(engine, worker, shard, batch, connection, pending, events, now)
            return
        if got == GONE:
            count_stale(&worker.stats, connection)
            return
        if leave_to_owner(connection, generation, events, &worker.stats):
            return


cdef inline bint leave_to_owner(tst_connection *connection, uint32_t generation, uint32_t events,
                                tst_stats *stats) noexcept nogil:
    """An event came for a connection that a stuck worker owns: silence it, its release will arm it. False: it is free
    now."""
    cdef bint owned
    spin_lock(&connection.lock)
    owned = connection_is(connection, generation) and load64(&connection.state, ACQUIRE) & STATE_OWNED != 0
    if owned:
        connection.want_room = False       # its release asks again
        if connection.trigger == TRIGGER_LEVEL and events & (input_mask() | EPOLLERR | EPOLLHUP):
            connection_silence(connection, stats)
        else:
            flush_arm(connection, stats)
    spin_unlock(&connection.lock)
    if owned:
        connection_ask_relief(connection, generation)      # what our flush has brought about, it may have missed
    if owned and connection.trigger == TRIGGER_EDGE:
        shard_ask(connection, generation, PEND_IN)     # an edge is not reported twice: the owner must look for itself
    return owned


cdef inline void collect_request(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                 tst_connection *connection, uint64_t now) noexcept nogil:
    """Serves a connection that came from the stack of requests: flushes it at once, acquires it if anything else is
    wanted."""
    cdef uint64_t word = fetch_and64(&connection.state, ~<uint64_t>STATE_QUEUED, SEQ_CST)
    cdef uint32_t generation = generation_of(word)     # the slot may be another connection's soon
    cdef uint64_t pending = 0
    cdef int waiting
    if word & STATE_DEAD:
        connection_free(connection, &worker.stats)
        return
    waiting = connection_flush(connection, generation, False, True, now, &worker.stats)
    word = load64(&connection.state, ACQUIRE)
    if not word & PEND_ANY and waiting == 0 and load32(&connection.pressure, RELAXED) != PRESSURE_GONE:
        return                 # else its owner is to see to a deadline for the rest, or to its end
    if connection_acquire(connection, generation, &pending) != ACQUIRED:
        connection_ask_relief(connection, generation)
        return                 # its owner sees the pending bits when it releases
    if connection.type == TYPE_LISTEN:
        listener_request(engine, worker, shard, connection, pending, now)
    else:
        collect_connection(engine, worker, shard, batch, connection, pending, 0, now)


cdef inline void collect_requests(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                  uint64_t now) noexcept nogil:
    cdef tst_connection *connection
    cdef int n = 0
    # After a broadcast there are as many as connections, and most make no entry.
    while shard.todo != NULL and n < BATCH_EVENTS and batch_has_room(batch):
        n += 1
        connection = shard.todo
        shard.todo = connection.next_request
        collect_request(engine, worker, shard, batch, connection, now)


cdef inline void collect_events(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                uint64_t now) noexcept nogil:
    cdef epoll_event *event
    while batch.next_event < batch.n_events and tst_usually(batch_has_room(batch)):
        event = &batch.events[batch.next_event]
        batch.next_event += 1
        collect_event(engine, worker, shard, batch, event.data.u64, event.events, now)


cdef inline void shard_collect(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                               uint64_t now) noexcept nogil:
    """Makes entries of requests and events, until there are no more or the batch is full (the rest waits for the next
    turn).

    They take turns in going first, so that neither a flood of events nor connections that ask for themselves again and
    again (S14) can keep the others out.
    """
    shard.requests_first = not shard.requests_first
    if shard.requests_first:
        collect_requests(engine, worker, shard, batch, now)
    collect_events(engine, worker, shard, batch, now)
    collect_requests(engine, worker, shard, batch, now)


cdef inline bint batch_has_room(tst_batch *batch) noexcept nogil:
    """What was received is to be in the processor's cache still when it is run, and its reply when it is sent. (That
    large messages do best with half as much, and compiled handlers with a quarter, was measured.)"""
    return (batch.n_entries + ENTRIES_SPARE <= BATCH_ENTRIES
            and batch.scratch_used + 3 * batch.for_compiled + 2 * batch.received_elsewhere
            < batch.scratch_size // SCRATCH_FULL)
