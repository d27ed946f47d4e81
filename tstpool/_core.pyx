# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: freethreading_compatible=True, embedsignature=True, always_allow_keywords=True
"""tstpool's classes: the thin layer between the engine (the .pxd headers, which know no Python) and its users.

From top to bottom: errors, transfers (TstData), sockets (TstSocket), handlers (TstHandler, Binding), the pool
(TstPool), the worker's loop (Worker). ARCHITECTURE.md says how they fit.
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
from libc.string cimport memcpy, memset

from tstpool._collect cimport connection_settle_in
from tstpool._conn cimport (
    GONE, OVERFLOW_BLOCK, OVERFLOW_CLOSE, OVERFLOW_REFUSE, PASSED_MESSAGE, PASSED_WRITABLE, PEND_ARM, PEND_CLOSE,
    PEND_CONNECT, PEND_IN, PEND_OUT, STATE_DETACHED, STATE_OPEN, STATE_OWNED, STATE_PAUSED, STATE_QUEUED, TABLE_CHUNK,
    TABLE_CHUNKS, TYPE_LISTEN, connection_append, connection_close_output, connection_id, connection_is,
    connection_mark, connection_recv, connection_send, connection_takes_messages, generation_of, output_drop,
    table_chunk, table_find, table_open, tst_compiled, tst_connection, tst_limits, tst_notified)
from tstpool._data cimport (
    data_make, data_read, data_request, data_resize, data_set_done, data_set_unread, input_consume,
    input_free, input_is_stored, input_keep, input_unread, tst_input)
from tstpool._entry cimport (
    SPARE_LEAST, SPARE_VOTES, batch_finish, connection_abort, connection_apply, connection_awaits_transfer,
    connection_begin_close, connection_break, connection_cut, connection_due, connection_expect,
    connection_forget_frame, connection_keep_input, connection_reconnect, connection_wait_for_flusher,
    connection_wants_body)
from tstpool._frame cimport (
    DELIMITER_MOST, FRAME_DELIMITED, FRAME_FIXED, FRAME_LENGTH, FRAME_RAW, OFFSET_MOST, framing_settle, tst_framing)
from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, POLLOUT, RELAXED,
    RELEASE, SEQ_CST, SHUT_RDWR, TFD_CLOEXEC, TFD_NONBLOCK, accept4, add32, add64, close, epoll_create1, eventfd,
    exchange32, gettid, load32, load64, load_pointer, poll, pollfd, pthread_cond_destroy, pthread_cond_init,
    pthread_condattr_destroy, pthread_condattr_init, pthread_condattr_setclock, pthread_condattr_t,
    pthread_mutex_destroy, pthread_mutex_init, sched_yield, shutdown, store32, store64, store_pointer, sub32,
    timerfd_create, tst_rarely)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._park cimport PARK_END, PARK_IDLE, engine_look, engine_park
from tstpool._poll cimport (
    TRIGGER_EDGE, TRIGGER_LEVEL, TRIGGER_ONESHOT, connection_flush, sys_control, sys_prepare, sys_recv, sys_unread,
    sys_wake)
from tstpool._queue cimport (
    SHARE_LEAST, queue_size, shared_leave, shared_new, stock_free, stock_has_litter, stock_take_litter, tst_shared,
    tst_stock)
from tstpool._run cimport RUN_TIME, message_at_hand, run_messages, worker_enter, worker_job, worker_leave
from tstpool._shard cimport (
    DO_BODY, DO_CONNECT, DO_DISCONNECT, DO_RETIRE, DO_WRITABLE, ENTRY_QUEUED, ENTRY_RAN, ENTRY_RUNNING, ID_ALARM,
    ID_WAKE, PHASE_DRAINING, PHASE_RUNNING, PHASE_STOPPED, batch_detach, batch_get, batch_leave, connection_ask_relief,
    entry_move, scratch_leave, shard_ask, shard_enter_running, shard_leave_running, shard_push, token_held, tst_batch,
    tst_engine, tst_entry, tst_scratch, tst_shard, tst_worker)
from tstpool._stats cimport GROUP_MOST, LONG_GROUP, NANOSECOND, clock_now, count, tick_now, tst_stats, tst_ticks
from tstpool._timer cimport (
    DEADLINE_CLOSE, DEADLINE_FIRST_BYTE, DEADLINE_IDLE, DEADLINE_LINGER, DEADLINE_MESSAGE, DEADLINE_WRITE, TICK_BITS,
    connection_output_is_overdue, tick_of)
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

import atexit
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
from tstpool._log import log, logger
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

cdef class Worker              # below

cdef enum:
    READ_CHUNK = 65536                 # most that one read() without a size takes from the kernel
    SPARES_MOST = 65536                # bytes of the objects that a worker keeps for messages to come

cdef dict TRIGGERS = {"level": TRIGGER_LEVEL, "oneshot": TRIGGER_ONESHOT, "edge": TRIGGER_EDGE}
cdef object THE_POOLS = object()       # "the pool's", where None means "none"
cdef object NOTHING = object()         # "no argument", where None is one
cdef object POOLS_KEY = object()       # who does not have it can't make a TstSocket or TstData

cdef extern from *:
    """
    /* hook(sock, data) without the detour over a bound method. A new reference, or NULL with an exception set. */
    static inline PyObject *tst_call(PyObject *hook, PyObject *sock, PyObject *data) {
        PyObject *arguments[] = {NULL, NULL, sock, data};
        if (!PyMethod_Check(hook))
            return PyObject_Vectorcall(hook, arguments + 2, 2, NULL);
        arguments[1] = PyMethod_GET_SELF(hook);
        hook = PyMethod_GET_FUNCTION(hook);
        return PyObject_Vectorcall(hook, arguments + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    /* The exception is set already. */
    static inline int tst_raise(void) { return -1; }
    /* Puts the next message into the bytes object of the last one, if its size is the same and nobody but the caller
       holds it: an object that nobody else can see may change, as it does while bytes are joined. Making and freeing
       one for each message costs a quarter of what calling a small handler does. 0: make a new one. */
    static inline int tst_refill(PyObject *data, const char *place, Py_ssize_t size) {
    #ifndef Py_GIL_DISABLED
        if (Py_REFCNT(data) == 1 && PyBytes_GET_SIZE(data) == size && size > 1) {
            memcpy(PyBytes_AS_STRING(data), place, (size_t)size);
    #pragma GCC diagnostic push
    #pragma GCC diagnostic ignored "-Wdeprecated-declarations"
            ((PyBytesObject *)data)->ob_shash = -1;
    #pragma GCC diagnostic pop
            return 1;
        }
    #endif
        return 0;
    }
    """
    PyObject *tst_call(PyObject *hook, PyObject *sock, PyObject *data)
    int tst_raise() except -1
    bint tst_refill(PyObject *data, const char *place, Py_ssize_t size)


cdef extern from "<pythread.h>" nogil:
    unsigned long PyThread_get_thread_ident()


# --------------------------------------------------------------------------------------------------- errors

cdef object system_error(int number, str text=None):
    """The OSError of an errno; Python picks the subclass."""
    return OSError(number, text or os.strerror(number))


cdef int check(ssize_t result, str what) except -1:
    """The one place that turns the engine's -errno into an exception."""
    if result >= 0:
        return 0
    if result == -ENOTCONN:
        raise ConnectionClosed("the socket is closed")
    if result == -ENOMEM:
        raise MemoryError(what)
    if result == -EINVAL:
        raise ValueError(what)
    if result == -EBUSY:
        raise BufferError(what)
    if result == -EMSGSIZE:
        raise MessageTooLarge(what)
    if result == -ENOBUFS:
        raise SendQueueFull("too much output waits for a peer that does not take it")
    raise system_error(<int>-result, what)


cdef size_t size_from(object value, str name) except? 0:
    """A size that a user gave: an integer from 0 up. TypeError for what is no integer."""
    number = operator.index(value)
    if number < 0 or number > 0x7fffffffffffffff:
        raise ValueError(f"{name} must not be negative, or beyond 2**63: {number}")
    return number


cdef size_t limit_from(object value, str name) except? 0:
    """A limit in bytes; 0 is the engine's word for None, no limit."""
    cdef size_t limit = 0 if value is None else size_from(value, name)
    if limit == 0 and value is not None:
        raise ValueError(f"{name} must not be 0; None: no limit")
    return limit


cdef object positive(object value, str name):
    number = operator.index(value)
    if number <= 0 or number > 0x7fffffff:
        raise ValueError(f"{name} must be a positive number below 2**31: {number}")
    return number


cdef object number_within(object value, str name, object least, object most):
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}: {number}")
    return number


cdef uint64_t nanoseconds(object seconds, str name) except? 0:
    number = float(seconds)
    if not 0.0 <= number <= 1e9:
        raise ValueError(f"{name} must be between 0 and 1e9 seconds: {seconds}")
    return <uint64_t>(<double>number * NANOSECOND)


# -------------------------------------------------------------------------------------------------- framing

cdef enum:
    MAX_MESSAGE = 1048576              # bytes: nginx' limit for a request's body


cdef class Framing:
    """How a stream of bytes is cut into messages. Make one of Raw, Fixed, Delimited, LengthPrefixed; they never change,
    and one may serve any number of pools and sockets."""

    def __cinit__(self, *args, **kwargs):
        if type(self) is Framing:
            raise TypeError("use Raw, Fixed, Delimited or LengthPrefixed")
        self.framing.object = <void *>self

    @property
    def max_message(self):
        """Bytes in the largest message, what is around it not counted. A longer one is a MessageTooLarge; with Raw,
        what has arrived is handed out in pieces of that size."""
        return self.framing.max_message

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options)})"

    def __eq__(self, other):
        return type(self) is type(other) and self.options == (<Framing>other).options

    def __hash__(self):
        return hash((type(self), self.options))

    def __reduce__(self):
        return remake, (type(self), self.options)

    cdef int set_limit(self, object max_message, object default) except -1:
        """First step of each __init__: there is no second one."""
        if self.options is not None:
            raise TypeError("a framing never changes")
        self.framing.max_message = number_within(default if max_message is None else max_message, "max_message", 1,
                                                 2**40)
        return 0


def remake(kind, options):
    """Unpickles a Framing. Not for users."""
    return kind(**dict(options))


@cython.final
cdef class Raw(Framing):
    """Raw(max_message=None)
--

    No framing: a message is whatever has arrived.

    max_message: most bytes handed out at once, and in one send_message() or one reply that a handler returns; None: no
    limit.
    """

    @cython.embedsignature(False)
    def __init__(self, max_message=None):
        self.framing.kind = FRAME_RAW
        self.set_limit(max_message, 2**40)
        framing_settle(&self.framing)
        self.options = () if max_message is None else (("max_message", max_message),)


@cython.final
cdef class Fixed(Framing):
    """Fixed(size, *, max_message=None)
--

    Messages of `size` bytes each.

    size: bytes, at most max_message, which is 1 MiB, or `size` if that is more, unless given. A message of another size
    can't be sent: send_message() raises ValueError.
    """

    @cython.embedsignature(False)      # Cython would put the star in a wrong place
    def __init__(self, size, *, max_message=None):
        self.framing.kind = FRAME_FIXED
        self.set_limit(max_message, max(MAX_MESSAGE, operator.index(size)))
        self.framing.fixed = number_within(size, "size", 1, self.framing.max_message)
        framing_settle(&self.framing)
        self.options = (("size", size),) + (() if max_message is None else (("max_message", max_message),))


@cython.final
cdef class Delimited(Framing):
    """Delimited(delimiter=b"\\n", keep=False, *, max_message=None)
--

    Messages that end with a delimiter: lines, for example.

    delimiter: 1 to 255 bytes. keep: hand it out with the message. max_message: bytes before the delimiter, 1 MiB unless
    given. send_message() and replies take messages without the delimiter and add it; what was kept goes back as it is
    with send().
    """

    @cython.embedsignature(False)
    def __init__(self, delimiter=b"\n", keep=False, *, max_message=None):
        cdef bytes raw = bytes(memoryview(delimiter))
        self.framing.kind = FRAME_DELIMITED
        self.set_limit(max_message, MAX_MESSAGE)
        self.framing.n_delimiter = <unsigned char>number_within(len(raw), "len(delimiter)", 1, DELIMITER_MOST)
        memcpy(self.framing.delimiter, PyBytes_AS_STRING(raw), self.framing.n_delimiter)
        self.framing.keep = bool(keep)
        framing_settle(&self.framing)
        self.options = (("delimiter", raw), ("keep", bool(keep)), ("max_message", self.framing.max_message))


@cython.final
cdef class LengthPrefixed(Framing):
    """LengthPrefixed(size=4, byteorder="big", offset=0, adjust=0, strip=True, *, max_message=None)
--

    Messages with their length in front.

    size: bytes in the length field: 1, 2, 3, 4 or 8. byteorder: "big" or "little". offset: bytes before the length
    field. adjust: what to add to its number to get the size of the body that follows it; -size if it counts itself.
    strip: hand out the body alone; else all from the first byte. max_message: bytes in the body, 1 MiB unless given.
    send_message() and replies take bodies and write what goes before them, with zeros before the length field; what was
    not stripped goes back as it is with send().
    """

    @cython.embedsignature(False)
    def __init__(self, size=4, byteorder="big", offset=0, adjust=0, strip=True, *, max_message=None):
        if size not in (1, 2, 3, 4, 8):
            raise ValueError(f"size must be 1, 2, 3, 4 or 8: {size!r}")
        if byteorder not in ("big", "little"):
            raise ValueError(f"byteorder must be 'big' or 'little': {byteorder!r}")
        self.framing.kind = FRAME_LENGTH
        self.set_limit(max_message, MAX_MESSAGE)
        self.framing.length_size = <unsigned char>operator.index(size)
        self.framing.little = byteorder == "little"
        self.framing.offset = number_within(offset, "offset", 0, OFFSET_MOST)
        self.framing.adjust = number_within(adjust, "adjust", -2**40, 2**40)
        self.framing.keep = not strip
        framing_settle(&self.framing)
        self.options = (("size", self.framing.length_size), ("byteorder", byteorder), ("offset", self.framing.offset),
                        ("adjust", self.framing.adjust), ("strip", bool(strip)),
                        ("max_message", self.framing.max_message))


cdef Framing framing_from(object value):
    """What a user gave as framing; None for bytes as they arrive."""
    if value is None or isinstance(value, Framing):
        return value
    raise TypeError(f"framing must be None, Raw, Fixed, Delimited or LengthPrefixed: {value!r}")


cdef const tst_framing *framing_pointer(Framing framing) noexcept:
    return NULL if framing is None else &framing.framing


# ------------------------------------------------------------------------------------------------ transfers

@cython.final
cdef class TstData:
    """One of a socket's two transfer buffers: `recv_data` or `send_data`.

    `req_len` bytes are transferred to or from position `req_pos` of the buffer `s`; `com_len` of them are done. Fields
    may be read on any thread. Assign them inside the socket's handler; another thread may fill `send_data` and then
    call `pool.need_send(sock)`. It sets `req_len` to 0 first and to the new length last, for to assign `req_pos`
    asks for a transfer too: a handler that returns just then would send the old length from there.
    """

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("a TstData is made by its pool, not by hand")

    def __dealloc__(self):
        free(self.data.s)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef int result
        spin_lock(&self.data.lock)
        result = data_make(&self.data)
        if result == 0:
            self.data.exports += 1
        spin_unlock(&self.data.lock)
        check(result, "no memory for the buffer")
        try:
            PyBuffer_FillInfo(buffer, self, self.data.s, <Py_ssize_t>self.data.s_len, False, flags)
        except BaseException:
            self.release_export()
            raise

    def __releasebuffer__(self, Py_buffer *buffer):
        self.release_export()

    cdef void release_export(self) noexcept:
        spin_lock(&self.data.lock)
        self.data.exports -= 1
        spin_unlock(&self.data.lock)

    def __len__(self):
        return data_read(&self.data, &self.data.s_len)

    def __repr__(self):
        return (f"<TstData s_len={self.s_len} req_pos={self.req_pos} req_len={self.req_len} com_len={self.com_len} "
                f"checked_len={self.checked_len}>")

    @property
    def s(self):
        """A writable memoryview of the whole buffer. It stays valid after the connection has closed; resize() is
        refused while one is held."""
        return memoryview(self)

    @property
    def s_len(self):
        """Size of the buffer in bytes. Its memory is taken when the buffer is first used."""
        return data_read(&self.data, &self.data.s_len)

    @property
    def req_pos(self):
        """Where in the buffer the transfer begins. ValueError, and nothing changed, when it would run over the end."""
        return data_read(&self.data, &self.data.req_pos)

    @req_pos.setter
    def req_pos(self, value):
        check(data_request(&self.data, size_from(value, "req_pos"), self.data.req_len),
              "req_pos + req_len exceeds s_len")

    @property
    def req_len(self):
        """How many bytes are to be transferred; assigning it begins a new transfer (com_len = 0). 0: none. ValueError,
        and nothing changed, when it would run over the end of the buffer."""
        return data_read(&self.data, &self.data.req_len)

    @req_len.setter
    def req_len(self, value):
        check(data_request(&self.data, self.data.req_pos, size_from(value, "req_len")),
              "req_pos + req_len exceeds s_len")

    @property
    def com_len(self):
        """How many bytes of the transfer are done; of a sending one, how many the engine has taken over."""
        return data_read(&self.data, &self.data.com_len)

    @com_len.setter
    def com_len(self, value):
        check(data_set_done(&self.data, size_from(value, "com_len")), "com_len exceeds req_len")

    @property
    def checked_len(self):
        """Bytes that wait to be read with sock.read(), when the handler is called with req_len == 0."""
        return data_read(&self.data, &self.data.checked_len)

    @property
    def trans_time(self):
        """Seconds between the first and the last byte of the transfer that finished last."""
        return data_read(&self.data, &self.data.trans_time) / 1e9

    def resize(self, n):
        """Makes the buffer `n` bytes long and keeps its contents; new bytes are zero.

        Raises BufferError while a memoryview of it is held, ValueError when n <= 0 or the current request would not
        fit.
        """
        cdef int result = data_resize(&self.data, size_from(n, "n"))
        check(result, "the buffer is held by a memoryview" if result == -EBUSY
              else "the new size is 0, or below req_pos + req_len")


cdef TstData new_transfer(size_t s_len):
    cdef TstData transfer = TstData.__new__(TstData, POOLS_KEY)
    transfer.data.s_len = s_len
    return transfer


# -------------------------------------------------------------------------------------------------- sockets

@cython.final
@cython.trashcan(True)                  # a long chain of sockets in user_data must not end on the C stack
cdef class TstSocket:
    """One connection of a pool.

    It stays valid for as long as somebody holds it. send(), close(), pause() and resume() may be called on any thread,
    at any time, without a lock; read(), read_into() and the fields of `recv_data` belong to the socket's own handler.
    """

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("a TstSocket is made by its pool, not by hand")

    cdef uint32_t generation(self) noexcept nogil:
        return generation_of(self.id)

    cdef ssize_t append(self, const char *bytes, size_t size, tst_shared *shared, bint framed) noexcept nogil:
        """Queues output and sees to it that somebody sends it. Returns what waits, or -errno."""
        cdef ssize_t result
        cdef bint flush = False, again = True
        while True:
            result = connection_append(
                self.connection, self.generation(), bytes, size, shared, framed, &flush)
            if flush:
                shard_ask(self.connection, self.generation(), 0)
            if not tst_rarely(result == -ENOBUFS):
                return result
            if not again:
                return self.overflow()
            again = False
            self.flush_once()      # perhaps too much waits only because it is a long handler that sends

    cdef ssize_t overflow(self) noexcept nogil:
        """Too much waits: the limits say what to do. Returns -ENOBUFS, or -ENOTCONN when it was closed for that."""
        if self.limits.overflow != OVERFLOW_CLOSE:         # our own: the slot may be another connection's by now
            add64(&self.pool.engine.total.overflow_refused, 1, RELAXED)
            return -ENOBUFS
        if connection_abort(self.connection, self.generation(), ENOBUFS):
            shard_ask(self.connection, self.generation(), PEND_CLOSE)
        return -ENOTCONN

    cdef void flush_once(self) noexcept nogil:
        """Gives the kernel what it takes now."""
        cdef tst_stats outside
        memset(&outside, 0, sizeof(outside))
        if connection_flush(self.connection, self.generation(), True, True, clock_now(), &outside) < 0:
            shard_ask(self.connection, self.generation(), PEND_IN)     # no event may come to tell its owner
        connection_ask_relief(self.connection, self.generation())
        add64(&self.pool.bytes_outside, outside.bytes_out, RELAXED)

    cdef int wait_for_room(self) except -1:
        """Blocks until less than high_water waits; for a moment if that is so, for then it is the other connections
        that have too much. ConnectionClosed when it ends before."""
        cdef pollfd watched
        cdef size_t waits, enough = self.limits.high_water
        cdef bint gone, overdue, waited = False
        watched.fd = <int><uint32_t>self.id
        watched.events = POLLOUT
        while True:
            spin_lock(&self.connection.lock)
            gone = self.connection.out_closed or not connection_is(self.connection, self.generation())
            overdue = not gone and connection_output_is_overdue(self.connection, clock_now())
            waits = queue_size(&self.connection.out)
            spin_unlock(&self.connection.lock)
            if overdue and connection_abort(self.connection, self.generation(), ETIMEDOUT):
                shard_ask(self.connection, self.generation(), PEND_CLOSE)      # all workers may be waiting like this
            if gone or overdue:
                raise ConnectionClosed("the socket was closed while a send waited for room")
            if waits <= enough and waited:
                return 0
            waited = True
            with nogil:
                # Short, for the descriptor may be closed meanwhile.
                poll(&watched, 1 if waits > enough else 0, 10)
                self.flush_once()
            self.pool.drop_all_litter()
            PyErr_CheckSignals()

    cdef ssize_t append_object(self, object data, bint framed) except? -1:
        """append() for whatever has a buffer. Large `bytes` are kept instead of copied: they never change."""
        cdef ssize_t queued = self.append_now(data, framed)
        while queued == -ENOBUFS and self.limits.overflow == OVERFLOW_BLOCK and not self.in_handler():
            self.wait_for_room()
            queued = self.append_now(data, framed)
        return queued

    cdef ssize_t append_now(self, object data, bint framed) except? -1:
        cdef Py_buffer view
        cdef tst_shared *shared
        cdef ssize_t queued
        if type(data) is bytes:
            if PyBytes_GET_SIZE(data) < SHARE_LEAST:
                return self.append(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), NULL, framed)
            shared = share_object(data)
            queued = self.append(shared.bytes, shared.size, shared, framed)
            unshare_object(shared)
            return queued
        data = contiguous(data)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.append(<const char *>view.buf, <size_t>view.len, NULL, framed)
        finally:
            PyBuffer_Release(&view)

    cdef bint in_handler(self) noexcept:
        """The calling thread is the worker that is in this socket's handler."""
        cdef int no = <int>load32(<uint32_t *>&self.connection.thread_no, RELAXED)
        cdef tst_worker *worker
        if no < 0 or no >= worker_count(self.pool.engine) or not connection_is(self.connection, self.generation()):
            return False
        worker = &self.pool.engine.workers[no]
        return worker.ident == PyThread_get_thread_ident() and worker.current == self.connection

    def __repr__(self):
        return f"<TstSocket sd={self.sd} id={self.id:#x} {'closed' if self.closed else 'open'}>"

    # -- what it is

    @property
    def sd(self):
        """The descriptor's number; after the close, the number it had."""
        return <int><uint32_t>self.id

    def fileno(self):
        """The descriptor's number, or -1 once the connection is gone."""
        return self.sd if connection_is(self.connection, self.generation()) else -1

    @property
    def type(self):
        """The TstSockType: SUB when accepted, else what addsocket() was told."""
        return TstSockType(self.type_number)

    @property
    def closed(self):
        """True from the moment a close was asked for, by anybody."""
        cdef bint result
        spin_lock(&self.connection.lock)
        result = self.connection.out_closed or not connection_is(self.connection, self.generation())
        spin_unlock(&self.connection.lock)
        return result

    @property
    def events(self):
        """The epoll bits (EPOLLIN, EPOLLOUT ...) that the running handler call is about."""
        return load32(&self.connection.events, RELAXED) if connection_is(self.connection, self.generation()) else 0

    @property
    def thread_no(self):
        """Number of the worker that ran this socket's handler last, -1 before the first time or after the close."""
        if not connection_is(self.connection, self.generation()):
            return -1
        return <int>load32(<uint32_t *>&self.connection.thread_no, RELAXED)

    @property
    def peer(self):
        """(host, port) of the other side, known after the close too; for a unix socket "unix:path", None if it has no
        name."""
        if self.peer_path is not None:
            return self.peer_path
        return _net.text_address(self.peer_address.family, self.peer_address.bytes[:sizeof(self.peer_address.bytes)])

    @property
    def local(self):
        """(host, port) of this side, or a unix socket's "unix:path"; None once the connection is gone."""
        try:
            with socket.socket(fileno=os.dup(self.fileno())) as copy:
                return _net.address_of(copy) if copy.family != socket.AF_UNIX else _net.address_of(copy)[0]
        except OSError:
            return None

    # -- what the user hangs on it

    @property
    def user_data(self):
        """Any object of the user's; let go when the connection is gone."""
        with cython.critical_section(self):
            return self.data

    @user_data.setter
    def user_data(self, value):
        with cython.critical_section(self):
            self.data = value

    @property
    def handler(self):
        """The handler for this socket: a TstHandler or a function. Assigning one overrides the pool's; None goes
        back."""
        with cython.critical_section(self):
            binding = self.binding
        if binding is None:
            with cython.critical_section(self.pool):
                binding = self.pool.binding
        return None if binding is None else (<Binding>binding).handler

    @handler.setter
    def handler(self, value):
        binding = None if value is None else bind(value, {})
        with cython.critical_section(self):
            self.binding = binding
        spin_lock(&self.connection.lock)
        if connection_is(self.connection, self.generation()):
            store32(&self.connection.rebind, 1, RELEASE)
        spin_unlock(&self.connection.lock)

    @property
    def framing(self):
        """How this socket's input is cut into messages; None: as it arrives. Assigned inside the socket's own handler
        it counts from the next message on, for what was read already too. TstError elsewhere."""
        with cython.critical_section(self):
            return self.own_framing

    @framing.setter
    def framing(self, value):
        framing = framing_from(value)
        self.check_reading()
        with cython.critical_section(self):
            spin_lock(&self.connection.lock)           # another thread's send_message() may be reading the old one
            self.connection.framing = framing_pointer(framing)
            spin_unlock(&self.connection.lock)
            # Unread input is cut anew, except for the message that is being handed out. The old one may be freed below,
            # and a later one lie where it lay.
            if self.connection.windowed:
                self.connection.framed_by = NULL
            else:
                connection_forget_frame(self.connection)
            self.own_framing, framing = framing, self.own_framing

    @property
    def recv_data(self):
        """The TstData for receiving."""
        with cython.critical_section(self):
            if self.recv_transfer is None:
                self.recv_transfer = new_transfer(self.pool.max_recv_size)
                if self.in_handler():
                    data_set_unread(&self.recv_transfer.data, self.connection.input.size)
                self.publish(<void **>&self.connection.recv, &self.recv_transfer.data)
            return self.recv_transfer

    @property
    def send_data(self):
        """The TstData for sending."""
        with cython.critical_section(self):
            if self.send_transfer is None:
                self.send_transfer = new_transfer(self.pool.max_send_size)
                self.publish(<void **>&self.connection.send, &self.send_transfer.data)
            return self.send_transfer

    cdef void publish(self, void **place, void *transfer) noexcept:
        """Shows a transfer to the engine; it reads it only while the slot holds a reference to us."""
        spin_lock(&self.connection.lock)
        if self.connection.sock == <PyObject *>self:
            store_pointer(place, transfer, RELEASE)
        spin_unlock(&self.connection.lock)

    # -- output

    def send(self, data):
        """Queues bytes and returns at once; they are copied, so `data` may be changed afterwards.

        data: any object with the buffer protocol. Returns how many bytes of this connection wait now for the kernel to
        take them. Inside a handler they go out, in one piece, when the handlers of this turn have run. Any thread; what
        one thread sends keeps its order and is never mixed with another's inside one call. Raises ConnectionClosed,
        SendQueueFull (see TstPool's max_queued), TypeError, MemoryError.
        """
        cdef ssize_t queued = self.append_object(data, False)
        if queued < 0:
            check(queued, "no memory to queue output")
        return queued

    def send_message(self, data):
        """Queues one message in the frame of the socket's framing; without framing it is send().

        Raises MessageTooLarge when the framing has no frame for so many bytes, ValueError when the message holds the
        delimiter or is not of the fixed size; else as send(). Any thread.
        """
        cdef ssize_t queued = self.append_object(data, True)
        if queued < 0:
            self.raise_unsent(queued, data)
        return queued

    cdef int raise_unsent(self, ssize_t result, object data) except -1:
        """Says why append_object() did not take a message."""
        size = memoryview(data).nbytes
        with cython.critical_section(self):
            framing = self.own_framing
        if result == -EINVAL:
            raise ValueError(f"the message holds the delimiter of {framing!r}")
        if result == -EMSGSIZE and isinstance(framing, Fixed):
            raise ValueError(f"{framing!r} has no frame for a message of {size} bytes")
        check(result, "no memory to queue output" if result == -ENOMEM else
              f"{framing!r} has no frame for a message of {size} bytes")
        return 0

    def flush(self, timeout=None):
        """Blocks until all that was queued before the call has been handed to the kernel.

        timeout: seconds, None for ever. Inside a handler this blocks the handler's worker, as any blocking call does;
        other connections go on. Raises TimeoutError, and ConnectionClosed when the connection breaks first.
        """
        cdef uint64_t goal
        cdef uint64_t until = 0 if timeout is None else clock_now() + nanoseconds(timeout, "timeout")
        cdef pollfd watched
        spin_lock(&self.connection.lock)
        goal = self.connection.out.queued
        spin_unlock(&self.connection.lock)
        watched.fd = <int><uint32_t>self.id
        watched.events = POLLOUT
        try:
            while not self.sent_up_to(goal):
                with nogil:
                    self.flush_once()
                if self.sent_up_to(goal):
                    return
                if until and clock_now() >= until:
                    raise TimeoutError(f"output of {self!r} still waits after {timeout} seconds")
                with nogil:
                    poll(&watched, 1, 10)      # short, for the descriptor may be closed meanwhile
                PyErr_CheckSignals()
        finally:
            self.pool.drop_all_litter()

    cdef bint sent_up_to(self, uint64_t goal) except -1:
        cdef bint gone, sent
        spin_lock(&self.connection.lock)
        gone = (not connection_is(self.connection, self.generation()) or self.connection.aborted
                or load32(&self.connection.out_error, RELAXED) != 0)
        sent = self.connection.out.sent >= goal
        spin_unlock(&self.connection.lock)
        if gone:
            raise ConnectionClosed("the connection ended before its output was sent")
        return sent

    # -- input, inside the handler

    def read(self, n=-1):
        """Takes up to `n` bytes of input that has arrived, without blocking; without `n`, all that is at hand.

        Returns b"" when nothing is there. Only inside the socket's own handler; TstError elsewhere.
        """
        cdef size_t most
        cdef size_t buffered
        cdef ssize_t more
        self.check_reading()
        buffered = self.unread()
        most = buffered if self.holds_no_more() else buffered + READ_CHUNK
        if n >= 0:
            most = min(size_from(n, "n"), most)
        if buffered and (n < 0 or buffered >= most):
            buffered = min(buffered, most)
            taken = PyBytes_FromStringAndSize(self.connection.input.view, <Py_ssize_t>buffered)
            self.took(buffered)
            return taken
        room = bytearray(most)
        more = self.read_to(<char *>room, <size_t>len(room))
        return bytes(memoryview(room)[:more])

    def read_into(self, buffer):
        """As read(), into a writable buffer. Returns the number of bytes."""
        cdef Py_buffer view
        self.check_reading()
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            return self.read_to(<char *>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    cdef int check_reading(self) except -1:
        if not self.in_handler():
            raise TstError("reading is for the socket's own handler, while it runs")
        return 0

    cdef size_t unread(self) noexcept:
        """Bytes at hand: what is left of the message, or, without framing, of what was read ahead."""
        return self.connection.frame.size if self.connection.windowed else self.connection.input.size

    cdef bint holds_no_more(self) noexcept:
        """What the kernel has is not the handler's to read: it belongs to the next message, or to one under way."""
        return self.connection.windowed or self.connection.body != NULL

    cdef void took(self, size_t size) noexcept:
        input_consume(&self.connection.input, size)
        self.connection.has_read = True
        if self.connection.windowed:
            self.connection.frame.size -= size
            self.connection.frame.whole -= size
        elif self.connection.framed_by != NULL:
            connection_forget_frame(self.connection)

    cdef ssize_t read_to(self, char *place, size_t size) except -1:
        """Input that was read ahead first, then what the kernel has."""
        cdef tst_connection *connection = self.connection
        cdef size_t buffered = min(self.unread(), size)
        cdef ssize_t n = 0
        if buffered:
            memcpy(place, connection.input.view, buffered)
            self.took(buffered)
        if buffered == size or connection.end_of_input or self.holds_no_more():
            return <ssize_t>buffered
        with nogil:
            n = sys_recv(connection.fd, place + buffered, size - buffered)
        if n > 0:
            connection.has_read = True
            count(&self.pool.engine.workers[connection.thread_no].stats.bytes_in, <uint64_t>n)
            connection.readable = connection.trigger == TRIGGER_EDGE
            return <ssize_t>buffered + n
        connection.readable = False
        if n == 0:
            connection.end_of_input = True
        elif n != -EAGAIN:
            connection_break(connection, <int>-n)
        return <ssize_t>buffered

    # -- control

    def close(self, abort=False):
        """Closes the connection once what is queued has been sent; a peer that takes none of it for the pool's
        linger_timeout is cut off. What the peer sends meanwhile is read and dropped, so that the reply reaches it.

        abort: at once instead: what is queued is dropped, and the peer gets a reset. Any thread, any number of times.
        Returns True for the call that began it. Messages not yet handled are dropped.
        """
        cdef bint began
        self.pool.check_alive()
        if abort:
            began = not self.closed
            if connection_abort(self.connection, self.generation(), 0):
                shard_ask(self.connection, self.generation(), PEND_CLOSE)
            return began
        if connection_close_output(self.connection, self.generation()) != 1:
            return False
        shard_ask(self.connection, self.generation(), PEND_CLOSE)
        return True

    def pause(self):
        """No more messages until resume(): TCP holds the peer back. Any thread; a call that runs already is not
        stopped."""
        connection_mark(self.connection, STATE_PAUSED, True, STATE_OPEN, self.generation())

    def resume(self):
        """Goes on after pause(). Any thread."""
        if connection_mark(self.connection, STATE_PAUSED, False, STATE_OPEN, self.generation()):
            shard_ask(self.connection, self.generation(), PEND_ARM)


cdef tst_shared *share_object(bytes data) except NULL:
    """Bytes of an object for queues, used once; the object lives for as long as one of them holds them."""
    cdef tst_shared *shared = <tst_shared *>malloc(sizeof(tst_shared))
    if shared == NULL:
        raise MemoryError("no memory to queue output")
    Py_INCREF(data)
    shared.users = 1
    shared.object = <void *>data
    shared.next = NULL
    shared.bytes = PyBytes_AS_STRING(data)
    shared.size = <size_t>PyBytes_GET_SIZE(data)
    return shared


cdef void unshare_object(tst_shared *shared) noexcept:
    """Gives the first use back."""
    cdef tst_stock own
    memset(&own, 0, sizeof(own))
    shared_leave(shared, &own)
    drop_litter(&own)


cdef void drop_litter(tst_stock *stock) noexcept:
    """Lets objects go that were queued and are sent."""
    cdef tst_shared *shared = stock_take_litter(stock)
    cdef tst_shared *next
    while shared != NULL:
        next = shared.next
        Py_DECREF(<object>shared.object)
        free(shared)
        shared = next


cdef object contiguous(object data):
    """An object whose bytes lie in one piece: `data` itself, or a copy. TypeError when it has no buffer."""
    view = memoryview(data)
    return view if view.c_contiguous else view.tobytes()


cdef ssize_t tst_send(TstSocket sock, const void *data, size_t size) noexcept nogil:
    return sock.append(<const char *>data, size, NULL, False)


cdef ssize_t tst_send_message(TstSocket sock, const void *data, size_t size) noexcept nogil:
    return sock.append(<const char *>data, size, NULL, True)


cdef int tst_close(TstSocket sock) noexcept nogil:
    cdef int began = connection_close_output(sock.connection, sock.generation())
    if began == GONE:
        return -ENOTCONN
    if began:
        shard_ask(sock.connection, sock.generation(), PEND_CLOSE)
    return began


cdef int tst_need_send(TstSocket sock) noexcept nogil:
    return connection_need_send(sock.connection, sock.generation())


cdef int connection_need_send(tst_connection *connection, uint32_t generation) noexcept nogil:
    """0, or -ENOTCONN when the connection is gone or closing."""
    cdef bint closed
    spin_lock(&connection.lock)
    closed = connection.out_closed or not connection_is(connection, generation)
    spin_unlock(&connection.lock)
    if closed or shard_ask(connection, generation, PEND_OUT) == GONE:
        return -ENOTCONN
    return 0


cdef TstSocket new_socket(TstPool pool, tst_connection *connection):
    """The Python side of a connection that the caller owns."""
    cdef TstSocket sock = make_socket(pool, connection)
    publish_socket(connection, sock)
    return sock


cdef TstSocket make_socket(TstPool pool, tst_connection *connection):
    cdef TstSocket sock = TstSocket.__new__(TstSocket, POOLS_KEY)
    sock.id = connection_id(connection)
    sock.connection = connection
    sock.pool = pool
    sock.limits = connection.limits
    sock.type_number = connection.type
    sock.peer_address = connection.peer
    if connection.framing != NULL:
        sock.own_framing = <Framing>connection.framing.object
    return sock


cdef int publish_socket(tst_connection *connection, TstSocket sock) except -1:
    """Others may find it from here on; the slot holds a reference until the connection is gone."""
    Py_INCREF(sock)
    spin_lock(&connection.lock)
    connection.sock = <PyObject *>sock
    spin_unlock(&connection.lock)
    return 0


cdef TstSocket take_socket(tst_connection *connection):
    """The slot lets go of its TstSocket, which is to be let go of with let_socket_go(). None: it had none."""
    cdef TstSocket sock
    spin_lock(&connection.lock)
    held = connection.sock
    connection.sock = NULL
    store_pointer(<void **>&connection.recv, NULL, RELEASE)
    store_pointer(<void **>&connection.send, NULL, RELEASE)
    spin_unlock(&connection.lock)
    connection.compiled = NULL
    if held == NULL:
        return None
    sock = <TstSocket>held
    Py_DECREF(sock)
    return sock


cdef int let_socket_go(TstSocket sock) except -1:
    """A socket whose connection is over lets go of what hangs on it. Whatever that is may run code of the user's."""
    free_state(sock)
    sock.active = None
    sock.reason = None
    sock.user_data = None
    sock.handler = None
    return 0


cdef int let_sockets_go(list socks) except -1:
    """Those that close_down() has taken; no lock is held."""
    for sock in socks:
        if sock is not None:
            let_socket_go(sock)
    return 0


cdef int forget_socket(tst_connection *connection) except -1:
    cdef TstSocket sock = take_socket(connection)
    return 0 if sock is None else let_socket_go(sock)


cdef int make_state(TstSocket sock, TstNogilHandler handler) noexcept:
    """The C state of a connection that begins. Owner only. -ENOMEM: there is none."""
    cdef void *state
    if handler.state_size:
        state = calloc(1, handler.state_size)
        if state == NULL:
            return -ENOMEM
        store_pointer(&sock.state, state, RELEASE)
    sock.state_handler = handler
    return 0


cdef void free_state(TstSocket sock) noexcept:
    """Ends the life of a connection's C state. Owner only."""
    cdef TstNogilHandler handler = sock.state_handler
    cdef void *state = sock.state
    if state != NULL:
        with nogil:
            handler.release(state)
        store_pointer(&sock.state, NULL, RELEASE)
        free(state)
    sock.state_handler = None


# ------------------------------------------------------------------------------------------------- handlers

cdef class TstHandler:
    """What a pool calls. Override what you need; a hook that is not overridden costs nothing.

    Hooks of one socket never run at the same time, and its messages come in order. A hook may block: other connections
    go on as long as the pool has workers left. Unless said otherwise a hook returns None or a TstStat.
    """

    def on_connect(self, sock):
        """A connection is there; no message has been handed out yet. It may send. Anything above TstStat.SEND refuses
        it: what is queued is sent, it is closed, and on_disconnect is not called."""

    def on_message(self, sock, data):
        """`data`: one whole message as bytes, or, if the pool was made with copy=False, as a memoryview; without
        framing, whatever has arrived. Returning bytes sends them as one message."""

    def on_writable(self, sock):
        """need_send() was asked for and the kernel takes output; a TstStat.SEND has been handed to it whole; or, of a
        socket for which more than high_water had waited, no more than low_water still does. Of a TstNogilHandler it is
        not called for the last of these: tst_need_send() asks for it."""

    def on_disconnect(self, sock, reason):
        """The connection is over; called once for each on_connect that accepted. reason: None when the peer or this
        side closed cleanly, else an exception."""

    def on_idle(self, worker_no):
        """Worker `worker_no` has had nothing to do for the pool's idle_time."""

    def on_slow(self, sock, seconds):
        """A hook of `sock` took longer than the pool's slow_handler. It is called when that hook has returned.

        Unless overridden it logs a warning; another one, with the stack of the thread, is logged while the hook still
        runs, by a worker that is free. (Without a GIL there is no stack: frames of a running thread change.)
        """
        logger.warning("a handler took %.3f s on socket %d", seconds, sock.sd)

    def on_error(self, sock, exc):
        """A hook raised `exc`, or the peer's message was too long (MessageTooLarge). The socket is disconnected
        afterwards, what this sends first, unless it was a hook and this returns TstStat.SUSPEND.

        Unless overridden it logs each of them: a hook's with its traceback, in which control characters are escaped.
        """
        if isinstance(exc, MessageTooLarge):
            logger.warning("socket %d is closed: %s", sock.sd, exc)
        else:
            logger.error("a handler raised on socket %d", sock.sd, exc_info=exc)


cdef class TstNogilHandler(TstHandler):
    """A handler whose hooks may be written in Cython, without the GIL: subclass it there, with `cimport tstpool`. What
    its C hooks pass on with TST_RUN reaches the Python hooks of TstHandler. See _core.pxd for the C hooks."""

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        return TST_RUN

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_RUN

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        return TST_RUN

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        pass

    cdef void release(self, void *state) noexcept nogil:
        pass

    cdef void _reserved_0(self) noexcept nogil:
        pass

    cdef void _reserved_1(self) noexcept nogil:
        pass

    cdef void _reserved_2(self) noexcept nogil:
        pass

    cdef void _reserved_3(self) noexcept nogil:
        pass

    cdef void _reserved_4(self) noexcept nogil:
        pass

    cdef void _reserved_5(self) noexcept nogil:
        pass

    cdef void _reserved_6(self) noexcept nogil:
        pass

    cdef void _reserved_7(self) noexcept nogil:
        pass


# The engine calls a TstNogilHandler through these: it knows no classes.

cdef int call_connected(void *handler, void *sock) noexcept nogil:
    return (<TstNogilHandler>handler).connected(<TstSocket>sock)


cdef int call_received(void *handler, void *sock, const char *data, size_t size) noexcept nogil:
    return (<TstNogilHandler>handler).received(<TstSocket>sock, data, size)


cdef int call_writable(void *handler, void *sock) noexcept nogil:
    return (<TstNogilHandler>handler).writable(<TstSocket>sock)


cdef int call_disconnected(void *handler, void *sock) noexcept nogil:
    (<TstNogilHandler>handler).disconnected(<TstSocket>sock)
    return 0


cdef tuple HOOKS = ("on_connect", "on_message", "on_writable", "on_disconnect", "on_idle", "on_slow", "on_error",
                    "on_most_elapsed")


@cython.final
cdef class Binding:
    """A handler with its hooks looked up: None where the user has not overridden one."""


cdef object hook_of(object handler, str name):
    """The handler's hook as a bound method; None when it is TstHandler's own and does nothing."""
    method = getattr(handler, name, None)
    if name not in ("on_slow", "on_error") and getattr(type(handler), name, None) is getattr(TstHandler, name, None):
        if name not in getattr(handler, "__dict__", ()):
            return None
    return method


cdef bint logs_slow(Binding binding):
    """on_slow is TstHandler's own."""
    return getattr(binding.on_slow, "__func__", None) is TstHandler.on_slow or binding.function is not None


cdef Binding bind(object handler, dict hooks):
    """Looks a handler's hooks up; `hooks` from setEvent... win. TypeError for what is no handler."""
    cdef Binding binding = Binding.__new__(Binding)
    cdef object source = handler
    if not isinstance(handler, TstHandler):
        if not callable(handler) or isinstance(handler, type):
            raise TypeError(f"a handler is a TstHandler instance or a function of one socket, not {handler!r}")
        binding.function = handler
        source = DEFAULT_HANDLER
    found = {name: hooks.get(name) or hook_of(source, name) for name in HOOKS}
    binding.handler = handler
    binding.on_connect = found["on_connect"]
    binding.on_message = found["on_message"]
    binding.on_writable = found["on_writable"]
    binding.on_disconnect = found["on_disconnect"]
    binding.on_idle = found["on_idle"]
    binding.on_slow = found["on_slow"]
    binding.on_error = found["on_error"]
    binding.on_most_elapsed = found["on_most_elapsed"]
    if isinstance(handler, TstNogilHandler):
        binding.compiled.handler = <void *>handler     # borrowed: binding.handler holds it
        binding.compiled.connected = call_connected
        binding.compiled.received = call_received
        binding.compiled.writable = call_writable
        binding.compiled.disconnected = call_disconnected
    return binding


DEFAULT_HANDLER = TstHandler()


cdef object with_arity(object function, int least, int most):
    """Lets a hook take fewer arguments than there are: f(sock) where f(sock, reason) would do."""
    if not callable(function):
        raise TypeError(f"not callable: {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function
    for n in range(most, least - 1, -1):
        try:
            signature.bind(*range(n))
        except TypeError:
            continue
        return function if n == most else lambda *arguments: function(*arguments[:n])
    raise TypeError(f"{function!r} must take {least} or {most} arguments")


# ----------------------------------------------------------------------------------------------------- pool

cdef bint connection_waits(tst_connection *connection) noexcept nogil:
    """Its input lies in the kernel, and nothing but a worker is missing. With the lock held nobody closes the
    descriptor."""
    cdef bint waits
    spin_lock(&connection.lock)
    waits = (load64(&connection.state, ACQUIRE) & (STATE_OPEN | STATE_PAUSED) == STATE_OPEN
             and connection.type != TYPE_LISTEN and sys_unread(connection.fd) != 0)
    spin_unlock(&connection.lock)
    return waits


cdef bint gil_is_on() except -1:
    return getattr(sys, "_is_gil_enabled", lambda: True)()


# Pools that have descriptors, for the interpreter's exit and for forks.
_open = weakref.WeakSet()


cdef class PoolMutex:
    """A pool's mutex. A thread that holds it may be interrupted by itself: by a signal handler, or a finalizer that the
    garbage collector runs, which calls the pool in its turn. `with` says whether that is so.

    What is in the middle of start() or listen() then is good enough for all but stop(), which waits until it is over.
    """

    cdef object lock
    cdef int depth

    def __cinit__(self):
        self.lock = threading.RLock()

    def __enter__(self):
        self.lock.acquire()
        self.depth += 1
        return self.depth > 1

    def __exit__(self, *exc_info):
        self.depth -= 1
        self.lock.release()


cdef class RunsEnd:
    """The end of one run of a pool, from start() on; it comes once.

    As a threading.Event, with one difference: it has no lock that a thread would hold while it waits, so that a signal
    handler which interrupts that may wait too.
    """

    cdef object lock           # held until then
    cdef uint32_t over         # atomic

    def __cinit__(self, over):
        self.lock = threading.Lock()
        self.lock.acquire()
        if over:
            self.set()

    def set(self):
        if not exchange32(&self.over, 1, ACQ_REL):
            self.lock.release()

    def is_set(self):
        return load32(&self.over, ACQUIRE) != 0

    def wait(self, seconds):
        """At most so long. True: it has come. What handlers of signals raise is raised."""
        if self.lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            self.lock.release()
        PyErr_CheckSignals()           # one may have come before the wait, or to another thread; no bytecode looks here
        return self.is_set()


cdef class TstPool:
    """TstPool(handler=None, *, framing=None, workers=None, copy=True, trigger="level", max_recv_size=4096,
max_send_size=4096, shards=None, idle_time=3.0, slow_handler=0.1, name="tstpool", max_connections=None,
when_full="wait", first_byte_timeout=15.0, message_timeout=60.0, idle_timeout=75.0, write_timeout=60.0,
linger_timeout=5.0, high_water=65536, low_water=16384, max_queued=1048576, on_overflow="raise", auto_pause=True,
max_total_queued=268435456, busy_poll=20e-6, keepalive=None, accepts_per_turn=16, accept_pause=0.1, receive_size=262144,
messages_per_turn=32)
--

    A TCP server thread pool over epoll: it listens, accepts, reads, calls the handler on a worker thread, sends, frees.

    handler: a TstHandler, or a function of one socket; may be missing until create() brings it.
    framing: how input is cut into messages, for listeners and sockets that are not told otherwise: Fixed, Delimited,
    LengthPrefixed; Raw() or None for bytes as they arrive.
    workers: threads; default min(32, cores + 4). Handlers that block hold one each.
    copy: on_message gets bytes; False: a read-only memoryview of the message where it was received, valid inside the
    call and released after it. Using it later raises ValueError. A slice or array made of it stays valid, and keeps the
    receive buffer, up to 256 KiB, or the message. sock.read() gets nothing in such a call. It is for messages of many
    KiB: making and releasing a memoryview takes longer than copying a small one.
    trigger: "level", "oneshot" or "edge": how descriptors are armed. Same results from all three; "level" is fastest.
    max_recv_size, max_send_size: bytes in each socket's recv_data and send_data.
    shards: epoll sets, each polled by one worker at a time. Default: 1 under a GIL, one a core on a free-threaded build
    or with a TstNogilHandler; never more than workers.
    max_connections: open at the same time, accepted and added; default 10,000, or the process's limit of descriptors
    less 32 where that is lower. It stops accepting; connect() and addsocket() count, but are never refused. when_full:
    "wait": more clients wait in the kernel's backlog until one leaves (another pool or process may take them, or they
    give up); "close": they are accepted and closed.
    first_byte_timeout, message_timeout, idle_timeout: seconds that an accepted connection may take until its first byte
    (15), from the first byte of a message to its last, however steadily it sends (60), between messages (75).
    write_timeout: seconds in which a peer takes none of the output that waits for it (60). None: for ever. When one has
    passed the connection is closed, with a TimeoutError as the reason. Time in which handlers do not read (pause, a
    handler that runs) does not count. linger_timeout: seconds without progress while closing (5).
    keepalive: whole seconds of silence after which the kernel asks a peer whether it is there; one that has not
    answered three times within about as long again is gone, with a TimeoutError as the reason. For connections that may
    be idle for ever; of listen() and connect(), while addsocket() leaves a socket's options as they are. None: off.
    high_water, low_water: bytes of output that wait for a peer: above high_water (64 KiB) its messages are not handed
    out any more, and it is not read, unless auto_pause is False; at low_water (16 KiB) that goes on, and on_writable is
    called, of a TstHandler: a function or a TstNogilHandler asks with need_send().
    max_queued: with so many waiting (1 MiB) no more is taken; the message that goes beyond still is. on_overflow: what
    happens then: "raise": send() raises SendQueueFull; "block": it waits until there is room, except in the socket's
    own handler; "close": the connection is aborted. max_total_queued: bytes that wait for all peers of the pool (256
    MiB), what goes out at once not counted: beyond it, connections that have output waiting take no more, and the
    others no message above high_water, unless it is a broadcast's or the only output that waits. None: no limit.
    idle_time: seconds without work after which on_idle is called. slow_handler: seconds from which on_slow is.
    accepts_per_turn: clients that one listener accepts before those that are there get their turn (16). accept_pause:
    seconds for which nobody is accepted after the process has run out of descriptors or memory (0.1; a millisecond at
    least). receive_size: bytes that are received from one connection before others get their turn (256 KiB; from 4 KiB
    to 16 MiB): each worker has a buffer of that size, and of one with a copy=False view that is kept, as many as are.
    messages_per_turn: messages of one connection that are handled before others get their turn, if they take 0.1 ms
    together (32).
    busy_poll: seconds for which a worker polls without sleeping when it slept no longer than that the last time, as
    long as that pays (20 microseconds: about what a sleep of no length and the waking cost; rarely, after polls in
    vain); 0 is never. A server that is busy enough for short pauses only then takes its core whole instead of half, for
    replies that are a quarter faster. More, say 100e-6, is for clients that answer at once over a network, on a core
    that has nothing else to do. name: prefix of the threads' names.

    All methods may be called on any thread. A running pool is kept alive by its workers, and one with connections by
    these, until stop(); at the end of the interpreter it is stopped. In a forked child every method raises TstError.
    """

    def __cinit__(self):
        cdef pthread_condattr_t monotonic
        self.engine = <tst_engine *>calloc(1, sizeof(tst_engine))
        if self.engine == NULL:
            raise MemoryError()
        pthread_condattr_init(&monotonic)
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC)
        pthread_mutex_init(&self.engine.mutex, NULL)
        pthread_cond_init(&self.engine.standby, &monotonic)
        pthread_cond_init(&self.engine.watch, &monotonic)
        pthread_condattr_destroy(&monotonic)

    @cython.embedsignature(False)
    def __init__(self, handler=None, *, framing=None, workers=None, copy=True, trigger="level", max_recv_size=4096,
                 max_send_size=4096, shards=None, idle_time=3.0, slow_handler=0.1, name="tstpool",
                 max_connections=None, when_full="wait", first_byte_timeout=15.0, message_timeout=60.0,
                 idle_timeout=75.0, write_timeout=60.0, linger_timeout=5.0, high_water=65536, low_water=16384,
                 max_queued=1048576, on_overflow="raise", auto_pause=True, max_total_queued=268435456, busy_poll=20e-6,
                 keepalive=None, accepts_per_turn=16, accept_pause=0.1, receive_size=262144, messages_per_turn=32):
        if self.hooks is not None:
            raise TstError("a TstPool is initialised once")
        if trigger not in TRIGGERS:
            raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}: {trigger!r}")
        if when_full not in ("wait", "close"):
            raise ValueError(f"when_full must be 'wait' or 'close': {when_full!r}")
        self.framings = [framing_from(framing)]
        self.engine.total.most = limit_from(max_total_queued, "max_total_queued")
        self.limits = {
            "first_byte_timeout": first_byte_timeout, "message_timeout": message_timeout, "idle_timeout": idle_timeout,
            "write_timeout": write_timeout, "linger_timeout": linger_timeout, "high_water": high_water,
            "low_water": low_water, "max_queued": max_queued, "on_overflow": on_overflow, "auto_pause": auto_pause}
        self.engine.max_connections = <uint32_t>(
            usual_max_connections() if max_connections is None else positive(max_connections, "max_connections"))
        self.engine.close_excess = when_full == "close"
        self.keepalive = 0 if keepalive is None else number_within(keepalive, "keepalive", 1, 32767)
        self.copy = bool(copy)
        self.mutex = PoolMutex()
        self.limits_from(self.limits)
        self.engine.accepts_per_turn = number_within(accepts_per_turn, "accepts_per_turn", 1, 1024)
        self.engine.accept_pause = max(<uint64_t>1000000, nanoseconds(accept_pause, "accept_pause"))
        self.engine.receive_size = number_within(receive_size, "receive_size", 4096, 16777216)
        self.engine.messages_per_turn = positive(messages_per_turn, "messages_per_turn")
        self.ended = RunsEnd(True)
        self.threads = []
        self.listeners = []
        self.name = str(name)
        self.n_workers = positive(min(32, (os.cpu_count() or 1) + 4) if workers is None else workers, "workers")
        self.shards_wanted = 0 if shards is None else positive(shards, "shards")
        self.max_recv_size = positive(max_recv_size, "max_recv_size")
        self.max_send_size = positive(max_send_size, "max_send_size")
        self.engine.slow_handler = nanoseconds(slow_handler, "slow_handler")
        self.engine.busy_poll = nanoseconds(busy_poll, "busy_poll")
        self.engine.idle_time = max(<uint64_t>1, nanoseconds(idle_time, "idle_time"))
        self.engine.trigger = TRIGGERS[trigger]
        self.engine.watcher = -1
        self.binding = None if handler is None else bind(handler, {})
        self.hooks = {}

    def __dealloc__(self):
        if self.engine == NULL or self.dead:       # a forked child leaves the parent's memory as it found it
            return
        let_sockets_go(self.close_descriptors())
        self.free_memory()
        pthread_cond_destroy(&self.engine.watch)
        pthread_cond_destroy(&self.engine.standby)
        pthread_mutex_destroy(&self.engine.mutex)
        free(self.engine)

    cdef int check_alive(self) except -1:
        if self.dead:
            raise TstError("this pool belongs to the parent process: after fork() make a new one")
        return 0

    def __repr__(self):
        return f"<TstPool {self.name} {'running' if self.running else 'stopped'} {self.addresses}>"

    @property
    def running(self):
        """True between start() and stop()."""
        return load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING

    @property
    def workers(self):
        """Number of worker threads."""
        return self.n_workers

    @property
    def trigger(self):
        """As it was given: "level", "oneshot" or "edge"."""
        return {number: name for name, number in TRIGGERS.items()}[self.engine.trigger]

    @property
    def addresses(self):
        """(host, port) of each listener; on any thread, also while others listen or stop the pool."""
        return [(host, port) for host, port, _ in list(self.listeners)]

    # -- hooks of the original

    cdef int set_hook(self, str name, object function) except -1:
        self.check_alive()
        with self.mutex:               # else workers might look it up that start right now
            if load32(&self.engine.phase, ACQUIRE) != PHASE_STOPPED:
                raise TstError("hooks are set before start()")
            if function is None:
                self.hooks.pop(name, None)
            else:
                self.hooks[name] = function
        return 0

    def setEventNewConnected(self, f):
        """f(sock) is called for each new connection before its first event, like on_connect. Before start()."""
        self.set_hook("on_connect", None if f is None else with_arity(f, 1, 1))

    def setEventDisconnected(self, f):
        """f(sock) or f(sock, reason) is called before a socket is freed, like on_disconnect. Before start()."""
        self.set_hook("on_disconnect", None if f is None else with_arity(f, 1, 2))

    def setEventMostElapsed(self, f):
        """f(sock) or f(sock, seconds) is called when a job took longer than any before on that worker. Before
        start()."""
        self.set_hook("on_most_elapsed", None if f is None else with_arity(f, 1, 2))

    def setEventIdle(self, f):
        """f(worker_no) is called like on_idle. Before start()."""
        self.set_hook("on_idle", None if f is None else with_arity(f, 1, 1))

    # -- listening and connecting

    @property
    def framing(self):
        """How input is cut into messages, unless a listener or a socket says otherwise."""
        return PyObject_GetItem(self.framings, 0)      # without a GIL, too, beside a listen() that adds to it

    def listen(self, host, port=0, backlog=1024, framing=THE_POOLS, *,
               first_byte_timeout=THE_POOLS, message_timeout=THE_POOLS, idle_timeout=THE_POOLS,
               write_timeout=THE_POOLS, linger_timeout=THE_POOLS, high_water=THE_POOLS, low_water=THE_POOLS,
               max_queued=THE_POOLS, on_overflow=THE_POOLS, auto_pause=THE_POOLS):
        """Listens on an address, before or after start(), any number of times.

        host: a name or address; None or "::" for all addresses, IPv6 and IPv4 by one listener; "unix:/path" for a unix
        socket. port: 0 lets the system choose. backlog: connections that the kernel holds until they are accepted.
        framing: of its connections, the pool's unless given; likewise first_byte_timeout, message_timeout,
        idle_timeout, write_timeout and linger_timeout, in seconds or None; high_water, low_water and max_queued, in
        bytes; on_overflow and auto_pause: all as in TstPool.
        Returns the real (host, port). Raises OSError with the address in its text.

        A listener with options of its own (SO_REUSEPORT, say) is made with `socket`, and handed over with
        addsocket(listener, TstSockType.LISTEN).
        """
        cdef tst_limits *limits
        self.check_alive()
        limits = self.limits_from({
            "first_byte_timeout": first_byte_timeout, "message_timeout": message_timeout, "idle_timeout": idle_timeout,
            "write_timeout": write_timeout, "linger_timeout": linger_timeout, "high_water": high_water,
            "low_water": low_water, "max_queued": max_queued, "on_overflow": on_overflow, "auto_pause": auto_pause})
        used = self.framing if framing is THE_POOLS else framing_from(framing)
        sockets = _net.listening_sockets(host, port, backlog)
        try:
            for listener in sockets if self.keepalive else ():
                _net.keep_alive(listener, self.keepalive)
            address = [self.add_listener(listener, used, limits) for listener in sockets][0]
        except BaseException:
            for listener in sockets:
                _net.discard_listener(listener)
            raise
        self.stop_if_asked()
        return address

    cdef tst_limits *limits_from(self, dict given) except NULL:
        """The limits of a listener's connections, where THE_POOLS stands for the pool's. They live as long as the
        pool."""
        cdef tst_limits *limits
        cdef tst_limits wanted
        cdef dict named = {name: self.limits[name] if value is THE_POOLS else value for name, value in given.items()}
        fill_limits(&wanted, named)
        if named == self.limits and self.engine.limits != NULL:
            return self.engine.limits
        limits = <tst_limits *>malloc(sizeof(tst_limits))
        if limits == NULL:
            raise MemoryError("no memory for a listener")
        limits[0] = wanted
        limits.total = &self.engine.total
        with self.mutex:
            if self.engine.limits == NULL:
                self.engine.limits = limits
            else:
                limits.next = self.engine.limits.next
                self.engine.limits.next = limits
        return limits

    cdef object add_listener(self, object listener, Framing framing, tst_limits *limits):
        address = _net.address_of(listener)
        cdef uint64_t id = 0
        cdef tst_connection *connection
        with self.mutex:
            self.open()
            if framing not in self.framings:
                self.framings.append(framing)          # connections borrow it: it stays for as long as the pool
            framing = self.framings[self.framings.index(framing)]
            connection = self.enter(listener.fileno(), TYPE_LISTEN, 0, &id)
            if connection == NULL:
                raise MemoryError("no slot for the listener")
            connection.framing = framing_pointer(framing)
            connection.limits = limits
            try:
                self.listeners.append((address[0], address[1], id))
                try:
                    listener.setblocking(False)
                    listener.detach()
                except BaseException:
                    self.listeners.pop()
                    raise
            except BaseException:
                withdraw(connection)
                raise
            add32(&self.engine.n_listeners, 1, RELAXED)
            self.begin(id)
        return address

    def connect(self, host, port=0, timeout=10.0, type=TstSockType.CLIENT, handler=None, user_data=None,
                framing=THE_POOLS):
        """Connects to a server, in the calling thread, and adds the connection to the pool.

        timeout: seconds for connecting. Returns the TstSocket. Raises OSError with the address in its text.
        """
        self.check_alive()
        sock = _net.connected_socket(host, port, timeout)
        try:
            if self.keepalive:
                _net.keep_alive(sock, self.keepalive)
            return self.addsocket(sock, type, handler, user_data, framing)
        except BaseException:
            sock.close()
            raise

    def addsocket(self, sock, type=TstSockType.CLIENT, handler=None, user_data=None, framing=THE_POOLS):
        """Puts a connected socket under the pool's care: its messages reach the handler like any other's.

        sock: a socket.socket, which is detached, or a descriptor. It becomes non-blocking and is the pool's to close;
        when the call raises it stays as it was.
        type: its TstSockType; LISTEN adopts a listening socket, without handler and user_data, and returns None.
        handler: as sock.handler. framing: as sock.framing, the pool's unless given. Returns the TstSocket; on_connect
        is called on a worker. Deadlines for input are for accepted connections: this one may be silent for ever.
        Raises ValueError for a socket that is closed, that the pool has already, or that does not listen although it is
        added as LISTEN; TstError while the pool stops; OSError, MemoryError.
        """
        self.check_alive()
        if load32(&self.engine.phase, ACQUIRE) > PHASE_RUNNING:
            raise TstError("the pool is stopping")
        number = TstSockType(type)
        binding = None if handler is None else bind(handler, {})
        used = self.framing if framing is THE_POOLS else framing_from(framing)
        if isinstance(sock, socket.socket):
            return take(self, sock, number, binding, user_data, used)
        view = socket.socket(fileno=operator.index(sock))
        try:
            return take(self, view, number, binding, user_data, used)
        finally:
            view.detach()              # the descriptor is the pool's now, or still the caller's

    cdef TstSocket add(self, object sock, int type, object binding, object user_data, Framing framing):
        cdef uint64_t id = 0
        cdef tst_connection *connection
        cdef TstSocket made
        with self.mutex:
            self.open()
            connection = self.enter(sock.fileno(), type, 0, &id)
            if connection == NULL:
                raise MemoryError("no slot for the socket")
            connection.framing = framing_pointer(framing)
            connection.limits = self.engine.limits
            connection.active_tick = connection.output_tick = tick_of(clock_now())
            try:
                path = read_peer(connection)
                made = make_socket(self, connection)
                adopt(sock)
            except BaseException:
                withdraw(connection)
                raise
            made.peer_path = path
            made.data = user_data
            made.binding = binding
            publish_socket(connection, made)
            add64(&self.added, 1, RELAXED)
            self.begin(id)
        self.stop_if_asked()
        return made

    cdef tst_connection *enter(self, int fd, int type, int shard, uint64_t *id) noexcept:
        """A slot for a descriptor of ours, QUEUED so that nobody touches it until begin()."""
        cdef tst_connection *connection = table_open(&self.engine.table, fd, STATE_QUEUED | PEND_CONNECT, id)
        cdef tst_shard *home = &self.engine.shards[shard]
        cdef int i
        if connection != NULL:
            if type != TYPE_LISTEN:
                for i in range(self.engine.n_shards):
                    if load32(&self.engine.shards[i].open, RELAXED) < load32(&home.open, RELAXED):
                        home = &self.engine.shards[i]
            connection_settle_in(connection, self.engine, home, type)
        return connection

    cdef int begin(self, uint64_t id) except -1:
        cdef tst_connection *connection = table_find(&self.engine.table, id)
        if connection != NULL:
            shard_push(<tst_shard *>load_pointer(&connection.shard, ACQUIRE), connection)
        return 0

    # -- start and stop

    cdef int shards_to_open(self) except -1:
        """As many as were asked for; else one where the GIL lets one thread run handlers at a time, or one a core."""
        if self.engine.shards != NULL:
            return self.engine.n_shards        # connections may still remember theirs from before a stop()
        if self.shards_wanted:
            return min(self.shards_wanted, self.n_workers)
        if gil_is_on() and not (self.binding is not None and self.binding.compiled.handler != NULL):
            return 1
        return min(len(os.sched_getaffinity(0)), self.n_workers)

    cdef int open(self) except -1:
        """Makes the shards' descriptors if they are not there. Mutex held."""
        cdef int i
        cdef tst_shard *shard
        if self.opened:
            return 0
        with WORKERS_END:
            _open.add(self)
        self.n_shards = self.shards_to_open()
        if accept4(-1, NULL, NULL, 0) < 0 and errno == ENOSYS:
            raise system_error(ENOSYS, "this kernel has no accept4, which tstpool needs (Linux 2.6.28 or newer)")
        if self.engine.shards == NULL:
            self.engine.shards = <tst_shard *>calloc(self.n_shards, sizeof(tst_shard))
            if self.engine.shards == NULL:
                raise MemoryError()
            for i in range(self.n_shards):
                pthread_mutex_init(&self.engine.shards[i].mutex, NULL)
                shard = &self.engine.shards[i]
                shard.epoll_fd = shard.event_fd = shard.timer_fd = -1
                shard.no = i
            store32(<uint32_t *>&self.engine.n_shards, <uint32_t>self.n_shards, RELEASE)   # stats() may be looking
        for i in range(self.n_shards):
            shard = &self.engine.shards[i]
            shard.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
            shard.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            shard.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
            shard.alarm = 0
            if (shard.epoll_fd < 0 or shard.event_fd < 0 or shard.timer_fd < 0
                    or sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.event_fd, _EPOLLIN, ID_WAKE) < 0
                    or sys_control(shard.epoll_fd, EPOLL_CTL_ADD, shard.timer_fd, _EPOLLIN, ID_ALARM) < 0):
                failure = system_error(errno, "epoll is not available: " + os.strerror(errno))
                self.close_descriptors()
                raise failure
            shard.draining = shard.aborted = shard.full = False
            memset(&shard.wheel, 0, sizeof(shard.wheel))
            shard.wheel.tick = tick_of(clock_now())
            store32(&shard.done, 0, RELEASE)
        self.opened = True
        return 0

    def start(self):
        """Starts the workers. TstError when they run already or no handler is known; on failure no thread is left."""
        cdef list threads = []
        self.check_alive()
        try:
            with self.mutex:
                self.start_locked(threads)
        except BaseException:
            if threads:                # outside the mutex: it waits for handlers, which may want that
                self.give_up(threads)
            raise
        self.stop_if_asked()

    cdef int start_locked(self, list threads) except -1:
        """Adds the workers' threads to `threads`: from then on there is something to give up."""
        if load32(&self.engine.phase, ACQUIRE) != PHASE_STOPPED or not self.ended.is_set():
            raise TstError("the pool is running already" if self.running else "the pool is still stopping")
        if self.binding is None:
            raise TstError("no handler: give one to TstPool() or create()")
        self.open()
        make_room(self.engine, self.n_workers)
        begin_counting(self, len(self))
        set_binding(self, bind(self.binding.handler, self.hooks))
        self.engine.call_idle = self.binding.on_idle is not None
        self.engine.log_slow = self.engine.slow_handler > 0 and logs_slow(self.binding)
        store64(&self.engine.slow_look, 0, RELEASE)
        self.engine.call_longest = self.binding.on_most_elapsed is not None
        with cython.critical_section(self):
            self.fault = None
        self.live_workers = 0
        made = [threading.Thread(target=self.work, args=(no, self.launch), name=f"{self.name}-{no}", daemon=False)
                for no in range(self.n_workers)]
        threads.extend(made)
        self.ended = RunsEnd(False)
        self.threads = made
        with WORKERS_END:
            if interpreter_ends:
                raise TstError("the interpreter is shutting down")
        store32(&self.engine.phase, PHASE_RUNNING, RELEASE)
        for thread in made:
            thread.start()
        return 0

    cdef int give_up(self, list threads) except -1:
        """A thread can't be had, or Ctrl-C came in the middle: ends those that run, and lets none begin late."""
        with WORKERS_END:
            self.launch += 1
            none = self.live_workers == 0
        if none:
            with self.mutex:
                gone = self.close_down()
            let_sockets_go(gone)
        else:
            self.begin_stop(0)
        for thread in threads:
            while thread in threading.enumerate():     # listed from start() on; join() takes it only once it runs
                try:
                    thread.join()
                except RuntimeError:
                    time.sleep(0.001)
        return 0

    def work(self, no, launch):
        """A worker thread's life. Not for users. `launch`: the start() that it belongs to; it may come too late."""
        cdef Worker worker
        with WORKERS_END:
            if launch != self.launch:
                return
            self.live_workers += 1
        try:
            worker = new_worker(self, no)
            worker.run()
        except BaseException as error:
            if self.dead:
                raise
            log(logging.CRITICAL, "worker %d of %s broke", no, self.name, exc_info=error)
            if worker is not None:     # nobody knows what it has left half done
                worker_broke(worker, error)
            raise
        finally:
            if worker is not None:
                drop_spares(worker.worker)
            if not self.dead:              # of a forked child no other thread is there, but what it held may be
                worker_ends(self)

    cdef int begin_stop(self, uint64_t drain) except -1:
        """Tells every shard to drain, for at most `drain` nanoseconds. Repeating it can only shorten the time."""
        cdef uint64_t until = clock_now() + drain
        cdef int i
        if load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING or until < load64(&self.engine.drain_until, ACQUIRE):
            store64(&self.engine.drain_until, until, RELEASE)
        if load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING:
            store32(&self.engine.phase, PHASE_DRAINING, SEQ_CST)
        for i in range(self.engine.n_shards):
            if self.engine.shards[i].event_fd >= 0:
                sys_wake(self.engine.shards[i].event_fd)
        return 0

    def stop(self, drain=5.0):
        """Stops: no more clients, running handlers finish, queued output is sent, connections close, workers end.

        drain: seconds after which what is still open is cut off; then only handlers are waited for, at most 5 seconds
        more and only as long as they return and others begin. Returns True when everything has ended, False when a
        handler still runs (its worker ends when the handler does; no thread is ever killed). From a handler: starts the
        stop and returns. May be repeated, on several threads at once, and before start(). Listeners are gone then, and
        the file of a unix socket is removed: who starts the pool again calls listen() again.
        """
        cdef uint64_t patience = nanoseconds(drain, "drain")
        cdef list gone = None
        self.check_alive()
        with self.mutex as interrupted:
            if interrupted:            # this thread is in the middle of start() or listen(), which will see to it
                return self.stop_later(patience)
            ended, threads = self.ended, self.threads
            if ended.is_set():
                gone = self.close_down()
            else:
                self.begin_stop(patience)
        if gone is not None:
            let_sockets_go(gone)
            return True
        if threading.current_thread() in threads:
            return False
        if not wait_ended(self, ended, float(drain)):
            return False
        for thread in threads:
            if thread.ident is not None:       # else start() has failed before it
                thread.join()
        return True

    cdef bint stop_later(self, uint64_t drain) except -1:
        """stop(), called by a signal handler or a finalizer on a thread that holds the mutex already."""
        if load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING:
            self.begin_stop(drain)
        else:
            store32(&self.stop_asked, 1, RELAXED)
        return False

    cdef int stop_if_asked(self) except -1:
        """What stop_later() has left, once the mutex is free."""
        if load32(&self.stop_asked, RELAXED):      # if another thread has stopped it meanwhile, that is the stop
            self.stop(0)
        return 0

    cdef int cut_off(self) except -1:
        """Nobody may be left to do it: ends every connection's traffic, so that no peer waits for a stuck handler.
        Mutex held."""
        cdef int chunk, i
        cdef tst_connection *first
        cdef tst_connection *connection
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                spin_lock(&connection.lock)
                if load64(&connection.state, ACQUIRE) & STATE_OPEN:
                    shutdown(connection.fd, SHUT_RDWR)
                spin_unlock(&connection.lock)
        return 0

    cdef list close_down(self):
        """Nobody works any more: gives descriptors back. Mutex held: what is added meanwhile is either closed here, or
        waits for the next start. Returns what let_sockets_go() is to get when the mutex is free."""
        store32(&self.stop_asked, 0, RELAXED)
        for address in self.listeners:
            _net.unlink_socket(address)
        self.listeners.clear()         # the same list: others may be looking at it
        store32(&self.engine.n_listeners, 0, RELAXED)
        gone = self.close_descriptors()
        store32(&self.engine.phase, PHASE_STOPPED, RELEASE)
        with WORKERS_END:
            _open.discard(self)
        self.ended.set()
        return gone

    cdef list close_descriptors(self):
        """Closes what is still open, without a word to anybody: a pool that was never started, what came too late.
        Returns its TstSockets."""
        cdef int chunk, i
        cdef uint64_t word
        cdef list gone = []
        cdef tst_connection *first
        cdef tst_connection *connection
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                spin_lock(&connection.lock)        # cut_off() or waiting() may be about to use the descriptor
                word = load64(&connection.state, ACQUIRE)
                if word & STATE_OPEN:
                    connection_wait_for_flusher(connection)
                    output_drop(connection)
                    input_free(&connection.input)
                    store64(&connection.state, <uint64_t>(generation_of(word) + 1) << 32, RELEASE)
                    close(connection.fd)
                spin_unlock(&connection.lock)
                if word & STATE_OPEN:
                    gone.append(take_socket(connection))
        self.drop_all_litter()
        for i in range(self.engine.n_shards):
            close_once(&self.engine.shards[i].epoll_fd)
            close_once(&self.engine.shards[i].event_fd)
            close_once(&self.engine.shards[i].timer_fd)
            store_pointer(&self.engine.shards[i].requests, NULL, RELEASE)
            self.engine.shards[i].todo = NULL
            self.engine.shards[i].listeners = NULL
            self.engine.shards[i].accept_again = 0
            self.engine.shards[i].batch = NULL
            store64(&self.engine.shards[i].token, 0, RELEASE)      # a worker that broke may have had it
            store32(&self.engine.shards[i].open, 0, RELEASE)
        self.opened = False
        return gone

    cdef void abandon(self) noexcept:
        """In a forked child: the workers are gone, in the middle of anything. Closes descriptors, lets go of every lock
        that they held, and touches nothing else: what they were changing may be half done."""
        cdef int chunk, i
        cdef tst_connection *first
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                store32(&first[i].lock, 0, RELEASE)
                first[i].closing = True        # who has forked may be its handler: no more messages are for that
                if load64(&first[i].state, ACQUIRE) & STATE_OPEN:
                    close(first[i].fd)
                    store64(&first[i].state, <uint64_t>(generation_of(first[i].state) + 1) << 32, RELEASE)
        for i in range(self.engine.n_shards):
            store32(&self.engine.shards[i].stock.lock, 0, RELEASE)
            store32(&self.engine.shards[i].open, 0, RELEASE)
            close_once(&self.engine.shards[i].epoll_fd)
            close_once(&self.engine.shards[i].event_fd)
            close_once(&self.engine.shards[i].timer_fd)
        self.opened = False

    cdef void drop_all_litter(self) noexcept:
        cdef int i
        for i in range(self.engine.n_shards):
            if stock_has_litter(&self.engine.shards[i].stock):
                drop_litter(&self.engine.shards[i].stock)

    cdef void free_memory(self) noexcept:
        cdef tst_batch *batch
        cdef tst_limits *limits
        cdef int i
        while self.engine.limits != NULL:
            limits = self.engine.limits
            self.engine.limits = limits.next
            free(limits)
        while self.engine.batches != NULL:
            batch = self.engine.batches
            self.engine.batches = batch.next
            scratch_leave(batch.scratch)
            free(batch)
        for i in range(TABLE_CHUNKS):
            free(self.engine.table.chunks[i])
        for i in range(self.engine.n_shards):
            stock_free(&self.engine.shards[i].stock)
            pthread_mutex_destroy(&self.engine.shards[i].mutex)
        free(self.engine.shards)
        free(self.engine.workers)
        for i in range(self.engine.n_outgrown):
            free(self.engine.outgrown[i])

    def _forked(self):
        """In a forked child: the pool is dead here, and peers must see the end when the parent closes."""
        self.dead = True
        self.abandon()
        store32(&self.engine.phase, PHASE_STOPPED, RELEASE)
        self.ended = RunsEnd(True)
        self.threads = []

    def serve_forever(self, drain=5.0):
        """Starts if need be, and blocks until stop(). On KeyboardInterrupt it stops, then raises it on.

        Raises the OSError that ended the engine, if one did. Returns at once when the interpreter is shutting down.
        """
        if interpreter_ends:
            return
        if not self.running:
            self.start()
        try:
            with self.mutex:
                ended = self.ended
            # In slices: a signal between CPython's last look for one and its wait would be noticed only with the next.
            while not ended.wait(0.1):
                pass
        except BaseException:
            self.stop(drain)
            raise
        with cython.critical_section(self):
            fault = self.fault
        if fault is not None:
            raise fault

    def __enter__(self):
        if not self.running:
            self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def create(self, thread_count, bind_ip, bind_port, func, max_recv_size=4096, max_send_size=4096):
        """The original's start: a handler, a listener and the workers in one call.

        thread_count: workers. bind_ip: None or "" for all addresses. bind_port: 0 for no listener. func: function of
        one socket, or a TstHandler. max_recv_size, max_send_size: bytes in each socket's buffers. Returns True. Raises
        OSError with the address in its text; then no thread is left.
        """
        self.check_alive()
        with self.mutex:
            if not self.ended.is_set():
                raise TstError("the pool is running already")
            n_workers = positive(thread_count, "thread_count")
            binding = bind(func, {})
            self.max_recv_size, self.max_send_size = (positive(max_recv_size, "max_recv_size"),
                                                      positive(max_send_size, "max_send_size"))
            self.n_workers = n_workers
            set_binding(self, binding)
        if bind_port:
            self.listen(bind_ip or None, bind_port)
        try:
            self.start()
        except BaseException:
            self.stop(0)
            raise
        return True

    def destroy(self, wait_time=5.0):
        """The original's name for stop(drain=wait_time)."""
        return self.stop(wait_time)

    # -- acting on connections

    cdef tst_connection *find(self, object which, uint32_t *generation) except? NULL:
        """The open connection that a TstSocket, an id or a descriptor names; NULL when there is none (any more)."""
        cdef tst_connection *connection
        cdef bint is_channel
        cdef uint64_t id
        self.check_alive()
        if isinstance(which, TstSocket):
            if (<TstSocket>which).pool is not self:
                return NULL
            id = (<TstSocket>which).id
        else:
            number = which.__index__() if hasattr(which, "__index__") else None
            if number is None:
                raise TypeError(f"a TstSocket, an id or a descriptor is wanted, not {which!r}")
            if not 0 <= number <= 0xffffffffffffffff:
                return NULL
            id = number
        connection = table_find(&self.engine.table, id)
        if connection == NULL:
            return NULL
        generation[0] = generation_of(id) or generation_of(load64(&connection.state, ACQUIRE))
        spin_lock(&connection.lock)
        is_channel = connection_is(connection, generation[0]) and connection.type != TYPE_LISTEN
        spin_unlock(&connection.lock)
        return connection if is_channel else NULL

    def need_send(self, sock_or_sd):
        """Asks that a worker call the socket's handler with EPOLLOUT, as soon as the kernel takes output for it; what
        its `send_data` asks for is sent first. Returns False when the connection is gone or closing."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sock_or_sd, &generation)
        return connection != NULL and connection_need_send(connection, generation) == 0

    def closesocket(self, sock_or_sd):
        """Closes a connection, as TstSocket.close(). Returns True for the call that began it."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sock_or_sd, &generation)
        if connection == NULL or connection_close_output(connection, generation) != 1:
            return False
        shard_ask(connection, generation, PEND_CLOSE)
        return True

    def broadcast(self, data, exclude=None, where=None):
        """Sends the same bytes to every connection. exclude: a TstSocket, or several. where: a function of one socket
        that says whether it is to get them. Returns how many connections it was queued for; those that are closed, or
        have too much waiting, are left out."""
        if isinstance(exclude, TstSocket):
            exclude = (exclude,)
        left_out = set() if exclude is None else set(exclude)
        cdef bytes payload = data if type(data) is bytes else bytes(contiguous(data))
        cdef tst_shared *shared = shared_new(PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload))
        cdef int reached = 0
        cdef ssize_t queued
        self.check_alive()
        if shared == NULL:
            raise MemoryError("no memory for the broadcast")
        try:
            for sock in self.snapshot():
                if (left_out and sock in left_out) or (where is not None and not where(sock)):
                    continue
                queued = (<TstSocket>sock).append(shared.bytes, shared.size, shared, False)
                if queued >= 0:
                    reached += 1
                elif queued != -ENOTCONN and queued != -ENOBUFS:
                    check(queued, "no memory to queue output")
        finally:
            shared_leave(shared, NULL)
        return reached

    cdef list snapshot(self):
        cdef list found = []
        cdef int chunk, i
        cdef tst_connection *first
        cdef tst_connection *connection
        cdef PyObject *held
        for chunk in range(TABLE_CHUNKS):
            first = table_chunk(&self.engine.table, chunk)
            for i in range(TABLE_CHUNK if first != NULL else 0):
                connection = first + i
                spin_lock(&connection.lock)
                held = connection.sock
                if held != NULL:
                    Py_INCREF(<object>held)
                spin_unlock(&connection.lock)
                if held != NULL:
                    found.append(<object>held)
                    Py_DECREF(<object>held)
        return found

    def sockets(self):
        """The open connections, a snapshot; listeners are not among them."""
        self.check_alive()
        return self.snapshot()

    def waiting(self):
        """How many connections have input that no worker has fetched yet: the length of the queue, which is the
        kernel's. It asks the kernel for each one in turn, so it is for a look now and then. Paused ones do not count.
        """
        cdef int chunk, i
        cdef int n = 0
        cdef tst_connection *first
        self.check_alive()
        with nogil:
            for chunk in range(TABLE_CHUNKS):
                first = table_chunk(&self.engine.table, chunk)
                for i in range(TABLE_CHUNK if first != NULL else 0):
                    n += connection_waits(first + i)
        return n

    def __len__(self):
        """Open connections, listeners not counted."""
        cdef int i
        cdef int total = 0
        for i in range(<int>load32(<uint32_t *>&self.engine.n_shards, ACQUIRE)):
            total += <int>load32(&self.engine.shards[i].open, RELAXED)
        return max(0, total - len(self.listeners))

    def __bool__(self):
        return True

    def __getitem__(self, sd):
        """The open connection with that descriptor, or that 64-bit id. KeyError when there is none."""
        cdef uint32_t generation = 0
        cdef tst_connection *connection = self.find(sd, &generation)
        cdef PyObject *held = NULL
        if connection != NULL:
            spin_lock(&connection.lock)
            if connection_is(connection, generation):
                held = connection.sock
                if held != NULL:
                    Py_INCREF(<object>held)
            spin_unlock(&connection.lock)
        if held == NULL:
            raise KeyError(sd)
        sock = <object>held
        Py_DECREF(sock)
        return sock

    def stats(self):
        """The pool's counters since start(): a PoolStats, a snapshot taken while workers go on.

        May be called on any thread. While another one starts the pool anew, it waits and looks again: two runs are
        never added up.
        """
        cdef uint32_t before
        self.check_alive()
        while True:
            before = load32(&self.engine.counters_version, ACQUIRE)
            if before % 2 == 0:
                snapshot = look_at_counters(self)
                # Adding nothing: what was read above can't be read after it.
                if add32(&self.engine.counters_version, 0, ACQ_REL) == before:
                    return snapshot
            else:
                sched_yield()          # a few stores, that somebody is in the middle of

    cdef object worker_stats(self, int no):
        cdef tst_worker *worker = worker_at(self.engine, no)
        cdef uint64_t since = load64(&worker.waiting_since, RELAXED)
        cdef uint64_t now = clock_now()
        cdef uint64_t idle = load64(&worker.stats.idle_count, RELAXED)
        if since and now > since:
            idle += (now - since) // self.engine.idle_time
        return WorkerStats(
            thread_no=no, exec_count=load64(&worker.stats.exec_count, RELAXED), idle_count=idle,
            sum_time=load64(&worker.stats.sum_time, RELAXED) / 1e9,
            most_elapsed=load64(&worker.stats.most_elapsed, RELAXED) / 1e9,
            begin_time=load64(&worker.stats.begin_time, RELAXED) / 1e9,
            end_time=load64(&worker.stats.end_time, RELAXED) / 1e9)


cdef bint wait_ended(TstPool pool, object ended, double drain) except -1:
    """Waits for the workers of that run: through the drain, then for as long as they make progress."""
    if ended.wait(drain + 0.05):
        return True
    with pool.mutex:
        if not ended.is_set():         # else another thread may have started the pool anew
            pool.cut_off()
    for _ in range(100):
        before = worker_calls(pool.engine)
        if ended.wait(0.05):
            return True
        after = worker_calls(pool.engine)
        if before == after and any(calls % 2 for calls in after):
            return False               # nothing moves, and somebody is inside a handler
    return ended.is_set()


cdef object look_at_counters(TstPool pool):
    """Adds up what the workers have counted."""
    cdef tst_stats sum
    cdef uint64_t *counters
    cdef int i
    cdef size_t k
    workers = []
    memset(&sum, 0, sizeof(sum))
    for i in range(worker_count(pool.engine)):
        counters = <uint64_t *>&worker_at(pool.engine, i).stats
        for k in range(sizeof(tst_stats) // sizeof(uint64_t)):
            (<uint64_t *>&sum)[k] += load64(counters + k, RELAXED)
        workers.append(pool.worker_stats(i))
    return PoolStats(
        connections=len(pool), listeners=len(pool.listeners), accepted=sum.accepted,
        added=load64(&pool.added, RELAXED), closed=sum.closed, messages=sum.messages, bytes_in=sum.bytes_in,
        bytes_out=sum.bytes_out + load64(&pool.bytes_outside, RELAXED), spins=sum.spins,
        slow_calls=sum.slow_count, stale_events=sum.stale_gone + sum.stale_reused, stale_reused=sum.stale_reused,
        accept_errors=sum.accept_errors, controls=sum.controls, accept_pauses=sum.accept_pauses,
        rejected_connections=sum.rejected, idle_closed=sum.deadline_closed[DEADLINE_IDLE],
        first_byte_closed=sum.deadline_closed[DEADLINE_FIRST_BYTE],
        message_closed=sum.deadline_closed[DEADLINE_MESSAGE], write_closed=sum.deadline_closed[DEADLINE_WRITE],
        linger_closed=sum.deadline_closed[DEADLINE_CLOSE] + sum.deadline_closed[DEADLINE_LINGER],
        too_large_closed=sum.too_large_closed, auto_pauses=load64(&pool.engine.total.pressed, RELAXED),
        overflow_closed=load64(&pool.engine.total.overflow_closed, RELAXED),
        overflow_refused=load64(&pool.engine.total.overflow_refused, RELAXED),
        bytes_queued=load64(&pool.engine.total.queued, RELAXED), workers=tuple(workers))


cdef void worker_begin(tst_worker *worker, int no) noexcept nogil:
    """As new, whoever had that number before. Others may be reading its counters."""
    cdef uint64_t *counters = <uint64_t *>&worker.stats
    cdef size_t i
    for i in range(sizeof(tst_stats) // sizeof(uint64_t)):
        store64(counters + i, 0, RELAXED)
    store64(&worker.calls, 0, RELEASE)
    store64(&worker.waiting_since, 0, RELAXED)
    store64(&worker.slow_calls, 0, RELAXED)
    store64(&worker.slow_since, 0, RELAXED)
    store64(&worker.slow_logged, 0, RELAXED)
    worker.no = no
    worker.ident = 0
    worker.current = NULL
    worker.left = NULL
    worker.since = worker.clock = worker.looked_calls = 0
    worker.tid = worker.last_shard = worker.accept_errno = worker.looks = 0
    worker.lost = False
    worker.ticks.scale = tick_scale()
    worker.group = 1


cdef int make_room(tst_engine *engine, int n) except -1:
    """Memory for so many workers. What is outgrown stays: stats() may be reading it on any thread."""
    cdef int room = max(n, 2 * engine.workers_room)
    cdef tst_worker *workers
    if n > engine.workers_room:
        workers = <tst_worker *>calloc(room, sizeof(tst_worker))
        if workers == NULL:
            raise MemoryError()
        if engine.workers != NULL:
            engine.outgrown[engine.n_outgrown] = engine.workers
            engine.n_outgrown += 1
        store_pointer(<void **>&engine.workers, workers, RELEASE)
        engine.workers_room = room
    return 0


cdef void make_workers(tst_engine *engine, int n) noexcept nogil:
    """So many workers, all as new."""
    cdef int no
    for no in range(n):
        worker_begin(&engine.workers[no], no)
        engine.workers[no].group_most = GROUP_MOST if engine.slow_handler > LONG_GROUP else 1
        engine.workers[no].burst = engine.messages_per_turn
    store32(<uint32_t *>&engine.n_workers, <uint32_t>n, RELEASE)


cdef void begin_counting(TstPool pool, uint64_t added) noexcept:
    """All counters begin anew, under an odd version. What was added already will be closed in this run."""
    add32(&pool.engine.counters_version, 1, ACQ_REL)
    make_workers(pool.engine, pool.n_workers)
    store64(&pool.added, added, RELAXED)
    store64(&pool.bytes_outside, 0, RELAXED)
    store64(&pool.engine.total.overflow_closed, 0, RELAXED)
    store64(&pool.engine.total.pressed, 0, RELAXED)
    store64(&pool.engine.total.overflow_refused, 0, RELAXED)
    add32(&pool.engine.counters_version, 1, RELEASE)


cdef list worker_calls(tst_engine *engine):
    cdef int no
    return [load64(&worker_at(engine, no).calls, ACQUIRE) for no in range(worker_count(engine))]


cdef int worker_count(tst_engine *engine) noexcept nogil:
    """Of the last start(); for threads that are none of its workers, and so may see the next one."""
    return <int>load32(<uint32_t *>&engine.n_workers, ACQUIRE)


cdef tst_worker *worker_at(tst_engine *engine, int no) noexcept nogil:
    """One of them; for the same threads, as start() may be making room for more."""
    return <tst_worker *>load_pointer(<void **>&engine.workers, ACQUIRE) + no


cdef int set_binding(TstPool pool, Binding binding) except -1:
    with cython.critical_section(pool):        # sock.handler may be asked for on any thread
        pool.binding = binding
    return 0


cdef uint64_t BEGAN = clock_now()
cdef uint64_t BEGAN_TICKS = tst_ticks()


cdef bint kernel_counts_ticks() noexcept:
    """The kernel takes its own time from the processor's counter: then it is steady, and the same on each core."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as file:
            return file.read().strip() in ("tsc", "arch_sys_counter")
    except OSError:
        return False


cdef uint64_t tick_scale() noexcept nogil:
    """Nanoseconds in a tick, times 2**32; 0 where ticks are not to be trusted."""
    cdef uint64_t elapsed = clock_now() - BEGAN
    cdef uint64_t ticks = tst_ticks() - BEGAN_TICKS
    if ticks == 0 or not TICKS_COUNT:
        return 0
    while elapsed < 5000000:       # two readings of the clock, each good to some 50 ns, over 5 ms: an error of 1e-5
        elapsed = clock_now() - BEGAN
        ticks = tst_ticks() - BEGAN_TICKS
    return <uint64_t>(<double>elapsed / <double>ticks * 4294967296.0)


cdef bint TICKS_COUNT = kernel_counts_ticks()


# Guards the pools' counts of live workers, and `interpreter_ends`.
WORKERS_END = threading.RLock()        # a signal handler may come while the same thread holds it
cdef bint interpreter_ends = False


cdef void close_once(int *fd) noexcept:
    if fd[0] >= 0:
        close(fd[0])
    fd[0] = -1


cdef object usual_max_connections():
    """Redis' rule: some descriptors are left for everything else."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(10000, 10000 if soft == resource.RLIM_INFINITY else soft - 32))


cdef uint32_t ticks_from(object seconds, str name) except? 0:
    """A limit in ticks of the wheel, rounded up; 0 for None. One more, for it begins within a tick."""
    cdef uint64_t number
    if seconds is None:
        return 0
    number = nanoseconds(seconds, name)
    if not 0 < number <= <uint64_t>4000000 * NANOSECOND:
        raise ValueError(f"{name} must be more than 0 seconds and at most 4,000,000, or None: {seconds}")
    return <uint32_t>((number >> TICK_BITS) + 2)


cdef dict OVERFLOWS = {"raise": OVERFLOW_REFUSE, "block": OVERFLOW_BLOCK, "close": OVERFLOW_CLOSE}


cdef int fill_limits(tst_limits *limits, dict given) except -1:
    """Limits as the engine has them, from what a user gave by the names of TstPool's parameters."""
    memset(limits, 0, sizeof(tst_limits))
    if given["linger_timeout"] is None:
        raise ValueError("linger_timeout must be a number of seconds: a closing connection may not wait for ever")
    limits.first_byte = ticks_from(given["first_byte_timeout"], "first_byte_timeout")
    limits.message = ticks_from(given["message_timeout"], "message_timeout")
    limits.idle = ticks_from(given["idle_timeout"], "idle_timeout")
    limits.write = ticks_from(given["write_timeout"], "write_timeout")
    limits.linger = ticks_from(given["linger_timeout"], "linger_timeout")
    limits.high_water = size_from(given["high_water"], "high_water")
    limits.low_water = size_from(given["low_water"], "low_water")
    limits.max_queued = limit_from(given["max_queued"], "max_queued")
    limits.auto_pause = bool(given["auto_pause"])
    if given["on_overflow"] not in OVERFLOWS:
        raise ValueError(f"on_overflow must be 'raise', 'block' or 'close': {given['on_overflow']!r}")
    limits.overflow = OVERFLOWS[given["on_overflow"]]
    if limits.low_water > limits.high_water or (limits.max_queued and limits.high_water > limits.max_queued):
        raise ValueError("low_water <= high_water <= max_queued must hold: "
                         f"{given['low_water']}, {given['high_water']}, {given['max_queued']}")
    return 0


cdef object take(TstPool pool, object sock, object type, object binding, object user_data, Framing framing):
    """addsocket() for a socket.socket, which is detached unless this fails."""
    if sock.fileno() < 0:
        raise ValueError("the socket is closed")
    if table_find(&pool.engine.table, sock.fileno()) != NULL:
        raise ValueError("the pool has that descriptor already")
    if type != TYPE_LISTEN:
        return pool.add(sock, type, binding, user_data, framing)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError("the socket does not listen")
    pool.add_listener(sock, framing, pool.engine.limits)
    return None


cdef int withdraw(tst_connection *connection) except -1:
    """Undoes enter() before begin(): nobody has heard of the connection, and its descriptor is not ours."""
    cdef uint32_t *open = connection.shard_open
    spin_lock(&connection.lock)
    store64(&connection.state, <uint64_t>(generation_of(load64(&connection.state, ACQUIRE)) + 1) << 32, RELEASE)
    spin_unlock(&connection.lock)
    sub32(open, 1, RELEASE)
    return 0


cdef int adopt(object sock) except -1:
    """Makes a socket.socket's descriptor fit for the engine, and takes it out."""
    sock.setblocking(False)
    os.set_inheritable(sock.fileno(), False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sys_prepare(sock.fileno())
    sock.detach()
    return 0


cdef object read_peer(tst_connection *connection):
    """Asks the kernel for the peer of a socket that somebody else connected. Returns a unix socket's "unix:path"."""
    cdef bytes raw
    try:
        with socket.socket(fileno=os.dup(connection.fd)) as copy:
            family, address = copy.family, copy.getpeername()
    except OSError:
        return None
    if family == socket.AF_UNIX:
        return _net.UNIX_PREFIX + os.fsdecode(address) if address else None
    if family == socket.AF_INET:
        raw = address[1].to_bytes(2, "big") + socket.inet_pton(family, address[0])
    elif family == socket.AF_INET6:
        raw = (address[1].to_bytes(2, "big") + bytes(4) + socket.inet_pton(family, address[0].partition("%")[0])
               + address[3].to_bytes(4, sys.byteorder))
    else:
        return None
    connection.peer.family = family
    memcpy(connection.peer.bytes, <const char *>raw, <size_t>len(raw))
    return None


# -------------------------------------------------------------------------------------------------- workers

@cython.final
cdef class Loan:
    """Bytes of the input, read-only, for as long as a handler's call lasts. If the handler keeps a part of the view
    beyond that, the memory is not used again until it lets go."""

    cdef const char *bytes                 # borrowed until the handler returns, then NULL
    cdef size_t size
    cdef uint32_t exports                  # views that are held
    cdef tst_scratch *scratch              # counted: held for views that were kept
    cdef char *storage                     # owned: the same

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("not to be made by hand")

    def __dealloc__(self):
        scratch_leave(self.scratch)
        free(self.storage)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        # Without a GIL: another thread may ask, by view.obj, or let a part go, while the handler returns.
        with cython.critical_section(self):
            if self.bytes == NULL:
                raise BufferError("the message is gone: its handler has returned")
            PyBuffer_FillInfo(buffer, self, <void *>self.bytes, <Py_ssize_t>self.size, True, flags)
            self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        with cython.critical_section(self):
            self.exports -= 1

    cdef int end(self, tst_connection *connection, tst_batch *batch) except -1:
        """The call is over. What is kept takes the memory with it."""
        cdef tst_input *input = &connection.input
        cdef bint kept
        with cython.critical_section(self):
            self.bytes = NULL
            kept = self.exports != 0
        if not kept:
            return 0
        if not input_is_stored(input):
            self.scratch = batch.scratch
            add32(&batch.scratch.users, 1, RELAXED)
            return 0
        self.storage = input.storage
        input.storage = NULL
        input.capacity = 0
        check(input_keep(input), "no memory for input")
        return 0


cdef char NOWHERE = 0


cdef Loan new_loan(const char *bytes, size_t size):
    cdef Loan loan = Loan.__new__(Loan, POOLS_KEY)
    loan.bytes = bytes if bytes != NULL else &NOWHERE      # an empty message may lie nowhere
    loan.size = size
    return loan


cdef int release_view(object view) except -1:
    """From here on using the view raises. Refused while somebody has a buffer of it, like an array: that one stays
    valid."""
    try:
        view.release()
    except BufferError:
        pass
    return 0


@cython.final
cdef class Worker:
    """One worker thread: parks, takes a shard, turns, runs handlers, until the pool has stopped. The only thing that
    touches its tst_worker, except for readers of counters."""

    cdef TstPool pool
    cdef Binding binding                   # its own copy, so that workers do not share reference counts
    cdef tst_engine *engine                # borrowed from the pool
    cdef tst_worker *worker                # borrowed from the engine
    cdef tst_batch *batch                  # borrowed: the one whose entries it runs
    cdef double complained                 # when accept's failure was last logged

    cdef int run(self) except -1:
        cdef tst_shard *shard = NULL
        cdef bint taken_over = False
        cdef int parked
        while True:
            with nogil:
                parked = engine_park(self.engine, self.worker, &shard, &taken_over)
            if parked == PARK_END:
                return 0
            if parked == PARK_IDLE:
                self.idle(NULL)
                shard = NULL
            while shard != NULL:
                shard = self.serve(shard, &taken_over)
            if self.pool.dead:
                return 0                   # a handler has forked, and this is the child

    cdef tst_shard *serve(self, tst_shard *shard, bint *taken_over) except? NULL:
        """Turns a shard until it is taken over by another worker, or has ended, or another shard needs us more.

        Returns that other shard (`taken_over` then), or NULL: there may be a free one to be had by parking.
        """
        cdef tst_batch *batch
        cdef tst_shard *other = NULL
        cdef int turn
        cdef bint ran = False
        batch = self.resume(shard) if taken_over[0] else batch_get(self.engine)
        if batch == NULL:
            if not taken_over[0]:          # no memory: somebody else may have a batch, or we the next time
                log(logging.ERROR, "worker %d of %s has no memory to poll with", self.worker.no, self.pool.name)
                time.sleep(0.01)
                with nogil:
                    shard_yield(self.engine, self.worker, shard)
            return NULL
        taken_over[0] = False
        self.worker.since = clock_now()
        shard.batch = batch
        while True:
            with nogil:
                turn = shard_turn(self.engine, self.worker, shard, batch, ran)
            ran = False
            if turn == TURN_RUN:
                if stock_has_litter(&shard.stock):
                    drop_litter(&shard.stock)
                self.run_batch(shard, batch)
                if self.pool.dead:
                    return NULL
                if self.worker.spare_votes == SPARE_VOTES:
                    self.make_spares()
                if self.worker.accept_errno:
                    self.complain()
                ran = True
            elif turn == TURN_LOST:
                batch_leave(self.engine, batch, 1)     # the token's use goes with the token
                return NULL
            elif turn == TURN_ENDED:
                shard.batch = NULL
                batch_leave(self.engine, batch, 2)
                with nogil:
                    engine_shard_ended(self.engine, shard)
                return NULL
            elif turn == TURN_ELSEWHERE:
                with nogil:
                    other = engine_look(self.engine, self.worker)
                if other == NULL and not turn_elsewhere(self.engine, shard) & ELSEWHERE_FREE:
                    continue
                taken_over[0] = other != NULL
                shard.batch = NULL
                batch_leave(self.engine, batch, 2)
                with nogil:
                    shard_yield(self.engine, self.worker, shard)
                return other
            elif turn == TURN_IDLE:
                self.idle(shard)
                ran = True
            elif turn == TURN_SLOW:
                self.log_slow(shard)
                ran = True
            elif turn == TURN_COMPLAIN:
                self.complain()
            elif turn == TURN_LITTER:
                drop_litter(&shard.stock)
            else:
                fault = system_error(-turn, "epoll_wait: " + os.strerror(-turn))
                log(logging.CRITICAL, "%s stops: %s", self.pool.name, fault)
                stop_for(self.pool, fault)

    cdef int make_spares(self) except -1:
        """Objects for the large messages of the next turn, which are likely to be of the size of the last ones."""
        cdef tst_worker *worker = self.worker
        cdef tst_shared *spare
        if worker.spares != NULL and worker.spares.size != worker.spare_size:
            drop_spares(worker)
        while (worker.spares_left + 1) * worker.spare_size <= SPARES_MOST:
            try:
                spare = share_object(PyBytes_FromStringAndSize(NULL, <Py_ssize_t>worker.spare_size))
            except MemoryError:
                return 0                   # messages are received where there is room, as others are
            spare.next = worker.spares
            worker.spares = spare
            worker.spares_left += 1
        return 0

    cdef tst_batch *resume(self, tst_shard *shard) except? NULL:
        """Goes on where a stuck worker was: its batch's handlers that have not run, then the events it did not get to.

        Returns a batch of our own with those events, or NULL when the shard was taken from us in turn.
        """
        cdef tst_batch *stuck = shard.batch
        cdef tst_batch *own
        cdef bint kept
        add32(&stuck.users, 1, ACQUIRE)
        with nogil:
            batch_detach(stuck, &self.worker.stats)
        self.run_batch(shard, stuck)
        if self.pool.dead:
            return NULL
        with nogil:
            batch_finish(self.worker, stuck, clock_now())
            kept = shard_leave_running(self.worker, shard)
        if not kept:
            batch_leave(self.engine, stuck, 1)
            return NULL
        own = batch_get(self.engine)
        while own == NULL:             # events must not be lost: wait until there is memory
            time.sleep(0.01)
            own = batch_get(self.engine)
        own.n_events = stuck.n_events - stuck.next_event
        memcpy(own.events, stuck.events + stuck.next_event, <size_t>own.n_events * sizeof(own.events[0]))
        batch_leave(self.engine, stuck, 2)
        return own

    cdef int run_batch(self, tst_shard *shard, tst_batch *batch) except -1:
        """Runs the handlers of the entries that nobody else runs. Replies that wait for long are sent in between."""
        cdef int i
        cdef tst_entry *left = self.worker.left
        cdef uint64_t flushed = tick_now(&self.worker.ticks)
        self.worker.clock = flushed
        self.batch = batch
        if left != NULL:
            self.worker.left = NULL
            self.run_one(shard, left)
            if self.pool.dead or not token_held(shard, self.worker.no):
                return 0
        for i in range(batch.n_entries):
            if not self.run_one(shard, &batch.entries[i]):
                continue
            if self.pool.dead or not token_held(shard, self.worker.no):
                return 0
            if self.worker.clock - flushed >= RUN_TIME:
                with nogil:
                    batch_finish(self.worker, batch, self.worker.clock)
                self.worker.clock = flushed = tick_now(&self.worker.ticks)
        return 0

    cdef bint run_one(self, tst_shard *shard, tst_entry *entry) except -1:
        """False: another thread runs the entry, or has run it, or it has nothing to be run."""
        if not entry_move(entry, ENTRY_QUEUED, ENTRY_RUNNING):
            return False
        if not token_held(shard, self.worker.no):
            # Who took the shard over may have looked at the entry before it was RUNNING (batch_detach).
            connection_mark(entry.connection, STATE_DETACHED, True, STATE_OWNED, entry.generation)
        try:
            self.run_entry(entry)
        except BaseException as error:
            if self.pool.dead:
                raise
            self.drop_entry(entry, error)
        finally:
            self.worker.current = NULL
            store32(&entry.state, ENTRY_RAN, RELEASE)
        return True

    cdef int drop_entry(self, tst_entry *entry, object error) except -1:
        """Something failed outside a handler, for want of memory most likely: this connection ends, the worker goes
        on."""
        cdef tst_connection *connection = entry.connection
        cdef bint no_memory = isinstance(error, MemoryError)
        if not no_memory:
            log(logging.ERROR, "the connection with socket %d is broken", connection.fd, exc_info=error)
        if self.worker.calls % 2:
            worker_leave(self.worker)
        connection_break(connection, ENOMEM if no_memory else EIO)
        connection_keep_input(connection)
        if connection.sock == NULL or (connection.closing and not no_memory):
            entry.what = DO_RETIRE     # no handler has heard of it, or it was its end that failed
            forget_socket(connection)
        return 0

    cdef int run_entry(self, tst_entry *entry) except -1:
        """All that is due for one connection: connect, writable, messages, disconnect, in this order."""
        cdef tst_connection *connection = entry.connection
        cdef TstSocket sock
        cdef uint32_t due = entry.what
        store32(<uint32_t *>&connection.thread_no, <uint32_t>self.worker.no, RELAXED)
        self.worker.current = connection
        sock = <TstSocket>connection.sock if connection.sock != NULL else new_socket(self.pool, connection)
        if due & DO_CONNECT:
            self.adopt_binding(sock)
            self.connect(sock)
        if connection.report:
            self.report(sock)
        if due & DO_BODY:
            self.make_body(sock)
        if due & DO_WRITABLE and not connection.closing:
            self.writable(sock)
        if not due & DO_CONNECT:
            self.read_messages(sock, connection.events)
            due = connection_due(connection)
        elif connection.closing:
            due = connection_due(connection)
        if self.pool.dead:
            return 0
        if due & DO_DISCONNECT and self.disconnect(sock):
            entry.what = DO_RETIRE
        else:
            connection_keep_input(connection)
        return 0

    cdef Binding binding_of(self, TstSocket sock):
        """The socket's handler as it is now; the pool's as this worker's own copy of it."""
        if load32(&sock.connection.rebind, RELAXED) and sock.connection.body == NULL:
            self.adopt_binding(sock)
        return self.binding if sock.active is None else sock.active

    cdef int make_body(self, TstSocket sock) except -1:
        """A long message has begun: from here on it is received straight into the object that the handler gets."""
        cdef tst_connection *connection = sock.connection
        cdef size_t have
        if not connection_wants_body(connection):
            return 0
        have = connection.input.size - connection.frame.begin
        try:
            body = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>connection.frame.size)
            connection.body = share_object(body)
        except MemoryError as error:
            self.failed(sock, self.binding_of(sock), error)
            return 0
        memcpy(PyBytes_AS_STRING(body), connection.input.view + connection.frame.begin, have)
        connection.body_size = have
        input_consume(&connection.input, connection.input.size)
        return 0

    cdef int adopt_binding(self, TstSocket sock) except -1:
        """The connection is new, or its sock.handler was assigned: from here on that is its handler."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding, source
        store32(&connection.rebind, 0, SEQ_CST)        # before the look: what is assigned later sets it again
        with cython.critical_section(sock):
            binding = sock.binding
        source = self.pool.binding if binding is None else binding
        if source.compiled.handler != <void *>sock.state_handler:
            free_state(sock)
            if source.compiled.handler != NULL and make_state(sock, <TstNogilHandler>source.compiled.handler) < 0:
                connection_break(connection, ENOMEM)
                connection_begin_close(connection)
        connection.compiled = NULL if sock.state_handler is None else &source.compiled
        sock.active = binding
        connection.passed_on = 0           # the handler that was there before has done it
        # Not a function or a compiled handler: there EPOLLOUT answers need_send or SEND, and nothing else.
        connection.tell_room = connection.compiled == NULL and source.on_writable is not None
        return 0

    cdef bint connect(self, TstSocket sock) except -1:
        """on_connect. A connection that is refused closes like any other, but was never connected for on_disconnect."""
        cdef Binding binding = self.binding_of(sock)
        cdef object hook = binding.on_connect if binding.on_connect is not None else self.binding.on_connect
        cdef int stat = TST_RUN
        if sock.connection.closing or load32(&self.engine.phase, ACQUIRE) != PHASE_RUNNING:
            connection_begin_close(sock.connection)
            return False
        sock.connection.connected = True
        if sock.connection.compiled != NULL:
            stat = self.notify(sock, sock.connection.compiled.connected)
        if stat != TST_RUN:
            hook = None
            if stat <= TST_SEND:
                connection_apply(sock.connection, self.worker, stat)
        if hook is not None:
            result = self.call(sock, binding, hook, NOTHING)
            stat = stat_from(result) if isinstance(result, int) else TST_SUSPEND
            if stat <= TST_SEND:
                self.apply(sock, binding, result, None, NOTHING)
        if stat > TST_SEND:
            sock.connection.connected = False
            count(&self.worker.stats.rejected, 1)
            connection_begin_close(sock.connection)
        return True

    cdef int notify(self, TstSocket sock, tst_notified hook) except -1:
        """Calls a compiled handler's hook other than `received`. Returns its TstStat."""
        cdef int stat
        cdef void *handler = sock.connection.compiled.handler
        with nogil:
            worker_enter(self.worker)
            stat = hook(handler, <void *>sock)
            worker_leave(self.worker)
            worker_job(self.engine, self.worker, sock.connection, 1)
        if sock.connection.report:
            self.report(sock)
        return stat if stat >= 0 else TST_DISCONNECT

    cdef int read_messages(self, TstSocket sock, uint32_t events) except -1:
        """Hands out the whole messages that are there, up to a fair share of time."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding
        cdef uint64_t began = self.worker.clock
        cdef uint64_t n = 0
        while connection_cut(connection):
            binding = self.binding_of(sock)
            if connection.compiled != NULL and not connection.passed_on & PASSED_MESSAGE:
                if not self.run_compiled_messages(sock):
                    break
            connection.passed_on &= PASSED_WRITABLE
            store32(&connection.events, (events & (_EPOLLPRI | _EPOLLRDHUP)) | _EPOLLIN, RELAXED)
            if connection.framed and connection.too_large:
                self.refuse(sock, binding)
            elif binding is self.binding and self.pool.copy and is_quick(connection) and binding.on_message is not None:
                n += self.quick_messages(sock, binding, began)
                if self.worker.clock - began >= RUN_TIME:
                    break
                continue
            elif not self.message(sock, binding):
                n += 1
                break
            n += 1
            if n >= self.worker.burst and self.worker.clock - began >= RUN_TIME:
                break
        count(&self.worker.stats.messages, n)
        return 0

    cdef uint64_t quick_messages(self, TstSocket sock, Binding binding, uint64_t began) except? 0:
        """The straight way from the input to the pool's on_message and back, for what most connections do:
        read_messages without the questions whose answers is_quick knows. Returns how many messages it handed out."""
        cdef tst_connection *connection = sock.connection
        cdef tst_worker *worker = self.worker
        cdef PyObject *hook = <PyObject *>binding.on_message
        cdef PyObject *result
        cdef const char *place = NULL
        cdef size_t size
        cdef uint64_t n = 0, untimed = 0
        cdef bytes data = b""
        while True:
            if tst_rarely(connection.body != NULL):
                data = take_body(connection)
                connection.message_ready = connection.framed = False
                connection.frame.needed = 0
            else:
                size = message_at_hand(connection, &place)
                if not tst_refill(<PyObject *>data, place, <Py_ssize_t>size):
                    data = PyBytes_FromStringAndSize(place, <Py_ssize_t>size)
                if tst_rarely(size >= SPARE_LEAST):
                    connection_expect(connection, worker, size)
                message_take(connection, size)
            n += 1
            worker_enter(worker)
            result = tst_call(hook, <PyObject *>sock, <PyObject *>data)
            worker_leave(worker)
            connection.windowed = False
            untimed += 1
            if untimed >= worker.group:
                worker_job(self.engine, worker, connection, untimed)
                untimed = 0
            self.quick_result(sock, binding, result)
            if connection.report:      # not before: hooks that run while an exception waits would lose it
                self.report(sock)
            if n >= worker.burst and worker.clock - began >= RUN_TIME:
                break
            if load32(&connection.rebind, RELAXED) or not connection_cut(connection) or not is_quick(connection):
                break
        if untimed:
            worker_job(self.engine, worker, connection, untimed)
        return n

    cdef int quick_result(self, TstSocket sock, Binding binding, PyObject *result) except -1:
        """What on_message has returned: a reference that is ours, or NULL with an exception set."""
        cdef ssize_t queued
        if result == NULL:
            try:
                tst_raise()
            except BaseException as error:
                self.failed(sock, binding, error)
        elif result == <PyObject *>None:
            if connection_send(sock.connection) != NULL:
                connection_apply(sock.connection, self.worker, TST_SUSPEND)
        elif type(<object>result) is bytes and PyBytes_GET_SIZE(<object>result) < SHARE_LEAST:
            queued = sock.append(PyBytes_AS_STRING(<object>result), <size_t>PyBytes_GET_SIZE(<object>result), NULL,
                                 True)
            if queued < 0:
                self.reply(sock, binding, <object>result)
        else:
            self.apply(sock, binding, <object>result, None, NOTHING)
        Py_XDECREF(result)
        return 0

    cdef bint run_compiled_messages(self, TstSocket sock) except -1:
        """True: there is a message that its compiled handler has passed on, or that is too large for its framing."""
        cdef bint passed
        with nogil:
            passed = run_messages(self.engine, self.worker, sock.connection)
        if sock.connection.report:
            self.report(sock)
        return passed

    cdef bint message(self, TstSocket sock, Binding binding) except -1:
        """One message. False: a function left it unread, so it is to be called again, after the others."""
        cdef tst_connection *connection = sock.connection
        cdef bint whole = connection.framed or connection_awaits_transfer(connection)
        cdef bint handed_out
        connection.message_ready = False
        connection.has_read = False
        if not connection.framed:
            return self.hand_out(sock, binding, whole)
        if connection.body != NULL:
            return self.hand_out_body(sock, binding)
        frame_open(connection)
        handed_out = self.hand_out(sock, binding, True)
        frame_close(connection)
        return handed_out

    cdef bint hand_out_body(self, TstSocket sock, Binding binding) except -1:
        """A long message, which has arrived in an object of its own."""
        cdef tst_connection *connection = sock.connection
        cdef object body = take_body(connection)
        if binding.function is not None:
            give_back(connection, body)
            self.function_message(sock, binding, True)
        else:
            self.hand_over(sock, binding, body, True)
        frame_close(connection)
        return True

    cdef bint refuse(self, TstSocket sock, Binding binding) except -1:
        """The peer sends a message longer than allowed: on_error hears of it, and the connection closes anyway."""
        count(&self.worker.stats.too_large_closed, 1)
        sock.connection.message_ready = False
        sock.connection.unfinished = True      # it is still sending: what it is told must survive that (linger)
        input_free(&sock.connection.input)
        self.failed(sock, binding, MessageTooLarge(f"the peer's message is longer than {sock.own_framing!r} allows"))
        connection_begin_close(sock.connection)
        return True

    cdef bint hand_out(self, TstSocket sock, Binding binding, bint whole) except -1:
        """Gives the message at hand to whoever it is for. `whole`: to be handed out once, read or not."""
        if binding.function is not None:
            return self.function_message(sock, binding, whole)
        if self.pool.copy:
            return self.hand_over(sock, binding, self.payload(sock), whole)
        return self.lend(sock, binding, whole)

    cdef bint hand_over(self, TstSocket sock, Binding binding, object data, bint whole) except -1:
        """Calls on_message with the message as bytes, which are gone from the input."""
        cdef tst_connection *connection = sock.connection
        cdef object view = None
        if binding.on_message is None:
            return True
        if not self.pool.copy:
            view = memoryview(data)
        result = self.call(sock, binding, binding.on_message, data if view is None else view)
        if binding is self.binding or not is_run(result):
            self.apply(sock, binding, result, None, NOTHING)
        elif self.binding.function is None:
            verdict = self.message_to_pool(sock, data if view is None else view)
            self.apply(sock, self.binding, verdict, None, NOTHING)
        else:
            if not whole or connection.windowed:
                give_back(connection, data)
            self.function_message(sock, self.binding, whole)
        if view is not None:
            release_view(view)             # a part of it that the handler kept holds the bytes object
        return True

    cdef bint lend(self, TstSocket sock, Binding binding, bint whole) except -1:
        """Calls on_message with a view of the message where it lies (copy=False), and takes it back afterwards."""
        cdef tst_connection *connection = sock.connection
        cdef bint transfer = not connection.windowed and whole
        cdef bint framed = connection.windowed
        cdef size_t size
        cdef Loan loan = None
        if binding.on_message is None:
            sock.took(sock.unread())
            return True
        size = sock.unread()
        if transfer:
            begin = connection_recv(connection).req_pos
            view = memoryview(sock.recv_data)[begin:begin + connection_recv(connection).req_len].toreadonly()
        else:
            loan = new_loan(connection.input.view, size)
            view = memoryview(loan)
            connection.windowed = True     # reading gets nothing while the message is lent
            connection.frame.size = 0
        result = self.call(sock, binding, binding.on_message, view)
        passed_on = binding is not self.binding and is_run(result)
        if passed_on and self.binding.function is None:
            result = self.message_to_pool(sock, view)
        release_view(view)
        if loan is not None:
            loan.end(connection, self.batch)
            connection.windowed = framed
            connection.frame.size = size
        if passed_on and self.binding.function is not None:
            return self.function_message(sock, self.binding, whole)
        if loan is not None:
            sock.took(size)
        self.apply(sock, self.binding if passed_on else binding, result, None, NOTHING)
        return True

    cdef object message_to_pool(self, TstSocket sock, object data):
        """A socket's own handler has passed a message on (TstStat.RUN) to the pool's TstHandler. If that is a compiled
        one with a C state for each connection, which this connection has not, its on_message gets it. Returns what it
        has returned, to be applied when `data` is not needed any more."""
        cdef const tst_compiled *compiled = &self.pool.binding.compiled
        cdef Py_buffer view
        cdef int stat = TST_RUN
        if compiled.handler != NULL and (<TstNogilHandler>compiled.handler).state_size == 0:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            with nogil:
                worker_enter(self.worker)
                stat = compiled.received(compiled.handler, <void *>sock, <const char *>view.buf, <size_t>view.len)
                worker_leave(self.worker)
            PyBuffer_Release(&view)
            if stat != TST_RUN:
                return stat
        return None if self.binding.on_message is None else self.call(sock, self.binding, self.binding.on_message, data)

    cdef bint function_message(self, TstSocket sock, Binding binding, bint whole) except -1:
        """A message for a function, which reads it itself. False: it did not, so it is to be called again."""
        cdef tst_connection *connection = sock.connection
        if connection_recv(connection) != NULL:
            data_set_unread(connection_recv(connection), 0 if whole and not connection.windowed else sock.unread())
        result = self.call(sock, binding, binding.function, NOTHING)
        if binding is not self.binding and is_run(result):
            if self.binding.function is None:
                if whole or sock.unread():
                    verdict = self.message_to_pool(sock, self.payload(sock))
                    self.apply(sock, self.binding, verdict, None, NOTHING)
                    return True
            else:
                return self.function_message(sock, self.binding, whole)
        self.apply(sock, binding, result, None, NOTHING)
        if whole or connection.has_read or connection.closing or connection.hold_input or (
                connection_awaits_transfer(connection)):
            return True
        if not connection_takes_messages(connection):      # it has paused the socket, say: it is to have it later
            connection.message_ready = True
            return False
        if connection.end_of_input:
            input_free(&connection.input)      # the handler has seen it and does not want it, and no more will come
            return True
        count(&self.worker.stats.spins, 1)
        connection.message_ready = True
        return False

    cdef object payload(self, TstSocket sock):
        """The message as bytes: of its frame, of the transfer that was asked for, or all that has arrived."""
        cdef tst_connection *connection = sock.connection
        if not connection.windowed and connection_awaits_transfer(connection):
            return PyBytes_FromStringAndSize(connection_recv(connection).s + connection_recv(connection).req_pos,
                                             <Py_ssize_t>connection_recv(connection).req_len)
        data = PyBytes_FromStringAndSize(connection.input.view, <Py_ssize_t>sock.unread())
        sock.took(sock.unread())
        return data

    cdef int writable(self, TstSocket sock) except -1:
        cdef tst_connection *connection = sock.connection
        cdef Binding binding = self.binding_of(sock)
        cdef object hook = binding.function if binding.function is not None else binding.on_writable
        cdef int stat
        store32(&connection.events, _EPOLLOUT, RELAXED)
        if connection.compiled != NULL and not connection.passed_on & PASSED_WRITABLE:
            stat = self.notify(sock, connection.compiled.writable)
            if stat != TST_RUN:
                connection_apply(connection, self.worker, stat)
                return 0
        connection.passed_on &= PASSED_MESSAGE
        if hook is not None:
            self.apply(sock, binding, self.call(sock, binding, hook, NOTHING),
                       self.binding.function if self.binding.function is not None else self.binding.on_writable,
                       NOTHING)
        return 0

    cdef bint disconnect(self, TstSocket sock) except -1:
        """on_disconnect, and the end of the TstSocket's life in the table. False: the handler has reconnected it."""
        cdef tst_connection *connection = sock.connection
        cdef Binding binding = self.binding_of(sock)
        cdef object hook = binding.on_disconnect if binding.on_disconnect is not None else self.binding.on_disconnect
        reason, sock.reason = sock.reason, None
        if reason is None and connection.reason:
            reason = system_error(connection.reason)
        if connection.connected and connection.compiled != NULL:
            self.notify(sock, connection.compiled.disconnected)
        if connection.connected and hook is not None:
            result = self.call(sock, binding, hook, reason)
            # Not while the pool stops: nobody would ask the fresh connection to close.
            if (isinstance(result, int) and stat_from(result) == TST_RECONNECTED
                    and load32(&self.engine.phase, ACQUIRE) == PHASE_RUNNING):
                connection_reconnect(connection)
                return False
        forget_socket(connection)
        return True

    cdef object call(self, TstSocket sock, Binding binding, object hook, object argument):
        """Calls hook(sock), or hook(sock, argument), measures it, and deals with what it raises; then the result is
        None, and the connection closes unless on_error says else."""
        worker_enter(self.worker)
        try:
            result = hook(sock) if argument is NOTHING else hook(sock, argument)
        except BaseException as error:
            self.failed(sock, binding, error)
            result = None
        worker_leave(self.worker)
        worker_job(self.engine, self.worker, sock.connection, 1)
        if sock.connection.report:
            self.report(sock)
        return result

    cdef int report(self, TstSocket sock) except -1:
        """on_slow and on_most_elapsed for a job that has ended."""
        cdef uint64_t elapsed = sock.connection.report
        cdef bint began = self.begin_hook()
        sock.connection.report = 0
        try:
            if elapsed == self.worker.stats.most_elapsed and self.binding.on_most_elapsed is not None:
                self.binding.on_most_elapsed(sock, elapsed / 1e9)
            if elapsed >= self.engine.slow_handler and self.binding.on_slow is not None:
                self.binding.on_slow(sock, elapsed / 1e9)
        except BaseException as error:
            log(logging.ERROR, "on_slow raised", exc_info=error)
        self.end_hook(began)
        return 0

    cdef bint begin_hook(self) noexcept:
        """A hook begins, within another one or by itself: it may block, and then the shard is to be taken over. True:
        by itself, and end_hook is to say that it has ended."""
        if self.worker.calls % 2:
            return False
        worker_enter(self.worker)
        return True

    cdef void end_hook(self, bint began) noexcept:
        if began:
            worker_leave(self.worker)

    cdef int apply(self, TstSocket sock, Binding binding, object result, object hook, object argument) except -1:
        """Does what a handler's return value says. `hook`: the pool's, for TstStat.RUN from a socket's own handler."""
        cdef tst_connection *connection = sock.connection
        cdef int stat
        if result is None:
            if connection_send(connection) != NULL:
                connection_apply(connection, self.worker, TST_SUSPEND)
            return 0
        if type(result) is bytes:
            return self.reply(sock, binding, result)
        if not isinstance(result, int):
            wrong = TypeError(f"a handler returns None, bytes or a TstStat, not {type(result).__name__}")
            self.failed(sock, binding, wrong)
            return 0
        stat = stat_from(result)
        if stat == TST_RUN and binding is not self.binding and hook is not None:
            return self.apply(sock, self.binding, self.call(sock, self.binding, hook, argument), None, NOTHING)
        connection_apply(connection, self.worker, stat)
        return 0

    cdef int reply(self, TstSocket sock, Binding binding, bytes message) except -1:
        """A handler has returned bytes: they go out as one message."""
        cdef ssize_t queued
        try:
            queued = sock.append_object(message, True)
            if queued < 0 and queued != -ENOTCONN:     # closed meanwhile: nobody waits for the reply
                sock.raise_unsent(queued, message)
        except Exception as error:
            self.failed(sock, binding, error)
        return 0

    cdef int failed(self, TstSocket sock, Binding binding, object error) except -1:
        """A hook raised: on_error, then the socket is disconnected, unless on_error says SUSPEND."""
        cdef object hook = binding.on_error if binding.function is None else self.binding.on_error
        cdef bint began
        if self.pool.dead:
            raise error                    # in a forked child: it is for whoever forked
        verdict = None
        began = self.begin_hook()
        try:
            verdict = hook(sock, error)
        except BaseException as second:
            log(logging.ERROR, "on_error raised on socket %d", sock.sd, exc_info=second)
        self.end_hook(began)
        if isinstance(verdict, int) and stat_from(verdict) == TST_SUSPEND:
            return 0
        sock.reason = error
        connection_begin_close(sock.connection)
        return 0

    cdef int idle(self, tst_shard *shard) except -1:
        """on_idle; with the shard it polls open to take-over, for the hook may block."""
        if shard != NULL:
            shard_enter_running(self.engine, self.worker, shard)
        store64(&self.worker.calls, self.worker.calls + 1, RELEASE)
        try:
            if self.binding.on_idle is not None:
                self.binding.on_idle(self.worker.no)
        except BaseException as error:
            log(logging.ERROR, "on_idle raised", exc_info=error)
        finally:
            store64(&self.worker.calls, self.worker.calls + 1, RELEASE)
        return 0

    cdef int log_slow(self, tst_shard *shard) except -1:
        """Logs where handlers are that have been stuck for slow_handler; open to take-over, as in idle()."""
        cdef bint again = False
        cdef int no
        shard_enter_running(self.engine, self.worker, shard)
        store64(&self.worker.calls, self.worker.calls + 1, RELEASE)
        store64(&self.worker.slow_logged, self.worker.calls, RELAXED)      # this call is none of a handler
        try:
            no = slow_next(self.engine, 0, &again)
            while no >= 0:
                log(logging.WARNING, "%s-%d has been in a handler for %.3f s and more%s", self.pool.name, no,
                    self.engine.slow_handler / 1e9, stack_of(self.engine.workers[no].ident))
                no = slow_next(self.engine, no + 1, &again)
        except BaseException as error:
            log(logging.ERROR, "a slow handler could not be logged", exc_info=error)
        finally:
            store64(&self.worker.calls, self.worker.calls + 1, RELEASE)
        if again:
            store64(&self.engine.slow_look, clock_now() + self.engine.slow_handler, RELEASE)
        return 0

    cdef int complain(self) except -1:
        """accept has failed: one line a second at most, however often it fails."""
        cdef int number = self.worker.accept_errno
        text = "there are max_connections of them" if number == EUSERS else os.strerror(number)
        self.worker.accept_errno = 0
        if time.monotonic() - self.complained >= 1.0:
            self.complained = time.monotonic()
            log(logging.WARNING, "%s accepts no more connections for now: %s", self.pool.name, text)
        return 0


cdef object stack_of(unsigned long ident):
    """Where a thread is, on lines of their own. Without a GIL its frames may change while one looks: then nothing."""
    frame = sys._current_frames().get(ident) if gil_is_on() else None
    return "" if frame is None else ":\n" + "".join(traceback.format_stack(frame)).rstrip()


cdef void drop_spares(tst_worker *worker) noexcept:
    """Lets go of objects for messages that have not come."""
    cdef tst_shared *spare
    while worker.spares != NULL:
        spare = worker.spares
        worker.spares = spare.next
        spare.next = NULL
        unshare_object(spare)
    worker.spares_left = 0


cdef Worker new_worker(TstPool pool, int no):
    cdef Worker worker = Worker.__new__(Worker)
    worker.pool = pool
    worker.engine = pool.engine
    worker.worker = &pool.engine.workers[no]
    worker.worker.ident = PyThread_get_thread_ident()
    worker.worker.tid = gettid()
    worker.binding = bind(pool.binding.handler, pool.hooks)
    return worker


cdef void frame_open(tst_connection *connection) noexcept:
    """The handler is about to be given the message at hand: what is before it is dropped; it may read no further."""
    input_consume(&connection.input, connection.frame.begin)
    connection.frame.whole -= connection.frame.begin
    connection.windowed = True


cdef void frame_close(tst_connection *connection) noexcept:
    """The handler has had its message: what it did not read of it, and what is behind it, is dropped."""
    input_consume(&connection.input, min(connection.frame.whole, connection.input.size))
    connection.windowed = connection.framed = False
    connection.frame.needed = 0


cdef bint is_quick(tst_connection *connection) noexcept:
    """The message at hand is there as it is: it is no transfer, not too large, and no compiled handler's."""
    if connection.compiled != NULL or (connection.framed and connection.too_large):
        return False
    return connection.framed or not connection_awaits_transfer(connection)


cdef bytes take_body(tst_connection *connection):
    """The message at hand, which has arrived in an object of its own; the handler can read no more of it."""
    cdef tst_shared *shared = connection.body
    cdef bytes body = <bytes>shared.object
    connection.body = NULL
    unshare_object(shared)
    connection.windowed = True
    connection.frame.begin = connection.frame.size = connection.frame.whole = 0
    return body


cdef void message_take(tst_connection *connection, size_t size) noexcept:
    """The message at hand, of `size` bytes, was copied: it is gone from the input, and the handler can read no more of
    it."""
    connection.message_ready = False
    connection.windowed = connection.framed
    if not connection.framed:
        input_consume(&connection.input, size)
        return
    input_consume(&connection.input, connection.frame.whole)
    connection.framed = False
    connection.frame.begin = connection.frame.size = connection.frame.whole = connection.frame.needed = 0


cdef int give_back(tst_connection *connection, bytes data) except -1:
    """A message that was taken as bytes can be read by a function after all."""
    cdef size_t size = <size_t>PyBytes_GET_SIZE(data)
    check(input_unread(&connection.input, PyBytes_AS_STRING(data), size), "no memory for input")
    if connection.windowed:
        connection.frame.size += size
        connection.frame.whole += size
    return 0


cdef bint is_run(object result) except -1:
    return isinstance(result, int) and stat_from(result) == TST_RUN


cdef int stat_from(object number) except -1:
    """A number that a handler has returned as one of TstStat's; whatever is none of them means DISCONNECT."""
    cdef int overflow = 0
    cdef long value = PyLong_AsLongAndOverflow(number, &overflow)      # asks no method of a class of the user's
    return <int>value if not overflow and 0 <= value < 100 else TST_DISCONNECT


cdef int stop_for(TstPool pool, object fault) except -1:
    """The engine ends by itself: serve_forever() raises why."""
    with cython.critical_section(pool):
        pool.fault = fault
    pool.begin_stop(0)
    return 0


cdef int worker_ends(TstPool pool) except -1:
    """The last one of a run closes what is left."""
    with WORKERS_END:
        pool.live_workers -= 1
        last = pool.live_workers == 0
        if last:
            pool.launch += 1
    if last:
        with pool.mutex:
            gone = pool.close_down()
        let_sockets_go(gone)
    return 0


cdef int worker_broke(Worker worker, object error) except -1:
    """Gives back what it holds, so that the others can end."""
    cdef int i
    stop_for(worker.pool, error)
    for i in range(worker.engine.n_shards):
        if token_held(&worker.engine.shards[i], worker.worker.no):
            worker.engine.shards[i].batch = NULL
            shard_yield(worker.engine, worker.worker, &worker.engine.shards[i])
    return 0


# ------------------------------------------------------------------------------------------- end and forks

def _stop_all():
    """The interpreter ends: workers must go before it waits for its threads, and none may come after that."""
    global interpreter_ends
    with WORKERS_END:
        interpreter_ends = True
        pools = list(_open)
    for pool in pools:
        pool.stop(1.0)


def _after_fork_in_child():
    global WORKERS_END
    WORKERS_END = threading.RLock()
    for pool in list(_open):
        (<TstPool>pool)._forked()
    _open.clear()


# threading waits for its threads before atexit runs; this hook, which concurrent.futures uses too, runs before that.
getattr(threading, "_register_atexit", atexit.register)(_stop_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
