/* One connection: who owns it, who sends its output, what epoll is armed for, and who frees it.
 *
 * Models _conn.pxd (state word, acquire, release, ask, mark, append), _poll.pxd (arm, silence, flush, retire, free),
 * _entry.pxd (take_input, connection_due, entry_left_over, entry_finish) and _collect.pxd (collect_event,
 * leave_to_owner, collect_request, collect_connection). Each inline bears the name of its function. README.md says what
 * an atomic step stands for and what is left out.
 *
 * Who takes part:
 *   stuck    the worker in whose handler the connection is, and from whom the shard is taken meanwhile
 *   holder   the worker that has taken it over: polls, collects, runs, finishes
 *   thread   any other thread: send, close, flush, need_send, pause and resume
 *   peer     sends messages and reads what it is sent
 *   next     the kernel gives the descriptor's number to another connection as soon as it is closed
 *   judge    looks at what is left when nobody can do anything any more
 *
 * -DLEVEL, -DONESHOT or -DEDGE: the trigger. -DNEW: the connection is new (addsocket) and nobody is stuck. -DFOREVER:
 * the stuck handler never returns. -DOPS=n: how many things the thread does. -DBUG_x: a fault that the judge, or an
 * assertion, must find.
 */
#if !defined(LEVEL) && !defined(ONESHOT) && !defined(EDGE)
#define LEVEL
#endif
#ifndef OPS
#define OPS 2
#endif
#ifndef MESSAGES
#define MESSAGES 1
#endif
#ifndef ROOM
#define ROOM 1                 /* what the kernel's send buffer holds, in pieces */
#endif
#ifndef FLUSH_ROUNDS
#define FLUSH_ROUNDS 1
#endif
#define HIGH_WATER 1           /* with more waiting no message is handed out; low_water is 0 */
#define QUEUED_MOST 2          /* handlers stop sending then: keeps the model finite */

/* ---- the state word; `generation` 0 is ours, 1 the next one's */
#define S_OPEN 1
#define S_OWNED 2
#define S_PAUSED 4
#define S_QUEUED 8
#define S_DETACHED 16
#define S_DEAD 32
#define P_CONNECT 64
#define P_IN 128
#define P_OUT 256
#define P_CLOSE 512
#define P_ARM 1024
#define P_ANY (P_CONNECT | P_IN | P_OUT | P_CLOSE | P_ARM)
short word;
bit generation;
#define is_ours (generation == 0 && (word & S_OPEN))       /* connection_is */

/* ---- locked: connection.lock is held for each atomic step that reads or writes these */
bool registered, flushing, want_out, want_room, out_closed, out_drop, retired;
bool out_fired;                /* EPOLLET: EPOLLOUT was reported since it was armed, and will not be reported again */
bool armed_in, armed_out;      /* what we remember of the kernel's mask ... */
byte waiting;                  /* queue_size(out): pieces */
byte pressure;
#define PRESSURE_HIGH 1
#define PRESSURE_GONE 2
byte mark;                     /* out.sent >= send_mark: mark == 0; pieces up to the end of the running SEND */

/* ---- owner */
bool closing, hold_input, call_writable, ask_writable, readable;
byte input;                    /* unread messages */

/* ---- the stack of requests, for one connection: it is in it, or in the holder's to-do list, or in neither */
bool on_stack, in_todo;

/* ---- the kernel's side */
byte received;                 /* messages in the socket's receive buffer */
byte taken;                    /* pieces in its send buffer */
bool no_space;                 /* SOCK_NOSPACE: somebody was refused, so the next room is an event */
bool mask_in, mask_out;        /* epoll's mask ... */
bool edge;                     /* EPOLLET: it is in epoll's ready list */
bool fd_closed;

/* ---- for the judge */
byte in_handler, senders, freed;
bool close_begun;              /* somebody closed it, or its handler did */
bool writable_due;             /* need_send said True, and the handler has not been called with EPOLLOUT since */
byte entry_state;              /* of the stuck worker's entry */
#define RUNNING 1
#define RAN 2
#define DONE 3
bool entry_retires;

#define READY_IN (mask_in && received > 0)
#define READY_OUT (mask_out && taken < ROOM)

/* ------------------------------------------------------------------------------------------------ the kernel */

/* Polling a full socket (tcp_poll) asks for an event when there is room again. */
inline look_for_room() { if :: taken >= ROOM -> no_space = true :: else fi }

/* EPOLL_CTL_MOD or ADD. It looks at readiness anew. */
inline connection_control(m_in, m_out) {
    mask_in = m_in; mask_out = m_out;
    armed_in = m_in; armed_out = m_out;
    registered = true; out_fired = false;
    look_for_room();
#ifdef EDGE
#ifdef BUG_MOD_DOES_NOT_LOOK
    edge = false;
#else
    edge = READY_IN || READY_OUT;
#endif
#endif
}

/* ---------------------------------------------------------------------------------- arming: lock held, all steps */

#define out_is_armed (armed_out == (want_out || want_room) && !(out_fired && armed_out))

inline connection_arm(want_in) {
    if
    :: registered && (!(want_in) || armed_in) && out_is_armed -> skip
    :: else -> connection_control(want_in, (want_out || want_room))
    fi
}

inline connection_silence() {
    if
    :: !armed_in && armed_out == (want_out || want_room) -> skip
    :: else -> connection_control(false, (want_out || want_room))
    fi
}

inline flush_arm() {
    if
    :: !registered || out_is_armed -> skip
    :: else -> connection_control(armed_in, (want_out || want_room))
    fi
}

/* --------------------------------------------------------------------------------------------- the state word */

inline shard_push() {
    atomic { assert(!on_stack && !in_todo); on_stack = true }
}

inline connection_ask(pending) {           /* shard_ask: with its push */
    atomic {
        push = false;
        if
        :: !is_ours -> skip                /* GONE */
        :: else ->
            push = !(word & S_QUEUED) && (!(word & S_OWNED) || (word & S_DETACHED));
            word = word | (pending);
            if :: (pending) == P_OUT -> writable_due = true :: else fi;
            if :: push -> word = word | S_QUEUED :: else fi
        fi
    };
    if :: push -> shard_push() :: else fi
}

/* After a flush by who does not own it: input that waited for less output goes on. */
inline connection_ask_relief() { if :: pressure == PRESSURE_GONE -> connection_ask(P_ARM) :: else fi }

/* ------------------------------------------------------------------------------------------------------ output */

inline connection_append() {               /* one piece; then, if nobody is on the way to send it, ask for a flush */
    atomic {
        left = false;
        if
        :: out_closed || !is_ours -> skip
        :: else ->
            waiting++;
            if :: waiting > HIGH_WATER -> pressure = PRESSURE_HIGH :: else fi;
#ifdef BUG_TRUST_ANY_OWNER
            left = !want_out && !flushing && !(word & S_OWNED);
#else
            left = !want_out && !flushing && (word & (S_OWNED | S_DETACHED)) != S_OWNED;   /* output_is_left */
#endif
        fi
    };
    if :: left -> connection_ask(0) :: else fi
}

inline connection_free() {
    atomic {
        last = false;
        if
#ifndef BUG_FREE_IN_THE_STACK
        :: word & S_QUEUED -> word = (word & ~(S_OPEN | P_ANY)) | S_DEAD
#endif
        :: else ->
            last = true;
#ifndef BUG_FREE_LOOKS_ONCE
            word = word & ~S_OPEN          /* from here on nobody can ask for anything */
#endif
        fi
    };
    if
    :: last ->
        atomic {
            assert(!on_stack && !in_todo); /* a slot in the stack must not be given away */
            assert(senders == 0);
            freed++;
            assert(freed == 1);
            waiting = 0; mask_in = false; mask_out = false; edge = false; registered = false;
            generation = 1; word = 0;
            fd_closed = true
        }
    :: else
    fi
}

inline flush_once() {                      /* sys_send, with the lock released */
    atomic {
        assert(!fd_closed);
        if :: taken < ROOM -> taken++; took = true :: else -> no_space = true; took = false fi
    }
}

inline flush_result() {                    /* lock held */
    if
    :: took && waiting > 0 -> waiting--; if :: mark > 0 -> mark-- :: else fi; want_out = false
    :: took && waiting == 0 -> want_out = false
    :: else -> want_out = true
    fi;
    if :: out_drop -> waiting = 0; mark = 0; out_closed = true; out_drop = false; want_out = false :: else fi;
    if                                     /* output_account */
    :: waiting > HIGH_WATER -> pressure = PRESSURE_HIGH
    :: waiting == 0 && pressure == PRESSURE_HIGH -> pressure = PRESSURE_GONE
    :: else
    fi
}

inline connection_flush(writable, arm, result) {
    atomic {
        sending = false; free_it = false; rounds = 0;
        if
#ifdef BUG_TWO_FLUSHERS
        :: !is_ours || waiting == 0 || (want_out && !(writable)) -> result = waiting
#else
        :: !is_ours || flushing || waiting == 0 || (want_out && !(writable)) -> result = waiting
#endif
        :: else -> flushing = true; sending = true; senders++; assert(senders == 1)
        fi
    };
    do
    :: !sending -> break
    :: sending ->
        flush_once();
        atomic {                           /* flush_result, and the end of the loop */
            flush_result();
            rounds++;
            if
            :: want_out || waiting == 0 -> sending = false
            :: !want_out && waiting > 0 && rounds == FLUSH_ROUNDS -> want_out = true; sending = false
            :: else
            fi;
            if
            :: !sending ->
                flushing = false; senders--;
                if :: (arm) && !retired -> flush_arm() :: else fi;
                result = waiting;
                free_it = retired;
                rounds = 0; took = false
            :: else
            fi
        }
    od;
    if :: free_it -> connection_free(); free_it = false :: else fi
}

inline connection_retire() {
    atomic {
        retired = true; out_closed = true; out_drop = flushing;
        last = !flushing
    };
    if :: last -> connection_free() :: else fi;
    last = false
}

/* ------------------------------------------------------------------------------------------------ the owner's part */

/* connection_takes_messages */
#define takes_messages (!closing && !hold_input && pressure != PRESSURE_HIGH && !(word & (S_PAUSED | P_CLOSE)))
#define wants_input takes_messages                                                  /* connection_wants_input */
#define cut (takes_messages && input > 0)                                           /* connection_cut */
#define drained (waiting == 0 && !flushing)                                         /* connection_drained */

inline connection_begin_close() {
    atomic {
        closing = true; close_begun = true;
        hold_input = false; call_writable = false; ask_writable = false;
        out_closed = true
    }
}

/* A handler's call: one worker at a time, and it may send. */
inline handler_enter() { atomic { in_handler++; assert(in_handler == 1) } }
inline handler_leave() { atomic { in_handler--; assert(in_handler == 0) } }

inline handler_sends() {
    if
    :: waiting < QUEUED_MOST -> connection_append()
    :: true -> skip
    fi
}

/* What a handler may return: SUSPEND, SEND, DISCONNECT (connection_apply). */
inline handler_returns() {
    if
    :: closing -> skip
    :: else ->
        if
        :: true -> skip
        :: waiting < QUEUED_MOST ->        /* connection_transfer */
            atomic {
                if :: !out_closed -> waiting++; mark = waiting :: else -> mark = 0 fi
            };
            if :: word & S_DETACHED -> connection_ask(0) :: else fi;
            call_writable = true; hold_input = true
        :: true -> connection_begin_close()
        fi
    fi
}

/* run_entry: writable, messages, then connection_due. */
inline run_entry(do_connect, do_writable) {
    handler_enter();
    if :: (do_writable) -> writable_due = false :: else fi;
    if :: (do_connect) -> handler_sends() :: else fi;
    do
    :: atomic { !(do_connect) && cut -> input-- }; handler_sends()
    :: atomic { else -> break }
    od;
    handler_leave();
    retire_it = false;
    atomic { if :: closing && drained -> retire_it = true :: else fi }
}

inline entry_left_over() {
    connection_flush(false, false, unsent);
    atomic {
        pend = 0;
        if
        :: closing ->
            /* shard_drain_add: 5 s are for ever here */
            if :: unsent == 0 && drained -> pend = P_CLOSE :: else -> skip fi
        :: else ->
            if
            :: cut -> pend = P_IN          /* message_ready */
            :: else ->
                if
                :: call_writable && unsent == 0 -> pend = P_IN
                :: else ->
#ifdef EDGE
                    if :: readable && wants_input -> pend = P_IN :: else fi
#else
                    skip
#endif
                fi
            fi
        fi
    }
}

inline connection_release_step() {
    push = ((word | pend) & P_ANY) && !((word | pend) & S_QUEUED);
    word = (word | pend) & ~(S_OWNED | S_DETACHED);
#ifdef BUG_RELEASE_IGNORES_PENDING
    push = false;
#endif
    if :: push -> word = word | S_QUEUED :: else fi
}

inline entry_finish_arm() {
    if
    :: is_ours ->
        want_room = room;
        connection_arm(want_in);
#ifdef BUG_NO_SECOND_LOOK_AT_THE_QUEUE
        again = false
#else
        again = waiting > 0 && !want_out && !flushing
#endif
    :: else -> again = false
    fi
}

#define usual (!closing && !hold_input && !call_writable && !ask_writable && input == 0)   /* connection_is_usual */
#define only_input_is_armed (registered && armed_in && !armed_out && !want_out && !want_room)

inline usual_release() {                   /* lock held */
    if
    :: waiting == 0 && only_input_is_armed && !flushing && pressure == 0 && is_ours && word == (S_OPEN | S_OWNED) ->
        word = S_OPEN;
        released = true
    :: else
    fi
}

/* The general way is right for the usual case, too, and taken for other entries than those with input. */
inline entry_finish_usual() {
    released = false;
#ifdef LEVEL
    if
    :: usual ->
        atomic {
            sending = waiting > 0 && only_input_is_armed && !flushing;
            if :: sending -> flushing = true; senders++; assert(senders == 1) :: else fi
        };
        if
        :: sending ->
            flush_once();
            atomic {
                flush_result();
                flushing = false; senders--; sending = false; took = false;
#ifdef BUG_USUAL_RELEASE_AFTER_THE_LOCK
                room = waiting == 0
            };
            atomic { if :: room && is_ours && word == (S_OPEN | S_OWNED) -> word = S_OPEN; released = true :: else fi };
            room = false
#else
                usual_release()
            }
#endif
        :: else -> atomic { usual_release() }
        fi
    :: true -> skip
    fi
#endif
}

inline entry_finish(retires) {
    if
    :: retires -> connection_retire()
    :: else -> entry_finish_usual();
    if
    :: released -> skip
    :: else ->
        entry_left_over();
        atomic {
            want_in = wants_input;
#ifdef BUG_SENT_BY_ANOTHER
            room = ask_writable            /* nobody tells the owner that the rest has been sent */
#else
            room = ask_writable || (pend == 0 && (call_writable || closing))
#endif
        };
#ifdef BUG_RELEASE_BEFORE_THE_LOCK
        atomic { connection_release_step() };
        atomic { entry_finish_arm() };
#else
        atomic { connection_release_step(); entry_finish_arm() };
#endif
        if :: push -> shard_push() :: else fi;
        if :: again -> connection_flush(false, true, unsent); connection_ask_relief() :: else fi
    fi
    fi;
    atomic { released = false; again = false; push = false; want_in = false; room = false; pend = 0; unsent = 0 }
}

/* ------------------------------------------------------------------------------------------------------ the worker
 * from whom the shard is taken while it is in a handler of the connection */

proctype stuck() {
    bool push, left, last, sending, free_it, took, retire_it, want_in, room, again, released;
    byte rounds, unsent;
    short pend;
    handler_sends();
#ifdef FOREVER
end: false;                                /* it never returns: its output must go out all the same */
#endif
    handler_returns();
    do
    :: atomic { cut -> input-- }
    :: atomic { else -> break }
    od;
    handler_leave();
    atomic { entry_retires = closing && drained; entry_state = RAN };
    if                                     /* batch_finish: entry_move(RAN, DONE) */
    :: atomic { entry_state == RAN -> entry_state = DONE }; entry_finish(entry_retires)
    :: atomic { else -> skip }
    fi
}

/* ------------------------------------------------------------------------------------------------------ the holder */

inline take_input(event) {
    if
    :: !(event) && !readable -> skip
    :: else ->
        atomic {
            if
            :: !wants_input ->
                if
                :: (event) ->
                    readable = true;
#ifdef LEVEL
                    connection_silence()
#else
                    skip
#endif
                :: else
                fi
            :: else ->
                if
                :: received > 0 ->
                    received--; input++;
#ifdef EDGE
                    readable = true
#else
                    readable = false
#endif
                :: else -> readable = false
                fi
            fi
        }
    fi
}

inline collect_connection(arrived) {
    if :: got & P_CLOSE -> connection_begin_close() :: else fi;
    do_connect = false; do_writable = false;
#ifdef BUG_CONNECT_FORGETS
    if :: got & P_CONNECT -> do_connect = true; got = got & ~P_OUT :: else fi;
#else
    if :: got & P_CONNECT -> do_connect = true :: else fi;
    if :: (got & P_CONNECT) && (got & P_OUT) && !closing -> ask_writable = true :: else fi;
#endif
    if
    :: !do_connect ->
        if
        :: (got & P_OUT) && !closing -> ask_writable = true; connection_flush(false, false, unsent)
        :: else
        fi;
        atomic { if :: pressure == PRESSURE_GONE -> pressure = 0 :: else fi };     /* connection_take_relief */
        atomic {                           /* connection_has_room */
            if
            :: ask_writable && drained ->
                if :: taken < ROOM -> ask_writable = false; do_writable = true :: else -> no_space = true fi
            :: else
            fi
        };
        atomic {                           /* connection_sent */
            if
            :: call_writable && mark == 0 -> call_writable = false; hold_input = false; do_writable = true
            :: else
            fi
        };
        if
        :: do_writable ->
#ifdef EDGE
#ifdef BUG_WRITABLE_FORGETS_THE_EDGE
            readable = readable || (arrived)
#else
            readable = readable || (arrived) || (got & P_IN)
#endif
#else
            readable = readable || (arrived)
#endif
        :: else ->
#ifdef EDGE
            take_input(((arrived) || (got & P_IN)))
#else
            take_input((arrived))
#endif
        fi
    :: else
    fi;
    atomic {                               /* connection_due, run by the same thread right away */
        due = do_connect || do_writable || cut || (closing && drained)
    };
    retire_it = false;
    if :: due -> run_entry(do_connect, do_writable) :: else fi;
    entry_finish(retire_it);
    do_connect = false; do_writable = false; due = false; retire_it = false; got = 0
}

inline connection_acquire(expected) {
    atomic {
        acquired = false; gone = false;
        if
        :: generation != (expected) || !(word & S_OPEN) -> gone = true
#ifndef BUG_ACQUIRE_DOES_NOT_LOOK
        :: generation == (expected) && (word & S_OPEN) && (word & S_OWNED) -> skip     /* BUSY */
#endif
        :: else ->
            assert(generation == 0);       /* the next connection is not ours to take */
            got = word & P_ANY;
            word = (word | S_OWNED) & ~(P_ANY | S_DETACHED);
            acquired = true
        fi
    }
}

inline leave_to_owner() {
    atomic {
#ifdef BUG_SILENCE_WITHOUT_A_LOOK
        owned = is_ours;
#else
        owned = is_ours && (word & S_OWNED);
#endif
        if
        :: owned ->
            want_room = false;             /* its release asks again */
#ifdef LEVEL
            if :: event_in -> connection_silence() :: else -> flush_arm() fi
#else
            flush_arm()
#endif
        :: else
        fi
    };
#ifndef BUG_RELIEF_IS_NOT_TOLD
    if :: owned -> connection_ask_relief() :: else fi;
#endif
#if defined(EDGE) && !defined(BUG_EDGE_IS_NOT_REMEMBERED)
    if :: owned && event_in -> connection_ask(P_IN) :: else fi
#endif
}

inline collect_event() {
#ifdef ONESHOT
    atomic { armed_in = false; armed_out = false };            /* connection_fired */
#endif
#if defined(EDGE) && !defined(BUG_EDGE_OUT_IS_KEPT)
    atomic { out_fired = out_fired || (event_out && is_ours) };
#endif
    if
#ifdef ONESHOT
    :: event_out -> connection_flush(true, false, unsent)
#else
    :: event_out -> connection_flush(true, true, unsent)
#endif
    :: else
    fi;
    do
    :: true ->
        connection_acquire(0);
        if
        :: acquired -> collect_connection(event_in); break
        :: gone -> break
        :: else -> leave_to_owner(); if :: owned -> break :: else fi
        fi
    od
}

inline collect_request() {
    atomic { in_todo = false; dead = (word & S_DEAD) != 0; seen = generation; word = word & ~S_QUEUED };
    if
    :: dead -> connection_free()
    :: else ->
        if :: seen == 0 -> connection_flush(false, true, unsent) :: else fi;
#ifdef BUG_GENERATION_READ_AGAIN
        atomic { dead = (word & P_ANY) == 0 && unsent == 0; seen = generation };
#else
#ifdef BUG_REQUEST_FORGETS_RELIEF
        atomic { dead = (word & P_ANY) == 0 && unsent == 0 };
#else
        atomic { dead = (word & P_ANY) == 0 && unsent == 0 && pressure != PRESSURE_GONE };
#endif
#endif
        if
        :: !dead ->
            connection_acquire(seen);
            if
            :: acquired -> collect_connection(false)
#ifndef BUG_REQUEST_FORGETS_THE_OWNER
            :: !acquired && !gone -> connection_ask_relief()
#endif
            :: else
            fi
        :: else
        fi
    fi;
    atomic { dead = false; seen = 0; acquired = false; gone = false; unsent = 0 }
}

proctype holder() {
    bool push, left, last, sending, free_it, took, retire_it, want_in, room, again, released;
    bool acquired, gone, owned, dead, due, do_connect, do_writable, event_in, event_out;
    bit seen;
    byte rounds, unsent;
    short pend, got;

#ifndef NEW
    /* resume: batch_detach, then batch_finish, at once and once more when the batch's other handlers have run. */
#ifndef BUG_NO_DETACH
    if :: entry_state == RUNNING -> owned = true :: else fi;
#endif
    if
    :: owned ->
        owned = false;
        atomic { if :: is_ours && (word & S_OWNED) -> word = word | S_DETACHED; owned = true :: else fi };
        if :: owned -> connection_flush(false, true, unsent); connection_ask_relief() :: else fi;
        owned = false; unsent = 0
    :: else
    fi;
    if
#ifdef BUG_FINISHED_WITHOUT_CAS
    :: entry_state == RAN -> entry_state = DONE; entry_finish(entry_retires)
#else
    :: atomic { entry_state == RAN -> entry_state = DONE }; entry_finish(entry_retires)
#endif
    :: atomic { else -> skip }
    fi;
#endif
end:
    do
    :: atomic { on_stack -> on_stack = false; in_todo = true };            /* shard_take_requests */
        collect_request()
#ifdef EDGE
    :: atomic { edge && !READY_IN && !READY_OUT -> edge = false; look_for_room() }
    :: atomic {
            edge && (READY_IN || READY_OUT) -> event_in = READY_IN; event_out = READY_OUT;
            edge = false; look_for_room()
       };
#else
    :: atomic {
            READY_IN || READY_OUT -> event_in = READY_IN; event_out = READY_OUT;
#ifdef ONESHOT
            mask_in = false; mask_out = false
#endif
       };
#endif
        collect_event();
        atomic { event_in = false; event_out = false; owned = false; acquired = false; gone = false }
    od
}

/* ------------------------------------------------------------------------------------------------------ the others */

proctype thread() {
    bool push, left, last, sending, free_it, took, first;
    byte rounds, unsent, n;
#ifdef NEW
    shard_push();                          /* TstPool.begin */
#endif
    do
    :: n < OPS ->
        n++;
        if
        :: waiting < QUEUED_MOST -> connection_append()                        /* TstSocket.send */
        :: true ->                                                             /* TstSocket.close */
            atomic { first = is_ours && !out_closed; if :: is_ours -> out_closed = true :: else fi };
            if :: first -> close_begun = true; connection_ask(P_CLOSE) :: else fi;
            first = false
        :: true -> connection_flush(true, true, unsent); unsent = 0; connection_ask_relief()            /* TstSocket.flush, then time is over */
        :: true ->                                                             /* TstPool.need_send */
            atomic { first = is_ours && !out_closed };
            if :: first -> connection_ask(P_OUT) :: else fi;
            first = false
        :: true ->                                                             /* TstSocket.pause, resume */
            atomic { if :: is_ours -> word = word | S_PAUSED :: else fi };
            atomic { first = is_ours; if :: first -> word = word & ~S_PAUSED :: else fi };
            if :: first -> connection_ask(P_ARM) :: else fi;
            first = false
        fi
    :: else -> break
    od
}

proctype peer() {
    byte n;
end:
    do
    :: n < MESSAGES ->
        atomic {
            n++;
            if
            :: !fd_closed ->
                received++;
#ifdef EDGE
                if :: mask_in -> edge = true :: else fi
#endif
            :: else
            fi
        }
    :: atomic {
            taken > 0 -> taken--;
#ifdef EDGE
            if :: no_space && mask_out -> edge = true :: else fi;
#endif
            no_space = false
       }
    od
}

/* The number goes to a connection of another shard, which is QUEUED until that shard takes it. */
proctype next() {
end:
    atomic { fd_closed && word == 0 -> word = S_OPEN | S_QUEUED | P_CONNECT }
}

proctype judge() {
end:
    atomic {
        timeout ->
        assert(senders == 0);
#ifdef FOREVER
        assert(generation == 0 && waiting == 0 && !on_stack && !in_todo);
        assert(!(want_out || mask_out));
#else
        assert(in_handler == 0);
        if
        :: generation == 1 -> assert(freed == 1)
        :: else ->
            assert(!close_begun);                          /* what was closed is freed */
            assert(word == S_OPEN);                        /* idle; no pending bit, not QUEUED */
            assert(!on_stack && !in_todo && !flushing);
            assert(waiting == 0);                          /* every byte went out */
            assert(!call_writable && !hold_input);         /* the handler heard that its SEND is done */
            assert(!ask_writable && !writable_due);        /* need_send was answered */
            assert(received == 0 && input == 0);           /* every message was delivered */
            assert(registered && mask_in);                 /* and the next one will be */
            assert(!want_out && !want_room && !mask_out)   /* nothing spins */
        fi
#endif
    }
}

init {
    atomic {
#ifdef NEW
        word = S_OPEN | S_QUEUED | P_CONNECT;
#else
        word = S_OPEN | S_OWNED;
        entry_state = RUNNING;
        in_handler = 1;
        registered = true;
#ifdef ONESHOT
        skip;                              /* it has fired */
#else
        mask_in = true; armed_in = true;
#endif
#ifdef EDGE
        if :: readable = true :: readable = false fi;      /* its handler was called for input, or for something else */
#endif
        run stuck();
#endif
        run holder(); run thread(); run peer(); run next(); run judge()
    }
}
