# cython: language_level=3, freethreading_compatible=True
"""The engine's statistics alone, as counting.py times them."""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from tstpool._stats cimport clock_now, count, stats_job, tick_base, tick_now, tst_stats, tst_tick_clock


cdef inline void message(tst_stats *stats, tst_tick_clock *clock) noexcept nogil:
    """All that is counted and timed for a message that comes alone: it is received, a job of its own, and answered."""
    cdef uint64_t begin
    count(&stats.bytes_in, 64)
    begin = tick_now(clock)
    count(&stats.messages, 1)
    stats_job(stats, 1, begin, tick_now(clock))
    count(&stats.bytes_out, 64)


def nanoseconds(uint64_t messages, bint ticks):
    """For each of so many messages. `ticks`: the engine trusts the processor's counter of time here."""
    cdef tst_stats stats
    cdef tst_tick_clock clock
    cdef uint64_t began, n
    memset(&stats, 0, sizeof(stats))
    clock.scale = (<uint64_t>1 << 31) if ticks else 0      # any but 0 takes the same time
    with nogil:
        began = tick_base(&clock)
        for n in range(messages):
            message(&stats, &clock)
        began = clock_now() - began
    assert stats.exec_count == stats.messages == messages and stats.bytes_in == stats.bytes_out == 64 * messages
    return <double>began / <double>messages
