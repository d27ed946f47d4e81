# cython: language_level=3
"""Time, and what each worker counts.

A counter has one writer, its worker, and any number of readers, so a relaxed load and store are enough: on every
processor that we know they cost what a plain `+= 1` does, and a sanitizer sees that the race is meant.
"""
from libc.stdint cimport uint32_t, uint64_t

from tstpool._libc cimport CLOCK_MONOTONIC, RELAXED, clock_gettime, load64, store64, timespec

cdef enum:
    NANOSECOND = 1000000000
    QUICK_CALL = 2000          # nanoseconds: calls that take less are timed in groups
    GROUP_MOST = 32            # calls in a group
    LONG_GROUP = 100000        # nanoseconds: more than quick calls can take together
    DEADLINE_KINDS = 7         # room for a counter of each kind of deadline; whoever counts numbers them


cdef inline uint64_t clock_now() noexcept nogil:
    """Nanoseconds on the monotonic clock, the one behind Python's `time.monotonic()`."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * NANOSECOND + <uint64_t>now.tv_nsec


cdef extern from * nogil:
    """
    #include <stdint.h>
    /* The processor's counter of time, which costs a third of what the system's clock does; 0 where we know of none. */
    static inline uint64_t tst_ticks(void) {
    #if defined(__x86_64__)
        return __builtin_ia32_rdtsc();
    #elif defined(__aarch64__)
        uint64_t ticks;
        __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
        return ticks;
    #else
        return 0;
    #endif
    }
    """
    uint64_t tst_ticks()


# A clock of one thread for times between two moments of the same turn. Its base is the system's clock, read anew each
# turn; in between it counts ticks, which is good enough as long as the kernel itself takes its time from them.
cdef struct tst_tick_clock:
    uint64_t base              # nanoseconds on the monotonic clock ...
    uint64_t base_ticks        # ... at this tick
    uint64_t scale             # nanoseconds in a tick, times 2**32; 0: ticks are not to be trusted here


cdef inline uint64_t tick_base(tst_tick_clock *clock) noexcept nogil:
    """The system's clock, and the new base of the ticks."""
    clock.base = clock_now()
    clock.base_ticks = tst_ticks()
    return clock.base


cdef inline uint64_t tick_now(tst_tick_clock *clock) noexcept nogil:
    """Nanoseconds on the monotonic clock, as far as ticks tell."""
    cdef uint64_t ticks = tst_ticks() - clock.base_ticks
    if clock.scale == 0 or ticks >> 32:        # the product must not wrap
        return tick_base(clock)
    return clock.base + (ticks * clock.scale >> 32)


cdef struct tst_stats:
    uint64_t exec_count      # jobs: handler calls
    uint64_t slow_count      # of those, the ones that took slow_handler or longer
    uint64_t idle_count      # times it had nothing to do for `idle_time`
    uint64_t sum_time        # nanoseconds in jobs
    uint64_t most_elapsed    # nanoseconds of the longest job
    uint64_t begin_time      # of the last job, monotonic nanoseconds
    uint64_t end_time
    uint64_t messages        # handler calls for input
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t spins           # calls repeated at once although nothing new had come (S14, unread input)
    uint64_t stale_gone      # events of a connection that is gone
    uint64_t stale_reused    # the same, and its descriptor is another connection's
    uint64_t accepted
    uint64_t closed
    uint64_t accept_errors
    uint64_t controls        # epoll_ctl calls made for connections
    uint64_t accept_pauses   # times that accepting stopped: too many connections, or the process ran out of something
    uint64_t rejected        # connections that on_connect refused, or that came when there were too many
    uint64_t deadline_closed[DEADLINE_KINDS]  # connections that missed a deadline
    uint64_t too_large_closed  # connections whose message was longer than allowed
    uint64_t handler_errors  # exceptions that on_error was told of, or that came out of hooks that nobody is told of


cdef inline void count(uint64_t *counter, uint64_t amount) noexcept nogil:
    """Adds to a counter that only this thread writes."""
    store64(counter, load64(counter, RELAXED) + amount, RELAXED)


cdef inline uint64_t stats_job(tst_stats *stats, uint64_t calls, uint64_t begin, uint64_t end) noexcept nogil:
    """Enters so many handler calls that ran from `begin` to `end`. Returns the length of the longest, if it was the
    longest so far, else 0. Quick calls that were timed together have the same length each; if something took long
    among them, then one of them."""
    cdef uint64_t elapsed = end - begin
    count(&stats.exec_count, calls)
    count(&stats.sum_time, elapsed)
    if calls > 1 and elapsed < LONG_GROUP:
        elapsed //= calls
    store64(&stats.begin_time, begin, RELAXED)
    store64(&stats.end_time, end, RELAXED)
    if elapsed <= load64(&stats.most_elapsed, RELAXED):
        return 0
    store64(&stats.most_elapsed, elapsed, RELAXED)
    return elapsed
