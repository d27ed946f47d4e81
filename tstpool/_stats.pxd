# cython: language_level=3
"""Time, and what each worker counts.

A counter has one writer, its worker, and any number of readers, so a relaxed load and store are enough: on every
processor that we know they cost what a plain `+= 1` does, and a sanitizer sees that the race is meant.
"""
from libc.stdint cimport uint32_t, uint64_t

from tstpool._libc cimport CLOCK_MONOTONIC, RELAXED, clock_gettime, load64, store64, timespec

cdef enum:
    NANOSECOND = 1000000000


cdef inline uint64_t clock_now() noexcept nogil:
    """Nanoseconds on the monotonic clock, the one behind Python's `time.monotonic()`."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * NANOSECOND + <uint64_t>now.tv_nsec


cdef struct tst_stats:
    uint64_t exec_count      # jobs: handler calls
    uint64_t idle_count      # times it had nothing to do for `idle_time`
    uint64_t sum_time        # nanoseconds in jobs
    uint64_t most_elapsed    # nanoseconds of the longest job
    uint64_t begin_time      # of the last job, monotonic nanoseconds
    uint64_t end_time
    uint64_t messages        # handler calls for input
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t spins           # calls repeated at once although nothing new had come (S14, unread input)
    uint64_t stale_events    # events of a connection that is gone
    uint64_t accepted
    uint64_t closed
    uint64_t accept_errors
    uint64_t controls        # epoll_ctl calls made for connections


cdef inline void count(uint64_t *counter, uint64_t amount) noexcept nogil:
    """Adds to a counter that only this thread writes."""
    store64(counter, load64(counter, RELAXED) + amount, RELAXED)


cdef inline uint64_t stats_job(tst_stats *stats, uint64_t calls, uint64_t begin, uint64_t end) noexcept nogil:
    """Enters a job of so many handler calls that ran from `begin` to `end`. Returns its length if it was the longest so
    far, else 0."""
    cdef uint64_t elapsed = end - begin
    count(&stats.exec_count, calls)
    count(&stats.sum_time, elapsed)
    store64(&stats.begin_time, begin, RELAXED)
    store64(&stats.end_time, end, RELAXED)
    if elapsed <= load64(&stats.most_elapsed, RELAXED):
        return 0
    store64(&stats.most_elapsed, elapsed, RELAXED)
    return elapsed
