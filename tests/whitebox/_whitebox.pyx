# cython: language_level=3, freethreading_compatible=True
"""The engine's header layers, one thin Python class for each, so that tests can drive them without a pool.

Methods return what the C functions return (>= 0, or -errno). Nothing here is part of the package.
"""
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from tstpool._conn cimport (
    ACQUIRED, TABLE_CHUNK, TABLE_CHUNKS, connection_acquire, connection_append, connection_ask,
    connection_close_output, connection_is, connection_mark, connection_release, generation_of, table_chunk, table_find,
    table_make, table_open, table_slot, tst_connection, tst_table)
from tstpool._conn cimport (
    PEND_CLOSE, PEND_IN, PEND_OUT, STATE_DEAD, STATE_DETACHED, STATE_OPEN, STATE_OWNED, STATE_PAUSED, STATE_QUEUED)
from tstpool._conn cimport NO_TIMER, TYPE_SUB, tst_compiled, tst_limits
from tstpool._core cimport Framing as PublicFraming
from tstpool._data cimport (
    data_complete, data_fill, data_pin, data_request, data_resize, data_set_done, data_unpin, input_consume,
    input_free, input_is_stored, input_keep, input_reserve, input_unread, tst_data, tst_input)
from tstpool._entry cimport STAT_SEND, STAT_SUSPEND, connection_age, connection_cut, connection_room
from tstpool._frame cimport HEADER_MOST, frame_header, frame_next, framing_settle, tst_frame, tst_framing
from tstpool._libc cimport (
    ACQUIRE, EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, RELEASE, SEQ_CST, add64, close, epoll_create1, epoll_event,
    eventfd, iovec, load32, load64, load_pointer, pthread_mutex_init, read, sched_yield, store32, store64)
from tstpool._lock cimport spin_lock, spin_unlock
from tstpool._poll cimport (
    connection_arm, connection_fired, connection_flush, connection_retire, connection_silence, sys_recv, sys_wait)
from tstpool._queue cimport (
    BLOCKS_MOST, QUEUE_PIECES, STOCK_MOST, block_new, queue_append, queue_consume, queue_drop, queue_headed, queue_join,
    queue_pieces, queue_reserve, queue_settle, queue_share, queue_size, shared_leave, shared_new, stock_free,
    stock_free_blocks, stock_take_litter, tst_chunk, tst_queue, tst_shared, tst_stock)
from tstpool._run cimport message_at_hand, run_messages
from tstpool._shard cimport (
    ENTRY_DONE, ENTRY_QUEUED, ENTRY_RAN, ENTRY_RUNNING, TOKEN_POLLING, TOKEN_RUNNING, entry_move,
    shard_ask, shard_push, shard_take_requests, token_held, token_move, token_of, tst_engine, tst_entry, tst_shard,
    tst_worker)
from tstpool._stats cimport clock_now, stats_job, tst_stats
from tstpool._timer cimport (
    DEADLINE_IDLE, DEADLINE_LINGER, DEADLINE_NONE, WHEEL_LEVELS, WHEEL_MOST, WHEEL_SLOTS, connection_deadline,
    tst_wheel, wheel_fire, wheel_next, wheel_put, wheel_remove)

OPEN, OWNED, PAUSED, QUEUED = STATE_OPEN, STATE_OWNED, STATE_PAUSED, STATE_QUEUED
DETACHED, DEAD = STATE_DETACHED, STATE_DEAD
WANT_IN, WANT_OUT, WANT_CLOSE = PEND_IN, PEND_OUT, PEND_CLOSE
ENTRY_STATES = (ENTRY_QUEUED, ENTRY_RUNNING, ENTRY_RAN, ENTRY_DONE)
CHUNK = TABLE_CHUNK
SLOTS = TABLE_CHUNK * TABLE_CHUNKS
PIECES = QUEUE_PIECES
STOCK = STOCK_MOST
BLOCKS = BLOCKS_MOST
WHEEL_AHEAD = WHEEL_MOST


# -------------------------------------------------------------------------------------------- lock, counters

cdef class Counter:
    """A plain number that only a spin lock protects."""

    cdef uint32_t lock
    cdef uint64_t number

    def add(self, int times):
        """Adds one `times` times, in two steps that another thread would tear apart."""
        cdef int i
        cdef uint64_t seen
        with nogil:
            for i in range(times):
                spin_lock(&self.lock)
                seen = self.number
                if i % 64 == 0:
                    sched_yield()
                self.number = seen + 1
                spin_unlock(&self.lock)

    @property
    def value(self):
        return self.number


cdef class Jobs:
    cdef tst_stats stats

    def enter(self, uint64_t begin, uint64_t end):
        return stats_job(&self.stats, 1, begin, end)

    @property
    def seen(self):
        return self.stats.exec_count, self.stats.sum_time, self.stats.most_elapsed


# ------------------------------------------------------------------------------------------------- transfers

cdef class Transfer:
    """A tst_data of `s_len` bytes."""

    cdef tst_data data

    def __cinit__(self, size_t s_len):
        self.data.s_len = s_len

    def __dealloc__(self):
        free(self.data.s)

    def request(self, size_t req_pos, size_t req_len):
        return data_request(&self.data, req_pos, req_len)

    def set_done(self, size_t com_len):
        return data_set_done(&self.data, com_len)

    def resize(self, size_t s_len):
        return data_resize(&self.data, s_len)

    def fill(self, bytes piece, uint64_t now=1):
        return data_fill(&self.data, piece, <size_t>len(piece), now)

    def receive(self, size_t least, bytes piece, uint64_t now=1, resize_meanwhile=None):
        """What a direct receive does: pin, write into place, unpin. Returns (room, what resize said meanwhile)."""
        cdef char *place = NULL
        cdef size_t room = data_pin(&self.data, least, &place)
        said = None
        if room:
            if resize_meanwhile is not None:
                said = data_resize(&self.data, resize_meanwhile)
            assert <size_t>len(piece) <= room
            memcpy(place, <const char *>piece, <size_t>len(piece))
            data_unpin(&self.data, len(piece), now)
        return room, said

    @property
    def complete(self):
        return bool(data_complete(&self.data))

    @property
    def numbers(self):
        """(s_len, req_pos, req_len, com_len)"""
        return self.data.s_len, self.data.req_pos, self.data.req_len, self.data.com_len

    @property
    def trans_time(self):
        return self.data.trans_time

    @property
    def contents(self):
        """The buffer's bytes, None when it was not made yet."""
        return None if self.data.s == NULL else self.data.s[:self.data.s_len]


cdef class Input:
    """A tst_input, and the scratch buffer that it borrows from."""

    cdef tst_input input
    cdef bytes scratch

    def __dealloc__(self):
        input_free(&self.input)

    def arrive(self, bytes data):
        """As received into the scratch buffer, which is only done when nothing is unread."""
        assert self.input.size == 0
        self.scratch = data
        self.input.view = data
        self.input.size = <size_t>len(data)

    def arrive_behind(self, bytes data, size_t room):
        """As received behind what is unread."""
        cdef char *place
        assert <size_t>len(data) <= room
        place = input_reserve(&self.input, room)
        assert place != NULL
        memcpy(place, <const char *>data, <size_t>len(data))
        self.input.size += <size_t>len(data)

    def consume(self, size_t size):
        taken = self.input.view[:size]
        input_consume(&self.input, size)
        return taken

    def unread(self, bytes data):
        return input_unread(&self.input, data, <size_t>len(data))

    def keep(self):
        """The turn ends: the scratch buffer is somebody else's from here on."""
        result = input_keep(&self.input)
        self.scratch = None
        return result

    @property
    def waiting(self):
        return self.input.view[:self.input.size]

    @property
    def stored(self):
        return bool(input_is_stored(&self.input))

    @property
    def capacity(self):
        return self.input.capacity


# --------------------------------------------------------------------------------------------------- framing

cdef class Framing:
    cdef tst_framing framing

    def __cinit__(self, int kind, *, fixed=0, delimiter=b"", keep=False, length_size=4, little=False, offset=0,
                  adjust=0, max_message=2**20):
        self.framing.kind = <unsigned char>kind
        self.framing.fixed = fixed
        self.framing.n_delimiter = <unsigned char>len(delimiter)
        memcpy(self.framing.delimiter, <const char *>delimiter, self.framing.n_delimiter)
        self.framing.keep = keep
        self.framing.length_size = length_size
        self.framing.little = little
        self.framing.offset = offset
        self.framing.adjust = adjust
        self.framing.max_message = max_message
        framing_settle(&self.framing)

    @staticmethod
    def like(PublicFraming framing):
        """The same as one of the package's."""
        cdef Framing made = Framing(0)
        made.framing = framing.framing
        return made

    def cut(self, bytes data, size_t scanned=0):
        """(result, message or None, bytes that it took up, bytes needed, scanned)"""
        cdef tst_frame frame
        cdef int result
        memset(&frame, 0, sizeof(frame))
        # In memory of its own, so that a sanitizer sees a read beyond its end.
        cdef char *copy = <char *>calloc(1, <size_t>len(data) or 1)
        memcpy(copy, <const char *>data, <size_t>len(data))
        result = frame_next(&self.framing, copy, <size_t>len(data), &scanned, &frame)
        free(copy)
        if result == 1:
            return result, data[frame.begin:frame.begin + frame.size], frame.whole, frame.needed, scanned
        return result, None, 0, frame.needed, scanned

    def header(self, size_t size):
        """What goes before a body of `size` bytes, or -errno."""
        cdef unsigned char header[HEADER_MOST]
        cdef int n = frame_header(&self.framing, size, header)
        return n if n < 0 else (<char *>header)[:n]


cdef int keep_message(void *handler, void *sock, const char *data, size_t size) noexcept with gil:
    """Stream's compiled handler."""
    (<Stream>handler).messages.append(data[:size])
    return STAT_SEND if (<Stream>handler).holds else STAT_SUSPEND


cdef class Stream:
    """The input of a connection without a descriptor: reads arrive, and the engine's own code cuts messages from them.

    compiled: as for a handler in C (run_messages), else as for one in Python.
    """

    cdef tst_connection *connection
    cdef tst_engine *engine
    cdef tst_worker *worker
    cdef tst_compiled compiled
    cdef PublicFraming framing             # None: bytes as they arrive
    cdef dict changes                      # number of messages: the framing that takes over there
    cdef readonly list messages
    cdef readonly bint too_large           # the stream has ended with an error
    cdef public bint holds                 # each message holds back the next ones, until go_on()

    def __cinit__(self, PublicFraming framing, bint compiled=False):
        self.connection = <tst_connection *>calloc(1, sizeof(tst_connection))
        self.engine = <tst_engine *>calloc(1, sizeof(tst_engine))
        self.worker = <tst_worker *>calloc(1, sizeof(tst_worker))
        if self.connection == NULL or self.engine == NULL or self.worker == NULL:
            raise MemoryError
        self.engine.slow_handler = <uint64_t>-1
        self.framing = framing
        self.connection.framing = NULL if framing is None else &framing.framing
        if compiled:
            self.compiled.handler = <void *>self
            self.compiled.received = keep_message
            self.connection.compiled = &self.compiled
        self.messages = []
        self.changes = {}

    def __dealloc__(self):
        if self.connection != NULL:
            input_free(&self.connection.input)
        free(self.connection)
        free(self.engine)
        free(self.worker)

    def change_framing(self, number, PublicFraming framing):
        """After so many messages, as a handler in Python may."""
        self.changes[number] = framing

    def arrive(self, bytes data, size_t step=262144):
        """Reads of at most `step` bytes, each with a turn of its own, until the stream has ended with an error."""
        cdef const char *place = data
        cdef size_t used, left = <size_t>len(data)
        while left and not self.too_large:
            used = self.turn(place, min(step, left))
            place += used
            left -= used

    cdef size_t turn(self, const char *bytes, size_t size) except 0:
        """What connection_receive does without the kernel; then messages are handed out and the rest is kept. Returns
        how many bytes there was room for."""
        cdef tst_input *input = &self.connection.input
        cdef char *place
        cdef char *scratch = NULL
        if input.size == 0:
            # In memory of its own, so that a sanitizer sees a read beyond its end or after the turn.
            scratch = place = <char *>malloc(size)
            input.view = scratch
        else:
            size = min(size, connection_room(self.connection))
            place = input_reserve(input, size)
        if place == NULL:
            raise MemoryError
        memcpy(place, bytes, size)
        input.size += size
        self.hand_out()
        assert input_keep(input) == 0
        assert input.size == 0 or input_is_stored(input)
        free(scratch)
        return size

    cdef int hand_out(self) except -1:
        cdef tst_connection *connection = self.connection
        cdef const char *bytes = NULL
        cdef size_t size
        while connection_cut(connection):
            if connection.framed and connection.too_large:
                self.too_large = True
                input_free(&connection.input)
                break
            if connection.compiled != NULL:
                run_messages(self.engine, self.worker, connection)
                continue
            size = message_at_hand(connection, &bytes)
            self.messages.append(bytes[:size])
            input_consume(&connection.input, connection.frame.whole if connection.framed else size)
            connection.message_ready = connection.framed = False
            connection.frame.needed = 0
            if len(self.messages) in self.changes:
                self.framing = self.changes[len(self.messages)]
                connection.framing = &self.framing.framing
        return 0

    def change_byte(self, size_t place, unsigned char value):
        """Behind the engine's back, in the unread input."""
        assert place < self.connection.input.size and input_is_stored(&self.connection.input)
        (<char *>self.connection.input.view)[place] = <char>value

    @property
    def waiting(self):
        """The unread input: an unfinished message."""
        return self.connection.input.view[:self.connection.input.size]

    def go_on(self):
        """What was held back; whether there is a message then."""
        self.connection.hold_input = self.connection.call_writable = False
        return bool(connection_cut(self.connection))

    @property
    def needed(self):
        """Bytes that the message at the beginning of the input takes, as far as is known."""
        return self.connection.frame.needed

    @property
    def scanned(self):
        return self.connection.scanned

    @property
    def capacity(self):
        """Bytes of memory that the unread input takes up."""
        return self.connection.input.capacity


# ----------------------------------------------------------------------------------------------------- queue

cdef class Queue:
    """A queue with a stock of its own. `burst`: as if a handler ran."""

    cdef tst_queue queue
    cdef tst_stock stock

    def __cinit__(self, bint burst=True):
        self.queue.stock = &self.stock
        self.queue.burst = burst
        self.stock.blocks_most = BLOCKS_MOST

    def __dealloc__(self):
        queue_drop(&self.queue)
        stock_free(&self.stock)
        self.drop_litter()

    def share(self, bytes data, bint as_object=False, size_t front=0, int times=1):
        """Queues a shared copy, or the object itself, `times` times; then gives up its own use of it. The first `front`
        bytes are not sent: they are its front."""
        cdef tst_shared *shared = shared_new(data, <size_t>len(data))
        cdef int result = 0
        if as_object:
            Py_INCREF(data)
            shared.object = <void *>data
            shared.bytes = data
        shared.front = front
        shared.bytes += front
        shared.size -= front
        for _ in range(times):
            result = queue_share(&self.queue, shared)
        shared_leave(shared, &self.stock)
        return result

    def join(self):
        """Has a header go in front of the shared bytes behind it. False: there is none, or it can't."""
        if queue_headed(&self.queue) == NULL:
            return False
        queue_join(&self.queue)
        return True

    def reserve(self, size_t size):
        return queue_reserve(&self.queue, size)

    def drop_litter(self):
        """Lets the objects go that nobody needs; how many there were."""
        cdef tst_shared *shared = stock_take_litter(&self.stock)
        cdef tst_shared *next
        cdef int n = 0
        while shared != NULL:
            next = shared.next
            Py_DECREF(<object>shared.object)
            free(shared)
            shared = next
            n += 1
        return n

    def block(self, size_t size):
        """Memory for a long message: its address, and how much it is."""
        cdef tst_shared *block = block_new(&self.stock, size)
        if block == NULL:
            raise MemoryError
        memset(<char *>block.bytes, 0x55, size)            # a sanitizer sees whether it is there
        return <size_t>block, block.block

    def leave_block(self, size_t address):
        shared_leave(<tst_shared *>address, &self.stock)

    def free_blocks(self):
        stock_free_blocks(&self.stock)

    @property
    def blocks_in_stock(self):
        """The sizes of those that are kept, the last one first; their sum is what the stock counts."""
        cdef tst_shared *block = self.stock.blocks
        cdef list sizes = []
        while block != NULL:
            sizes.append(block.block)
            block = block.next
        assert sum(sizes) == self.stock.blocks_size
        return sizes

    def settle(self):
        queue_settle(&self.queue)

    @property
    def in_stock(self):
        return self.stock.n

    @property
    def memory(self):
        """Bytes that the chunks of the queue take up."""
        cdef tst_chunk *chunk = self.queue.head
        cdef size_t total = 0
        while chunk != NULL:
            total += sizeof(tst_chunk) + (chunk.capacity if chunk.shared == NULL else 0)
            chunk = chunk.next
        return total

    def append(self, bytes data):
        return queue_append(&self.queue, data, <size_t>len(data))

    def consume(self, size_t size):
        queue_consume(&self.queue, size)

    def drop(self):
        queue_drop(&self.queue)

    def pieces(self):
        """What one sendmsg would be given, and the total that goes with it."""
        cdef iovec pieces[QUEUE_PIECES]
        cdef size_t total = 0
        cdef int i, n = queue_pieces(&self.queue, pieces, &total)
        return [(<char *>pieces[i].iov_base)[:pieces[i].iov_len] for i in range(n)], total

    @property
    def size(self):
        return queue_size(&self.queue)

    @property
    def counts(self):
        return self.queue.queued, self.queue.sent

    @property
    def chunks(self):
        cdef tst_chunk *chunk = self.queue.head
        cdef int n = 0
        while chunk != NULL:
            n += 1
            chunk = chunk.next
        return n


# --------------------------------------------------------------------------------------------------- timers

cdef class Wheel:
    """A wheel of timers that are numbers: each stands for a connection that nobody else has."""

    cdef tst_wheel wheel
    cdef tst_connection *connections
    cdef int n

    def __cinit__(self, int n, uint32_t tick=0):
        cdef int i
        self.n = n
        self.wheel.tick = tick
        self.connections = <tst_connection *>calloc(<size_t>n, sizeof(tst_connection))
        if self.connections == NULL:
            raise MemoryError
        for i in range(n):
            self.connections[i].timer_slot = NO_TIMER

    def __dealloc__(self):
        free(self.connections)

    def put(self, int number, uint32_t due):
        """As shard_set_timer does, but at the present tick, too."""
        assert 0 <= number < self.n
        wheel_remove(&self.wheel, &self.connections[number])
        self.connections[number].timer_due = due
        wheel_put(&self.wheel, &self.connections[number])

    def remove(self, int number):
        assert 0 <= number < self.n
        wheel_remove(&self.wheel, &self.connections[number])

    def next(self):
        """The tick of wheel_next; None: the wheel is empty."""
        cdef uint32_t tick = 0
        return tick if wheel_next(&self.wheel, &tick) else None

    def fire(self, uint32_t now):
        """The numbers that are due up to `now`, in the order in which the wheel gives them."""
        cdef tst_connection *connection
        fired = []
        while True:
            connection = wheel_fire(&self.wheel, now)
            if connection == NULL:
                return fired
            assert connection.timer_slot == NO_TIMER
            fired.append(<int>(connection - self.connections))

    @property
    def tick(self):
        return self.wheel.tick

    @property
    def is_empty(self):
        """No bit and no slot says otherwise."""
        cdef int i
        for i in range(WHEEL_LEVELS):
            if self.wheel.occupied[i]:
                return False
        for i in range(WHEEL_LEVELS * WHEEL_SLOTS):
            if self.wheel.slots[i] != NULL:
                return False
        return True


# --------------------------------------------------------------------------------- table, connections, shard

cdef class Engine:
    """A table and one shard with its epoll set and eventfd, without a pool or a worker."""

    cdef tst_table *table
    cdef tst_shard shard
    cdef tst_stats stats

    def __cinit__(self):
        self.table = <tst_table *>calloc(1, sizeof(tst_table))
        if self.table == NULL:
            raise MemoryError
        pthread_mutex_init(&self.shard.mutex, NULL)
        self.shard.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.shard.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.shard.epoll_fd < 0 or self.shard.event_fd < 0:
            raise OSError(errno, "no descriptor")

    def __dealloc__(self):
        cdef int i, k
        cdef tst_connection *first
        if self.table == NULL:
            return
        for i in range(TABLE_CHUNKS):
            first = table_chunk(self.table, i)
            for k in range(TABLE_CHUNK if first != NULL else 0):
                queue_drop(&first[k].out)
            free(first)
        free(self.table)
        self.close()

    def close(self):
        """Gives its descriptors back."""
        if self.shard.epoll_fd >= 0:
            close(self.shard.epoll_fd)
            close(self.shard.event_fd)
        self.shard.epoll_fd = -1

    def open(self, int fd, uint64_t flags=0, int trigger=0):
        """A Connection on the slot of `fd`; None when the table refuses."""
        cdef uint64_t id = 0
        cdef Connection made
        cdef tst_connection *connection = table_open(self.table, fd, flags, &id)
        if connection == NULL:
            return None
        connection.shard = &self.shard
        connection.shard_open = &self.shard.open
        connection.epoll_fd = self.shard.epoll_fd
        connection.trigger = <unsigned char>trigger
        self.shard.open += 1
        made = Connection.__new__(Connection)
        made.engine = self
        made.connection = connection
        made.id = id
        return made

    def age(self, uint64_t slot, uint32_t generation):
        """As if a slot, which must be free, had been given away so often: its next connection is of that generation."""
        cdef tst_connection *connection = table_make(self.table, slot)
        assert connection != NULL and <uint32_t>load64(&connection.state, ACQUIRE) == 0
        store64(&connection.state, <uint64_t>generation << 32, RELEASE)

    def finds(self, uint64_t id):
        """The descriptor of the connection that an id, or a bare descriptor, stands for; None."""
        cdef tst_connection *connection = table_find(self.table, id)
        return None if connection == NULL else connection.fd

    def has_slot(self, uint64_t slot):
        return table_slot(self.table, slot) != NULL

    def poll(self):
        """{descriptor: epoll bits} of what epoll reports now."""
        cdef epoll_event events[64]
        cdef int i, n = sys_wait(self.shard.epoll_fd, events, 64, 0)
        assert n >= 0
        return {<int><uint32_t>events[i].data.u64: events[i].events for i in range(n)}

    # -- requests

    def sleep(self, bint sleeping=True):
        store32(&self.shard.sleeping, sleeping, SEQ_CST)

    @property
    def wakes(self):
        """Writes to the eventfd since the last look."""
        cdef uint64_t number = 0
        return number if read(self.shard.event_fd, &number, sizeof(number)) == sizeof(number) else 0

    def take(self):
        """Descriptors in the stack of requests, oldest first; the requests are taken."""
        cdef tst_connection *connection
        shard_take_requests(&self.shard)
        found = []
        while self.shard.todo != NULL:
            connection = self.shard.todo
            self.shard.todo = connection.next_request
            connection_mark(connection, STATE_QUEUED, False, 0, generation_of(load64(&connection.state, ACQUIRE)))
            found.append(connection.fd)
        return found

    @property
    def n_open(self):
        return load32(&self.shard.open, ACQUIRE)

    @property
    def controls(self):
        """epoll_ctl calls so far."""
        return self.stats.controls

    @property
    def bytes_out(self):
        return self.stats.bytes_out

    # -- token

    def token(self, old, fresh):
        """Moves the token; each is None or (worker, "polling" | "running")."""
        return bool(token_move(&self.shard, number_of(old), number_of(fresh)))

    def holds(self, int worker):
        return bool(token_held(&self.shard, worker))


cdef uint64_t number_of(object token) except? 99:
    if token is None:
        return 0
    worker, activity = token
    return token_of(worker, TOKEN_RUNNING if activity == "running" else TOKEN_POLLING)


cdef class Connection:
    cdef Engine engine
    cdef tst_connection *connection
    cdef readonly uint64_t id

    cdef uint32_t generation(self):
        return generation_of(self.id)

    @property
    def state(self):
        return <uint32_t>load64(&self.connection.state, ACQUIRE)

    def acquire(self):
        """(ACQUIRED 1 | BUSY 0 | GONE -1, the pending bits)"""
        cdef uint64_t pending = 0
        cdef int got = connection_acquire(self.connection, self.generation(), &pending)
        return got, pending

    def release(self, uint64_t pending=0):
        return bool(connection_release(self.connection, pending))

    def ask(self, uint64_t pending):
        return connection_ask(self.connection, self.generation(), pending)

    def request(self, uint64_t pending):
        """ask, with the push and the wake-up that it may need."""
        return shard_ask(self.connection, self.generation(), pending)

    def mark(self, uint64_t flag, bint on=True, uint64_t needed=0):
        return bool(connection_mark(self.connection, flag, on, needed, self.generation()))

    def append(self, bytes data):
        """(bytes that wait or -errno, whether somebody must be asked to flush)"""
        cdef bint flush = False
        cdef ssize_t n
        spin_lock(&self.connection.lock)
        n = connection_append(self.connection, self.generation(), data, <size_t>len(data), NULL, False, &flush)
        return n, bool(flush)

    def close_output(self):
        return connection_close_output(self.connection, self.generation())

    def flush(self, bint writable=False, bint arm=True):
        cdef int result
        with nogil:
            result = connection_flush(self.connection, generation_of(self.id), writable, arm, clock_now(),
                                      &self.engine.stats)
        return result

    def pretend_flushing(self, bint on):
        """As if another thread were inside send() for it."""
        self.connection.flushing = on

    def arm(self, bint want_in, bint want_room=False):
        cdef int result
        spin_lock(&self.connection.lock)
        self.connection.want_room = want_room
        result = connection_arm(self.connection, want_in, &self.engine.stats)
        spin_unlock(&self.connection.lock)
        return result

    def silence(self):
        spin_lock(&self.connection.lock)
        connection_silence(self.connection, &self.engine.stats)
        spin_unlock(&self.connection.lock)

    def fired(self):
        connection_fired(self.connection, 0)

    def retire(self):
        """The owner lets go for ever; the descriptor is closed unless a flusher or a request still has it."""
        connection_retire(self.connection, &self.engine.stats)

    @property
    def armed(self):
        return self.connection.armed

    @property
    def want_out(self):
        return bool(self.connection.want_out)

    @property
    def alive(self):
        return bool(connection_is(self.connection, self.generation()))

    def receive(self, size_t size):
        """sys_recv: bytes, or -errno."""
        cdef bytes buffer = bytes(size)
        cdef ssize_t n = sys_recv(self.connection.fd, <char *>buffer, size)
        return n if n < 0 else buffer[:n]


cdef class Hammer:
    """Threads without the interpreter on one connection: askers leave requests, servers own it and serve them.

    `asked` counts requests; a server that owns the connection and was told of one notes how many there are by then. No
    request is lost if, when all is quiet, the note equals the count.
    """

    cdef Engine engine
    cdef Connection target
    cdef uint64_t asked
    cdef uint64_t served
    cdef uint64_t owners
    cdef readonly uint64_t torn
    cdef uint64_t askers

    def __cinit__(self, Engine engine, Connection target, int askers):
        self.engine = engine
        self.target = target
        self.askers = <uint64_t>askers

    def ask(self, int times):
        cdef int _i
        with nogil:
            for _i in range(times):
                add64(&self.asked, 1, SEQ_CST)
                shard_ask(self.target.connection, generation_of(self.target.id), PEND_OUT)
            add64(&self.askers, <uint64_t>-1, SEQ_CST)

    def serve(self, bint holder):
        """The holder of the shard takes requests from the stack; others only acquire and release, as events do."""
        cdef bint last = False
        with nogil:
            while True:
                last = load64(&self.askers, SEQ_CST) == 0
                if not holder:
                    self.own_once()
                elif load_pointer(&self.engine.shard.requests, ACQUIRE) != NULL:
                    shard_take_requests(&self.engine.shard)
                    while self.engine.shard.todo != NULL:
                        self.engine.shard.todo = self.engine.shard.todo.next_request
                        connection_mark(self.target.connection, STATE_QUEUED, False, 0, generation_of(self.target.id))
                        self.own_once()
                if last and (not holder or load64(&self.served, SEQ_CST) == load64(&self.asked, SEQ_CST)
                             or load_pointer(&self.engine.shard.requests, ACQUIRE) == NULL):
                    break

    cdef void own_once(self) noexcept nogil:
        cdef uint64_t pending = 0
        if connection_acquire(self.target.connection, generation_of(self.target.id), &pending) != ACQUIRED:
            return
        if add64(&self.owners, 1, SEQ_CST) != 1:
            self.torn += 1
        if pending:
            store64(&self.served, load64(&self.asked, SEQ_CST), SEQ_CST)
        add64(&self.owners, <uint64_t>-1, SEQ_CST)
        if connection_release(self.target.connection, 0):
            shard_push(&self.engine.shard, self.target.connection)

    @property
    def counts(self):
        return self.asked, self.served


# --------------------------------------------------------------------------------------------------- entries

cdef class Entries:
    """Batch entries that several threads move at once."""

    cdef tst_entry *entries
    cdef int n

    def __cinit__(self, int n):
        self.n = n
        self.entries = <tst_entry *>calloc(<size_t>n, sizeof(tst_entry))

    def __dealloc__(self):
        free(self.entries)

    def move(self, uint32_t old, uint32_t fresh):
        """Moves whatever still is in `old`. Returns how many this thread moved."""
        cdef int i, moved = 0
        with nogil:
            for i in range(self.n):
                moved += entry_move(&self.entries[i], old, fresh)
        return moved

    def states(self):
        return [self.entries[i].state for i in range(self.n)]


def clear(Connection connection):
    """Forgets a connection's slot without closing its descriptor, which the test owns."""
    memset(connection.connection, 0, sizeof(tst_connection))
    store64(&connection.connection.state, <uint64_t>(generation_of(connection.id) + 1) << 32, RELEASE)


def idle_deadline(uint32_t now, uint32_t idle, bint peer_is_silent, uint32_t step, int times):
    """In ticks from its end: of a connection whose timer fires every `step` ticks, so often; just before, something has
    gone in the one direction, and never in the other."""
    cdef tst_limits limits
    cdef tst_connection connection
    cdef uint32_t due = 0
    cdef int kind = DEADLINE_NONE
    memset(&limits, 0, sizeof(limits))
    memset(&connection, 0, sizeof(connection))
    limits.idle = idle
    connection.limits = &limits
    connection.type = TYPE_SUB
    connection.heard = True
    connection.active_tick = connection.since_tick = connection.output_tick = now
    for _ in range(times):
        now += step
        if peer_is_silent:
            connection.output_tick = now
        else:
            connection.active_tick = now
        connection_age(&connection, now)
        kind = connection_deadline(&connection, False, True, &due)
    assert kind == DEADLINE_IDLE
    return <int32_t>(due - now)


def linger_deadline(uint32_t now, uint32_t linger):
    """In ticks from `now`: of a connection that begins to linger."""
    cdef tst_limits limits
    cdef tst_connection connection
    cdef uint32_t due = 0
    memset(&limits, 0, sizeof(limits))
    memset(&connection, 0, sizeof(connection))
    limits.linger = linger
    connection.limits = &limits
    connection.lingering = True
    connection.active_tick = connection.since_tick = now
    assert connection_deadline(&connection, False, True, &due) == DEADLINE_LINGER
    return <int32_t>(due - now)
