/* Closed-loop load generator: `-c` connections, each with `-d` messages of `-s` bytes in flight; for every reply that
 * has come back whole, one more message goes out. Every byte that comes back is compared with what must come back.
 *
 * What is sent. One table holds K whole frames of pseudo-random bytes (K * frame = one period), then its beginning once
 * more, so that any stretch of a stream up to CHUNK bytes is one slice of it: sending and verifying copy nothing.
 * Connection i starts at a frame of its own, so a reply that went to the wrong connection, or was moved or torn, shows
 * as a wrong byte. (Its own among K: 1,025 for frames of 64 bytes, 7 for those of 16 KiB and more.) The table is a file
 * in memory: long frames are sent from there without a copy (sendfile), or else copying and verifying them would keep
 * the generator busier than a good server, and measure itself.
 *
 * What is timed. A message's clock starts when it falls due (the reply that frees its place was read), not when send()
 * returns, so a server that does not read cannot hide waiting time; it stops when its last byte was read here. For what
 * is under way when the time is over that is later, and it is recorded, though it is no message of the rate: a server
 * cannot hide whom it has let wait either. The maximum is exact, percentiles to 1.6 %.
 *
 * When it begins: first everybody is served once, so that a server has accepted all connections. Until then nothing
 * more falls due: many servers, once some connections keep them busy, take seconds to accept the others, and would be
 * measured with few. Then comes the warm-up.
 *
 * How long: for `-t` seconds, or with `-n` until so many messages have come back, if that is sooner.
 *
 * How it waits. It sleeps in epoll_wait, as clients do. With --spin it polls instead: at one connection nearly all of a
 * round trip is otherwise the kernel waking two sleeping processors, here the generator's half of it is gone.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <getopt.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>

enum {
    CHUNK = 256 * 1024,       /* most bytes per recv and per send */
    LONG_FRAME = 256 * 1024,  /* frames so long are not copied to be sent */
    MIN_PERIOD = 64 * 1024,   /* small frames: the table repeats after at least this much */
    MIN_FRAMES = 7,           /* large frames: after at least so many */
    BATCH = 256,              /* events per epoll_wait */
};

struct conn {
    int fd;
    bool waits_for_room; /* EPOLLOUT is armed */
    uint64_t start;      /* where in the table this connection's stream begins */
    uint64_t due;        /* stream offsets: may be sent up to here, ... */
    uint64_t sent;       /* ... was sent up to here, ... */
    uint64_t received;   /* ... has come back, verified, up to here */
    uint64_t *due_at;    /* owned: when message m fell due, at [m % depth] */
};

static struct common opt = {.connections = 1, .size = 64, .seconds = 1.0, .warmup = 0.2};
static int depth = 1;
static uint64_t header; /* 4 with --framing length4, else 0 */
static bool spin;
static uint64_t enough = UINT64_MAX; /* messages: the time is over when so many have come back */
static int epfd;
static struct conn *conns;
static char *table, *scratch;
static int table_file; /* what `table` is a view of */
static uint64_t frame, period;
static uint64_t bytes_in;
static int served;          /* connections that a whole message has come back to */
static bool holding = true; /* nothing more falls due: not everybody was served once yet, or the time is over */

static void usage(void) {
    fprintf(stderr, "usage: loadgen -p PORT [-c CONNECTIONS] [-d DEPTH] [-s BYTES] [-t SECONDS] [-w WARM_UP_SECONDS]\n"
                    "               [-n MESSAGES] [--framing none|length4] [--pid SERVER_PID] [--spin]\n");
    exit(2);
}

/* ---- the table of frames ----------------------------------------------------------------------------------------- */

static void make_table(void) {
    uint64_t frames;

    frame = opt.size + header;
    frames = MIN_PERIOD / frame + 1;
    if (frames < MIN_FRAMES)
        frames = MIN_FRAMES;
    period = frames * frame;
    scratch = malloc(CHUNK);
    table_file = memfd_create("table", MFD_CLOEXEC);
    if (scratch == NULL || table_file < 0 || ftruncate(table_file, (off_t)(period + CHUNK)) < 0)
        fail(3, "no memory for %llu bytes", (unsigned long long)period);
    table = mmap(NULL, period + CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED, table_file, 0);
    if (table == MAP_FAILED)
        fail(3, "mmap: %s", strerror(errno));
    fill_at_random(table, period);
    for (uint64_t i = 0; header && i < frames; i++) {
        uint32_t length = htonl((uint32_t)opt.size);
        memcpy(table + i * frame, &length, sizeof length);
    }
    for (uint64_t i = 0; i < CHUNK; i++)
        table[period + i] = table[i % period];
}

static uint64_t place_of(const struct conn *c, uint64_t offset) { return (c->start + offset) % period; }

static const char *stream_at(const struct conn *c, uint64_t offset) { return table + place_of(c, offset); }

/* ---- one connection ---------------------------------------------------------------------------------------------- */

static void lost(const struct conn *c, const char *what) {
    fail(1, "connection %d: %s after %llu bytes", (int)(c - conns), what, (unsigned long long)c->received);
}

static void watch_for_room(struct conn *c, bool on) {
    struct epoll_event ev = {.events = on ? EPOLLIN | EPOLLOUT : EPOLLIN, .data.ptr = c};

    if (c->waits_for_room == on)
        return;
    c->waits_for_room = on;
    epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &ev);
}

static ssize_t send_some(struct conn *c, uint64_t size) {
    off_t place = (off_t)place_of(c, c->sent);

    if (frame < LONG_FRAME)
        return send(c->fd, table + place, size, MSG_NOSIGNAL);
    return sendfile(c->fd, table_file, &place, size);
}

static void send_due(struct conn *c) {
    while (c->sent < c->due) {
        uint64_t size = c->due - c->sent;
        ssize_t n = send_some(c, size < CHUNK ? size : CHUNK);

        if (n >= 0)
            c->sent += (uint64_t)n;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            lost(c, strerror(errno));
    }
    watch_for_room(c, c->sent < c->due);
}

/* Lets so many more messages fall due now that `depth` are in flight. */
static void make_due(struct conn *c, uint64_t now) {
    uint64_t end = c->received / frame + (uint64_t)depth;

    for (uint64_t m = c->due / frame; m < end; m++)
        c->due_at[m % (uint64_t)depth] = now;
    c->due = end * frame;
}

static void receive(struct conn *c) {
    ssize_t n = recv(c->fd, scratch, CHUNK, 0);
    uint64_t before, after, now;
    const char *want = stream_at(c, c->received);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        lost(c, n == 0 ? "closed by the server" : strerror(errno));
    if (memcmp(scratch, want, (size_t)n) != 0)
        wrong_byte((int)(c - conns), c->received, scratch, want, (size_t)n);
    if (c->received + (uint64_t)n > c->sent)
        lost(c, "more bytes came back than were sent");
    now = now_ns();
    before = c->received / frame;
    c->received += (uint64_t)n;
    after = c->received / frame;
    bytes_in += (uint64_t)n;
    for (uint64_t m = before; m < after; m++)
        record(now - c->due_at[m % (uint64_t)depth]);
    if (before == 0 && after > 0)
        served++;
    if (!holding)
        make_due(c, now);
}

static void open_one(struct conn *c, int number) {
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};

    c->fd = new_socket();
    connect_it(c->fd, opt.port, number);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->start = (uint64_t)number % (period / frame) * frame;
    c->due_at = calloc((size_t)depth, sizeof *c->due_at);
    if (c->due_at == NULL || epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &ev) == -1)
        fail(3, "epoll_ctl: %s", strerror(errno));
}

/* ---- phases ------------------------------------------------------------------------------------------------------ */

static uint64_t replies_due(void) {
    uint64_t count = 0;

    for (int i = 0; i < opt.connections; i++)
        count += (conns[i].due - conns[i].received + frame - 1) / frame;
    return count;
}

/* Since the beginning, warm-up and end included. */
static uint64_t replies_in_all(void) {
    uint64_t count = 0;

    for (int i = 0; i < opt.connections; i++)
        count += conns[i].received / frame;
    return count;
}

/* One epoll_wait and all that it brought. Returns the time when it came back. */
static uint64_t turn(void) {
    static uint64_t last_event;
    struct epoll_event events[BATCH];
    int n = epoll_wait(epfd, events, BATCH, spin ? 0 : 100);
    uint64_t now = now_ns();

    if (n > 0 || last_event == 0)
        last_event = now;
    if (now - last_event > STALL_S * NS)
        fail(1, "no reply from the server for %d s: %llu had not come", STALL_S, (unsigned long long)replies_due());
    for (int i = 0; i < n; i++) {
        struct conn *c = events[i].data.ptr;

        if (events[i].events & ~(uint32_t)EPOLLOUT)
            receive(c);
        send_due(c);
    }
    return now;
}

static void make_all_due(void) {
    uint64_t now = now_ns();

    for (int i = 0; i < opt.connections; i++) {
        make_due(&conns[i], now);
        send_due(&conns[i]);
    }
}

static void serve_everybody_once(void) {
    make_all_due();
    while (served < opt.connections)
        turn();
    holding = false;
    make_all_due();
}

static void run_until(uint64_t end) {
    while (turn() < end && recorded < enough)
        ;
}

/* Replies still due must come too: a reply that never comes is an error like a wrong one. */
static void drain(void) {
    while (replies_due() > 0)
        turn();
}

static void parse(int argc, char **argv) {
    static const struct option longs[] = {{"framing", required_argument, NULL, 'f'},
                                          {"pid", required_argument, NULL, 'P'},
                                          {"spin", no_argument, NULL, 'S'},
                                          {NULL, 0, NULL, 0}};
    int o;

    while ((o = getopt_long(argc, argv, "p:c:d:s:t:w:n:", longs, NULL)) != -1) {
        if (parse_common(&opt, o, optarg))
            continue;
        if (o == 'd')
            depth = atoi(optarg);
        else if (o == 'n')
            enough = strtoull(optarg, NULL, 10);
        else if (o == 'S')
            spin = true;
        else if (o == 'f' && (strcmp(optarg, "none") == 0 || strcmp(optarg, "length4") == 0))
            header = optarg[0] == 'l' ? 4 : 0;
        else
            usage();
    }
    if (optind != argc || depth <= 0 || enough == 0 || !is_sensible(&opt))
        usage();
}

static void prepare(void) {
    prepare_process(opt.seconds + opt.warmup + STALL_S);
    make_table();
    epfd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc((size_t)opt.connections, sizeof *conns);
    if (epfd < 0 || conns == NULL)
        fail(3, "set-up: %s", strerror(errno));
    for (int i = 0; i < opt.connections; i++)
        open_one(&conns[i], i);
}

int main(int argc, char **argv) {
    struct accounts end;
    uint64_t counted, verified;

    parse(argc, argv);
    signal(SIGPIPE, SIG_IGN); /* sendfile has no MSG_NOSIGNAL */
    prepare();
    serve_everybody_once();
    run_until(now_ns() + (uint64_t)(opt.warmup * 1e9));

    bytes_in = 0;
    run_until(begin_measuring(opt.pid) + (uint64_t)(opt.seconds * 1e9));
    end = end_measuring();
    counted = recorded;
    verified = bytes_in;

    holding = true;
    drain();
    print_figures(&end, counted);
    printf(", \"connections\": %d, \"depth\": %d, \"size\": %llu, \"framing\": \"%s\"", opt.connections, depth,
           (unsigned long long)opt.size, header ? "length4" : "none");
    printf(", \"bytes_verified\": %llu", (unsigned long long)verified);
    printf(", \"messages_in_all\": %llu", (unsigned long long)replies_in_all());
    printf("}\n");
    return 0;
}
