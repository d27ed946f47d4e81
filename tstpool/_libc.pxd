# cython: language_level=3
"""What the engine takes from the C library and the compiler: declarations only, grouped by header.

The lowest layer. Nothing is defined here, so that every other header can be read against one list of foreign names.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64

    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data

    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_MOD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLPRI
    uint32_t EPOLLRDHUP
    uint32_t EPOLLERR
    uint32_t EPOLLHUP
    uint32_t EPOLLET
    uint32_t EPOLLONESHOT

    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int capacity, int timeout_ms)


cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t

    cdef struct sockaddr:
        pass

    cdef struct sockaddr_storage:
        uint16_t ss_family

    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen

    int SOCK_NONBLOCK
    int SOCK_CLOEXEC
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int SOL_SOCKET
    int SO_OOBINLINE
    int SHUT_RDWR
    int SHUT_WR
    int SO_ERROR
    int SO_LINGER
    cdef struct linger:
        int l_onoff
        int l_linger
    int AF_INET
    int AF_INET6
    int AF_UNIX

    # The C library's functions, not the system calls below them: in a process with threads each costs two atomic
    # operations more, because a thread could be cancelled there, a hundredth of a short message's time in all. But who
    # puts a network stack of their own under the program with LD_PRELOAD replaces these.
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
    int shutdown(int fd, int how)


cdef extern from * nogil:
    """
    #include <sys/ioctl.h>
    #define TST_OUTQ_UNSENT 0x894b     /* SIOCOUTQNSD, of <linux/sockios.h>, which no C library has */
    """
    unsigned long FIONREAD
    unsigned long OUTQ "TIOCOUTQ"          # SIOCOUTQ is the same
    unsigned long OUTQ_UNSENT "TST_OUTQ_UNSENT"
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY


cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP


# accept4 is declared by <sys/socket.h> only under _GNU_SOURCE, which Python.h defines.
cdef extern from "<sys/socket.h>" nogil:
    int accept4(int fd, sockaddr *address, socklen_t *size, int flags)


cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents

    short POLLOUT
    int poll(pollfd *fds, unsigned long count, int timeout_ms)


cdef extern from "<fcntl.h>" nogil:
    int F_GETFL
    int F_SETFL
    int O_NONBLOCK
    int O_RDONLY
    int O_CLOEXEC
    int fcntl(int fd, int command, ...)
    int open_file "open"(const char *path, int flags)


cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void *buffer, size_t size)
    ssize_t write(int fd, const void *buffer, size_t size)
    int gettid()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t

    cdef struct timespec:
        long tv_sec
        long tv_nsec

    cdef struct itimerspec:
        timespec it_value

    clockid_t CLOCK_MONOTONIC
    int clock_gettime(clockid_t clock, timespec *now)


cdef extern from "<sys/timerfd.h>" nogil:
    int TFD_CLOEXEC
    int TFD_NONBLOCK
    int TFD_TIMER_ABSTIME
    int timerfd_create(clockid_t clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *fresh, itimerspec *old)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass

    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_condattr_init(pthread_condattr_t *attributes)
    int pthread_condattr_setclock(pthread_condattr_t *attributes, clockid_t clock)
    int pthread_condattr_destroy(pthread_condattr_t *attributes)
    int pthread_cond_init(pthread_cond_t *condition, pthread_condattr_t *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const timespec *until)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)


# The compiler's atomics are generic over the pointer's type; Cython wants one name for each type that is used.
cdef extern from * nogil:
    int RELAXED "__ATOMIC_RELAXED"
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"
    int ACQ_REL "__ATOMIC_ACQ_REL"
    int SEQ_CST "__ATOMIC_SEQ_CST"

    uint32_t load32 "__atomic_load_n"(uint32_t *place, int order)
    void store32 "__atomic_store_n"(uint32_t *place, uint32_t value, int order)
    uint32_t exchange32 "__atomic_exchange_n"(uint32_t *place, uint32_t value, int order)
    uint32_t add32 "__atomic_add_fetch"(uint32_t *place, uint32_t value, int order)
    uint32_t sub32 "__atomic_sub_fetch"(uint32_t *place, uint32_t value, int order)
    bint compare_exchange32 "__atomic_compare_exchange_n"(
        uint32_t *place, uint32_t *expected, uint32_t value, bint weak, int success, int failure)

    uint64_t load64 "__atomic_load_n"(uint64_t *place, int order)
    void store64 "__atomic_store_n"(uint64_t *place, uint64_t value, int order)
    uint64_t add64 "__atomic_add_fetch"(uint64_t *place, uint64_t value, int order)
    uint64_t fetch_or64 "__atomic_fetch_or"(uint64_t *place, uint64_t value, int order)
    uint64_t fetch_and64 "__atomic_fetch_and"(uint64_t *place, uint64_t value, int order)
    bint compare_exchange64 "__atomic_compare_exchange_n"(
        uint64_t *place, uint64_t *expected, uint64_t value, bint weak, int success, int failure)

    void *load_pointer "__atomic_load_n"(void **place, int order)
    void store_pointer "__atomic_store_n"(void **place, void *value, int order)
    void *exchange_pointer "__atomic_exchange_n"(void **place, void *value, int order)
    bint compare_exchange_pointer "__atomic_compare_exchange_n"(
        void **place, void **expected, void *value, bint weak, int success, int failure)


cdef extern from * nogil:
    """
    #ifndef TST_DEBUG
    #define TST_DEBUG 0
    #endif
    #include <stdio.h>
    #include <stdlib.h>
    /* The impossible has happened: say which invariant, then stop while the evidence is fresh. */
    static inline void tst_bug(const char *what) { fprintf(stderr, "tstpool: BUG: %s\\n", what); abort(); }
    #define tst_rarely(condition) __builtin_expect(!!(condition), 0)
    #define tst_usually(condition) __builtin_expect(!!(condition), 1)
    static inline void tst_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #endif
    }
    """
    # 1 in a debug build (`make debug`): invariants are checked, and cost nothing elsewhere.
    const int TST_DEBUG
    # The condition. What seldom happens is put out of the way by the compiler, so that what usually does runs straight
    # on: a taken branch costs a cycle or two, and without a word from us every second one was.
    bint tst_rarely(bint condition)
    bint tst_usually(bint condition)
    void tst_bug(const char *what)
    void tst_pause()
