# A pool's workers together: their room, their counters, how a run of theirs ends.

# Guards the pools' counts of live workers, and `interpreter_ends`.
WORKERS_END = threading.RLock()        # a signal handler may come while the same thread holds it
cdef bint interpreter_ends = False


cdef int worker_ends(TstPool pool) except -1:
    """The last one of a run closes what is left."""
    cdef bint counted = False, last = False
    while not counted:
        try:
            with WORKERS_END:
                counted = True
                pool.live_workers -= 1
                last = pool.live_workers == 0
                pool.launch += last
        except MemoryError:
            wait_for_memory()
    return end_run(pool) if last else 0


cdef int end_run(TstPool pool) except -1:
    """Closes what is left when nobody works any more. Nobody else would, so for want of memory it is tried again: each
    step may be done twice."""
    cdef list gone = None
    while gone is None:
        try:
            with pool.mutex:
                gone = close_down_surely(pool)
        except MemoryError:
            wait_for_memory()
    let_sockets_go(gone)
    return 0


cdef list close_down_surely(TstPool pool):
    """Mutex held, and kept: Cython's `with` crashes on a MemoryError for which there is no memory for a traceback."""
    while True:
        try:
            return pool.close_down()
        except MemoryError:
            wait_for_memory()


cdef void wait_for_memory() noexcept:
    with nogil:
        poll(NULL, 0, 10)


cdef int worker_broke(Worker worker, object error) except -1:
    """Gives back what it holds, so that the others can end."""
    cdef tst_shard *shard
    cdef int i
    stop_for(worker.pool, error)
    for i in range(worker.engine.n_shards):
        shard = &worker.engine.shards[i]
        if not token_held(shard, worker.worker.no):
            continue
        if shard.batch != NULL:
            with nogil:
                batch_give_up(worker.worker, shard.batch)
            batch_leave(worker.engine, shard.batch, 2)
            shard.batch = NULL
        shard_yield(worker.engine, worker.worker, shard)
    return 0


cdef int stop_for(TstPool pool, object fault) except -1:
    """The engine ends by itself: serve_forever() raises why."""
    with cython.critical_section(pool):
        pool.fault = fault
    pool.begin_stop(0)
    return 0


cdef int ask_to_stop(TstPool pool, uint64_t drain) except -1:
    """Has a run end, if there is one, and does not wait for it."""
    with pool.mutex as interrupted:
        if not interrupted and not pool.ended.is_set():
            pool.begin_stop(drain)
    return 0


cdef bint is_one_of(list threads) except -1:
    """The calling thread is; also when all that is left of it is to let its thread-local data go."""
    ident = threading.get_ident()
    return any([thread.ident == ident and thread.is_alive() for thread in threads])


cdef int join_all(list threads) except -1:
    """Workers that have given up everything already: after it the process has no such threads, not even for a moment.

    Not from one of them, whose hook for exceptions (threading.excepthook) may call stop() as its last act: it would
    wait for itself, or two for each other.
    """
    if not is_one_of(threads):
        for thread in threads:
            if thread.ident is not None:       # else start() has failed before it
                thread.join()
    return 0


cdef bint wait_ended(TstPool pool, object ended, double drain) except -1:
    """Waits for the workers of that run: through the drain, then for as long as they make progress, but for 5 seconds
    at most. One that is merely kept from running, by others on a busy machine, moves within a few looks."""
    cdef int still = 0
    if ended.wait(drain + 0.05):
        return True
    with pool.mutex:
        if not ended.is_set():         # else another thread may have started the pool anew
            pool.cut_off()
    for _ in range(100):
        before = worker_calls(pool.engine)
        if ended.wait(0.05):
            return True
        after = worker_calls(pool.engine)
        still = still + 1 if before == after and any(calls % 2 for calls in after) else 0
        if still == 3:
            return False               # nothing moves, and somebody is inside a handler
    return ended.is_set()


cdef int make_room(tst_engine *engine, int n) except -1:
    """Memory for so many workers. What is outgrown stays: stats() may be reading it on any thread."""
    cdef int room = max(n, 2 * engine.workers_room)
    cdef tst_worker *workers
    if n > engine.workers_room:
        workers = <tst_worker *>calloc(room, sizeof(tst_worker))
        if workers == NULL:
            raise MemoryError()
        if engine.workers != NULL:
            engine.outgrown[engine.n_outgrown] = engine.workers
            engine.n_outgrown += 1
        store_pointer(<void **>&engine.workers, workers, RELEASE)
        engine.workers_room = room
    return 0


cdef void make_workers(tst_engine *engine, int n) noexcept nogil:
    """So many workers, all as new."""
    cdef int no
    for no in range(n):
        worker_begin(&engine.workers[no], no)
        engine.workers[no].group_most = GROUP_MOST if engine.slow_handler > LONG_GROUP else 1
        engine.workers[no].burst = engine.messages_per_turn
    store32(<uint32_t *>&engine.n_workers, <uint32_t>n, RELEASE)


cdef void worker_begin(tst_worker *worker, int no) noexcept nogil:
    """As new, whoever had that number before. Others may be reading its counters."""
    cdef uint64_t *counters = <uint64_t *>&worker.stats
    cdef size_t i
    for i in range(sizeof(tst_stats) // sizeof(uint64_t)):
        store64(counters + i, 0, RELAXED)
    store64(&worker.calls, 0, RELEASE)
    store64(&worker.waiting_since, 0, RELAXED)
    store64(&worker.slow_calls, 0, RELAXED)
    store64(&worker.slow_since, 0, RELAXED)
    store64(&worker.slow_logged, 0, RELAXED)
    worker.no = no
    worker.ident = 0
    worker.current = NULL
    worker.left = NULL
    worker.since = worker.clock = worker.looked_calls = 0
    worker.tid = worker.last_shard = worker.accept_errno = worker.looks = 0
    worker.ticks.scale = tick_scale()
    worker.group = 1


cdef tst_worker *worker_at(tst_engine *engine, int no) noexcept nogil:
    """One of them; for the same threads, as start() may be making room for more."""
    return <tst_worker *>load_pointer(<void **>&engine.workers, ACQUIRE) + no


cdef int worker_count(tst_engine *engine) noexcept nogil:
    """Of the last start(); for threads that are none of its workers, and so may see the next one."""
    return <int>load32(<uint32_t *>&engine.n_workers, ACQUIRE)


cdef list worker_calls(tst_engine *engine):
    cdef int no
    return [load64(&worker_at(engine, no).calls, ACQUIRE) for no in range(worker_count(engine))]


cdef void begin_counting(TstPool pool, uint64_t added) noexcept:
    """All counters begin anew, under an odd version. What was added already will be closed in this run."""
    add32(&pool.engine.counters_version, 1, ACQ_REL)
    make_workers(pool.engine, pool.n_workers)
    store64(&pool.added, added, RELAXED)
    store64(&pool.bytes_outside, 0, RELAXED)
    store64(&pool.engine.total.overflow_closed, 0, RELAXED)
    store64(&pool.engine.total.pressed, 0, RELAXED)
    store64(&pool.engine.total.overflow_refused, 0, RELAXED)
    store64(&pool.engine.total.write_closed, 0, RELAXED)
    store64(&pool.engine.closed_unserved, 0, RELAXED)
    add32(&pool.engine.counters_version, 1, RELEASE)


cdef object look_at_counters(TstPool pool):
    """Adds up what the workers have counted."""
    cdef tst_stats sum
    cdef uint64_t *counters
    cdef int i
    cdef size_t k
    workers = []
    memset(&sum, 0, sizeof(sum))
    for i in range(worker_count(pool.engine)):
        counters = <uint64_t *>&worker_at(pool.engine, i).stats
        for k in range(sizeof(tst_stats) // sizeof(uint64_t)):
            (<uint64_t *>&sum)[k] += load64(counters + k, RELAXED)
        workers.append(pool.worker_stats(i))
    return PoolStats(
        connections=open_connections(pool), listeners=len(pool.listeners), accepted=sum.accepted,
        added=load64(&pool.added, RELAXED), closed=sum.closed + load64(&pool.engine.closed_unserved, RELAXED),
        messages=sum.messages, bytes_in=sum.bytes_in,
        bytes_out=sum.bytes_out + load64(&pool.bytes_outside, RELAXED), spins=sum.spins,
        slow_calls=sum.slow_count, stale_events=sum.stale_gone + sum.stale_reused, stale_reused=sum.stale_reused,
        accept_errors=sum.accept_errors, controls=sum.controls, accept_pauses=sum.accept_pauses,
        rejected_connections=sum.rejected, idle_closed=sum.deadline_closed[DEADLINE_IDLE],
        first_byte_closed=sum.deadline_closed[DEADLINE_FIRST_BYTE],
        message_closed=sum.deadline_closed[DEADLINE_MESSAGE],
        write_closed=sum.deadline_closed[DEADLINE_WRITE] + load64(&pool.engine.total.write_closed, RELAXED),
        linger_closed=sum.deadline_closed[DEADLINE_CLOSE] + sum.deadline_closed[DEADLINE_LINGER],
        too_large_closed=sum.too_large_closed, handler_errors=sum.handler_errors,
        auto_pauses=load64(&pool.engine.total.pressed, RELAXED),
        overflow_closed=load64(&pool.engine.total.overflow_closed, RELAXED),
        overflow_refused=load64(&pool.engine.total.overflow_refused, RELAXED),
        bytes_queued=load64(&pool.engine.total.queued, RELAXED), workers=tuple(workers))


cdef uint64_t BEGAN = clock_now()
cdef uint64_t BEGAN_TICKS = tst_ticks()


cdef bint kernel_counts_ticks() noexcept:
    """The kernel takes its own time from the processor's counter: then it is steady, and the same on each core."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as file:
            return file.read().strip() in ("tsc", "arch_sys_counter")
    except OSError:
        return False


cdef uint64_t tick_scale() noexcept nogil:
    """Nanoseconds in a tick, times 2**32; 0 where ticks are not to be trusted."""
    cdef uint64_t elapsed = clock_now() - BEGAN
    cdef uint64_t ticks = tst_ticks() - BEGAN_TICKS
    if ticks == 0 or not TICKS_COUNT:
        return 0
    while elapsed < 5000000:       # two readings of the clock, each good to some 50 ns, over 5 ms: an error of 1e-5
        elapsed = clock_now() - BEGAN
        ticks = tst_ticks() - BEGAN_TICKS
    return <uint64_t>(<double>elapsed / <double>ticks * 4294967296.0)


cdef bint TICKS_COUNT = kernel_counts_ticks()
