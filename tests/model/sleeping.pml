/* Requests from other threads: does a sleeping holder get each, and is a busy one left alone?
 *
 * Models shard_push and shard_take_requests of _shard.pxd, shard_sleep of _turn.pxd and sys_wake of _poll.pxd. The stack
 * of requests is a number; a holder that is waited for by nobody may be busy with something else as long as it likes.
 *
 * -DASKERS, -DEACH: how many threads ask, how often each. -DBUG_x: a fault that must be found.
 */
#ifndef ASKERS
#define ASKERS 3
#endif
#ifndef EACH
#define EACH 2
#endif

byte requests, taken, writes, sleeps;
bool sleeping, eventfd;

proctype asker() {
    byte n;
    bool was_asleep;
    do
    :: n < EACH ->
#ifdef BUG_LOOKS_BEFORE_THE_PUSH
        was_asleep = sleeping;
        requests++;
#else
        requests++;                        /* shard_push: compare-and-swap */
        was_asleep = sleeping;
#endif
        if
        :: was_asleep ->
#ifdef BUG_WAKES_WITHOUT_AN_EXCHANGE
            sleeping = false;
#else
            atomic { was_asleep = sleeping; sleeping = false };
#endif
            if
            :: was_asleep -> atomic { eventfd = true; writes++ }
            :: else
            fi
        :: else
        fi;
        n++
    :: else -> break
    od
}

proctype holder() {
    bool look_only;
    do
    :: true ->
        atomic { taken = taken + requests; requests = 0 };     /* shard_take_requests: one exchange */
        look_only = false;
#ifdef BUG_LOOKS_BEFORE_IT_SAYS_SO
        look_only = (requests > 0);
        sleeping = true;
#else
        sleeping = true;
#ifndef BUG_NO_LOOK_BEFORE_SLEEP
        look_only = (requests > 0);
#endif
#endif
        sleeps = (sleeps < 100 -> sleeps + 1 : sleeps);
        assert(writes <= sleeps);          /* at most one write a sleep, whoever asks: a busy shard gets none */
end_sleep:
        atomic { eventfd || look_only -> eventfd = false };    /* epoll_wait, and the counter is read */
        sleeping = false
    od
}

proctype judge() {
end:
    atomic { timeout -> assert(requests == 0 && taken == ASKERS * EACH) }
}

init {
    byte w;
    atomic {
        do :: w < ASKERS -> run asker(); w++ :: else -> break od;
        run holder(); run judge()
    }
}
