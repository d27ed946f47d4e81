/* One shard, its batches and their entries: what becomes of each event when workers take the shard from one another.
 *
 * Models the token and the batches of _shard.pxd, shard_turn of _turn.pxd, batch_run_compiled of _run.pxd, and
 * Worker.serve, resume, run_batch, run_one of _worker.pxi. Each inline bears the name of its function.
 *
 * Each event is the only one of its connection, so that running it is running the connection's handler. A handler may
 * return at any time or, as long as another worker is left, never. A worker that has no shard may take this one over
 * whenever it has found the holder RUNNING and inside a handler: more often than the watcher does (park.pml), and, like
 * the watcher, perhaps too late, when that handler has just returned.
 *
 * -DCOMPILED: handlers are compiled, and may pass their message on to Python. -DBUG_x: a fault that must be found.
 */
#ifndef WORKERS
#define WORKERS 3
#endif
#ifndef EVENTS
#define EVENTS 3
#endif
#define MOST 2                 /* events of one epoll_wait, entries of one batch */
#define BATCHES (WORKERS + 1)
#define NONE 255

#define QUEUED 1
#define RUNNING 2
#define RAN 3
#define DONE 4

typedef batch_t {
    byte users;
    byte n_entries, n_events, next_event;
    byte event[MOST];          /* connection of the event */
    byte state[MOST], connection[MOST];
}
batch_t batch[BATCHES];

byte token;                    /* 0, or (worker + 1) * 2 + is it RUNNING */
byte shard_batch = NONE;
byte come;                     /* events that the kernel has reported so far */

bool owned[EVENTS], detached[EVENTS];
byte in_handler[EVENTS], ran[EVENTS], finished[EVENTS];
byte pollers, stuck;
bool in_call[WORKERS];         /* tst_worker.calls is odd */
bool mutex;                    /* of the engine: one look at a time, and nobody parks or takes a shard meanwhile */

#define TOKEN_POLLING(w) ((w + 1) * 2)
#define TOKEN_RUNNING(w) ((w + 1) * 2 + 1)
#define token_held (token / 2 == me + 1)

inline batch_get(b) {
    atomic {                               /* the free list is guarded by the engine's mutex */
        b = 0;
        do
        :: batch[b].users != 0 -> b++; assert(b < BATCHES)
        :: else -> break
        od;
        batch[b].users = 2;
        batch[b].n_events = 0; batch[b].next_event = 0; batch[b].n_entries = 0;
        i = 0;
        do
        :: i < MOST -> batch[b].event[i] = 0; batch[b].state[i] = 0; batch[b].connection[i] = 0; i++
        :: else -> break
        od;
        i = 0
    }
}

inline batch_leave(b, n) {
    atomic { assert(batch[b].users >= n); batch[b].users = batch[b].users - n }
}

inline shard_leave_running(kept) {
    atomic { kept = (token == TOKEN_RUNNING(me)); if :: kept -> token = TOKEN_POLLING(me) :: else fi }
}

/* The handler itself. It must be alone, and it must be the first. */
inline run_handler(c) {
    atomic {
        assert(owned[c] && in_handler[c] == 0 && ran[c] == 0);
        in_handler[c]++; in_call[me] = true;
        if
        :: true -> skip
        :: stuck < WORKERS - 1 -> stuck++; blocks = true
        fi
    };
end_stuck:
    !blocks;
    atomic { in_handler[c]--; ran[c]++; in_call[me] = false }
}

inline entry_finish(c) {
    atomic {
        assert(owned[c] && in_handler[c] == 0 && ran[c] == 1 && finished[c] == 0);
        finished[c]++; owned[c] = false
    }
}

inline batch_finish(b) {
    e = 0;
    do
    :: e < batch[b].n_entries ->
#ifdef BUG_FINISHED_WITHOUT_CAS
        mine = (batch[b].state[e] == RAN);
        if :: mine -> batch[b].state[e] = DONE :: else fi;
#else
        atomic { mine = (batch[b].state[e] == RAN); if :: mine -> batch[b].state[e] = DONE :: else fi };
#endif
        if :: mine -> c = batch[b].connection[e]; entry_finish(c) :: else fi;
        e++
    :: else -> break
    od;
    atomic { e = 0; mine = false }
}

inline run_one(b, number) {
#ifdef BUG_RUN_WITHOUT_CAS
    mine = (batch[b].state[number] == QUEUED);
    if :: mine -> batch[b].state[number] = RUNNING :: else fi;
#else
    atomic {                               /* entry_move */
        mine = (batch[b].state[number] == QUEUED);
        if :: mine -> batch[b].state[number] = RUNNING :: else fi
    };
#endif
    if
    :: mine ->
#ifndef BUG_NO_LOOK_AFTER_THE_MOVE
        /* Whoever took the shard over looked at the entry after that: one of the two sees the other. */
        if :: !token_held -> c = batch[b].connection[number]; detached[c] = true :: else fi;
#endif
        c = batch[b].connection[number];
        run_handler(c);
        assert(batch[b].users > 0);        /* else the entry is another batch's by now */
        batch[b].state[number] = RAN
    :: else
    fi
}

inline run_batch(b) {
    lost = false;
    if
    :: left != NONE -> number = left; left = NONE; run_one(b, number); lost = !token_held
    :: else
    fi;
    number = 0;
    do
    :: !lost && number < batch[b].n_entries ->
        run_one(b, number);
        if
        :: mine ->
            lost = !token_held;
            if
            :: !lost -> batch_finish(b)    /* after RUN_TIME */
            :: true -> skip
            fi
        :: else
        fi;
        number++
    :: else -> break
    od;
    atomic { number = 0; lost = false; mine = false }
}

inline batch_detach(b) {
    e = 0;
    do
    :: e < batch[b].n_entries ->
        if
        :: batch[b].state[e] == RUNNING ->
            atomic { c = batch[b].connection[e]; if :: owned[c] -> detached[c] = true :: else fi }
        :: else
        fi;
        e++
    :: else -> break
    od;
    e = 0
}

/* Takes the rest of the stuck worker's batch, then its own. */
inline resume() {
    theirs = shard_batch;
#ifndef BUG_BATCH_NOT_COUNTED
    atomic { assert(batch[theirs].users > 0); batch[theirs].users++ };
#endif
    batch_detach(theirs);
    batch_finish(theirs);
    run_batch(theirs);
    batch_finish(theirs);
    shard_leave_running(kept);
    if
    :: !kept ->
#ifndef BUG_BATCH_NOT_COUNTED
        batch_leave(theirs, 1);
#endif
        own = NONE
    :: else ->
        batch_get(own);
        atomic {
#ifdef BUG_EVENTS_NOT_TAKEN
            i = MOST;
#else
            i = batch[theirs].next_event;
#endif
            do
            :: i < batch[theirs].n_events ->
                batch[own].event[batch[own].n_events] = batch[theirs].event[i]; batch[own].n_events++; i++
            :: else -> break
            od;
            i = 0
        };
#ifdef BUG_BATCH_NOT_COUNTED
        batch_leave(theirs, 1)
#else
        batch_leave(theirs, 2)
#endif
    fi;
    theirs = NONE
}

#ifdef COMPILED
/* A handler that passes its message on; it may block before it does, too. */
inline run_in_vain(c) {
    atomic {
        assert(owned[c] && in_handler[c] == 0);
        in_handler[c]++; in_call[me] = true;
        if :: true -> skip :: stuck < WORKERS - 1 -> stuck++; blocks = true fi
    };
end_stuck_compiled:
    !blocks;
    atomic { in_handler[c]--; in_call[me] = false }
}

inline entry_pass_on(b, number) {
    shard_leave_running(kept);
    if
    :: kept -> n_python++
    :: else ->
#ifndef BUG_LEFT_TO_NOBODY
        left = number
#else
        skip
#endif
    fi;
    batch[b].state[number] = QUEUED;
    if :: kept -> token = TOKEN_RUNNING(me) :: else -> lost = true fi      /* shard_enter_running */
}

inline entry_run_compiled(b, number) {
    atomic {                               /* entry_move */
        mine = (batch[b].state[number] == QUEUED);
        if :: mine -> batch[b].state[number] = RUNNING :: else fi
    };
    if
    :: mine ->
        c = batch[b].connection[number];
#ifndef BUG_NO_LOOK_AFTER_THE_MOVE
        if :: !token_held -> detached[c] = true :: else fi;
#endif
        if
        :: run_in_vain(c);
#ifdef BUG_PASSED_ON_WHILE_RUNNING
            n_python++; batch[b].state[number] = QUEUED; lost = !token_held
#else
            entry_pass_on(b, number)
#endif
        :: run_handler(c);
            batch[b].state[number] = RAN;
            lost = !token_held
        fi
    :: else
    fi;
    mine = false
}

inline batch_run_compiled(b) {
    token = TOKEN_RUNNING(me);             /* shard_enter_running */
    number = 0;
    do
    :: !lost && number < batch[b].n_entries ->
        entry_run_compiled(b, number);
        if
        :: !lost -> batch_finish(b)        /* after RUN_TIME */
        :: true -> skip
        fi;
        number++
    :: else -> break
    od;
    number = 0;
    if
    :: !lost ->
        shard_leave_running(kept);
        lost = !kept;
        if :: kept -> batch_finish(b) :: else fi
    :: else
    fi
}
#endif

inline shard_collect(b) {
    do
    :: batch[b].next_event < batch[b].n_events ->
        number = batch[b].n_entries;
        atomic {
            i = batch[b].event[batch[b].next_event];
            batch[b].next_event++;
            assert(!owned[i]);
            owned[i] = true;               /* connection_acquire */
            batch[b].connection[number] = i;
            i = 0
        };
        batch[b].state[number] = QUEUED;   /* batch_add */
        batch[b].n_entries++;
#ifndef COMPILED
        n_python++
#endif
    :: true -> break                       /* there are no more, or the batch is full */
    od;
    number = 0
}

proctype worker(byte me) {
    byte own = NONE, theirs = NONE, left = NONE, c, e, i, number, n_python, seen;
    bool lost, kept, mine, blocks, python, run_now, after;

parked:
    atomic {
        own = NONE; left = NONE; lost = false; kept = false; after = false; run_now = false; n_python = 0; c = 0
    };
end_parked:
    if
    :: atomic { !mutex && token == 0 -> token = TOKEN_POLLING(me) }; batch_get(own)    /* take_free_shard */
    :: atomic {                                                                        /* take_over_stalled */
            !mutex && token % 2 == 1 && token / 2 != me + 1 && in_call[token / 2 - 1] -> mutex = true; seen = token
       };
        atomic { mutex = false; kept = (token == seen); if :: kept -> token = TOKEN_RUNNING(me) :: else fi; seen = 0 };
        if :: !kept -> goto parked :: else fi;
        resume();
        if :: own == NONE -> goto parked :: else fi
    fi;
    shard_batch = own;

turn:
    /* shard_turn. `after`: the batch's handlers have run. */
    batch_finish(own);
    if
    :: after ->
        shard_leave_running(kept);
        if :: !kept -> batch_leave(own, 1); goto parked :: else fi     /* TURN_LOST */
    :: else
    fi;
    atomic {
        after = false; kept = false; n_python = 0;
        batch[own].n_entries = 0;
        i = 0;
        do :: i < MOST -> batch[own].state[i] = 0; batch[own].connection[i] = 0; i++ :: else -> break od;
        i = 0
    };
    if
    :: batch[own].next_event >= batch[own].n_events ->
        atomic { pollers++; assert(pollers == 1 && token == TOKEN_POLLING(me)) };
end_polling:
        atomic {                           /* shard_poll: one event, or two */
            come < EVENTS;
            batch[own].next_event = 0;
            batch[own].event[0] = come; batch[own].n_events = 1; come++;
            if
            :: come < EVENTS -> batch[own].event[1] = come; batch[own].n_events = 2; come++
            :: true -> skip
            fi;
            pollers--
        }
    :: else
    fi;
    shard_collect(own);
#ifdef COMPILED
    batch_run_compiled(own);
#endif
    if
    :: lost -> lost = false; after = true; run_now = (left != NONE)    /* a compiled handler was stuck */
    :: !lost && n_python > 0 -> token = TOKEN_RUNNING(me); run_now = true
    :: else -> run_now = false
    fi;
    if
    :: run_now -> run_now = false; run_batch(own); after = true        /* Worker.serve, TURN_RUN */
    :: else
    fi;
    goto turn
}

proctype judge() {
    byte c;
end:
    atomic {
        timeout ->
        assert(come == EVENTS);
        do
        :: c < EVENTS ->
            if
            :: in_handler[c] > 0 -> assert(owned[c] && detached[c])    /* stuck, and nobody waits for it */
            :: else -> assert(ran[c] == 1 && finished[c] == 1 && !owned[c])
            fi;
            c++
        :: else -> break
        od;
        assert(token / 2 != 0 && token % 2 == 0)                       /* somebody polls */
    }
}

init {
    byte w;
    atomic {
        do :: w < WORKERS -> run worker(w); w++ :: else -> break od;
        run judge()
    }
}
