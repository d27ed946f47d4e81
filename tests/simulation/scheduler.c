/* Simulated threads: coroutines on one real thread, and one seed decides who runs when.

   A thread may be switched away from wherever it calls sim_point(): at each system call, atomic operation, lock and wait
   of the engine. Time is virtual. It goes on a little with each look at the clock, and, when nobody can run, to the next
   moment at which somebody wakes. */
#include "simulation.h"

#include <ucontext.h>

enum {
    THREADS = 24,
    STACK = 131072,
    STEPS_MOST = 20000000,   /* a seed that does not end has a live-lock */
    CALLS_MOST = 1000,       /* kernel calls with which nothing is done, before whoever makes them spins ... */
    CALLS_EACH = 50,        /* ... and so many more in each millisecond */
};

#define REST_AFTER (600 * SIM_MILLISECOND)
#define GUARD 0x5ca1ab1e5ca1ab1eull

struct thread {
    ucontext_t context;
    const char *name;
    void (*body)(void *);
    void *argument;
    const void *channel; /* blocked on it, NULL: can run */
    uint64_t until;      /* 0: for ever */
    int woken, ended, asleep;
    unsigned char *stack;
};

int64_t sim_steps_left;
int sim_threads_run;
uintptr_t sim_quiet_begin, sim_quiet_size;
uint32_t sim_weak_rate;

static struct thread threads[THREADS];
static ucontext_t outside;
static int n_threads, current, slow_thread, rester, tracing;
static uint32_t mean_steps;
static uint64_t now, last_progress, random_state, hash, steps, switches, calls;
static char failure[512];
static char asleep_channel, rest_channel;

/* ---------------------------------------------------------------------------------------------- the seed */

uint64_t sim_random(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15ull;   /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

uint32_t sim_below(uint32_t n) { return n ? (uint32_t)((sim_random() >> 32) * n >> 32) : 0; }

int sim_chance(uint32_t rate) { return rate && sim_below(1024) < rate; }

static void new_distance(void) {
    steps += 1;
    sim_steps_left = sim_below(2 * mean_steps + 1);
}

void sim_begin(uint64_t seed, int trace) {
    random_state = seed * 0xd1342543de82ef95ull + 1;
    tracing = trace;
    hash = 14695981039346656037ull;
    now = last_progress = 1000 * 1000 * SIM_MILLISECOND;
    n_threads = switches = steps = calls = sim_threads_run = sim_quiet_size = 0;
    current = slow_thread = rester = -1;
    mean_steps = 20;
    sim_steps_left = 0;
    failure[0] = 0;
}

void sim_set_schedule(uint32_t mean, int slow) {
    mean_steps = mean;
    slow_thread = slow;
}

uint64_t sim_trace_hash(void) { return hash; }
uint64_t sim_switches(void) { return switches; }
uint64_t sim_steps(void) { return steps; }
uint64_t sim_now(void) { return now; }
void sim_advance(uint64_t nanoseconds) { now += nanoseconds; }

void sim_progress(void) {
    last_progress = now;
    calls = 0;
}

void sim_call(void) {
    sim_point();
    if (++calls > CALLS_MOST + CALLS_EACH * ((now - last_progress) / SIM_MILLISECOND))
        sim_fail("%llu kernel calls in %llu us, and nothing was done", (unsigned long long)calls,
                 (unsigned long long)(now - last_progress) / 1000);
}

int sim_current(void) { return current; }

static void mix(uint64_t number) { hash = (hash ^ number) * 1099511628211ull; }

void sim_trace(const char *what, int64_t one, int64_t two, int64_t result) {
    for (const char *c = what; *c; c++)
        mix((unsigned char)*c);
    mix((uint64_t)one);
    mix((uint64_t)two);
    mix((uint64_t)result);
    mix((uint64_t)current);
    if (tracing)
        fprintf(stderr, "%12.6f %-10s %-14s %8lld %8lld -> %lld\n", (double)(now - 1000 * 1000 * SIM_MILLISECOND) / 1e6,
                current >= 0 ? threads[current].name : "-", what, (long long)one, (long long)two, (long long)result);
}

const char *sim_failure(void) { return failure[0] ? failure : NULL; }

void sim_fail(const char *format, ...) {
    va_list arguments;
    if (!failure[0]) {
        va_start(arguments, format);
        vsnprintf(failure, sizeof failure, format, arguments);
        va_end(arguments);
        sim_trace("FAILED", 0, 0, 0);
    }
    if (current >= 0) {
        current = -1;
        sim_threads_run = 0;
        setcontext(&outside);
    }
}

/* ----------------------------------------------------------------------------------------------- threads */

static void thread_begin(void) {
    struct thread *self = &threads[current];
    self->body(self->argument);
    self->ended = 1;
    sim_trace("ends", 0, 0, 0);
    sim_switch();
}

int sim_spawn(const char *name, void (*body)(void *), void *argument) {
    struct thread *thread;
    unsigned char *stack;
    if (n_threads == THREADS) {
        sim_fail("the simulation has no room for another thread");
        return -1;
    }
    thread = &threads[n_threads];
    stack = thread->stack ? thread->stack : malloc(STACK);
    memset(thread, 0, sizeof *thread);
    thread->stack = stack;
    memcpy(stack, &(uint64_t){GUARD}, 8);
    thread->name = name;
    thread->body = body;
    thread->argument = argument;
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = stack;
    thread->context.uc_stack.ss_size = STACK;
    thread->context.uc_link = NULL;
    makecontext(&thread->context, thread_begin, 0);
    return n_threads++;
}

static int can_run(const struct thread *thread) { return !thread->ended && !thread->channel; }

int sim_is_runnable(int number) { return number >= 0 && number < n_threads && can_run(&threads[number]); }

static void pass_time(void) {
    for (int i = 0; i < n_threads; i++)
        if (!threads[i].ended && threads[i].channel && threads[i].until && threads[i].until <= now)
            threads[i].channel = NULL, threads[i].asleep = 0;
}

static void (*when_quiet)(void);

void sim_when_quiet(void (*look)(void)) { when_quiet = look; }

/* Nobody can run, and time is to go on: whoever looks now sees no one in the middle of anything. */
static void quiet(void) {
    if (!when_quiet)
        return;
    sim_threads_run = 0;
    when_quiet();
    sim_threads_run = 1;
}

/* Nobody can run: goes to the next moment at which somebody wakes. 0: there is none. */
static int skip_time(void) {
    uint64_t next = 0;
    for (int i = 0; i < n_threads; i++)
        if (!threads[i].ended && threads[i].channel && threads[i].until && (!next || threads[i].until < next))
            next = threads[i].until;
    if (rester >= 0 && (!next || next > last_progress + REST_AFTER)) {
        threads[rester].channel = NULL;
        rester = -1;
        return 1;
    }
    if (!next)
        return 0;
    if (next > now) {
        quiet();
        now = next;
    }
    return 1;
}

static int choose(void) {
    int able[THREADS], n = 0;
    pass_time();
    for (int i = 0; i < n_threads; i++)
        if (can_run(&threads[i]))
            able[n++] = i;
    if (n == 0)
        return -1;
    int one = able[sim_below((uint32_t)n)];
    if (one == slow_thread && n > 1 && sim_below(32))
        one = able[sim_below((uint32_t)n)];
    return one;
}

void sim_switch(void) {
    int from = current, to;
    uint64_t guard;
    int left = 0;
    if (from < 0)
        return;
    memcpy(&guard, threads[from].stack, 8);
    if (guard != GUARD)
        sim_fail("the simulation's stack of %s is too small", threads[from].name);
    new_distance();
    if (++switches > STEPS_MOST / 10)
        sim_fail("it does not come to an end");
    while ((to = choose()) < 0) {
        for (int i = 0; i < n_threads; i++)
            left += !threads[i].ended;
        if (!left) {
            current = -1;
            sim_threads_run = 0;
            setcontext(&outside);
        }
        if (!skip_time())
            sim_fail("all threads wait for each other: %s and %d more", threads[from].name, left - 1);
    }
    if (to == from)
        return;
    mix((uint64_t)to);
    int saved = errno;
    current = to;
    swapcontext(&threads[from].context, &threads[to].context);
    errno = saved;
}

const char *sim_run(void) {
    volatile int begun = 0;
    getcontext(&outside);
    if (begun)
        return sim_failure();
    begun = 1;
    new_distance();
    current = (int)sim_below((uint32_t)n_threads);
    sim_threads_run = 1;
    setcontext(&threads[current].context);
    return "";
}

int sim_block(const void *channel, uint64_t until) {
    struct thread *self = &threads[current];
    self->channel = channel;
    self->until = until;
    self->woken = 0;
    sim_switch();
    return self->woken;
}

void sim_wake(const void *channel, int all) {
    int able[THREADS], n = 0;
    for (int i = 0; i < n_threads; i++)
        if (!threads[i].ended && threads[i].channel == channel)
            able[n++] = i;
    if (n == 0)
        return;
    if (!all)
        able[0] = able[sim_below((uint32_t)n)];
    for (int i = 0; i < (all ? n : 1); i++)
        threads[able[i]].channel = NULL, threads[able[i]].woken = 1;
}

void sim_sleep(uint64_t nanoseconds) {
    sim_trace("sleeps", (int64_t)nanoseconds, 0, 0);
    sim_block(&asleep_channel, now + nanoseconds);
}

void sim_wait_for_rest(void) {
    rester = current;
    sim_progress();
    sim_block(&rest_channel, 0);
}
