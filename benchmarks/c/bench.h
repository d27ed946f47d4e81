/* What the load generators share: how they end, clocks and accounts, the histogram of latencies, sockets.
 *
 * Result: one line of JSON. Exit: 0 good; 1 wrong bytes, lost replies or a lost connection; 2 usage; 3 set-up failed.
 * Loopback only, and bounded in time: SIGALRM ends a process that has not ended by itself.
 */
#ifndef BENCH_H
#define BENCH_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull

enum {
    SUB_BITS = 6, /* histogram steps per power of two: 2^6, a resolution of 1.6 % */
    BUCKETS = (64 - SUB_BITS) << SUB_BITS,
    STALL_S = 5, /* nothing came back from anybody for so long: give up */
};

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

/* Says which byte is wrong, and ends. `got` and `want` differ somewhere in `size` bytes that begin at `offset`. */
static void wrong_byte(int connection, uint64_t offset, const char *got, const char *want, size_t size) {
    size_t i = 0;

    while (i < size && got[i] == want[i])
        i++;
    fail(1, "wrong byte: connection %d, offset %llu: expected 0x%02x, got 0x%02x", connection,
         (unsigned long long)(offset + i), (unsigned char)want[i], (unsigned char)got[i]);
}

/* ---- the histogram of latencies ---------------------------------------------------------------------------------- */

static uint64_t histogram[BUCKETS], slowest, recorded, latency_sum;

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
    uint64_t rank = (uint64_t)((double)recorded * percent / 100.0), seen = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank)
            return (double)(bucket_end(i) < slowest ? bucket_end(i) : slowest) / 1e3;
    }
    return (double)slowest / 1e3;
}

static void record(uint64_t ns) {
    histogram[bucket_of(ns)]++;
    recorded++;
    latency_sum += ns;
    if (ns > slowest)
        slowest = ns;
}

/* ---- clocks and accounts ----------------------------------------------------------------------------------------- */

struct cpu { /* CPU time of a process so far */
    double total_s, user_ticks, system_ticks;
};

static struct { /* when the measurement began, and whose account is kept beside ours */
    int server_pid; /* 0: nobody's */
    uint64_t at;
    struct cpu server, self;
} begun;

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

/* Forgets the warm-up. From here on latencies, and the server's CPU time and ours, count. */
static uint64_t begin_measuring(int server_pid) {
    memset(histogram, 0, sizeof histogram);
    slowest = recorded = latency_sum = 0;
    begun.server_pid = server_pid;
    begun.server = cpu_of(server_pid);
    begun.self = cpu_of(getpid());
    return begun.at = now_ns();
}

/* The ticks go out as they are: whoever has several runs adds them up before taking the ratio of user to system. */
static void print_cpu(const char *who, struct cpu a, struct cpu b, double elapsed, uint64_t messages) {
    double cpu_s = b.total_s - a.total_s;

    printf(", \"%s\": {\"cpu_s\": %.6f, \"busy\": %.4f, \"cpu_us_per_message\": %.4f", who, cpu_s, cpu_s / elapsed,
           cpu_s * 1e6 / (double)messages);
    printf(", \"user_ticks\": %.0f, \"system_ticks\": %.0f}", b.user_ticks - a.user_ticks,
           b.system_ticks - a.system_ticks);
}

struct accounts { /* what end_measuring found */
    double elapsed;
    double mean_us; /* of the latencies until then; not a number if there were none */
    struct cpu server, self;
};

/* The last turn's work is in the counts, so its time is too: call this right after it.
 *
 * What is still under way is let come back, and its latencies recorded too, when it counts no more: the longest waits
 * are those that the end interrupts. Only the mean is of what came before the end. Times the rate it is what was in
 * flight (Little's law): when the product is less, somebody waited for most of the time. measure.py looks at that. */
static struct accounts end_measuring(void) {
    struct accounts end = {.elapsed = (double)(now_ns() - begun.at) / 1e9};

    end.mean_us = (double)latency_sum / (double)recorded / 1e3;
    end.server = cpu_of(begun.server_pid);
    end.self = cpu_of(getpid());
    return end;
}

/* The part of the result that all have. The caller adds what is its own, and "}". */
static void print_figures(const struct accounts *end, uint64_t messages) {
    if (messages == 0)
        fail(1, "not one message came back in %.1f s", end->elapsed);
    printf("{\"ok\": true, \"seconds\": %.6f, \"messages\": %llu, \"messages_per_s\": %.1f", end->elapsed,
           (unsigned long long)messages, (double)messages / end->elapsed);
    printf(", \"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p90\": %.2f, \"p99\": %.2f", end->mean_us,
           percentile_us(50), percentile_us(90), percentile_us(99));
    printf(", \"p999\": %.2f, \"max\": %.2f}", percentile_us(99.9), (double)slowest / 1e3);
    print_cpu("generator", begun.self, end->self, end->elapsed, messages);
    if (begun.server_pid)
        print_cpu("server", begun.server, end->server, end->elapsed, messages);
}

/* ---- bytes and sockets ------------------------------------------------------------------------------------------- */

static void fill_at_random(char *bytes, uint64_t size) {
    uint64_t x = 0x9e3779b97f4a7c15ull;

    for (uint64_t i = 0; i < size; i++) { /* xorshift64 */
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes[i] = (char)(x >> 32);
    }
}

/* Before anything else: descriptors for many connections, and an end if all else fails. */
static void prepare_process(double seconds) {
    struct rlimit lim;

    if (getrlimit(RLIMIT_NOFILE, &lim) == 0) {
        lim.rlim_cur = lim.rlim_max;
        setrlimit(RLIMIT_NOFILE, &lim);
    }
    alarm((unsigned)seconds + 20);
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return to;
}

/* A socket that blocks, for at most STALL_S. */
static int new_socket(void) {
    struct timeval patience = {.tv_sec = STALL_S};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        fail(3, "socket: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); /* bounds connect() too */
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void connect_it(int fd, int port, int number) {
    struct sockaddr_in to = loopback(port);

    if (connect(fd, (struct sockaddr *)&to, sizeof to) == -1)
        fail(3, "connect, connection %d: %s", number, strerror(errno));
}

/* The options that all have: -p PORT -c CONNECTIONS -s BYTES -t SECONDS -w WARM_UP_SECONDS --pid SERVER_PID. */
struct common {
    int port, connections, pid;
    uint64_t size; /* of a message */
    double seconds, warmup;
};

/* False: `option`, as getopt_long returned it, is none of these. */
static bool parse_common(struct common *common, int option, const char *value) {
    if (option == 'p')
        common->port = atoi(value);
    else if (option == 'c')
        common->connections = atoi(value);
    else if (option == 's')
        common->size = strtoull(value, NULL, 10);
    else if (option == 't')
        common->seconds = atof(value);
    else if (option == 'w')
        common->warmup = atof(value);
    else if (option == 'P')
        common->pid = atoi(value);
    else
        return false;
    return true;
}

static bool is_sensible(const struct common *common) {
    return common->port > 0 && common->port <= 65535 && common->connections > 0 && common->size > 0 &&
           common->size <= 64 * 1024 * 1024 && common->seconds > 0 && common->seconds <= 600 &&
           common->warmup >= 0 && common->warmup <= 60;
}

#endif
