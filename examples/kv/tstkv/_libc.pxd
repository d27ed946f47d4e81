# cython: language_level=3
"""What the server takes from the C library that Cython does not declare itself: declarations only."""


cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t

    cdef struct timespec:
        long tv_sec
        long tv_nsec

    clockid_t CLOCK_MONOTONIC
    clockid_t CLOCK_REALTIME
    int clock_gettime(clockid_t clock, timespec *now)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef extern from * nogil:
    """
    #define kv_rarely(condition) __builtin_expect(!!(condition), 0)
    """
    bint kv_rarely(bint condition)         # the condition; the compiler keeps what follows out of the way
