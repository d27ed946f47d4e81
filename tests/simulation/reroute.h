/* The engine's way to the kernel, in the simulated build only.

   The engine's headers name system calls, threads and the heap as C does, and the compiler calls them directly. This file,
   which only _simulation.pyx includes, makes each of these names a call through one table, `tst_kernel`, and each atomic
   operation a place where the scheduler may let another thread run. The engine's sources know nothing of it.

   A call that the engine begins to use is added in three places: the table, the macros, the fake (kernel.c).
   tests/test_simulation.py compares the macros with what tstpool/_libc.pxd declares. */
#ifndef TST_REROUTE_H
#define TST_REROUTE_H

#include "simulation.h"

/* System calls. */
#define epoll_create1(...) tst_kernel->epoll_create1(__VA_ARGS__)
#define epoll_ctl(...) tst_kernel->epoll_ctl(__VA_ARGS__)
#define epoll_wait(...) tst_kernel->epoll_wait(__VA_ARGS__)
#define eventfd(...) tst_kernel->eventfd(__VA_ARGS__)
#define timerfd_create(...) tst_kernel->timerfd_create(__VA_ARGS__)
#define timerfd_settime(...) tst_kernel->timerfd_settime(__VA_ARGS__)
#define recv(...) tst_kernel->recv(__VA_ARGS__)
#define send(...) tst_kernel->send(__VA_ARGS__)
#define sendmsg(...) tst_kernel->sendmsg(__VA_ARGS__)
#define setsockopt(...) tst_kernel->setsockopt(__VA_ARGS__)
#define getsockopt(...) tst_kernel->getsockopt(__VA_ARGS__)
#define shutdown(...) tst_kernel->shutdown(__VA_ARGS__)
#define ioctl(...) tst_kernel->ioctl(__VA_ARGS__)
#define accept4(...) tst_kernel->accept4(__VA_ARGS__)
#define poll(...) tst_kernel->poll(__VA_ARGS__)
#define fcntl(...) tst_kernel->fcntl(__VA_ARGS__)
#define open(...) tst_kernel->open(__VA_ARGS__)
#define close(...) tst_kernel->close(__VA_ARGS__)
#define read(...) tst_kernel->read(__VA_ARGS__)
#define write(...) tst_kernel->write(__VA_ARGS__)
#define gettid() tst_kernel->gettid()
#define sched_yield() tst_kernel->sched_yield()
#define clock_gettime(...) tst_kernel->clock_gettime(__VA_ARGS__)

/* Threads. */
#define pthread_mutex_init(...) tst_kernel->mutex_init(__VA_ARGS__)
#define pthread_mutex_destroy(...) tst_kernel->mutex_destroy(__VA_ARGS__)
#define pthread_mutex_lock(...) tst_kernel->mutex_lock(__VA_ARGS__)
#define pthread_mutex_unlock(...) tst_kernel->mutex_unlock(__VA_ARGS__)
#define pthread_condattr_init(...) 0 /* the simulation has one clock */
#define pthread_condattr_setclock(...) 0
#define pthread_condattr_destroy(...) 0
#define pthread_cond_init(...) tst_kernel->cond_init(__VA_ARGS__)
#define pthread_cond_destroy(...) tst_kernel->cond_destroy(__VA_ARGS__)
#define pthread_cond_wait(...) tst_kernel->cond_wait(__VA_ARGS__)
#define pthread_cond_timedwait(...) tst_kernel->cond_timedwait(__VA_ARGS__)
#define pthread_cond_signal(...) tst_kernel->cond_signal(__VA_ARGS__)
#define pthread_cond_broadcast(...) tst_kernel->cond_broadcast(__VA_ARGS__)

/* The heap. */
#define malloc(...) tst_kernel->malloc(__VA_ARGS__)
#define calloc(...) tst_kernel->calloc(__VA_ARGS__)
#define realloc(...) tst_kernel->realloc(__VA_ARGS__)
#define free(...) tst_kernel->free(__VA_ARGS__)

/* An invariant of the debug build does not hold: tst_bug() has said which. */
#define abort() sim_fail("the engine has aborted")

/* Atomic operations: the scheduler may switch before each, but a relaxed store, which counters are full of. A name that
   is used in its own macro is not expanded again. A weak compare-and-swap may fail for no reason. */
#define __atomic_load_n(place, order) (sim_point_at(place), __atomic_load_n(place, order))
#define __atomic_store_n(place, value, order) \
    (((order) != __ATOMIC_RELAXED ? sim_point() : (void)0), __atomic_store_n(place, value, order))
#define __atomic_exchange_n(place, value, order) (sim_point(), __atomic_exchange_n(place, value, order))
#define __atomic_add_fetch(place, value, order) (sim_point(), __atomic_add_fetch(place, value, order))
#define __atomic_sub_fetch(place, value, order) (sim_point(), __atomic_sub_fetch(place, value, order))
#define __atomic_fetch_or(place, value, order) (sim_point(), __atomic_fetch_or(place, value, order))
#define __atomic_fetch_and(place, value, order) (sim_point(), __atomic_fetch_and(place, value, order))
#define __atomic_compare_exchange_n(place, expected, value, weak, success, failure)                      \
    (sim_point(), ((weak) && sim_weak_fails()) ? (*(expected) = __atomic_load_n(place, failure), 0)         \
                                              : __atomic_compare_exchange_n(place, expected, value, weak, success, failure))

#endif
