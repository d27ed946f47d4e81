# Worker: a thread's loop, which has the engine find something to do, calls the handler, and gives the result back.

cdef enum:
    SPARES_MOST = 65536                # bytes of the objects that a worker keeps for messages to come

cdef object NOTHING = object()         # "no argument", where None is one

cdef extern from *:
    """
    /* hook(sock, data) without the detour over a bound method, and, if it is a function in Python, over
       PyObject_Vectorcall(), which is a tenth of what calling a small one costs. A new reference, or NULL with an
       exception set. */
    static inline PyObject *tst_call(PyObject *hook, PyObject *sock, PyObject *data) {
        const size_t n = 3 | PY_VECTORCALL_ARGUMENTS_OFFSET;
        PyObject *arguments[] = {NULL, NULL, sock, data};
        if (__builtin_expect(!PyMethod_Check(hook), 0))
            return PyObject_Vectorcall(hook, arguments + 2, 2, NULL);
        arguments[1] = PyMethod_GET_SELF(hook);
        hook = PyMethod_GET_FUNCTION(hook);
        if (__builtin_expect(PyFunction_Check(hook), 1))
            return ((PyFunctionObject *)hook)->vectorcall(hook, arguments + 1, n, NULL);
        return PyObject_Vectorcall(hook, arguments + 1, n, NULL);
    }
    /* A `bytes` of fewer than `most` bytes; NULL is none. */
    static inline int tst_is_small_bytes(PyObject *something, Py_ssize_t most) {
        return __builtin_expect(something != NULL && PyBytes_CheckExact(something), 1)
               && __builtin_expect(PyBytes_GET_SIZE(something) < most, 1);
    }
    /* The exception is set already. */
    static inline int tst_raise(void) { return -1; }
    /* Puts the next message into the bytes object of the last one, if its size is the same and nobody but the caller
       holds it: an object that nobody else can see may change, as it does while bytes are joined. Making and freeing
       one for each message costs a quarter of what calling a small handler does. 0: make a new one. */
    static inline int tst_refill(PyObject *data, const char *place, Py_ssize_t size) {
        if (tst_is_alone(data) && PyBytes_GET_SIZE(data) == size && size > 1) {
            memcpy(PyBytes_AS_STRING(data), place, (size_t)size);
            tst_forget_hash(data);
            return 1;
        }
        return 0;
    }
    """
    PyObject *tst_call(PyObject *hook, PyObject *sock, PyObject *data)
    bint tst_is_small_bytes(PyObject *something, Py_ssize_t most)
    int tst_raise() except -1
    bint tst_refill(PyObject *data, const char *place, Py_ssize_t size)


@cython.final
cdef class Loan:
    """Bytes of the input, read-only, for as long as a handler's call lasts. If the handler keeps a part of the view
    beyond that, the memory is not used again until it lets go."""

    cdef const char *bytes                 # borrowed until the handler returns, then NULL
    cdef size_t size
    cdef uint32_t exports                  # views that are held
    cdef tst_scratch *scratch              # counted: held for views that were kept
    cdef char *storage                     # owned: the same, or a copy of the message alone

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("not to be made by hand")

    def __dealloc__(self):
        scratch_leave(self.scratch)
        free(self.storage)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        # Without a GIL: another thread may ask, by view.obj, or let a part go, while the handler returns.
        with cython.critical_section(self):
            if self.bytes == NULL:
                raise BufferError("the message is gone: its handler has returned")
            PyBuffer_FillInfo(buffer, self, <void *>self.bytes, <Py_ssize_t>self.size, True, flags)
            self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        with cython.critical_section(self):
            self.exports -= 1

    cdef int end(self, tst_connection *connection, tst_batch *batch) except -1:
        """The call is over. What is kept takes the memory with it."""
        cdef tst_input *input = &connection.input
        cdef bint kept
        with cython.critical_section(self):
            self.bytes = NULL
            kept = self.exports != 0
        if not kept or self.storage != NULL or self.size == 0:
            return 0
        if not input_is_stored(input):
            self.scratch = batch.scratch
            add32(&batch.scratch.users, 1, RELAXED)
            return 0
        self.storage = input.storage
        input.storage = NULL
        input.capacity = 0
        if input_keep(input) < 0:
            input_free(input)                  # what is left lies in what is the loan's now
            raise MemoryError("no memory for input")
        return 0


cdef char NOWHERE = 0


cdef Loan new_loan(const tst_input *input, size_t size):
    """The first `size` bytes of the input. Of much that is stored a small message is lent as a copy: if it is kept, all
    that lies behind it in the same memory would have to be copied instead, for each message anew."""
    cdef Loan loan = Loan.__new__(Loan, POOLS_KEY)
    loan.bytes = input.view if size else &NOWHERE      # an empty message needs no memory, and is to keep none
    loan.size = size
    if input.storage != NULL and 0 < size < input.size // 4:
        loan.storage = <char *>malloc(size)
        if loan.storage == NULL:
            raise MemoryError("no memory for a message")
        memcpy(loan.storage, input.view, size)
        loan.bytes = loan.storage
    return loan


cdef int release_view(object view) except -1:
    """From here on using the view raises. Refused while somebody has a buffer of it, like an array: that one stays
    valid."""
    try:
        view.release()
    except BufferError:
        pass
    return 0


@cython.final
cdef class Worker:
    """One worker thread: parks, takes a shard, turns, runs handlers, until the pool has stopped. The only thing that
    touches its tst_worker, except for readers of counters."""

    cdef TstPool pool
    cdef Binding binding                   # its own copy, so that workers do not share reference counts
    cdef tst_engine *engine                # borrowed from the pool
    cdef tst_worker *worker                # borrowed from the engine
    cdef tst_batch *batch                  # borrowed: the one whose entries it runs

    cdef int run(self) except -1:
        cdef tst_shard *shard = NULL
        cdef bint taken_over = False
        cdef int parked
        while True:
            with nogil:
                parked = engine_park(self.engine, self.worker, &shard, &taken_over)
            if parked == PARK_END:
                return 0
            if parked == PARK_IDLE:
                self.idle(NULL)
                shard = NULL
            while shard != NULL:
                shard = self.serve(shard, &taken_over)
            if self.pool.dead:
                return 0                   # a handler has forked, and this is the child

    cdef tst_shard *serve(self, tst_shard *shard, bint *taken_over) except? NULL:
        """Turns a shard until it is taken over by another worker, or has ended, or another shard needs us more.

        Returns that other shard (`taken_over` then), or NULL: there may be a free one to be had by parking.
        """
        cdef tst_batch *batch
        cdef tst_shard *other = NULL
        cdef int turn
        cdef bint ran = False
        batch = self.resume(shard) if taken_over[0] else batch_get(self.engine)
        if batch == NULL:
            if not taken_over[0]:          # no memory: somebody else may have a batch, or we the next time
                self.lack_memory()
                with nogil:
                    shard_yield(self.engine, self.worker, shard)
            return NULL
        taken_over[0] = False
        self.worker.since = clock_now()
        shard.batch = batch
        while True:
            if self.pool.dead:             # a hook has forked, and this is the child
                return NULL
            with nogil:
                turn = shard_turn(self.engine, self.worker, shard, batch, ran)
            ran = False
            if turn == TURN_RUN:
                if stock_has_litter(&shard.stock):
                    drop_litter(&shard.stock, self.engine)
                self.run_batch(shard, batch)
                if self.pool.dead:
                    return NULL
                if self.worker.spare_votes == SPARE_VOTES:
                    self.make_spares()
                if self.worker.accept_errno:
                    self.complain()
                ran = True
            elif turn == TURN_LOST:
                batch_leave(self.engine, batch, 1)     # the token's use goes with the token
                return NULL
            elif turn == TURN_ENDED:
                shard.batch = NULL
                batch_leave(self.engine, batch, 2)
                with nogil:
                    engine_shard_ended(self.engine, shard)
                return NULL
            elif turn == TURN_ELSEWHERE:
                with nogil:
                    other = engine_look(self.engine, self.worker)
                if other == NULL and not turn_elsewhere(self.engine, shard) & ELSEWHERE_FREE:
                    continue
                taken_over[0] = other != NULL
                shard.batch = NULL
                batch_leave(self.engine, batch, 2)
                with nogil:
                    shard_yield(self.engine, self.worker, shard)
                return other
            elif turn == TURN_IDLE:
                self.idle(shard)
                ran = True
            elif turn == TURN_SLOW:
                self.log_slow(shard)
                ran = True
            elif turn == TURN_COMPLAIN:
                shard_enter_running(self.engine, self.worker, shard)
                self.complain()
                ran = True
            elif turn == TURN_LITTER:
                drop_litter(&shard.stock, self.engine)
            elif turn == -ENOMEM:              # nothing to receive into: what a handler keeps has the last one
                self.lack_memory()
            else:
                fault = system_error(-turn, "epoll_wait: " + os.strerror(-turn))
                log(logging.CRITICAL, "%s stops: %s", self.pool.name, fault)
                stop_for(self.pool, fault)

    cdef int lack_memory(self) except -1:
        """It may be there the next time."""
        log_caused(self.pool, "memory", logging.ERROR, "worker %d of %s has no memory to poll with", self.worker.no,
                   self.pool.name)
        time.sleep(0.01)
        return 0

    cdef int make_spares(self) except -1:
        """Objects for the large messages of the next turn, which are likely to be of the size of the last ones."""
        cdef tst_worker *worker = self.worker
        cdef tst_shared *spare
        if worker.spares != NULL and worker.spares.size != worker.spare_size:
            drop_spares(worker)
        while (worker.spares_left + 1) * worker.spare_size <= SPARES_MOST:
            try:
                spare = share_object(PyBytes_FromStringAndSize(NULL, <Py_ssize_t>worker.spare_size))
            except MemoryError:
                return 0                   # messages are received where there is room, as others are
            spare.next = worker.spares
            worker.spares = spare
            worker.spares_left += 1
        return 0

    cdef tst_batch *resume(self, tst_shard *shard) except? NULL:
        """Goes on where a stuck worker was: its batch's handlers that have not run, then the events it did not get to.

        Returns a batch of our own with those events, or NULL when the shard was taken from us in turn.
        """
        cdef tst_batch *stuck = shard.batch
        cdef tst_batch *own
        cdef bint kept
        add32(&stuck.users, 1, ACQUIRE)
        with nogil:
            batch_detach(stuck, &self.worker.stats)
            batch_finish(self.worker, stuck, clock_now())      # replies wait for no handler that may block next
        self.run_batch(shard, stuck)
        if self.pool.dead:
            return NULL
        with nogil:
            batch_finish(self.worker, stuck, clock_now())
            kept = shard_leave_running(self.worker, shard)
        if not kept:
            batch_leave(self.engine, stuck, 1)
            return NULL
        own = batch_get(self.engine)
        while own == NULL:             # events must not be lost: wait until there is memory
            time.sleep(0.01)
            own = batch_get(self.engine)
        own.n_events = stuck.n_events - stuck.next_event
        memcpy(own.events, stuck.events + stuck.next_event, <size_t>own.n_events * sizeof(own.events[0]))
        batch_leave(self.engine, stuck, 2)
        return own

    cdef int run_batch(self, tst_shard *shard, tst_batch *batch) except -1:
        """Runs the handlers of the entries that nobody else runs. Replies that wait for long are sent in between."""
        cdef int i
        cdef tst_entry *left = self.worker.left
        cdef uint64_t flushed = tick_now(&self.worker.ticks)
        self.worker.clock = flushed
        self.batch = batch
        if left != NULL:
            self.worker.left = NULL
            self.run_one(shard, left)
            if self.pool.dead or not token_held(shard, self.worker.no):
                return 0
        for i in range(batch.n_entries):
            if not self.run_one(shard, &batch.entries[i]):
                continue
            if self.pool.dead or not token_held(shard, self.worker.no):
                return 0
            if self.worker.clock - flushed >= RUN_TIME:
                with nogil:
                    batch_finish(self.worker, batch, self.worker.clock)
                if stock_has_litter(&shard.stock):     # what was sent is counted no more: it must not wait either
                    drop_litter(&shard.stock, self.engine)
                self.worker.clock = flushed = tick_now(&self.worker.ticks)
        return 0

    cdef bint run_one(self, tst_shard *shard, tst_entry *entry) except -1:
        """False: another thread runs the entry, or has run it, or it has nothing to be run.

        All of it may be taken over from, as all of it may run code of the user's: hooks, and finalizers of what is let
        go: results, tracebacks, handlers that were replaced, what hung on a TstSocket."""
        if not entry_move(entry, ENTRY_QUEUED, ENTRY_RUNNING):
            return False
        if not token_held(shard, self.worker.no):
            # Who took the shard over may have looked at the entry before it was RUNNING.
            with nogil:
                entry_detach(entry, &self.worker.stats)
        worker_enter(self.worker)
        try:
            self.run_entry(entry)
            if entry.what & DO_RETIRE:     # what has been let go has taken its time, which is no handler's
                self.worker.clock = tick_now(&self.worker.ticks)
        except BaseException as error:
            if self.pool.dead:
                raise
            self.drop_entry(entry, error)
        finally:
            worker_leave(self.worker)
            self.worker.current = NULL
            store32(&entry.state, ENTRY_RAN, RELEASE)
        return True

    cdef int drop_entry(self, tst_entry *entry, object error) except -1:
        """Something failed outside a handler, for want of memory most likely: this connection ends, the worker goes
        on."""
        cdef tst_connection *connection = entry.connection
        cdef bint no_memory = isinstance(error, MemoryError)
        if not no_memory:
            log(logging.ERROR, "the connection with socket %d is broken", connection.fd, exc_info=error)
        connection_break(connection, ENOMEM if no_memory else EIO)
        # A message that there was no memory for is not tried again, nor does what is left of one pass for others.
        connection.windowed = connection.message_ready = False
        input_free(&connection.input)
        connection_forget_frame(connection)
        if connection.sock == NULL or (connection.closing and not no_memory):
            entry.what = DO_RETIRE     # no handler has heard of it, or it was its end that failed
            forget_socket(connection)
        self.worker.clock = tick_now(&self.worker.ticks)
        return 0

    cdef int run_entry(self, tst_entry *entry) except -1:
        """All that is due for one connection: connect, writable, messages, disconnect, in this order."""
        cdef tst_connection *connection = entry.connection
        cdef TstSocket sock
        cdef uint32_t due = entry.what
        store32(<uint32_t *>&connection.thread_no, <uint32_t>self.worker.no, RELAXED)
        self.worker.current = connection
        sock = <TstSocket>connection.sock if connection.sock != NULL else new_socket(self.pool, connection)
        if tst_rarely(due & DO_CONNECT != 0):
            self.adopt_binding(sock)
            self.connect(sock)
        if tst_rarely(connection.report != 0):
            self.report(sock)
        if tst_rarely(due & DO_BODY != 0):
            self.make_body(sock)
        if tst_rarely(due & DO_WRITABLE != 0) and not connection.closing:
            self.writable(sock, due & DO_RELIEF != 0)
        if tst_usually(not due & DO_CONNECT):
            self.read_messages(sock, connection.events)
            if tst_rarely(connection.owes_relief):
                self.binding_of(sock)          # the one that was assigned is to be told now, if that message is through
            due = connection_due(connection)
            if tst_rarely(due & DO_EOF != 0):
                self.eof(sock)
                due = connection_due(connection)
        elif connection.closing:
            due = connection_due(connection)
        if self.pool.dead:
            return 0
        if tst_rarely(due & DO_DISCONNECT != 0) and self.disconnect(sock):
            entry.what = DO_RETIRE
        else:
            connection_keep_input(connection)
        return 0

    cdef Binding binding_of(self, TstSocket sock):
        """The socket's handler as it is now; the pool's as this worker's own copy of it."""
        if tst_rarely(load32(&sock.connection.rebind, RELAXED) != 0) and sock.connection.body == NULL:
            self.adopt_binding(sock)
            self.worker.clock = tick_now(&self.worker.ticks)   # the one before it may have taken long to go
        return self.binding if sock.active is None else sock.active

    cdef int make_body(self, TstSocket sock) except -1:
        """A long message has begun: from here on it is received straight into the object that the handler gets."""
        cdef tst_connection *connection = sock.connection
        cdef tst_shared *body
        self.binding_of(sock)                  # an assigned handler is to get it, and may not want an object
        if not connection_wants_body(connection):
            return 0
        want_large(self.engine, connection.frame.size)
        body = take_large(self.engine, connection.frame.size)
        if body == NULL:
            try:
                body = share_object(PyBytes_FromStringAndSize(NULL, <Py_ssize_t>connection.frame.size))
            except MemoryError as error:
                self.failed(sock, self.binding_of(sock), error)
                return 0
        connection_begin_body(connection, body)
        # Most of the rest is likely to be there. Received, run and sent at once, it does not leave the cache meanwhile.
        with nogil:
            take_input(connection, self.batch, self.worker, True, self.worker.clock)
        self.worker.clock = tick_now(&self.worker.ticks)       # that was no handler's time
        return 0

    cdef int adopt_binding(self, TstSocket sock) except -1:
        """The connection is new, or its sock.handler was assigned: from here on that is its handler."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding, source
        store32(&connection.rebind, 0, SEQ_CST)        # before the look: what is assigned later sets it again
        with cython.critical_section(sock):
            binding = sock.binding
        source = self.pool.binding if binding is None else binding
        if source.compiled.handler != <void *>sock.state_handler:
            if connection.compiled != NULL and connection.connected:   # it must forget a socket that it knows
                self.notify(sock, connection.compiled, connection.compiled.disconnected)
            free_state(sock)
            if source.compiled.handler != NULL and make_state(sock, <TstNogilHandler>source.compiled.handler) < 0:
                log_caused(self.pool, "state", logging.ERROR, "socket %d is closed: no memory for the %d bytes of its "
                           "handler's state", sock.sd, (<TstNogilHandler>source.compiled.handler).state_size)
                connection_break(connection, ENOMEM)
                connection_begin_close(connection)
        connection.compiled = NULL if sock.state_handler is None else &source.compiled
        sock.active = binding
        connection.passed_on = 0           # the handler that was there before has done it
        if source.compiled.handler == self.pool.binding.compiled.handler:
            connection.told_pools = False  # it is the connection's handler now, and will hear of its end as such
        connection.hears_end &= HEARD_END
        if connection.compiled != NULL or source.on_eof is not None:
            connection.hears_end |= HEARS_END
        # Not a function or a compiled handler: there EPOLLOUT answers need_send or SEND, and nothing else.
        connection.tell_room = connection.compiled == NULL and source.on_writable is not None
        if connection.owes_relief and connection.tell_room:
            connection_owe_relief(connection)
        connection.owes_relief = False
        return 0

    cdef bint connect(self, TstSocket sock) except -1:
        """on_connect. A connection that is refused closes like any other, but was never connected for on_disconnect."""
        cdef Binding binding = self.binding_of(sock)
        cdef object hook = binding.on_connect if binding.on_connect is not None else self.binding.on_connect
        cdef int stat = TST_RUN
        if sock.connection.closing or load32(&self.engine.phase, ACQUIRE) != PHASE_RUNNING:
            connection_begin_close(sock.connection)
            return False
        sock.connection.connected = True
        if sock.connection.compiled != NULL:
            stat = self.notify(sock, sock.connection.compiled, sock.connection.compiled.connected)
        if stat != TST_RUN:
            hook = None
            if stat <= TST_SEND:
                connection_apply(sock.connection, self.worker, stat)
        if hook is not None:
            result = self.call(sock, binding, hook, NOTHING)
            stat = stat_from(result) if is_stat(result) else TST_SUSPEND
            if stat <= TST_SEND:
                self.apply(sock, binding, result)
        if stat > TST_SEND:
            sock.connection.connected = False
            count(&self.worker.stats.rejected, 1)
            connection_apply(sock.connection, self.worker, TST_DISCONNECT)
            connection_begin_close(sock.connection)
        return True

    cdef int notify(self, TstSocket sock, const tst_compiled *compiled, tst_notified hook) except -1:
        """Calls a hook of that compiled handler, other than `received`. Returns its TstStat."""
        cdef int stat
        with nogil:
            stat = hook(compiled.handler, <void *>sock)
            worker_goes_on(self.worker)
            worker_job(self.engine, self.worker, sock.connection, 1)
        if sock.connection.report:
            self.report(sock)
        return stat if stat >= 0 else TST_DISCONNECT

    cdef int read_messages(self, TstSocket sock, uint32_t events) except -1:
        """Hands out the whole messages that are there, up to a fair share of time."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding
        cdef uint64_t began = self.worker.clock
        cdef uint64_t n = 0
        # What its compiled handler has passed on is on its way: a pause() in that handler holds back the next one only.
        while (tst_rarely(connection.passed_on & PASSED_MESSAGE != 0) and connection_has_message(connection)
               or connection_cut(connection)):
            binding = self.binding_of(sock)
            if tst_rarely(connection.compiled != NULL) and not connection.passed_on & PASSED_MESSAGE:
                if not self.run_compiled_messages(sock):
                    break
            connection.passed_on &= PASSED_WRITABLE
            store32(&connection.events, (events & (_EPOLLPRI | _EPOLLRDHUP)) | _EPOLLIN, RELAXED)
            if tst_rarely(connection.too_large) and connection.framed:
                self.refuse(sock, binding)
                break
            elif binding is self.binding and self.pool.copy and is_quick(connection) and binding.on_message is not None:
                n += self.quick_messages(sock, binding, began)
                if self.worker.clock - began >= RUN_TIME or not connection.message_ready:
                    break
                continue
            elif not self.message(sock, binding):
                n += 1
                break
            n += 1
            if n >= self.worker.burst and self.worker.clock - began >= RUN_TIME:
                break
        if tst_rarely(connection.expects != 0):
            join_reply(connection)
        count(&self.worker.stats.messages, n)
        return 0

    cdef uint64_t quick_messages(self, TstSocket sock, Binding binding, uint64_t began) except? 0:
        """The straight way from the input to the pool's on_message and back, for what most connections do:
        read_messages without the questions whose answers is_quick knows. Returns how many messages it handed out."""
        cdef tst_connection *connection = sock.connection
        cdef tst_worker *worker = self.worker
        cdef PyObject *hook = <PyObject *>binding.on_message
        cdef PyObject *result
        cdef const char *place = NULL
        cdef size_t size
        cdef ssize_t queued
        cdef uint64_t n = 0, untimed = 0
        cdef bytes data = b""
        while True:
            if tst_rarely(connection.body != NULL):
                data = take_body(connection)
                connection.message_ready = connection.framed = False
                connection.frame.needed = 0
            else:
                size = message_at_hand(connection, &place)
                if not tst_refill(<PyObject *>data, place, <Py_ssize_t>size):
                    data = PyBytes_FromStringAndSize(place, <Py_ssize_t>size)
                if tst_rarely(size >= SPARE_LEAST):
                    connection_expect(connection, worker, size)
                message_take(connection, size)
            n += 1
            result = tst_call(hook, <PyObject *>sock, <PyObject *>data)
            worker_goes_on(worker)
            connection.windowed = False
            untimed += 1
            if untimed >= worker.group:
                worker_job(self.engine, worker, connection, untimed)
                untimed = 0
            if tst_is_small_bytes(result, SHARE_LEAST) and not tst_rarely(connection_send(connection) != NULL):
                queued = sock.append(PyBytes_AS_STRING(<object>result), <size_t>PyBytes_GET_SIZE(<object>result), NULL,
                                     True)
                if tst_rarely(queued < 0):
                    self.unsent_reply(sock, binding, <object>result, queued)
                Py_DECREF(<object>result)
            else:
                self.other_result(sock, binding, result)
            if tst_rarely(connection.report != 0):     # not before: hooks that run while an exception waits lose it
                self.report(sock)
            if tst_rarely(n >= worker.burst) and worker.clock - began >= RUN_TIME:
                break
            if not connection_cut(connection) or tst_rarely(load32(&connection.rebind, RELAXED) != 0) or tst_rarely(
                    not is_quick(connection)):
                break
        if untimed:
            worker_job(self.engine, worker, connection, untimed)
            if connection.report:
                self.report(sock)
        keep_if_large(self.engine, data)
        return n

    cdef int other_result(self, TstSocket sock, Binding binding, PyObject *result) except -1:
        """What on_message has returned, when it is no small reply: a reference that is ours, or NULL with an exception
        set."""
        cdef uint64_t clock = self.worker.clock
        cdef uint64_t began
        if result == NULL:
            began = tick_now(&self.worker.ticks)
            try:
                tst_raise()
            except BaseException as error:
                self.failed(sock, binding, error)
            self.leave_out(clock, began)       # what its traceback holds may take long to go, too
            self.send_what_was_asked_for(sock)
        elif result == <PyObject *>None:
            self.send_what_was_asked_for(sock)
        else:
            self.apply(sock, binding, <object>result)
        Py_XDECREF(result)
        return 0

    cdef bint run_compiled_messages(self, TstSocket sock) except -1:
        """True: there is a message that its compiled handler has passed on, or that is too large for its framing."""
        cdef bint passed
        with nogil:
            passed = run_messages(self.engine, self.worker, sock.connection)
        if sock.connection.report:
            self.report(sock)
        return passed

    cdef bint message(self, TstSocket sock, Binding binding) except -1:
        """One message. False: a function left it unread, so it is to be called again, after the others."""
        cdef tst_connection *connection = sock.connection
        cdef bint whole = connection.framed or connection_awaits_transfer(connection)
        cdef bint handed_out
        connection.message_ready = False
        connection.has_read = False
        if not connection.framed:
            return self.hand_out(sock, binding, whole)
        if connection.body != NULL:
            return self.hand_out_body(sock, binding)
        frame_open(connection)
        handed_out = self.hand_out(sock, binding, True)
        frame_close(connection)
        return handed_out

    cdef bint hand_out_body(self, TstSocket sock, Binding binding) except -1:
        """A long message, which has arrived in an object of its own."""
        cdef tst_connection *connection = sock.connection
        cdef bytes body = take_body(connection)
        if binding.function is not None:
            give_back(connection, body)
            self.function_message(sock, binding, True)
        else:
            self.hand_over(sock, binding, body, True)
            keep_if_large(self.engine, body)
        frame_close(connection)
        return True

    cdef bint refuse(self, TstSocket sock, Binding binding) except -1:
        """The peer sends a message longer than allowed: on_error hears of it, and the connection closes anyway."""
        count(&self.worker.stats.too_large_closed, 1)
        sock.connection.message_ready = False
        sock.connection.unfinished = True      # it is still sending: what it is told must survive that (linger)
        input_free(&sock.connection.input)
        self.failed(sock, binding, MessageTooLarge(f"the peer's message is longer than {sock.own_framing!r} allows"))
        connection_begin_close(sock.connection)
        return True

    cdef bint hand_out(self, TstSocket sock, Binding binding, bint whole) except -1:
        """Gives the message at hand to whoever it is for. `whole`: to be handed out once, read or not."""
        if binding.function is not None:
            return self.function_message(sock, binding, whole)
        if self.pool.copy:
            return self.hand_over(sock, binding, self.payload(sock, whole), whole)
        return self.lend(sock, binding, whole)

    cdef bint hand_over(self, TstSocket sock, Binding binding, object data, bint whole) except -1:
        """Calls on_message with the message as bytes, which are gone from the input."""
        cdef tst_connection *connection = sock.connection
        cdef object view = None
        if binding.on_message is None:
            return True
        if not self.pool.copy:
            view = memoryview(data)
        result = self.call(sock, binding, binding.on_message, data if view is None else view)
        if binding is self.binding or not is_run(result):
            self.apply(sock, binding, result)
        elif self.binding.function is None:
            verdict = self.message_to_pool(sock, data if view is None else view)
            self.apply(sock, self.binding, verdict)
        else:
            if not whole or connection.windowed:
                give_back(connection, data)
            self.function_message(sock, self.binding, whole)
        if view is not None:
            release_view(view)             # a part of it that the handler kept holds the bytes object
        return True

    cdef bint lend(self, TstSocket sock, Binding binding, bint whole) except -1:
        """Calls on_message with a view of the message where it lies (copy=False), and takes it back afterwards."""
        cdef tst_connection *connection = sock.connection
        cdef bint transfer = not connection.windowed and whole
        cdef bint framed = connection.windowed
        cdef size_t size
        cdef Loan loan = None
        if binding.on_message is None:
            sock.took(sock.unread())
            return True
        size = sock.unread()
        if transfer:
            begin = connection_recv(connection).req_pos
            view = memoryview(sock.recv_data)[begin:begin + connection_recv(connection).req_len].toreadonly()
        else:
            loan = new_loan(&connection.input, size)
            view = memoryview(loan)
            connection.windowed = True     # reading gets nothing while the message is lent
            connection.frame.size = 0
        try:
            result = self.call(sock, binding, binding.on_message, view)
            passed_on = binding is not self.binding and is_run(result)
            if passed_on and self.binding.function is None:
                result = self.message_to_pool(sock, view)
            if isinstance(result, memoryview):     # of the message, perhaps, which is taken back below
                self.apply(sock, self.binding if passed_on else binding, result)
                result = None
        finally:                               # whatever fails, the memory is taken back before it is used again
            release_view(view)
            if loan is not None:
                connection.windowed = framed
                connection.frame.size = size
                loan.end(connection, self.batch)
        if passed_on and self.binding.function is not None:
            return self.function_message(sock, self.binding, whole)
        if loan is not None:
            sock.took(size)
        self.apply(sock, self.binding if passed_on else binding, result)
        return True

    cdef object message_to_pool(self, TstSocket sock, object data):
        """A socket's own handler has passed a message on (TstStat.RUN) to the pool's TstHandler, the compiled part of
        it if that is for any connection. Returns what it has returned, to be applied when `data` is not needed any
        more."""
        cdef const tst_compiled *compiled = &self.pool.binding.compiled
        cdef Py_buffer view
        cdef int stat = TST_RUN
        if is_for_any_connection(compiled):
            sock.connection.told_pools = True
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            with nogil:
                stat = compiled.received(compiled.handler, <void *>sock, <const char *>view.buf, <size_t>view.len)
                worker_goes_on(self.worker)
            PyBuffer_Release(&view)
            if stat != TST_RUN:
                return stat
        return None if self.binding.on_message is None else self.call(sock, self.binding, self.binding.on_message, data)

    cdef bint function_message(self, TstSocket sock, Binding binding, bint whole) except -1:
        """A message for a function, which reads it itself. False: it did not, so it is to be called again."""
        cdef tst_connection *connection = sock.connection
        cdef bint transfer = whole and not connection.windowed
        cdef tst_data *recv = connection_recv(connection)
        cdef size_t begin = data_read(recv, &recv.req_pos) if transfer else 0
        cdef size_t size = data_read(recv, &recv.req_len) if transfer else 0
        if recv != NULL:
            data_set_unread(recv, 0 if transfer else sock.unread())
        result = self.call(sock, binding, binding.function, NOTHING)
        if binding is not self.binding and is_run(result):
            if self.binding.function is None:
                if whole or sock.unread():
                    # The transfer as it was: the function may have asked for the next one.
                    data = self.transferred(sock, begin, size) if transfer else self.unread_input(sock)
                    verdict = self.message_to_pool(sock, data)
                    self.apply(sock, self.binding, verdict)
                    return True
            else:
                return self.function_message(sock, self.binding, whole)
        self.apply(sock, binding, result)
        if whole or connection.has_read or connection.closing or connection.hold_input or (
                connection_awaits_transfer(connection)):
            return True
        if not connection_takes_messages(connection):      # it has paused the socket, say: it is to have it later
            connection.message_ready = True
            return False
        if connection.end_of_input:
            input_free(&connection.input)      # the handler has seen it and does not want it, and no more will come
            return True
        count(&self.worker.stats.spins, 1)
        connection.message_ready = connection.untouched = True
        return False

    cdef object payload(self, TstSocket sock, bint whole):
        """The message as bytes: the transfer that was asked for, the message of its frame, or all that has arrived."""
        cdef tst_data *data = connection_recv(sock.connection)
        if whole and not sock.connection.windowed:
            return self.transferred(sock, data_read(data, &data.req_pos), data_read(data, &data.req_len))
        return self.unread_input(sock)

    cdef object transferred(self, TstSocket sock, size_t begin, size_t size):
        """A part of what `recv_data` holds; less where its buffer has been made shorter meanwhile."""
        cdef tst_data *data = connection_recv(sock.connection)
        data_hold(data)
        begin = min(begin, data.s_len)
        size = min(size, data.s_len - begin) if data.s != NULL else 0
        try:
            return PyBytes_FromStringAndSize(data.s + begin, <Py_ssize_t>size) if size else b""
        finally:
            data_unpin(data, 0, 0)

    cdef object unread_input(self, TstSocket sock):
        """The message at hand, or all that has arrived, as bytes, which are gone from the input."""
        cdef tst_connection *connection = sock.connection
        data = PyBytes_FromStringAndSize(connection.input.view, <Py_ssize_t>sock.unread())
        sock.took(sock.unread())
        return data

    cdef int writable(self, TstSocket sock, bint relief) except -1:
        """on_writable. `relief`: only because less than low_water waits, and its handler has not asked."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding = self.binding_of(sock)
        cdef object hook = binding.function if binding.function is not None else binding.on_writable
        cdef int stat
        if relief and not connection.tell_room:        # of the handler that was assigned
            connection.owes_relief = load32(&connection.rebind, RELAXED) != 0      # a long message is the old one's
            return 0
        store32(&connection.events, _EPOLLOUT, RELAXED)
        if connection.compiled != NULL and not connection.passed_on & PASSED_WRITABLE:
            stat = self.notify(sock, connection.compiled, connection.compiled.writable)
            if stat != TST_RUN:
                connection_apply(connection, self.worker, stat)
                return 0
        connection.passed_on &= PASSED_MESSAGE
        if hook is not None:
            result = self.call(sock, binding, hook, NOTHING)
            if binding is not self.binding and is_run(result):
                result = self.writable_of_pool(sock)
                binding = self.binding
            self.apply(sock, binding, result)
        return 0

    cdef int eof(self, TstSocket sock) except -1:
        """on_eof. Where there is none it is as if nobody had wanted to hear of it."""
        cdef tst_connection *connection = sock.connection
        cdef const tst_compiled *pools = &self.pool.binding.compiled
        cdef Binding binding
        cdef object result
        connection_drop_body(connection)       # nobody will get it; an assigned handler need not wait for its rest
        binding = self.binding_of(sock)
        if not connection.hears_end & HEARS_END:
            return 0
        connection.hears_end |= HEARD_END
        store32(&connection.events, _EPOLLRDHUP, RELAXED)
        result = self.tell_eof(sock, binding, connection.compiled)
        if binding is not self.binding and binding.on_eof is not None and is_run(result):
            binding = self.binding
            if is_for_any_connection(pools):
                connection.told_pools = True
            result = self.tell_eof(sock, binding, pools if connection.told_pools else NULL)
        if is_run(result):
            connection.hears_end = 0
            result = None
        self.apply(sock, binding, result)
        return 0

    cdef object tell_eof(self, TstSocket sock, Binding binding, const tst_compiled *compiled):
        """Tells that handler, the compiled part of it first. TST_RUN: it has no hook for that, or passes it on."""
        cdef int stat = TST_RUN
        if compiled != NULL:
            stat = self.notify(sock, compiled, compiled.eof)
        if stat != TST_RUN or binding.on_eof is None:
            return stat
        return self.call(sock, binding, binding.on_eof, NOTHING)

    cdef object writable_of_pool(self, TstSocket sock):
        """As message_to_pool(): a socket's own handler has passed it on that there is room for output."""
        cdef const tst_compiled *compiled = &self.pool.binding.compiled
        cdef object hook = self.binding.function if self.binding.function is not None else self.binding.on_writable
        cdef int stat = TST_RUN
        if is_for_any_connection(compiled):
            sock.connection.told_pools = True
            stat = self.notify(sock, compiled, compiled.writable)
        if stat != TST_RUN:
            return stat
        return None if hook is None else self.call(sock, self.binding, hook, NOTHING)

    cdef bint disconnect(self, TstSocket sock) except -1:
        """on_disconnect, and the end of the TstSocket's life in the table. False: the handler has reconnected it."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding
        cdef object hook
        cdef int error = connection.reason or <int>load32(&connection.out_error, RELAXED)
        cdef bint connected
        connection_drop_body(connection)       # nobody will get it; an assigned handler need not wait for its rest
        binding = self.binding_of(sock)
        hook = binding.on_disconnect if binding.on_disconnect is not None else self.binding.on_disconnect
        reason, sock.reason = sock.reason, None
        if reason is None and error:
            reason = system_error(error)
        # First of all: should anything here fail for want of memory, it is tried again, but a hook is called once.
        connected, connection.connected = connection.connected, False
        if connected and connection.compiled != NULL:
            self.notify(sock, connection.compiled, connection.compiled.disconnected)
        if connection.told_pools:
            connection.told_pools = False
            self.notify(sock, &self.pool.binding.compiled, self.pool.binding.compiled.disconnected)
        if connected and hook is not None:
            result = self.call(sock, binding, hook, reason)
            # Not while the pool stops: nobody would ask the fresh connection to close.
            if (isinstance(result, int) and stat_from(result) == TST_RECONNECTED
                    and load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING):
                connection_reconnect(connection)
                connection.connected = True
                if connection.compiled != NULL:        # it was told that it is through: it begins anew
                    connection.compiled = NULL
                    free_state(sock)
                    store32(&connection.rebind, 1, RELEASE)
                return False
        store32(&sock.sent_whole, connection_sent_whole(connection), RELEASE)
        forget_socket(connection)
        return True

    cdef object call(self, TstSocket sock, Binding binding, object hook, object argument):
        """Calls hook(sock), or hook(sock, argument), measures it, and deals with what it raises; then the result is
        None, and the connection closes unless on_error says else."""
        try:
            result = hook(sock) if argument is NOTHING else hook(sock, argument)
        except BaseException as error:
            self.failed(sock, binding, error)
            result = None
        worker_goes_on(self.worker)
        worker_job(self.engine, self.worker, sock.connection, 1)
        if sock.connection.report:
            self.report(sock)
        return result

    cdef void leave_out(self, uint64_t clock, uint64_t began) noexcept:
        """What has run since `began` is no handler's job: the one under way, or the next, began that much later.
        `clock`: the worker's, then."""
        worker_goes_on(self.worker)
        self.worker.clock = clock + (tick_now(&self.worker.ticks) - began)

    cdef int report(self, TstSocket sock) except -1:
        """on_slow and on_most_elapsed for a job that has ended."""
        cdef uint64_t elapsed = sock.connection.report
        sock.connection.report = 0
        try:
            if elapsed == self.worker.stats.most_elapsed and self.binding.on_most_elapsed is not None:
                self.binding.on_most_elapsed(sock, elapsed / 1e9)
            if elapsed >= self.engine.slow_handler and self.binding.on_slow is not None:
                self.binding.on_slow(sock, elapsed / 1e9)
        except BaseException as error:
            count(&self.worker.stats.handler_errors, 1)
            log_caused(self.pool, type(error), logging.ERROR, "on_slow raised", exc_info=error)
        worker_goes_on(self.worker)
        self.worker.clock = tick_now(&self.worker.ticks)       # their time is no handler's
        return 0

    cdef int apply(self, TstSocket sock, Binding binding, object result) except -1:
        """Does what a handler's return value says."""
        if result is None:
            self.send_what_was_asked_for(sock)
            return 0
        if isinstance(result, (bytes, bytearray, memoryview)):
            self.send_what_was_asked_for(sock)
            return self.reply(sock, binding, result)
        if not is_stat(result):
            what = type(result).__name__
            if isinstance(result, int):
                what = "a number that is none of them, such as the count that send() returns"
            wrong = TypeError(f"a handler returns None, bytes or a TstStat, not {what}")
            self.failed(sock, binding, wrong)
            return 0
        connection_apply(sock.connection, self.worker, stat_from(result))
        return 0

    cdef void send_what_was_asked_for(self, TstSocket sock) noexcept:
        """By req_len of its send_data (S10)."""
        if connection_send(sock.connection) != NULL:
            connection_apply(sock.connection, self.worker, TST_SUSPEND)

    cdef int reply(self, TstSocket sock, Binding binding, object message) except -1:
        """A handler has returned bytes: they go out as one message."""
        cdef ssize_t queued
        try:
            queued = sock.append_object(message, True)
        except Exception as error:
            self.failed(sock, binding, error)
            return 0
        if queued < 0:
            self.unsent_reply(sock, binding, message, queued)
        return 0

    cdef int unsent_reply(self, TstSocket sock, Binding binding, object message, ssize_t queued) except -1:
        """It could not be queued, for the reason `queued`."""
        if queued == -ENOTCONN:            # closed meanwhile: nobody waits for the reply
            return 0
        try:
            sock.raise_unsent(queued, message)
        except Exception as error:
            self.failed(sock, binding, error)
        return 0

    cdef int failed(self, TstSocket sock, Binding binding, object error) except -1:
        """A hook raised: on_error, then the socket is disconnected, unless on_error says SUSPEND."""
        cdef object hook = (binding if isinstance(binding.handler, TstHandler) else self.binding).on_error
        cdef uint64_t clock = self.worker.clock
        cdef uint64_t began
        if self.pool.dead:
            raise error                    # in a forked child: it is for whoever forked
        count(&self.worker.stats.handler_errors, 1)
        verdict = None
        began = tick_now(&self.worker.ticks)
        try:
            verdict = hook(sock, error)
        except BaseException as second:
            count(&self.worker.stats.handler_errors, 1)
            log_caused(self.pool, type(second), logging.ERROR, "on_error raised on socket %d", sock.sd, exc_info=second)
        self.leave_out(clock, began)
        if isinstance(verdict, int) and stat_from(verdict) == TST_SUSPEND:
            return 0
        sock.reason = error
        connection_apply(sock.connection, self.worker, TST_DISCONNECT)     # with what on_error has put into send_data
        return 0

    cdef int idle(self, tst_shard *shard) except -1:
        """on_idle; with the shard it polls open to take-over, for the hook may block."""
        if shard != NULL:
            shard_enter_running(self.engine, self.worker, shard)
        worker_enter(self.worker)
        try:
            if self.binding.on_idle is not None:
                self.binding.on_idle(self.worker.no)
        except BaseException as error:
            count(&self.worker.stats.handler_errors, 1)
            log(logging.ERROR, "on_idle raised", exc_info=error)
        finally:
            worker_leave(self.worker)
        return 0

    cdef int log_slow(self, tst_shard *shard) except -1:
        """Logs where handlers are that have been stuck for slow_handler; open to take-over, as in idle()."""
        cdef bint again = False
        cdef int no
        shard_enter_running(self.engine, self.worker, shard)
        worker_enter(self.worker)
        store64(&self.worker.slow_logged, self.worker.calls, RELAXED)      # this call is none of a handler
        try:
            no = slow_next(self.engine, 0, &again)
            while no >= 0:
                log_caused(self.pool, "stuck", logging.WARNING, "%s-%d has been in a handler for %.3f s and more%s",
                           self.pool.name, no, self.engine.slow_handler / 1e9, stack_of(self.engine.workers[no].ident))
                no = slow_next(self.engine, no + 1, &again)
        except BaseException as error:
            log(logging.ERROR, "a slow handler could not be logged", exc_info=error)
        finally:
            worker_leave(self.worker)
        if again:
            store64(&self.engine.slow_look, clock_now() + self.engine.slow_handler, RELEASE)
        return 0

    cdef int complain(self) except -1:
        """accept has failed: one line a second at most, however often it fails. The log may block, as a hook may: the
        shard, if it is ours, is RUNNING; and nobody else goes there meanwhile."""
        cdef int number = self.worker.accept_errno
        text = "there are max_connections of them" if number == EUSERS else os.strerror(number)
        self.worker.accept_errno = 0
        worker_enter(self.worker)
        if not exchange32(&self.engine.complaining, 1, ACQ_REL):
            if not self.engine.complained or clock_now() - self.engine.complained >= 1_000_000_000:
                self.engine.complained = clock_now()
                log(logging.WARNING, "%s accepts no more connections for now: %s", self.pool.name, text)
            store32(&self.engine.complaining, 0, RELEASE)
        worker_leave(self.worker)
        return 0


cdef object stack_of(unsigned long ident):
    """Where a thread is, on lines of their own. Without a GIL its frames may change while one looks: then nothing."""
    frame = sys._current_frames().get(ident) if gil_is_on() else None
    return "" if frame is None else ":\n" + "".join(traceback.format_stack(frame)).rstrip()


cdef void drop_spares(tst_worker *worker) noexcept:
    """Lets go of objects for messages that have not come."""
    cdef tst_shared *spare
    while worker.spares != NULL:
        spare = worker.spares
        worker.spares = spare.next
        spare.next = NULL
        unshare_object(spare)
    worker.spares_left = 0


cdef Worker new_worker(TstPool pool, int no):
    cdef Worker worker = Worker.__new__(Worker)
    worker.pool = pool
    worker.engine = pool.engine
    worker.worker = &pool.engine.workers[no]
    worker.worker.ident = PyThread_get_thread_ident()
    worker.worker.tid = gettid()
    worker.binding = bind(pool.binding.handler, pool.hooks)
    return worker


cdef void frame_open(tst_connection *connection) noexcept:
    """The handler is about to be given the message at hand: what is before it is dropped; it may read no further."""
    input_consume(&connection.input, connection.frame.begin)
    connection.frame.whole -= connection.frame.begin
    connection.windowed = True


cdef void frame_close(tst_connection *connection) noexcept:
    """The handler has had its message: what it did not read of it, and what is behind it, is dropped."""
    input_consume(&connection.input, min(connection.frame.whole, connection.input.size))
    connection.windowed = connection.framed = False
    connection.frame.needed = 0


cdef bint is_quick(tst_connection *connection) noexcept:
    """The message at hand is there as it is: it is no transfer, not too large, and no compiled handler's."""
    if tst_rarely(connection.compiled != NULL) or (tst_rarely(connection.too_large) and connection.framed):
        return False
    return connection.framed or not connection_awaits_transfer(connection)


cdef bytes take_body(tst_connection *connection):
    """The message at hand, which has arrived in an object of its own; the handler can read no more of it."""
    cdef tst_shared *shared = connection.body
    cdef bytes body
    if shared.object == NULL:              # a block: a compiled handler has passed the message on
        body = PyBytes_FromStringAndSize(shared.bytes, <Py_ssize_t>shared.size)
        connection_had_body(connection)
        shared_leave(shared, connection.out.stock)
    else:
        body = <bytes>shared.object
        tst_forget_hash(<PyObject *>shared.object)     # a header may lie there, or it was another message before
        connection_had_body(connection)
        unshare_object(shared)
    connection.windowed = True
    return body


cdef void join_reply(tst_connection *connection) noexcept:
    """A reply that lies in an object of its own gets its header there, too, now that nobody else has that object."""
    cdef tst_shared *shared = NULL
    spin_lock(&connection.lock)
    if not connection.flushing and not connection.want_out:
        shared = queue_headed(&connection.out)
    if shared != NULL and tst_is_alone(<PyObject *>shared.object):
        queue_join(&connection.out)
    spin_unlock(&connection.lock)


cdef void message_take(tst_connection *connection, size_t size) noexcept:
    """The message at hand, of `size` bytes, was copied: it is gone from the input, and the handler can read no more of
    it."""
    connection.message_ready = False
    connection.windowed = connection.framed
    if not connection.framed:
        input_consume(&connection.input, size)
        return
    input_consume(&connection.input, connection.frame.whole)
    connection.framed = False
    connection.frame.begin = connection.frame.size = connection.frame.whole = connection.frame.needed = 0


cdef int give_back(tst_connection *connection, bytes data) except -1:
    """A message that was taken as bytes can be read by a function after all."""
    cdef size_t size = <size_t>PyBytes_GET_SIZE(data)
    check(input_unread(&connection.input, PyBytes_AS_STRING(data), size), "no memory for input")
    if connection.windowed:
        connection.frame.size += size
        connection.frame.whole += size
    return 0


cdef bint is_for_any_connection(const tst_compiled *compiled) noexcept:
    """There is such a compiled handler, and it has no C state for each connection, which another's has not."""
    return compiled.handler != NULL and (<TstNogilHandler>compiled.handler).state_size == 0


cdef bint is_run(object result) except -1:
    return isinstance(result, int) and stat_from(result) == TST_RUN
