# TstPool: its parameters, listeners and connections, its start and stop. What its workers do is in _worker.pxi.

cdef dict TRIGGERS = {"level": TRIGGER_LEVEL, "oneshot": TRIGGER_ONESHOT, "edge": TRIGGER_EDGE}
cdef object THE_POOLS = object()       # "the pool's", where None means "none"


cdef bint connection_waits(tst_connection *connection) noexcept nogil:
    """Its input lies in the kernel, and nothing but a worker is missing. With the lock held nobody closes the
    descriptor."""
    cdef bint waits
    spin_lock(&connection.lock)
    waits = (load64(&connection.state, ACQUIRE) & (STATE_OPEN | STATE_PAUSED) == STATE_OPEN
             and connection.type != TYPE_LISTEN and sys_unread(connection.fd) != 0)
    spin_unlock(&connection.lock)
    return waits


cdef bint gil_is_on() except -1:
    return getattr(sys, "_is_gil_enabled", lambda: True)()


# Pools that have descriptors, for the interpreter's exit and for forks: {address: weak reference}. Each change is one
# step of C, as no lock may be held here: a signal handler that comes in between may call any other pool's stop().
cdef dict _open = {}


cdef class PoolMutex:
    """A pool's mutex. A thread that holds it may be interrupted by itself: by a signal handler, or a finalizer that the
    garbage collector runs, which calls the pool in its turn. `with` says whether that is so.

    What is in the middle of start() or listen() then is good enough for all but stop(), which waits until it is over.
    """

    cdef object lock
    cdef int depth

    def __cinit__(self):
        self.lock = threading.RLock()

    def __enter__(self):
        self.lock.acquire()
        self.depth += 1
        return self.depth > 1

    def __exit__(self, *exc_info):
        self.depth -= 1
        self.lock.release()


cdef class Latch:
    """What comes once: the end of one run of a pool, or of making its threads.

    As a threading.Event, with one difference: it has no lock that a thread would hold while it waits, so that a signal
    handler which interrupts that may wait too, or may raise.
    """

    cdef object lock           # held until then
    cdef uint32_t over         # atomic

    def __cinit__(self, over):
        self.lock = threading.Lock()
        self.lock.acquire()
        if over:
            self.set()

    def set(self):
        if not exchange32(&self.over, 1, ACQ_REL):
            self.lock.release()

    def is_set(self):
        return load32(&self.over, ACQUIRE) != 0

    def wait(self, seconds):
        """At most so long. True: it has come. What handlers of signals raise is raised."""
        if self.lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            self.lock.release()
        PyErr_CheckSignals()           # one may have come before the wait, or to another thread; no bytecode looks here
        return self.is_set()


cdef class TstPool:
    """TstPool(handler=None, *, framing=None, workers=None, copy=True, trigger="level", max_recv_size=4096,
max_send_size=4096, shards=None, idle_time=3.0, slow_handler=0.1, name="tstpool", max_connections=None,
when_full="wait", first_byte_timeout=15.0, message_timeout=60.0, idle_timeout=75.0, write_timeout=60.0,
linger_timeout=5.0, high_water=65536, low_water=16384, max_queued=1048576, on_overflow="raise", auto_pause=True,
max_total_queued=268435456, busy_poll=20e-6, keepalive=None, accepts_per_turn=16, accept_pause=0.1, receive_size=262144,
messages_per_turn=32)
--

    A TCP server thread pool over epoll: it listens, accepts, reads, calls the handler on a worker thread, sends, frees.

    handler: a TstHandler; or a function of a socket and a message, which is on_message alone; or a function of a
    socket, which reads messages itself. It may be missing until create() brings it.
    framing: how input is cut into messages, for listeners and sockets that are not told otherwise: Fixed, Delimited,
    LengthPrefixed; Raw() or None for bytes as they arrive.
    workers: threads; default min(32, cores + 4). Handlers that block hold one each.
    copy: on_message gets bytes; False: a read-only memoryview of the message where it was received, valid inside the
    call and released after it. Using it later raises ValueError. A slice or array made of it stays valid, and keeps the
    receive buffer, up to 256 KiB, or the message. sock.read() gets nothing in such a call. It is for messages of many
    KiB: making and releasing a memoryview takes longer than copying a small one.
    trigger: "level", "oneshot" or "edge": how descriptors are armed. Same results from all three; "level" is fastest.
    max_recv_size, max_send_size: bytes in each socket's recv_data and send_data.
    shards: epoll sets, each polled by one worker at a time. Default: 1 under a GIL, one a core on a free-threaded build
    or with a TstNogilHandler; never more than workers.
    max_connections: open at the same time, accepted and added; default 10,000, or the process's limit of descriptors
    less 32 where that is lower. It stops accepting; connect() and addsocket() count, but are never refused. when_full:
    "wait": more clients wait in the kernel's backlog until one leaves (another pool or process may take them, or they
    give up); "close": they are accepted and closed.
    first_byte_timeout, message_timeout, idle_timeout: seconds that an accepted connection may take until its first byte
    (15), from the first byte of a message to its last, however steadily it sends (60), between messages (75).
    write_timeout: seconds in which a peer takes none of the output that waits for it (60). None: for ever. When one has
    passed the connection is closed, with a TimeoutError as the reason. Time in which its handler does not read (pause,
    a call that runs) does not count. linger_timeout: seconds without progress while closing (5).
    keepalive: whole seconds of silence after which the kernel asks a peer whether it is there; one that has not
    answered three times within about as long again is gone, with a TimeoutError as the reason. For connections that may
    be idle for ever; of listen() and connect(), while addsocket() leaves a socket's keep-alive as it is. None: off.
    high_water, low_water: bytes of output that wait for a peer: above high_water (64 KiB) its messages are not handed
    out any more, and it is not read, unless auto_pause is False (for a relay, say, which sends to one connection what
    it reads from another: it pauses the other one); at low_water (16 KiB) that goes on, and on_writable is
    called, of a TstHandler: a function or a TstNogilHandler asks with need_send().
    max_queued: with so many waiting (1 MiB) no more is taken; the message that goes beyond still is. on_overflow: what
    happens then: "raise": send() raises SendQueueFull; "block": it waits until there is room, but raises in the
    socket's own handler; "close": the connection is aborted. max_total_queued: bytes that wait for all peers of the
    pool (256 MiB), what goes out at once not counted: beyond it, connections that have output waiting take no more, and
    the others no message above high_water, unless it is a broadcast's or the only output that waits. None: no limit.
    idle_time: seconds without work after which on_idle is called (3; a millisecond at least). slow_handler: seconds
    from which on_slow is. accepts_per_turn: clients that one listener accepts before those that are there get their
    turn (16). accept_pause: seconds for which nobody is accepted after the process has run out of descriptors or memory
    (0.1; a millisecond at least). receive_size: bytes that are received from one connection before others get their
    turn (256 KiB; from 4 KiB to 16 MiB), if they are not of one message or transfer whose size is known, nor behind
    input that is kept, where it is 64 KiB: each worker has a buffer of that size, and of one with a copy=False view
    that is kept, as many as are.
    messages_per_turn: messages of one connection that are handled before others get their turn, if they take 0.1 ms
    together (32).
    busy_poll: seconds for which a worker polls without sleeping when it slept no longer than that the last time, as
    long as that pays (20 microseconds: about what a sleep of no length and the waking cost; rarely, after polls in
    vain); 0 is never. A server that is busy enough for short pauses only then takes its core whole instead of half, for
    replies that are a third faster. More, say 100e-6, is for clients that answer at once over a network, on a core
    that has nothing else to do. name: prefix of the threads' names.

    All methods may be called on any thread. A running pool is kept alive by its workers, and one with connections by
    these, until stop(); at the end of the interpreter it is stopped. In a forked child its methods raise TstError.
    """

    def __cinit__(self):
        cdef pthread_condattr_t monotonic
        self.engine = <tst_engine *>calloc(1, sizeof(tst_engine))
        if self.engine == NULL:
            raise MemoryError()
        pthread_condattr_init(&monotonic)
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC)
        pthread_mutex_init(&self.engine.mutex, NULL)
        pthread_cond_init(&self.engine.standby, &monotonic)
        pthread_cond_init(&self.engine.watch, &monotonic)
        pthread_condattr_destroy(&monotonic)

    @cython.embedsignature(False)
    def __init__(self, handler=None, *, framing=None, workers=None, copy=True, trigger="level", max_recv_size=4096,
                 max_send_size=4096, shards=None, idle_time=3.0, slow_handler=0.1, name="tstpool",
                 max_connections=None, when_full="wait", first_byte_timeout=15.0, message_timeout=60.0,
                 idle_timeout=75.0, write_timeout=60.0, linger_timeout=5.0, high_water=65536, low_water=16384,
                 max_queued=1048576, on_overflow="raise", auto_pause=True, max_total_queued=268435456, busy_poll=20e-6,
                 keepalive=None, accepts_per_turn=16, accept_pause=0.1, receive_size=262144, messages_per_turn=32):
        if self.hooks is not None:
            raise TstError("a TstPool is initialised once")
        if trigger not in tuple(TRIGGERS):             # of which any object may be asked
            raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}: {trigger!r}")
        if when_full not in ("wait", "close"):
            raise ValueError(f"when_full must be 'wait' or 'close': {when_full!r}")
        self.framings = [framing_from(framing)]
        self.engine.total.most = limit_from(max_total_queued, "max_total_queued")
        self.limits = {
            "first_byte_timeout": first_byte_timeout, "message_timeout": message_timeout, "idle_timeout": idle_timeout,
            "write_timeout": write_timeout, "linger_timeout": linger_timeout, "high_water": high_water,
            "low_water": low_water, "max_queued": max_queued, "on_overflow": on_overflow, "auto_pause": auto_pause}
        self.engine.max_connections = <uint32_t>(
            usual_max_connections() if max_connections is None else positive(max_connections, "max_connections"))
        self.engine.close_excess = when_full == "close"
        self.keepalive = 0 if keepalive is None else number_within(keepalive, "keepalive", 1, 32767)
        self.copy = bool(copy)
        self.mutex = PoolMutex()
        self.engine.accepts_per_turn = number_within(accepts_per_turn, "accepts_per_turn", 1, 1024)
        self.engine.accept_pause = max(<uint64_t>1000000, nanoseconds(accept_pause, "accept_pause"))
        self.engine.receive_size = number_within(receive_size, "receive_size", 4096, 16777216)
        self.engine.messages_per_turn = positive(messages_per_turn, "messages_per_turn")
        self.ended = Latch(True)
        self.threads = []
        self.listeners = []
        self.files = []
        self.name = str(name)
        self.n_workers = positive(min(32, (os.cpu_count() or 1) + 4) if workers is None else workers, "workers")
        self.shards_wanted = 0 if shards is None else positive(shards, "shards")
        self.max_recv_size = positive(max_recv_size, "max_recv_size")
        self.max_send_size = positive(max_send_size, "max_send_size")
        self.engine.slow_handler = nanoseconds(slow_handler, "slow_handler")
        self.engine.busy_poll = nanoseconds(busy_poll, "busy_poll")
        self.engine.idle_time = max(<uint64_t>1_000_000, nanoseconds(idle_time, "idle_time"))
        self.engine.trigger = TRIGGERS[trigger]
        self.engine.watcher = -1
        self.binding = None if handler is None else bind(handler, {})
        hooks = {}
        self.limits_from(self.limits)  # last: what it makes stays, and would be those of an __init__ after this one
        self.hooks = hooks

    def __dealloc__(self):
        if self.engine == NULL or self.dead:       # a forked child leaves the parent's memory as it found it
            return
        let_sockets_go(self.close_descriptors())
        self.free_memory()
        pthread_cond_destroy(&self.engine.watch)
        pthread_cond_destroy(&self.engine.standby)
        pthread_mutex_destroy(&self.engine.mutex)
        free(self.engine)

    cdef int check_alive(self) except -1:
        if self.dead:
            raise TstError("this pool belongs to the parent process: after fork() make a new one")
        if self.hooks is None:
            raise TstError("TstPool.__init__() was not called, or failed")
        return 0

    def __repr__(self):
        if self.hooks is None:
            return "<TstPool without __init__()>"
        return f"<TstPool {self.name} {'running' if self.running else 'stopped'} {self.addresses}>"

    @property
    def running(self):
        """True between start() and stop()."""
        return load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING

    @property
    def workers(self):
        """Number of worker threads."""
        return self.n_workers

    @property
    def trigger(self):
        """As it was given: "level", "oneshot" or "edge"."""
        return {number: name for name, number in TRIGGERS.items()}[self.engine.trigger]

    @property
    def addresses(self):
        """(host, port) of each listener; on any thread, also while others listen or stop the pool."""
        return [(host, port) for host, port, _ in list(self.listeners)]

    # -- hooks of the original

    cdef int set_hook(self, str name, object function) except -1:
        self.check_alive()
        with self.mutex:               # else workers might look it up that start right now
            if load32(&self.engine.phase, ACQUIRE) != PHASE_STOPPED:
                raise TstError("hooks are set before start()")
            before = self.hooks.pop(name, None)    # goes when the mutex is free: its finalizer may stop the pool
            if function is not None:
                self.hooks[name] = function
        del before
        return 0

    def setEventNewConnected(self, f):
        """f(sock) is called for each new connection before its first event, like on_connect. Before start()."""
        self.set_hook("on_connect", None if f is None else with_arity(f, 1, 1))

    def setEventDisconnected(self, f):
        """f(sock) or f(sock, reason) is called before a socket is freed, like on_disconnect. Before start()."""
        self.set_hook("on_disconnect", None if f is None else with_arity(f, 1, 2))

    def setEventMostElapsed(self, f):
        """f(sock) or f(sock, seconds) is called when a job took longer than any before on that worker. Before
        start()."""
        self.set_hook("on_most_elapsed", None if f is None else with_arity(f, 1, 2))

    def setEventIdle(self, f):
        """f(worker_no) is called like on_idle. Before start()."""
        self.set_hook("on_idle", None if f is None else with_arity(f, 1, 1))

    # -- listening and connecting

    @property
    def framing(self):
        """How input is cut into messages, unless a listener or a socket says otherwise."""
        return PyObject_GetItem(self.framings, 0)      # without a GIL, too, beside a listen() that adds to it

    def listen(self, host, port=0, backlog=1024, framing=THE_POOLS, *,
               first_byte_timeout=THE_POOLS, message_timeout=THE_POOLS, idle_timeout=THE_POOLS,
               write_timeout=THE_POOLS, linger_timeout=THE_POOLS, high_water=THE_POOLS, low_water=THE_POOLS,
               max_queued=THE_POOLS, on_overflow=THE_POOLS, auto_pause=THE_POOLS):
        """Listens on an address, before or after start(), any number of times.

        host: a name or address; None or "::" for all addresses, IPv6 and IPv4 by one listener; "unix:/path" for a unix
        socket. port: 0 lets the system choose. backlog: connections that the kernel holds until they are accepted.
        framing: of its connections, the pool's unless given; likewise first_byte_timeout, message_timeout,
        idle_timeout, write_timeout and linger_timeout, in seconds or None; high_water, low_water and max_queued, in
        bytes; on_overflow and auto_pause: all as in TstPool.
        Returns the real (host, port). Raises OSError with the address in its text, TstError while the pool stops.

        A listener with options of its own (SO_REUSEPORT, say) is made with `socket`, and handed over with
        addsocket(listener, TstSockType.LISTEN).
        """
        cdef tst_limits *limits
        self.check_alive()
        limits = self.limits_from({
            "first_byte_timeout": first_byte_timeout, "message_timeout": message_timeout, "idle_timeout": idle_timeout,
            "write_timeout": write_timeout, "linger_timeout": linger_timeout, "high_water": high_water,
            "low_water": low_water, "max_queued": max_queued, "on_overflow": on_overflow, "auto_pause": auto_pause})
        used = self.framing if framing is THE_POOLS else framing_from(framing)
        sockets = _net.listening_sockets(host, port, backlog)
        try:
            for listener in sockets if self.keepalive else ():
                _net.keep_alive(listener, self.keepalive)
            address = [self.add_listener(listener, used, limits, True) for listener in sockets][0]
        except BaseException:
            for listener in sockets:
                _net.discard_listener(listener)
            raise
        finally:
            self.stop_if_asked()
        return address

    cdef tst_limits *limits_from(self, dict given) except NULL:
        """The limits of a listener's connections, or of one alone, where THE_POOLS stands for the pool's. They live as
        long as the pool; the same ones are there once."""
        cdef tst_limits *limits
        cdef tst_limits wanted
        cdef dict named = {name: self.limits[name] if value is THE_POOLS else value for name, value in given.items()}
        fill_limits(&wanted, named)
        if named == self.limits and self.engine.limits != NULL:
            return self.engine.limits
        wanted.total = &self.engine.total
        with self.mutex:
            limits = same_limits(self.engine.limits, &wanted)
            if limits != NULL:
                return limits
            limits = <tst_limits *>malloc(sizeof(tst_limits))
            if limits == NULL:
                raise MemoryError("no memory for limits")
            limits[0] = wanted
            if self.engine.limits == NULL:
                self.engine.limits = limits
            else:
                limits.next = self.engine.limits.next
                self.engine.limits.next = limits
        return limits

    cdef object add_listener(self, object listener, Framing framing, tst_limits *limits, bint ours):
        """`ours`: so is the file of a unix socket; another process may still use that of one that was handed over."""
        cdef uint64_t id = 0
        cdef tst_connection *connection
        address = _net.address_of(listener)
        file = _net.file_of(address) if ours else None
        # The second is for after a chdir(), the first for after a setuid(), when the whole path may not be open to us.
        cdef list names = [] if file is None else [(place, file) for place in {address, _net.rooted(address)}]
        entry = None
        with self.mutex:
            self.check_not_stopping()
            self.open()
            if framing not in self.framings:
                self.framings.append(framing)          # connections borrow it: it stays for as long as the pool
            framing = self.framings[self.framings.index(framing)]
            connection = self.enter(listener.fileno(), TYPE_LISTEN, 0, &id)
            if connection == NULL:
                raise MemoryError("no slot for the listener")
            connection.framing = framing_pointer(framing)
            connection.limits = limits
            try:
                entry = (address[0], address[1], id)
                self.listeners.append(entry)
                self.files.extend(names)
                adopt(listener, True)
            except BaseException:
                take_out(self.listeners, entry)
                for name in names:
                    take_out(self.files, name)
                withdraw(connection)
                raise
            add32(&self.engine.n_listeners, 1, RELAXED)
            self.begin(id)
        return address

    cdef int unlink_files(self) except -1:
        """Removes the files of unix listeners, while these are open: as soon as they are not, a successor may listen
        there, and its file may have the number that ours had."""
        while True:
            try:
                entry = self.files.pop()
            except IndexError:                     # nothing is left; other threads may be doing the same
                return 0
            try:
                _net.unlink_socket(*entry)
            except BaseException:                  # Ctrl-C: whoever closes the listener tries again
                self.files.append(entry)
                raise

    def connect(self, host, port=0, timeout=10.0, type=TstSockType.CLIENT, handler=None, user_data=None,
                framing=THE_POOLS, **limits):
        """Connects to a server, in the calling thread, and adds the connection to the pool.

        timeout: seconds for connecting. type, handler, user_data, framing, limits: as addsocket() takes them. Returns
        the TstSocket. Raises OSError with the address in its text; else as addsocket().
        """
        cdef tst_limits *own
        self.check_alive()
        self.check_not_stopping()
        if timeout is not None:
            nanoseconds(timeout, "timeout")
        # Before a server is troubled with what is wrong.
        number, binding, used = checked(self, type, handler, framing)
        own = limits_by_name(self, limits)
        sock = _net.connected_socket(host, port, timeout)
        try:
            if self.keepalive:
                _net.keep_alive(sock, self.keepalive)
            return take(self, sock, number, binding, user_data, used, own)
        except BaseException:
            sock.close()
            raise

    def addsocket(self, sock, type=TstSockType.CLIENT, handler=None, user_data=None, framing=THE_POOLS, **limits):
        """Puts a connected socket under the pool's care: its messages reach the handler like any other's.

        sock: a socket.socket, which is detached, or a descriptor. It becomes non-blocking and is the pool's to close;
        when the call raises it stays as it was.
        type: its TstSockType; LISTEN adopts a listening socket, without handler and user_data, and returns None.
        handler: as sock.handler. framing: as sock.framing, the pool's unless given. limits: by name, as listen() takes
        them; for this connection alone, or, of a listener, for those that it accepts. Returns the TstSocket; on_connect
        is called on a worker. Deadlines for input are for accepted connections: this one may be silent for ever, unless
        its type is SUB.
        Raises ValueError for a socket that is closed, that the pool has already, or that does not listen although it is
        added as LISTEN; OSError for one that was never connected; TstError while the pool stops; OSError, MemoryError.
        """
        self.check_alive()
        self.check_not_stopping()
        cdef tst_limits *own = limits_by_name(self, limits)
        number, binding, used = checked(self, type, handler, framing)
        if isinstance(sock, socket.socket):
            return take(self, sock, number, binding, user_data, used, own)
        view = socket.socket(fileno=operator.index(sock))
        try:
            return take(self, view, number, binding, user_data, used, own)
        finally:
            view.detach()              # the descriptor is the pool's now, or still the caller's

    cdef int check_not_stopping(self) except -1:
        """With the mutex held it stays so: what is added would come too late for the workers."""
        if load32(&self.engine.phase, ACQUIRE) > PHASE_RUNNING:
            raise TstError("the pool is stopping")
        return 0

    cdef TstSocket add(self, object sock, int type, object binding, object user_data, Framing framing,
                       tst_limits *limits):
        cdef uint64_t id = 0
        cdef tst_connection *connection
        cdef TstSocket made
        try:
            with self.mutex:
                self.check_not_stopping()
                self.open()
                connection = self.enter(sock.fileno(), type, 0, &id)
                if connection == NULL:
                    raise MemoryError("no slot for the socket")
                connection.framing = framing_pointer(framing)
                connection.limits = limits
                connection.active_tick = connection.output_tick = tick_of(clock_now())
                try:
                    read_peer(connection)
                    made = make_socket(self, connection)
                    adopt(sock, False)
                except BaseException:
                    withdraw(connection)
                    raise
                made.data = user_data
                made.binding = binding
                publish_socket(connection, made)
                add64(&self.added, 1, RELAXED)
                self.begin(id)
        finally:
            self.stop_if_asked()
        return made

    cdef tst_connection *enter(self, int fd, int type, int shard, uint64_t *id) noexcept:
        """A slot for a descriptor of ours, QUEUED so that nobody touches it until begin()."""
        cdef tst_connection *connection = table_open(&self.engine.table, fd, STATE_QUEUED | PEND_CONNECT, id)
        cdef tst_shard *home = &self.engine.shards[shard]
        cdef int i
        if connection != NULL:
            if type != TYPE_LISTEN:
                for i in range(self.engine.n_shards):
                    if load32(&self.engine.shards[i].open, RELAXED) < load32(&home.open, RELAXED):
                        home = &self.engine.shards[i]
            connection_settle_in(connection, self.engine, home, type)
        return connection

    cdef int begin(self, uint64_t id) except -1:
        cdef tst_connection *connection = table_find(&self.engine.table, id)
        if connection != NULL:
            shard_push(<tst_shard *>load_pointer(&connection.shard, ACQUIRE), connection)
        return 0

    # -- start and stop

    cdef int shards_to_open(self) except -1:
        """As many as were asked for; else one where the GIL lets one thread run handlers at a time, or one a core."""
        if self.engine.shards != NULL:         # made once: connections may still remember theirs from before a stop()
            return min(self.n_shards, self.n_workers)
        if self.shards_wanted:
            return min(self.shards_wanted, self.n_workers)
        if gil_is_on() and not (self.binding is not None and self.binding.compiled.handler != NULL):
            return 1
        return min(len(os.sched_getaffinity(0)), self.n_workers)

    cdef int open(self) except -1:
        """Makes the shards' descriptors if they are not there. Mutex held."""
        cdef int i, n
        cdef tst_shard *shard
        if self.opened:
            return 0
        _open[<size_t><void *>self] = weakref.ref(self, functools.partial(_open.pop, <size_t><void *>self))
        n = self.shards_to_open()
        if accept4(-1, NULL, NULL, 0) < 0 and errno == ENOSYS:
            raise system_error(ENOSYS, "this kernel has no accept4, which tstpool needs (Linux 2.6.28 or newer)")
        if self.engine.shards == NULL:
            self.engine.shards = <tst_shard *>calloc(n, sizeof(tst_shard))
            if self.engine.shards == NULL:
                raise MemoryError()
            self.n_shards = n
            for i in range(n):
                pthread_mutex_init(&self.engine.shards[i].mutex, NULL)
                shard = &self.engine.shards[i]
                shard.epoll_fd = shard.event_fd = shard.timer_fd = -1
                shard.no = i
                shard.stock.blocks_most = max(BLOCKS_MOST // n, BLOCKS_LEAST)
        store32(<uint32_t *>&self.engine.n_shards, <uint32_t>n, RELEASE)       # stats() may be looking
        for i in range(n):
            shard = &self.engine.shards[i]
            shard.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
            shard.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            shard.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
            shard.alarm = 0
            if (shard.epoll_fd < 0 or shard.event_fd < 0 or shard.timer_fd < 0
                    or sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.event_fd, _EPOLLIN, ID_WAKE) < 0
                    or sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.timer_fd, _EPOLLIN, ID_ALARM) < 0):
                failure = system_error(errno, "epoll is not available: " + os.strerror(errno))
                self.close_descriptors()
                raise failure
            shard.draining = shard.aborted = shard.full = False
            memset(&shard.wheel, 0, sizeof(shard.wheel))
            shard.wheel.tick = tick_of(clock_now())
            store32(&shard.done, 0, RELEASE)
        self.opened = True
        return 0

    def start(self):
        """Starts the workers. TstError when they run already or no handler is known; on failure no thread is left."""
        cdef list threads = []
        self.check_alive()
        try:
            with self.mutex as interrupted:
                self.check_uninterrupted(interrupted)
                self.start_locked(threads)
        except BaseException:
            if threads and not self.dead:      # outside the mutex: it waits for handlers, which may want that
                self.give_up(threads)
            raise
        finally:
            self.stop_if_asked()

    cdef int check_uninterrupted(self, bint interrupted) except -1:
        """A signal handler or a finalizer, on a thread that starts the pool, must not start it."""
        if interrupted:
            raise TstError("this thread is starting or changing the pool already")
        return 0

    cdef int start_locked(self, list threads) except -1:
        """Adds the workers' threads to `threads`: from then on there is something to give up."""
        if load32(&self.engine.phase, ACQUIRE) != PHASE_STOPPED or not self.ended.is_set():
            raise TstError("the pool is running already" if self.running else "the pool is still stopping")
        if self.binding is None:
            raise TstError("no handler: give one to TstPool() or create()")
        self.open()
        close_spare_shards(self)
        make_room(self.engine, self.n_workers)
        begin_counting(self, open_connections(self))
        set_binding(self, bind(self.binding.handler, self.hooks))
        self.engine.call_idle = self.binding.on_idle is not None
        self.engine.log_slow = self.engine.slow_handler > 0 and logs_slow(self.binding)
        store64(&self.engine.slow_look, 0, RELEASE)
        self.engine.call_longest = self.binding.on_most_elapsed is not None
        with cython.critical_section(self):
            self.fault = None
        self.live_workers = 0
        made = [threading.Thread(target=new_life(self, no), name=f"{self.name}-{no}", daemon=False)
                for no in range(self.n_workers)]
        threads.extend(made)
        self.ended = Latch(False)
        self.threads = made
        with WORKERS_END:
            late = interpreter_ends
        if late:
            raise TstError("the interpreter is shutting down")
        self.check_alive()             # a signal handler may have forked
        store32(&self.engine.phase, PHASE_RUNNING, RELEASE)
        return start_threads(self, made)

    cdef int give_up(self, list threads) except -1:
        """A thread can't be had, or Ctrl-C came in the middle: ends those that run, and lets none begin late."""
        with WORKERS_END:
            self.launch += 1
            none = self.live_workers == 0
        if none:
            end_run(self)
        else:
            with self.mutex:
                self.begin_stop(0)
        until = time.monotonic() + 1.0
        for thread in threads:
            while thread in threading.enumerate():     # listed from start() on; join() takes it only once it runs
                try:
                    thread.join()
                except RuntimeError:
                    if time.monotonic() > until:       # Ctrl-C came within its start(): it never will run, or be joined
                        break
                    time.sleep(0.001)
        return 0

    cdef int work(self, int no, int launch) except -1:
        """A worker thread's life. `launch`: the start() that it belongs to; it may come too late."""
        cdef Worker worker = None
        with WORKERS_END:
            if launch != self.launch:
                return 0
            self.live_workers += 1
        try:
            worker = new_worker(self, no)
            worker.run()
        except BaseException as error:
            if self.dead:
                raise
            log(logging.CRITICAL, "worker %d of %s broke", no, self.name, exc_info=error)
            if worker is not None:     # nobody knows what it has left half done
                worker_broke(worker, error)
            else:
                stop_for(self, error)
            raise
        finally:
            if worker is not None:
                drop_spares(worker.worker)
            if not self.dead:              # of a forked child no other thread is there, but what it held may be
                worker_ends(self)
        return 0

    cdef int begin_stop(self, uint64_t drain) except -1:
        """Tells every shard to drain, for at most `drain` nanoseconds. Repeating it can only shorten the time."""
        try:
            self.unlink_files()
        finally:                               # Ctrl-C may have come there
            self.begin_draining(clock_now() + drain)
        return 0

    cdef void begin_draining(self, uint64_t until) noexcept:
        cdef uint32_t running = PHASE_RUNNING
        cdef int i
        if load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING or until < load64(&self.engine.drain_until, ACQUIRE):
            store64(&self.engine.drain_until, until, RELEASE)
        compare_exchange32(&self.engine.phase, &running, PHASE_DRAINING, False, SEQ_CST, RELAXED)
        for i in range(self.engine.n_shards):
            if self.engine.shards[i].event_fd >= 0:
                sys_wake(self.engine.shards[i].event_fd)

    def stop(self, drain=5.0):
        """Stops: no more clients, running handlers finish, queued output is sent, connections close, workers end.

        drain: seconds after which what is still open is cut off; then only handlers are waited for, at most 5 seconds
        more and only as long as they return and others begin. Returns True when everything has ended, False when a
        handler still runs (its worker ends when the handler does; no thread is ever killed). From a handler: starts the
        stop and returns. May be repeated, on several threads at once, and before start(). Listeners are gone then, and
        the file of a unix socket is removed: who starts the pool again calls listen() again.
        """
        cdef uint64_t patience = nanoseconds(drain, "drain")
        cdef list gone = None
        self.check_alive()
        with self.mutex as interrupted:
            if interrupted:            # this thread is in the middle of start() or listen(), which will see to it
                return self.stop_later(patience)
            ended, threads = self.ended, self.threads
            if ended.is_set():
                gone = self.close_down()
            else:
                self.begin_stop(patience)
        if gone is not None:
            let_sockets_go(gone)
        elif is_one_of(threads) or not wait_ended(self, ended, float(drain)):
            return False
        join_all(threads)
        return True

    cdef bint stop_later(self, uint64_t drain) except -1:
        """stop(), called by a signal handler or a finalizer on a thread that holds the mutex already."""
        if load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING:
            self.begin_stop(drain)
        else:
            store32(&self.stop_asked, 1, RELAXED)
        return False

    cdef int stop_if_asked(self) except -1:
        """What stop_later() has left, once the mutex is free."""
        if load32(&self.stop_asked, RELAXED):      # if another thread has stopped it meanwhile, that is the stop
            TstPool.stop(self, 0)
        return 0

    cdef int cut_off(self) except -1:
        """Nobody may be left to do it: ends every connection's traffic, so that no peer waits for a stuck handler.
        Mutex held."""
        cdef int chunk, i
        cdef tst_connection *first
        cdef tst_connection *connection
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                spin_lock(&connection.lock)
                if load64(&connection.state, ACQUIRE) & STATE_OPEN:
                    shutdown(connection.fd, SHUT_RDWR)
                spin_unlock(&connection.lock)
        return 0

    cdef list close_down(self):
        """Nobody works any more: gives descriptors back. Mutex held: what is added meanwhile is either closed here, or
        waits for the next start. Returns what let_sockets_go() is to get when the mutex is free."""
        self.unlink_files()
        self.listeners.clear()         # the same list: others may be looking at it
        store32(&self.engine.n_listeners, 0, RELAXED)
        gone = self.close_descriptors()
        store32(&self.engine.phase, PHASE_STOPPED, RELEASE)
        _open.pop(<size_t><void *>self, None)
        store32(&self.stop_asked, 0, RELAXED)  # last: a signal handler that came meanwhile has what it asked for
        self.ended.set()
        return gone

    cdef list close_descriptors(self):
        """Closes what is still open, without a word to anybody: a pool that was never started, what came too late.
        Returns its TstSockets."""
        cdef int chunk, i
        cdef list gone = []
        cdef tst_connection *first
        cdef tst_connection *connection
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                if load64(&connection.state, ACQUIRE) & STATE_OPEN and close_left(connection):
                    if connection.type != TYPE_LISTEN:
                        add64(&self.engine.closed_unserved, 1, RELAXED)
                    gone.append(take_socket(connection))
        self.drop_all_litter()
        drop_all_large(self.engine)
        for i in range(self.n_shards):
            stock_free_blocks(&self.engine.shards[i].stock)
            close_once(&self.engine.shards[i].epoll_fd)
            while load32(&self.engine.shards[i].wakers, SEQ_CST):
                sched_yield()                  # between its look whether somebody sleeps and its write
            close_once(&self.engine.shards[i].event_fd)
            close_once(&self.engine.shards[i].timer_fd)
            store_pointer(&self.engine.shards[i].requests, NULL, RELEASE)
            self.engine.shards[i].todo = NULL
            self.engine.shards[i].listeners = NULL
            self.engine.shards[i].accept_again = 0
            self.engine.shards[i].batch = NULL
            store64(&self.engine.shards[i].token, 0, RELEASE)      # a worker that broke may have had it
            store32(&self.engine.shards[i].open, 0, RELEASE)
        self.opened = False
        return gone

    cdef void abandon(self) noexcept:
        """In a forked child: the workers are gone, in the middle of anything. Closes descriptors, lets go of every lock
        that they held, and touches nothing else: what they were changing may be half done."""
        cdef int chunk, i
        cdef tst_connection *first
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                store32(&first[i].lock, 0, RELEASE)
                first[i].closing = True        # who has forked may be its handler: no more messages are for that
                unlock_transfer(connection_recv(&first[i]))
                unlock_transfer(connection_send(&first[i]))
                if <uint32_t>load64(&first[i].state, ACQUIRE):         # also one that is only not closed yet
                    close(first[i].fd)
                    store64(&first[i].state, <uint64_t>(generation_of(first[i].state) + 1) << 32, RELEASE)
        for i in range(self.n_shards):
            store32(&self.engine.shards[i].stock.lock, 0, RELEASE)
            store32(&self.engine.shards[i].open, 0, RELEASE)
            close_once(&self.engine.shards[i].epoll_fd)
            close_once(&self.engine.shards[i].event_fd)
            close_once(&self.engine.shards[i].timer_fd)
        self.opened = False

    cdef void drop_all_litter(self) noexcept:
        cdef int i
        for i in range(self.n_shards):
            if stock_has_litter(&self.engine.shards[i].stock):
                drop_litter(&self.engine.shards[i].stock, NULL)

    cdef void free_memory(self) noexcept:
        cdef tst_batch *batch
        cdef tst_limits *limits
        cdef int i
        while self.engine.limits != NULL:
            limits = self.engine.limits
            self.engine.limits = limits.next
            free(limits)
        while self.engine.batches != NULL:
            batch = self.engine.batches
            self.engine.batches = batch.next
            scratch_leave(batch.scratch)
            free(batch)
        for i in range(TABLE_CHUNKS):
            free(self.engine.table.chunks[i])
        for i in range(self.n_shards):
            stock_free(&self.engine.shards[i].stock)
            pthread_mutex_destroy(&self.engine.shards[i].mutex)
        free(self.engine.shards)
        free(self.engine.workers)
        for i in range(self.engine.n_outgrown):
            free(self.engine.outgrown[i])

    cdef int forked(self) except -1:
        """In a forked child: the pool is dead here, and peers must see the end when the parent closes."""
        self.dead = True
        self.abandon()
        store32(&self.engine.phase, PHASE_STOPPED, RELEASE)
        self.ended.set()               # who has forked may be waiting for it, beneath a signal handler
        self.threads = []
        return 0

    def serve_forever(self, drain=5.0):
        """Starts if need be, and blocks until stop(). On KeyboardInterrupt it stops, then raises it on.

        No worker thread is left then, but after an interrupt one whose handler has not returned by the end of `drain`.
        Raises what ended the engine, if something did: an OSError, or what a worker that broke had met. Returns at once
        when the interpreter is shutting down.
        """
        nanoseconds(drain, "drain")            # it is wanted only at the end, which is late to hear that it is wrong
        self.check_alive()
        if interpreter_ends:
            return
        with self.mutex:
            threads = self.threads
        if is_one_of(threads):
            raise TstError("serve_forever() in a handler would wait for itself")
        if not self.running:
            try:
                self.start()
            except TstError:
                if interpreter_ends:           # since the look above
                    return
                raise
        try:
            with self.mutex:
                ended, threads = self.ended, self.threads
            # In slices: a signal between CPython's last look for one and its wait would be noticed only with the next.
            while not ended.wait(0.1):
                pass
            self.check_alive()                 # a signal handler may have forked
            join_all(threads)
        except BaseException:
            if not self.dead:
                self.stop(drain)
            raise
        with cython.critical_section(self):
            fault = self.fault
        if fault is not None:
            raise fault

    def __enter__(self):
        if not self.running:
            self.start()
        return self

    def __exit__(self, *exc_info):
        if not self.dead:                      # a forked child leaves the block as it likes
            self.stop()

    def create(self, thread_count, bind_ip, bind_port, func, max_recv_size=4096, max_send_size=4096):
        """The original's start: a handler, a listener and the workers in one call.

        thread_count: workers. bind_ip: None or "" for all addresses. bind_port: 0 for no listener. func: a handler,
        as TstPool takes. max_recv_size, max_send_size: bytes in each socket's buffers. Returns True. Raises
        OSError with the address in its text; then no thread is left.
        """
        self.check_alive()
        with self.mutex as interrupted:
            self.check_uninterrupted(interrupted)
            if not self.ended.is_set():
                raise TstError("the pool is running already")
            n_workers = positive(thread_count, "thread_count")
            binding = bind(func, {})
            self.max_recv_size, self.max_send_size = (positive(max_recv_size, "max_recv_size"),
                                                      positive(max_send_size, "max_send_size"))
            self.n_workers = n_workers
            before = self.binding
            set_binding(self, binding)
        before = None                  # with the mutex free: its finalizer may stop the pool
        if bind_port:
            self.listen(bind_ip or None, bind_port)
        try:
            self.start()
        except BaseException as error:
            if not (isinstance(error, TstError) and self.running):     # which another thread has started
                self.stop(0)
            raise
        return True

    def destroy(self, wait_time=5.0):
        """The original's name for stop(drain=wait_time)."""
        return self.stop(wait_time)

    # -- acting on connections

    cdef tst_connection *find(self, object which, uint32_t *generation) except? NULL:
        """The open connection that a TstSocket, an id or a descriptor names; NULL when there is none (any more)."""
        cdef tst_connection *connection
        cdef bint is_channel
        cdef uint64_t id
        self.check_alive()
        if isinstance(which, TstSocket):
            if (<TstSocket>which).pool is not self:
                return NULL
            id = (<TstSocket>which).id
        else:
            number = which.__index__() if hasattr(which, "__index__") else None
            if number is None:
                raise TypeError(f"a TstSocket, an id or a descriptor is wanted, not {which!r}")
            if not 0 <= number <= 0xffffffffffffffff:
                return NULL
            id = number
        connection = table_find(&self.engine.table, id)
        if connection == NULL:
            return NULL
        generation[0] = generation_of(id) or generation_of(load64(&connection.state, ACQUIRE))
        spin_lock(&connection.lock)
        is_channel = connection_is(connection, generation[0]) and connection.type != TYPE_LISTEN
        spin_unlock(&connection.lock)
        return connection if is_channel else NULL

    def need_send(self, sock_or_sd):
        """Asks that a worker call the socket's handler with EPOLLOUT, as soon as the kernel takes output for it; what
        its `send_data` asks for is sent first. Returns False when the connection is gone, is closing or has ended its
        output."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sock_or_sd, &generation)
        return connection != NULL and connection_need_send(connection, generation) == 0

    def closesocket(self, sock_or_sd):
        """Closes a connection, as TstSocket.close(). Returns True for the call that began it."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sock_or_sd, &generation)
        if connection == NULL or connection_close_output(connection, generation) != 1:
            return False
        shard_ask(connection, generation, PEND_CLOSE)
        return True

    def broadcast(self, data, exclude=None, where=None):
        """Sends the same bytes, as they are, without a frame, to every connection, also while its on_connect runs.

        exclude: a TstSocket, an id or a descriptor, or several. where: a function of one socket that says whether it is
        to get them, asked about all before anything is sent. Returns how many connections it was queued for; those that
        are closed, or have too much waiting, are left out, and the latter aborted where on_overflow is "close"."""
        cdef set left_out = numbers_of(self, exclude)
        cdef bytes payload = data if type(data) is bytes else bytes(contiguous(data))
        cdef list members
        cdef tst_shared *shared = NULL
        cdef int reached = 0
        cdef ssize_t queued
        self.check_alive()
        if where is not None and not callable(where):
            raise TypeError(f"where must be a function of one socket, not {where!r}")
        members = self.snapshot()
        if left_out:
            members = [sock for sock in members if sock.id not in left_out and sock.sd not in left_out]
        if where is not None:
            members = [sock for sock in members if where(sock)]
        shared = shared_new(PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload))
        if shared == NULL:
            raise MemoryError("no memory for the broadcast")
        shared.held = &self.engine.total.broadcasts
        add64(shared.held, shared.size, RELAXED)
        try:
            for sock in members:
                queued = (<TstSocket>sock).append(shared.bytes, shared.size, shared, False)
                if queued >= 0:
                    reached += 1
                elif queued != -ENOTCONN and queued != -ENOBUFS:
                    check(queued, "no memory to queue output")
        finally:
            shared_leave(shared, NULL)
        return reached

    cdef list snapshot(self):
        cdef list found = []
        cdef int chunk, i
        cdef tst_connection *first
        cdef tst_connection *connection
        cdef PyObject *held
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                spin_lock(&connection.lock)
                held = connection.sock
                if held != NULL:
                    Py_INCREF(<object>held)
                spin_unlock(&connection.lock)
                if held != NULL:
                    found.append(<object>held)
                    Py_DECREF(<object>held)
        return found

    def sockets(self):
        """The open connections, a snapshot; listeners are not among them."""
        self.check_alive()
        return self.snapshot()

    def waiting(self):
        """How many connections have input that no worker has fetched yet: the length of the queue, which is the
        kernel's. It asks the kernel for each one in turn, so it is for a look now and then. Paused ones do not count.
        """
        cdef int chunk, i
        cdef int n = 0
        cdef tst_connection *first
        self.check_alive()
        with nogil:
            for chunk in range(TABLE_CHUNKS):
                first = table_chunk(&self.engine.table, chunk)
                for i in range(TABLE_CHUNK if first != NULL else 0):
                    n += connection_waits(first + i)
        return n

    def __len__(self):
        """Open connections, listeners not counted."""
        return open_connections(self)

    def __bool__(self):
        return True

    def __iter__(self):
        """Over sockets()."""
        return iter(self.sockets())

    def __contains__(self, sock_or_sd):
        """Whether the TstSocket, or the connection with that id or descriptor, is open and this pool's."""
        cdef uint32_t generation = 0
        return self.find(sock_or_sd, &generation) != NULL

    def __getitem__(self, sd):
        """The open connection with that descriptor, or that 64-bit id. KeyError when there is none."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sd, &generation)
        cdef PyObject *held = NULL
        if connection != NULL:
            spin_lock(&connection.lock)
            if connection_is(connection, generation):
                held = connection.sock
                if held != NULL:
                    Py_INCREF(<object>held)
            spin_unlock(&connection.lock)
        if held == NULL:
            raise KeyError(sd)
        sock = <object>held
        Py_DECREF(sock)
        return sock

    def stats(self):
        """The pool's counters since start(): a PoolStats, a snapshot taken while workers go on.

        May be called on any thread. While another one starts the pool anew, it waits and looks again: two runs are
        never added up.
        """
        cdef uint32_t before
        self.check_alive()
        while True:
            before = load32(&self.engine.counters_version, ACQUIRE)
            if before % 2 == 0:
                snapshot = look_at_counters(self)
                # Adding nothing: what was read above can't be read after it.
                if add32(&self.engine.counters_version, 0, ACQ_REL) == before:
                    return snapshot
            else:
                sched_yield()          # a few stores, that somebody is in the middle of

    cdef object worker_stats(self, int no):
        cdef tst_worker *worker = worker_at(self.engine, no)
        cdef uint64_t since = load64(&worker.waiting_since, RELAXED)
        cdef uint64_t now = clock_now()
        cdef uint64_t idle = load64(&worker.stats.idle_count, RELAXED)
        if since and now > since:
            idle += (now - since) // self.engine.idle_time
        return WorkerStats(
            thread_no=no, exec_count=load64(&worker.stats.exec_count, RELAXED), idle_count=idle,
            sum_time=load64(&worker.stats.sum_time, RELAXED) / 1e9,
            most_elapsed=load64(&worker.stats.most_elapsed, RELAXED) / 1e9,
            begin_time=load64(&worker.stats.begin_time, RELAXED) / 1e9,
            end_time=load64(&worker.stats.end_time, RELAXED) / 1e9)


cdef tst_limits *same_limits(tst_limits *made, const tst_limits *wanted) noexcept:
    """One of those that were made before, or NULL."""
    cdef tst_limits other
    while made != NULL:
        other = made[0]
        other.next = NULL
        if memcmp(&other, wanted, sizeof(tst_limits)) == 0:
            return made
        made = made.next
    return NULL


cdef set numbers_of(TstPool pool, object sockets):
    """The ids and descriptors of what stands for a connection of the pool, or for several."""
    if sockets is None:
        return set()
    if isinstance(sockets, TstSocket) or hasattr(sockets, "__index__"):
        sockets = (sockets,)
    # Another pool's may have the id of one that is ours.
    return {sock.id if isinstance(sock, TstSocket) else operator.index(sock) for sock in sockets
            if not isinstance(sock, TstSocket) or (<TstSocket>sock).pool is pool}


@cython.final
cdef class WorkersLife:
    """What a worker's thread runs: nothing that a user could call, or that a subclass could have another thing for."""

    cdef TstPool pool
    cdef int no
    cdef int launch

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("not to be made by hand")

    def __call__(self):
        self.pool.work(self.no, self.launch)


def start_each(threads, failures, over):
    """On the thread that start_threads() makes. failures: gets what starting one has raised."""
    try:
        for thread in threads:
            thread.start()
    except BaseException as failure:
        failures.append(failure)
    finally:
        over.set()


cdef int start_threads(TstPool pool, list threads) except -1:
    """Starts them, on a thread of its own: no handler of a signal ever runs there.

    threading.Thread.start() takes locks and waits, in Python: where a handler raises in the middle of it, Ctrl-C's
    KeyboardInterrupt, say, the lock may stay taken for ever, or RuntimeError comes instead of what was raised.
    """
    cdef list failures = []
    over = Latch(False)
    until = float("inf")
    _thread.start_new_thread(start_each, (threads, failures, over))
    while not over.is_set() and time.monotonic() < until:
        try:
            over.wait(0.1)
        except BaseException as failure:
            failures.append(failure)
            until = min(until, time.monotonic() + 1.0)         # without memory a thread may fail to say that it runs
        pool.check_alive()             # a signal handler may have forked: the thread that would end this is not there
    if failures:
        raise failures[0]
    return 0


cdef WorkersLife new_life(TstPool pool, int no):
    cdef WorkersLife life = WorkersLife.__new__(WorkersLife, POOLS_KEY)
    life.pool = pool
    life.no = no
    life.launch = pool.launch
    return life


cdef int set_binding(TstPool pool, Binding binding) except -1:
    with cython.critical_section(pool):        # sock.handler may be asked for on any thread
        pool.binding = binding
    return 0


cdef void unlock_transfer(tst_data *data) noexcept:
    """Lets go of a transfer's lock, whoever had it when the process was forked."""
    if data != NULL:
        store32(&data.lock, 0, RELEASE)


cdef void close_spare_shards(TstPool pool) noexcept:
    """create() may bring fewer workers than the pool had when listen() opened a shard for each: they would have to look
    around for the others. Nobody works, and the mutex is held. A connection stays where connect() has put it."""
    cdef tst_shard *last
    cdef int n
    for n in range(pool.engine.n_shards, pool.n_workers, -1):
        last = &pool.engine.shards[n - 1]
        if load32(&last.open, ACQUIRE):
            return
        close_once(&last.epoll_fd)
        close_once(&last.event_fd)
        close_once(&last.timer_fd)
        store32(<uint32_t *>&pool.engine.n_shards, <uint32_t>(n - 1), RELEASE)


cdef int open_connections(TstPool pool) except -1:
    cdef int i
    cdef int total = 0
    for i in range(<int>load32(<uint32_t *>&pool.engine.n_shards, ACQUIRE)):
        total += <int>load32(&pool.engine.shards[i].open, RELAXED)
    return max(0, total - open_listeners(pool))


cdef int open_listeners(TstPool pool) except -1:
    """While a pool drains there are fewer than its `listeners`, which are kept until it has ended."""
    cdef tst_connection *listener
    cdef uint64_t id
    cdef int n = 0
    for _, _, id in list(pool.listeners):
        listener = table_find(&pool.engine.table, id)
        n += listener != NULL and word_is(load64(&listener.state, ACQUIRE), generation_of(id))
    return n


cdef bint close_left(tst_connection *connection) noexcept:
    """Closes a connection that no worker will look at any more; True, unless somebody else has."""
    cdef uint64_t word
    descriptor_moves()
    spin_lock(&connection.lock)        # cut_off() or waiting() may be about to use the descriptor
    word = load64(&connection.state, ACQUIRE)
    if word & STATE_OPEN:
        connection_wait_for_flusher(connection)
        output_drop(connection)
        input_free(&connection.input)
        connection_drop_body(connection)
        store64(&connection.state, <uint64_t>(generation_of(word) + 1) << 32, RELEASE)
        close(connection.fd)
    spin_unlock(&connection.lock)
    descriptor_moved()
    return word & STATE_OPEN != 0


cdef void close_once(int *fd) noexcept:
    if fd[0] >= 0:
        close(fd[0])
    fd[0] = -1


cdef tuple checked(TstPool pool, object type, object handler, object framing):
    """The type, the binding and the framing that take() wants, from what a user gave."""
    return (TstSockType(type), None if handler is None else bind(handler, {}),
            pool.framing if framing is THE_POOLS else framing_from(framing))


cdef tst_limits *limits_by_name(TstPool pool, dict given) except NULL:
    """Those that addsocket() was given; the pool's where it was not."""
    if not given:
        return pool.engine.limits
    for name in given:
        if name not in pool.limits:
            raise TypeError(f"there is no limit {name!r} of a connection; there are {', '.join(pool.limits)}")
    return pool.limits_from({**pool.limits, **given})


cdef object take(TstPool pool, object sock, object type, object binding, object user_data, Framing framing,
                 tst_limits *limits):
    """addsocket() for a socket.socket, which is detached unless this fails."""
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise TypeError("a pool has no TLS: its bytes would go out as they are, beneath that of an SSLSocket")
    if sock.fileno() < 0:
        raise ValueError("the socket is closed")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError("a pool serves stream sockets alone")
    if table_find(&pool.engine.table, sock.fileno()) != NULL:
        raise ValueError("the pool has that descriptor already")
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if type != TYPE_LISTEN:
        if listens:
            raise ValueError("the socket listens: its type is TstSockType.LISTEN")
        if not was_connected(sock):
            raise system_error(ENOTCONN)
        return pool.add(sock, type, binding, user_data, framing, limits)
    if not listens:
        raise ValueError("the socket does not listen")
    if binding is not None or user_data is not None:
        raise ValueError("a listener has no handler and no user_data of its own")
    try:
        pool.add_listener(sock, framing, limits, False)
    finally:
        pool.stop_if_asked()
    return None


cdef bint was_connected(object sock) except -1:
    """Perhaps it is no more: one that its peer has reset still has its port, and a pool is to tell how it ended."""
    try:
        sock.getpeername()
    except OSError as error:
        return error.errno != ENOTCONN or (
            sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] != 0)
    return True


cdef int withdraw(tst_connection *connection) except -1:
    """Undoes enter() before begin(): nobody has heard of the connection, and its descriptor is not ours."""
    cdef uint32_t *open = connection.shard_open
    spin_lock(&connection.lock)
    store64(&connection.state, <uint64_t>(generation_of(load64(&connection.state, ACQUIRE)) + 1) << 32, RELEASE)
    spin_unlock(&connection.lock)
    sub32(open, 1, RELEASE)
    return 0


cdef int take_out(list some, object one) except -1:
    if one in some:
        some.remove(one)
    return 0


cdef int adopt(object sock, bint listens) except -1:
    """Makes a socket.socket's descriptor fit for the engine, and takes it out; if that fails, it is as it was."""
    cdef int fd = sock.fileno()
    blocking, inheritable, family = os.get_blocking(fd), os.get_inheritable(fd), sock.family
    if listens:
        _net.keep_urgent(sock)
    try:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        sock.detach()
    except BaseException:
        os.set_blocking(fd, blocking)
        os.set_inheritable(fd, inheritable)
        raise
    if not listens and family in (socket.AF_INET, socket.AF_INET6):
        sys_prepare(fd)
    return 0


cdef void read_peer(tst_connection *connection) noexcept:
    """Asks the kernel for the peer of a socket that somebody else connected."""
    cdef sockaddr_storage address
    cdef socklen_t size = sizeof(address)
    if getpeername(connection.fd, <sockaddr *>&address, &size) == 0:
        keep_peer(connection, &address, size)
