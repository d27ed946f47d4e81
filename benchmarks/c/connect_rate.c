/* How many connections a second: each of `-c` clients connects, sends one message of `-s` bytes, closes when all of it
 * has come back, and begins anew. Every byte is compared.
 *
 * The clock of one "message" runs from before connect() to the reply's last byte. connect() blocks: on loopback the
 * kernel shakes hands by itself, without the server, as long as the server's backlog has room.
 *
 * A client's port rests for up to a second after its connection has ended (TIME_WAIT; after that the kernel lets it be
 * used again on loopback). Ports are taken in turn here, because the kernel's own search for a free one takes
 * milliseconds once half of them rest. More than 50,000 connections a second would run out of them: that is an error.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <getopt.h>
#include <sys/epoll.h>

enum {
    TABLE = 64 * 1024, /* random bytes that messages are taken from */
    BATCH = 256,       /* events per epoll_wait */
    LARGEST = 16 * 1024,
    FIRST_PORT = 10000,
    LAST_PORT = 60999,
};

struct client {
    int fd;
    uint64_t began;    /* when connect() was called */
    const char *bytes; /* of its message */
    size_t received;
};

static struct common opt = {.connections = 1, .size = 64, .seconds = 1.0, .warmup = 0.2};
static int epfd;
static struct client *clients;
static int connected; /* clients that wait for a reply */
static char table[TABLE + LARGEST];
static bool stopping; /* the time is over: nobody connects again */

static void usage(void) {
    fprintf(stderr, "usage: connect_rate -p PORT [-c CLIENTS] [-s BYTES] [-t SECONDS] [-w WARM_UP_SECONDS]\n"
                    "                    [--pid SERVER_PID]\n");
    exit(2);
}

/* Gives the socket the next local port that nobody uses. */
static void take_port(int fd) {
    static int port;
    int one = 1;

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one); /* else resting ports are not free */
    for (int tries = 0; tries < 1000; tries++) {
        struct sockaddr_in from;

        port = port == 0 ? FIRST_PORT + getpid() % (LAST_PORT - FIRST_PORT) : port < LAST_PORT ? port + 1 : FIRST_PORT;
        from = loopback(port);
        if (bind(fd, (struct sockaddr *)&from, sizeof from) == 0)
            return;
    }
    fail(3, "no local port is free: %s", strerror(errno));
}

static void connect_and_ask(struct client *c) {
    static uint64_t number;
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};

    c->bytes = table + number++ * 61 % TABLE; /* no two in a row the same, so a reply to somebody else shows */
    c->received = 0;
    c->began = now_ns();
    c->fd = new_socket();
    take_port(c->fd);
    connect_it(c->fd, opt.port, (int)(c - clients));
    if (send(c->fd, c->bytes, opt.size, MSG_NOSIGNAL) != (ssize_t)opt.size)
        fail(1, "connection %d: send: %s", (int)(c - clients), strerror(errno));
    if (epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &ev) == -1)
        fail(3, "epoll_ctl: %s", strerror(errno));
    connected++;
}

static void receive(struct client *c) {
    static char scratch[LARGEST + 1]; /* one more than may come, to notice it */
    size_t missing = opt.size - c->received;
    ssize_t n = recv(c->fd, scratch, missing + 1, MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        fail(1, "connection %d: %s after %zu bytes", (int)(c - clients), n == 0 ? "closed" : strerror(errno),
             c->received);
    if ((size_t)n > missing)
        fail(1, "connection %d: more bytes came back than were sent", (int)(c - clients));
    if (memcmp(scratch, c->bytes + c->received, (size_t)n) != 0)
        wrong_byte((int)(c - clients), c->received, scratch, c->bytes + c->received, (size_t)n);
    c->received += (size_t)n;
    if (c->received < opt.size)
        return;
    record(now_ns() - c->began);
    close(c->fd);
    connected--;
    if (!stopping)
        connect_and_ask(c);
}

static void run_until(uint64_t end) {
    struct epoll_event events[BATCH];
    uint64_t now = now_ns(), last_event = now;

    while (now < end && connected > 0) {
        int n = epoll_wait(epfd, events, BATCH, 100);

        now = now_ns();
        if (n > 0)
            last_event = now;
        if (now - last_event > STALL_S * NS)
            fail(1, "no reply from the server for %d s", STALL_S);
        for (int i = 0; i < n; i++)
            receive(events[i].data.ptr);
    }
}

int main(int argc, char **argv) {
    static const struct option longs[] = {{"pid", required_argument, NULL, 'P'}, {NULL, 0, NULL, 0}};
    struct accounts end;
    uint64_t counted;
    int o;

    while ((o = getopt_long(argc, argv, "p:c:s:t:w:", longs, NULL)) != -1)
        if (!parse_common(&opt, o, optarg))
            usage();
    if (optind != argc || !is_sensible(&opt) || opt.size > LARGEST)
        usage();
    prepare_process(opt.seconds + opt.warmup + STALL_S);
    fill_at_random(table, sizeof table);
    epfd = epoll_create1(EPOLL_CLOEXEC);
    clients = calloc((size_t)opt.connections, sizeof *clients);
    if (epfd < 0 || clients == NULL)
        fail(3, "set-up: %s", strerror(errno));

    for (int i = 0; i < opt.connections; i++)
        connect_and_ask(&clients[i]);
    run_until(now_ns() + (uint64_t)(opt.warmup * 1e9));
    run_until(begin_measuring(opt.pid) + (uint64_t)(opt.seconds * 1e9));
    end = end_measuring();
    counted = recorded;

    stopping = true; /* the last replies must come too: their latencies count, they themselves no longer */
    run_until(now_ns() + STALL_S * NS);
    if (connected > 0)
        fail(1, "%d replies had not come %d s after the end", connected, STALL_S);
    print_figures(&end, counted);
    printf(", \"connections\": %d, \"size\": %llu}\n", opt.connections, (unsigned long long)opt.size);
    return 0;
}
