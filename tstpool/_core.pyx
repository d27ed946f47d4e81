# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: freethreading_compatible=True, embedsignature=True, always_allow_keywords=True
"""tstpool's classes: the thin layer between the engine (the .pxd headers, which know no Python) and its users.

One module, whose classes need each other, in one file for each: they are included below, from what users give to the
loop that a thread runs. ARCHITECTURE.md says how they fit.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongAndOverflow
from cpython.object cimport PyObject, PyObject_GetItem
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport (
    EAGAIN, EBUSY, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM, ENOSYS, ENOTCONN, ETIMEDOUT, EUSERS, errno)
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from tstpool._collect cimport connection_settle_in, keep_peer
from tstpool._conn cimport (
    GONE, HEARD_END, HEARS_END, OVERFLOW_BLOCK, OVERFLOW_CLOSE, OVERFLOW_REFUSE, PASSED_MESSAGE, PASSED_WRITABLE,
    PEND_ARM, PEND_CLOSE, PEND_CONNECT, PEND_IN, PEND_OUT, STATE_OPEN, STATE_PAUSED, STATE_QUEUED, TABLE_CHUNK,
    TABLE_CHUNKS, TYPE_LISTEN, connection_append, connection_close_output, connection_id, connection_is,
    connection_is_closing, connection_mark, connection_owe_relief, connection_recv, connection_send,
    connection_takes_messages, generation_of, output_drop, output_take_next, table_chunk, table_find, table_open,
    tst_compiled, tst_connection, tst_limits, tst_notified, word_is)
from tstpool._data cimport (
    data_hold, data_make, data_read, data_request, data_resize, data_set_done, data_set_unread, data_unpin,
    input_consume, input_free, input_is_stored, input_keep, input_unread, tst_data, tst_input)
from tstpool._entry cimport (
    ABORT_OPEN, BODY_LEAST, SPARE_LEAST, SPARE_VOTES, batch_finish, batch_give_up, connection_abort, connection_apply,
    connection_awaits_transfer, connection_begin_body, connection_begin_close, connection_break, connection_cut,
    connection_due, connection_expect, connection_forget_frame, connection_had_body, connection_has_message,
    connection_is_unfinished, connection_keep_input, connection_reconnect, connection_sent_whole,
    connection_wait_for_flusher, connection_wants_body, take_input)
from tstpool._fork cimport descriptor_moved, descriptor_moves, fork_begins, fork_begins_anew, fork_is_over
from tstpool._frame cimport (
    DELIMITER_MOST, FRAME_DELIMITED, FRAME_FIXED, FRAME_LENGTH, FRAME_PIECES, FRAME_RAW, OFFSET_MOST, framing_cuts,
    framing_settle, tst_framing)
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, AF_UNIX, CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, POLLOUT,
    RELAXED, RELEASE, SEQ_CST, SHUT_RDWR, TFD_CLOEXEC, TFD_NONBLOCK, accept4, add32, add64, close, epoll_create1,
    eventfd, compare_exchange32, exchange32, gettid, load32, load64, load_pointer, poll, pollfd, pthread_cond_destroy,
    pthread_cond_init, pthread_condattr_destroy, pthread_condattr_init, pthread_condattr_setclock, pthread_condattr_t,
    pthread_mutex_destroy, pthread_mutex_init, sched_yield, shutdown, sockaddr, sockaddr_storage, socklen_t, store32,
    store64, store_pointer, sub32, timerfd_create, tst_rarely, tst_usually)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._park cimport PARK_END, PARK_IDLE, engine_look, engine_park
from tstpool._poll cimport (
    TRIGGER_EDGE, TRIGGER_LEVEL, TRIGGER_ONESHOT, connection_drop_body, connection_end_output, connection_flush,
    connection_is_stuck, sys_control, sys_prepare, sys_recv, sys_unread, sys_wake)
from tstpool._queue cimport (
    BLOCKS_LEAST, BLOCKS_MOST, SHARE_LEAST, queue_headed, queue_join, queue_size, shared_leave, shared_new, stock_free,
    stock_free_blocks, stock_has_litter, stock_take_litter, tst_shared, tst_stock)
from tstpool._run cimport (
    RUN_TIME, message_at_hand, run_messages, worker_enter, worker_goes_on, worker_job, worker_leave)
from tstpool._shard cimport (
    DO_BODY, DO_CONNECT, DO_DISCONNECT, DO_EOF, DO_RELIEF, DO_RETIRE, DO_WRITABLE, ENTRY_QUEUED, ENTRY_RAN,
    ENTRY_RUNNING, ID_ALARM, ID_WAKE, PHASE_DRAINING, PHASE_RUNNING, PHASE_STOPPED, batch_detach, batch_get,
    batch_leave, connection_ask_relief, entry_detach, entry_move, scratch_leave, shard_ask, shard_enter_running,
    shard_leave_running, shard_push, token_held, tst_batch, tst_engine, tst_entry, tst_scratch, tst_shard, tst_worker)
from tstpool._stats cimport GROUP_MOST, LONG_GROUP, NANOSECOND, clock_now, count, tick_now, tst_stats, tst_ticks
from tstpool._timer cimport (
    DEADLINE_CLOSE, DEADLINE_FIRST_BYTE, DEADLINE_IDLE, DEADLINE_LINGER, DEADLINE_MESSAGE, DEADLINE_WRITE, TICK_BITS,
    tick_of)
from tstpool._turn cimport (
    ELSEWHERE_FREE, TURN_COMPLAIN, TURN_ELSEWHERE, TURN_ENDED, TURN_IDLE, TURN_LITTER, TURN_LOST, TURN_RUN, TURN_SLOW,
    engine_shard_ended, shard_turn, shard_yield, slow_next, turn_elsewhere)
from tstpool._libc cimport EPOLLERR as _EPOLLERR
from tstpool._libc cimport EPOLLET as _EPOLLET
from tstpool._libc cimport EPOLLHUP as _EPOLLHUP
from tstpool._libc cimport EPOLLIN as _EPOLLIN
from tstpool._libc cimport EPOLLONESHOT as _EPOLLONESHOT
from tstpool._libc cimport EPOLLOUT as _EPOLLOUT
from tstpool._libc cimport EPOLLPRI as _EPOLLPRI
from tstpool._libc cimport EPOLLRDHUP as _EPOLLRDHUP

import _thread
import atexit
import functools
import inspect
import logging
import operator
import os
import resource
import socket
import sys
import threading
import time
import traceback
import weakref

from tstpool import _net
from tstpool._log import log, log_caused, log_failure
from tstpool._types import (
    ConnectionClosed, MessageTooLarge, PoolStats, SendQueueFull, TstError, TstSockType, WorkerStats)

EPOLLIN = _EPOLLIN
EPOLLOUT = _EPOLLOUT
EPOLLPRI = _EPOLLPRI
EPOLLRDHUP = _EPOLLRDHUP
EPOLLERR = _EPOLLERR
EPOLLHUP = _EPOLLHUP
EPOLLET = _EPOLLET
EPOLLONESHOT = _EPOLLONESHOT

cdef class Worker              # of _worker.pxi

cdef object POOLS_KEY = object()       # who does not have it can't make a TstSocket or TstData

cdef extern from "<pythread.h>" nogil:
    unsigned long PyThread_get_thread_ident()

cdef extern from "<sys/socket.h>" nogil:       # the engine has no use for them: _libc.pxd has what it calls
    int getsockname(int fd, sockaddr *address, socklen_t *size)
    int getpeername(int fd, sockaddr *address, socklen_t *size)

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                       void (*in_child)() noexcept nogil)


include "_check.pxi"
include "_framing.pxi"
include "_transfer.pxi"
include "_socket.pxi"
include "_handler.pxi"
include "_pool.pxi"
include "_workers.pxi"
include "_worker.pxi"


# ------------------------------------------------------------------------------------------- end and forks

def _stop_all():
    """The interpreter ends: workers must go before it waits for its threads, and none may come after that."""
    global interpreter_ends
    with WORKERS_END:              # nothing more in it: a list may have the garbage collector run
        interpreter_ends = True
    failure = None
    pools = [pool for pool in [ref() for ref in list(_open.values())] if pool is not None]
    until = time.monotonic() + 1.0
    for pool in pools:                 # all at once: that second is for all of them together
        try:
            ask_to_stop(pool, NANOSECOND)
        except BaseException as error:
            failure = error
    for pool in pools:
        try:                           # a subclass may have another thing of that name
            TstPool.stop(pool, max(0.0, until - time.monotonic()))
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure


def _after_fork_in_child():
    global WORKERS_END
    WORKERS_END = threading.RLock()
    for ref in list(_open.values()):
        pool = ref()
        if pool is not None:
            (<TstPool>pool).forked()
    _open.clear()


# threading waits for its threads before atexit runs; this hook, which concurrent.futures uses too, runs before that.
getattr(threading, "_register_atexit", atexit.register)(_stop_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
# These come within fork(), where nobody can run anything of Python's: who waits for them may be attached to it.
check(-pthread_atfork(fork_begins, fork_is_over, fork_begins_anew), "no memory for what a fork does")
