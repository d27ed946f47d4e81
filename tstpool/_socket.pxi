# TstSocket: one connection, as users see it; how it comes into being and is let go; the functions for nogil handlers.

cdef enum:
    READ_CHUNK = 65536                 # bytes: most that one read() without a size takes from the kernel


cdef inline ssize_t append_once(TstSocket sock, const char *bytes, size_t size, tst_shared *shared,
                                bint framed) noexcept nogil:
    """Queues output, and asks for somebody to send it if nobody is on the way. Lock held, and let go of."""
    cdef bint flush = False
    cdef ssize_t result = connection_append(sock.connection, sock.generation(), bytes, size, shared, framed, &flush)
    if tst_rarely(flush):
        shard_ask(sock.connection, sock.generation(), 0)
    return result


cdef ssize_t append_or_flush(TstSocket sock, const char *bytes, size_t size, tst_shared *shared,
                             bint framed) noexcept nogil:
    """append_once, twice if need be. Lock held, and let go of."""
    cdef ssize_t result = append_once(sock, bytes, size, shared, framed)
    if tst_rarely(result == -ENOBUFS):
        sock.flush_once()          # perhaps too much waits only because it is a long handler that sends
        spin_lock(&sock.connection.lock)
        result = append_once(sock, bytes, size, shared, framed)
        if result == -ENOBUFS:
            return sock.overflow()
    return result


@cython.final
@cython.trashcan(True)                  # a long chain of sockets in user_data must not end on the C stack
cdef class TstSocket:
    """One connection of a pool.

    It stays valid for as long as somebody holds it. send(), close(), pause() and resume() may be called on any thread,
    at any time, without a lock; read(), read_into() and the fields of `recv_data` belong to the socket's own handler.
    """

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("a TstSocket is made by its pool, not by hand")

    cdef uint32_t generation(self) noexcept nogil:
        return generation_of(self.id)

    cdef ssize_t append(self, const char *bytes, size_t size, tst_shared *shared, bint framed) noexcept nogil:
        """Queues output and sees to it that somebody sends it. Returns what waits, or -errno."""
        cdef ssize_t result = 0
        spin_lock(&self.connection.lock)
        if framed and tst_usually(shared == NULL):
            result = output_take_next(self.connection, self.generation(), bytes, size)
        if tst_usually(result > 0):
            spin_unlock(&self.connection.lock)
            return result
        return append_or_flush(self, bytes, size, shared, framed)

    cdef ssize_t overflow(self) noexcept nogil:
        """Too much waits: the limits say what to do. Returns -ENOBUFS, or -ENOTCONN when it was closed for that."""
        if self.limits.overflow != OVERFLOW_CLOSE:         # our own: the slot may be another connection's by now
            add64(&self.pool.engine.total.overflow_refused, 1, RELAXED)
            return -ENOBUFS
        if connection_abort(self.connection, self.generation(), ENOBUFS):
            shard_ask(self.connection, self.generation(), PEND_CLOSE)
        return -ENOTCONN

    cdef void flush_once(self) noexcept nogil:
        """Gives the kernel what it takes now."""
        cdef tst_stats outside
        memset(&outside, 0, sizeof(outside))
        if connection_flush(self.connection, self.generation(), True, True, clock_now(), &outside) < 0:
            shard_ask(self.connection, self.generation(), PEND_IN)     # no event may come to tell its owner
        connection_ask_relief(self.connection, self.generation())
        add64(&self.pool.bytes_outside, outside.bytes_out, RELAXED)

    cdef bint end_if_overdue(self) noexcept nogil:
        """True: the peer has taken nothing for write_timeout, and the connection ends. All workers may be waiting for
        such peers, so that nobody is left whom a timer would wake."""
        cdef bint overdue
        cdef uint64_t now = clock_now()
        spin_lock(&self.connection.lock)
        overdue = (connection_is(self.connection, self.generation()) and self.connection.want_out
                   and self.limits.write != 0
                   and connection_is_stuck(self.connection, load32(&self.connection.output_tick, RELAXED),
                                           self.limits.write, now))
        spin_unlock(&self.connection.lock)
        if overdue and connection_abort(self.connection, self.generation(), ETIMEDOUT):
            shard_ask(self.connection, self.generation(), PEND_CLOSE)
        return overdue

    cdef int wait_for_room(self) except -1:
        """Blocks until less than high_water waits; for a moment if that is so, for then it is the other connections
        that have too much. ConnectionClosed when it ends before."""
        cdef pollfd watched
        cdef size_t waits, enough = self.limits.high_water
        cdef bint gone, others, waited = False
        watched.fd = <int><uint32_t>self.id
        watched.events = POLLOUT
        while True:
            spin_lock(&self.connection.lock)
            gone = self.connection.out_closed or not connection_is(self.connection, self.generation())
            waits = queue_size(&self.connection.out)
            others = self.connection.flushing
            spin_unlock(&self.connection.lock)
            if gone or self.end_if_overdue():
                raise ConnectionClosed("the socket was closed while a send waited for room")
            if waits <= enough and waited:
                return 0
            waited = True
            with nogil:
                # Short, for the descriptor may be closed meanwhile; shorter while another thread is sending: the
                # descriptor is writable then, perhaps, and there is nothing for us to send.
                poll(&watched, 1 if waits > enough and not others else 0, 1 if others else 10)
                self.flush_once()
            self.pool.drop_all_litter()
            PyErr_CheckSignals()

    cdef ssize_t append_object(self, object data, bint framed) except? -1:
        """append() for whatever has a buffer, with what overflow="block" asks for."""
        cdef ssize_t queued
        cdef bint waited = False
        while True:
            if type(data) is bytes and PyBytes_GET_SIZE(data) < SHARE_LEAST:
                queued = self.append(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), NULL, framed)
            else:
                queued = self.append_other(data, framed)
            if not tst_rarely(queued == -ENOBUFS) or self.limits.overflow != OVERFLOW_BLOCK or self.in_handler():
                return queued
            if waited:                     # it is one refusal, however often it is tried again
                add64(&self.pool.engine.total.overflow_refused, <uint64_t>-1, RELAXED)
            waited = True
            self.wait_for_room()

    cdef ssize_t append_other(self, object data, bint framed) except? -1:
        """append() for what is not a small `bytes`. A large one is kept instead of copied: it never changes."""
        cdef Py_buffer view
        cdef tst_shared *shared
        cdef ssize_t queued
        if type(data) is bytes:
            shared = share_object(data)
            queued = self.append(shared.bytes, shared.size, shared, framed)
            unshare_object(shared)
            return queued
        data = contiguous(data)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.append(<const char *>view.buf, <size_t>view.len, NULL, framed)
        finally:
            PyBuffer_Release(&view)

    cdef bint in_handler(self) noexcept:
        """The calling thread is the worker that is in this socket's handler."""
        cdef int no = <int>load32(<uint32_t *>&self.connection.thread_no, RELAXED)
        cdef tst_worker *worker
        if no < 0 or no >= worker_count(self.pool.engine) or not connection_is(self.connection, self.generation()):
            return False
        worker = &self.pool.engine.workers[no]
        return worker.ident == PyThread_get_thread_ident() and worker.current == self.connection

    def __repr__(self):
        return f"<TstSocket sd={self.sd} id={self.id:#x} {'closed' if self.closed else 'open'}>"

    # -- what it is

    @property
    def sd(self):
        """The descriptor's number; after the close, the number it had."""
        return <int><uint32_t>self.id

    def fileno(self):
        """The descriptor's number, or -1 once the connection is gone."""
        return self.sd if connection_is(self.connection, self.generation()) else -1

    @property
    def type(self):
        """The TstSockType: SUB when accepted, else what addsocket() was told."""
        return TstSockType(self.type_number)

    @property
    def closed(self):
        """True from the moment a close was asked for, by anybody."""
        cdef bint result
        spin_lock(&self.connection.lock)
        result = connection_is_closing(self.connection) or not connection_is(self.connection, self.generation())
        spin_unlock(&self.connection.lock)
        return result

    @property
    def events(self):
        """The epoll bits (EPOLLIN, EPOLLOUT ...) that the running handler call is about."""
        return load32(&self.connection.events, RELAXED) if connection_is(self.connection, self.generation()) else 0

    @property
    def thread_no(self):
        """Number of the worker that ran this socket's handler last, -1 before the first time or after the close."""
        if not connection_is(self.connection, self.generation()):
            return -1
        return <int>load32(<uint32_t *>&self.connection.thread_no, RELAXED)

    @property
    def peer(self):
        """(host, port) of the other side, known after the close too; for a unix socket "unix:path", None if it has no
        name."""
        if self.peer_path is not None:
            return self.peer_path
        return _net.text_address(self.peer_address.family, self.peer_address.bytes[:sizeof(self.peer_address.bytes)])

    @property
    def local(self):
        """(host, port) of this side, or a unix socket's "unix:path"; None once the connection is gone."""
        cdef sockaddr_storage address
        cdef socklen_t size = sizeof(address)
        cdef bint known = False
        spin_lock(&self.connection.lock)       # as long as it is held, nobody closes the descriptor
        if connection_is(self.connection, self.generation()):
            known = getsockname(self.connection.fd, <sockaddr *>&address, &size) == 0
        spin_unlock(&self.connection.lock)
        return text_of(&address, size) if known else None

    # -- what the user hangs on it

    @property
    def user_data(self):
        """Any object of the user's; let go when the connection is gone."""
        with cython.critical_section(self):
            return self.data

    @user_data.setter
    def user_data(self, value):
        with cython.critical_section(self):
            self.data = value

    @property
    def handler(self):
        """The handler for this socket: a TstHandler or a function, as TstPool takes. Assigning one overrides the
        pool's; None goes back. on_slow and on_idle stay the pool's, and so do on_connect and on_disconnect where it has
        none; with a function on_error does, too."""
        with cython.critical_section(self):
            binding = self.binding
        if binding is None:
            with cython.critical_section(self.pool):
                binding = self.pool.binding
        return None if binding is None else (<Binding>binding).handler

    @handler.setter
    def handler(self, value):
        binding = None if value is None else bind(value, {})
        with cython.critical_section(self):
            self.binding = binding
        spin_lock(&self.connection.lock)
        if connection_is(self.connection, self.generation()):
            store32(&self.connection.rebind, 1, RELEASE)
        spin_unlock(&self.connection.lock)

    @property
    def framing(self):
        """How this socket's input is cut into messages; None: as it arrives. Assigned inside the socket's own handler
        it counts from the next message on, for what was read already too. TstError elsewhere: listen(), connect() and
        addsocket() take a framing for their sockets."""
        with cython.critical_section(self):
            return self.own_framing

    @framing.setter
    def framing(self, value):
        framing = framing_from(value)
        if not self.in_handler() or self.connection.in_received:
            raise TstError("framing is changed in the socket's own handler, while it runs; elsewhere connect(), "
                           "addsocket() and listen() take it for a socket to come")
        with cython.critical_section(self):
            spin_lock(&self.connection.lock)           # another thread's send_message() may be reading the old one
            self.connection.framing = framing_pointer(framing)
            spin_unlock(&self.connection.lock)
            # Unread input is cut anew, except for the message that is being handed out. The old one may be freed below,
            # and a later one lie where it lay.
            if self.connection.windowed:
                self.connection.framed_by = NULL
            else:
                connection_forget_frame(self.connection)
            self.own_framing, framing = framing, self.own_framing

    @property
    def recv_data(self):
        """The TstData for receiving."""
        with cython.critical_section(self):
            if self.recv_transfer is None:
                self.recv_transfer = new_transfer(self.pool.max_recv_size)
                if self.in_handler():
                    data_set_unread(&self.recv_transfer.data, self.unread())
                self.publish(<void **>&self.connection.recv, &self.recv_transfer.data)
            return self.recv_transfer

    @property
    def send_data(self):
        """The TstData for sending."""
        with cython.critical_section(self):
            if self.send_transfer is None:
                self.send_transfer = new_transfer(self.pool.max_send_size)
                self.publish(<void **>&self.connection.send, &self.send_transfer.data)
            return self.send_transfer

    cdef void publish(self, void **place, void *transfer) noexcept:
        """Shows a transfer to the engine; it reads it only while the slot holds a reference to us."""
        spin_lock(&self.connection.lock)
        if self.connection.sock == <PyObject *>self:
            store_pointer(place, transfer, RELEASE)
        spin_unlock(&self.connection.lock)

    # -- output

    @property
    def queued(self):
        """Bytes of output that wait for the kernel to take them, as send() returns them; 0 once the connection is gone.
        Any thread."""
        cdef size_t waits = 0
        spin_lock(&self.connection.lock)
        if connection_is(self.connection, self.generation()):
            waits = queue_size(&self.connection.out)
        spin_unlock(&self.connection.lock)
        return waits

    def send(self, data):
        """Queues bytes, and returns at once unless on_overflow="block" makes it wait for room. They are copied, so
        `data` may be changed afterwards.

        data: any object with the buffer protocol. Returns how many bytes of this connection wait now for the kernel to
        take them. Inside a handler they go out, in one piece, when the handlers of this turn have run. Any thread; what
        one thread sends keeps its order and is never mixed with another's inside one call. Raises ConnectionClosed,
        SendQueueFull (see TstPool's max_queued), TypeError, MemoryError.
        """
        cdef ssize_t queued = self.append_object(data, False)
        if queued < 0:
            check(queued, "no memory to queue output")
        return queued

    def send_message(self, data):
        """Queues one message in the frame of the socket's framing; without framing it is send().

        Raises MessageTooLarge when the framing has no frame for so many bytes, ValueError when the message holds the
        delimiter or is not of the fixed size; else as send(). Any thread.
        """
        cdef ssize_t queued = self.append_object(data, True)
        if queued < 0:
            self.raise_unsent(queued, data)
        return queued

    cdef int raise_unsent(self, ssize_t result, object data) except -1:
        """Says why append_object() did not take a message."""
        size = memoryview(data).nbytes
        with cython.critical_section(self):
            framing = self.own_framing
        if result == -EINVAL:
            raise ValueError(f"the message holds the delimiter of {framing!r}")
        if result == -EMSGSIZE and isinstance(framing, Fixed):
            raise ValueError(f"{framing!r} has no frame for a message of {size} bytes")
        check(result, "no memory to queue output" if result == -ENOMEM else
              f"{framing!r} has no frame for a message of {size} bytes")
        return 0

    def flush(self, timeout=None):
        """Blocks until all that was queued before the call has been handed to the kernel.

        timeout: seconds, None for ever. Inside a handler this blocks the handler's worker, as any blocking call does;
        other connections go on. Raises TimeoutError, and ConnectionClosed when the connection breaks first.
        """
        cdef uint64_t goal
        cdef uint64_t until = 0 if timeout is None else clock_now() + nanoseconds(timeout, "timeout")
        cdef pollfd watched
        spin_lock(&self.connection.lock)
        goal = self.connection.out.queued
        spin_unlock(&self.connection.lock)
        watched.fd = <int><uint32_t>self.id
        watched.events = POLLOUT
        try:
            while not self.sent_up_to(goal):
                with nogil:
                    self.flush_once()
                if self.sent_up_to(goal):
                    return
                self.end_if_overdue()
                if until and clock_now() >= until:
                    raise TimeoutError(f"output of {self!r} still waits after {timeout} seconds")
                with nogil:
                    poll(&watched, 1, 10)      # short, for the descriptor may be closed meanwhile
                PyErr_CheckSignals()
        finally:
            self.pool.drop_all_litter()

    cdef bint sent_up_to(self, uint64_t goal) except -1:
        cdef bint gone, sent
        spin_lock(&self.connection.lock)
        gone = (not connection_is(self.connection, self.generation()) or self.connection.aborted
                or load32(&self.connection.out_error, RELAXED) != 0)
        sent = self.connection.out.sent >= goal
        spin_unlock(&self.connection.lock)
        if gone and not load32(&self.sent_whole, ACQUIRE):
            raise ConnectionClosed("the connection ended before its output was sent")
        return gone or sent

    # -- input, inside the handler

    def read(self, n=-1):
        """Takes up to `n` bytes of input that has arrived, without blocking; without `n`, all that is at hand.

        With a framing that is the message, for a function that is a handler; on_message has it as `data`, and here gets
        nothing more. In on_eof and on_disconnect it is what had come of a message that did not become whole, unless
        that has 128 KiB or more. Returns b"" when
        nothing is there. Only inside the socket's own handler; TstError elsewhere.
        """
        cdef size_t most
        cdef size_t buffered
        cdef ssize_t more
        self.check_reading()
        buffered = self.unread()
        most = buffered if self.holds_no_more() else buffered + READ_CHUNK
        if n >= 0:
            most = min(size_from(n, "n"), most)
        if buffered and (n < 0 or buffered >= most):
            buffered = min(buffered, most)
            taken = PyBytes_FromStringAndSize(self.connection.input.view, <Py_ssize_t>buffered)
            self.took(buffered)
            return taken
        room = bytearray(most)
        more = self.read_to(<char *>room, <size_t>len(room))
        return bytes(memoryview(room)[:more])

    def read_into(self, buf):
        """As read(), into a writable buffer. Returns the number of bytes."""
        cdef Py_buffer view
        self.check_reading()
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
        try:
            return self.read_to(<char *>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    cdef int check_reading(self) except -1:
        if not self.in_handler():
            raise TstError("reading is for the socket's own handler, while it runs")
        if self.connection.in_received:
            raise TstError("a compiled handler has its message, and reads no further: TST_RUN passes it on to Python")
        return 0

    cdef size_t unread(self) noexcept:
        """Bytes at hand: what is left of the message, or, without framing, of what was read ahead."""
        return self.connection.frame.size if self.connection.windowed else self.connection.input.size

    cdef bint holds_no_more(self) noexcept:
        """What the kernel has is not the handler's to read: it belongs to the next message, or to one under way."""
        return self.connection.windowed or self.connection.body != NULL

    cdef void took(self, size_t size) noexcept:
        input_consume(&self.connection.input, size)
        self.connection.has_read = True
        if self.connection.windowed:
            self.connection.frame.size -= size
            self.connection.frame.whole -= size
        elif self.connection.framed_by != NULL:
            connection_forget_frame(self.connection)

    cdef ssize_t read_to(self, char *place, size_t size) except -1:
        """Input that was read ahead first, then what the kernel has."""
        cdef tst_connection *connection = self.connection
        cdef size_t buffered = min(self.unread(), size)
        cdef ssize_t n = 0
        if buffered:
            memcpy(place, connection.input.view, buffered)
            self.took(buffered)
        if buffered == size or connection.end_of_input or self.holds_no_more():
            return <ssize_t>buffered
        with nogil:
            n = sys_recv(connection.fd, place + buffered, size - buffered)
        if n > 0:
            connection.has_read = connection.heard = True
            connection.active_tick = tick_of(clock_now())
            count(&self.pool.engine.workers[connection.thread_no].stats.bytes_in, <uint64_t>n)
            connection.readable = connection.trigger == TRIGGER_EDGE
            return <ssize_t>buffered + n
        connection.readable = False
        if n == 0:
            connection.end_of_input = True
        elif n != -EAGAIN:
            connection_break(connection, <int>-n)
        return <ssize_t>buffered

    # -- control

    def close(self, abort=False):
        """Closes the connection once what is queued has been sent; a peer that takes none of it for the pool's
        linger_timeout is cut off. If the peer has sent more than was read, or is still sending a message, what comes
        is read and dropped for a while, so that the reply reaches it; else what it sends later is answered by a reset.

        abort: at once instead: what is queued is dropped, and the peer gets a reset. Any thread, any number of times.
        Returns True for the call that began it. Messages not yet handled are dropped.
        """
        cdef int aborted
        self.pool.check_alive()
        if abort:
            aborted = connection_abort(self.connection, self.generation(), 0)
            if aborted:
                shard_ask(self.connection, self.generation(), PEND_CLOSE)
            return aborted == ABORT_OPEN
        if connection_close_output(self.connection, self.generation()) != 1:
            return False
        shard_ask(self.connection, self.generation(), PEND_CLOSE)
        return True

    def send_eof(self):
        """Tells the peer that nothing more comes, once the kernel has what is queued; its messages go on coming. When
        it has finished sending, too, or had before, the connection closes. (While it is paused nobody learns of that.)

        send() raises ConnectionClosed from here on, and what handlers return is dropped. Any thread, any number of
        times. Returns True for the call that began it, False when output had ended already or the socket is closed.
        """
        self.pool.check_alive()
        return tst_send_eof(self) == 1

    def pause(self):
        """No more messages until resume(): TCP holds the peer back. A call that runs already is not stopped. Until
        resume(), or the next send, nobody notices that the peer has gone, and no deadline for input counts. (After
        on_eof, when no input can come any more, both are as without a pause.) Any thread.
        """
        tst_pause(self)

    def resume(self):
        """Goes on after pause(). Any thread."""
        tst_resume(self)


cdef enum:
    LARGE_SPARES_MOST = 8388608        # bytes of objects that a pool keeps for large messages to come

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define TST_HAS_GIL 0
    #else
    #define TST_HAS_GIL 1
    #endif
    /* Nobody but the caller holds this `bytes`: it may change. Without a GIL another thread may be about to take it. */
    static inline int tst_is_alone(PyObject *data) {
        return TST_HAS_GIL && Py_REFCNT(data) == 1;
    }
    #pragma GCC diagnostic push
    #pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    static inline void tst_forget_hash(PyObject *data) {
        ((PyBytesObject *)data)->ob_shash = -1;
    }
    #define TST_HASH_SIZE sizeof(Py_hash_t)
    _Static_assert(offsetof(PyBytesObject, ob_sval) == offsetof(PyBytesObject, ob_shash) + TST_HASH_SIZE,
                   "the hash of a bytes object lies right before its bytes");
    #pragma GCC diagnostic pop
    """
    const bint TST_HAS_GIL
    const size_t TST_HASH_SIZE
    bint tst_is_alone(PyObject *data)
    void tst_forget_hash(PyObject *data)


cdef tst_shared *share_object(bytes data) except NULL:
    """Bytes of an object for queues, used once; the object lives for as long as one of them holds them."""
    cdef tst_shared *shared = share_if_possible(data)
    if shared == NULL:
        raise MemoryError("no memory to queue output")
    return shared


cdef tst_shared *share_if_possible(bytes data) noexcept:
    """The same, or NULL for want of memory."""
    cdef tst_shared *shared = <tst_shared *>malloc(sizeof(tst_shared))
    if shared != NULL:
        Py_INCREF(data)
        shared.users = 1
        shared.held = NULL
        shared.object = <void *>data
        shared.next = NULL
        shared.bytes = PyBytes_AS_STRING(data)
        shared.size = <size_t>PyBytes_GET_SIZE(data)
        shared.front = TST_HASH_SIZE
        shared.block = 0
    return shared


cdef void unshare_object(tst_shared *shared) noexcept:
    """Gives the first use of an object back."""
    cdef tst_stock own
    memset(&own, 0, sizeof(own))
    shared_leave(shared, &own)
    drop_litter(&own, NULL)


cdef void drop_litter(tst_stock *stock, tst_engine *engine) noexcept:
    """Lets objects go that were queued and are sent. Large ones are kept for messages to come, if `engine` is given."""
    cdef tst_shared *shared = stock_take_litter(stock)
    cdef tst_shared *next
    while shared != NULL:
        next = shared.next
        if tst_rarely(shared.size >= BODY_LEAST) and engine != NULL and tst_is_alone(<PyObject *>shared.object):
            keep_large(engine, shared)
        else:
            drop_shared(shared)
        shared = next


cdef void drop_shared(tst_shared *shared) noexcept:
    Py_DECREF(<object>shared.object)
    free(shared)


# Objects of large messages that nobody holds any more, which the next messages of the same size are received into. The
# C library would give such a block back to the kernel and ask for it anew, page by page, for each message.

cdef bint large_is_wanted(tst_engine *engine, size_t size) noexcept:
    cdef int i
    for i in range(4):
        if engine.large_wanted[i] == size:
            return True
    return False


cdef void want_large(tst_engine *engine, size_t size) noexcept:
    """A message of that size has begun to arrive. Another one may come."""
    if TST_HAS_GIL and not large_is_wanted(engine, size):
        engine.large_wanted[engine.next_wanted % 4] = size
        engine.next_wanted += 1


cdef void keep_large(tst_engine *engine, tst_shared *shared) noexcept:
    """Nobody else has this object. Those that were kept first go, when there are too many."""
    cdef tst_shared **place
    if shared.size > LARGE_SPARES_MOST or not large_is_wanted(engine, shared.size):
        drop_shared(shared)
        return
    shared.users = 1
    shared.held = NULL
    shared.next = engine.large_spares
    engine.large_spares = shared
    engine.large_size += shared.size
    while engine.large_size > LARGE_SPARES_MOST:
        place = &engine.large_spares
        while place[0].next != NULL:
            place = &place[0].next
        drop_shared(unlink_large(engine, place))


cdef void drop_all_large(tst_engine *engine) noexcept:
    while engine.large_spares != NULL:
        drop_shared(unlink_large(engine, &engine.large_spares))


cdef tst_shared *unlink_large(tst_engine *engine, tst_shared **place) noexcept:
    cdef tst_shared *shared = place[0]
    place[0] = shared.next
    shared.next = NULL
    engine.large_size -= shared.size
    return shared


cdef tst_shared *take_large(tst_engine *engine, size_t size) noexcept:
    """One of exactly that size, or NULL."""
    cdef tst_shared **place = &engine.large_spares
    while place[0] != NULL:
        if place[0].size == size:
            return unlink_large(engine, place)
        place = &place[0].next
    return NULL


cdef void keep_if_large(tst_engine *engine, bytes data) noexcept:
    """A handler has returned, whose message that was. Only the caller still has it, if nobody else has."""
    cdef tst_shared *shared
    if tst_rarely(PyBytes_GET_SIZE(data) >= BODY_LEAST) and tst_is_alone(<PyObject *>data):
        shared = share_if_possible(data)
        if shared != NULL:                 # else it goes
            keep_large(engine, shared)


cdef ssize_t tst_send(TstSocket sock, const void *data, size_t size) noexcept nogil:
    return sock.append(<const char *>data if size else &NOWHERE, size, NULL, False)


cdef ssize_t tst_send_message(TstSocket sock, const void *data, size_t size) noexcept nogil:
    return sock.append(<const char *>data if size else &NOWHERE, size, NULL, True)


cdef int tst_close(TstSocket sock) noexcept nogil:
    cdef int began = connection_close_output(sock.connection, sock.generation())
    if began == GONE:
        return -ENOTCONN
    if began:
        shard_ask(sock.connection, sock.generation(), PEND_CLOSE)
    return began


cdef int tst_send_eof(TstSocket sock) noexcept nogil:
    cdef int began = connection_end_output(sock.connection, sock.generation())
    if began == GONE:
        return -ENOTCONN
    if began:
        shard_ask(sock.connection, sock.generation(), PEND_IN)     # the peer may have finished before
    return began


cdef int tst_need_send(TstSocket sock) noexcept nogil:
    return connection_need_send(sock.connection, sock.generation())


cdef int tst_pause(TstSocket sock) noexcept nogil:
    return 0 if connection_mark(sock.connection, STATE_PAUSED, True, STATE_OPEN, sock.generation()) else -ENOTCONN


cdef int tst_resume(TstSocket sock) noexcept nogil:
    if not connection_mark(sock.connection, STATE_PAUSED, False, STATE_OPEN, sock.generation()):
        return -ENOTCONN
    shard_ask(sock.connection, sock.generation(), PEND_ARM)
    return 0


cdef int connection_need_send(tst_connection *connection, uint32_t generation) noexcept nogil:
    """0, or -ENOTCONN when the connection is gone or closing."""
    cdef bint closed
    spin_lock(&connection.lock)
    closed = connection.out_closed or not connection_is(connection, generation)
    spin_unlock(&connection.lock)
    if closed or shard_ask(connection, generation, PEND_OUT) == GONE:
        return -ENOTCONN
    return 0


cdef TstSocket new_socket(TstPool pool, tst_connection *connection):
    """The Python side of a connection that the caller owns."""
    cdef TstSocket sock = make_socket(pool, connection)
    publish_socket(connection, sock)
    return sock


cdef TstSocket make_socket(TstPool pool, tst_connection *connection):
    cdef TstSocket sock = TstSocket.__new__(TstSocket, POOLS_KEY)
    sock.id = connection_id(connection)
    sock.connection = connection
    sock.pool = pool
    sock.limits = connection.limits
    sock.type_number = connection.type
    if connection.peer.family == AF_UNIX:
        sock.peer_path = unix_peer(connection)
    else:
        sock.peer_address = connection.peer
    if connection.framing != NULL:
        sock.own_framing = <Framing>connection.framing.object
    return sock


cdef object unix_peer(tst_connection *connection):
    """The "unix:path" of a peer that has a name. Owner only."""
    cdef sockaddr_storage address
    cdef socklen_t size = sizeof(address)
    return text_of(&address, size) if getpeername(connection.fd, <sockaddr *>&address, &size) == 0 else None


cdef object text_of(sockaddr_storage *address, socklen_t size):
    """What the kernel has written, as users see it. None: no family that has a text."""
    return _net.text_address(address.ss_family, (<const char *>address)[sizeof(address.ss_family):size])


cdef int publish_socket(tst_connection *connection, TstSocket sock) except -1:
    """Others may find it from here on; the slot holds a reference until the connection is gone."""
    Py_INCREF(sock)
    spin_lock(&connection.lock)
    connection.sock = <PyObject *>sock
    spin_unlock(&connection.lock)
    return 0


cdef TstSocket take_socket(tst_connection *connection):
    """The slot lets go of its TstSocket, which is to be let go of with let_socket_go(). None: it had none."""
    cdef TstSocket sock
    # The framing may be the TstSocket's own: what it has to say of the end (connection_should_linger) it says now.
    if connection_is_unfinished(connection):
        connection.unfinished = True
    if framing_cuts(connection.framing):
        connection.bulky = False
    spin_lock(&connection.lock)
    connection.framing = NULL
    held = connection.sock
    connection.sock = NULL
    store_pointer(<void **>&connection.recv, NULL, RELEASE)
    store_pointer(<void **>&connection.send, NULL, RELEASE)
    spin_unlock(&connection.lock)
    connection.compiled = NULL
    if held == NULL:
        return None
    sock = <TstSocket>held
    Py_DECREF(sock)
    return sock


cdef int let_socket_go(TstSocket sock) except -1:
    """A socket whose connection is over lets go of what hangs on it. Whatever that is may run code of the user's."""
    free_state(sock)
    sock.active = None
    sock.reason = None
    sock.user_data = None
    sock.handler = None
    return 0


cdef int let_sockets_go(list socks) except -1:
    """Those that close_down() has taken; no lock is held."""
    for sock in socks:
        if sock is not None:
            let_socket_go(sock)
    return 0


cdef int forget_socket(tst_connection *connection) except -1:
    cdef TstSocket sock = take_socket(connection)
    return 0 if sock is None else let_socket_go(sock)


cdef int make_state(TstSocket sock, TstNogilHandler handler) noexcept:
    """The C state of a connection that begins. Owner only. -ENOMEM: there is none."""
    cdef void *state
    if handler.state_size:
        state = calloc(1, handler.state_size)
        if state == NULL:
            return -ENOMEM
        store_pointer(&sock.state, state, RELEASE)
    sock.state_handler = handler
    return 0


cdef void free_state(TstSocket sock) noexcept:
    """Ends the life of a connection's C state. Owner only."""
    cdef TstNogilHandler handler = sock.state_handler
    cdef void *state = sock.state
    if state != NULL:
        with nogil:
            handler.release(state)
        store_pointer(&sock.state, NULL, RELEASE)
        free(state)
    sock.state_handler = None
