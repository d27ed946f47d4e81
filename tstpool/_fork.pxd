# cython: language_level=3
"""How forks wait for descriptors on the move.

fork() copies the table of descriptors, and later the memory. What is accepted or closed meanwhile would be open in
the child and in no slot there: nobody would close it, and its peer would see no end for as long as the child lives.
So a fork waits for those who have a descriptor on the move, and they wait for the fork.

Neither waits for ever. A process may fork in the middle of anything: with a lock of an allocator's held that somebody
needs here, or while one closes a socket that its owner has told to linger. A copy too many is better than a deadlock.
"""
from libc.stdint cimport uint32_t

from tstpool._libc cimport RELAXED, SEQ_CST, add32, load32, poll, store32, sub32, tst_rarely

cdef enum:
    FORK_WAITS = 1000          # of a millisecond


cdef extern from *:
    """
    static unsigned int tst_moving __attribute__((unused)), tst_forks __attribute__((unused));
    """
    uint32_t tst_moving        # atomic: threads that have a descriptor on the move
    uint32_t tst_forks         # atomic: threads that are forking


cdef inline void descriptor_moves() noexcept nogil:
    """From here to descriptor_moved() no fork happens: a descriptor is to come into its slot, or to go with it. Nothing
    in between waits, or attaches to the interpreter. Not with a spin lock held."""
    cdef int waits = 0
    add32(&tst_moving, 1, SEQ_CST)
    while tst_rarely(load32(&tst_forks, SEQ_CST) != 0) and waits < FORK_WAITS:
        sub32(&tst_moving, 1, SEQ_CST)
        poll(NULL, 0, 1)
        waits += 1
        add32(&tst_moving, 1, SEQ_CST)


cdef inline void descriptor_moved() noexcept nogil:
    sub32(&tst_moving, 1, SEQ_CST)


cdef inline void fork_begins() noexcept nogil:
    """One of the two sees the other: who forks counts itself, then looks; so does who moves a descriptor."""
    cdef int waits = 0
    add32(&tst_forks, 1, SEQ_CST)
    while load32(&tst_moving, SEQ_CST) and waits < FORK_WAITS:
        poll(NULL, 0, 1)
        waits += 1


cdef inline void fork_is_over() noexcept nogil:
    """In the parent, also when it has failed."""
    sub32(&tst_forks, 1, SEQ_CST)


cdef inline void fork_begins_anew() noexcept nogil:
    """In the child: of those who were counted, nobody is there."""
    store32(&tst_moving, 0, RELAXED)
    store32(&tst_forks, 0, RELAXED)
