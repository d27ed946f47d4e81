/* The fake kernel (kernel.c) and the scheduler of simulated threads (scheduler.c), as the simulation sees them. */
#ifndef TST_SIMULATION_H
#define TST_SIMULATION_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------- what reroute.h leads to */

struct tst_kernel {
    int (*epoll_create1)(int flags);
    int (*epoll_ctl)(int epfd, int operation, int fd, struct epoll_event *event);
    int (*epoll_wait)(int epfd, struct epoll_event *events, int capacity, int timeout_ms);
    int (*eventfd)(unsigned int initial, int flags);
    int (*timerfd_create)(int clock, int flags);
    int (*timerfd_settime)(int fd, int flags, const struct itimerspec *value, struct itimerspec *old);
    ssize_t (*recv)(int fd, void *buffer, size_t size, int flags);
    ssize_t (*send)(int fd, const void *buffer, size_t size, int flags);
    ssize_t (*sendmsg)(int fd, const struct msghdr *message, int flags);
    int (*setsockopt)(int fd, int level, int name, const void *value, socklen_t size);
    int (*getsockopt)(int fd, int level, int name, void *value, socklen_t *size);
    int (*shutdown)(int fd, int how);
    int (*ioctl)(int fd, unsigned long request, ...);
    int (*accept4)(int fd, struct sockaddr *address, socklen_t *size, int flags);
    int (*poll)(struct pollfd *fds, unsigned long count, int timeout_ms);
    int (*fcntl)(int fd, int command, ...);
    int (*open)(const char *path, int flags);
    int (*close)(int fd);
    ssize_t (*read)(int fd, void *buffer, size_t size);
    ssize_t (*write)(int fd, const void *buffer, size_t size);
    int (*gettid)(void);
    int (*sched_yield)(void);
    int (*clock_gettime)(clockid_t clock, struct timespec *now);

    int (*mutex_init)(pthread_mutex_t *mutex, void *attributes);
    int (*mutex_destroy)(pthread_mutex_t *mutex);
    int (*mutex_lock)(pthread_mutex_t *mutex);
    int (*mutex_unlock)(pthread_mutex_t *mutex);
    int (*cond_init)(pthread_cond_t *condition, void *attributes);
    int (*cond_destroy)(pthread_cond_t *condition);
    int (*cond_wait)(pthread_cond_t *condition, pthread_mutex_t *mutex);
    int (*cond_timedwait)(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until);
    int (*cond_signal)(pthread_cond_t *condition);
    int (*cond_broadcast)(pthread_cond_t *condition);

    void *(*malloc)(size_t size);
    void *(*calloc)(size_t n, size_t size);
    void *(*realloc)(void *place, size_t size);
    void (*free)(void *place);
};

extern const struct tst_kernel *tst_kernel;

/* ------------------------------------------------------------------------------------------------ scheduler */

#define SIM_MILLISECOND 1000000ull

/* Begins a seed: everything of the last one is forgotten. */
void sim_begin(uint64_t seed, int tracing);
/* Lets the threads run until all have ended, or an invariant fails. Returns what failed, or NULL. */
const char *sim_run(void);
/* A simulated thread. It ends when `body` returns. Returns its number. */
int sim_spawn(const char *name, void (*body)(void *), void *argument);
/* An invariant does not hold: the seed ends here. */
void sim_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *sim_failure(void);

/* The seed's random numbers. */
uint64_t sim_random(void);
uint32_t sim_below(uint32_t n);
/* True `rate` times in 1024. */
int sim_chance(uint32_t rate);

/* Blocks until sim_wake() on the same channel, or until then on the clock (0: for ever). 0: the time is over. */
int sim_block(const void *channel, uint64_t until);
/* Wakes one of those who block on it, any, or all. */
void sim_wake(const void *channel, int all);
/* A thread sleeps, as /proc would say. */
void sim_sleep(uint64_t nanoseconds);
/* Blocks until nothing has happened for a while and nothing is about to. One thread may. */
void sim_wait_for_rest(void);
/* Something has happened. */
void sim_progress(void);
/* A kernel call begins. B12: there may be so many, and no more, until something happens. */
void sim_call(void);
/* Whether thread `number` could run ("R" in /proc). */
int sim_is_runnable(int number);
int sim_current(void);
uint64_t sim_now(void);
void sim_advance(uint64_t nanoseconds);
void sim_switch(void);
/* Steps between two switches, on average; a thread that gets few turns (-1: none). */
void sim_set_schedule(uint32_t mean, int slow);

/* One line of the trace, which goes into its hash, too. */
void sim_trace(const char *what, int64_t one, int64_t two, int64_t result);
uint64_t sim_trace_hash(void);
uint64_t sim_switches(void);
uint64_t sim_steps(void);
void sim_when_quiet(void (*look)(void)); /* called whenever all threads sleep and time goes on */

extern int64_t sim_steps_left;
extern int sim_threads_run;
extern uintptr_t sim_quiet_begin, sim_quiet_size; /* loads from here are no place to switch at */
extern uint32_t sim_weak_rate;

static inline void sim_point(void) {
    if (sim_threads_run && --sim_steps_left < 0)
        sim_switch();
}

static inline void sim_point_at(const void *place) {
    if ((uintptr_t)place - sim_quiet_begin >= sim_quiet_size)
        sim_point();
}

static inline int sim_weak_fails(void) { return sim_threads_run && sim_weak_rate && sim_chance(sim_weak_rate); }

/* --------------------------------------------------------------------------------------------------- kernel */

#define SIM_FIRST_FD 8
#define SIM_FILES 96
#define SIM_STREAMS 64
#define SIM_BUFFER 2048

/* How often, in 1024 calls. */
struct sim_faults {
    uint32_t recv_short, recv_eintr, recv_eagain, recv_error;
    uint32_t send_short, send_eintr, send_eagain, send_error;
    uint32_t accept_eintr, accept_error, accept_full;
    uint32_t control_error;
    uint32_t wait_eintr, wait_few, wait_stale, wait_twice, wait_error;
    uint32_t no_memory;
    uint32_t spurious_wakeup;
    uint32_t weak;
};

/* One connection on the wire: two bounded buffers, and how each side has ended. */
struct sim_stream {
    int fd;               /* the server's end; -1: not accepted yet, or closed */
    int accepted;
    int closed;           /* by the server */
    int aborted;          /* by the server, with a reset */
    int faulted;          /* a call failed for good: it may lose anything */
    int refused;          /* by epoll_ctl (B07) */
    int fin, reset;       /* by the client */
    int error;            /* errno that the server is to see once */
    int shut;             /* the server has sent its FIN */
    int deaf;             /* what is sent may be another one's, and is dropped */
    int linger_off;       /* close() resets */
    int went_with_reset;  /* output was lost by a reset */
    uint32_t in_capacity, out_capacity;
    uint32_t in_begin, in_size, out_begin, out_size;
    uint64_t received, sent; /* by the server */
    uint64_t received_at, sent_at; /* when it did so last, or has accepted */
    unsigned char in[SIM_BUFFER], out[SIM_BUFFER];
};

struct sim_tally {
    uint64_t accepts, closes, bytes_sent, bytes_received, controls, wait_errors, no_memory, stale;
};

void kernel_begin(void);
void kernel_faults(const struct sim_faults *faults);
void kernel_calm(void);                   /* no more faults */
void kernel_interrupt(void);              /* a signal: each epoll_wait that sleeps ends with EINTR */
int kernel_await_send(uint64_t nanoseconds); /* sleeps, until a send begins: its descriptor; else -1 */
int kernel_listener(void);                /* a descriptor that clients connect to */
struct sim_stream *kernel_stream(int i);
int kernel_stream_of(int fd);             /* its stream's number, -1 */
int kernel_open_files(void);
uint64_t kernel_live_memory(void);
void kernel_free_all(void);
int kernel_backlog(void);
const struct sim_tally *kernel_tally(void);
const void *kernel_wire(void);            /* the channel on which a client waits for the server */

/* A handler puts a fresh connection under its descriptor. Its stream, or -1. */
int wire_replace(int fd, uint32_t in_capacity, uint32_t out_capacity);

/* The client's end. */
int wire_connect(uint32_t in_capacity, uint32_t out_capacity); /* its number, or -1 */
int wire_write(int stream, const unsigned char *bytes, uint32_t size); /* how many went out; -1: reset */
int wire_read(int stream, unsigned char *bytes, uint32_t size); /* 0: the end, -1: reset, -2: nothing yet */
void wire_fin(int stream);
void wire_reset(int stream);

#endif
