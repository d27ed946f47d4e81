/* Who polls, who watches, who sleeps: is a stuck worker noticed, is every shard polled, does everybody end?
 *
 * Models _park.pxd (engine_park, watch, take_over_stalled, take_free_shard, engine_look), the sleeping and the end of
 * _turn.pxd (shard_poll, turn_elsewhere, shard_yield, engine_shard_ended), shard_enter_running and engine_wake_looker of
 * _shard.pxd, Worker.run and serve of _worker.pxi. Each inline bears the name of its function. A batch is only a number
 * of handlers to run here; what becomes of each is handover.pml's subject.
 *
 * A handler may return at any time or, as long as another worker is left (STUCK of them at most), never.
 * A timer may fire at any time. When nothing can happen any more, the judge looks.
 *
 * -DSHARDS, -DWORKERS, -DEVENTS, -DSTUCK: how many. -DIDLE: handlers have an on_idle, which may block too.
 * -DSTOP: stop() is called; none may be left then: -DSTUCK=0. -DSETTLED: each worker has polled its own shard for a
 * while, and what comes, comes to the first shard: this many workers and shards are too many otherwise.
 * -DBUG_x: a fault that must be found.
 */
#ifndef SHARDS
#define SHARDS 1
#endif
#ifndef WORKERS
#define WORKERS 3
#endif
#ifndef EVENTS
#define EVENTS 2
#endif
#ifndef STUCK
#define STUCK (WORKERS - 1)
#endif
#define NONE 255

#define PHASE_RUNNING 1
#define PHASE_DRAINING 2
#define PHASE_ENDING 3
byte phase = PHASE_RUNNING;

byte token[SHARDS];            /* 0, or (worker + 1) * 2 + is it RUNNING */
bool done[SHARDS];
byte come[SHARDS];             /* events that wait in the kernel */
byte rest[SHARDS];             /* handlers of its batch that nobody has run yet */
byte open_[SHARDS];            /* connections whose handler never returns */
byte sleeping[SHARDS];
#define SLEEPING_NOT 0
#define SLEEPING_LONG 1
#define SLEEPING_SHORT 2
bool eventfd[SHARDS];

bool mutex;                    /* the engine's */
byte waits[WORKERS];           /* on which condition variable */
#define STANDBY 1
#ifdef BUG_ONE_CONDITION
#define WATCH STANDBY
#else
#define WATCH 2
#endif
bool watcher_asleep;
byte watcher = NONE;

byte calls[WORKERS], looked_calls[WORKERS];
byte stuck, ended;
byte arrived;                  /* workers are alike: let them park for the first time in the order of their numbers */
bool stays[WORKERS];           /* it is in a handler that does not return */

#define TOKEN_POLLING(w) ((w + 1) * 2)
#define TOKEN_RUNNING(w) ((w + 1) * 2 + 1)
#define runs(t) (t % 2 == 1)

inline lock() { atomic { !mutex -> mutex = true } }
inline unlock() { mutex = false }

inline signal(condition) {                 /* wakes one of those who wait, if there is one */
    atomic {
        if
        :: waits[0] == condition -> waits[0] = 0
        :: waits[1] == condition -> waits[1] = 0
#if WORKERS > 2
        :: waits[2] == condition -> waits[2] = 0
#endif
#if WORKERS > 3
        :: waits[3] == condition -> waits[3] = 0
#endif
        :: else
        fi
    }
}

inline broadcast(condition) {
    atomic {
        i = 0;
        do
        :: i < WORKERS -> if :: waits[i] == condition -> waits[i] = 0 :: else fi; i++
        :: else -> i = 0; break
        od
    }
}

/* Waits with the mutex released; woken, or (timer) its time is over. */
inline wait(condition, timer) {
    atomic { waits[me] = condition; mutex = false };
end_wait:
    atomic {
        !mutex && (waits[me] == 0 || (timer)) ->
        timed_out = (waits[me] != 0);
        waits[me] = 0; mutex = true
    }
}

inline engine_wake_looker() {
    sleeper = NONE; i = 0;
    do
    :: i < SHARDS ->
        if
        :: sleeping[i] == SLEEPING_SHORT -> sleeper = NONE; break
        :: sleeping[i] == SLEEPING_LONG -> sleeper = i; i++
        :: else -> i++
        fi
    :: else -> break
    od;
    i = 0;
    if
    :: sleeper != NONE ->
        atomic { woke = (sleeping[sleeper] != SLEEPING_NOT); sleeping[sleeper] = SLEEPING_NOT };
        if :: woke -> eventfd[sleeper] = true :: else fi
    :: else
    fi;
    atomic { sleeper = NONE; woke = false }
}

inline shard_enter_running() {
    token[s] = TOKEN_RUNNING(me);
    if
    :: watcher_asleep ->
        lock();
        watcher_asleep = false;
        signal(WATCH);
        unlock()
    :: else ->
#if SHARDS > 1
        if :: watcher == NONE -> engine_wake_looker() :: else fi
#else
        skip
#endif
    fi
}

inline shard_leave_running() {
    atomic { kept = (token[s] == TOKEN_RUNNING(me)); if :: kept -> token[s] = TOKEN_POLLING(me) :: else fi }
}

inline run_handler() {
    atomic {
        calls[me]++;
        if
        :: true -> skip
        :: stuck < STUCK -> stuck++; open_[s]++; stays[me] = true
        fi
    };
end_stuck:
    !stays[me];
    calls[me]++
}

inline run_batch() {
    do
    :: atomic { token[s] / 2 == me + 1 && rest[s] > 0 -> rest[s]-- }; run_handler()
    :: atomic { else -> break }
    od
}

inline any_shard_running() {
    running = false; i = 0;
    do
    :: i < SHARDS -> running = running || runs(token[i]); i++
    :: else -> i = 0; break
    od
}

/* The same of one that nobody polls. The mutex is held, and no token becomes 0 without it. */
inline any_shard_free() {
    atomic {
        running = false; i = 0;
        do
        :: i < SHARDS -> running = running || (token[i] == 0 && !done[i]); i++
        :: else -> i = 0; break
        od
    }
}

/* One look at all shards, the mutex held. `found`: a shard that was taken. */
inline take_over_stalled() {
    found = NONE; i = 0;
    do
    :: i < SHARDS && found == NONE ->
        seen = token[i];
        if
        :: runs(seen) ->
            atomic {                       /* worker_is_stuck */
                holder = seen / 2 - 1;
                if
                :: calls[holder] % 2 == 0 || calls[holder] != looked_calls[holder] ->
                    looked_calls[holder] = calls[holder]; verdict = false
                :: else ->
                    if :: true -> verdict = true :: !stays[holder] -> verdict = false fi
                fi
            };
            if
            :: verdict -> atomic { if :: token[i] == seen -> token[i] = TOKEN_RUNNING(me); found = i :: else fi }
            :: else
            fi
        :: else
        fi;
        i++
    :: else -> break
    od;
    atomic { i = 0; seen = 0; holder = 0; verdict = false }
}

inline watch() {
    watcher = me; found = NONE; running = false;
    do
    :: phase == PHASE_ENDING || idle_over || found != NONE || running -> break
    :: else ->
        if
        :: true -> wait(WATCH, true)
        :: true ->                         /* QUIET_TIME is over */
            watcher_asleep = true;
#ifdef BUG_NO_LOOK_BEFORE_SLEEP
            running = false;
#else
            any_shard_running();
#endif
            if
            :: !running ->
#ifdef IDLE
                wait(WATCH, !idled);
                if :: !idled -> idle_over = true :: !timed_out -> skip fi
#else
                wait(WATCH, false)
#endif
            :: else
            fi;
            watcher_asleep = false
        fi;
        take_over_stalled();
        if :: found == NONE -> any_shard_free() :: else -> running = false fi
    od;
    watcher = NONE;
#ifndef BUG_NOBODY_IS_TOLD_TO_WATCH
    signal(STANDBY);
#endif
    running = false
}

inline take_free_shard() {
    atomic {                               /* the mutex is held, and no token becomes 0 without it */
        found = NONE; i = 0;
        do
        :: i < SHARDS && found == NONE ->
            number = (last_shard + 1 + i) % SHARDS;
            if :: !done[number] && token[number] == 0 -> token[number] = TOKEN_POLLING(me); found = number :: else fi;
            i++
        :: else -> break
        od;
        i = 0; number = 0
    }
}

/* Gives s, taken_over; or s == NONE: PARK_END or PARK_IDLE. */
inline engine_park() {
    atomic { s = NONE; taken_over = false; idle_over = false };
    atomic { !mutex && arrived >= me -> mutex = true; if :: arrived == me -> arrived++ :: else fi };
    do
    :: phase == PHASE_ENDING -> break
    :: else ->
        take_free_shard();
        if :: found != NONE -> s = found; break :: else fi;
        if :: idle_over -> break :: else fi;
        if
        :: watcher == NONE ->
            watch();
            if :: found != NONE -> s = found; taken_over = true; break :: else fi
        :: else ->
#ifdef IDLE
            wait(STANDBY, !idled);
            if :: !idled -> idle_over = true :: !timed_out -> skip fi      /* the clock says, not who woke us */
#else
            wait(STANDBY, false)
#endif
        fi
    od;
#if !defined(BUG_IDLE_STANDBY_TAKES_THE_SIGNAL) && !defined(BUG_NOBODY_IS_TOLD_TO_WATCH)
    if
    :: watcher == NONE ->
        signal(STANDBY);                   /* the signal may have been meant to make us the watcher */
#if SHARDS > 1
        any_shard_running();
        if :: !running -> any_shard_free() :: else fi;
        if :: running -> engine_wake_looker() :: else fi;
        running = false
#endif
    :: else
    fi;
#endif
    unlock();
    atomic { found = NONE; timed_out = false }
}

#define FREE 1
#define RUNS 2

inline turn_elsewhere() {
    watched = (watcher != NONE);
    elsewhere = 0; i = 0;
    do
    :: i < SHARDS ->
        seen = token[i];
        if
        :: i == s || done[i] -> skip
        :: else ->
            if
            :: seen == 0 -> elsewhere = elsewhere | FREE
            :: seen != 0 && !watched && runs(seen) -> elsewhere = elsewhere | RUNS
            :: else
            fi
        fi;
        i++
    :: else -> break
    od;
    atomic { i = 0; seen = 0; watched = false }
}

inline shard_poll() {
    look_only = false;
    if :: elsewhere -> sleeping[s] = SLEEPING_SHORT :: else -> sleeping[s] = SLEEPING_LONG fi;
    if :: phase == PHASE_DRAINING -> look_only = true :: else fi;
    short_ = (elsewhere != 0);
#if SHARDS > 1 && !defined(BUG_NO_LOOK_ELSEWHERE_BEFORE_SLEEP)
    if :: !short_ -> turn_elsewhere(); if :: elsewhere -> look_only = true :: else fi :: else fi;
#endif
end_polling:
    atomic {
        come[s] > 0 || eventfd[s] || short_ || look_only ->
        eventfd[s] = false;
        rest[s] = come[s]; come[s] = 0
    };
    sleeping[s] = SLEEPING_NOT;
    atomic { look_only = false; short_ = false; elsewhere = 0 }
}

inline engine_shard_ended() {
    lock();
    done[s] = true;
    token[s] = 0;
    atomic {
        all_done = true; i = 0;
        do
        :: i < SHARDS -> all_done = all_done && done[i]; i++
        :: else -> i = 0; break
        od
    };
    if
    :: all_done ->
        phase = PHASE_ENDING;
        broadcast(STANDBY);
#ifndef BUG_WATCHER_NOT_TOLD
        broadcast(WATCH);
#endif
    :: else
    fi;
    unlock();
    all_done = false
}

proctype worker(byte me) {
    byte s = NONE, found = NONE, sleeper = NONE, other = NONE, i, number, seen, holder, elsewhere, last_shard;
    bool taken_over, idle_over, idled, timed_out, kept, woke, running, verdict, watched, look_only, short_, all_done;

#ifdef SETTLED
    s = me;
    goto turn;
#endif
park:
    engine_park();
    if
    :: s == NONE && phase == PHASE_ENDING -> goto over
    :: s == NONE && phase != PHASE_ENDING ->       /* PARK_IDLE: on_idle, which may block */
        atomic {
            idled = true; idle_over = false;
            if :: true -> skip :: stuck < STUCK -> stuck++; stays[me] = true fi
        };
end_idle:
        !stays[me];
        goto park
    :: else
    fi;

serve:
    if
    :: taken_over ->                       /* resume */
        taken_over = false;
        run_batch();
        shard_leave_running();
        if :: !kept -> goto park :: else fi
    :: else
    fi;

turn:
    kept = false;
    if
    :: phase == PHASE_DRAINING && open_[s] == 0 -> engine_shard_ended(); goto park     /* TURN_ENDED */
    :: else
    fi;
#if SHARDS > 1
    turn_elsewhere();
    if
    :: elsewhere ->                        /* TURN_ELSEWHERE: SHARE_TIME is over */
        lock();                            /* engine_look */
        if :: watcher == NONE -> take_over_stalled(); other = found :: else fi;
        unlock();
        found = NONE;
        if :: other == NONE -> turn_elsewhere() :: else fi;
        if
        :: other != NONE || (elsewhere & FREE) ->
            last_shard = s;                /* shard_yield */
            lock();
            token[s] = 0;
            signal(STANDBY);
            signal(WATCH);
            unlock();
#ifndef BUG_LOOKER_LEAVES_WITHOUT_A_WORD
            engine_wake_looker();
#endif
            elsewhere = 0;
            if
            :: other != NONE -> s = other; other = NONE; taken_over = true; goto serve
            :: else -> goto park
            fi
        :: else
        fi
    :: elsewhere -> skip                   /* SHARE_TIME is not over */
    :: else
    fi;
#endif
    shard_poll();
    if
    :: rest[s] > 0 ->
        shard_enter_running();
        run_batch();
        shard_leave_running();
        if :: !kept -> goto park :: else fi    /* TURN_LOST */
    :: else
    fi;
    goto turn;

over:
    ended++
}

proctype kernel() {
    byte n;
    do
    :: n < EVENTS ->
        atomic {
            n++;
            if
            :: true -> come[0]++
#if SHARDS > 1 && !defined(SETTLED)
            :: true -> come[1]++
#endif
#if SHARDS > 2 && !defined(SETTLED)
            :: true -> come[2]++
#endif
            fi
        }
    :: else -> break
    od
#ifdef STOP
    ;
    phase = PHASE_DRAINING;                /* begin_stop */
    eventfd[0] = true
#if SHARDS > 1
    ;
    eventfd[1] = true
#endif
#endif
}

proctype judge() {
    byte i;
end:
    atomic {
        timeout ->
#ifdef STOP
        assert(phase == PHASE_ENDING && ended == WORKERS);
#else
        do
        :: i < SHARDS ->
            assert(come[i] == 0 && rest[i] == 0);          /* no event waits, whoever is stuck */
            assert(token[i] != 0 && !runs(token[i]));      /* and the next one will not, either */
            i++
        :: else -> break
        od
#endif
    }
}

init {
    byte w;
    atomic {
#ifdef SETTLED
        do :: w < WORKERS -> token[w] = TOKEN_POLLING(w); w++ :: else -> w = 0; break od;
        arrived = WORKERS;
#endif
        do :: w < WORKERS -> run worker(w); w++ :: else -> break od;
        run kernel(); run judge()
    }
}
