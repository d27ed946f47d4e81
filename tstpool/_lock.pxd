# cython: language_level=3
"""A spin lock of four bytes, for sections of a few dozen instructions.

Why not a pthread mutex: there is one lock for each connection and it is taken once for each `send`; four bytes instead
of forty and one atomic exchange instead of two are worth having there. Sections under it never block, make no system
call but epoll_ctl and rare ones that do not wait either, and never attach to the interpreter: whoever spins waits for a
memcpy at most; if the holder was descheduled in the middle, the waiter gives its time slice away.
"""
from libc.stdint cimport uint32_t

from tstpool._libc cimport ACQUIRE, RELAXED, RELEASE, exchange32, load32, sched_yield, store32, tst_pause, tst_rarely

cdef enum:
    SPINS_BEFORE_YIELD = 64


cdef inline void spin_lock(uint32_t *lock) noexcept nogil:
    cdef int spins = 0
    while tst_rarely(exchange32(lock, 1, ACQUIRE) != 0):
        while load32(lock, RELAXED):
            spins += 1
            if spins < SPINS_BEFORE_YIELD:
                tst_pause()
            else:
                sched_yield()


cdef inline void spin_unlock(uint32_t *lock) noexcept nogil:
    store32(lock, 0, RELEASE)
