# cython: language_level=3
"""One turn of the worker that holds a shard's token, as far as it needs no interpreter.

    1  finish    what the handlers of the turn before have left: send, release, arm           batch_finish
    2  drain     after stop(): close what is open, then abort it                              shard_drain
    3  poll      requests of other threads, then epoll_wait                                   shard_poll
    4  collect   per event: accept, or acquire, receive, cut; an entry for each connection    shard_collect
    5  return    when an entry needs the interpreter; else go back to 1                       shard_turn

Between 5 and 1 `_core.pyx` attaches to the interpreter once and runs the entries' handlers.
"""
from libc.errno cimport EAGAIN, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tstpool._conn cimport (
    ACQUIRED, BUSY, GONE, PEND_ANY, PEND_ARM, PEND_CLOSE, PEND_CONNECT, PEND_IN, PEND_OUT, STATE_DEAD, STATE_OPEN,
    STATE_OWNED, STATE_PAUSED, STATE_QUEUED, TABLE_CHUNK, TABLE_CHUNKS, connection_acquire, connection_is,
    connection_is_paused, connection_release, connection_takes_messages, connection_wants_input, generation_of,
    slot_of, table_chunk, table_open, table_slot, tst_connection)
from tstpool._data cimport (
    data_complete, data_done, data_fill, data_make, data_pin, data_requested, data_unpin, input_consume, input_keep,
    input_reserve, tst_data)
from tstpool._frame cimport frame_next, tst_framing
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, AF_INET, AF_INET6, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, RELAXED,
    RELEASE, SEQ_CST, add32, close, epoll_event, fetch_and64, load32, load64, load_pointer, pthread_cond_broadcast,
    pthread_cond_signal, pthread_mutex_lock, pthread_mutex_unlock, sockaddr, sockaddr_storage, socklen_t, store32,
    store64, store_pointer)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._poll cimport (
    TRIGGER_EDGE, TRIGGER_LEVEL, TRIGGER_ONESHOT, connection_arm, connection_fired, connection_flush,
    connection_free, connection_retire, connection_silence, flush_arm, flush_result, input_mask, sys_accept,
    sys_drain, sys_oob_inline, sys_recv, sys_wait, sys_writable)
from tstpool._queue cimport queue_append, queue_size
from tstpool._shard cimport (
    BATCH_ENTRIES, BATCH_EVENTS, DO_CONNECT, DO_DISCONNECT, DO_INPUT, DO_RETIRE, DO_WRITABLE, ENTRY_DONE, ENTRY_RAN,
    PHASE_DRAINING, PHASE_ENDING, SCRATCH_LEAST, SCRATCH_SIZE, TOKEN_POLLING, TOKEN_RUNNING, batch_add,
    connection_bytes_sent, entry_move, shard_ask, shard_drain_add, shard_drain_enter, shard_drain_remove,
    shard_drain_unlink, shard_push, shard_take_requests, token_move, token_of, tst_batch, tst_engine, tst_entry,
    tst_shard, tst_worker)
from tstpool._stats cimport clock_now, count, tst_stats

cdef enum:
    ACCEPTS_PER_TURN = 16                  # so that a flood of clients does not starve the clients that are there
    ACCEPT_PAUSE = 100000000               # nanoseconds to wait after the process ran out of descriptors or memory
    DRAIN_TIME = 5000000000                # nanoseconds that a closing connection may take to send what is queued
    DRAIN_LOOK = 20000000                  # nanoseconds between two looks whether all is closed, while stopping
    INPUT_LIMIT = 262144                   # unread bytes kept for a handler that does not read; then TCP holds them
    READ_MORE = 65536                      # room made behind unread input
    DIRECT_LEAST = 16384                   # bytes to come from which a transfer is received straight into place

cdef enum:
    TYPE_SUB = 0
    TYPE_LISTEN = 2

cdef enum:
    TURN_LOST = 0                          # the shard was taken over meanwhile
    TURN_RUN = 1                           # entries wait for the interpreter
    TURN_IDLE = 2                          # nothing came for idle_time, and a handler wants to know
    TURN_ENDED = 3                         # stopping, and nothing is open here any more
    TURN_COMPLAIN = 4                      # accept failed: say so, then go on


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
    connection.type = <unsigned char>type
    connection.trigger = TRIGGER_LEVEL if type == TYPE_LISTEN else engine.trigger
    spin_unlock(&connection.lock)
    add32(&shard.open, 1, RELAXED)


cdef inline void keep_peer(tst_connection *connection, sockaddr_storage *address) noexcept nogil:
    """Remembers an internet peer's address: it can't be asked for any more once the peer has reset the connection."""
    connection.peer.family = address.ss_family
    if address.ss_family == AF_INET or address.ss_family == AF_INET6:
        memcpy(connection.peer.bytes, <char *>address + sizeof(connection.peer.family), sizeof(connection.peer.bytes))


cdef inline void accept_burst(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                              tst_connection *listener, uint64_t now) noexcept nogil:
    cdef sockaddr_storage address
    cdef socklen_t size
    cdef tst_connection *connection
    cdef tst_shard *home
    cdef uint64_t id
    cdef int fd, _n
    for _n in range(ACCEPTS_PER_TURN):
        if batch.n_entries == BATCH_ENTRIES:
            return
        size = sizeof(address)
        address.ss_family = 0
        fd = sys_accept(listener.fd, <sockaddr *>&address, &size)
        if fd == -EAGAIN:
            return
        if fd < 0:
            count(&worker.stats.accept_errors, 1)
            worker.accept_errno = -fd
            if fd == -EMFILE or fd == -ENFILE or fd == -ENOBUFS or fd == -ENOMEM:
                shard.accept_again = now + ACCEPT_PAUSE
                listeners_silence(shard)
                return
            continue           # that client is gone (ECONNABORTED ...): the next one is not
        home = engine_least_loaded(engine)
        connection = table_open(&engine.table, fd, STATE_OWNED if home == shard else STATE_QUEUED | PEND_CONNECT, &id)
        if connection == NULL:
            count(&worker.stats.accept_errors, 1)
            worker.accept_errno = ENOMEM
            close(fd)
            continue
        count(&worker.stats.accepted, 1)
        keep_peer(connection, &address)
        if address.ss_family == AF_INET or address.ss_family == AF_INET6:
            sys_oob_inline(fd)
        connection_settle_in(connection, engine, home, TYPE_SUB)
        store_pointer(<void **>&connection.framing, <void *>listener.framing, RELEASE)
        if home == shard:
            batch_add(batch, connection, DO_CONNECT)
        else:
            shard_push(home, connection)


cdef inline void listeners_silence(tst_shard *shard) noexcept nogil:
    cdef tst_connection *listener = shard.listeners
    while listener != NULL:
        spin_lock(&listener.lock)
        connection_silence(listener, NULL)
        spin_unlock(&listener.lock)
        listener = listener.drain_next


cdef inline void listeners_resume(tst_shard *shard, uint64_t now) noexcept nogil:
    cdef tst_connection *listener = shard.listeners
    if shard.accept_again == 0 or now < shard.accept_again:
        return
    shard.accept_again = 0
    while listener != NULL:
        spin_lock(&listener.lock)
        connection_arm(listener, True, NULL)
        spin_unlock(&listener.lock)
        listener = listener.drain_next


cdef inline void listener_request(tst_worker *worker, tst_shard *shard, tst_connection *listener,
                                  uint64_t pending) noexcept nogil:
    """A listener is new, or is to go. Owned."""
    cdef tst_connection **place = &shard.listeners
    if pending & PEND_CLOSE or shard.draining:
        while place[0] != NULL and place[0] != listener:
            place = &place[0].drain_next
        if place[0] == listener:
            place[0] = listener.drain_next
        connection_retire(listener, &worker.stats)
        return
    if pending & PEND_CONNECT:
        listener.drain_next = shard.listeners
        shard.listeners = listener
    connection_release(listener, 0)
    if shard.accept_again == 0:
        spin_lock(&listener.lock)
        connection_arm(listener, True, NULL)
        spin_unlock(&listener.lock)


# --------------------------------------------------------------------------------------------------- input

cdef inline ssize_t receive_in_place(tst_connection *connection, tst_data *data, uint64_t now,
                                     size_t *room) noexcept nogil:
    """Receives into a large transfer directly. `room` 0: there is none, nothing was done."""
    cdef char *place = NULL
    cdef ssize_t n
    room[0] = data_pin(data, DIRECT_LEAST, &place)
    if room[0] == 0:
        return 0
    n = sys_recv(connection.fd, place, room[0])
    data_unpin(data, n, now)
    if n > 0 and data_complete(data):
        connection.message_ready = True
    return n


cdef inline bint connection_input_full(tst_connection *connection) noexcept nogil:
    """Enough is read ahead. The bytes that a message still needs are always read: its framing limits them."""
    if connection.input.size < INPUT_LIMIT:
        return False
    return connection.framed_by == NULL or connection.input.size >= connection.frame.needed


cdef inline size_t connection_room(tst_connection *connection) noexcept nogil:
    """How much to receive behind unread input: what a long message still needs, exactly, so that it gets one buffer."""
    if connection.framed_by != NULL and connection.frame.needed > connection.input.size + READ_MORE:
        return connection.frame.needed - connection.input.size
    return READ_MORE


cdef inline ssize_t connection_receive(tst_connection *connection, tst_batch *batch, tst_worker *worker,
                                       uint64_t now) noexcept nogil:
    """Receives once: into a large transfer, behind input that is still unread, or into the batch's scratch buffer.

    Returns bytes received, 0 for the end of input, or -errno.
    """
    cdef tst_data *data = <tst_data *>load_pointer(<void **>&connection.recv, ACQUIRE)
    cdef size_t room = 0
    cdef char *place
    cdef ssize_t n = 0
    if data != NULL and connection.input.size == 0 and not connection.message_ready:
        n = receive_in_place(connection, data, now, &room)
    if room == 0:
        if connection.input.size == 0:
            room = SCRATCH_SIZE - batch.scratch_used
            place = batch.scratch + batch.scratch_used
            n = sys_recv(connection.fd, place, room)
            if n > 0:
                batch.scratch_used += <size_t>n
                connection.input.view = place
        else:
            room = connection_room(connection)
            place = input_reserve(&connection.input, room)
            if place == NULL:
                return -ENOMEM
            n = sys_recv(connection.fd, place, room)
        if n > 0:
            connection.input.size += <size_t>n
    if n > 0:
        count(&worker.stats.bytes_in, <uint64_t>n)
    connection.readable = n > 0 and connection.trigger == TRIGGER_EDGE     # an edge is over at EAGAIN, not before
    return n


cdef inline void connection_cut_frame(tst_connection *connection, const tst_framing *framing) noexcept nogil:
    """Looks for a message at the beginning of unread input. Owner only."""
    cdef int result
    if connection.message_ready and connection.framed and connection.framed_by == framing:
        return                 # found before, and not handed out yet
    if connection.framed_by != framing:
        connection.framed_by = framing
        connection.scanned = connection.frame.needed = 0
    connection.framed = framing != NULL
    if framing == NULL:
        connection.message_ready = connection.input.size > 0
        return
    result = frame_next(framing, connection.input.view, connection.input.size, &connection.scanned, &connection.frame)
    connection.too_large = result < 0
    connection.message_ready = result != 0


cdef inline bint connection_cut(tst_connection *connection) noexcept nogil:
    """True: a whole message is ready for the handler. Moves unread input into the transfer that was asked for.

    Whole means: the transfer is complete (req_len > 0); or, with none asked for, that the framing has found a message,
    or that it never will (too_large); or, with no framing, that anything at all has arrived.
    """
    cdef tst_data *data
    cdef ssize_t used
    if not connection_takes_messages(connection):
        return False
    data = <tst_data *>load_pointer(<void **>&connection.recv, ACQUIRE)
    if data == NULL or not data_requested(data):
        connection_cut_frame(connection, <const tst_framing *>load_pointer(<void **>&connection.framing, ACQUIRE))
    elif connection.framed or not connection.message_ready or not data_complete(data):
        connection.message_ready = connection.framed = False
        if connection.input.size:
            used = data_fill(data, connection.input.view, connection.input.size, clock_now())
            if used < 0:
                connection_break(connection, <int>-used)
                return False
            input_consume(&connection.input, <size_t>used)
            connection.message_ready = data_complete(data)
    return connection.message_ready


cdef inline void connection_break(tst_connection *connection, int reason) noexcept nogil:
    """It ends with an error: nothing more can be received or sent. Owner only."""
    connection.end_of_input = True
    connection.hold_input = False
    if connection.reason == 0:
        connection.reason = reason
    connection_drop_output(connection)


cdef inline void connection_drop_output(tst_connection *connection) noexcept nogil:
    """Forgets queued output and accepts no more. Any thread that knows the generation to be right."""
    spin_lock(&connection.lock)
    connection.out_drop = True
    if not connection.flushing:
        flush_result(connection, 0, 0)
    connection.out_closed = True
    spin_unlock(&connection.lock)


cdef inline void take_input(tst_connection *connection, tst_batch *batch, tst_worker *worker, bint event,
                            uint64_t now) noexcept nogil:
    """Receives if the kernel has something (`event`, or it is known from before) and the handler wants it. Owner
    only."""
    cdef ssize_t n
    cdef int broken = <int>load32(&connection.out_error, RELAXED)
    if not event and not connection.readable and not broken:
        return
    if broken and not connection.end_of_input and (
            connection_is_paused(connection) or connection_input_full(connection)):
        connection_break(connection, broken)       # nobody will make room for what may still be there
        return
    if not connection_wants_input(connection) or connection_input_full(connection):
        if event:
            connection.readable = True     # an edge will not be reported twice
            if connection.trigger == TRIGGER_LEVEL:
                spin_lock(&connection.lock)
                connection_silence(connection, &worker.stats)
                spin_unlock(&connection.lock)
        return
    n = connection_receive(connection, batch, worker, now)
    if n == 0:
        connection.end_of_input = True
        connection.reason = broken
    elif n == -EAGAIN:
        connection.readable = False
        if broken:
            connection_break(connection, broken)
    elif n < 0:
        connection_break(connection, <int>-n)


# -------------------------------------------------------------------------------------------------- output

cdef inline int connection_transfer(tst_connection *connection, uint64_t now) noexcept nogil:
    """Queues what the handler put into its send buffer (S12). Returns 1 when there was something, 0, or -errno."""
    cdef tst_data *data = <tst_data *>load_pointer(<void **>&connection.send, ACQUIRE)
    cdef size_t size
    cdef int result = 0
    if data == NULL:
        return 0
    spin_lock(&data.lock)
    size = data.req_len - data.com_len
    if size:
        result = data_make(data)
        if result == 0:
            spin_lock(&connection.lock)
            if not connection.out_closed:
                result = queue_append(&connection.out, data.s + data.req_pos + data.com_len, size)
                connection.send_mark = connection.out.queued
            spin_unlock(&connection.lock)
        if result == 0:
            data.begin_time = now
            data.com_len = data.req_len
            result = 1
    spin_unlock(&data.lock)
    return result


cdef inline bint connection_sent(tst_connection *connection, uint64_t now) noexcept nogil:
    """True once: the SEND that was under way has been handed to the kernel whole. Owner only."""
    cdef tst_data *data
    cdef bint sent
    if not connection.call_writable:
        return False
    spin_lock(&connection.lock)
    sent = connection.out.sent >= connection.send_mark
    spin_unlock(&connection.lock)
    if sent:
        connection.call_writable = False
        connection.hold_input = False
        data = <tst_data *>load_pointer(<void **>&connection.send, ACQUIRE)
        if data != NULL:
            spin_lock(&data.lock)
            if data.begin_time:
                data.trans_time = now - data.begin_time
                data.begin_time = 0
            spin_unlock(&data.lock)
    return sent


cdef inline bint connection_has_room(tst_connection *connection) noexcept nogil:
    """need_send's question: would the kernel take a byte now? Owner only."""
    return connection_drained(connection) and sys_writable(connection.fd)


cdef inline bint connection_drained(tst_connection *connection) noexcept nogil:
    """Nothing waits to be sent, and nobody is sending."""
    cdef bint drained
    spin_lock(&connection.lock)
    drained = queue_size(&connection.out) == 0 and not connection.flushing
    spin_unlock(&connection.lock)
    return drained


cdef inline void connection_begin_close(tst_connection *connection) noexcept nogil:
    """From here on only output remains. Owner only."""
    connection.closing = True
    connection.message_ready = connection.hold_input = connection.call_writable = connection.ask_writable = False
    spin_lock(&connection.lock)
    connection.out_closed = True
    spin_unlock(&connection.lock)
    if connection.reason == 0:
        connection.reason = <int>load32(&connection.out_error, RELAXED)


# ------------------------------------------------------------------------------------------------- collect

cdef inline uint32_t connection_due(tst_connection *connection) noexcept nogil:
    """What is left to be done for a connection that has received and sent what it can. Owner only."""
    if connection_cut(connection):
        return DO_INPUT
    if connection.end_of_input and not connection.hold_input and not connection.closing:
        if connection.input.size == 0 or not connection_is_paused(connection):
            connection_begin_close(connection)
    if connection.closing and connection_drained(connection):
        return DO_DISCONNECT
    return 0


cdef inline void collect_connection(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                    tst_connection *connection, uint64_t pending, uint32_t events,
                                    uint64_t now) noexcept nogil:
    """Makes the entry of a connection that was just acquired: what requests and events ask for becomes DO_ bits."""
    cdef uint32_t what = 0
    cdef bint arrived = events & (input_mask() | EPOLLERR | EPOLLHUP) != 0
    store32(&connection.events, events, RELAXED)
    if pending & PEND_CLOSE or (shard.draining and pending & PEND_CONNECT):
        connection_begin_close(connection)
    if load32(&connection.out_error, RELAXED):
        connection.hold_input = connection.call_writable = connection.ask_writable = False
    if pending & PEND_CONNECT:
        what |= DO_CONNECT
    else:
        if pending & PEND_OUT and not connection.closing:
            connection.ask_writable = True
            connection_transfer(connection, now)
            connection_flush(connection, generation_of(load64(&connection.state, RELAXED)), False, False, &worker.stats)
        if connection.ask_writable and connection_has_room(connection):
            connection.ask_writable = False
            what |= DO_WRITABLE
        if connection_sent(connection, now):
            what |= DO_WRITABLE
        if what:
            # The handler is told first: it may ask for another transfer, and input must not go into the old one.
            connection.readable |= arrived
        else:
            take_input(connection, batch, worker,
                       arrived or (connection.trigger == TRIGGER_EDGE and pending & PEND_IN), now)
            what |= connection_due(connection)
            if what == 0 and input_keep(&connection.input) < 0:    # no handler runs: nobody else would keep it
                connection_break(connection, ENOMEM)
                what = connection_due(connection)
    batch_add(batch, connection, what)


cdef inline void collect_event(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                               uint64_t id, uint32_t events, uint64_t now) noexcept nogil:
    """Resolves one event to its connection and acquires it; an event of a connection that is gone is counted and
    dropped."""
    cdef tst_connection *connection
    cdef uint32_t generation = generation_of(id)
    cdef uint64_t pending = 0
    cdef int got
    if generation == 0:
        sys_drain(shard.event_fd)
        return
    connection = table_slot(&engine.table, slot_of(id))
    if connection == NULL or not connection_is(connection, generation):
        count(&worker.stats.stale_events, 1)
        return
    if connection.type == TYPE_LISTEN:
        accept_burst(engine, worker, shard, batch, connection, now)
        return
    if connection.trigger == TRIGGER_ONESHOT:
        spin_lock(&connection.lock)
        connection_fired(connection)
        spin_unlock(&connection.lock)
    if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
        connection_flush(connection, generation, True, connection.trigger != TRIGGER_ONESHOT, &worker.stats)
    while True:
        got = connection_acquire(connection, generation, &pending)
        if got == ACQUIRED:
            collect_connection(engine, worker, shard, batch, connection, pending, events, now)
            return
        if got == GONE:
            count(&worker.stats.stale_events, 1)
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
    if owned and connection.trigger == TRIGGER_EDGE:
        shard_ask(connection, generation, PEND_IN)     # an edge is not reported twice: the owner must look for itself
    return owned


cdef inline void collect_request(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                 tst_connection *connection, uint64_t now) noexcept nogil:
    """Serves a connection that came from the stack of requests: flushes it at once, acquires it if anything else is
    wanted."""
    cdef uint64_t word = fetch_and64(&connection.state, ~<uint64_t>STATE_QUEUED, SEQ_CST)
    cdef uint64_t pending = 0
    if word & STATE_DEAD:
        connection_free(connection, &worker.stats)
        return
    connection_flush(connection, generation_of(word), False, True, &worker.stats)
    word = load64(&connection.state, ACQUIRE)
    if not word & PEND_ANY and not load32(&connection.out_error, RELAXED):
        return
    if connection_acquire(connection, generation_of(word), &pending) != ACQUIRED:
        return                 # its owner sees the pending bits when it releases
    if connection.type == TYPE_LISTEN:
        listener_request(worker, shard, connection, pending)
    else:
        collect_connection(engine, worker, shard, batch, connection, pending, 0, now)


cdef inline void collect_requests(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                  uint64_t now) noexcept nogil:
    cdef tst_connection *connection
    while shard.todo != NULL and batch_has_room(batch):
        connection = shard.todo
        shard.todo = connection.next_request
        collect_request(engine, worker, shard, batch, connection, now)


cdef inline void collect_events(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                                uint64_t now) noexcept nogil:
    cdef epoll_event *event
    while batch.next_event < batch.n_events and batch_has_room(batch):
        event = &batch.events[batch.next_event]
        batch.next_event += 1
        collect_event(engine, worker, shard, batch, event.data.u64, event.events, now)


cdef inline void shard_collect(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                               uint64_t now) noexcept nogil:
    """Makes entries of requests and events, until there are no more or the batch is full; the rest waits for the next
    turn.

    They take turns in going first, so that neither a flood of events nor connections that ask for themselves again and
    again (S14) can keep the others out.
    """
    shard.requests_first = not shard.requests_first
    if shard.requests_first:
        collect_requests(engine, worker, shard, batch, now)
    collect_events(engine, worker, shard, batch, now)
    collect_requests(engine, worker, shard, batch, now)


cdef inline bint batch_has_room(tst_batch *batch) noexcept nogil:
    return (batch.n_entries + ACCEPTS_PER_TURN <= BATCH_ENTRIES
            and SCRATCH_SIZE - batch.scratch_used >= SCRATCH_LEAST)


# ------------------------------------------------------------------------------------------------- finish

cdef inline void entry_retire(tst_worker *worker, tst_connection *connection) noexcept nogil:
    cdef tst_shard *shard = <tst_shard *>connection.shard
    shard_drain_remove(shard, connection)
    count(&worker.stats.closed, 1)
    connection_retire(connection, &worker.stats)


cdef inline uint64_t entry_left_over(tst_worker *worker, tst_connection *connection, uint32_t generation,
                                     uint64_t now) noexcept nogil:
    """Sends what the handlers have queued. Returns PEND_ bits for what must come back without waiting for an event."""
    cdef int waiting = connection_flush(connection, generation, False, False, &worker.stats)
    if waiting < 0 and not connection.closing:
        return PEND_IN                     # read what had arrived before it broke, then end it
    if connection.closing:
        if waiting <= 0 and connection_drained(connection):
            return PEND_CLOSE
        shard_drain_add(<tst_shard *>connection.shard, connection, now + DRAIN_TIME)
        return 0
    if connection.message_ready and connection_takes_messages(connection):
        return PEND_IN
    if connection.call_writable and waiting == 0:
        return PEND_IN
    if connection.trigger == TRIGGER_EDGE and connection.readable and connection_wants_input(connection):
        return PEND_IN
    return 0


cdef inline void entry_finish(tst_worker *worker, tst_entry *entry, uint64_t now) noexcept nogil:
    """Ends an entry: sends, releases the connection, arms it, and looks once more for what came in between."""
    cdef tst_connection *connection = entry.connection
    cdef tst_shard *shard = <tst_shard *>connection.shard
    cdef uint64_t pending
    cdef bint want_input, want_room, pushed, again = False, broken = False
    if entry.what & DO_RETIRE:
        entry_retire(worker, connection)
        return
    pending = entry_left_over(worker, connection, entry.generation, now)
    want_input = connection_wants_input(connection) and not connection_input_full(connection)
    want_room = connection.ask_writable
    pushed = connection_release(connection, pending)
    spin_lock(&connection.lock)
    if connection_is(connection, entry.generation):
        connection.want_room = want_room
        if not pushed or connection.trigger != TRIGGER_ONESHOT:
            broken = connection_arm(connection, want_input, &worker.stats) < 0
        # A thread that appended while we owned the connection trusted us to send it.
        again = queue_size(&connection.out) != 0 and not connection.want_out and not connection.flushing
    spin_unlock(&connection.lock)
    if pushed:
        shard_push(shard, connection)
    if again:
        connection_flush(connection, entry.generation, False, True, &worker.stats)
    if broken:
        shard_ask(connection, entry.generation, PEND_CLOSE)


cdef inline void batch_finish(tst_worker *worker, tst_batch *batch, uint64_t now) noexcept nogil:
    """Finishes each entry whose handlers have run. Safe beside another thread that does the same."""
    cdef int i
    for i in range(batch.n_entries):
        if entry_move(&batch.entries[i], ENTRY_RAN, ENTRY_DONE):
            entry_finish(worker, &batch.entries[i], now)


# --------------------------------------------------------------------------------------------------- stop

cdef inline void shard_close_all(tst_engine *engine, tst_shard *shard, bint abort) noexcept nogil:
    """Asks every connection of the shard to close; with `abort`, without sending what is queued."""
    cdef int chunk, i
    cdef uint64_t word
    cdef tst_connection *first
    cdef tst_connection *connection
    for chunk in range(TABLE_CHUNKS):
        first = table_chunk(&engine.table, chunk)
        for i in range(TABLE_CHUNK if first != NULL else 0):
            connection = first + i
            word = load64(&connection.state, ACQUIRE)
            if word & STATE_OPEN and load_pointer(&connection.shard, ACQUIRE) == shard:
                if abort and connection.type != TYPE_LISTEN:
                    connection_drop_output(connection)
                shard_ask(connection, generation_of(word), PEND_CLOSE)


cdef inline bint shard_drain(tst_engine *engine, tst_shard *shard, uint64_t now) noexcept nogil:
    """One step of stopping. True: nothing is open here any more."""
    if not shard.draining:
        shard.draining = True
        shard_close_all(engine, shard, False)
    if not shard.aborted and now >= load64(&engine.drain_until, ACQUIRE):
        shard.aborted = True
        shard_close_all(engine, shard, True)
    return load32(&shard.open, ACQUIRE) == 0


cdef inline void engine_shard_ended(tst_engine *engine, tst_shard *shard) noexcept nogil:
    """The last shard to end lets all workers go."""
    cdef int i
    cdef bint all_done = True
    pthread_mutex_lock(&engine.mutex)
    shard.done = True
    store64(&shard.token, 0, RELEASE)
    for i in range(engine.n_shards):
        if not engine.shards[i].done:
            all_done = False
    if all_done:
        store32(&engine.phase, PHASE_ENDING, RELEASE)
        pthread_cond_broadcast(&engine.standby)
        pthread_cond_broadcast(&engine.watch)
    pthread_mutex_unlock(&engine.mutex)


cdef inline void shard_expire(tst_shard *shard, uint64_t now) noexcept nogil:
    """Closing connections whose peers have taken none of their output for DRAIN_TIME are dropped."""
    cdef tst_connection *connection
    cdef uint64_t word, sent
    while True:
        pthread_mutex_lock(&shard.mutex)
        connection = shard.drain_first
        if connection == NULL or connection.drain_until > now:
            pthread_mutex_unlock(&shard.mutex)
            return
        word = load64(&connection.state, ACQUIRE)
        shard_drain_unlink(shard, connection)
        sent = connection_bytes_sent(connection)
        if sent > connection.drain_sent:
            shard_drain_enter(shard, connection, now + DRAIN_TIME, sent)
            pthread_mutex_unlock(&shard.mutex)
            continue
        connection_drop_output(connection)
        pthread_mutex_unlock(&shard.mutex)
        shard_ask(connection, generation_of(word), PEND_CLOSE)


# --------------------------------------------------------------------------------------------------- turn

cdef inline int milliseconds_until(uint64_t when, uint64_t now, int most) noexcept nogil:
    """Time-out for epoll_wait, rounded up so that it never wakes too early to find nothing due; -1 is for ever."""
    cdef uint64_t ms
    if when == 0:
        return most
    if when <= now:
        return 0
    ms = (when - now + 999999) // 1000000
    if ms > 3600000:
        ms = 3600000
    if most >= 0 and <uint64_t>most < ms:
        return most
    return <int>ms


cdef inline int shard_timeout(tst_engine *engine, tst_shard *shard, uint64_t now) noexcept nogil:
    cdef int timeout = -1
    cdef uint64_t due
    if shard.todo != NULL:
        return 0
    if engine.call_idle:
        timeout = milliseconds_until(now + engine.idle_time, now, timeout)
    timeout = milliseconds_until(shard.accept_again, now, timeout)
    if shard.draining:
        # Another thread's flush() may be the last to let go of a connection, and it wakes nobody.
        timeout = milliseconds_until(now + DRAIN_LOOK, now, timeout)
    pthread_mutex_lock(&shard.mutex)
    due = shard.drain_first.drain_until if shard.drain_first != NULL else 0
    pthread_mutex_unlock(&shard.mutex)
    return milliseconds_until(due, now, timeout)


cdef inline int shard_poll(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                           uint64_t now) noexcept nogil:
    """Waits for events. Returns their number or -errno.

    Whoever pushes a request reads `sleeping` after the push; we look at the stack after setting it. One of the two sees
    the other, so a request never waits for an event, and a busy shard is never written to.
    """
    cdef int timeout = shard_timeout(engine, shard, now)
    cdef int n
    if timeout != 0:
        store64(&worker.waiting_since, now, RELAXED)
        store32(&shard.sleeping, 1, SEQ_CST)
        if load_pointer(&shard.requests, SEQ_CST) != NULL or (
                load32(&engine.phase, SEQ_CST) == PHASE_DRAINING and not shard.draining):
            timeout = 0
    n = sys_wait(shard.epoll_fd, batch.events, BATCH_EVENTS, timeout)
    store32(&shard.sleeping, 0, RELAXED)
    batch.n_events = n if n > 0 else 0
    batch.next_event = 0
    return n


cdef inline void worker_waited(tst_engine *engine, tst_worker *worker, uint64_t now) noexcept nogil:
    """Counts how often the wait that ends now was longer than idle_time (S37)."""
    cdef uint64_t since = load64(&worker.waiting_since, RELAXED)
    if since:
        count(&worker.stats.idle_count, (now - since) // engine.idle_time)
        store64(&worker.waiting_since, 0, RELAXED)


cdef inline bint shard_leave_running(tst_worker *worker, tst_shard *shard) noexcept nogil:
    """RUNNING -> POLLING. False: the shard was taken over meanwhile."""
    return token_move(shard, token_of(worker.no, TOKEN_RUNNING), token_of(worker.no, TOKEN_POLLING))


cdef inline void shard_enter_running(tst_engine *engine, tst_worker *worker, tst_shard *shard) noexcept nogil:
    """POLLING -> RUNNING. From here on the watcher looks after us, so it must be awake."""
    store64(&shard.token, token_of(worker.no, TOKEN_RUNNING), SEQ_CST)
    if load32(&engine.watcher_asleep, SEQ_CST):
        pthread_mutex_lock(&engine.mutex)
        store32(&engine.watcher_asleep, 0, RELAXED)
        pthread_cond_signal(&engine.watch)
        pthread_mutex_unlock(&engine.mutex)


cdef inline int shard_turn(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                           bint ran) noexcept nogil:
    """Turns without the interpreter until it is needed: see the head of this file. `ran`: the batch's handlers have
    run.

    Returns TURN_*, or -errno when epoll itself fails.
    """
    cdef uint64_t now = clock_now()
    cdef int n
    while True:
        batch_finish(worker, batch, now)
        if ran and not shard_leave_running(worker, shard):
            return TURN_LOST
        ran = False
        batch.n_entries = batch.n_python = 0
        batch.scratch_used = 0
        if load32(&engine.phase, ACQUIRE) == PHASE_DRAINING and shard_drain(engine, shard, now):
            return TURN_ENDED
        shard_take_requests(shard)
        if batch.next_event >= batch.n_events:
            n = shard_poll(engine, worker, shard, batch, now)
            now = clock_now()
            if n < 0 and not shard.draining:
                return n
            if n == 0 and engine.call_idle and load64(&worker.waiting_since, RELAXED) \
                    and now - load64(&worker.waiting_since, RELAXED) >= engine.idle_time:
                worker_waited(engine, worker, now)
                return TURN_IDLE
            worker_waited(engine, worker, now)
            shard_take_requests(shard)
        listeners_resume(shard, now)
        shard_expire(shard, now)
        shard_collect(engine, worker, shard, batch, now)
        if batch.n_python:
            shard_enter_running(engine, worker, shard)
            return TURN_RUN
        if worker.accept_errno:
            return TURN_COMPLAIN
