# cython: language_level=3
"""The classes of tstpool, for `cimport`. Read this first: it is the public contract in types.

Public, by `from tstpool cimport ...`: TstStat and its TST_ constants, TstNogilHandler, the tst_ functions, and of the
other classes what is marked so. All else is for the engine's own use, may change with each version, and stands here
because the compiler must know how large the objects are.

A `TstSocket` stays valid for as long as somebody holds it, open or closed; a `TstData` keeps its buffer for as long as
somebody holds it or a memoryview of it. Nothing here may be constructed by hand except TstPool, handlers and framings.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from tstpool._conn cimport tst_address, tst_compiled, tst_connection, tst_limits
from tstpool._data cimport tst_data
from tstpool._frame cimport tst_framing
from tstpool._queue cimport tst_shared
from tstpool._shard cimport tst_engine


# What a handler returns; the numbers are those of Python's TstStat.
ctypedef enum TstStat:
    TST_SUSPEND = 0        # wait for the next message
    TST_RUN = 1            # pass what is at hand on to the Python hook of the same handler
    TST_SEND = 2           # send what `send_data` asks for, then call `writable`
    TST_RECONNECTED = 3    # a fresh connection is under the descriptor: forget the old one's bytes
    TST_DISCONNECT = 4     # send what is queued, then close


# Any thread, with the GIL or without. They never wait, and return 0 or more, or a negative errno: -ENOTCONN when the
# socket is closed, -ENOMEM; tst_send and tst_send_message also -ENOBUFS when too much output waits, whether on_overflow
# is "raise" or "block"; where it is "close" the connection is aborted then, and they return -ENOTCONN. Inside the
# socket's own hooks the bytes go out, in one piece, when its messages of this turn are handled.

# Queues a copy of `size` bytes. Returns how many bytes of this connection wait now for the kernel to take them.
cdef ssize_t tst_send(TstSocket sock, const void *data, size_t size) noexcept nogil

# The same for one message in the frame of the socket's framing. -EMSGSIZE: the framing has no frame for so many bytes,
# -EINVAL: the message holds the delimiter.
cdef ssize_t tst_send_message(TstSocket sock, const void *data, size_t size) noexcept nogil

# Closes the connection once what is queued has been sent. 1: this call began it, 0: it was closing already.
cdef int tst_close(TstSocket sock) noexcept nogil

# Tells the peer that nothing more comes, once it has what is queued; its messages come as before. The connection closes
# when the peer has finished sending, too. 1: this call began it, 0: it had ended, or was closing, already.
cdef int tst_send_eof(TstSocket sock) noexcept nogil

# Has the handler's `writable` called as soon as the kernel takes output for it: all that was queued has gone out then.
cdef int tst_need_send(TstSocket sock) noexcept nogil

# No more messages until tst_resume(): TCP holds the peer back, and one that has finished sending is kept; so is one
# that has gone, until then or the next send. A call that runs already is not stopped, nor is what it passes on.
cdef int tst_pause(TstSocket sock) noexcept nogil

# Goes on after tst_pause(), or sock.pause().
cdef int tst_resume(TstSocket sock) noexcept nogil


cdef class TstData:
    cdef tst_data data                     # the transfer; its own lock guards it

    cdef void release_export(self) noexcept


# How a stream is cut into messages. Never changes once it is made.
cdef class Framing:
    cdef tst_framing framing
    cdef tuple options                     # what it was made from, for repr, comparison and pickling

    cdef int set_limit(self, object max_message, object default) except -1


cdef class Raw(Framing):
    pass


cdef class Fixed(Framing):
    pass


cdef class Delimited(Framing):
    pass


cdef class LengthPrefixed(Framing):
    pass


cdef class TstSocket:
    cdef readonly uint64_t id              # public. generation << 32 | descriptor; never used twice
    cdef void *state                       # public, atomic. owned: the TstNogilHandler's struct for this one, or NULL
    cdef TstNogilHandler state_handler     # whose `release` is called with it
    cdef tst_connection *connection        # shared: the slot; holds another connection once the generation differs
    cdef TstPool pool                      # keeps the table alive
    cdef const tst_limits *limits          # borrowed from the pool
    cdef int type_number                   # TstSockType
    cdef tst_address peer_address
    cdef str peer_path                     # "unix:..." of a unix peer that has a name, else None
    cdef object data                       # sock.user_data; guarded by the object's critical section
    cdef Binding binding                   # of sock.handler, None: the pool's; guarded likewise
    cdef Binding active                    # owner: the binding that `connection.compiled` points into
    cdef Framing own_framing               # None: bytes as they arrive; guarded likewise
    cdef TstData recv_transfer             # made when first asked for; guarded likewise
    cdef TstData send_transfer
    cdef object reason                     # owner: the exception that ends it
    cdef object __weakref__
    cdef uint32_t sent_whole               # atomic: it is gone, and the kernel was handed all that was queued
    cdef int _abi_reserve[1]               # as in TstPool

    cdef uint32_t generation(self) noexcept nogil
    cdef ssize_t append(self, const char *bytes, size_t size, tst_shared *shared, bint framed) noexcept nogil
    cdef ssize_t overflow(self) noexcept nogil
    cdef void flush_once(self) noexcept nogil
    cdef bint end_if_overdue(self) noexcept nogil
    cdef int wait_for_room(self) except -1
    cdef ssize_t append_object(self, object data, bint framed) except? -1
    cdef ssize_t append_other(self, object data, bint framed) except? -1
    cdef bint in_handler(self) noexcept
    cdef void publish(self, void **place, void *transfer) noexcept
    cdef bint sent_up_to(self, uint64_t goal) except -1
    cdef int check_reading(self) except -1
    cdef size_t unread(self) noexcept
    cdef bint holds_no_more(self) noexcept
    cdef void took(self, size_t size) noexcept
    cdef int raise_unsent(self, ssize_t result, object data) except -1
    cdef ssize_t read_to(self, char *place, size_t size) except -1


cdef class TstHandler:
    cdef object __weakref__


# A handler in C: subclass it, override what you need, give an instance to a TstPool. No hook holds the GIL or may take
# it; one that blocks is treated like any other that does. Hooks of one connection never run at the same time; those of
# different connections run on as many threads as the pool has shards, so what they share needs a lock of its own.
#
#     cdef class Echo(TstNogilHandler):
#         cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
#             return TST_SUSPEND if tst_send(sock, data, size) >= 0 else TST_DISCONNECT
cdef class TstNogilHandler(TstHandler):
    # Bytes of C state for each connection, set in __cinit__: `sock.state` points to them, zeroed, from before
    # `connected` until `release` has returned.
    cdef size_t state_size
    # Shrinks by one when a version breaks the ABI in another way than by its size: what was compiled against an older
    # one then fails at import with a ValueError instead of crashing later.
    cdef long long _abi_fuse[4]

    # Any other number than those of TstStat counts as TST_DISCONNECT in all hooks; TST_RUN, which these return unless
    # overridden, passes on to Python.
    #
    # Before the first message; not if the handler was assigned later, when its state is as fresh. Above TST_SEND
    # refuses the connection. TST_RUN: Python's on_connect decides; if that refuses, `disconnected` does not follow, so
    # who notes a socket here must not leave it to Python. Python can keep a TstSocket for longer than a connection, we
    # can't.
    cdef TstStat connected(self, TstSocket sock) noexcept nogil
    # One whole message of the socket's framing; without framing, what has arrived. DANGER: `data` is valid only inside
    # the call. TST_RUN: Python's on_message gets it.
    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil
    # The kernel takes output after tst_need_send, or all of a TST_SEND has been handed to it. TST_RUN: on_writable.
    cdef TstStat writable(self, TstSocket sock) noexcept nogil
    # It has nothing to do with this socket from here on, and must forget what it has borrowed of it: the connection is
    # over, or another handler was assigned and takes it over now; the pool's hears of it again at the end, if that one
    # has passed something on to it (TstStat.RUN) since. Never for one that was refused. At the end Python's
    # on_disconnect is called after it.
    cdef void disconnected(self, TstSocket sock) noexcept nogil
    # The last use of a connection's state: free what it points to, not the state itself. Once for each state.
    cdef void release(self, void *state) noexcept nogil
    # The peer has finished sending, and all its messages have been handled. TST_DISCONNECT closes the connection,
    # TST_SUSPEND keeps it: it may send on, until tst_close or tst_send_eof. TST_RUN: on_eof; where there is none it is
    # as if nobody had wanted to hear of it.
    cdef TstStat eof(self, TstSocket sock) noexcept nogil
    # Room for hooks to come: a subclass that was compiled before them keeps working.
    cdef void _reserved_1(self) noexcept nogil
    cdef void _reserved_2(self) noexcept nogil
    cdef void _reserved_3(self) noexcept nogil
    cdef void _reserved_4(self) noexcept nogil
    cdef void _reserved_5(self) noexcept nogil
    cdef void _reserved_6(self) noexcept nogil
    cdef void _reserved_7(self) noexcept nogil


# A handler whose hooks have been looked up once.
cdef class Binding:
    cdef object handler
    cdef object function                   # a plain function instead of hooks, or None
    cdef object on_connect                 # each is None unless overridden
    cdef object on_message
    cdef object on_writable
    cdef object on_eof
    cdef object on_disconnect
    cdef object on_idle
    cdef object on_slow
    cdef object on_error
    cdef object on_most_elapsed
    cdef tst_compiled compiled             # of a TstNogilHandler; else its handler is NULL


cdef class TstPool:
    cdef tst_engine *engine                # owned
    cdef Binding binding                   # of the pool's handler, None until it is known
    cdef bint copy                         # on_message gets bytes, not a view
    cdef dict limits                       # name -> as it was given: what listeners are not told otherwise
    cdef list framings                     # the pool's, then its listeners'; connections borrow them
    cdef dict hooks                        # setEvent...: hook name -> function
    cdef bint opened                       # shards have their descriptors
    cdef bint dead                         # in a forked child
    cdef int n_workers
    cdef int n_shards                      # that there is memory for; the engine's own number: those in use
    cdef int shards_wanted                 # 0: the pool chooses
    cdef int live_workers                  # under WORKERS_END
    cdef int launch                        # under WORKERS_END: start() and the end of its workers count it up
    cdef size_t max_recv_size
    cdef size_t max_send_size
    cdef uint64_t added                    # atomic: by addsocket
    cdef uint64_t bytes_outside            # atomic: sent by flush() on threads that are not workers
    cdef object mutex                      # PoolMutex: start, stop, listeners
    cdef object ended                      # Latch: no worker is left
    cdef list threads
    cdef list listeners                    # (host, port, id)
    cdef object fault                      # the exception that stopped the engine by itself
    cdef object name
    cdef object __weakref__
    cdef int keepalive                     # seconds, 0: off
    cdef uint32_t stop_asked               # atomic, written under the mutex: see stop_later()
    cdef list files                        # (address, identity) of unix listeners' files, until they are removed
    cdef long long _abi_reserve[5]         # growth comes out of it, so that what cimports us need not be compiled anew

    cdef int check_alive(self) except -1
    cdef int set_hook(self, str name, object function) except -1
    cdef tst_limits *limits_from(self, dict given) except NULL
    cdef object add_listener(self, object listener, Framing framing, tst_limits *limits, bint ours)
    cdef int check_not_stopping(self) except -1
    cdef int unlink_files(self) except -1
    cdef TstSocket add(self, object sock, int type, object binding, object user_data, Framing framing,
                       tst_limits *limits)
    cdef tst_connection *enter(self, int fd, int type, int shard, uint64_t *id) noexcept
    cdef int begin(self, uint64_t id) except -1
    cdef int shards_to_open(self) except -1
    cdef int open(self) except -1
    cdef int check_uninterrupted(self, bint interrupted) except -1
    cdef int start_locked(self, list threads) except -1
    cdef int give_up(self, list threads) except -1
    cdef int work(self, int no, int launch) except -1
    cdef int begin_stop(self, uint64_t drain) except -1
    cdef void begin_draining(self, uint64_t until) noexcept
    cdef bint stop_later(self, uint64_t drain) except -1
    cdef int stop_if_asked(self) except -1
    cdef int cut_off(self) except -1
    cdef list close_down(self)
    cdef list close_descriptors(self)
    cdef void abandon(self) noexcept
    cdef int forked(self) except -1
    cdef void drop_all_litter(self) noexcept
    cdef void free_memory(self) noexcept
    cdef tst_connection *find(self, object which, uint32_t *generation) except? NULL
    cdef list snapshot(self)
    cdef object worker_stats(self, int no)
