# cython: language_level=3
"""The kernel's side of a connection: epoll, recv, send, and the rule by which a descriptor is armed again.

Some facts about epoll, and what they mean for us:

1. Level-triggered without ONESHOT needs no system call to stay armed, but the next epoll_wait reports the descriptor
   again for as long as it is ready. As long as one worker polls, reads and runs, nobody else can see the event
   meanwhile, so "one worker in a socket's handlers" (S15) costs nothing. Only when a second worker polls while the
   first is still in a handler must the descriptor be *silenced*. That, and reading that is switched off, is all that
   MOD is used for under `trigger="level"`.
2. An empty mask is not silence: EPOLLERR and EPOLLHUP are always reported, level-triggered, for ever. EPOLLONESHOT
   with an empty mask is: the kernel reports them once more at most, then disables the descriptor.
3. EPOLL_CTL_MOD looks at the descriptor's readiness anew, under every trigger. So an event that came between recv's
   EAGAIN and MOD is not lost, and arming late is always safe; arming twice costs only a spare event.
4. Silencing is lazy. A descriptor whose input is not wanted at the moment (paused, closing, a SEND under way) stays
   armed until input really comes; usually the moment has passed by then, and both system calls are saved. EPOLLOUT is
   the exception: it is dropped at once, because a socket is nearly always writable.
5. close() drops a descriptor from its epoll set only when no duplicate of it is left anywhere (a fork, a dup). So
   EPOLL_CTL_DEL comes first, always.

The mask that the kernel holds stands in connection.armed and changes only together with it under connection.lock.
Therefore a release that finds input unarmed arms it, whoever silenced it and when: no flag says so, the mask itself
does.

What a turn asks of the kernel stands here, each system call behind one function that returns >= 0 or -errno.
"""
from libc.errno cimport EAGAIN, EINTR, ENOTCONN, EPIPE, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from tstpool._conn cimport (
    GONE, HEARD_END, PEND_ANY, STATE_DEAD, STATE_OPEN, STATE_QUEUED, TYPE_LISTEN, connection_id, connection_is,
    generation_of, output_account, output_drop, tst_connection)
from tstpool._data cimport input_free
from tstpool._fork cimport descriptor_moved, descriptor_moves
from tstpool._libc cimport (
    ACQUIRE, EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, FIONREAD, IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL, OUTQ, POLLOUT, RELAXED, RELEASE, SEQ_CST, SHUT_WR,
    SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, SO_ERROR, SO_LINGER, SO_OOBINLINE, TCP_NODELAY, TFD_TIMER_ABSTIME, accept4,
    close, compare_exchange64, epoll_ctl, epoll_event, epoll_wait, getsockopt, ioctl, iovec, itimerspec, linger, load32,
    load64, msghdr, poll, pollfd, read, recv, send, sendmsg, setsockopt, shutdown, sockaddr, socklen_t, store32,
    store64, sub32, timerfd_settime, tst_rarely, tst_usually, write)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._queue cimport QUEUE_PIECES, queue_consume, queue_pieces, queue_settle, queue_size, shared_leave
from tstpool._stats cimport NANOSECOND, count, tst_stats
from tstpool._timer cimport tick_before, tick_of

cdef enum:
    TRIGGER_LEVEL = 0
    TRIGGER_ONESHOT = 1
    TRIGGER_EDGE = 2

cdef enum:
    # sendmsg calls for one connection in one turn, of up to QUEUE_PIECES chunks each; then EPOLLOUT carries on, so that
    # a fast reader of a long queue does not hold up the others. (entry_finish_usual may have made one before.)
    FLUSH_ROUNDS = 4
    OUTPUT_LOOKS = 4           # how often in the time that a peer has, it is asked for whether it has taken anything


# -------------------------------------------------------------------------------------------- system calls

cdef inline int sys_wait(int epoll_fd, epoll_event *events, int capacity, int timeout_ms) noexcept nogil:
    """Returns the number of events; an interrupted wait counts as one that found none."""
    cdef int n = epoll_wait(epoll_fd, events, capacity, timeout_ms)
    if n < 0:
        return 0 if errno == EINTR else -errno
    return n


cdef inline int sys_control(int epoll_fd, int operation, int fd, uint32_t mask, uint64_t id) noexcept nogil:
    cdef epoll_event event
    event.events = mask
    event.data.u64 = id
    if epoll_ctl(epoll_fd, operation, fd, &event) < 0:
        return -errno
    return 0


cdef inline ssize_t sys_recv(int fd, void *buffer, size_t size) noexcept nogil:
    cdef ssize_t n
    while True:
        n = recv(fd, buffer, size, MSG_DONTWAIT)
        if tst_usually(n >= 0):
            return n
        if errno != EINTR:
            return -errno


cdef inline ssize_t sys_send(int fd, iovec *pieces, int n_pieces) noexcept nogil:
    """Sends without ever raising SIGPIPE, and never waits: the descriptor is another one's when a handler has put a
    fresh connection under it (dup2) and not told us yet."""
    cdef msghdr message
    cdef ssize_t n
    while True:
        if tst_usually(n_pieces == 1):
            n = send(fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL | MSG_DONTWAIT)
        else:
            memset(&message, 0, sizeof(msghdr))
            message.msg_iov = pieces
            message.msg_iovlen = <size_t>n_pieces
            n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if tst_usually(n >= 0):
            return n
        if errno != EINTR:
            return -errno


cdef inline int sys_accept(int listener, sockaddr *address, socklen_t *size) noexcept nogil:
    cdef int fd
    while True:
        fd = accept4(listener, address, size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            return fd
        if errno != EINTR:
            return -errno


cdef inline bint sys_writable(int fd) noexcept nogil:
    cdef pollfd watched
    watched.fd = fd
    watched.events = POLLOUT
    watched.revents = 0
    return poll(&watched, 1, 0) == 1


cdef inline void sys_wake(int event_fd) noexcept nogil:
    cdef uint64_t one = 1
    while write(event_fd, &one, sizeof(one)) < 0 and errno == EINTR:
        pass


cdef inline uint32_t sys_count(int fd, unsigned long what) noexcept nogil:
    """A number of bytes that the kernel holds for the descriptor; 0 also where it does not say."""
    cdef int n = 0
    if ioctl(fd, what, &n) < 0 or n < 0:
        return 0
    return <uint32_t>n


cdef inline size_t sys_unread(int fd) noexcept nogil:
    """Bytes that have arrived and were not received."""
    return sys_count(fd, FIONREAD)


cdef inline uint32_t sys_holds(int fd, unsigned long what) noexcept nogil:
    """Of the output that the kernel was given, bytes that the peer has not acknowledged (OUTQ); of these, the ones that
    were not even sent, as the peer had no room for them (OUTQ_UNSENT)."""
    return sys_count(fd, what)


cdef inline int sys_error(int fd) noexcept nogil:
    """The errno that the socket has noted for whoever asks next; 0: none."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    return error if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 else errno


cdef inline void sys_reset_on_close(int fd, bint yes) noexcept nogil:
    """close() will tell the peer with a reset, and forget what the kernel has not sent yet; or, after all, not."""
    cdef linger now
    now.l_onoff = yes
    now.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now))


cdef inline int sys_alarm(int timer_fd, uint64_t when) noexcept nogil:
    """Has the timer's descriptor become readable at that moment, in monotonic nanoseconds; what was set before is
    forgotten."""
    cdef itimerspec spec
    memset(&spec, 0, sizeof(spec))
    spec.it_value.tv_sec = <long>(when // NANOSECOND)
    spec.it_value.tv_nsec = <long>(when % NANOSECOND)
    return -errno if timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &spec, NULL) < 0 else 0


cdef inline void sys_drain(int fd) noexcept nogil:
    cdef uint64_t number
    while read(fd, &number, sizeof(number)) < 0 and errno == EINTR:
        pass


cdef inline void sys_prepare(int fd) noexcept nogil:
    """Sets what each TCP connection is to have.

    Urgent bytes stay in the stream, in their place: else EPOLLPRI would fire until somebody read them aside (B23). No
    delay: all output of a turn goes out in one send, so Nagle's algorithm has nothing to collect, and would hold back
    the second of two replies until the peer acknowledges the first.
    """
    cdef int on = 1
    setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))


# ------------------------------------------------------------------------------------------------- arming

cdef inline uint32_t input_mask() noexcept nogil:
    return EPOLLIN | EPOLLRDHUP | EPOLLPRI


cdef inline uint32_t connection_input_mask(const tst_connection *connection) noexcept nogil:
    """Lock held."""
    return EPOLLIN | EPOLLRDHUP if connection.urgent_off else input_mask()


cdef inline void connection_mutes_urgent(tst_connection *connection, bint off) noexcept nogil:
    """An urgent byte that has arrived before those in front of it is reported, while nothing can be received: and again
    and again, until the gap is filled, as long as the kernel is asked for EPOLLPRI. Owner only."""
    if tst_rarely(connection.urgent_off != off):
        spin_lock(&connection.lock)
        connection.urgent_off = off
        spin_unlock(&connection.lock)


cdef inline uint32_t output_mask(tst_connection *connection) noexcept nogil:
    """Lock held."""
    return EPOLLOUT if connection.want_out or connection.want_room else 0


cdef inline uint32_t trigger_mask(tst_connection *connection) noexcept nogil:
    if connection.trigger == TRIGGER_ONESHOT:
        return EPOLLONESHOT
    if connection.trigger == TRIGGER_EDGE:
        return EPOLLET
    return 0


cdef inline int connection_control(tst_connection *connection, uint32_t mask, tst_stats *stats) noexcept nogil:
    """Gives the kernel a mask. Lock held."""
    cdef int result
    result = sys_control(connection.epoll_fd, EPOLL_CTL_MOD if connection.registered else EPOLL_CTL_ADD,
                         connection.fd, mask, connection_id(connection))
    if stats != NULL:
        count(&stats.controls, 1)
    if result == 0:
        connection.registered = True
        connection.armed = mask
    return result


cdef inline int connection_arm(tst_connection *connection, bint want_in, tst_stats *stats) noexcept nogil:
    """Makes the kernel report what is wanted, if it does not do so yet. Lock held."""
    cdef uint32_t wanted = connection_input_mask(connection) if want_in else 0
    cdef uint32_t harmful = EPOLLOUT | (EPOLLPRI if connection.urgent_off else 0)
    wanted |= output_mask(connection)
    if tst_rarely(wanted == 0) and connection.hears_end & HEARD_END:
        # It only sends from here on. That its peer goes is reported under any mask, but once, and if an owner was in
        # the handler then, or the end of input was not known yet, nobody has noted it: it is reported again.
        return connection_control(connection, EPOLLONESHOT, stats)
    if wanted & ~connection.armed == 0 and not connection.armed & ~wanted & harmful:
        if connection.registered:
            return 0
    return connection_control(connection, wanted | trigger_mask(connection) if wanted else EPOLLONESHOT, stats)


cdef inline void connection_silence(tst_connection *connection, tst_stats *stats) noexcept nogil:
    """No more input events until connection_arm. Output that waits goes on. Lock held."""
    cdef uint32_t mask = EPOLLONESHOT
    cdef int result
    if output_mask(connection):
        mask = EPOLLOUT | trigger_mask(connection)
    if connection.armed == mask:
        return
    result = connection_control(connection, mask, stats)
    if result < 0:                         # the old mask would report for ever what nobody reads
        sys_control(connection.epoll_fd, EPOLL_CTL_DEL, connection.fd, 0, 0)
        connection.registered = False
        connection.armed = 0
        if connection.type != TYPE_LISTEN:     # which is added again when its pause is over
            connection_deafened(connection, -result)


cdef inline void connection_fired(tst_connection *connection, uint32_t events) noexcept nogil:
    """An event came. Under ONESHOT the kernel has disabled the descriptor by itself; under EDGE the edge is used up,
    and only MOD brings another one while the socket stays writable. Lock held."""
    if connection.armed & EPOLLONESHOT:
        connection.armed = EPOLLONESHOT
    elif connection.trigger == TRIGGER_EDGE:
        connection.armed &= ~(events & EPOLLOUT)


# ------------------------------------------------------------------------------------------------- output

cdef inline void connection_shut(tst_connection *connection) noexcept nogil:
    """After send_eof(): tells the peer that nothing more comes, once the kernel has all. Where that fails, the
    connection is broken, and somebody must look at it now. Lock held."""
    if queue_size(&connection.out) == 0 and shutdown(connection.fd, SHUT_WR) < 0:
        # A reset has come, most likely, which the next receive tells more about.
        store32(&connection.out_error, EPIPE if errno == ENOTCONN else <uint32_t>errno, RELAXED)
        connection.out_ended = False


cdef inline int connection_end_output(tst_connection *connection, uint32_t generation) noexcept nogil:
    """send_eof(), on any thread. 1: this call has ended it, and the connection's owner is to look at it now, 0: it is
    closed, or was ended before, GONE."""
    cdef int result = GONE
    spin_lock(&connection.lock)
    if connection_is(connection, generation):
        result = not connection.out_closed
        if result:
            connection.out_closed = connection.out_ended = True
            if not connection.flushing:    # else who is sending looks, when he has
                connection_shut(connection)
    spin_unlock(&connection.lock)
    return result


cdef inline void flush_result(tst_connection *connection, ssize_t sent, size_t total) noexcept nogil:
    """Enters what the kernel said to one send of `total` bytes. Lock held."""
    if tst_usually(sent >= 0):
        queue_consume(&connection.out, <size_t>sent)
        connection.want_out = <size_t>sent < total
        if tst_rarely(connection.want_out):
            queue_settle(&connection.out)
    elif sent == -EAGAIN:
        connection.want_out = True
        queue_settle(&connection.out)
    else:
        store32(&connection.out_error, <uint32_t>-sent, RELAXED)
        connection.out_drop = connection.aborted = True    # the peer must not take what it has for the whole
    if tst_rarely(connection.out_drop):
        if connection.aborted:
            sys_reset_on_close(connection.fd, True)
        connection.out_closed = True
        connection.out_ended = connection.out_drop = False
        output_drop(connection)
    else:
        output_account(connection)
        if tst_rarely(connection.out_ended != 0):
            connection_shut(connection)


cdef inline int flush_state(tst_connection *connection) noexcept nogil:
    """What connection_flush returns. Lock held."""
    if load32(&connection.out_error, RELAXED):
        return -<int>load32(&connection.out_error, RELAXED)
    return queue_size(&connection.out) != 0


cdef inline void flush_once(tst_connection *connection, uint64_t now, tst_stats *stats) noexcept nogil:
    """One send of what waits, by whoever has set `flushing`. Lock held, and let go of meanwhile."""
    cdef iovec pieces[QUEUE_PIECES]
    cdef size_t total
    cdef int n = queue_pieces(&connection.out, pieces, &total)
    cdef ssize_t sent
    if tst_rarely(connection.out_drop):    # it ends in the middle of a frame
        flush_result(connection, 0, 0)
        return
    spin_unlock(&connection.lock)
    sent = sys_send(connection.fd, pieces, n)
    if tst_usually(sent > 0):
        count(&stats.bytes_out, <uint64_t>sent)
    spin_lock(&connection.lock)
    if tst_usually(sent > 0):
        connection.kernel_holds = 0
    if tst_usually(sent > 0) or not connection.want_out:
        store32(&connection.output_tick, tick_of(now), RELAXED)
    flush_result(connection, sent, total)


cdef inline bint connection_is_stuck(tst_connection *connection, uint32_t since, uint32_t limit,
                                     uint64_t now) noexcept nogil:
    """The peer has taken nothing for `limit` ticks, from `since` on. Lock held.

    The kernel takes none of our output before a third of its buffer is free, which may be a megabyte: so that it has
    taken none does not mean that the peer has not. What does is that it holds no less than at the look before. Right
    after it was filled, less only means that the peer's own kernel had room, so the first look is a quarter later.

        since       look        look        look        due
        |-----------|-----------|-----------|-----------|        less than at the look before: all begins anew
    """
    cdef uint32_t passed = tick_of(now) - since
    cdef uint32_t before = connection.kernel_holds
    if tick_before(tick_of(now), since) or passed < limit // OUTPUT_LOOKS:
        return False
    connection.kernel_holds = sys_holds(connection.fd, OUTQ)
    if 0 < connection.kernel_holds < before:
        store32(&connection.output_tick, tick_of(now), RELAXED)
        return False
    if passed >= limit and before == 0 and connection.kernel_holds:        # nobody has looked in time
        store32(&connection.output_tick, tick_of(now) - limit + limit // OUTPUT_LOOKS, RELAXED)
        return False
    return passed >= limit


cdef inline int connection_flush(tst_connection *connection, uint32_t generation, bint writable, bint arm,
                                 uint64_t now, tst_stats *stats) noexcept nogil:
    """Sends what waits; any worker may. Returns 0 when nothing waits now, 1 when something does, -errno when broken.

    One flusher at a time: whoever comes second leaves, and the first looks again before it goes. While the kernel's
    buffer is full only an event (`writable`) is a reason to try. With `arm`, EPOLLOUT is armed or dropped here;
    without, the caller is about to arm anyway.
    """
    cdef int rounds = 0, result
    spin_lock(&connection.lock)
    if (not connection_is(connection, generation) or connection.flushing or queue_size(&connection.out) == 0
            or (connection.want_out and not writable)):
        result = flush_state(connection)
        spin_unlock(&connection.lock)
        return result
    connection.flushing = True
    while True:
        flush_once(connection, now, stats)
        rounds += 1
        if connection.want_out or queue_size(&connection.out) == 0:
            break
        if rounds == FLUSH_ROUNDS:
            connection.want_out = True
            output_account(connection)
            break
    connection.flushing = False
    if arm and not connection.retired:
        flush_arm(connection, stats)
    result = flush_state(connection)
    if connection.retired:
        spin_unlock(&connection.lock)
        connection_free(connection, stats)
    else:
        spin_unlock(&connection.lock)
    return result


cdef inline void flush_arm(tst_connection *connection, tst_stats *stats) noexcept nogil:
    """Arms or drops EPOLLOUT and leaves the rest of the mask as it is. Lock held."""
    cdef uint32_t mask = (connection.armed & input_mask()) | output_mask(connection)
    cdef int result
    if not connection.registered or (connection.armed & (input_mask() | EPOLLOUT)) == mask:
        return
    result = connection_control(connection, mask | trigger_mask(connection) if mask else EPOLLONESHOT, stats)
    if result < 0:
        connection_deafened(connection, -result)


cdef inline void connection_deafened(tst_connection *connection, int reason) noexcept nogil:
    """epoll has refused a mask, so no event may ever come: the connection is broken, and output that waits is lost.
    Lock held; somebody must look at it now."""
    if queue_size(&connection.out):        # the peer must not take what it has for the whole
        connection.aborted = True
    store32(&connection.out_error, <uint32_t>reason, RELAXED)
    connection.out_closed = connection.out_drop = True
    if not connection.flushing:            # else who is sending forgets the rest afterwards
        flush_result(connection, 0, 0)


# ------------------------------------------------------------------------------------------------- the end

cdef inline void connection_drop_body(tst_connection *connection) noexcept nogil:
    """Forgets a long message that is not whole. Owner only."""
    if connection.body != NULL:
        shared_leave(connection.body, connection.out.stock)
        connection.body = NULL


cdef inline void connection_free(tst_connection *connection, tst_stats *stats) noexcept nogil:
    """Frees the slot and closes the descriptor, once the last of {owner, flusher, request queue} has let go.

    Called by each of them when it is the last as far as it can see; whoever takes a DEAD connection from the stack of
    requests calls it again. The shard's count goes down last of all: a shard may end when it is 0.
    """
    cdef uint64_t word = load64(&connection.state, ACQUIRE)
    cdef uint64_t closed
    cdef int fd = connection.fd
    cdef uint32_t *shard_open = connection.shard_open
    while True:
        # With OPEN goes the right to ask: nobody can push it any more between this look for QUEUED and the end.
        closed = word & ~<uint64_t>(STATE_OPEN | PEND_ANY)
        if word & STATE_QUEUED:
            closed |= STATE_DEAD
        if compare_exchange64(&connection.state, &word, closed, True, SEQ_CST, ACQUIRE):
            break
    if word & STATE_QUEUED:
        return
    descriptor_moves()
    spin_lock(&connection.lock)
    output_drop(connection)
    input_free(&connection.input)
    connection_drop_body(connection)
    if connection.registered:
        sys_control(connection.epoll_fd, EPOLL_CTL_DEL, fd, 0, 0)
    word = load64(&connection.state, ACQUIRE)
    store64(&connection.state, <uint64_t>(generation_of(word) + 1) << 32, RELEASE)
    spin_unlock(&connection.lock)
    close(fd)                              # from store64 on, the slot may belong to somebody else
    descriptor_moved()
    sub32(shard_open, 1, RELEASE)


cdef inline void connection_retire(tst_connection *connection, tst_stats *stats) noexcept nogil:
    """The owner lets go for ever: OWNED stays set, so nobody can acquire it any more."""
    cdef bint flushing
    spin_lock(&connection.lock)
    connection.retired = True
    connection.out_closed = True
    connection.out_drop = connection.flushing
    flushing = connection.flushing
    spin_unlock(&connection.lock)
    if not flushing:
        connection_free(connection, stats)
