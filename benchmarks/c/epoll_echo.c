/* The peer that everything here is compared with: what a good C programmer writes for an echo server in an afternoon.
 *
 * One thread, one epoll set, level-triggered. Each readable socket gets one recv() of up to 256 KiB and one send() of
 * what came; there is no parsing and no allocation on that path. Only when the kernel does not take the whole reply is
 * the rest copied aside, and the socket watched for EPOLLOUT alone: a client that does not read is not read from.
 *
 *   epoll_echo             level-triggered; epoll_ctl only when a reply did not fit
 *   epoll_echo --oneshot   EPOLLONESHOT, re-armed with EPOLL_CTL_MOD after every event, as the original tstpool does
 *
 * Prints the port that the kernel chose, listens on 127.0.0.1 only, runs until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SCRATCH = 256 * 1024, BATCH = 256, ACCEPTS_PER_TURN = 64 };

struct conn {
    int fd;
    uint32_t armed; /* the mask that the epoll set has for this socket now */
    char *rest;     /* owned: the part of a reply that the kernel did not take, or NULL */
    size_t rest_len, rest_pos;
};

static int epfd;
static uint32_t oneshot; /* 0 or EPOLLONESHOT */
static char scratch[SCRATCH];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void drop(struct conn *c) {
    close(c->fd); /* also takes it out of the epoll set: nobody has duplicated the descriptor */
    free(c->rest);
    free(c);
}

/* Watches `c` for `events`. Level-triggered, that costs a system call only when the mask changes. */
static int watch(struct conn *c, uint32_t events) {
    struct epoll_event ev = {.events = events | oneshot, .data.ptr = c};

    if (c->armed == ev.events && !oneshot)
        return 0;
    c->armed = ev.events;
    return epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &ev);
}

/* send() until everything or EAGAIN: bytes taken, or -1 when the connection is broken. */
static ssize_t push(int fd, const char *data, size_t size) {
    size_t done = 0;

    while (done < size) {
        ssize_t n = send(fd, data + done, size - done, MSG_NOSIGNAL);
        if (n >= 0)
            done += (size_t)n;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            return -1;
    }
    return (ssize_t)done;
}

/* One recv, one send. Returns the events to wait for next, or 0 when the connection is over. */
static uint32_t echo(struct conn *c) {
    ssize_t got = recv(c->fd, scratch, SCRATCH, 0);
    ssize_t sent;

    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? EPOLLIN : 0;
    if (got == 0)
        return 0;
    sent = push(c->fd, scratch, (size_t)got);
    if (sent < 0)
        return 0;
    if (sent == got)
        return EPOLLIN;
    c->rest_len = (size_t)(got - sent);
    c->rest_pos = 0;
    c->rest = malloc(c->rest_len);
    if (c->rest == NULL)
        return 0;
    memcpy(c->rest, scratch + sent, c->rest_len);
    return EPOLLOUT;
}

/* Sends what was left over. Same result as echo(). */
static uint32_t send_rest(struct conn *c) {
    ssize_t sent = push(c->fd, c->rest + c->rest_pos, c->rest_len - c->rest_pos);

    if (sent < 0)
        return 0;
    c->rest_pos += (size_t)sent;
    if (c->rest_pos < c->rest_len)
        return EPOLLOUT;
    free(c->rest);
    c->rest = NULL;
    return EPOLLIN;
}

static void accept_some(int listener) {
    for (int i = 0; i < ACCEPTS_PER_TURN; i++) {
        int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        struct conn *c;
        struct epoll_event ev;

        if (fd < 0)
            return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c = calloc(1, sizeof *c);
        if (c == NULL)
            die("calloc");
        c->fd = fd;
        c->armed = EPOLLIN | oneshot;
        ev = (struct epoll_event){.events = c->armed, .data.ptr = c};
        if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &ev) == -1)
            die("epoll_ctl ADD");
    }
}

static int listen_on_loopback(void) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof addr;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&addr, sizeof addr) == -1 || listen(fd, 4096) == -1)
        die("listen");
    if (getsockname(fd, (struct sockaddr *)&addr, &len) == -1)
        die("getsockname");
    printf("%d\n", ntohs(addr.sin_port));
    fflush(stdout);
    return fd;
}

static void allow_many_descriptors(void) {
    struct rlimit lim;

    if (getrlimit(RLIMIT_NOFILE, &lim) == 0) {
        lim.rlim_cur = lim.rlim_max;
        setrlimit(RLIMIT_NOFILE, &lim);
    }
}

int main(int argc, char **argv) {
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL}, events[BATCH];
    int listener;

    if (argc == 2 && strcmp(argv[1], "--oneshot") == 0)
        oneshot = EPOLLONESHOT;
    else if (argc != 1)
        return fprintf(stderr, "usage: %s [--oneshot]\n", argv[0]), 2;
    allow_many_descriptors();
    epfd = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_on_loopback();
    if (epfd < 0 || epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &ev) == -1)
        die("epoll");

    for (;;) {
        int n = epoll_wait(epfd, events, BATCH, -1);

        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            uint32_t next;

            if (c == NULL) {
                accept_some(listener);
                continue;
            }
            next = c->rest ? send_rest(c) : echo(c);
            if (next == 0 || watch(c, next) == -1)
                drop(c);
        }
    }
}
