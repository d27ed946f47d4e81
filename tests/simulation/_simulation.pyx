# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The engine over a fake kernel: one seed is one run of workers, clients and other threads, and replays exactly.

See README.md. The engine's headers are compiled into this module as they are; reroute.h, which must stand first, leads
their system calls to kernel.c. What tstpool/_core.pyx does between them, because it needs the interpreter, is done here
in its smallest form: the functions in "the worker" and "the pool" carry the names of what they stand for.
"""
from libc.errno cimport EBADF, ECONNABORTED, ENOBUFS, ENOMEM, ENOTCONN, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdio cimport fprintf, stderr
from libc.string cimport memcmp, memcpy, memset

cdef extern from "reroute.h" nogil:
    cdef struct sim_faults:
        uint32_t recv_short, recv_eintr, recv_eagain, recv_error
        uint32_t send_short, send_eintr, send_eagain, send_error
        uint32_t accept_eintr, accept_error, accept_full
        uint32_t control_error
        uint32_t wait_eintr, wait_few, wait_stale, wait_twice, wait_error
        uint32_t no_memory
        uint32_t spurious_wakeup
        uint32_t weak
    cdef struct sim_stream:
        int fd, accepted, closed, aborted, faulted, refused, fin, reset, shut, deaf, linger_off, went_with_reset
        uint32_t in_size, out_size
        uint64_t received, sent, received_at, sent_at
    cdef struct sim_tally:
        uint64_t accepts, closes, bytes_sent, bytes_received, controls, wait_errors, no_memory, stale
    const uint64_t MILLISECOND "SIM_MILLISECOND"
    enum: SIM_STREAMS, SIM_FIRST_FD, SIM_FILES
    uintptr_t sim_quiet_begin, sim_quiet_size
    void sim_begin(uint64_t seed, int tracing)
    const char *sim_run()
    int sim_spawn(const char *name, void (*body)(void *) noexcept nogil, void *argument)
    void sim_fail(const char *format, ...)
    const char *sim_failure()
    uint64_t sim_random()
    uint32_t sim_below(uint32_t n)
    int sim_chance(uint32_t rate)
    int sim_block(const void *channel, uint64_t until)
    void sim_wake(const void *channel, int all)
    void sim_sleep(uint64_t nanoseconds)
    void sim_wait_for_rest()
    void sim_progress()
    uint64_t sim_now()
    void sim_set_schedule(uint32_t mean, int slow)
    void sim_trace(const char *what, int64_t one, int64_t two, int64_t result)
    uint64_t sim_trace_hash()
    uint64_t sim_switches()
    void sim_point()
    void sim_when_quiet(void (*look)() noexcept nogil)
    void kernel_begin()
    void kernel_faults(const sim_faults *faults)
    void kernel_calm()
    void kernel_interrupt()
    int kernel_await_send(uint64_t nanoseconds)
    int kernel_listener()
    sim_stream *kernel_stream(int i)
    int kernel_stream_of(int fd)
    int kernel_open_files()
    uint64_t kernel_live_memory()
    void kernel_free_all()
    int kernel_backlog()
    const sim_tally *kernel_tally()
    const void *kernel_wire()
    int wire_connect(uint32_t in_capacity, uint32_t out_capacity)
    int wire_replace(int fd, uint32_t in_capacity, uint32_t out_capacity)
    int wire_write(int stream, const unsigned char *bytes, uint32_t size)
    int wire_read(int stream, unsigned char *bytes, uint32_t size)
    void wire_fin(int stream)
    void wire_reset(int stream)
    void *calloc(size_t n, size_t size)
    void *malloc(size_t size)
    void free(void *place)

from cpython.object cimport PyObject

from tstpool._collect cimport connection_settle_in
from tstpool._conn cimport (
    GONE, HEARD_END, HEARS_END, NO_TIMER, OVERFLOW_CLOSE, OVERFLOW_REFUSE, PASSED_MESSAGE, PASSED_WRITABLE, PEND_ANY,
    PEND_ARM, PEND_CLOSE, PEND_CONNECT, PEND_IN, PEND_OUT, STATE_DETACHED, STATE_OPEN, STATE_OWNED, STATE_PAUSED,
    STATE_QUEUED, TABLE_CHUNK, TABLE_CHUNKS, TYPE_LISTEN, connection_append, connection_close_output, connection_id,
    connection_is, connection_mark, connection_wants_input, generation_of, table_chunk, table_open, tst_compiled,
    tst_connection, tst_limits)
from tstpool._data cimport data_complete, data_request, data_requested, input_consume, tst_data
from tstpool._entry cimport (
    STAT_DISCONNECT, STAT_RECONNECTED, STAT_RUN, STAT_SEND, STAT_SUSPEND, batch_finish, connection_abort,
    connection_apply, connection_awaits_transfer, connection_begin_close, connection_cut, connection_due,
    connection_keep_input, connection_reconnect)
from tstpool._frame cimport FRAME_DELIMITED, FRAME_LENGTH, framing_settle, tst_framing
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, CLOCK_MONOTONIC, EPOLL_CTL_ADD, EPOLLIN, POLLOUT, RELAXED, RELEASE, SEQ_CST, TFD_NONBLOCK, add32,
    close, epoll_create1, eventfd, gettid, load32, load64, poll, pollfd, store32, store64, store_pointer, sub32,
    timerfd_create)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._park cimport PARK_END, PARK_IDLE, engine_look, engine_park
from tstpool._poll cimport (
    connection_drop_body, connection_end_output, connection_flush, connection_is_stuck, sys_control, sys_wake)
from tstpool._queue cimport (
    queue_size, shared_leave, shared_new, stock_free, stock_has_litter, stock_take_litter, tst_shared)
from tstpool._run cimport (
    RUN_TIME, message_at_hand, run_messages, worker_enter, worker_goes_on, worker_job, worker_leave)
from tstpool._shard cimport (
    DO_CONNECT, DO_DISCONNECT, DO_EOF, DO_RETIRE, DO_WRITABLE, ENTRY_QUEUED, ENTRY_RAN, ENTRY_RUNNING, ID_ALARM,
    PHASE_DRAINING, PHASE_RUNNING, batch_detach, batch_get, batch_leave, connection_ask_relief, entry_move,
    scratch_leave, shard_ask, shard_enter_running, shard_leave_running, shard_push, token_held, tst_batch, tst_engine,
    tst_entry, tst_shard, tst_worker)
from tstpool._stats cimport clock_now, count, tick_now, tst_stats
from tstpool._timer cimport (
    DEADLINE_NONE, TICK_BITS, connection_deadline, tick_of)
from tstpool._turn cimport (
    ELSEWHERE_FREE, TURN_COMPLAIN, TURN_ELSEWHERE, TURN_ENDED, TURN_IDLE, TURN_LITTER, TURN_LOST, TURN_RUN,
    engine_shard_ended, shard_turn, shard_yield, turn_elsewhere)

cdef enum:
    WORKERS = 4
    SHARDS = 2
    CLIENTS = 12
    SPARES = 8                 # peers of connections that handlers have made
    REQUESTERS = 3
    BODY_MOST = 600            # bytes in a message
    SPARE_FRONT = 8            # bytes before the object for the next one, as its hash would be
    FRAME_MOST = 640
    SOCKS = 64
    HEAD = 12                  # bytes before the body of each frame that the server sends: sender, number, size
    SENDERS = REQUESTERS + 1   # the handler is sender 0
    BROADCASTERS = WORKERS + REQUESTERS    # threads; each is a sender, too, after those
    EVERYBODY = 255            # instead of a client's number: a frame for all
    TRANSFER_MOST = 20000      # bytes in sock.recv_data: more than those from which a transfer is received in place
    REPLY_MOST = 3000


# What a TstSocket is to the engine.
cdef struct sock_t:
    uint64_t id
    tst_connection *connection
    int stream
    int client
    int in_handler             # B06
    int connected
    int disconnected
    int forgotten              # the slot has let go
    int closing                # somebody has asked for the close
    int reason                 # errno that ended it
    int sending                # STAT_SEND was returned, `writable` is due
    int asked                  # need_send of the handler's own, writable is due
    int paused
    int wants_compiled
    int in_python              # the handler that runs is not compiled
    int hears_end              # its handler has an on_eof
    int heard_end              # and that was called
    int reconnects             # its handler may put another connection under the descriptor
    uint64_t bytes             # of the client's message that the handler has been given, without framing
    uint32_t messages
    uint64_t handed            # bytes of the client's stream that the handler has been given
    uint64_t in_transfer       # and those after them that lie in a transfer which is not complete
    uint64_t handed_at         # when it was given the last one
    uint32_t sent[SENDERS]     # frames that each sender has queued
    tst_data transfer          # sock.send_data
    int limited                # it was to be sent only if there was room
    tst_data receiving         # sock.recv_data
    uint32_t broadcasts        # frames for all that were queued here
    uint64_t broadcast_sum     # of their numbers


cdef struct client_t:
    int stream                 # -1: it has not connected yet
    int done
    int patient                # 0: resets in the middle; 1: finishes, reads to the end; 2: stays until it is closed
    int finished               # has sent its FIN
    int ended                  # has seen the end, 1, or a reset, -1
    uint32_t messages          # that it sends
    uint32_t written           # of them, whole
    uint64_t offset            # bytes of its stream that are out
    uint64_t until             # does nothing before that
    uint32_t pending           # of the frame at hand
    uint32_t frame_size
    uint64_t read
    uint32_t have              # bytes of the server's frame that is not whole
    uint32_t got[SENDERS]      # frames of each sender
    uint32_t next_broadcast[BROADCASTERS]  # the least number that may come from each
    uint32_t broadcasts
    uint64_t broadcast_sum
    unsigned char frame[FRAME_MOST]
    unsigned char reply[HEAD + REPLY_MOST]


cdef struct world_t:
    tst_engine *engine
    tst_framing framing
    int framed                 # 0: no framing
    tst_compiled compiled
    tst_limits *limits
    int n_clients
    int n_requesters
    int requesters_left
    int workers_left
    int blocking               # rate of handlers that block
    uint64_t siege_begin       # handlers block from here on ...
    uint64_t siege_end         # ... until here
    int siege_spares           # so many workers
    int besieged               # workers that block for that
    int storm                  # signals come all the time
    int passing                # rate of TST_RUN
    int closing                # rate of closes by handlers
    int requests               # of each requester
    int only_sends             # they do nothing else
    int broadcasting
    uint32_t broadcasts[BROADCASTERS]
    int transfers              # handlers ask for so many bytes
    int block_on_overflow
    int reconnecting           # rate of handlers that return TST_RECONNECTED
    int half_open              # each side may finish before the other
    int clients_left
    int waiting                # other threads that wait for room
    int stop_early
    int deadlines
    int broken                 # epoll itself has failed
    uint64_t events_left       # of a shard that has ended
    uint64_t idle_at[WORKERS]  # when its on_idle was called last
    int calm                   # handlers pause no more
    int stopped                # stop() has begun
    uint64_t bytes_outside
    uint64_t litter            # objects that queues hold
    tst_connection *listener
    uint64_t listener_id
    int n_socks
    sock_t socks[SOCKS]
    client_t clients[CLIENTS + SPARES]
    int numbers[8]
    tst_shard *shards

cdef world_t world


# -------------------------------------------------------------------------------------------------- streams

cdef unsigned char letter(int client, uint64_t offset) noexcept nogil:
    """The byte of a client's stream at that place: a letter, so that no delimiter is among them."""
    cdef uint64_t z = (offset + 1) * 0x9e3779b97f4a7c15u + <uint64_t>client * 0xbf58476d1ce4e5b9u
    return <unsigned char>(97 + ((z ^ z >> 29) % 26))


cdef uint32_t body_size(int client, uint32_t message) noexcept nogil:
    cdef uint64_t z = (<uint64_t>message + 7) * 0x94d049bb133111ebu + <uint64_t>client * 0x9e3779b97f4a7c15u
    z ^= z >> 31
    if z % 4 == 0:
        return 1 + <uint32_t>(z >> 8) % BODY_MOST
    return 1 + <uint32_t>(z >> 8) % 20


cdef uint32_t frame_size(int client, uint32_t message) noexcept nogil:
    return body_size(client, message) + (2 if world.framed else 0)


cdef uint32_t make_frame(int client, uint32_t message, unsigned char *frame) noexcept nogil:
    cdef uint32_t size = body_size(client, message), i, n = 0
    if world.framed and world.framing.kind == FRAME_LENGTH:
        frame[0] = <unsigned char>(size >> 8)
        frame[1] = <unsigned char>(size & 255)
        n = 2
    for i in range(size):
        frame[n + i] = letter(client, (<uint64_t>message << 16) + i)
    n += size
    if world.framed and world.framing.kind == FRAME_DELIMITED:
        frame[n] = 13
        frame[n + 1] = 10
        n += 2
    return n


cdef void check_message(sock_t *sock, const char *data, size_t size) noexcept nogil:
    """The handler gets what the client has sent, in order, none twice, none of another's (B01, B17, B27)."""
    if data_requested(&sock.receiving) and (size != sock.receiving.req_len or not data_complete(&sock.receiving)):
        sim_fail("client %d: asked for %zu bytes, the handler gets %zu", sock.client, sock.receiving.req_len, size)
    if not world.framed:
        check_pieces(sock, data, size)
        sock.handed += size
    elif data_requested(&sock.receiving):
        check_frames(sock, data, size)
        sock.handed += size
    else:
        sock.handed += frame_size(sock.client, sock.messages)
        check_body(sock, data, size)


cdef void check_body(sock_t *sock, const char *data, size_t size) noexcept nogil:
    """A message as its framing has cut it."""
    cdef size_t i
    if size != body_size(sock.client, sock.messages):
        sim_fail("client %d: message %u has %zu bytes", sock.client, sock.messages, size)
    for i in range(size):
        if <unsigned char>data[i] != letter(sock.client, (<uint64_t>sock.messages << 16) + i):
            sim_fail("client %d: message %u is wrong at byte %zu", sock.client, sock.messages, i)
    sock.messages += 1


cdef void check_frames(sock_t *sock, const char *data, size_t size) noexcept nogil:
    """A transfer of whole frames, with what is around their messages."""
    cdef unsigned char frame[FRAME_MOST]
    cdef uint32_t whole
    while size:
        whole = make_frame(sock.client, sock.messages, frame)
        if whole > size or memcmp(data, frame, whole):
            sim_fail("client %d: the transfer with message %u is wrong", sock.client, sock.messages)
        sock.messages += 1
        data += whole
        size -= whole


cdef void check_pieces(sock_t *sock, const char *data, size_t size) noexcept nogil:
    """Without framing: any pieces."""
    cdef size_t i
    cdef uint32_t offset
    for i in range(size):
        offset = <uint32_t>sock.bytes
        if <unsigned char>data[i] != letter(sock.client, (<uint64_t>sock.messages << 16) + offset):
            sim_fail("client %d: piece is wrong in message %u at byte %u", sock.client, sock.messages, offset)
        sock.bytes += 1
        if sock.bytes == body_size(sock.client, sock.messages):
            sock.messages += 1
            sock.bytes = 0


# --------------------------------------------------------------------------- what TstSocket does (see _core.pyx)

cdef ssize_t try_append(sock_t *sock, const char *bytes, size_t size, tst_shared *shared) noexcept nogil:
    cdef bint flush = False
    cdef ssize_t result
    spin_lock(&sock.connection.lock)
    result = connection_append(sock.connection, generation_of(sock.id), bytes, size, shared, False, &flush)
    check_bound(sock, result, size)
    if flush:
        shard_ask(sock.connection, generation_of(sock.id), 0)
    return result


cdef void flush_once(sock_t *sock) noexcept nogil:
    cdef tst_stats outside
    memset(&outside, 0, sizeof(outside))
    if connection_flush(sock.connection, generation_of(sock.id), True, True, clock_now(), &outside) < 0:
        shard_ask(sock.connection, generation_of(sock.id), PEND_IN)
    connection_ask_relief(sock.connection, generation_of(sock.id))
    world.bytes_outside += outside.bytes_out


cdef void check_bound(sock_t *sock, ssize_t waits, size_t size) noexcept nogil:
    """Where max_queued waited, nothing more was taken (B34)."""
    cdef uint64_t most = world.engine.limits.max_queued
    if most and waits > <ssize_t>size and <uint64_t>waits - size >= most:
        sim_fail("client %d: %zd bytes wait, %zu of them new, and max_queued is %lu", sock.client, waits, size, most)


cdef bint wait_for_room(sock_t *sock) noexcept nogil:
    """False: it was closed meanwhile."""
    cdef tst_connection *connection = sock.connection
    cdef pollfd watched
    cdef size_t waits
    cdef bint gone, overdue, others, waited = False
    watched.fd = <int><uint32_t>sock.id
    watched.events = POLLOUT
    while True:
        spin_lock(&connection.lock)
        gone = connection.out_closed or not connection_is(connection, generation_of(sock.id))
        overdue = (not gone and connection.want_out and connection.limits.write != 0
                   and connection_is_stuck(connection, load32(&connection.output_tick, RELAXED),
                                           connection.limits.write, clock_now()))
        waits = queue_size(&connection.out)
        others = connection.flushing
        spin_unlock(&connection.lock)
        if overdue and connection_abort(connection, generation_of(sock.id), ETIMEDOUT):
            sock.closing = True
            shard_ask(connection, generation_of(sock.id), PEND_CLOSE)
        if gone or overdue:
            return False
        if waits <= world.engine.limits.high_water and waited:
            return True
        waited = True
        poll(&watched, 1 if waits > world.engine.limits.high_water and not others else 0, 1 if others else 10)
        flush_once(sock)


cdef ssize_t sock_append(sock_t *sock, const char *bytes, size_t size, tst_shared *shared) noexcept nogil:
    cdef ssize_t result = try_append(sock, bytes, size, shared)
    if result == -ENOBUFS:
        flush_once(sock)
        result = try_append(sock, bytes, size, shared)
        if result == -ENOBUFS and sock.connection.limits != NULL and sock.connection.limits.overflow == OVERFLOW_CLOSE:
            sock.closing = True
            if connection_abort(sock.connection, generation_of(sock.id), ENOBUFS):
                shard_ask(sock.connection, generation_of(sock.id), PEND_CLOSE)
            result = -ENOTCONN
    return result


cdef void sock_close(sock_t *sock) noexcept nogil:
    sock.closing = True
    if connection_close_output(sock.connection, generation_of(sock.id)) == 1:
        shard_ask(sock.connection, generation_of(sock.id), PEND_CLOSE)


cdef void sock_send_eof(sock_t *sock) noexcept nogil:
    cdef tst_connection *connection = sock.connection
    if connection_end_output(connection, generation_of(sock.id)) == 1:
        shard_ask(connection, generation_of(sock.id), PEND_IN)


cdef void sock_abort(sock_t *sock) noexcept nogil:
    sock.closing = True
    if connection_abort(sock.connection, generation_of(sock.id), 0):
        shard_ask(sock.connection, generation_of(sock.id), PEND_CLOSE)


cdef void sock_pause(sock_t *sock) noexcept nogil:
    sock.paused = True
    connection_mark(sock.connection, STATE_PAUSED, True, STATE_OPEN, generation_of(sock.id))


cdef void sock_resume(sock_t *sock) noexcept nogil:
    sock.paused = False
    if connection_mark(sock.connection, STATE_PAUSED, False, STATE_OPEN, generation_of(sock.id)):
        shard_ask(sock.connection, generation_of(sock.id), PEND_ARM)


cdef int sock_need_send(sock_t *sock) noexcept nogil:
    cdef bint closed
    spin_lock(&sock.connection.lock)
    closed = sock.connection.out_closed or not connection_is(sock.connection, generation_of(sock.id))
    spin_unlock(&sock.connection.lock)
    if closed or shard_ask(sock.connection, generation_of(sock.id), PEND_OUT) == GONE:
        return -ENOTCONN
    return 0


cdef tst_shared *share_object(const unsigned char *bytes, size_t size) noexcept nogil:
    cdef tst_shared *shared = <tst_shared *>malloc(sizeof(tst_shared))
    cdef void *object
    if shared == NULL:
        return NULL
    object = malloc(size)
    if object == NULL:
        free(shared)
        return NULL
    memcpy(object, bytes, size)
    memset(shared, 0, sizeof(tst_shared))
    shared.users = 1
    shared.object = object
    shared.bytes = <const char *>object
    shared.size = size
    return shared


cdef void drop_litter(tst_shared *shared) noexcept nogil:
    cdef tst_shared *next
    while shared != NULL:
        next = shared.next
        free(shared.object)
        free(shared)
        shared = next


cdef uint32_t make_reply(sock_t *sock, int sender, uint32_t size, unsigned char *frame) noexcept nogil:
    return make_server_frame(sender, sock.client, sock.sent[sender], size, frame)


cdef uint32_t make_server_frame(int sender, int client, uint32_t number, uint32_t size,
                                unsigned char *frame) noexcept nogil:
    """A frame of the server's: who has sent it, its number, whose it is; so that its reader can tell what is wrong."""
    cdef uint32_t i
    frame[0] = <unsigned char>sender
    frame[1] = <unsigned char>client
    memcpy(frame + 2, &number, 4)
    memcpy(frame + 6, &size, 4)
    frame[10] = frame[11] = 0
    for i in range(size):
        frame[HEAD + i] = letter(client + 100 * sender, (<uint64_t>number << 16) + i)
    return HEAD + size


cdef ssize_t send_frame(sock_t *sock, int sender) noexcept nogil:
    """Sends one frame. A sender is never in it twice, so its numbers have no gap unless the socket is closed."""
    cdef unsigned char frame[HEAD + REPLY_MOST]
    cdef uint32_t size = sim_below(sim_below(8) and 40 or REPLY_MOST)
    cdef ssize_t result
    cdef tst_shared *shared
    cdef uint32_t whole = make_reply(sock, sender, size, frame)
    if sim_below(8) == 0:
        shared = share_object(frame, whole)
        if shared == NULL:
            return -ENOMEM
        result = sock_append(sock, shared.bytes, whole, shared)
        if result >= 0:
            sock.sent[sender] += 1
        if sub32(&shared.users, 1, ACQ_REL) == 0:
            shared.next = NULL
            drop_litter(shared)
        return result
    result = sock_append(sock, <const char *>frame, whole, NULL)
    if result >= 0:
        sock.sent[sender] += 1
    return result


cdef ssize_t send_frame_or_wait(sock_t *sock, int sender) noexcept nogil:
    """What send() does in a thread that is no worker: it blocks while there is too much, if it is to."""
    cdef ssize_t result = send_frame(sock, sender)
    cdef bint room = True
    while result == -ENOBUFS and world.block_on_overflow:
        world.waiting += 1
        room = wait_for_room(sock)
        world.waiting -= 1
        result = send_frame(sock, sender) if room else -ENOTCONN
    return result


cdef int snapshot(sock_t **found) noexcept nogil:
    """The sockets of all connections, at some moment each."""
    cdef tst_connection *first = table_chunk(&world.engine.table, 0)
    cdef int i, n = 0
    for i in range(SIM_FIRST_FD, SIM_FIRST_FD + SIM_FILES if first != NULL else 0):
        spin_lock(&first[i].lock)
        if first[i].sock != NULL:
            found[n] = <sock_t *>first[i].sock
            n += 1
        spin_unlock(&first[i].lock)
    return n


cdef bint replace_connection(sock_t *sock) noexcept nogil:
    """What a handler does before it returns TST_RECONNECTED. The peer is a client that was kept for that.

    What another worker sends until the engine knows of it nobody can hold back, so the peer does not hear it. What a
    thread means to send then nobody knows, so threads send nothing to such a socket.
    """
    cdef client_t *client = &world.clients[world.n_clients]
    if world.n_clients == CLIENTS + SPARES or not world.clients_left or world.calm or not sock.in_python:
        return False
    client.stream = wire_replace(sock.connection.fd, 1 + sim_below(2000), 1 + sim_below(2000))
    if client.stream < 0:
        return False
    client.messages = sim_below(12)
    client.patient = 1
    sock.stream = client.stream
    sock.client = world.n_clients
    world.n_clients += 1
    sock.messages = sock.sent[0] = 0
    sock.bytes = sock.handed = 0
    sock.sending = sock.closing = sock.limited = sock.heard_end = False
    return True


cdef void broadcast(int thread) noexcept nogil:
    """One payload that all queues share."""
    cdef unsigned char frame[HEAD + REPLY_MOST]
    cdef sock_t *found[SIM_FILES]
    cdef uint32_t number = world.broadcasts[thread]
    cdef uint32_t size = sim_below(sim_below(8) and 40 or REPLY_MOST)
    cdef tst_shared *shared
    cdef int i, n
    size = make_server_frame(SENDERS + thread, EVERYBODY, number, size, frame)
    shared = shared_new(<char *>frame, size)
    if shared == NULL:
        return
    world.broadcasts[thread] += 1
    n = snapshot(found)
    sim_trace("broadcasts", thread, number, n)
    for i in range(n):
        if not found[i].reconnects and sock_append(found[i], shared.bytes, shared.size, shared) >= 0:
            found[i].broadcasts += 1
            found[i].broadcast_sum += number
    shared_leave(shared, NULL)


# ------------------------------------------------------------------------------------------------- handlers

cdef void may_block() noexcept nogil:
    """A handler blocks, by chance for a while, or in a siege until that is over, if there are workers to spare."""
    if world.siege_begin <= sim_now() < world.siege_end:
        if world.besieged + world.siege_spares < world.engine.n_workers:
            world.besieged += 1
            sim_sleep(world.siege_end - sim_now())
            world.besieged -= 1
    elif sim_chance(<uint32_t>world.blocking):
        sim_sleep((1 + sim_below(40)) * MILLISECOND)


cdef int act(sock_t *sock) noexcept nogil:
    """What a handler does with a message, or when it may write. Returns a TstStat."""
    cdef uint32_t size
    may_block()
    # Both ends at the same time: what one of them asks for must not come back when the connection is another one.
    if sim_chance(<uint32_t>world.closing) or (
            sock.reconnects and world.clients[sock.client].finished and sim_below(4) == 0):
        size = sim_below(3)
        if size == 0:
            sock_close(sock)
        elif size == 1:
            sock_abort(sock)
        else:
            sock.closing = True
            return STAT_DISCONNECT
        return STAT_SUSPEND
    if sock.reconnects and sim_chance(<uint32_t>world.reconnecting) and replace_connection(sock):
        return STAT_RECONNECTED
    size = sim_below(16)
    if size < 9:
        send_frame(sock, 0)
    elif size == 9:
        sock_need_send(sock)
    elif size == 10 and not world.calm:
        sock_pause(sock)
    elif size == 11 and sock.transfer.s_len:
        return send_transfer(sock)
    elif size == 12:
        sock.sending = True
        return STAT_SEND
    elif size == 13 and world.broadcasting:
        broadcast(sock.connection.thread_no)
    return STAT_SUSPEND


cdef int send_transfer(sock_t *sock) noexcept nogil:
    """Fills sock.send_data and has it sent: whatever waits already, or only if there is room. Returns a TstStat."""
    cdef unsigned char frame[HEAD + REPLY_MOST]
    cdef uint32_t at = sim_below(100)
    cdef uint32_t size = make_reply(sock, 0, sim_below(400), frame)
    if sock.connection.out_closed or sock.transfer.s == NULL or sock.transfer.com_len != sock.transfer.req_len:
        return STAT_SUSPEND
    memcpy(sock.transfer.s + at, frame, size)
    if data_request(&sock.transfer, at, size):
        sim_fail("a transfer does not fit")
    sock.sent[0] += 1
    if sim_below(4):
        sock.sending = True
        return STAT_SEND
    sock.limited = True
    return STAT_SUSPEND


cdef void check_sent(sock_t *sock) noexcept nogil:
    """A SEND is done when its last byte has been given to the kernel, and not before; or it came after the close."""
    cdef tst_connection *connection = sock.connection
    spin_lock(&connection.lock)
    if connection.out.sent < connection.send_mark or (
            sock.transfer.com_len != sock.transfer.req_len and not connection.out_closed):
        sim_fail("client %d: the SEND is done, and %zu bytes wait", sock.client, queue_size(&connection.out))
    spin_unlock(&connection.lock)


cdef void ask_transfer(sock_t *sock) noexcept nogil:
    """Says how many bytes the next message has (sock.recv_data.req_len): some, or whole frames; or as it comes."""
    cdef client_t *client = &world.clients[sock.client]
    cdef uint32_t i, size = 0
    if world.framed:
        for i in range(sock.messages, min(sock.messages + sim_below(4), client.messages)):
            size += frame_size(sock.client, i)
    elif sim_below(4):
        size = 1 + sim_below(sim_below(8) and 200 or TRANSFER_MOST)
    if data_request(&sock.receiving, sim_below(TRANSFER_MOST - size + 1), size):
        sim_fail("a transfer does not fit")


cdef void enter(sock_t *sock, const char *hook) noexcept nogil:
    """One worker at a time is in a connection's handlers, between connect and disconnect (B06)."""
    if sock.in_handler:
        sim_fail("client %d: %s while another worker is in its handler", sock.client, hook)
    if not sock.connected or sock.disconnected:
        sim_fail("client %d: %s of a connection that is not connected", sock.client, hook)
    sock.in_handler = True
    sim_progress()
    sim_trace(hook, sock.client, sock.messages, 0)
    sim_point()


cdef int leave(sock_t *sock, int stat) noexcept nogil:
    sim_point()
    sock.in_handler = False
    return stat


cdef int on_received(void *handler, void *place, const char *data, size_t size) noexcept nogil:
    cdef sock_t *sock = <sock_t *>place
    # What takes Python is asked for there only: here, transfers.
    if handler != NULL and (sim_chance(<uint32_t>world.passing) or data_requested(&sock.receiving)):
        return STAT_RUN
    enter(sock, "received")
    sock.in_python = handler == NULL
    if sock.sending and not kernel_stream(sock.stream).reset and not (
            kernel_stream(sock.stream).faulted or sock.connection.out_closed):    # no memory for it, say
        sim_fail("client %d: a message before the SEND was done", sock.client)
    check_message(sock, data, size)
    sock.handed_at = sim_now()
    if handler == NULL and sock.receiving.s_len:
        ask_transfer(sock)
    return leave(sock, act(sock))


cdef int on_writable(void *handler, void *place) noexcept nogil:
    cdef sock_t *sock = <sock_t *>place
    enter(sock, "writable")
    if sock.sending:
        check_sent(sock)
    sock.sending = False
    if sim_below(2):
        send_frame(sock, 0)
    return leave(sock, STAT_SUSPEND)


cdef int on_eof(sock_t *sock) noexcept nogil:
    """The peer has finished, and that is said once, after its last message."""
    enter(sock, "eof")
    if sock.heard_end:
        sim_fail("client %d: on_eof a second time", sock.client)
    sock.heard_end = True
    if not world.clients[sock.client].finished or kernel_stream(sock.stream).in_size or (
            sock.handed + transferred(sock) + sock.connection.input.size != world.clients[sock.client].offset):
        sim_fail("client %d: on_eof before the end of what it has sent", sock.client)
    may_block()
    if sim_below(2):
        send_frame(sock, 0)
    if sim_below(4) == 0:
        sock_send_eof(sock)
    elif sim_below(4) == 0:
        sock.closing = True
        return leave(sock, STAT_DISCONNECT)
    return leave(sock, STAT_SUSPEND)


cdef int on_nothing(void *handler, void *place) noexcept nogil:
    return STAT_SUSPEND


# ---------------------------------------------------------------- the worker: what _core.pyx's Worker and its like do

cdef sock_t *new_socket(tst_connection *connection) noexcept nogil:
    cdef sock_t *sock
    if world.n_socks == SOCKS:
        sim_fail("the simulation has no room for another socket")
    sock = &world.socks[world.n_socks]
    world.n_socks += 1                     # before another thread may run
    sock.id = connection_id(connection)
    sock.connection = connection
    sock.stream = kernel_stream_of(connection.fd)
    for i in range(world.n_clients):
        if world.clients[i].stream == sock.stream:
            sock.client = i
    sock.wants_compiled = sim_below(2)
    sock.hears_end = world.half_open and sim_below(4)
    sock.reconnects = world.reconnecting and sim_below(2)
    spin_lock(&connection.lock)
    connection.sock = <PyObject *>sock
    spin_unlock(&connection.lock)
    return sock


cdef uint64_t transferred(sock_t *sock) noexcept nogil:
    """Bytes in a receiving transfer that is not complete."""
    return 0 if data_complete(&sock.receiving) else sock.receiving.com_len


cdef void forget_socket(tst_connection *connection) noexcept nogil:
    cdef sock_t *sock
    spin_lock(&connection.lock)
    sock = <sock_t *>connection.sock
    connection.sock = NULL
    connection.recv = NULL
    connection.send = NULL
    spin_unlock(&connection.lock)
    if sock == NULL:
        return
    free(sock.transfer.s)
    free(sock.receiving.s)
    sock.in_transfer = transferred(sock)
    sock.receiving.s = sock.transfer.s = NULL
    sock.forgotten = True
    connection.compiled = NULL


cdef void adopt_binding(sock_t *sock) noexcept nogil:
    store32(&sock.connection.rebind, 0, SEQ_CST)
    sock.connection.compiled = &world.compiled if sock.wants_compiled else NULL
    sock.connection.tell_room = not sock.wants_compiled
    sock.connection.hears_end = (sock.connection.hears_end & HEARD_END) | (HEARS_END if sock.hears_end else 0)


cdef void publish(tst_connection *connection, void **place, tst_data *transfer) noexcept nogil:
    spin_lock(&connection.lock)
    store_pointer(place, transfer, RELEASE)
    spin_unlock(&connection.lock)


cdef void connect(tst_worker *worker, sock_t *sock) noexcept nogil:
    cdef tst_connection *connection = sock.connection
    if connection.closing or load32(&world.engine.phase, ACQUIRE) != PHASE_RUNNING:
        connection_begin_close(connection)
        return
    if sock.connected or sock.disconnected:
        sim_fail("client %d is connected twice", sock.client)
    connection.connected = sock.connected = True
    # Whether a transfer was queued before or after another thread's send_eof() nobody knows, so it is one or the other.
    if not world.half_open and sim_below(2):
        sock.transfer.s_len = 512
        sock.transfer.s = <char *>calloc(1, 512)
        if sock.transfer.s != NULL:
            publish(connection, <void **>&connection.send, &sock.transfer)
    if world.transfers and sim_below(2):
        sock.receiving.s_len = TRANSFER_MOST
        publish(connection, <void **>&connection.recv, &sock.receiving)
    enter(sock, "connected")
    if sim_below(4) == 0:
        send_frame(sock, 0)
    may_block()
    leave(sock, 0)
    worker_goes_on(worker)
    worker_job(world.engine, worker, connection, 1)
    if sim_chance(<uint32_t>world.closing):
        sock.connected = connection.connected = False      # refused
        sock.closing = True
        count(&worker.stats.rejected, 1)
        connection_begin_close(connection)
        return
    connection_apply(connection, worker, STAT_SUSPEND)


cdef uint64_t earliest_deadline(sock_t *sock) noexcept nogil:
    """Before that no deadline of the connection can have passed, by what the kernel has seen of it."""
    cdef const tst_limits *limits = sock.connection.limits
    cdef const sim_stream *stream = kernel_stream(sock.stream)
    cdef uint64_t result = stream.sent_at + (<uint64_t>limits.write << TICK_BITS)
    if sock.connection.close_noted:
        result = min(result, stream.sent_at + (<uint64_t>limits.linger << TICK_BITS))
    if stream.received == 0 and not sock.heard_end:
        return min(result, stream.received_at + (<uint64_t>limits.first_byte << TICK_BITS))
    if world.framed or sock.receiving.s_len:
        result = min(result, sock.handed_at + (<uint64_t>limits.message << TICK_BITS))
    return min(result, max(stream.received_at, stream.sent_at) + (<uint64_t>limits.idle << TICK_BITS))


cdef void check_reason(sock_t *sock) noexcept nogil:
    """What has ended the connection was meant for it (B07), and was no deadline that had not come yet (B08)."""
    cdef const sim_stream *stream = kernel_stream(sock.stream)
    cdef int reason = sock.reason
    if reason == 0 or stream.faulted or stream.reset or (reason == ENOMEM and kernel_tally().no_memory):
        return
    if reason == ECONNABORTED and load32(&(<tst_shard *>sock.connection.shard).aborted, RELAXED):
        return                 # stop() has cut it off
    if not (reason == ETIMEDOUT and world.deadlines) and not (
            reason == ENOBUFS and (sock.closing or sock.limited)):
        sim_fail("client %d: its connection ends with errno %d, and nothing has happened to it", sock.client, reason)
    # A tick is 4 ms, and which one it is is known once a turn: handlers that block make turns long.
    if reason == ETIMEDOUT and not world.blocking and not world.siege_end and (
            sim_now() + (2 << TICK_BITS) < earliest_deadline(sock)):
        sim_fail("client %d: its deadline is %lu us too early", sock.client,
                 (earliest_deadline(sock) - sim_now()) // 1000)


cdef bint disconnect(tst_worker *worker, sock_t *sock) noexcept nogil:
    """False: the handler has reconnected it."""
    cdef bint replaced
    sock.reason = sock.connection.reason
    check_reason(sock)
    if sock.connection.connected:
        if not sock.connected or sock.disconnected:
            sim_fail("client %d is disconnected without having been connected, or twice", sock.client)
        enter(sock, "disconnected")
        sock.disconnected = True
        may_block()
        sock.in_python = True
        replaced = sock.reconnects and sim_below(2) and replace_connection(sock)
        leave(sock, 0)
        worker_goes_on(worker)
        if replaced and load32(&world.engine.phase, ACQUIRE) == PHASE_RUNNING:
            sock.disconnected = False
            connection_reconnect(sock.connection)
            kernel_stream(sock.stream).deaf = False
            return False
        sock.closing |= replaced
    forget_socket(sock.connection)
    return True


cdef void expect_message(tst_worker *worker, sock_t *sock) noexcept nogil:
    """As if messages were large and had been of one size so far: an object for the next one, which may have another."""
    cdef tst_connection *connection = sock.connection
    cdef uint32_t size = body_size(sock.client, sock.messages + (1 if sim_chance(300) else 0))
    cdef tst_shared *spare
    drop_spares(worker)
    connection.expects = 0
    if not world.framed or world.framing.kind != FRAME_LENGTH or sim_chance(300):
        return
    spare = <tst_shared *>malloc(sizeof(tst_shared) + SPARE_FRONT + size + 1)
    if spare == NULL:
        return
    memset(spare, 0, sizeof(tst_shared))
    spare.users = 1
    spare.front = SPARE_FRONT
    spare.bytes = <const char *>(spare + 1) + SPARE_FRONT
    spare.size = size
    worker.spares = spare
    worker.spares_left = 1
    connection.expects = size


cdef void drop_spares(tst_worker *worker) noexcept nogil:
    free(worker.spares)
    worker.spares = NULL
    worker.spares_left = 0


cdef void read_messages(tst_worker *worker, sock_t *sock) noexcept nogil:
    cdef tst_connection *connection = sock.connection
    cdef const char *bytes = NULL
    cdef char *copy
    cdef size_t size
    cdef uint64_t n = 0
    cdef int stat
    cdef bint transfer
    while connection_cut(connection):
        if load32(&connection.rebind, RELAXED) and connection.body == NULL:
            adopt_binding(sock)
        if connection.compiled != NULL and not connection.passed_on & PASSED_MESSAGE:
            if not run_messages(world.engine, worker, connection):
                break
        connection.passed_on &= PASSED_WRITABLE
        size = message_at_hand(connection, &bytes)
        if connection.body != NULL:
            bytes = connection.body.bytes
            size = connection.body.size
        copy = <char *>malloc(size + 1)
        if copy == NULL:
            connection_begin_close(connection)
            return
        memcpy(copy, bytes, size)
        transfer = not connection.framed and connection_awaits_transfer(connection)
        connection.message_ready = False
        if connection.framed:
            if connection.body != NULL:
                connection_drop_body(connection)
            else:
                input_consume(&connection.input, connection.frame.whole)
            connection.framed = False
            connection.frame.begin = connection.frame.size = connection.frame.whole = connection.frame.needed = 0
        elif not transfer:
            input_consume(&connection.input, size)
        stat = on_received(NULL, sock, copy, size)
        worker_goes_on(worker)
        worker_job(world.engine, worker, connection, 1)
        free(copy)
        connection_apply(connection, worker, stat)
        kernel_stream(sock.stream).deaf = False
        expect_message(worker, sock)
        n += 1
        if n % 4 == 0:
            break
    count(&worker.stats.messages, n)


cdef void eof(tst_worker *worker, sock_t *sock) noexcept nogil:
    cdef tst_connection *connection = sock.connection
    connection_drop_body(connection)
    if load32(&connection.rebind, RELAXED):
        adopt_binding(sock)
    if not sock.hears_end:
        connection.hears_end = 0
        return
    connection.hears_end |= HEARD_END
    connection_apply(connection, worker, on_eof(sock))
    worker_goes_on(worker)
    worker_job(world.engine, worker, connection, 1)


cdef void run_entry(tst_worker *worker, tst_entry *entry) noexcept nogil:
    cdef tst_connection *connection = entry.connection
    cdef sock_t *sock
    cdef uint32_t due = entry.what
    store32(<uint32_t *>&connection.thread_no, <uint32_t>worker.no, RELAXED)
    worker.current = connection
    sock = <sock_t *>connection.sock if connection.sock != NULL else new_socket(connection)
    if sock.id != connection_id(connection):
        sim_fail("an entry has another connection's socket")
    if due & DO_CONNECT:
        adopt_binding(sock)
        connect(worker, sock)
    connection.report = 0
    if due & DO_WRITABLE and not connection.closing:
        connection.passed_on &= PASSED_MESSAGE
        on_writable(NULL, sock)
        worker_goes_on(worker)
        worker_job(world.engine, worker, connection, 1)
        connection_apply(connection, worker, STAT_SUSPEND)
    if not due & DO_CONNECT:
        read_messages(worker, sock)
        due = connection_due(connection)
        if due & DO_EOF:
            eof(worker, sock)
            due = connection_due(connection)
    elif connection.closing:
        due = connection_due(connection)
    if due & DO_DISCONNECT and disconnect(worker, sock):
        entry.what = DO_RETIRE
    else:
        connection_keep_input(connection)


cdef bint run_one(tst_worker *worker, tst_shard *shard, tst_entry *entry) noexcept nogil:
    if not entry_move(entry, ENTRY_QUEUED, ENTRY_RUNNING):
        return False
    if not token_held(shard, worker.no):
        connection_mark(entry.connection, STATE_DETACHED, True, STATE_OWNED, entry.generation)
    worker_enter(worker)
    run_entry(worker, entry)
    worker_leave(worker)
    worker.current = NULL
    store32(&entry.state, ENTRY_RAN, RELEASE)
    return True


cdef void run_batch(tst_worker *worker, tst_shard *shard, tst_batch *batch) noexcept nogil:
    cdef int i
    cdef tst_entry *left = worker.left
    cdef uint64_t flushed = tick_now(&worker.ticks)
    worker.clock = flushed
    if left != NULL:
        worker.left = NULL
        run_one(worker, shard, left)
        if not token_held(shard, worker.no):
            return
    for i in range(batch.n_entries):
        if not run_one(worker, shard, &batch.entries[i]):
            continue
        if not token_held(shard, worker.no):
            return
        if worker.clock - flushed >= RUN_TIME:
            batch_finish(worker, batch, worker.clock)
            worker.clock = flushed = tick_now(&worker.ticks)


cdef tst_batch *resume(tst_worker *worker, tst_shard *shard) noexcept nogil:
    cdef tst_batch *stuck = shard.batch
    cdef tst_batch *own
    cdef bint kept
    sim_trace("takes over", shard.no, worker.no, 0)
    add32(&stuck.users, 1, ACQUIRE)
    batch_detach(stuck, &worker.stats)
    batch_finish(worker, stuck, clock_now())
    run_batch(worker, shard, stuck)
    batch_finish(worker, stuck, clock_now())
    kept = shard_leave_running(worker, shard)
    if not kept:
        batch_leave(world.engine, stuck, 1)
        return NULL
    own = batch_get(world.engine)
    while own == NULL:
        sim_sleep(10 * MILLISECOND)
        own = batch_get(world.engine)
    own.n_events = stuck.n_events - stuck.next_event
    memcpy(own.events, stuck.events + stuck.next_event, <size_t>own.n_events * sizeof(own.events[0]))
    batch_leave(world.engine, stuck, 2)
    return own


cdef void idle(tst_worker *worker, tst_shard *shard) noexcept nogil:
    if sim_now() - world.idle_at[worker.no] < world.engine.idle_time:
        sim_fail("worker %d: on_idle after %lu us", worker.no, (sim_now() - world.idle_at[worker.no]) // 1000)   # B08
    world.idle_at[worker.no] = sim_now()
    if shard != NULL:
        shard_enter_running(world.engine, worker, shard)
    worker_enter(worker)
    may_block()
    worker_leave(worker)


cdef tst_shard *serve(tst_worker *worker, tst_shard *shard, bint *taken_over) noexcept nogil:
    cdef tst_engine *engine = world.engine
    cdef tst_batch *batch
    cdef tst_shard *other = NULL
    cdef int turn
    cdef bint ran = False
    batch = resume(worker, shard) if taken_over[0] else batch_get(engine)
    if batch == NULL:
        if not taken_over[0]:
            sim_sleep(10 * MILLISECOND)
            shard_yield(engine, worker, shard)
        return NULL
    taken_over[0] = False
    worker.since = clock_now()
    shard.batch = batch
    while True:
        turn = shard_turn(engine, worker, shard, batch, ran)
        ran = False
        if turn == TURN_RUN:
            if stock_has_litter(&shard.stock):
                drop_litter(stock_take_litter(&shard.stock))
            run_batch(worker, shard, batch)
            worker.accept_errno = 0
            ran = True
        elif turn == TURN_LOST:
            batch_leave(engine, batch, 1)
            return NULL
        elif turn == TURN_ENDED:
            world.events_left += <uint64_t>(batch.n_events - batch.next_event)
            shard.batch = NULL
            batch_leave(engine, batch, 2)
            engine_shard_ended(engine, shard)
            return NULL
        elif turn == TURN_ELSEWHERE:
            other = engine_look(engine, worker)
            if other == NULL and not turn_elsewhere(engine, shard) & ELSEWHERE_FREE:
                continue
            taken_over[0] = other != NULL
            shard.batch = NULL
            batch_leave(engine, batch, 2)
            shard_yield(engine, worker, shard)
            return other
        elif turn == TURN_IDLE:
            idle(worker, shard)
            ran = True
        elif turn == TURN_COMPLAIN:
            worker.accept_errno = 0
        elif turn == TURN_LITTER:
            drop_litter(stock_take_litter(&shard.stock))
        else:
            check_broken(-turn)
            world.broken = True            # B09
            begin_stop(0)


cdef void check_broken(int reason) noexcept nogil:
    """Nothing ends the pool but epoll_wait that fails, and not by a signal (B08, B09), or no memory for any input."""
    if not (reason == EBADF and kernel_tally().wait_errors) and not (reason == ENOMEM and kernel_tally().no_memory):
        sim_fail("errno %d ends the pool", reason)


cdef void worker_main(void *argument) noexcept nogil:
    cdef tst_worker *worker = &world.engine.workers[(<int *>argument)[0]]
    cdef tst_shard *shard = NULL
    cdef bint taken_over = False
    cdef int parked
    worker.tid = gettid()
    world.idle_at[worker.no] = sim_now()
    while True:
        parked = engine_park(world.engine, worker, &shard, &taken_over)
        if parked == PARK_END:
            drop_spares(worker)
            break
        if parked == PARK_IDLE:
            idle(worker, NULL)
            shard = NULL
        while shard != NULL:
            shard = serve(worker, shard, &taken_over)
    world.workers_left -= 1
    sim_wake(&world.workers_left, 1)


# ------------------------------------------------------------------------------- the pool: what TstPool does

cdef void begin_stop(uint64_t drain) noexcept nogil:
    cdef uint64_t until = clock_now() + drain
    cdef int i
    world.stopped = True
    if load32(&world.engine.phase, ACQUIRE) == PHASE_RUNNING or until < load64(&world.engine.drain_until, ACQUIRE):
        store64(&world.engine.drain_until, until, RELEASE)
    if load32(&world.engine.phase, ACQUIRE) == PHASE_RUNNING:
        store32(&world.engine.phase, PHASE_DRAINING, SEQ_CST)
    for i in range(world.engine.n_shards):
        sys_wake(world.engine.shards[i].event_fd)


cdef void close_down() noexcept nogil:
    """Nobody works any more. All connections must be gone by now."""
    cdef int i
    cdef tst_connection *first = table_chunk(&world.engine.table, 0)
    for i in range(TABLE_CHUNK if first != NULL else 0):
        if load64(&first[i].state, ACQUIRE) & STATE_OPEN:
            sim_fail("descriptor %d is still open after the stop", i)
    for i in range(world.engine.n_shards):
        if load32(&world.engine.shards[i].open, ACQUIRE):
            sim_fail("shard %d counts %u open connections after the stop", i, world.engine.shards[i].open)
        drop_litter(stock_take_litter(&world.engine.shards[i].stock))
        close(world.engine.shards[i].epoll_fd)
        close(world.engine.shards[i].event_fd)
        close(world.engine.shards[i].timer_fd)


cdef void free_memory() noexcept nogil:
    cdef tst_engine *engine = world.engine
    cdef tst_batch *batch
    cdef int i
    free(engine.limits)
    while engine.batches != NULL:
        batch = engine.batches
        engine.batches = batch.next
        scratch_leave(batch.scratch)
        free(batch)
    free(engine.table.chunks[0])
    for i in range(engine.n_shards):
        stock_free(&engine.shards[i].stock)
    free(engine.shards)
    free(engine.workers)
    free(engine)


cdef void open_pool(int n_workers, int n_shards) noexcept nogil:
    cdef tst_engine *engine = <tst_engine *>calloc(1, sizeof(tst_engine))
    cdef tst_shard *shard
    cdef int i
    world.engine = engine
    engine.watcher = -1
    engine.n_workers = n_workers
    engine.n_shards = n_shards
    engine.workers = <tst_worker *>calloc(n_workers, sizeof(tst_worker))
    engine.shards = <tst_shard *>calloc(n_shards, sizeof(tst_shard))
    engine.slow_handler = 100 * MILLISECOND
    engine.idle_time = 50 * MILLISECOND
    engine.accepts_per_turn = 1 + sim_below(16)
    engine.accept_pause = 100 * MILLISECOND
    engine.receive_size = 262144
    for i in range(n_workers):
        engine.workers[i].no = i
        engine.workers[i].group = engine.workers[i].group_most = 1
        engine.workers[i].burst = 32
    for i in range(n_shards):
        shard = &engine.shards[i]
        shard.no = i
        shard.epoll_fd = epoll_create1(0)
        shard.event_fd = eventfd(0, 0)
        shard.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.event_fd, EPOLLIN, 0)
        sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.timer_fd, EPOLLIN, ID_ALARM)
        shard.wheel.tick = tick_of(clock_now())
    engine.phase = PHASE_RUNNING


cdef void listen() noexcept nogil:
    cdef uint64_t id = 0
    cdef int fd = kernel_listener()
    cdef tst_connection *connection = table_open(&world.engine.table, fd, STATE_QUEUED | PEND_CONNECT, &id)
    connection_settle_in(connection, world.engine, &world.engine.shards[0], TYPE_LISTEN)
    connection.framing = &world.framing if world.framed else NULL
    connection.limits = world.engine.limits
    add32(&world.engine.n_listeners, 1, RELAXED)
    world.listener = connection
    world.listener_id = id
    shard_push(&world.engine.shards[0], connection)


# ------------------------------------------------------------------------------------------- other threads

cdef sock_t *socket_of(int fd) noexcept nogil:
    """The one whose descriptor that is now; any, if there is none."""
    cdef int i
    for i in range(world.n_socks if fd >= 0 else 0):
        if world.socks[i].connection != NULL and not world.socks[i].forgotten and world.socks[i].connection.fd == fd:
            return &world.socks[i]
    return &world.socks[sim_below(<uint32_t>world.n_socks)]


cdef void requester_main(void *argument) noexcept nogil:
    """A thread that is no worker: it sends, closes and so on, by any handle that it ever had, stale ones too."""
    cdef int no = (<int *>argument)[0]
    cdef int _n, kind, sending
    cdef sock_t *sock
    cdef bint gone
    cdef ssize_t result
    for _n in range(world.requests):
        sending = kernel_await_send((1 + sim_below(2000)) * MILLISECOND // 100)
        if world.n_socks == 0:
            continue
        sock = socket_of(sending)
        if sock.connection == NULL:        # another thread is making it
            continue
        gone = sock.forgotten
        result = 0
        kind = 0 if world.only_sends else <int>sim_below(18 if world.broadcasting else 16)
        sim_progress()
        sim_trace("requests", sock.client, kind, 0)
        if sock.reconnects and (kind < 7 or kind in (14, 15)):
            continue
        if kind < 7:
            result = send_frame_or_wait(sock, no)
            if gone and result != -ENOTCONN and result != -ENOMEM:
                sim_fail("client %d: a stale handle sends: %zd", sock.client, result)      # B02
        elif kind == 7:
            result = sock_need_send(sock)
            if gone and result != -ENOTCONN:
                sim_fail("client %d: need_send by a stale handle", sock.client)
        elif kind == 8:
            sock_pause(sock)
        elif kind < 12:
            sock_resume(sock)
        elif kind == 12:
            flush_once(sock)
        elif kind == 13:
            sock.wants_compiled = sim_below(2)
            spin_lock(&sock.connection.lock)
            if connection_is(sock.connection, generation_of(sock.id)):
                store32(&sock.connection.rebind, 1, RELEASE)
            spin_unlock(&sock.connection.lock)
        elif world.half_open and kind == 15 and not sock.reconnects:
            sock_send_eof(sock)
        elif kind >= 16:
            broadcast(WORKERS + no - 1)
        elif sim_chance(<uint32_t>world.closing * 4):
            if kind == 14:
                sock_close(sock)
            else:
                sock_abort(sock)
    world.requesters_left -= 1


# ------------------------------------------------------------------------------------------------- clients

cdef void check_reply(int no, client_t *client) noexcept nogil:
    """Takes whole frames from what the client has read: each sender's in order, none torn, none of another's."""
    cdef uint32_t number = 0, size = 0, i
    cdef int sender, whose
    while client.have >= HEAD:
        memcpy(&number, client.reply + 2, 4)
        memcpy(&size, client.reply + 6, 4)
        sender = client.reply[0]
        whose = no if sender < SENDERS else EVERYBODY
        if sender >= SENDERS + BROADCASTERS or client.reply[1] != whose or size > REPLY_MOST:
            sim_fail("client %d gets what is no frame, or not its own", no)
        if number != client.got[sender] if sender < SENDERS else number < client.next_broadcast[sender - SENDERS]:
            sim_fail("client %d gets number %u of sender %d, too early or too late", no, number, sender)
        if client.have < HEAD + size:
            return
        for i in range(size):
            if client.reply[HEAD + i] != letter(whose + 100 * sender, (<uint64_t>number << 16) + i):
                sim_fail("client %d gets a wrong byte", no)
        if sender < SENDERS:
            client.got[sender] += 1
        else:                              # who had too much waiting, or was not there, does not get all
            client.next_broadcast[sender - SENDERS] = number + 1
            client.broadcasts += 1
            client.broadcast_sum += number
        client.have -= HEAD + size
        for i in range(client.have):
            client.reply[i] = client.reply[HEAD + size + i]


cdef bint client_reads(int no, client_t *client) noexcept nogil:
    cdef int n
    if client.ended:                       # the server has finished first
        return False
    if world.half_open and client.finished and client.patient == 0 and sim_below(16) == 0:
        client.done = True
        wire_reset(client.stream)
        return True
    n = wire_read(client.stream, client.reply + client.have, 1 + sim_below(HEAD + REPLY_MOST - client.have))
    if n == -2:
        return False
    if n <= 0:
        client.ended = 1 if n == 0 else -1
        client.done = not world.half_open or n < 0 or client.finished or client.patient != 1
        if client.done and not client.finished:
            client.finished = True
            wire_fin(client.stream)
        if n == 0 and client.have:
            sim_fail("client %d sees the end in the middle of a frame", no)
        return True
    client.have += <uint32_t>n
    check_reply(no, client)
    return True


cdef bint client_writes(int no, client_t *client) noexcept nogil:
    cdef int n
    cdef uint32_t piece
    if client.finished:
        return False
    if client.pending == 0:
        if client.written == client.messages:
            if client.patient == 2:
                return False
            client.finished = True
            client.done = client.ended != 0
            wire_fin(client.stream)
            return True
        client.pending = client.frame_size = make_frame(no, client.written, client.frame)
    if client.patient == 0 and sim_below(16) == 0:
        client.done = client.finished = True
        wire_reset(client.stream)
        return True
    piece = client.pending if sim_below(2) else 1 + sim_below(client.pending)
    n = wire_write(client.stream, client.frame + client.frame_size - client.pending, piece)
    if n < 0:
        client.finished = True             # the reset is seen when it reads
        client.done = client.ended != 0
        return True
    client.pending -= <uint32_t>n
    client.offset += <uint64_t>n
    if n and client.pending == 0:
        client.written += 1
    return n > 0


cdef bint client_acts(int no) noexcept nogil:
    """One step of a client. False: there is nothing that it can do now."""
    cdef client_t *client = &world.clients[no]
    cdef uint32_t least
    if client.done or client.until > sim_now():
        return False
    if client.stream < 0:
        least = 40 if client.messages > 100 or world.requests > 20 else 1      # or it would take a million steps
        client.stream = wire_connect(least + sim_below(sim_below(2) and 60 or 2000),
                                     least + sim_below(sim_below(2) and 60 or 2000))
        if client.stream < 0:
            client.done = True
        return True
    if sim_below(64) == 0:
        client.until = sim_now() + (1 + sim_below(80)) * MILLISECOND
        return True
    if sim_below(2):
        return client_writes(no, client) or client_reads(no, client)
    return client_reads(no, client) or client_writes(no, client)


cdef void clients_main(void *argument) noexcept nogil:
    cdef int i, first
    cdef uint64_t until
    cdef bint acted, left
    while True:
        acted = left = False
        until = 0
        first = <int>sim_below(<uint32_t>world.n_clients)
        for i in range(world.n_clients):
            acted |= client_acts((first + i) % world.n_clients)
            if not world.clients[(first + i) % world.n_clients].done:
                left = True
        for i in range(world.n_clients):
            if not world.clients[i].done and world.clients[i].until > sim_now() and (
                    until == 0 or world.clients[i].until < until):
                until = world.clients[i].until
        if not left:
            world.clients_left = False
            return
        if acted:
            sim_sleep(1 + sim_below(3) * 20000)
        else:
            sim_block(kernel_wire(), until)


# ------------------------------------------------------------------------------------------ the end of a seed

cdef bint ended_well(sock_t *sock) noexcept nogil:
    """Nothing has happened to the connection but what its client and its handler wanted."""
    cdef sim_stream *stream = kernel_stream(sock.stream)
    if world.deadlines and stream.linger_off:      # it was too slow a reader for a connection that was closing
        return False
    return not (stream.faulted or sock.reason or world.broken or kernel_tally().no_memory or world.stop_early)


cdef void check_rest() noexcept nogil:
    """The world has come to rest: whoever has something to be done must be being served (B04, B05, B11)."""
    cdef int i
    cdef sock_t *sock
    cdef tst_connection *connection
    cdef sim_stream *stream
    cdef client_t *client
    if world.waiting:
        sim_fail("at rest, %d threads wait for room", world.waiting)
    if kernel_backlog() and not world.engine.max_connections:
        sim_fail("at rest, %d clients wait to be accepted", kernel_backlog())
    for i in range(world.n_socks):
        sock = &world.socks[i]
        connection = sock.connection
        stream = kernel_stream(sock.stream)
        client = &world.clients[sock.client]
        if sock.forgotten:
            continue
        if stream.refused:                 # B07
            sim_fail("at rest, epoll has refused the connection of client %d, and it is open", sock.client)
        if client.done:
            sim_fail("at rest, client %d is gone and its connection is not", sock.client)
        if stream.in_size or stream.fin or stream.reset:
            sim_fail("at rest, client %d has sent %u bytes that nobody reads", sock.client, stream.in_size)
        if queue_size(&connection.out):
            sim_fail("at rest, output waits for client %d, who reads", sock.client)
        if sock.closing:
            sim_fail("at rest, the connection of client %d is closing", sock.client)
        if connection.out_ended and not stream.shut:
            sim_fail("at rest, client %d has not been told that nothing more comes", sock.client)
        if sock.sending:
            sim_fail("at rest, the handler of client %d has not heard of its SEND", sock.client)
        if connection.message_ready or (
                sock.handed + transferred(sock) + connection.input.size != client.offset) or (
                world.framed and not data_requested(&sock.receiving) and sock.messages != client.written):
            sim_fail("at rest, the handler of client %d has had %u of %u messages", sock.client, sock.messages,
                     client.written)


cdef void check_quiet() noexcept nogil:
    """All threads sleep: whatever nobody owns must be somebody's to go on with. Output waits for room in the kernel, or
    for whoever takes the connection from the stack; each deadline has a timer."""
    cdef int i
    cdef uint64_t word
    cdef sock_t *sock
    cdef tst_connection *connection
    cdef uint32_t due = 0
    if world.stopped or world.broken:
        return
    for i in range(world.n_socks):
        sock = &world.socks[i]
        connection = sock.connection
        if sock.forgotten or connection == NULL or not connection_is(connection, generation_of(sock.id)):
            continue
        word = load64(&connection.state, RELAXED)
        if word & (STATE_QUEUED | PEND_ANY) or (word & STATE_OWNED and not word & STATE_DETACHED):
            continue                       # somebody will look at it
        if queue_size(&connection.out) and not connection.want_out and not connection.flushing:
            sim_fail("all sleep, and nobody is to send %lu bytes to client %d", queue_size(&connection.out),
                     sock.client)
        if word & STATE_OWNED:
            continue
        if connection.has_timer and connection.timer_slot == NO_TIMER:
            sim_fail("all sleep, and the timer of client %d is nowhere", sock.client)
        if not connection.has_timer and connection_deadline(
                connection, connection.want_out, connection_wants_input(connection), &due) != DEADLINE_NONE:
            sim_fail("all sleep, and client %d has a deadline without a timer", sock.client)


cdef void check_end() noexcept nogil:
    cdef int i, j
    cdef sock_t *sock
    cdef client_t *client
    cdef uint64_t accepted = 0, closed = 0, sent = world.bytes_outside, received = 0, stale = world.events_left
    cdef const sim_tally *tally = kernel_tally()
    for i in range(world.n_socks):
        sock = &world.socks[i]
        client = &world.clients[sock.client]
        if not sock.forgotten:
            sim_fail("client %d: its socket was never let go", sock.client)
        if sock.connected and not sock.disconnected:
            sim_fail("client %d: it was connected and never disconnected", sock.client)
        if not ended_well(sock) or sock.closing or client.patient != 1:
            continue
        if (sock.messages != client.messages and not sock.in_transfer) or (
                sock.handed + sock.in_transfer != client.offset):
            sim_fail("client %d: the handler has had %u of %u messages", sock.client, sock.messages, client.messages)
        if client.ended != 1:
            sim_fail("client %d: it has seen a reset", sock.client)
        if sock.hears_end and sock.connected and not sock.heard_end:
            sim_fail("client %d: its handler has not heard that it has finished", sock.client)
        for j in range(SENDERS):
            if client.got[j] != sock.sent[j]:
                sim_fail("client %d: it has %u of %u frames of sender %d", sock.client, client.got[j], sock.sent[j], j)
        if client.broadcasts != sock.broadcasts or client.broadcast_sum != sock.broadcast_sum:
            sim_fail("client %d: it has %u of %u frames for all", sock.client, client.broadcasts, sock.broadcasts)
    for i in range(world.engine.n_workers):
        accepted += world.engine.workers[i].stats.accepted
        closed += world.engine.workers[i].stats.closed
        sent += world.engine.workers[i].stats.bytes_out
        received += world.engine.workers[i].stats.bytes_in
        stale += world.engine.workers[i].stats.stale_gone + world.engine.workers[i].stats.stale_reused
    if accepted != closed:
        sim_fail("%lu were accepted, %lu closed", accepted, closed)
    if sent != tally.bytes_sent:
        sim_fail("%lu bytes were counted, %lu sent", sent, tally.bytes_sent)
    if received > tally.bytes_received:
        sim_fail("%lu bytes were counted, %lu received", received, tally.bytes_received)
    if stale < tally.stale:                # B10
        sim_fail("%lu events of nobody came, %lu were counted", tally.stale, stale)
    if world.engine.total.queued:
        sim_fail("%lu bytes are counted as waiting", world.engine.total.queued)
    if tally.accepts != tally.closes:
        sim_fail("%lu descriptors were accepted, %lu closed", tally.accepts, tally.closes)


cdef void signals_main(void *argument) noexcept nogil:
    """A storm of signals (B08). It ends before the last look: what a signal has lost the next one could bring back."""
    while world.workers_left and not world.calm:
        sim_sleep((1 + sim_below(4000)) * MILLISECOND // 1000)
        kernel_interrupt()


cdef bint end_half_open() noexcept nogil:
    """Ends the output of those that their handler has kept open. False: there are none."""
    cdef int i
    cdef bint found = False
    for i in range(world.n_socks):
        if world.socks[i].heard_end and not world.socks[i].forgotten and not world.socks[i].connection.out_closed:
            if kernel_stream(world.socks[i].stream).reset:
                sim_fail("at rest, client %d has gone, and nobody has noticed", world.socks[i].client)
            sock_send_eof(&world.socks[i])
            found = True
    return found


cdef void director_main(void *argument) noexcept nogil:
    """Lets the traffic come to rest, looks, and stops the pool."""
    cdef int i
    cdef uint64_t drain = 0
    if world.stop_early:
        sim_sleep(sim_below(60) * MILLISECOND)
        drain = sim_below(200) * MILLISECOND
    else:
        sim_wait_for_rest()
        kernel_calm()
        world.calm = True
        for i in range(world.n_socks):
            if world.socks[i].paused:
                sock_resume(&world.socks[i])
        sim_wait_for_rest()
        while end_half_open():             # then others are accepted, perhaps
            sim_wait_for_rest()
        if not world.stopped:
            check_rest()
        drain = 500 * MILLISECOND
    begin_stop(drain)
    drain = sim_now() + drain + 3000 * MILLISECOND
    while world.workers_left:
        if not sim_block(&world.workers_left, drain) and sim_now() >= drain:
            sim_fail("after stop(), %d workers are left", world.workers_left)
    while world.requesters_left:
        sim_sleep(10 * MILLISECOND)
    close_down()
    sim_wake(kernel_wire(), 1)


cdef uint32_t rate(uint32_t most) noexcept nogil:
    """A kind of fault is off in most seeds, so that each meets few of them at a time, often."""
    return 1 + sim_below(most) if sim_below(3) == 0 else 0


cdef void choose_faults(sim_faults *faults) noexcept nogil:
    memset(faults, 0, sizeof(sim_faults))
    faults.recv_short = rate(800)
    faults.recv_eintr = rate(300)
    faults.recv_eagain = rate(300)
    faults.send_short = rate(800)
    faults.send_eintr = rate(300)
    faults.send_eagain = rate(300)
    faults.accept_eintr = rate(300)
    faults.wait_eintr = rate(200)
    faults.wait_few = rate(900)
    faults.wait_stale = rate(100)
    faults.wait_twice = rate(100)
    faults.spurious_wakeup = rate(200)
    faults.weak = rate(200)
    if sim_below(4) == 0:
        faults.recv_error = rate(20)
        faults.send_error = rate(20)
        faults.accept_error = rate(200)
        faults.accept_full = rate(100)
        faults.control_error = rate(40)
    if sim_below(16) == 0:
        faults.no_memory = rate(20)
    if sim_below(32) == 0:
        faults.wait_error = 1 + sim_below(4)


cdef tst_limits *choose_limits() noexcept nogil:
    cdef tst_limits *limits = <tst_limits *>calloc(1, sizeof(tst_limits))
    limits.total = &world.engine.total
    limits.high_water = 1 + sim_below(sim_below(2) and 500 or 20000)
    limits.low_water = sim_below(<uint32_t>limits.high_water)
    limits.max_queued = 0 if sim_below(2) else limits.high_water + sim_below(4000)
    limits.overflow = <uint8_t>sim_below(2)
    limits.auto_pause = <uint8_t>sim_below(2)
    limits.linger = 500
    if world.block_on_overflow:
        limits.overflow = OVERFLOW_REFUSE
        limits.max_queued = limits.high_water + sim_below(1000)
    if world.deadlines:
        limits.first_byte = 10 + sim_below(100)
        limits.message = 10 + sim_below(100)
        limits.idle = 10 + sim_below(100)
        limits.write = 10 + sim_below(100)
        limits.linger = 10 + sim_below(100)
        if sim_below(4) == 0:
            limits.write = 0
    return limits


cdef void show_sockets() noexcept nogil:
    """What a trace does not show: the flags of those who are left."""
    cdef int i
    cdef tst_connection *connection
    for i in range(world.n_socks):
        connection = world.socks[i].connection
        if world.socks[i].forgotten or connection == NULL:
            continue
        fprintf(stderr, "client %d: descriptor %d, state %x, end_of_input %d, hold_input %d, closing %d, lingering %d, "
                "message_ready %d, readable %d, call_writable %d, ask_writable %d, pressure %u, input %zu, output %zu, "
                "out_error %u, want_out %d\n", world.socks[i].client, connection.fd, <uint32_t>connection.state,
                connection.end_of_input, connection.hold_input, connection.closing, connection.lingering,
                connection.message_ready, connection.readable, connection.call_writable, connection.ask_writable,
                connection.pressure, connection.input.size, queue_size(&connection.out), connection.out_error,
                connection.want_out)


cdef void narrow(uint64_t seed, sim_faults *faults) noexcept nogil:
    """Three of eight seeds make one thing frequent that is rare by chance, or not there at all. The others' draws stay
    what they were."""
    cdef int i
    world.half_open = seed % 8 == 3
    if seed % 8 == 5:
        # The last word is another thread's: clients that stay and hear, and hardly anything else that wakes a worker.
        world.requests = 40 + <int>sim_below(80)
        world.n_requesters = REQUESTERS
        world.only_sends = True
        world.closing = 0
        for i in range(world.n_clients):
            world.clients[i].patient = 2
    elif seed % 8 == 6:
        faults.no_memory = 20 + sim_below(80)      # scarce, but little else fails
        faults.control_error = faults.wait_error = faults.recv_error = faults.send_error = 0


cdef void add_trouble() noexcept nogil:
    """What comes over all workers at once, each in one of sixteen seeds."""
    if sim_below(16) == 0:
        world.siege_begin = sim_now() + sim_below(40) * MILLISECOND
        world.siege_end = world.siege_begin + (100 + sim_below(300)) * MILLISECOND
        world.siege_spares = <int>sim_below(2)
    world.storm = sim_below(16) == 0


cdef void choose_features() noexcept nogil:
    """What most pools do not use."""
    world.broadcasting = sim_below(4) == 0
    world.transfers = sim_below(4) == 0
    if world.transfers and not world.framed and sim_below(4) == 0:
        world.clients[0].messages = 400    # long enough for a transfer that is received in place
    world.reconnecting = 200 if sim_below(8) == 0 else 0
    if world.reconnecting:
        world.blocking = 80                # so that messages and the end are there at once
    if world.block_on_overflow:
        world.requests += 20
        world.n_requesters = REQUESTERS


cdef void run_seed(uint64_t seed, bint tracing) noexcept nogil:
    cdef sim_faults faults
    cdef int i, n_workers, n_shards, slow
    sim_begin(seed, tracing)
    memset(&world, 0, sizeof(world))
    sim_when_quiet(check_quiet)
    choose_faults(&faults)
    n_workers = 1 + <int>sim_below(WORKERS)
    n_shards = 1 + <int>sim_below(SHARDS)
    if n_shards > n_workers:
        n_shards = n_workers
    kernel_begin()
    world.framed = sim_below(4) != 0
    world.framing.kind = FRAME_LENGTH if sim_below(2) else FRAME_DELIMITED
    world.framing.length_size = 2
    world.framing.n_delimiter = 2
    world.framing.delimiter[0] = 13
    world.framing.delimiter[1] = 10
    world.framing.max_message = 100000
    framing_settle(&world.framing)
    world.compiled.handler = &world
    world.compiled.connected = on_nothing
    world.compiled.received = on_received
    world.compiled.writable = on_writable
    world.compiled.disconnected = on_nothing
    world.deadlines = sim_below(4) == 0
    world.blocking = <int>(sim_below(3) and sim_below(80))
    world.passing = <int>(sim_below(2) and sim_below(300))
    world.closing = <int>(sim_below(2) and sim_below(60))
    world.stop_early = sim_below(5) == 0
    world.requests = <int>(sim_below(3) and sim_below(40))
    open_pool(n_workers, n_shards)
    world.engine.trigger = <uint8_t>sim_below(3)
    world.engine.call_idle = sim_below(4) == 0
    world.engine.busy_poll = (1 + sim_below(100)) * MILLISECOND // 1000 if sim_below(4) == 0 else 0
    world.engine.max_connections = 1 + sim_below(4) if sim_below(4) == 0 else 0
    if sim_below(4) == 0:
        world.engine.total.most = 1 + sim_below(8000)
    world.block_on_overflow = sim_below(8) == 0
    world.engine.limits = choose_limits()
    sim_quiet_begin = <uintptr_t>&world.engine.table.chunks[1]      # no-cython-lint
    sim_quiet_size = sizeof(void *) * (TABLE_CHUNKS - 1)      # no-cython-lint
    listen()
    world.n_clients = 1 + <int>sim_below(CLIENTS)
    for i in range(world.n_clients):
        world.clients[i].stream = -1
        world.clients[i].messages = sim_below(12)
        world.clients[i].patient = 1 if sim_below(4) else <int>sim_below(3)
        world.clients[i].until = sim_now() + (sim_below(40) * MILLISECOND if sim_below(2) else 0)
    world.n_requesters = <int>sim_below(REQUESTERS + 1)
    narrow(seed, &faults)
    add_trouble()
    choose_features()
    kernel_faults(&faults)
    for i in range(8):
        world.numbers[i] = i
    world.workers_left = n_workers
    for i in range(n_workers):
        sim_spawn("worker", worker_main, &world.numbers[i])
    world.requesters_left = world.n_requesters
    for i in range(world.n_requesters):
        sim_spawn("requester", requester_main, &world.numbers[i + 1])
    world.clients_left = True
    sim_spawn("clients", clients_main, NULL)
    if world.storm:
        sim_spawn("signals", signals_main, NULL)
    sim_spawn("director", director_main, NULL)
    slow = <int>sim_below(<uint32_t>n_workers) if sim_below(3) == 0 else -1
    sim_set_schedule(2 + sim_below(1 << (1 + sim_below(9))), slow)
    if sim_run() == NULL:
        check_end()
        free_memory()
        if sim_failure() == NULL and kernel_live_memory():
            sim_fail("%lu blocks of memory are left", kernel_live_memory())
        if sim_failure() == NULL and kernel_open_files():
            sim_fail("%d descriptors are left", kernel_open_files())
    elif tracing:
        show_sockets()
    kernel_free_all()


def run(uint64_t seed, bint tracing=False):
    """Runs one seed. Returns what has failed, or None; the hash of its trace; how often threads were switched."""
    cdef const char *failure
    with nogil:
        run_seed(seed, tracing)
    failure = sim_failure()
    return None if failure == NULL else failure.decode(), sim_trace_hash(), sim_switches()
