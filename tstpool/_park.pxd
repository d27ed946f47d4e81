# cython: language_level=3
"""Workers that have no shard: standbys, the watcher among them, and the stall rule.

A worker that is not needed parks here. One of the parked ones is the *watcher*. While any shard runs handlers it wakes
now and then and looks at a counter that each worker bumps when it enters and leaves a handler. If a worker is found in
the same call at two looks, and it is not on a processor (it sleeps or waits: its handler blocks), the watcher takes the
shard over. A handler that computes keeps its shard for RUNNING_LOOKS: under a GIL nobody would gain by an earlier
change, and a thread that was merely descheduled looks the same.

A look costs some 15 microseconds of the processor that it interrupts, and a timer that is soon due makes each sleep of
that processor dearer: with one client and a look every 4 ms a C loop lost a fifth of its rate, with one every 32 ms
nothing that could be measured. So the time between two looks is a thousandth of the time for which no handler has
blocked (LOOK_PART), from LOOK_EVERY to CALM_EVERY: those who wait behind handlers that block lose about a thousandth of
the time to that, however often handlers do. A look that finds a worker inside a handler is followed by a second one
LOOK_EVERY later, and by more as long as it is the same call.

With several shards it may happen that more handlers block than leave a worker for each shard. Then nobody is parked to
watch; who polls a shard looks after the others himself, now and then (engine_look), and takes turns between the shards
that are without a worker (TURN_ELSEWHERE).

When nothing has run for QUIET_TIME the watcher parks too, so an idle pool makes no wake-ups; whoever begins to run
handlers wakes it (`watcher_asleep`). Standbys and the watcher wait on condition variables of their own: with one for
both, a wake-up meant for the watcher reaches a standby and is lost.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strrchr

from tstpool._libc cimport (
    ACQUIRE, O_CLOEXEC, O_RDONLY, RELAXED, RELEASE, SEQ_CST, close, load32, load64, open_file, pthread_cond_signal,
    pthread_cond_t, pthread_cond_timedwait, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock, read, store32,
    store64, timespec)
from tstpool._shard cimport (
    PHASE_ENDING, TOKEN_POLLING, TOKEN_RUNNING, engine_wake_looker, token_move, token_of, tst_engine, tst_shard,
    tst_worker)
from tstpool._stats cimport NANOSECOND, clock_now
from tstpool._turn cimport slow_note, worker_waited

cdef extern from "<stdio.h>" nogil:
    int snprintf(char *buffer, size_t size, const char *format, ...)

cdef enum:
    LOOK_EVERY = 1000000       # all in nanoseconds
    CALM_EVERY = 32000000
    LOOK_PART = 1024           # of the time since a handler blocked
    QUIET_TIME = 50000000
    RUNNING_LOOKS = 10

cdef enum:
    SUSPECT_NOBODY = 0
    SUSPECT_CALL = 1           # a worker is inside a handler
    SUSPECT_SAME_CALL = 2      # ... and was in the same call at the look before

cdef enum:
    PARK_SHARD = 0             # the worker now holds a shard's token
    PARK_IDLE = 1              # it had nothing to do for idle_time, and a handler wants to know
    PARK_END = 2               # the pool has stopped


cdef inline int wait_until(tst_engine *engine, pthread_cond_t *condition, uint64_t when) noexcept nogil:
    """Waits with the mutex released; `when` in monotonic nanoseconds, 0: for ever. Not 0: the time is over."""
    cdef timespec until
    if when == 0:
        return pthread_cond_wait(condition, &engine.mutex)
    until.tv_sec = <long>(when // NANOSECOND)
    until.tv_nsec = <long>(when % NANOSECOND)
    return pthread_cond_timedwait(condition, &engine.mutex, &until)


cdef inline bint thread_is_running(int tid) noexcept nogil:
    """Whether the kernel has the thread on a processor or in the queue for one ("R" in /proc)."""
    cdef char text[256]
    cdef char *state
    cdef ssize_t n
    cdef int fd
    snprintf(text, sizeof(text), "/proc/self/task/%d/stat", tid)
    fd = open_file(text, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    n = read(fd, text, sizeof(text) - 1)
    close(fd)
    if n <= 0:
        return False
    text[n] = 0
    state = strrchr(text, c')')    # the name before it may hold anything, brackets too
    return state != NULL and state[1] == c' ' and state[2] == c'R'


cdef inline bint worker_is_stuck(tst_worker *worker) noexcept nogil:
    """One look of the watcher at a worker whose token says RUNNING."""
    cdef uint64_t calls = load64(&worker.calls, ACQUIRE)
    if calls % 2 == 0 or calls != worker.looked_calls:
        worker.looked_calls = calls
        worker.looks = 0
        return False
    worker.looks += 1
    return worker.looks >= RUNNING_LOOKS or not thread_is_running(worker.tid)


cdef inline void slow_expect(tst_engine *engine, tst_worker *holder, uint64_t calls) noexcept nogil:
    """A handler is stuck: whoever polls looks again in slow_handler, and if it still is, logs where (TURN_SLOW)."""
    if engine.log_slow:
        slow_note(holder, calls)
        if load64(&engine.slow_look, RELAXED) == 0:
            store64(&engine.slow_look, clock_now() + engine.slow_handler, RELEASE)


cdef inline bint any_shard_running(tst_engine *engine) noexcept nogil:
    cdef int i
    cdef uint64_t token
    for i in range(engine.n_shards):
        token = load64(&engine.shards[i].token, SEQ_CST)
        if token != 0 and token & 0xff == TOKEN_RUNNING:
            return True
    return False


cdef inline bint any_shard_free(tst_engine *engine) noexcept nogil:
    """One that nobody polls. Mutex held."""
    cdef int i
    for i in range(engine.n_shards):
        if load64(&engine.shards[i].token, SEQ_CST) == 0 and not load32(&engine.shards[i].done, ACQUIRE):
            return True
    return False


cdef inline tst_shard *take_over_stalled(tst_engine *engine, tst_worker *worker, bint *any_running,
                                         int *suspicion) noexcept nogil:
    """One look at all shards. Returns a shard that was taken from its stuck holder, or NULL.

    any_running: a shard runs handlers. suspicion: SUSPECT_*, what its worker does.
    """
    cdef int i
    cdef uint64_t token, calls
    cdef tst_shard *shard
    cdef tst_worker *holder
    any_running[0] = False
    suspicion[0] = SUSPECT_NOBODY
    for i in range(engine.n_shards):
        shard = &engine.shards[i]
        token = load64(&shard.token, SEQ_CST)
        if token == 0 or token & 0xff != TOKEN_RUNNING:
            continue
        any_running[0] = True
        holder = &engine.workers[(token >> 8) - 1]
        if worker_is_stuck(holder):
            holder.looks = 0
            calls = holder.looked_calls
            if token_move(shard, token, token_of(worker.no, TOKEN_RUNNING)):
                engine.blocked_at = clock_now()
                slow_expect(engine, holder, calls)
                return shard
        if holder.looks > 0:
            suspicion[0] = SUSPECT_SAME_CALL
        elif holder.looked_calls % 2 and suspicion[0] == SUSPECT_NOBODY:
            suspicion[0] = SUSPECT_CALL
    return NULL


cdef inline tst_shard *take_free_shard(tst_engine *engine, tst_worker *worker) noexcept nogil:
    """A shard that nobody polls, or NULL. Mutex held."""
    cdef int i
    cdef tst_shard *shard
    for i in range(engine.n_shards):
        shard = &engine.shards[(worker.last_shard + 1 + i) % engine.n_shards]
        if not load32(&shard.done, ACQUIRE) and token_move(shard, 0, token_of(worker.no, TOKEN_POLLING)):
            return shard
    return NULL


cdef inline tst_shard *engine_look(tst_engine *engine, tst_worker *worker) noexcept nogil:
    """One look of a worker that polls a shard, when nobody else is there to watch: a shard taken from its stuck holder,
    or NULL."""
    cdef tst_shard *shard = NULL
    cdef bint running = False
    cdef int suspicion = 0
    pthread_mutex_lock(&engine.mutex)
    if engine.watcher == -1:
        shard = take_over_stalled(engine, worker, &running, &suspicion)
    pthread_mutex_unlock(&engine.mutex)
    return shard


cdef inline uint64_t look_interval(tst_engine *engine, uint64_t now) noexcept nogil:
    """Between two looks as long as nobody is suspected. Mutex held."""
    cdef uint64_t interval = (now - engine.blocked_at) // LOOK_PART
    return max(<uint64_t>LOOK_EVERY, min(<uint64_t>CALM_EVERY, interval))


cdef inline tst_shard *watch(tst_engine *engine, tst_worker *worker, uint64_t idle_at) noexcept nogil:
    """The watcher's life until it takes a shard over (returned), or there is a reason to look around (NULL). Mutex
    held."""
    cdef tst_shard *shard = NULL
    cdef bint running, second = False
    cdef int suspicion = SUSPECT_NOBODY
    cdef uint64_t now = clock_now()
    cdef uint64_t busy_at = now
    store32(<uint32_t *>&engine.watcher, <uint32_t>worker.no, RELAXED)
    while load32(&engine.phase, ACQUIRE) != PHASE_ENDING and (idle_at == 0 or now < idle_at):
        if now - busy_at < QUIET_TIME:
            second = suspicion == SUSPECT_SAME_CALL or (suspicion == SUSPECT_CALL and not second)
            wait_until(engine, &engine.watch, now + (LOOK_EVERY if second else look_interval(engine, now)))
        else:
            store32(&engine.watcher_asleep, 1, SEQ_CST)
            if not any_shard_running(engine):  # else: it turned RUNNING before it could see us asleep
                wait_until(engine, &engine.watch, idle_at)
            store32(&engine.watcher_asleep, 0, RELAXED)
        now = clock_now()
        shard = take_over_stalled(engine, worker, &running, &suspicion)
        if shard != NULL or any_shard_free(engine):
            break
        if running:
            busy_at = now
    store32(<uint32_t *>&engine.watcher, <uint32_t>-1, SEQ_CST)
    pthread_cond_signal(&engine.standby)       # somebody else is to watch now
    return shard


cdef inline int engine_park(tst_engine *engine, tst_worker *worker, tst_shard **shard, bint *taken_over) noexcept nogil:
    """Parks until there is something to do. Returns PARK_*; with PARK_SHARD, `taken_over` says whether from a stuck
    worker."""
    cdef uint64_t began = clock_now()
    cdef uint64_t idle_at = began + engine.idle_time if engine.call_idle else 0
    cdef int result = PARK_END
    store64(&worker.waiting_since, began, RELAXED)
    taken_over[0] = False
    pthread_mutex_lock(&engine.mutex)
    while load32(&engine.phase, ACQUIRE) != PHASE_ENDING:
        shard[0] = take_free_shard(engine, worker)
        if shard[0] != NULL:
            result = PARK_SHARD
            break
        if idle_at and clock_now() >= idle_at:
            result = PARK_IDLE
            break
        if engine.watcher == -1:
            shard[0] = watch(engine, worker, idle_at)
            if shard[0] != NULL:
                taken_over[0] = True
                result = PARK_SHARD
                break
        else:
            wait_until(engine, &engine.standby, idle_at)
    if engine.watcher == -1:
        pthread_cond_signal(&engine.standby)   # we may have been woken to watch, and leave for another reason
        # Or have watched, and nobody else is parked. Whoever begins to run later sees to it himself.
        if engine.n_shards > 1 and (any_shard_running(engine) or any_shard_free(engine)):
            engine_wake_looker(engine)
    pthread_mutex_unlock(&engine.mutex)
    worker_waited(engine, worker, clock_now())
    return result
