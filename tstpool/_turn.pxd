# cython: language_level=3
"""One turn of the worker that holds a shard's token, as far as it needs no interpreter.

    1  finish    what the handlers of the turn before have left: send, release, arm           batch_finish
    2  drain     after stop(): close what is open, then abort it                              shard_drain
    3  poll      requests of other threads, then epoll_wait                                   shard_poll
    4  collect   per event: accept, or acquire, receive, cut; an entry for each connection.   shard_collect
                 Then compiled handlers run                                                   batch_run_compiled
    5  return    when an entry needs the interpreter; else go back to 1                       shard_turn

Between 5 and 1 `_worker.pxi` attaches to the interpreter once and runs the remaining entries' handlers.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from tstpool._collect cimport accepting_may_resume, listeners_resume, shard_collect
from tstpool._conn cimport (
    PEND_CLOSE, PEND_TIMER, STATE_OPEN, TABLE_CHUNK, TABLE_CHUNKS, TYPE_LISTEN, generation_of, table_chunk,
    tst_connection)
from tstpool._entry cimport batch_finish, connection_drop_output_of
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, RELAXED, RELEASE, SEQ_CST, compare_exchange64, load32, load64, load_pointer,
    pthread_cond_broadcast, pthread_cond_signal, pthread_mutex_lock, pthread_mutex_unlock, store32, store64)
from tstpool._poll cimport sys_alarm, sys_wait
from tstpool._queue cimport stock_has_litter
from tstpool._run cimport batch_run_compiled
from tstpool._shard cimport (
    BATCH_EVENTS, PHASE_DRAINING, PHASE_ENDING, SLEEPING_LONG, SLEEPING_NOT, SLEEPING_SHORT, TOKEN_RUNNING, batch_empty,
    engine_wake_looker, shard_ask, shard_enter_running, shard_leave_running, shard_take_requests, tst_batch, tst_engine,
    tst_shard, tst_worker)
from tstpool._stats cimport clock_now, count, tick_base
from tstpool._timer cimport TICK_BITS, tick_before, tick_of, wheel_fire, wheel_next

cdef enum:
    ELSEWHERE_FREE = 1
    ELSEWHERE_RUNNING = 2

cdef enum:
    SHARE_TIME = 1000000                   # nanoseconds that a shard is polled while another one is without a worker
    DRAIN_LOOK = 20000000                  # nanoseconds between two looks whether all is closed, while stopping

cdef enum:
    POLLS_VAIN_MOST = 8                    # busy polls in vain: 2, 4, ... up to 256 naps are then slept as they come

cdef enum:
    TURN_LOST = 0                          # the shard was taken over meanwhile
    TURN_RUN = 1                           # entries wait for the interpreter
    TURN_IDLE = 2                          # nothing came for idle_time, and a handler wants to know
    TURN_ENDED = 3                         # stopping, and nothing is open here any more
    TURN_COMPLAIN = 4                      # accept failed: say so, then go on
    TURN_LITTER = 5                        # objects that were sent wait to be let go, and nothing else is to be done
    TURN_ELSEWHERE = 6                     # other shards need to be looked after
    TURN_SLOW = 7                          # a handler has been stuck for slow_handler: log where


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
                    connection_drop_output_of(connection, generation_of(word))
                shard_ask(connection, generation_of(word), PEND_CLOSE)


cdef inline bint shard_drain(tst_engine *engine, tst_shard *shard, uint64_t now) noexcept nogil:
    """One step of stopping. True: nothing is open here any more."""
    cdef tst_connection *listener = shard.listeners
    if not shard.draining:
        store32(&shard.draining, 1, RELAXED)
        while listener != NULL:            # first of all: nobody is to come to a server that lets go of who is there
            shard_ask(listener, generation_of(load64(&listener.state, ACQUIRE)), PEND_CLOSE)
            listener = listener.timer_next
        shard_close_all(engine, shard, False)
    if not shard.aborted and now >= load64(&engine.drain_until, ACQUIRE):
        store32(&shard.aborted, 1, RELAXED)
        shard_close_all(engine, shard, True)
    return load32(&shard.open, ACQUIRE) == 0


cdef inline void engine_shard_ended(tst_engine *engine, tst_shard *shard) noexcept nogil:
    """The last shard to end lets all workers go."""
    cdef int i
    cdef bint all_done = True
    pthread_mutex_lock(&engine.mutex)
    store32(&shard.done, 1, RELEASE)
    store64(&shard.token, 0, RELEASE)
    for i in range(engine.n_shards):
        if not load32(&engine.shards[i].done, ACQUIRE):
            all_done = False
    if all_done:
        store32(&engine.phase, PHASE_ENDING, RELEASE)
        pthread_cond_broadcast(&engine.standby)
        pthread_cond_broadcast(&engine.watch)
    pthread_mutex_unlock(&engine.mutex)


# ------------------------------------------------------------------------------------------------- timers

cdef inline void shard_fire_timers(tst_shard *shard, uint64_t now) noexcept nogil:
    """Asks each connection whose timer is due what its deadline is now (connection_expire)."""
    cdef tst_connection *connection
    cdef uint64_t word = 0
    cdef uint32_t tick = tick_of(now)
    if tick == shard.wheel.tick:
        return                             # that was done in this tick
    while True:
        pthread_mutex_lock(&shard.mutex)
        connection = wheel_fire(&shard.wheel, tick)
        if connection != NULL:             # it leaves the wheel before it is freed, so this is its generation
            word = load64(&connection.state, ACQUIRE)
        pthread_mutex_unlock(&shard.mutex)
        if connection == NULL:
            return
        shard_ask(connection, generation_of(word), PEND_TIMER)


cdef inline uint64_t shard_next_timer(tst_shard *shard, uint64_t now) noexcept nogil:
    """When the wheel has something to do, in nanoseconds; 0: never."""
    cdef uint32_t tick = 0
    cdef bint found
    pthread_mutex_lock(&shard.mutex)
    found = wheel_next(&shard.wheel, &tick)
    pthread_mutex_unlock(&shard.mutex)
    if not found:
        return 0
    if not tick_before(tick_of(now), tick):
        return now                         # it was due while handlers ran
    return ((now >> TICK_BITS) + <uint32_t>(tick - tick_of(now))) << TICK_BITS


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


cdef inline int turn_elsewhere(tst_engine *engine, tst_shard *shard) noexcept nogil:
    """What other shards need of the holder of this one, when there are fewer free workers than shards, because handlers
    block. ELSEWHERE_FREE: one has nobody to poll it. ELSEWHERE_RUNNING: one runs handlers and nobody watches. Else 0.
    """
    cdef int i
    cdef int result = 0
    cdef uint64_t token
    cdef bint watched = <int>load32(<uint32_t *>&engine.watcher, SEQ_CST) >= 0
    for i in range(engine.n_shards):
        token = load64(&engine.shards[i].token, SEQ_CST)
        if i == shard.no or load32(&engine.shards[i].done, RELAXED):
            continue
        if token == 0:
            result |= ELSEWHERE_FREE
        elif not watched and token & 0xff == TOKEN_RUNNING:
            result |= ELSEWHERE_RUNNING
    return result


cdef inline void shard_yield(tst_engine *engine, tst_worker *worker, tst_shard *shard) noexcept nogil:
    """Gives the token back; whoever is free takes it: a worker that is parked, perhaps as the watcher, or one that
    sleeps in another shard, and takes turns between the two."""
    worker.last_shard = shard.no
    pthread_mutex_lock(&engine.mutex)
    store64(&shard.token, 0, SEQ_CST)
    pthread_cond_signal(&engine.standby)
    pthread_cond_signal(&engine.watch)
    pthread_mutex_unlock(&engine.mutex)
    engine_wake_looker(engine)


cdef inline int shard_set_alarm(tst_shard *shard, uint64_t now) noexcept nogil:
    """Sees to it that the shard does not sleep through its next timer. Returns the time-out for epoll_wait: 0, one is
    due; -1, the alarm will wake it.

    The time-out alone would be simpler, but for it the kernel sets and clears a timer at each sleep, which with one
    client is a twentieth of the whole. The alarm stays set while messages come and go; timers are usually put off
    (_timer.pxd), and an alarm that comes too early costs one turn.
    """
    cdef uint64_t when = shard_next_timer(shard, now)
    if when == 0:
        return -1
    if when <= now:
        return 0
    if shard.alarm == 0 or when < shard.alarm:
        shard.alarm = when if sys_alarm(shard.timer_fd, when) >= 0 else 0
    return -1 if shard.alarm else milliseconds_until(when, now, -1)


cdef inline int shard_timeout(tst_engine *engine, tst_worker *worker, tst_shard *shard, uint64_t now,
                              int elsewhere) noexcept nogil:
    """How long it may sleep as far as timers do not matter."""
    cdef int timeout = -1
    cdef uint64_t waiting_since = load64(&worker.waiting_since, RELAXED) or now
    if shard.todo != NULL or accepting_may_resume(engine, shard, now):
        return 0
    if elsewhere:
        timeout = milliseconds_until(now + SHARE_TIME, now, timeout)
    if engine.call_idle:
        timeout = milliseconds_until(waiting_since + engine.idle_time, now, timeout)
    timeout = milliseconds_until(shard.accept_again, now, timeout)
    timeout = milliseconds_until(load64(&engine.slow_look, RELAXED), now, timeout)
    if shard.draining:
        # Another thread's flush() may be the last to let go of a connection, and it wakes nobody.
        timeout = milliseconds_until(now + DRAIN_LOOK, now, timeout)
    return timeout


cdef inline int shard_busy_poll(tst_engine *engine, tst_shard *shard, tst_batch *batch, uint64_t now) noexcept nogil:
    """Polls without sleeping, for busy_poll at most. Returns the number of events, 0: none, or somebody has a request;
    or -errno.

    Going to sleep and being woken take longer than most messages do. A server that is faster than its clients pays that
    for each of them. (stop() is an event too.)

    It must not cost more than it spares: a client that needs this very processor, say, cannot answer while we poll. So
    the next try after one in vain waits for 2 short sleeps, then for 4, 8, ... 256, until one pays again.
    """
    cdef int n = 0
    if shard.sit_out:
        shard.sit_out -= 1
        return 0
    while n == 0 and load_pointer(&shard.requests, RELAXED) == NULL:
        if clock_now() - now >= engine.busy_poll:
            if shard.vain < POLLS_VAIN_MOST:
                shard.vain += 1
            shard.sit_out = <uint32_t>1 << shard.vain
            return 0
        n = sys_wait(shard.epoll_fd, batch.events, BATCH_EVENTS, 0)
    shard.vain = 0
    return n


cdef inline int shard_sleep(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                            uint64_t now, int elsewhere, int timeout) noexcept nogil:
    """epoll_wait, at most `timeout` milliseconds, and not at all if somebody has a request.

    Whoever pushes a request reads `sleeping` after the push; we look at the stack after setting it. One of the two sees
    the other, so a request never waits for an event, and a busy shard is never written to. The same holds for a worker
    without a shard that sets a timer (shard_set_timer).
    """
    cdef int n, until_timer
    if load64(&worker.waiting_since, RELAXED) == 0:    # else it has only looked whether something is due again
        store64(&worker.waiting_since, now, RELAXED)
    store32(&shard.sleeping, SLEEPING_SHORT if elsewhere else SLEEPING_LONG, SEQ_CST)
    if load_pointer(&shard.requests, SEQ_CST) != NULL or (
            load32(&engine.phase, SEQ_CST) == PHASE_DRAINING and not shard.draining):
        timeout = 0
    if engine.n_shards > 1 and not elsewhere and turn_elsewhere(engine, shard):
        timeout = 0                        # it began before it could see us asleep
    until_timer = shard_set_alarm(shard, now)
    if until_timer >= 0 and (timeout < 0 or until_timer < timeout):
        timeout = until_timer
    n = sys_wait(shard.epoll_fd, batch.events, BATCH_EVENTS, timeout)
    store32(&shard.sleeping, SLEEPING_NOT, RELAXED)
    if engine.busy_poll:
        shard.napped = clock_now() - now < engine.busy_poll
    return n


cdef inline int shard_poll(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                           uint64_t now, int elsewhere) noexcept nogil:
    """Waits for events. Returns their number or -errno."""
    cdef int timeout = shard_timeout(engine, worker, shard, now, elsewhere)
    cdef int n = 0
    if timeout == 0:
        n = sys_wait(shard.epoll_fd, batch.events, BATCH_EVENTS, 0)
    else:
        if shard.napped and not elsewhere and shard_set_alarm(shard, now) < 0:
            n = shard_busy_poll(engine, shard, batch, now)
        if n == 0:
            n = shard_sleep(engine, worker, shard, batch, now, elsewhere, timeout)
    batch.n_events = n if n > 0 else 0
    batch.next_event = 0
    return n


cdef inline bint slow_is_due(tst_engine *engine, uint64_t now) noexcept nogil:
    """True for one of those who poll, once it is time to look for handlers that are stuck."""
    cdef uint64_t due = load64(&engine.slow_look, ACQUIRE)
    return due != 0 and now >= due and compare_exchange64(&engine.slow_look, &due, 0, False, ACQ_REL, RELAXED)


cdef inline void slow_note(tst_worker *worker, uint64_t calls) noexcept nogil:
    """The worker is in a handler, and was not in that call when it was looked at last."""
    store64(&worker.slow_since, clock_now(), RELAXED)
    store64(&worker.slow_calls, calls, RELEASE)


cdef inline int slow_next(tst_engine *engine, int first, bint *again) noexcept nogil:
    """A worker, from `first` on, that has been in one handler for slow_handler and was not logged for it; -1: none.
    `again`: one must be looked at once more."""
    cdef tst_worker *worker
    cdef uint64_t calls
    cdef int no
    for no in range(first, engine.n_workers):
        worker = &engine.workers[no]
        calls = load64(&worker.calls, ACQUIRE)
        if calls % 2 == 0 or calls == load64(&worker.slow_logged, RELAXED):
            continue
        if calls != load64(&worker.slow_calls, ACQUIRE):
            slow_note(worker, calls)
        elif clock_now() - load64(&worker.slow_since, RELAXED) >= engine.slow_handler:
            store64(&worker.slow_logged, calls, RELAXED)
            return no
        again[0] = True
    return -1


cdef inline void worker_waited(tst_engine *engine, tst_worker *worker, uint64_t now) noexcept nogil:
    """Counts how often the wait that ends now was longer than idle_time (S37)."""
    cdef uint64_t since = load64(&worker.waiting_since, RELAXED)
    if since:
        count(&worker.stats.idle_count, (now - since) // engine.idle_time)
        store64(&worker.waiting_since, 0, RELAXED)


cdef inline int shard_turn(tst_engine *engine, tst_worker *worker, tst_shard *shard, tst_batch *batch,
                           bint ran) noexcept nogil:
    """Turns without the interpreter until it is needed: see the head of this file. `ran`: the batch's handlers have
    run.

    Returns TURN_*, or -errno when epoll itself fails.
    """
    cdef uint64_t now = tick_base(&worker.ticks)
    cdef int n, elsewhere = 0
    while True:
        batch_finish(worker, batch, now)
        if ran and not shard_leave_running(worker, shard):
            return TURN_LOST
        ran = False
        if batch_empty(batch) < 0:
            return -ENOMEM
        if load32(&engine.phase, ACQUIRE) == PHASE_DRAINING and shard_drain(engine, shard, now):
            return TURN_ENDED
        shard_take_requests(shard)
        if batch.next_event >= batch.n_events:
            if stock_has_litter(&shard.stock):
                return TURN_LITTER
            if slow_is_due(engine, now):
                return TURN_SLOW
            if engine.n_shards > 1:
                elsewhere = turn_elsewhere(engine, shard)
                if elsewhere and now - worker.since >= SHARE_TIME:
                    worker.since = now
                    return TURN_ELSEWHERE
            n = shard_poll(engine, worker, shard, batch, now, elsewhere)
            now = tick_base(&worker.ticks)
            if n < 0 and not shard.draining:
                return n
            if n == 0 and engine.call_idle and load64(&worker.waiting_since, RELAXED) \
                    and now - load64(&worker.waiting_since, RELAXED) >= engine.idle_time:
                worker_waited(engine, worker, now)
                return TURN_IDLE
            shard_take_requests(shard)
            if n != 0 or shard.todo != NULL:
                worker_waited(engine, worker, now)
        listeners_resume(engine, shard, now)
        shard_fire_timers(shard, now)
        shard_collect(engine, worker, shard, batch, now)
        if batch.n_compiled and not batch_run_compiled(engine, worker, shard, batch):
            ran = True                     # one was stuck: its entry may be left to us, the rest is another's
            now = tick_base(&worker.ticks)     # that handler took its time
            if worker.left != NULL:
                return TURN_RUN
        elif batch.n_python:
            shard_enter_running(engine, worker, shard)
            return TURN_RUN
        elif worker.accept_errno:
            return TURN_COMPLAIN
