/* How long until everybody has it: `-c` clients that only listen; one message of `-s` bytes is written to --control,
 * the standard input of the server, whose outside thread reads it there and sends it to all. When the last client has
 * its last byte the next message goes out. Every byte is compared.
 *
 * One latency is the time from that write to the last byte at the last client. A "message" of the rate, and of CPU per
 * message, is one delivered to one client.
 *
 * Before, each client says hello with one byte and waits for its echo: a server has then accepted it for certain.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <getopt.h>
#include <sys/epoll.h>

enum {
    TABLE = 64 * 1024, /* random bytes that messages are taken from */
    BATCH = 256,       /* events per epoll_wait */
    LARGEST = 4096,    /* what a pipe takes in one piece */
};

struct client {
    int fd;
    size_t received; /* bytes of the message that is under way */
};

static struct common opt = {.connections = 1, .size = 64, .seconds = 1.0, .warmup = 0.2};
static int epfd, control = -1;
static struct client *clients;
static char table[TABLE + LARGEST];
static const char *message;  /* that is under way */
static int whole;            /* clients that have all of it */
static uint64_t deliveries;

static void usage(void) {
    fprintf(stderr, "usage: broadcast_load -p PORT --control DESCRIPTOR [-c CLIENTS] [-s BYTES] [-t SECONDS]\n"
                    "                      [-w WARM_UP_SECONDS] [--pid SERVER_PID]\n");
    exit(2);
}

static void join(struct client *c, int number) {
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    char echo = 0;

    c->fd = new_socket();
    connect_it(c->fd, opt.port, number);
    if (send(c->fd, "h", 1, MSG_NOSIGNAL) != 1 || recv(c->fd, &echo, 1, 0) != 1 || echo != 'h')
        fail(1, "connection %d: the server did not say hello", number);
    if (epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &ev) == -1)
        fail(3, "epoll_ctl: %s", strerror(errno));
}

static void receive(struct client *c) {
    static char scratch[LARGEST + 1]; /* one more than may come, to notice it */
    size_t missing = opt.size - c->received;
    ssize_t n = recv(c->fd, scratch, missing + 1, MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        fail(1, "connection %d: %s", (int)(c - clients), n == 0 ? "closed by the server" : strerror(errno));
    if ((size_t)n > missing)
        fail(1, "connection %d: more bytes came than were broadcast", (int)(c - clients));
    if (memcmp(scratch, message + c->received, (size_t)n) != 0)
        wrong_byte((int)(c - clients), c->received, scratch, message + c->received, (size_t)n);
    c->received += (size_t)n;
    if (c->received == opt.size)
        whole++;
}

/* One message to all, from the order until everybody has it. */
static void broadcast(void) {
    static uint64_t number;
    struct epoll_event events[BATCH];
    uint64_t began, last_event, now;

    message = table + number++ * 61 % TABLE; /* no two in a row the same: a message that comes late shows */
    whole = 0;
    for (int i = 0; i < opt.connections; i++)
        clients[i].received = 0;
    began = last_event = now = now_ns();
    if (write(control, message, opt.size) != (ssize_t)opt.size)
        fail(1, "the server's standard input: %s", strerror(errno));
    while (whole < opt.connections) {
        int n = epoll_wait(epfd, events, BATCH, 100);

        for (int i = 0; i < n; i++)
            receive(events[i].data.ptr);
        now = now_ns();
        if (n > 0)
            last_event = now;
        if (now - last_event > STALL_S * NS)
            fail(1, "%d of %d clients had not got a message after %d s", opt.connections - whole, opt.connections,
                 STALL_S);
    }
    record(now - began);
    deliveries += (uint64_t)opt.connections;
}

static void run_until(uint64_t end) {
    while (now_ns() < end)
        broadcast();
}

int main(int argc, char **argv) {
    static const struct option longs[] = {
        {"pid", required_argument, NULL, 'P'}, {"control", required_argument, NULL, 'C'}, {NULL, 0, NULL, 0}};
    struct accounts end;
    int o;

    while ((o = getopt_long(argc, argv, "p:c:s:t:w:", longs, NULL)) != -1) {
        if (o == 'C')
            control = atoi(optarg);
        else if (!parse_common(&opt, o, optarg))
            usage();
    }
    if (optind != argc || !is_sensible(&opt) || opt.size > LARGEST || control < 0)
        usage();
    prepare_process(opt.seconds + opt.warmup + 2 * STALL_S);
    fill_at_random(table, sizeof table);
    epfd = epoll_create1(EPOLL_CLOEXEC);
    clients = calloc((size_t)opt.connections, sizeof *clients);
    if (epfd < 0 || clients == NULL)
        fail(3, "set-up: %s", strerror(errno));
    for (int i = 0; i < opt.connections; i++)
        join(&clients[i], i);

    run_until(now_ns() + (uint64_t)(opt.warmup * 1e9));
    deliveries = 0;
    run_until(begin_measuring(opt.pid) + (uint64_t)(opt.seconds * 1e9));
    end = end_measuring();
    print_figures(&end, deliveries);
    printf(", \"connections\": %d, \"size\": %llu}\n", opt.connections, (unsigned long long)opt.size);
    return 0;
}
