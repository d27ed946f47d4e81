# cython: language_level=3
"""The classes of tstpool, for `cimport`. Read this first: it is the public contract in types.

A `TstSocket` stays valid for as long as somebody holds it, open or closed; a `TstData` keeps its buffer for as long as
somebody holds it or a memoryview of it. Nothing here may be constructed by hand except TstPool and TstHandler.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from tstpool._conn cimport tst_address, tst_connection
from tstpool._data cimport tst_data
from tstpool._frame cimport tst_framing
from tstpool._shard cimport tst_batch, tst_engine, tst_entry, tst_shard, tst_worker


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
    cdef readonly uint64_t id              # generation << 32 | descriptor; never used twice
    cdef tst_connection *connection        # shared: the slot; holds another connection once the generation differs
    cdef TstPool pool                      # keeps the table alive
    cdef int type_number                   # TstSockType
    cdef tst_address peer_address
    cdef str peer_path                     # "unix:..." of a socket that was connected here, else None
    cdef object data                       # sock.user_data; guarded by the object's critical section
    cdef Binding binding                   # of sock.handler, None: the pool's; guarded likewise
    cdef Framing own_framing               # None: bytes as they arrive; guarded likewise
    cdef TstData recv_transfer             # made when first asked for; guarded likewise
    cdef TstData send_transfer
    cdef object reason                     # owner: the exception that ends it
    cdef object __weakref__

    cdef uint32_t generation(self) noexcept nogil
    cdef ssize_t append(self, const char *bytes, size_t size) noexcept nogil
    cdef bint in_handler(self) noexcept
    cdef void publish(self, void **place, void *transfer) noexcept
    cdef bint sent_up_to(self, uint64_t goal) except -1
    cdef int check_reading(self) except -1
    cdef size_t unread(self) noexcept
    cdef void took(self, size_t size) noexcept
    cdef ssize_t append_message(self, const char *bytes, size_t size) except -1
    cdef ssize_t read_to(self, char *place, size_t size) except -1


cdef class TstHandler:
    cdef object __weakref__


# A handler whose hooks have been looked up once.
cdef class Binding:
    cdef object handler
    cdef object function                   # a plain function instead of hooks, or None
    cdef object on_connect                 # each is None unless overridden
    cdef object on_message
    cdef object on_writable
    cdef object on_disconnect
    cdef object on_idle
    cdef object on_slow
    cdef object on_error
    cdef object on_most_elapsed


cdef class TstPool:
    cdef tst_engine *engine                # owned
    cdef Binding binding                   # of the pool's handler, None until it is known
    cdef list framings                     # the pool's, then its listeners'; connections borrow them
    cdef dict hooks                        # setEvent...: hook name -> function
    cdef bint opened                       # shards have their descriptors
    cdef bint dead                         # in a forked child
    cdef int n_workers
    cdef int n_shards
    cdef int live_workers                  # under WORKERS_END
    cdef int launch                        # under WORKERS_END: start() and the end of its workers count it up
    cdef size_t max_recv_size
    cdef size_t max_send_size
    cdef uint64_t slow_handler             # nanoseconds
    cdef uint64_t added                    # atomic: by addsocket
    cdef uint64_t bytes_outside            # atomic: sent by flush() on threads that are not workers
    cdef object mutex                      # threading.Lock: start, stop, listeners
    cdef object ended                      # threading.Event: no worker is left
    cdef list threads
    cdef list listeners                    # (host, port, id)
    cdef object fault                      # the exception that stopped the engine by itself
    cdef object name
    cdef object __weakref__

    cdef int check_alive(self) except -1
    cdef int set_hook(self, str name, object function) except -1
    cdef object add_listener(self, object listener, Framing framing)
    cdef TstSocket add(self, int fd, int type, object binding, object user_data, Framing framing)
    cdef tst_connection *enter(self, int fd, int type, int shard, uint64_t *id) noexcept
    cdef int begin(self, uint64_t id) except -1
    cdef int open(self) except -1
    cdef int start_locked(self) except -1
    cdef int give_up(self, list threads) except -1
    cdef int begin_stop(self, uint64_t drain) except -1
    cdef bint wait_ended(self, double drain) except -1
    cdef int cut_off(self) except -1
    cdef int close_down(self) except -1
    cdef void close_descriptors(self) noexcept
    cdef void free_memory(self) noexcept
    cdef tst_connection *find(self, object which, uint32_t *generation) except? NULL
    cdef list snapshot(self)
    cdef object worker_stats(self, int no)


# A worker's Python side: the only thing that touches its tst_worker, except for readers of counters.
cdef class Worker:
    cdef TstPool pool
    cdef Binding binding                   # its own copy, so that workers do not share reference counts
    cdef tst_engine *engine                # borrowed from the pool
    cdef tst_worker *worker                # borrowed from the engine
    cdef uint64_t clock                    # end of the last job
    cdef double complained                 # when accept's failure was last logged

    cdef int run(self) except -1
    cdef int serve(self, tst_shard *shard, bint taken_over) except -1
    cdef tst_batch *resume(self, tst_shard *shard) except? NULL
    cdef int run_batch(self, tst_shard *shard, tst_batch *batch) except -1
    cdef int run_entry(self, tst_entry *entry) except -1
    cdef bint connect(self, TstSocket sock) except -1
    cdef int read_messages(self, TstSocket sock, Binding binding, uint32_t events) except -1
    cdef bint message(self, TstSocket sock, Binding binding) except -1
    cdef bint refuse(self, TstSocket sock, Binding binding) except -1
    cdef bint hand_out(self, TstSocket sock, Binding binding, bint whole) except -1
    cdef int reply(self, TstSocket sock, Binding binding, bytes message) except -1
    cdef bint message_to_pool(self, TstSocket sock, object data) except -1
    cdef bint function_message(self, TstSocket sock, Binding binding, bint whole) except -1
    cdef object payload(self, TstSocket sock)
    cdef int writable(self, TstSocket sock, Binding binding) except -1
    cdef bint disconnect(self, TstSocket sock, Binding binding) except -1
    cdef object call(self, TstSocket sock, Binding binding, object hook, object arguments)
    cdef int finished(self, TstSocket sock, uint64_t begin) except -1
    cdef int apply(self, TstSocket sock, Binding binding, object result, object hook, object arguments) except -1
    cdef int failed(self, TstSocket sock, Binding binding, object error) except -1
    cdef int idle(self, tst_shard *shard) except -1
    cdef int complain(self) except -1
