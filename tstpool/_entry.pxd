# cython: language_level=3
"""What is done for one connection in a turn, as far as it needs no interpreter and no handler.

    input       receive, cut: is a whole message there?
    output      what a handler has returned or wants sent
    finish      what handlers have left: send, release, arm

`_collect.pxd` makes the entries, `_run.pxd` and `_worker.pxi` run their handlers.
"""
from libc.errno cimport EAGAIN, ECONNABORTED, EIO, ENOBUFS, ENOMEM, EPIPE, ETIMEDOUT
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from tstpool._conn cimport (
    HEARD_END, HEARS_END, PEND_CLOSE, PEND_IN, PEND_OUT, PEND_TIMER, PRESSURE_GONE, PRESSURE_NONE, STATE_DETACHED,
    STATE_OPEN, STATE_OWNED, STATE_PAUSED, TYPE_SUB, connection_is, connection_is_closing, connection_is_paused,
    connection_is_pressed, connection_mark, connection_recv, connection_release, connection_send,
    connection_takes_messages, connection_wants_input, generation_of, output_account, output_drop, output_is_full,
    tst_connection, tst_limits)
from tstpool._data cimport (
    data_begun, data_complete, data_fill, data_make, data_pin, data_request, data_requested, data_unpin, input_consume,
    input_free, input_is_stored, input_keep, input_reserve, tst_data)
from tstpool._frame cimport FRAME_DELIMITED, FRAME_LENGTH, frame_next, framing_cuts, tst_framing
from tstpool._libc cimport (
    ACQUIRE, EPOLLERR, EPOLLHUP, EPOLLPRI, EPOLL_CTL_DEL, F_GETFL, F_SETFL, OUTQ_UNSENT, O_NONBLOCK, RELAXED, SEQ_CST,
    SHUT_WR, add64, compare_exchange64, fcntl, load32, load64, sched_yield, shutdown, store32, tst_rarely, tst_usually)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._poll cimport (
    OUTPUT_LOOKS, TRIGGER_EDGE, TRIGGER_LEVEL, connection_arm, connection_deafened, connection_drop_body,
    connection_flush, connection_input_mask, connection_is_stuck, connection_mutes_urgent, connection_retire,
    connection_silence, flush_once, flush_result, sys_control, sys_error, sys_holds, sys_prepare, sys_recv,
    sys_reset_on_close, sys_unread, sys_writable)
from tstpool._queue cimport block_new, queue_append, queue_size, tst_shared
from tstpool._shard cimport (
    DO_DISCONNECT, DO_EOF, DO_INPUT, DO_RETIRE, ENTRY_DONE, ENTRY_QUEUED, ENTRY_RAN, connection_ask_relief, entry_move,
    shard_ask, shard_drop_timer, shard_push, shard_set_timer, tst_batch, tst_entry, tst_shard, tst_worker)
from tstpool._stats cimport clock_now, count
from tstpool._timer cimport (
    DEADLINE_CLOSE, DEADLINE_NONE, DEADLINE_WRITE, connection_deadline, tick_before, tick_earlier, tick_not_older,
    tick_of)

cdef enum:
    INPUT_LIMIT = 262144                   # unread bytes kept for a handler that does not read; then TCP holds them
    READ_MORE = 65536                      # room made behind unread input
    DIRECT_LEAST = 16384                   # bytes to come from which a transfer is received straight into place
    BULKY = 4096                           # bytes received at once, from which on, without framing, more may be to come
    BULKY_TICKS = 256                      # a second: for so long after that
    ROOM_LOOK = 24                         # 0.1 s between looks at what a peer has acknowledged, at the very end
    LINGER_ROUNDS = 4                      # receives in a turn from a peer that we no longer listen to
    BODY_LEAST = 131072                    # bytes in a message from which it gets its object before it has arrived
    BODY_FIRST = 8192                      # received at once where one is likely: they have to be copied there
    SPARE_LEAST = 8192                     # bytes in a message from which one copy less is worth the preparations
    SPARE_MOST = 65536                     # ... and up to which it is likely to arrive in one piece
    SPARE_VOTES = 8                        # messages of one size after which there are objects for more of them

cdef enum:
    STAT_SUSPEND = 0                       # TstStat's numbers
    STAT_RUN = 1
    STAT_SEND = 2
    STAT_RECONNECTED = 3
    STAT_DISCONNECT = 4


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
    if tst_rarely(connection.body != NULL):
        return connection.message_ready
    if tst_usually(connection.input.size < INPUT_LIMIT):
        return False
    return connection.framed_by == NULL or connection.input.size >= connection.frame.needed


cdef inline size_t connection_room(tst_connection *connection) noexcept nogil:
    """How much to receive behind unread input: what a long message still needs, exactly, so that it gets one buffer; if
    its header came alone, a few bytes of it first, as it gets an object or a block then (connection_wants_body)."""
    if connection.framed_by != NULL and connection.frame.needed > connection.input.size + READ_MORE:
        if (connection.frame.needed >= BODY_LEAST and connection.input.size <= connection.frame.begin
                and connection.framed_by.kind != FRAME_DELIMITED):
            return BODY_FIRST
        return connection.frame.needed - connection.input.size
    return READ_MORE


cdef inline ssize_t receive_body(tst_connection *connection) noexcept nogil:
    """Receives into the bytes object, or the block, of a long message."""
    cdef tst_shared *body = connection.body
    cdef ssize_t n = sys_recv(connection.fd, <char *>body.bytes + connection.body_size,
                              body.size - connection.body_size)
    if n > 0:
        connection.body_size += <size_t>n
        if connection.body_size == body.size:
            connection.message_ready = connection.framed = True
    return n


cdef inline void connection_expect(tst_connection *connection, tst_worker *worker, size_t size) noexcept nogil:
    """A message of SPARE_LEAST bytes or more lies in the input, whole: the next one may be of the same size. It votes
    for that size, or against the one that has most of the votes. Owner only."""
    connection.expects = 0
    if (size > SPARE_MOST or not connection.framed or connection.frame.whole != connection.input.size
            or input_is_stored(&connection.input)):
        return                 # it was not alone, or came in pieces
    connection.expects = size
    if size == worker.spare_size:
        worker.spare_votes += worker.spare_votes < SPARE_VOTES
    elif worker.spare_votes > 0:
        worker.spare_votes -= 1
    else:
        worker.spare_size = size


cdef inline bint connection_has_spare(tst_connection *connection, tst_batch *batch,
                                      tst_worker *worker) noexcept nogil:
    """There is an object for a message like the last one, and nothing has changed since. Owner only."""
    cdef const tst_framing *framing = connection.framing
    if worker.spares == NULL or worker.spares.size != connection.expects or framing == NULL:
        return False
    return (framing == connection.framed_by and framing.kind == FRAME_LENGTH and framing.dropped == framing.header
            and framing.header <= worker.spares.front
            and batch.scratch_size - batch.scratch_used > framing.header + worker.spares.size
            and connection.compiled == NULL and connection_recv(connection) == NULL
            and not load32(&connection.rebind, RELAXED))


cdef inline ssize_t receive_spare(tst_connection *connection, tst_batch *batch, tst_worker *worker) noexcept nogil:
    """Receives what should be a message like the last one, its body straight into the bytes object that the handler is
    to get, its header into the object's hash, which is not known yet.

        what comes             [ header |      body      | nothing
        the spare object    [    hash   |      bytes     | 0 ]
                                                           ^
                                                           a byte here: there is more

    If it is anything else, it moves into the scratch buffer, and all goes on as ever.
    """
    cdef tst_shared *spare = worker.spares
    cdef size_t whole = connection.framing.header + spare.size
    cdef char *place = <char *>spare.bytes - connection.framing.header
    cdef ssize_t n = sys_recv(connection.fd, place, whole + 1)
    if n <= 0:
        return n
    if (<size_t>n == whole
            and frame_next(connection.framing, place, whole, &connection.scanned, &connection.frame) == 1
            and connection.frame.whole == whole):
        worker.spares = spare.next
        worker.spares_left -= 1
        batch.received_elsewhere += whole
        connection.body = spare
        connection.body_size = spare.size
        connection.message_ready = connection.framed = True
        connection.too_large = False
        return n
    connection.expects = 0
    connection.input.view = batch.scratch.bytes + batch.scratch_used
    memcpy(batch.scratch.bytes + batch.scratch_used, place, <size_t>n)
    if <size_t>n > whole:
        n += receive_rest(connection, batch, <size_t>n)
        place[whole] = 0
    connection.input.size = <size_t>n
    batch.scratch_used += <size_t>n
    return n


cdef inline ssize_t receive_rest(tst_connection *connection, tst_batch *batch, size_t have) noexcept nogil:
    """Receives what is behind the first `have` bytes, if it is there already. Returns how many bytes that are."""
    cdef ssize_t n = sys_recv(connection.fd, batch.scratch.bytes + batch.scratch_used + have,
                              batch.scratch_size - batch.scratch_used - have)
    if n < 0 and n != -EAGAIN:
        connection_break(connection, <int>-n)
    return max(n, 0)


cdef inline bint connection_wants_body(tst_connection *connection) noexcept nogil:
    """Input begins with a message whose size is known, of which the larger part may be still to come."""
    return (connection.framed_by != NULL and connection.body == NULL and not connection.message_ready
            and connection.frame.needed >= BODY_LEAST and connection.frame.needed > connection.input.size
            and connection.input.size > connection.frame.begin     # else an idle peer, or a bare header, would hold it
            and connection.framed_by.kind != FRAME_DELIMITED and connection_wants_input(connection))


cdef inline void connection_begin_body(tst_connection *connection, tst_shared *body) noexcept nogil:
    """A long message has begun: what there is of it moves into `body`, and the rest is received straight into that.
    Owner only."""
    connection.body = body
    connection.body_size = connection.input.size - connection.frame.begin
    memcpy(<char *>body.bytes, connection.input.view + connection.frame.begin, connection.body_size)
    input_consume(&connection.input, connection.input.size)


cdef inline bint connection_make_block(tst_connection *connection) noexcept nogil:
    """Of a compiled handler: its long message gets a block of its own. False: there is no memory for that; it goes
    behind what there is, as others do. Owner only."""
    cdef tst_shared *block = block_new(connection.out.stock, connection.frame.size)
    if block == NULL:
        return False
    connection_begin_body(connection, block)
    return True


cdef inline void connection_had_body(tst_connection *connection) noexcept nogil:
    """Its handler has, or will have, the message that arrived in an object or a block of its own. Owner only."""
    connection.large = connection.body.size >= BODY_LEAST
    connection.body = NULL
    connection.frame.begin = connection.frame.size = connection.frame.whole = 0


cdef inline ssize_t connection_receive(tst_connection *connection, tst_batch *batch, tst_worker *worker,
                                       uint64_t now) noexcept nogil:
    """Receives once: into a long message, a large transfer, behind input that is still unread, into an object made for
    it, or into the batch's scratch buffer.

    Returns bytes received, 0 for the end of input, or -errno.
    """
    cdef tst_data *data = connection_recv(connection)
    cdef size_t room = 0
    cdef char *place
    cdef ssize_t n = 0
    if tst_rarely(connection.body != NULL):
        n = receive_body(connection)
        batch.received_elsewhere += <size_t>max(n, 0)
    elif tst_rarely(data != NULL) and connection.input.size == 0 and not connection.message_ready:
        n = receive_in_place(connection, data, now, &room)
        batch.received_elsewhere += <size_t>max(n, 0)
    if tst_usually(room == 0) and tst_usually(connection.body == NULL):
        if tst_rarely(connection.expects != 0) and connection.input.size == 0 and (
                connection_has_spare(connection, batch, worker)):
            n = receive_spare(connection, batch, worker)
        elif tst_usually(connection.input.size == 0):
            room = batch.scratch_size - batch.scratch_used
            if tst_rarely(connection.large != 0):
                connection.large = False
                room = min(room, <size_t>BODY_FIRST)
            place = batch.scratch.bytes + batch.scratch_used
            n = sys_recv(connection.fd, place, room)
            if tst_usually(n > 0):
                batch.scratch_used += <size_t>n
                connection.input.view = place
                connection.input.size = <size_t>n
        else:
            room = connection_room(connection)
            place = input_reserve(&connection.input, room)
            if place == NULL:
                return -ENOMEM
            n = sys_recv(connection.fd, place, room)
            if n > 0:
                connection.input.size += <size_t>n
    if tst_usually(n > 0):
        connection_mutes_urgent(connection, False)
        count(&worker.stats.bytes_in, <uint64_t>n)
        connection.heard = True
        connection.bulky = n >= BULKY
        connection.active_tick = tick_of(now)
    connection.readable = n > 0 and connection.trigger == TRIGGER_EDGE     # an edge is over at EAGAIN, not before
    return n


cdef inline void connection_cut_frame(tst_connection *connection, const tst_framing *framing) noexcept nogil:
    """Looks for a message at the beginning of unread input. Owner only."""
    cdef int result
    if connection.input.size == 0:         # most often the last message was the only one
        connection.message_ready = False
        return
    if tst_rarely(connection.message_ready) and connection.framed and connection.framed_by == framing:
        return                 # found before, and not handed out yet
    if tst_rarely(connection.framed_by != framing):
        connection.framed_by = framing
        connection.scanned = connection.frame.needed = 0
    connection.framed = framing_cuts(framing)
    if not connection.framed:
        connection.message_ready = connection.input.size > 0
        return
    result = frame_next(framing, connection.input.view, connection.input.size, &connection.scanned, &connection.frame)
    connection.too_large = result < 0
    connection.message_ready = result != 0


cdef inline void connection_forget_frame(tst_connection *connection) noexcept nogil:
    """Input has gone that the framing has looked at, and not as a message: nothing is known of what is left. Owner
    only."""
    connection.framed_by = NULL
    connection.scanned = connection.frame.needed = 0
    connection.too_large = False
    if connection.framed and connection.body == NULL:
        connection.message_ready = connection.framed = False


cdef inline bint connection_awaits_transfer(tst_connection *connection) noexcept nogil:
    """The handler has asked for so many bytes (req_len); there is no message before it has them. Owner only."""
    cdef tst_data *data = connection_recv(connection)
    return tst_rarely(data != NULL) and data_requested(data)


cdef inline bint connection_cut(tst_connection *connection) noexcept nogil:
    """True: a whole message is ready for the handler. Moves unread input into the transfer that was asked for.

    Whole means: the transfer is complete (req_len > 0); or, with none asked for, that the framing has found a message,
    or that it never will (too_large); or, with no framing, that anything at all has arrived.
    """
    return connection_takes_messages(connection) and connection_cut_next(connection)


cdef inline bint connection_has_message(tst_connection *connection) noexcept nogil:
    """One that was ready before still is, and may be handed out although the connection has been paused since."""
    return connection.message_ready and not (connection.closing | connection.hold_input)


cdef inline bint connection_cut_next(tst_connection *connection) noexcept nogil:
    """connection_cut for one that takes messages."""
    if tst_rarely(connection.body != NULL):
        return connection.message_ready
    if connection_awaits_transfer(connection):
        return connection_cut_transfer(connection, connection_recv(connection))
    connection_cut_frame(connection, connection.framing)
    return connection.message_ready


cdef inline bint connection_cut_transfer(tst_connection *connection, tst_data *data) noexcept nogil:
    """Moves unread input into the transfer. True: it is complete. Owner only."""
    cdef ssize_t used
    if connection.framed or not connection.message_ready or not data_complete(data):
        connection.message_ready = connection.framed = False
        if connection.input.size:
            used = data_fill(data, connection.input.view, connection.input.size, clock_now())
            if used < 0:
                connection_break(connection, <int>-used)
                return False
            input_consume(&connection.input, <size_t>used)
            connection_forget_frame(connection)
            connection.message_ready = data_complete(data)
    return connection.message_ready


cdef inline void connection_break(tst_connection *connection, int reason) noexcept nogil:
    """It ends with an error: nothing more can be received or sent. Owner only."""
    connection.end_of_input = True
    connection.hold_input = False
    if connection.reason == 0:
        connection.reason = reason
    connection_drop_output(connection)


cdef inline bint connection_keep_input(tst_connection *connection) noexcept nogil:
    """The turn ends: unread input moves out of the scratch buffer, where others' will lie. False: there was no memory
    for it; it is forgotten, and the connection ends. Owner only."""
    if tst_usually(input_keep(&connection.input) == 0):
        return True
    input_free(&connection.input)
    connection_forget_frame(connection)
    connection_break(connection, ENOMEM)
    return False


cdef inline void connection_drop_output(tst_connection *connection) noexcept nogil:
    """Forgets queued output and accepts no more. Owner only."""
    spin_lock(&connection.lock)
    connection_cut_output(connection)
    spin_unlock(&connection.lock)


cdef inline void connection_drop_output_of(tst_connection *connection, uint32_t generation) noexcept nogil:
    """The same, on any thread, by us and not at the user's wish."""
    spin_lock(&connection.lock)
    if connection_is(connection, generation):
        if queue_size(&connection.out) and load32(&connection.out_error, RELAXED) == 0:
            store32(&connection.out_error, ECONNABORTED, RELAXED)
        connection_cut_output(connection)
    spin_unlock(&connection.lock)


cdef inline void connection_cut_output(tst_connection *connection) noexcept nogil:
    """Lock held. Who is sending right now forgets the rest afterwards."""
    if queue_size(&connection.out):        # the peer must not take what it has for the whole
        connection.aborted = True
    connection.out_drop = True
    if not connection.flushing:
        flush_result(connection, 0, 0)
    connection.out_closed = True
    connection.out_ended = False


cdef inline void connection_wait_for_flusher(tst_connection *connection) noexcept nogil:
    """No more output: returns when nobody is in the middle of sending any. Lock held, and let go of meanwhile; who
    sends needs nothing but that lock to come to an end."""
    connection.out_closed = connection.out_drop = True
    while connection.flushing:
        spin_unlock(&connection.lock)
        sched_yield()
        spin_lock(&connection.lock)


cdef enum:
    ABORT_NOTHING = 0                      # the connection is gone; or, for too much output, it was closed before
    ABORT_CLOSED = 1                       # it was closed before, but not like this
    ABORT_OPEN = 2                         # this call has closed it


cdef inline int connection_abort(tst_connection *connection, uint32_t generation, int reason) noexcept nogil:
    """Drops the output, and has close() send a reset; any thread. `reason`: ENOBUFS when it was too much output,
    ETIMEDOUT when the peer takes none, else 0. Returns ABORT_*: what it has ended."""
    cdef int ended = ABORT_NOTHING
    spin_lock(&connection.lock)
    if connection_is(connection, generation):
        if not connection_is_closing(connection):
            ended = ABORT_OPEN
        elif reason != ENOBUFS:
            ended = ABORT_CLOSED
    if ended:
        if reason:
            store32(&connection.out_error, <uint32_t>reason, RELAXED)
            add64(&connection.limits.total.write_closed if reason == ETIMEDOUT else
                  &connection.limits.total.overflow_closed, 1, RELAXED)
        connection.aborted = True
        connection_cut_output(connection)
    spin_unlock(&connection.lock)
    return ended


cdef inline void connection_look_for_reset(tst_connection *connection) noexcept nogil:
    """The peer has finished sending long ago, so that no receive will tell that it has gone altogether: the kernel has
    reported that, perhaps. Owner only."""
    cdef uint32_t events = load32(&connection.events, RELAXED)
    cdef int error = 0
    if events & (EPOLLERR | EPOLLHUP):
        error = sys_error(connection.fd)
    if error:
        connection_break(connection, error)
    elif events & EPOLLHUP and not connection_has_ended(connection):
        if connection_drained(connection):     # a unix socket's peer has closed
            connection_begin_close(connection)
        else:
            connection_break(connection, EPIPE)


cdef inline void take_input(tst_connection *connection, tst_batch *batch, tst_worker *worker, bint event,
                            uint64_t now) noexcept nogil:
    """Receives if the kernel has something (`event`, or it is known from before) and the handler wants it. Owner
    only."""
    cdef ssize_t n
    cdef int broken = <int>load32(&connection.out_error, RELAXED)
    if tst_rarely(not event) and not connection.readable and not broken:
        return
    if tst_rarely(broken != 0) and not connection.end_of_input and (
            connection_is_paused(connection) or connection_input_full(connection)):
        connection_break(connection, broken)       # nobody will make room for what may still be there
        return
    if tst_rarely(not connection_wants_input(connection)) or tst_rarely(connection_input_full(connection)):
        if connection.hears_end & HEARD_END and not connection.closing:
            connection_look_for_reset(connection)
        if event:
            connection.readable = True     # an edge will not be reported twice
            if connection.trigger == TRIGGER_LEVEL:
                spin_lock(&connection.lock)
                connection_silence(connection, &worker.stats)
                spin_unlock(&connection.lock)
        return
    n = connection_receive(connection, batch, worker, now)
    if tst_usually(n > 0):
        return
    if n == 0:
        connection.end_of_input = True
        connection.reason = broken
    elif n == -EAGAIN:
        connection.readable = False
        if broken:
            connection_break(connection, broken)
        elif load32(&connection.events, RELAXED) & EPOLLPRI:
            connection_mutes_urgent(connection, True)
    else:
        connection_break(connection, <int>-n)


# -------------------------------------------------------------------------------------------------- output

cdef inline int connection_transfer(tst_connection *connection, uint64_t now, bint limited) noexcept nogil:
    """Queues what the handler put into its send buffer (S12). Returns 1 when there was something, 0, or -errno.

    `limited`: others may follow before it is sent. -ENOBUFS then, with nothing changed, when too much waits already.
    """
    cdef tst_data *data = connection_send(connection)
    cdef uint64_t word
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
            if limited and output_is_full(connection, size, NULL):
                result = -ENOBUFS
            elif connection.out_closed:
                size = 0
            else:
                connection.out.burst = True
                result = queue_append(&connection.out, data.s + data.req_pos + data.com_len, size)
                connection.send_mark = connection.out.queued
                output_account(connection)
            spin_unlock(&connection.lock)
        if result == 0 and size:
            data.begin_time = 0 if limited else now
            data.com_len = data.req_len
            result = 1
    spin_unlock(&data.lock)
    word = load64(&connection.state, SEQ_CST)
    if tst_rarely(result == 1 and word & STATE_DETACHED):
        shard_ask(connection, generation_of(word), 0)      # its handler may block in the next message
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
        data = connection_send(connection)
        if data != NULL:
            spin_lock(&data.lock)
            if data.begin_time:
                data.trans_time = now - min(now, data.begin_time)
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


cdef inline bint connection_sent_whole(tst_connection *connection) noexcept nogil:
    """The kernel was handed all that was ever queued."""
    cdef bint whole
    spin_lock(&connection.lock)
    whole = (queue_size(&connection.out) == 0 and not connection.aborted
             and load32(&connection.out_error, RELAXED) == 0)
    spin_unlock(&connection.lock)
    return whole


cdef inline void connection_begin_close(tst_connection *connection) noexcept nogil:
    """From here on only output remains. Owner only."""
    connection.closing = True
    # Who has asked for it has been heard, and must not close what on_disconnect may put in its place.
    connection_mark(connection, PEND_CLOSE, False, STATE_OWNED, generation_of(load64(&connection.state, RELAXED)))
    connection.message_ready = connection.hold_input = connection.call_writable = connection.ask_writable = False
    spin_lock(&connection.lock)
    connection.out_closed = True
    connection.out_ended = False           # close() tells the peer
    connection.kernel_holds = 0            # that look was for another deadline
    spin_unlock(&connection.lock)
    if connection.reason == 0:
        connection.reason = <int>load32(&connection.out_error, RELAXED)


cdef inline int connection_reconnect(tst_connection *connection) noexcept nogil:
    """The handler has put another connection under the descriptor: forgets the old one's bytes and registers the new
    one. Owner only."""
    cdef tst_data *data
    input_free(&connection.input)
    connection_drop_body(connection)
    connection_forget_frame(connection)
    connection.close_noted = connection.unfinished = connection.heard = False
    connection.passed_on = 0
    connection.hears_end = HEARS_END       # perhaps: who has no such hook says so when it is called
    connection.end_of_input = connection.closing = connection.hold_input = connection.message_ready = False
    connection.call_writable = connection.ask_writable = False
    connection.reason = 0
    spin_lock(&connection.lock)
    connection_wait_for_flusher(connection)        # what it sends is the old one's
    output_drop(connection)
    if connection.aborted:                         # by somebody who took the new descriptor for the old one
        sys_reset_on_close(connection.fd, False)
    sys_control(connection.epoll_fd, EPOLL_CTL_DEL, connection.fd, 0, 0)   # dup2 has done it already, most of the time
    connection.registered = connection.want_room = connection.urgent_off = False
    connection.out_closed = connection.out_ended = connection.out_drop = connection.aborted = False
    connection.armed = connection.kernel_holds = 0
    store32(&connection.out_error, 0, RELAXED)
    spin_unlock(&connection.lock)
    fcntl(connection.fd, F_SETFL, fcntl(connection.fd, F_GETFL) | O_NONBLOCK)
    sys_prepare(connection.fd)
    data = connection_recv(connection)
    if data != NULL:
        data_request(data, 0, 0)
    data = connection_send(connection)
    if data != NULL:
        data_request(data, 0, 0)
    return 0


cdef inline void connection_apply(tst_connection *connection, tst_worker *worker, int stat) noexcept nogil:
    """Does what a handler's return value says (TstStat; S12-S14, S28, S40). Owner only."""
    cdef int queued
    if connection.closing:
        return
    if stat == STAT_RECONNECTED:
        connection_reconnect(connection)
    elif stat > STAT_SEND or tst_rarely(stat < 0):     # a -errno that a compiled handler has returned, say
        connection_transfer(connection, worker.clock, False)
        connection_begin_close(connection)
    elif stat == STAT_SEND or connection_send(connection) != NULL:
        queued = connection_transfer(connection, worker.clock, stat != STAT_SEND)
        if queued < 0:
            if queued == -ENOBUFS:
                add64(&connection.limits.total.overflow_closed, 1, RELAXED)
            connection_break(connection, -queued)
        elif stat == STAT_SEND:
            connection.call_writable = connection.hold_input = True
            if queued == 0:
                connection.send_mark = 0
                count(&worker.stats.spins, 1)


cdef inline bint connection_has_ended(tst_connection *connection) noexcept nogil:
    """send_eof() was called."""
    cdef bint ended
    spin_lock(&connection.lock)
    ended = connection.out_ended
    spin_unlock(&connection.lock)
    return ended


cdef inline bint connection_is_empty(tst_connection *connection) noexcept nogil:
    """Nothing that has arrived is left, and there is no transfer. Owner only."""
    return (connection.input.size == 0 and tst_usually(connection.body == NULL)
            and tst_usually(connection_recv(connection) == NULL))


cdef inline bint connection_tells_room(tst_connection *connection) noexcept nogil:
    """Its handler wants to hear of PRESSURE_GONE; or one was assigned, of which nobody knows yet. Owner only."""
    return connection.tell_room or load32(&connection.rebind, RELAXED) != 0


cdef inline bint connection_owes_end(tst_connection *connection) noexcept nogil:
    """The peer has finished sending, and its handler wants to hear of that, after the last message. Owner only."""
    if not connection.end_of_input or connection.reason or load32(&connection.out_error, RELAXED):
        return False
    return not connection.hears_end & HEARD_END and (
        connection.hears_end & HEARS_END or load32(&connection.rebind, RELAXED))


cdef inline bint connection_is_to_go_on(tst_connection *connection) noexcept nogil:
    """The peer has finished sending, and reads; its handler has not finished. If it wants to hear of that it decides,
    once it has. Else it has paused the connection, to answer later, or waits to hear that there is room for more
    output. After send_eof() there is what is queued, and no more. Owner only."""
    if connection.reason or load32(&connection.out_error, RELAXED):
        return False
    if connection_has_ended(connection):
        return not connection_drained(connection)
    if connection.hears_end & HEARD_END or connection_owes_end(connection):
        return True
    if connection.ask_writable or load64(&connection.state, RELAXED) & (STATE_PAUSED | PEND_OUT):
        return True
    return connection_tells_room(connection) and load32(&connection.pressure, RELAXED) != PRESSURE_NONE


cdef inline bint connection_is_over(tst_connection *connection, bint takes) noexcept nogil:
    """It is to be closed, because nothing more can arrive and its handler waits for nothing. `takes`: what
    connection_takes_messages has said; if it was no, what is there is for later. Owner only."""
    if not connection.end_of_input or connection.hold_input or connection.closing or connection_is_to_go_on(connection):
        return False
    return takes or connection.hears_end & HEARD_END or not (connection.message_ready or connection.input.size)


cdef inline bint connection_has_nothing_due(tst_connection *connection) noexcept nogil:
    """All input was handed out, and more may come: that it is so costs most messages no call. Owner only."""
    if connection_is_empty(connection) and tst_usually(not (connection.closing | connection.end_of_input)):
        connection.message_ready = False
        return True
    return False


cdef inline uint32_t connection_due(tst_connection *connection) noexcept nogil:
    """What is left to be done for a connection that has received and sent what it can. Owner only."""
    if connection_has_nothing_due(connection):
        return 0
    # One look decides both: another thread may pause it, resume it or relieve it in between.
    cdef bint takes = connection_takes_messages(connection)
    if takes and connection_cut_next(connection):
        return DO_INPUT
    cdef bint over = connection_is_over(connection, takes)
    if (takes or over) and connection_owes_end(connection):
        return DO_EOF
    if over:
        connection_begin_close(connection)
    if connection.closing and not connection.lingering and connection_drained(connection):
        return DO_DISCONNECT
    return 0


# ----------------------------------------------------------------------------------------------- deadlines

cdef inline bint connection_is_unfinished(tst_connection *connection) noexcept nogil:
    """A message has begun to arrive. Owner only."""
    if connection.message_ready:
        return False
    if connection.body != NULL:
        return True
    if connection_awaits_transfer(connection):
        return data_begun(connection_recv(connection))
    return framing_cuts(connection.framing) and connection.input.size != 0


cdef inline void entry_watch(tst_worker *worker, tst_entry *entry, bint waits, uint64_t now) noexcept nogil:
    """Notes what an entry has left, and moves the connection's timer if its deadline is nearer now. `waits`: output
    does. Owner only."""
    cdef tst_connection *connection = entry.connection
    cdef bint wants_input = connection_wants_input(connection)
    cdef uint32_t tick = tick_of(now)
    if entry.what and not connection.untouched:
        connection.active_tick = tick
    connection.untouched = False
    if connection.closing:                 # `unfinished` stays: it says that the peer is still sending
        if not connection.close_noted:
            connection.close_noted = True
            connection.since_tick = tick
    elif not (wants_input or connection_is_pressed(connection)) or not connection_is_unfinished(connection):
        connection.unfinished = False      # (pressed: connection_was_pressed gives that time back)
    elif not connection.unfinished or entry.what & DO_INPUT:
        connection.unfinished = True       # and not what the message before has begun
        connection.since_tick = tick
    watch_deadline(worker, connection, waits, wants_input, tick)
    if waits and not connection_output_waits(connection):
        # Another thread is sending it, and tells nobody how that ends: the deadline that comes first looks again.
        watch_deadline(worker, connection, False, wants_input, tick)
    elif (waits and (wants_input or connection.hears_end & HEARD_END) and connection.limits != NULL
            and connection.limits.idle and not connection.limits.write):
        # Output may wait for as long as it likes; but if another thread sends it (flush), nobody notes that it is idle.
        watch_until(worker, connection, tick + connection.limits.idle)


cdef inline uint32_t output_look(const tst_connection *connection, int kind, uint32_t due,
                                 uint32_t tick) noexcept nogil:
    """When the connection is to be looked at for that deadline: see connection_is_stuck."""
    cdef uint32_t limit = output_limit(connection, kind)
    if connection.linger_for_room:
        return tick_earlier(tick + ROOM_LOOK, due)
    return tick_earlier(tick + max(1, limit // OUTPUT_LOOKS), due) if limit else due


cdef inline void watch_deadline(tst_worker *worker, tst_connection *connection, bint waits, bint wants_input,
                                uint32_t tick) noexcept nogil:
    cdef uint32_t due = 0
    cdef int kind = connection_deadline(connection, waits, wants_input, &due)
    if kind == DEADLINE_NONE:
        return
    watch_until(worker, connection, output_look(connection, kind, due, tick))


cdef inline void watch_until(tst_worker *worker, tst_connection *connection, uint32_t due) noexcept nogil:
    if not connection.has_timer or tick_before(due, connection.timer_due):
        shard_set_timer(worker, <tst_shard *>connection.shard, connection, due)


cdef inline bint connection_output_waits(tst_connection *connection) noexcept nogil:
    """The kernel has refused some of its output."""
    cdef bint waits
    spin_lock(&connection.lock)
    waits = connection.want_out
    spin_unlock(&connection.lock)
    return waits


cdef inline void connection_age(tst_connection *connection, uint32_t now) noexcept nogil:
    """A timer fires sooner than in 104 days: what was noted long ago is made less old in time. Owner only."""
    connection.active_tick = tick_not_older(connection.active_tick, now)
    connection.since_tick = tick_not_older(connection.since_tick, now)
    spin_lock(&connection.lock)
    store32(&connection.output_tick, tick_not_older(connection.output_tick, now), RELAXED)
    spin_unlock(&connection.lock)


cdef inline uint32_t output_limit(const tst_connection *connection, int kind) noexcept nogil:
    """Ticks in which the peer is to take some output, by that deadline; 0: it is another one."""
    if kind == DEADLINE_WRITE:
        return connection.limits.write
    return connection.limits.linger if kind == DEADLINE_CLOSE else 0


cdef inline bint connection_takes_nothing(tst_connection *connection, uint32_t since, uint32_t limit,
                                          uint64_t now) noexcept nogil:
    """connection_is_stuck, without the lock."""
    cdef bint stuck
    spin_lock(&connection.lock)
    stuck = connection_is_stuck(connection, since, limit, now)
    spin_unlock(&connection.lock)
    return stuck


cdef inline void connection_expire(tst_worker *worker, tst_connection *connection, uint64_t now) noexcept nogil:
    """The wheel has asked: closes the connection if its deadline has come. Owner only."""
    cdef uint32_t due = 0
    cdef int kind = connection_deadline(connection, connection_output_waits(connection),
                                        connection_wants_input(connection), &due)
    cdef uint32_t limit = output_limit(connection, kind)
    connection.has_timer = False
    connection_age(connection, tick_of(now))
    if kind == DEADLINE_NONE or (limit and not sys_writable(connection.fd)
                                 and not connection_takes_nothing(connection, due - limit, limit, now)):
        return                             # the peer has taken something, or there is time left
    if tick_before(tick_of(now), due):
        return
    if kind < DEADLINE_WRITE and sys_unread(connection.fd) and not connection_input_full(connection) and (
            not connection.unfinished or tick_of(now) - due < due - connection.since_tick):
        # Handlers of others have kept us from reading what came in time. But a message that goes on arriving gets no
        # more than twice its time, or a byte now and then would be an excuse for ever.
        return
    if kind >= DEADLINE_WRITE and sys_writable(connection.fd):
        return                             # nor did we see that the peer has taken something
    count(&worker.stats.deadline_closed[kind], 1)
    if kind >= DEADLINE_WRITE:
        connection_drop_output(connection)
    if connection.reason == 0 and (not connection.closing or kind == DEADLINE_CLOSE):
        connection.reason = ETIMEDOUT
    connection_begin_close(connection)


# ------------------------------------------------------------------------------------------------- finish

cdef inline bint connection_may_reset(tst_connection *connection) noexcept nogil:
    """A reset can destroy nothing: the peer is to get one, or can't be reached, or was sent nothing."""
    cdef bint harmless
    spin_lock(&connection.lock)
    harmless = connection.aborted or connection.out.sent == 0 or load32(&connection.out_error, RELAXED) != 0
    spin_unlock(&connection.lock)
    return harmless


cdef inline bint connection_should_linger(tst_connection *connection, uint64_t now) noexcept nogil:
    """close() would destroy what the peer has not read yet: the kernel resets a connection whose input was not read, or
    that something arrives for later. Sets linger_for_room, too. Owner only, after all output was sent."""
    cdef tst_shard *shard = <tst_shard *>connection.shard
    if connection.lingering or connection.end_of_input or connection.reason:
        return False
    if connection_may_reset(connection) or load32(&shard.aborted, RELAXED):
        return False
    # A message that came with the one before, in one piece, has never been noted as unfinished.
    if connection.unfinished or connection_is_unfinished(connection) or sys_unread(connection.fd) != 0:
        return True
    if load32(&shard.draining, RELAXED):
        return False
    # Without framing nobody knows whether the peer is through.
    if connection.bulky and not framing_cuts(connection.framing) and (
            tick_of(now) - connection.active_tick < BULKY_TICKS):
        return True
    # It is far from having it all: what may it send meanwhile?
    connection.linger_for_room = sys_holds(connection.fd, OUTQ_UNSENT) != 0
    return connection.linger_for_room


cdef inline bint connection_begin_linger(tst_connection *connection, uint64_t now) noexcept nogil:
    """Tells the peer that nothing more comes, and goes on reading what it sends, until it closes too. False: there is
    no need. Owner only."""
    if not connection_should_linger(connection, now) or shutdown(connection.fd, SHUT_WR) < 0:
        return False
    connection.lingering = True
    connection.since_tick = connection.active_tick = tick_of(now)
    input_free(&connection.input)
    connection_drop_body(connection)
    connection.readable = True
    return True


cdef inline bint connection_linger(tst_connection *connection, tst_batch *batch, uint64_t now) noexcept nogil:
    """Drops what has arrived. False: the peer has closed, or broken. Owner only."""
    cdef int _round
    cdef ssize_t n
    for _round in range(LINGER_ROUNDS):
        n = sys_recv(connection.fd, batch.scratch.bytes + batch.scratch_used, batch.scratch_size - batch.scratch_used)
        if n == -EAGAIN:
            connection_mutes_urgent(connection, True)      # nobody wants to hear of any
            connection.readable = False
            return True
        if n <= 0:
            return False
        batch.received_elsewhere += <size_t>n     # so that others get their turn
        connection.active_tick = tick_of(now)
        connection.linger_for_room = False
    connection.readable = True
    return True


cdef inline void entry_retire(tst_worker *worker, tst_connection *connection) noexcept nogil:
    shard_drop_timer(<tst_shard *>connection.shard, connection)
    count(&worker.stats.closed, 1)
    connection_retire(connection, &worker.stats)


cdef inline uint64_t entry_left_over(tst_connection *connection, int waiting) noexcept nogil:
    """Returns PEND_ bits for what must come back without waiting for an event. `waiting`: connection_flush's result.
    Owner only."""
    if connection.lingering:
        return PEND_IN if connection.readable and connection.trigger == TRIGGER_EDGE else 0
    if connection_is_over(connection, connection_takes_messages(connection)):
        return PEND_IN                     # it broke after connection_due had looked
    if waiting < 0 and not connection.closing and (not connection.end_of_input or connection.hold_input):
        return PEND_IN                     # read what had arrived before it broke, then end it, or hold it
    if connection.closing:
        return PEND_CLOSE if waiting <= 0 and connection_drained(connection) else 0
    if (connection.message_ready or connection_owes_end(connection)) and connection_takes_messages(connection):
        return PEND_IN
    if connection.call_writable and waiting == 0:
        return PEND_IN
    if load32(&connection.pressure, RELAXED) == PRESSURE_GONE and (
            connection_tells_room(connection) or connection.input.size or connection.body != NULL):
        return PEND_IN                     # there may be a message in it, which nobody has looked for meanwhile
    if connection.trigger == TRIGGER_EDGE and connection.readable and connection_wants_input(connection):
        return PEND_IN
    return 0


cdef inline bint connection_is_usual(tst_connection *connection, uint32_t tick) noexcept nogil:
    """It waits for input and for nothing else, and its timer need not be moved when it is idle from `tick` on. Owner
    only."""
    cdef const tst_limits *limits = connection.limits
    if tst_rarely(connection.closing | connection.end_of_input | connection.hold_input | connection.message_ready
                  | connection.call_writable | connection.ask_writable | connection.lingering):
        return False
    if tst_rarely(not connection.heard) or tst_rarely(connection.trigger != TRIGGER_LEVEL) or tst_rarely(
            not connection_is_empty(connection)):
        return False
    if limits == NULL or limits.idle == 0 or connection.type != TYPE_SUB:
        return True
    return connection.has_timer and not tick_before(tick + limits.idle, connection.timer_due)


cdef inline bint connection_is_armed_for_input(const tst_connection *connection) noexcept nogil:
    """And for nothing else, and that is all it wants as far as its output is concerned. Lock held."""
    return tst_usually(connection.armed == connection_input_mask(connection)) and tst_usually(
        not (connection.want_out | connection.want_room))


cdef inline bint entry_finish_usual(tst_worker *worker, tst_entry *entry, uint64_t now) noexcept nogil:
    """How most entries end: the kernel takes all output, then nothing is left to be done, armed or timed. False: this
    is another case, and what it takes is left to entry_finish.

    All that entry_finish asks one by one is asked at once here, and the connection is released under the lock that ends
    the send. Whoever appends while we own it trusts us to send: he comes before we look at the queue, or sees it free.
    """
    cdef tst_connection *connection = entry.connection
    cdef uint64_t owned = <uint64_t>entry.generation << 32 | STATE_OPEN | STATE_OWNED
    cdef uint64_t word = owned
    cdef bint released
    if tst_rarely(entry.what != DO_INPUT) or tst_rarely(not connection_is_usual(connection, tick_of(now))):
        return False
    connection.active_tick = tick_of(now)
    connection.unfinished = False
    spin_lock(&connection.lock)
    if queue_size(&connection.out) and connection_is_armed_for_input(connection) and not connection.flushing:
        connection.flushing = True
        flush_once(connection, now, &worker.stats)
        connection.flushing = False
    released = (tst_usually(queue_size(&connection.out) == 0) and connection_is_armed_for_input(connection)
                and tst_usually(not connection.flushing) and tst_usually(load32(&connection.out_error, RELAXED) == 0)
                and tst_usually(load32(&connection.pressure, RELAXED) == PRESSURE_NONE)
                and compare_exchange64(&connection.state, &word, owned & ~<uint64_t>STATE_OWNED, False, SEQ_CST,
                                       RELAXED))
    spin_unlock(&connection.lock)
    return released


cdef inline void entry_finish(tst_worker *worker, tst_entry *entry, uint64_t now) noexcept nogil:
    """Ends an entry: sends, releases the connection, arms it, and looks once more for what came in between."""
    cdef tst_connection *connection = entry.connection
    cdef tst_shard *shard = <tst_shard *>connection.shard
    cdef uint64_t pending
    cdef int waiting, armed = 0
    cdef bint want_input, want_room, pushed, unwatched, again = False
    if tst_usually(entry_finish_usual(worker, entry, now)):
        return
    if entry.what & DO_RETIRE and not connection_begin_linger(connection, now):
        entry_retire(worker, connection)
        return
    waiting = connection_flush(connection, entry.generation, False, False, now, &worker.stats)
    pending = entry_left_over(connection, waiting)
    entry_watch(worker, entry, waiting > 0, now)
    want_input = connection.lingering or (
        connection_wants_input(connection) and not connection_input_full(connection))
    # Another thread may be the one that sends the last of the output, and it tells nobody: EPOLLOUT will.
    want_room = connection.ask_writable or (
        pending == 0 and not connection.lingering and (
            connection.call_writable or connection.closing or (waiting > 0 and connection.end_of_input)))
    spin_lock(&connection.lock)            # before the release: the next owner must find what we leave, not undo it
    pushed = connection_release(connection, pending)
    if connection_is(connection, entry.generation):
        connection.want_room = want_room
        armed = connection_arm(connection, want_input, &worker.stats)
        if armed < 0:
            connection_deafened(connection, -armed)
        # A thread that appended while we owned the connection trusted us to send it.
        again = queue_size(&connection.out) != 0 and not connection.want_out and not connection.flushing
    unwatched = connection.want_out and waiting <= 0
    spin_unlock(&connection.lock)
    if pushed:
        shard_push(shard, connection)
    if again:
        waiting = connection_flush(connection, entry.generation, False, True, now, &worker.stats)
        unwatched = waiting > 0
        if waiting < 0:
            shard_ask(connection, entry.generation, PEND_IN)
        connection_ask_relief(connection, entry.generation)
    if unwatched:                          # output that nobody has set a deadline for
        shard_ask(connection, entry.generation, PEND_TIMER)
    if armed < 0:
        shard_ask(connection, entry.generation, PEND_CLOSE)


cdef inline void batch_give_up(tst_worker *worker, tst_batch *batch) noexcept nogil:
    """Nobody will run what is left of it: those connections break, and all are released for whoever closes them."""
    cdef int i
    for i in range(batch.n_entries):
        if entry_move(&batch.entries[i], ENTRY_QUEUED, ENTRY_RAN):
            connection_break(batch.entries[i].connection, EIO)
            connection_keep_input(batch.entries[i].connection)
    batch_finish(worker, batch, clock_now())


cdef inline void batch_finish(tst_worker *worker, tst_batch *batch, uint64_t now) noexcept nogil:
    """Finishes each entry whose handlers have run. Safe beside another thread that does the same."""
    cdef int i
    for i in range(batch.n_entries):
        if entry_move(&batch.entries[i], ENTRY_RAN, ENTRY_DONE):
            entry_finish(worker, &batch.entries[i], now)
