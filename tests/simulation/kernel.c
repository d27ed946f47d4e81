/* The fake kernel: epoll as its manual and the facts at the head of tstpool/_poll.pxd say, sockets as bounded buffers of
   bytes, a clock that is virtual, locks, a heap that counts. What a real kernel may do but rarely does, it does often. */
#include "simulation.h"

#include <stddef.h>

enum { NONE, EPOLL, EVENT, TIMER, LISTENER, STREAM, STAT, STALE = 16 };

#define PRIVATE (EPOLLET | EPOLLONESHOT)

struct file {
    int kind, stream, tid;
    uint64_t count;  /* of an eventfd; when a timerfd goes off */
    int epoll;       /* the set that it is in, -1 */
    uint32_t mask;
    uint64_t data;
    int ready;       /* in the set's list of what may be ready */
    int repeatable;  /* was reported, and not twice yet */
};

struct block {
    struct block *next, *previous;
    size_t size;
    uint64_t canary;
};

static struct file files[SIM_FILES];
static struct sim_stream streams[SIM_STREAMS];
static int backlog[SIM_STREAMS], n_backlog, n_streams, listener;
static struct sim_faults faults;
static struct sim_tally tally;
static uint64_t stale[STALE], interrupts;
static uint32_t n_stale;
static struct block heap = {&heap, &heap, 0, 0};
static uint64_t live;
static char wire;

static int fail(const char *call, int fd, int error) {
    sim_trace(call, fd, 0, -error);
    errno = error;
    return -1;
}

static struct file *file_of(int fd) {
    if (fd < SIM_FIRST_FD || fd >= SIM_FIRST_FD + SIM_FILES || files[fd - SIM_FIRST_FD].kind == NONE)
        return NULL;
    return &files[fd - SIM_FIRST_FD];
}

static int new_file(int kind) {
    for (int i = 0; i < SIM_FILES; i++) {
        if (files[i].kind != NONE)
            continue;
        memset(&files[i], 0, sizeof files[i]);
        files[i].kind = kind;
        files[i].epoll = files[i].stream = -1;
        return SIM_FIRST_FD + i;
    }
    return -1;
}

/* ------------------------------------------------------------------------------------------------ readiness */

static uint32_t readiness(const struct file *file) {
    const struct sim_stream *stream;
    uint32_t bits = 0;
    if (file->kind == EVENT)
        return file->count ? EPOLLIN : 0;
    if (file->kind == TIMER)
        return file->count && file->count <= sim_now() ? EPOLLIN : 0;
    if (file->kind == LISTENER)
        return n_backlog ? EPOLLIN : 0;
    if (file->kind != STREAM)
        return 0;
    stream = &streams[file->stream];
    if (stream->in_size || stream->fin || stream->reset)
        bits |= EPOLLIN;
    if (stream->fin || stream->reset)
        bits |= EPOLLRDHUP;
    if (stream->out_size < stream->out_capacity || stream->shut || stream->reset)
        bits |= EPOLLOUT;
    if (stream->reset || (stream->fin && stream->shut))
        bits |= EPOLLHUP;
    if (stream->error)
        bits |= EPOLLERR;
    return bits;
}

static uint32_t wanted(const struct file *file) { return file->mask & ~(uint32_t)PRIVATE ? file->mask : 0; }

static void poke(int fd, uint32_t bits) {
    struct file *file = file_of(fd);
    if (file && file->epoll >= 0 && wanted(file) & bits) {
        file->ready = 1;
        sim_wake(&files[file->epoll - SIM_FIRST_FD], 0);
    }
}

static int k_epoll_create1(int flags) {
    (void)flags;
    return new_file(EPOLL);
}

static const int control_errors[] = {ENOSPC, ENOENT, ENOMEM, EBADF};    /* of ADD and MOD, in turn */

static int k_epoll_ctl(int epfd, int operation, int fd, struct epoll_event *event) {
    struct file *file;
    sim_call();
    file = file_of(fd);
    tally.controls++;
    if (!file)
        return fail("epoll_ctl", fd, EBADF);
    if (operation == EPOLL_CTL_DEL) {
        if (file->epoll != epfd)
            return fail("epoll_del", fd, ENOENT);
        file->epoll = -1;
        file->ready = 0;
        sim_trace("epoll_del", fd, 0, 0);
        return 0;
    }
    if ((operation == EPOLL_CTL_MOD) != (file->epoll == epfd))
        return fail("epoll_ctl", fd, operation == EPOLL_CTL_MOD ? ENOENT : EEXIST);
    if (file->kind != EVENT && file->kind != TIMER && sim_chance(faults.control_error)) {
        if (file->stream >= 0)
            streams[file->stream].faulted = streams[file->stream].refused = 1;
        return fail("epoll_ctl", fd, control_errors[(operation == EPOLL_CTL_MOD) + 2 * sim_below(2)]);
    }
    file->epoll = epfd;
    file->mask = event->events | EPOLLERR | EPOLLHUP;   /* an empty mask is not silence */
    file->data = event->data.u64;
    file->ready = (readiness(file) & wanted(file)) != 0;
    sim_trace(operation == EPOLL_CTL_ADD ? "epoll_add" : "epoll_mod", fd, event->events, 0);
    if (file->ready)
        sim_wake(&files[epfd - SIM_FIRST_FD], 0);
    return 0;
}

/* B10: of a connection that is gone, or that never was: in a slot like any other, in none near it, beyond the table. */
static uint64_t nobodys_id(void) {
    static const uint32_t slots[] = {SIM_FIRST_FD, 5000, 3000000};
    if (n_stale && sim_below(8))
        return stale[sim_below(n_stale < STALE ? n_stale : STALE)];
    return (uint64_t)0x7ffffff0 << 32 | slots[sim_below(3)];
}

static int collect(int epfd, struct epoll_event *events, int capacity) {
    uint32_t start = sim_below(SIM_FILES), bits;
    int n = 0;
    if (sim_chance(faults.wait_few))
        capacity = 1 + (int)sim_below(3);
    for (uint32_t i = 0; i < SIM_FILES && n < capacity; i++) {
        struct file *file = &files[(start + i) % SIM_FILES];
        if (file->kind == NONE || file->epoll != epfd)
            continue;
        if (file->kind == TIMER && readiness(file))
            file->ready = 1;
        if (file->ready)
            file->repeatable = 1;
        else if (file->repeatable && sim_chance(faults.wait_twice))
            file->repeatable = 0;       /* reported twice, where it is ready still; not for ever, or nothing would rest */
        else
            continue;
        bits = readiness(file) & wanted(file);
        file->ready = 0;
        if (!bits)
            continue;
        events[n].events = bits;
        events[n++].data.u64 = file->data;
        if (file->mask & EPOLLONESHOT)
            file->mask &= PRIVATE;
        else if (!(file->mask & EPOLLET))
            file->ready = 1;
        sim_trace("event", SIM_FIRST_FD + (int)(file - files), bits, 0);
    }
    if (n && n < capacity && sim_chance(faults.wait_stale)) {
        int at = (int)sim_below((uint32_t)n + 1);
        memmove(events + at + 1, events + at, (size_t)(n - at) * sizeof *events);
        events[at].events = EPOLLIN | (sim_below(2) ? EPOLLOUT : EPOLLHUP);
        events[at].data.u64 = nobodys_id();
        n++;
        tally.stale++;
    }
    return n;
}

static int k_epoll_wait(int epfd, struct epoll_event *events, int capacity, int timeout_ms) {
    uint64_t until = 0, seen = interrupts;
    int n;
    sim_call();
    if (timeout_ms > 0)
        until = sim_now() + (uint64_t)timeout_ms * SIM_MILLISECOND;
    if (sim_chance(faults.wait_error)) {
        tally.wait_errors++;
        return fail("epoll_wait", epfd, EBADF);
    }
    while ((n = collect(epfd, events, capacity)) == 0 && timeout_ms) {
        uint64_t timer = until;
        if (interrupts != seen || sim_chance(faults.wait_eintr))
            return fail("epoll_wait", epfd, EINTR);
        for (int i = 0; i < SIM_FILES; i++)
            if (files[i].kind == TIMER && files[i].epoll == epfd && files[i].count && (!timer || files[i].count < timer))
                timer = files[i].count;
        if (!sim_block(&files[epfd - SIM_FIRST_FD], timer) && until && sim_now() >= until) {
            n = collect(epfd, events, capacity);
            break;
        }
    }
    sim_trace("epoll_wait", epfd, timeout_ms, n);
    sim_point();
    return n;
}

static int k_eventfd(unsigned int initial, int flags) {
    int fd = new_file(EVENT);
    (void)flags;
    files[fd - SIM_FIRST_FD].count = initial;
    return fd;
}

static int k_timerfd_create(int clock, int flags) {
    (void)clock, (void)flags;
    return new_file(TIMER);
}

static int k_timerfd_settime(int fd, int flags, const struct itimerspec *value, struct itimerspec *old) {
    struct file *file = file_of(fd);
    uint64_t when = (uint64_t)value->it_value.tv_sec * 1000 * SIM_MILLISECOND + (uint64_t)value->it_value.tv_nsec;
    (void)old;
    sim_call();
    file->count = when && !(flags & TFD_TIMER_ABSTIME) ? sim_now() + when : when;
    sim_trace("timerfd_settime", fd, (int64_t)file->count, 0);
    if (file->epoll >= 0)               /* whoever waits looks anew when it ends */
        sim_wake(&files[file->epoll - SIM_FIRST_FD], 1);
    return 0;
}

/* -------------------------------------------------------------------------------------------------- sockets */

static const int recv_errors[] = {ENOBUFS, ENOMEM, ECONNRESET, ETIMEDOUT};
static const int send_errors[] = {ENOBUFS, ENOMEM, ECONNRESET, EPIPE};
static const int accept_errors[] = {ECONNABORTED, EPROTO, EPERM};
static const int accept_fulls[] = {EMFILE, ENFILE, ENOBUFS, ENOMEM};

static struct sim_stream *stream_of(int fd, const char *call) {
    struct file *file = file_of(fd);
    if (!file || file->kind != STREAM) {
        sim_fail("%s of descriptor %d, which is no socket", call, fd);
        return NULL;
    }
    return &streams[file->stream];
}

static ssize_t receive(int fd, const struct iovec *pieces, size_t n_pieces) {
    struct sim_stream *stream;
    uint32_t n, done = 0;
    size_t size = 0;
    sim_call();
    for (size_t piece = 0; piece < n_pieces; piece++)
        size += pieces[piece].iov_len;
    stream = stream_of(fd, "recv");
    if (sim_chance(faults.recv_eintr))
        return fail("recv", fd, EINTR);
    if (sim_chance(faults.recv_eagain)) {
        poke(fd, readiness(file_of(fd)));            /* it came right after */
        return fail("recv", fd, EAGAIN);
    }
    if (sim_chance(faults.recv_error)) {
        stream->faulted = 1;
        return fail("recv", fd, recv_errors[sim_below(4)]);
    }
    n = stream->in_size < size ? stream->in_size : (uint32_t)size;
    if (n > 1 && sim_chance(faults.recv_short))
        n = 1 + sim_below(n < 8 ? n : 8);
    if (n == 0) {
        if (stream->error) {
            int error = stream->error;
            stream->error = 0;
            return fail("recv", fd, error);
        }
        if (!stream->fin && !stream->reset)
            return fail("recv", fd, EAGAIN);
        sim_trace("recv", fd, (int64_t)size, 0);
        return 0;
    }
    for (size_t piece = 0; piece < n_pieces; piece++)
        for (size_t i = 0; i < pieces[piece].iov_len && done < n; i++)
            ((unsigned char *)pieces[piece].iov_base)[i] = stream->in[(stream->in_begin + done++) % SIM_BUFFER];
    stream->in_begin = (stream->in_begin + n) % SIM_BUFFER;
    stream->in_size -= n;
    stream->received += n;
    stream->received_at = sim_now();
    tally.bytes_received += n;
    sim_progress();
    sim_wake(&wire, 1);
    sim_trace("recv", fd, (int64_t)size, n);
    sim_point();
    return n;
}

static ssize_t k_recv(int fd, void *buffer, size_t size, int flags) {
    struct iovec piece = {buffer, size};
    (void)flags;
    return receive(fd, &piece, 1);
}

/* What is asked for while a connection's output is on its way to the kernel is missed most easily, so that one of those
   who would have slept on may come just then. */
static char send_channel;
static int send_fd;

int kernel_await_send(uint64_t nanoseconds) {
    return sim_block(&send_channel, sim_now() + nanoseconds) ? send_fd : -1;
}

static void let_meddle(int fd) {
    if (!sim_chance(50))
        return;
    send_fd = fd;
    sim_wake(&send_channel, 0);
    sim_switch();
}

static ssize_t transmit(int fd, const struct iovec *pieces, size_t n_pieces) {
    struct sim_stream *stream;
    uint32_t room, n = 0;
    size_t total = 0;
    sim_call();
    let_meddle(fd);
    stream = stream_of(fd, "send");
    for (size_t i = 0; i < n_pieces; i++)
        total += pieces[i].iov_len;
    if (total == 0)
        sim_fail("send of nothing");
    if (sim_chance(faults.send_eintr))
        return fail("send", fd, EINTR);
    if (stream->error || stream->reset || stream->shut) {
        int error = stream->error ? stream->error : EPIPE;
        stream->error = 0;
        return fail("send", fd, error);
    }
    room = stream->out_capacity - stream->out_size;
    if (sim_chance(faults.send_error)) {
        stream->faulted = 1;
        return fail("send", fd, send_errors[sim_below(4)]);
    }
    if (room == 0 || sim_chance(faults.send_eagain)) {
        if (room)
            poke(fd, EPOLLOUT);
        return fail("send", fd, EAGAIN);
    }
    if (room > total)
        room = (uint32_t)total;
    if (room > 1 && sim_chance(faults.send_short))
        room = 1 + sim_below(room < 8 ? room : 8);
    for (size_t i = 0; i < n_pieces && n < room; i++)
        for (size_t j = 0; j < pieces[i].iov_len && n < room; j++, n++)
            stream->out[(stream->out_begin + stream->out_size + n) % SIM_BUFFER] =
                ((const unsigned char *)pieces[i].iov_base)[j];
    stream->out_size += stream->deaf ? 0 : n;
    stream->sent += n;
    stream->sent_at = sim_now();
    tally.bytes_sent += n;
    sim_progress();
    sim_wake(&wire, 1);
    sim_trace("send", fd, (int64_t)total, n);
    sim_point();
    return n;
}

static ssize_t k_send(int fd, const void *buffer, size_t size, int flags) {
    struct iovec piece = {(void *)buffer, size};
    if (!(flags & MSG_NOSIGNAL))
        sim_fail("send without MSG_NOSIGNAL");
    return transmit(fd, &piece, 1);
}

static ssize_t k_sendmsg(int fd, const struct msghdr *message, int flags) {
    if (!(flags & MSG_NOSIGNAL))
        sim_fail("sendmsg without MSG_NOSIGNAL");
    return transmit(fd, message->msg_iov, message->msg_iovlen);
}

static int k_setsockopt(int fd, int level, int name, const void *value, socklen_t size) {
    (void)size;
    if (level == SOL_SOCKET && name == SO_LINGER)
        stream_of(fd, "setsockopt")->linger_off = ((const struct linger *)value)->l_onoff;
    sim_trace("setsockopt", fd, name, 0);
    return 0;
}

static int k_getsockopt(int fd, int level, int name, void *value, socklen_t *size) {
    struct sim_stream *stream = stream_of(fd, "getsockopt");
    if (level != SOL_SOCKET || name != SO_ERROR || *size != sizeof(int))
        sim_fail("getsockopt of what nobody has");
    *(int *)value = stream->error;
    stream->error = 0;
    sim_trace("getsockopt", fd, name, *(int *)value);
    return 0;
}

static int k_shutdown(int fd, int how) {
    struct sim_stream *stream;
    sim_call();
    stream = stream_of(fd, "shutdown");
    if (stream->reset)
        return fail("shutdown", fd, ENOTCONN);
    stream->shut = 1;
    if (how == SHUT_RDWR)
        stream->fin = 1;
    poke(fd, EPOLLOUT | (stream->fin ? EPOLLHUP | EPOLLIN : 0));
    sim_wake(&wire, 1);
    sim_trace("shutdown", fd, how, 0);
    return 0;
}

static int k_ioctl(int fd, unsigned long request, ...) {
    struct sim_stream *stream = stream_of(fd, "ioctl");
    va_list arguments;
    uint32_t size = request == FIONREAD ? stream->in_size : stream->out_size; /* TIOCOUTQ, SIOCOUTQNSD */
    va_start(arguments, request);
    *va_arg(arguments, int *) = (int)size;
    va_end(arguments);
    sim_trace("ioctl", fd, (int)request, size);
    return 0;
}

static int k_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    int fresh, at;
    (void)size, (void)flags;
    sim_call();
    if (!file_of(fd) || file_of(fd)->kind != LISTENER)
        sim_fail("accept4 of descriptor %d, which is no listener", fd);
    if (sim_chance(faults.accept_eintr))
        return fail("accept4", fd, EINTR);
    if (!n_backlog)
        return fail("accept4", fd, EAGAIN);
    if (sim_chance(faults.accept_full))
        return fail("accept4", fd, accept_fulls[sim_below(4)]);
    at = backlog[0];
    memmove(backlog, backlog + 1, (size_t)--n_backlog * sizeof *backlog);
    if (sim_chance(faults.accept_error)) {
        streams[at].faulted = streams[at].closed = streams[at].aborted = 1;
        sim_wake(&wire, 1);
        return fail("accept4", fd, accept_errors[sim_below(3)]);
    }
    fresh = new_file(STREAM);
    if (fresh < 0)
        sim_fail("the simulation has no room for another descriptor");
    files[fresh - SIM_FIRST_FD].stream = at;
    streams[at].fd = fresh;
    streams[at].accepted = 1;
    streams[at].sent_at = streams[at].received_at = sim_now();
    tally.accepts++;
    address->sa_family = AF_INET;
    sim_progress();
    sim_trace("accept4", fd, at, fresh);
    sim_point();
    return fresh;
}

static short poll_bits(int fd) {
    struct file *file = file_of(fd);
    return (short)(file ? readiness(file) & (EPOLLOUT | EPOLLERR | EPOLLHUP) : POLLNVAL);
}

/* It looks before and after its time-out, not in between. */
static int k_poll(struct pollfd *fds, unsigned long count, int timeout_ms) {
    sim_call();
    fds->revents = count ? poll_bits(fds->fd) : 0;
    if (!fds->revents && timeout_ms > 0) {
        sim_sleep((uint64_t)timeout_ms * SIM_MILLISECOND);
        fds->revents = count ? poll_bits(fds->fd) : 0;
    }
    sim_trace("poll", fds->fd, timeout_ms, fds->revents);
    return fds->revents != 0;
}

static int k_fcntl(int fd, int command, ...) {
    (void)fd, (void)command;
    return 0;
}

static int k_close(int fd) {
    struct file *file;
    struct sim_stream *stream;
    sim_call();
    file = file_of(fd);
    if (!file) {
        sim_fail("close of descriptor %d, which is not open", fd);
        return -1;
    }
    if (file->epoll >= 0 && (file->kind == STREAM || file->kind == LISTENER))
        sim_fail("descriptor %d is closed while epoll has it", fd);
    if (file->kind == STREAM) {
        stream = &streams[file->stream];
        stream->closed = stream->shut = 1;
        stream->fd = -1;
        if (stream->linger_off || stream->in_size || stream->faulted) {
            stream->aborted = 1;
            stream->went_with_reset |= stream->out_size != 0;
            stream->out_size = 0;
        }
        tally.closes++;
        sim_progress();
        sim_wake(&wire, 1);
    }
    if ((file->kind == STREAM || file->kind == LISTENER) && file->data)
        stale[n_stale++ % STALE] = file->data;
    if (file->kind != STAT)
        sim_trace("close", fd, file->kind, 0);
    file->kind = NONE;
    sim_point();
    return 0;
}

static int k_open(const char *path, int flags) {
    int fd, tid = 0;
    (void)flags;
    sim_call();
    if (sscanf(path, "/proc/self/task/%d/stat", &tid) != 1)
        sim_fail("open of %s", path);
    fd = new_file(STAT);
    files[fd - SIM_FIRST_FD].tid = tid;
    return fd;
}

static ssize_t k_read(int fd, void *buffer, size_t size) {
    struct file *file;
    sim_call();
    file = file_of(fd);
    if (file && file->kind == STAT)
        return snprintf(buffer, size, "%d (a) b) %c 1", file->tid, sim_is_runnable(file->tid - 1000) ? 'R' : 'S');
    if (!file || (file->kind != EVENT && file->kind != TIMER)) {
        sim_fail("read of descriptor %d", fd);
        return -1;
    }
    if (!readiness(file))
        return fail("read", fd, EAGAIN);
    file->count = 0;
    sim_trace("read", fd, 0, 8);
    return 8;
}

static ssize_t k_write(int fd, const void *buffer, size_t size) {
    struct file *file;
    (void)buffer;
    sim_call();
    file = file_of(fd);
    if (!file || file->kind != EVENT) {
        sim_fail("write to descriptor %d, which is no eventfd", fd);
        return -1;
    }
    file->count++;
    sim_trace("write", fd, 0, 8);
    poke(fd, EPOLLIN);
    sim_point();
    return (ssize_t)size;
}

static int k_gettid(void) { return 1000 + sim_current(); }

static int k_sched_yield(void) {
    sim_call();
    sim_switch();
    return 0;
}

static int k_clock_gettime(clockid_t clock, struct timespec *time) {
    (void)clock;
    sim_point();
    sim_advance(500 + sim_below(2000));
    time->tv_sec = (time_t)(sim_now() / 1000000000);
    time->tv_nsec = (long)(sim_now() % 1000000000);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ the locks */

static int k_init(pthread_mutex_t *mutex, void *attributes) {
    (void)attributes;
    memset(mutex, 0, sizeof *mutex);
    return 0;
}

static int k_mutex_destroy(pthread_mutex_t *mutex) {
    if (*(int *)mutex)
        sim_fail("a mutex that is held is destroyed");
    return 0;
}

static int k_mutex_lock(pthread_mutex_t *mutex) {
    sim_point();
    if (*(int *)mutex == sim_current() + 2)
        sim_fail("a mutex is locked twice");
    while (*(int *)mutex)
        sim_block(mutex, 0);
    *(int *)mutex = sim_current() + 2;
    return 0;
}

static int k_mutex_unlock(pthread_mutex_t *mutex) {
    if (*(int *)mutex != sim_current() + 2)
        sim_fail("a mutex is unlocked by who does not hold it");
    *(int *)mutex = 0;
    sim_wake(mutex, 1);
    sim_point();
    return 0;
}

static int k_cond_init(pthread_cond_t *condition, void *attributes) {
    (void)attributes;
    memset(condition, 0, sizeof *condition);
    return 0;
}

static int k_cond_destroy(pthread_cond_t *condition) {
    (void)condition;
    return 0;
}

static int wait_on(pthread_cond_t *condition, pthread_mutex_t *mutex, uint64_t until) {
    int woken = 1;
    sim_call();
    sim_trace("cond_wait", until != 0, 0, 0);
    *(int *)mutex = 0;                 /* no switch before the wait: a signal would be lost */
    sim_wake(mutex, 1);
    if (!sim_chance(faults.spurious_wakeup))
        woken = sim_block(condition, until);
    k_mutex_lock(mutex);
    return woken ? 0 : ETIMEDOUT;
}

static int k_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    return wait_on(condition, mutex, (uint64_t)until->tv_sec * 1000000000u + (uint64_t)until->tv_nsec);
}

static int k_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) { return wait_on(condition, mutex, 0); }

static int k_cond_signal(pthread_cond_t *condition) {
    sim_trace("cond_signal", 0, 0, 0);
    sim_wake(condition, 0);
    return 0;
}

static int k_cond_broadcast(pthread_cond_t *condition) {
    sim_wake(condition, 1);
    return 0;
}

/* ------------------------------------------------------------------------------------------------- the heap */

static void *k_malloc(size_t size) {
    struct block *block;
    if (sim_chance(faults.no_memory)) {
        tally.no_memory++;
        sim_trace("malloc", 0, 0, 0);      /* without its size: those of structs are not the same everywhere */
        return NULL;
    }
    block = malloc(sizeof *block + size);
    block->size = size;
    block->canary = 0xfeedfacecafebeefull ^ (uintptr_t)block;
    block->next = &heap;
    block->previous = heap.previous;
    heap.previous->next = block;
    heap.previous = block;
    live++;
    return block + 1;
}

static void k_free(void *place) {
    struct block *block;
    if (!place)
        return;
    block = (struct block *)place - 1;
    if (block->canary != (0xfeedfacecafebeefull ^ (uintptr_t)block)) {
        sim_fail("free of what was not allocated, or twice");
        return;
    }
    block->canary = 0;
    block->next->previous = block->previous;
    block->previous->next = block->next;
    memset(place, 0xdd, block->size < 512 ? block->size : 512);
    live--;
    free(block);
}

static void *k_calloc(size_t n, size_t size) {
    void *place = k_malloc(n * size);
    if (place)
        memset(place, 0, n * size);
    return place;
}

static void *k_realloc(void *place, size_t size) {
    void *moved = k_malloc(size);
    size_t old = place ? ((struct block *)place - 1)->size : 0;
    if (moved && place) {
        memcpy(moved, place, old < size ? old : size);
        k_free(place);
    }
    return moved;
}

static const struct tst_kernel fake = {
    k_epoll_create1, k_epoll_ctl, k_epoll_wait, k_eventfd, k_timerfd_create, k_timerfd_settime, k_recv, k_send, k_sendmsg,
    k_setsockopt, k_getsockopt, k_shutdown, k_ioctl, k_accept4, k_poll, k_fcntl, k_open, k_close, k_read, k_write, k_gettid,
    k_sched_yield, k_clock_gettime, k_init, k_mutex_destroy, k_mutex_lock, k_mutex_unlock, k_cond_init, k_cond_destroy,
    k_cond_wait, k_cond_timedwait, k_cond_signal, k_cond_broadcast, k_malloc, k_calloc, k_realloc, k_free,
};
const struct tst_kernel *tst_kernel = &fake;

/* ---------------------------------------------------------------------------------------- for the simulation */

void kernel_begin(void) {
    kernel_calm();
    memset(files, 0, sizeof files);
    memset(&tally, 0, sizeof tally);
    interrupts = 0;
    n_backlog = n_streams = 0;
    n_stale = 0;
    listener = -1;
}

void kernel_faults(const struct sim_faults *wanted_faults) {
    faults = *wanted_faults;
    sim_weak_rate = faults.weak;
}

void kernel_calm(void) {
    memset(&faults, 0, sizeof faults);
    sim_weak_rate = 0;
}

void kernel_interrupt(void) {
    interrupts++;
    for (int i = 0; i < SIM_FILES; i++)
        if (files[i].kind == EPOLL)
            sim_wake(&files[i], 1);
}

int kernel_listener(void) { return listener = new_file(LISTENER); }
struct sim_stream *kernel_stream(int i) { return &streams[i]; }
int kernel_backlog(void) { return n_backlog; }
const struct sim_tally *kernel_tally(void) { return &tally; }
const void *kernel_wire(void) { return &wire; }
uint64_t kernel_live_memory(void) { return live; }

int kernel_stream_of(int fd) {
    struct file *file = file_of(fd);
    return file ? file->stream : -1;
}

int kernel_open_files(void) {
    int n = 0;
    for (int i = 0; i < SIM_FILES; i++)
        n += files[i].kind != NONE;
    return n;
}

void kernel_free_all(void) {
    while (heap.next != &heap)
        k_free(heap.next + 1);
}

static void begin_stream(struct sim_stream *stream, int fd, uint32_t in_capacity, uint32_t out_capacity) {
    memset(stream, 0, offsetof(struct sim_stream, in));
    stream->fd = fd;
    stream->accepted = fd >= 0;
    stream->received_at = stream->sent_at = sim_now();
    stream->in_capacity = in_capacity;
    stream->out_capacity = out_capacity;
}

int wire_connect(uint32_t in_capacity, uint32_t out_capacity) {
    if (n_streams == SIM_STREAMS || !file_of(listener) || file_of(listener)->kind != LISTENER)
        return -1;
    begin_stream(&streams[n_streams], -1, in_capacity, out_capacity);
    backlog[n_backlog++] = n_streams;
    poke(listener, EPOLLIN);
    sim_progress();
    sim_trace("connects", n_streams, 0, 0);
    return n_streams++;
}

/* What a handler does that puts a fresh connection under its descriptor: connect(), dup2(). The old one ends with a reset. */
int wire_replace(int fd, uint32_t in_capacity, uint32_t out_capacity) {
    struct file *file = file_of(fd);
    struct sim_stream *old = &streams[file->stream], *fresh = &streams[n_streams];
    if (n_streams == SIM_STREAMS)
        return -1;
    old->closed = old->shut = old->aborted = 1;
    old->fd = -1;
    old->out_size = 0;
    begin_stream(fresh, fd, in_capacity, out_capacity);
    fresh->deaf = 1;
    file->stream = n_streams;
    if (sim_below(4))                   /* else a duplicate is left somewhere, and the set keeps the old one */
        file->epoll = -1;
    file->ready = 0;
    sim_progress();
    sim_wake(&wire, 1);
    sim_trace("replaces", fd, n_streams, 0);
    return n_streams++;
}

static int gone(struct sim_stream *stream) {       /* the listener was closed with the client in its backlog */
    return stream->aborted || (!stream->accepted && (!file_of(listener) || file_of(listener)->kind != LISTENER));
}

int wire_write(int i, const unsigned char *bytes, uint32_t size) {
    struct sim_stream *stream = &streams[i];
    uint32_t room = stream->in_capacity - stream->in_size;
    if (stream->closed && !stream->aborted) {       /* what arrives for a closed socket is answered with a reset */
        stream->aborted = 1;
        stream->went_with_reset |= stream->out_size != 0;
        stream->out_size = 0;
    }
    if (gone(stream))
        return -1;
    if (size > room)
        size = room;
    for (uint32_t j = 0; j < size; j++)
        stream->in[(stream->in_begin + stream->in_size + j) % SIM_BUFFER] = bytes[j];
    stream->in_size += size;
    if (size)
        sim_progress(), poke(stream->fd, EPOLLIN);
    sim_trace("writes", i, size, 0);
    return (int)size;
}

int wire_read(int i, unsigned char *bytes, uint32_t size) {
    struct sim_stream *stream = &streams[i];
    if (size > stream->out_size)
        size = stream->out_size;
    if (size == 0)
        return gone(stream) ? -1 : stream->shut ? 0 : -2;
    for (uint32_t j = 0; j < size; j++)
        bytes[j] = stream->out[(stream->out_begin + j) % SIM_BUFFER];
    stream->out_begin = (stream->out_begin + size) % SIM_BUFFER;
    stream->out_size -= size;
    sim_progress();
    poke(stream->fd, EPOLLOUT);
    sim_trace("reads", i, size, 0);
    return (int)size;
}

void wire_fin(int i) {
    streams[i].fin = 1;
    sim_progress();
    sim_trace("finishes", i, 0, 0);
    poke(streams[i].fd, EPOLLIN | EPOLLRDHUP | (streams[i].shut ? EPOLLHUP : 0));
}

void wire_reset(int i) {
    streams[i].reset = 1;
    streams[i].error = ECONNRESET;
    streams[i].out_size = 0;
    sim_progress();
    sim_trace("resets", i, 0, 0);
    poke(streams[i].fd, EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLOUT);
}
