/* Closed-loop load generator: `-c` connections, each with `-d` messages of `-s` bytes in flight; for every reply that
 * has come back whole, one more message goes out. Every byte that comes back is compared with what must come back.
 *
 * What is sent. One table holds K whole frames of pseudo-random bytes (K * frame = one period), then its beginning once
 * more, so that any stretch of a stream up to CHUNK bytes is one slice of it: sending and verifying copy nothing.
 * Connection i starts at a frame of its own, so a reply that went to the wrong connection, or was moved or torn, shows
 * as a wrong byte. (Its own among K: 1,025 for frames of 64 bytes, 7 for those of 16 KiB and more.)
 *
 * What is timed. A message's clock starts when it falls due (the reply that frees its place was read), not when send()
 * returns, so a server that does not read cannot hide waiting time; it stops when its last byte was read here.
 * Latencies go to a histogram with 64 steps per power of two: 1.6 % resolution; the maximum is exact.
 *
 * How it waits. It sleeps in epoll_wait, as clients do. With --spin it polls instead: at one connection nearly all of a
 * round trip is otherwise the kernel waking two sleeping processors, here the generator's half of it is gone.
 *
 * Result: one line of JSON. Exit: 0 good; 1 wrong bytes, lost replies or a lost connection; 2 usage; 3 set-up failed.
 * Loopback only, and bounded in time: SIGALRM ends the process 20 s after it should have ended by itself.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CHUNK = 256 * 1024,       /* most bytes per recv and per send */
    MIN_PERIOD = 64 * 1024,   /* small frames: the table repeats after at least this much */
    MIN_FRAMES = 7,           /* large frames: after at least so many */
    BATCH = 256,              /* events per epoll_wait */
    STALL_S = 5,              /* nothing came back from anybody for so long: give up */
    DRAIN_S = 2,              /* after the end, replies still due may take so long */
    SUB_BITS = 6,             /* histogram steps per power of two: 2^6 */
    BUCKETS = (64 - SUB_BITS) << SUB_BITS,
};
#define NS 1000000000ull

struct conn {
    int fd;
    bool waits_for_room; /* EPOLLOUT is armed */
    uint64_t start;      /* where in the table this connection's stream begins */
    uint64_t due;        /* stream offsets: may be sent up to here, ... */
    uint64_t sent;       /* ... was sent up to here, ... */
    uint64_t received;   /* ... has come back, verified, up to here */
    uint64_t *due_at;    /* owned: when message m fell due, at [m % depth] */
};

struct cpu { /* CPU time of a process so far */
    double total_s, user_ticks, system_ticks;
};

static struct {
    int port, connections, depth, pid;
    uint64_t size, header; /* header: 4 with --framing length4, else 0 */
    double seconds, warmup;
    bool spin;
} opt = {.connections = 1, .depth = 1, .size = 64, .seconds = 1.0, .warmup = 0.2};

static int epfd;
static struct conn *conns;
static char *table, *scratch;
static uint64_t frame, period;
static uint64_t histogram[BUCKETS], slowest, messages, bytes_in, latency_sum;
static bool stopping; /* the time is over: no new messages fall due */

/* ---- ends -------------------------------------------------------------------------------------------------------- */

static void fail(int code, const char *format, ...) {
    va_list args;

    printf("{\"ok\": false, \"error\": \"");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\"}\n");
    fflush(stdout);
    _exit(code);
}

static void usage(void) {
    fprintf(stderr, "usage: loadgen -p PORT [-c CONNECTIONS] [-d DEPTH] [-s BYTES] [-t SECONDS] [-w WARM_UP_SECONDS]\n"
                    "               [--framing none|length4] [--pid SERVER_PID] [--spin]\n");
    exit(2);
}

/* ---- clocks and accounts ----------------------------------------------------------------------------------------- */

static uint64_t now_ns(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

/* The total comes from the scheduler's own clock, in nanoseconds. The split between user and system is only known in
 * steps of 10 ms (/proc/PID/stat), and on many kernels it is an estimate from where the timer interrupt found the
 * process: a proportion that needs many seconds to be good. Both count all threads of the process, also ended ones. */
static struct cpu cpu_of(int pid) {
    struct cpu cpu = {0};
    char path[64], line[1024], *p;
    clockid_t clock;
    struct timespec t;
    FILE *f;

    if (pid <= 0)
        return cpu;
    if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &t) == -1)
        fail(3, "no process %d to account for", pid);
    cpu.total_s = (double)t.tv_sec + (double)t.tv_nsec / 1e9;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    f = fopen(path, "r");
    if (f == NULL || fgets(line, sizeof line, f) == NULL || (p = strrchr(line, ')')) == NULL)
        fail(3, "cannot read %s", path);
    fclose(f);
    sscanf(p + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lf %lf", &cpu.user_ticks, &cpu.system_ticks);
    return cpu;
}

/* ---- histogram --------------------------------------------------------------------------------------------------- */

static unsigned bucket_of(uint64_t ns) {
    unsigned shift;

    if (ns < (1u << SUB_BITS))
        return (unsigned)ns;
    shift = 63u - SUB_BITS - (unsigned)__builtin_clzll(ns);
    return ((shift + 1) << SUB_BITS) + (unsigned)((ns >> shift) - (1u << SUB_BITS));
}

/* The largest value that falls into the bucket. */
static uint64_t bucket_end(unsigned bucket) {
    unsigned shift;

    if (bucket < (1u << SUB_BITS))
        return bucket;
    shift = (bucket >> SUB_BITS) - 1;
    return (((uint64_t)(bucket & ((1u << SUB_BITS) - 1)) + (1u << SUB_BITS) + 1) << shift) - 1;
}

static double percentile_us(double percent) {
    uint64_t rank = (uint64_t)((double)messages * percent / 100.0), seen = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank)
            return (double)(bucket_end(i) < slowest ? bucket_end(i) : slowest) / 1e3;
    }
    return (double)slowest / 1e3;
}

static void record(uint64_t ns) {
    histogram[bucket_of(ns)]++;
    latency_sum += ns;
    if (ns > slowest)
        slowest = ns;
}

static void forget_warm_up(void) {
    memset(histogram, 0, sizeof histogram);
    slowest = messages = bytes_in = latency_sum = 0;
}

/* ---- the table of frames ----------------------------------------------------------------------------------------- */

static void make_table(void) {
    uint64_t frames, x = 0x9e3779b97f4a7c15ull;

    frame = opt.size + opt.header;
    frames = MIN_PERIOD / frame + 1;
    if (frames < MIN_FRAMES)
        frames = MIN_FRAMES;
    period = frames * frame;
    table = malloc(period + CHUNK);
    scratch = malloc(CHUNK);
    if (table == NULL || scratch == NULL)
        fail(3, "no memory for %llu bytes", (unsigned long long)period);
    for (uint64_t i = 0; i < period; i++) { /* xorshift64 */
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        table[i] = (char)(x >> 32);
    }
    for (uint64_t i = 0; opt.header && i < frames; i++) {
        uint32_t length = htonl((uint32_t)opt.size);
        memcpy(table + i * frame, &length, sizeof length);
    }
    for (uint64_t i = 0; i < CHUNK; i++)
        table[period + i] = table[i % period];
}

static const char *stream_at(const struct conn *c, uint64_t offset) {
    return table + (c->start + offset) % period;
}

static void wrong_byte(const struct conn *c, const char *want, size_t size) {
    size_t i = 0;

    while (i < size && scratch[i] == want[i])
        i++;
    fail(1, "wrong byte: connection %d, offset %llu: expected 0x%02x, got 0x%02x", (int)(c - conns),
         (unsigned long long)(c->received + i), (unsigned char)want[i], (unsigned char)scratch[i]);
}

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

static void send_due(struct conn *c) {
    while (c->sent < c->due) {
        uint64_t size = c->due - c->sent;
        ssize_t n = send(c->fd, stream_at(c, c->sent), size < CHUNK ? size : CHUNK, MSG_NOSIGNAL);

        if (n >= 0)
            c->sent += (uint64_t)n;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            lost(c, strerror(errno));
    }
    watch_for_room(c, c->sent < c->due);
}

/* Lets `count` more messages, from number `first`, fall due now. */
static void make_due(struct conn *c, uint64_t first, uint64_t count, uint64_t now) {
    for (uint64_t m = first; m < first + count; m++)
        c->due_at[m % (uint64_t)opt.depth] = now;
    c->due += count * frame;
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
        wrong_byte(c, want, (size_t)n);
    if (c->received + (uint64_t)n > c->sent)
        lost(c, "more bytes came back than were sent");
    now = now_ns();
    before = c->received / frame;
    c->received += (uint64_t)n;
    after = c->received / frame;
    if (stopping)
        return;
    bytes_in += (uint64_t)n;
    messages += after - before;
    for (uint64_t m = before; m < after; m++)
        record(now - c->due_at[m % (uint64_t)opt.depth]);
    make_due(c, before + (uint64_t)opt.depth, after - before, now);
}

static void connect_one(struct conn *c, int number) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port)};
    struct timeval patience = {.tv_sec = STALL_S};
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    int one = 1;

    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail(3, "socket: %s", strerror(errno));
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); /* bounds connect() */
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) == -1)
        fail(3, "connect, connection %d: %s", number, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->start = (uint64_t)number % (period / frame) * frame;
    c->due_at = calloc((size_t)opt.depth, sizeof *c->due_at);
    if (c->due_at == NULL || epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &ev) == -1)
        fail(3, "epoll_ctl: %s", strerror(errno));
}

/* ---- phases ------------------------------------------------------------------------------------------------------ */

/* One epoll_wait and all that it brought. Returns the time when it came back. */
static uint64_t turn(void) {
    static uint64_t last_event;
    struct epoll_event events[BATCH];
    int n = epoll_wait(epfd, events, BATCH, opt.spin ? 0 : 100);
    uint64_t now = now_ns();

    if (n > 0 || last_event == 0)
        last_event = now;
    if (now - last_event > STALL_S * NS)
        fail(1, "no reply from the server for %d s", STALL_S);
    for (int i = 0; i < n; i++) {
        struct conn *c = events[i].data.ptr;

        if (events[i].events & ~(uint32_t)EPOLLOUT)
            receive(c);
        send_due(c);
    }
    return now;
}

static uint64_t run_until(uint64_t end) {
    uint64_t now;

    do
        now = turn();
    while (now < end);
    return now;
}

/* Replies still due must come too: a reply that never comes is an error like a wrong one. */
static void drain(void) {
    uint64_t end = now_ns() + DRAIN_S * NS, missing;

    do {
        missing = 0;
        for (int i = 0; i < opt.connections; i++)
            missing += (conns[i].due - conns[i].received + frame - 1) / frame;
        if (missing == 0)
            return;
    } while (turn() < end);
    fail(1, "%llu replies had not come %d s after the end", (unsigned long long)missing, DRAIN_S);
}

static void parse(int argc, char **argv) {
    static const struct option longs[] = {{"framing", required_argument, NULL, 'f'},
                                          {"pid", required_argument, NULL, 'P'},
                                          {"spin", no_argument, NULL, 'S'},
                                          {NULL, 0, NULL, 0}};
    int o;

    while ((o = getopt_long(argc, argv, "p:c:d:s:t:w:", longs, NULL)) != -1) {
        if (o == 'p')
            opt.port = atoi(optarg);
        else if (o == 'c')
            opt.connections = atoi(optarg);
        else if (o == 'd')
            opt.depth = atoi(optarg);
        else if (o == 's')
            opt.size = strtoull(optarg, NULL, 10);
        else if (o == 't')
            opt.seconds = atof(optarg);
        else if (o == 'w')
            opt.warmup = atof(optarg);
        else if (o == 'P')
            opt.pid = atoi(optarg);
        else if (o == 'S')
            opt.spin = true;
        else if (o == 'f' && (strcmp(optarg, "none") == 0 || strcmp(optarg, "length4") == 0))
            opt.header = optarg[0] == 'l' ? 4 : 0;
        else
            usage();
    }
    if (optind != argc || opt.port <= 0 || opt.port > 65535 || opt.connections <= 0 || opt.depth <= 0 ||
        opt.size == 0 || opt.size > 64 * 1024 * 1024 || opt.seconds <= 0 || opt.seconds > 600 ||
        opt.warmup < 0 || opt.warmup > 60)
        usage();
}

static void prepare(void) {
    struct rlimit lim;

    if (getrlimit(RLIMIT_NOFILE, &lim) == 0) {
        lim.rlim_cur = lim.rlim_max;
        setrlimit(RLIMIT_NOFILE, &lim);
    }
    alarm((unsigned)(opt.seconds + opt.warmup) + DRAIN_S + 20);
    make_table();
    epfd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc((size_t)opt.connections, sizeof *conns);
    if (epfd < 0 || conns == NULL)
        fail(3, "set-up: %s", strerror(errno));
    for (int i = 0; i < opt.connections; i++)
        connect_one(&conns[i], i);
}

/* The ticks go out as they are: whoever has several runs adds them up before taking the ratio of user to system. */
static void print_cpu(const char *who, struct cpu a, struct cpu b, double elapsed) {
    double cpu_s = b.total_s - a.total_s;

    printf(", \"%s\": {\"cpu_s\": %.6f, \"busy\": %.4f, \"cpu_us_per_message\": %.4f", who, cpu_s, cpu_s / elapsed,
           cpu_s * 1e6 / (double)messages);
    printf(", \"user_ticks\": %.0f, \"system_ticks\": %.0f}", b.user_ticks - a.user_ticks,
           b.system_ticks - a.system_ticks);
}

static void print_traffic(double elapsed) {
    printf("{\"ok\": true, \"connections\": %d, \"depth\": %d, \"size\": %llu, \"framing\": \"%s\"", opt.connections,
           opt.depth, (unsigned long long)opt.size, opt.header ? "length4" : "none");
    printf(", \"seconds\": %.6f, \"messages\": %llu, \"messages_per_s\": %.1f, \"bytes_verified\": %llu", elapsed,
           (unsigned long long)messages, (double)messages / elapsed, (unsigned long long)bytes_in);
    printf(", \"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p90\": %.2f, \"p99\": %.2f",
           (double)latency_sum / (double)messages / 1e3, percentile_us(50), percentile_us(90), percentile_us(99));
    printf(", \"p999\": %.2f, \"max\": %.2f}", percentile_us(99.9), (double)slowest / 1e3);
}

int main(int argc, char **argv) {
    struct cpu server[2], self[2];
    uint64_t begin;
    double elapsed;

    parse(argc, argv);
    prepare();
    begin = now_ns();
    for (int i = 0; i < opt.connections; i++) {
        make_due(&conns[i], 0, (uint64_t)opt.depth, begin);
        send_due(&conns[i]);
    }
    run_until(begin + (uint64_t)(opt.warmup * 1e9));
    forget_warm_up();

    server[0] = cpu_of(opt.pid);
    self[0] = cpu_of(getpid());
    begin = now_ns();
    run_until(begin + (uint64_t)(opt.seconds * 1e9));
    elapsed = (double)(now_ns() - begin) / 1e9; /* the last turn's work is in the counts, so its time is too */
    server[1] = cpu_of(opt.pid);
    self[1] = cpu_of(getpid());

    stopping = true;
    drain();
    if (messages == 0)
        fail(1, "not one message came back in %.1f s", elapsed);
    print_traffic(elapsed);
    print_cpu("generator", self[0], self[1], elapsed);
    if (opt.pid)
        print_cpu("server", server[0], server[1], elapsed);
    printf("}\n");
    return 0;
}
