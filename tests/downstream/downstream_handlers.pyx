# cython: language_level=3, freethreading_compatible=True
"""Handlers in Cython for tstpool, as a package of somebody else's would have them.

Nothing but `cimport tstpool` and libc. tests/test_compiled_*.py drive them over sockets; tests/test_packaging.py builds
this folder against the wheel alone.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport dup2, usleep

from tstpool cimport (
    TST_DISCONNECT, TST_RECONNECTED, TST_RUN, TST_SEND, TST_SUSPEND, TstHandler, TstNogilHandler, TstSocket, TstStat,
    tst_close, tst_need_send, tst_pause, tst_resume, tst_send, tst_send_eof, tst_send_message)

cdef extern from * nogil:
    int ACQUIRE "__ATOMIC_ACQUIRE"
    void *load_pointer "__atomic_load_n"(void **place, int order)


STATS = {"SUSPEND": TST_SUSPEND, "RUN": TST_RUN, "SEND": TST_SEND, "RECONNECTED": TST_RECONNECTED,
         "DISCONNECT": TST_DISCONNECT}

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_create(pthread_t *thread, void *attributes, void *(*function)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from *:
    # Atomics of the compiler: hooks of different connections run at the same time.
    int64_t add "__sync_add_and_fetch"(int64_t *number, int64_t step) nogil


cdef inline int64_t load(int64_t *number) noexcept nogil:
    return add(number, 0)


cdef class Echo(TstNogilHandler):
    """Bytes go back as they come."""

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_SUSPEND if tst_send(sock, data, size) >= 0 else TST_DISCONNECT


cdef class FramedEcho(TstNogilHandler):
    """Messages go back as they come."""

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_SUSPEND if tst_send_message(sock, data, size) >= 0 else TST_DISCONNECT


cdef class Upper(TstHandler):
    """An extension class with Python's hooks: it holds the GIL, and may use the functions in C all the same."""

    def on_message(self, TstSocket sock, bytes data):
        cdef bytes upper = data.upper()
        if tst_send_message(sock, <const char *>upper, <size_t>len(upper)) < 0:
            return TST_DISCONNECT


# --------------------------------------------------------------------------------- state of each connection

cdef struct State:
    void *place            # where it lies: it must never move
    uint64_t n             # messages so far
    char *last             # owned: a copy of the last message
    bint over              # disconnected

cdef enum:
    CONNECTED, ADOPTED, RECEIVED, WRITABLE, DISCONNECTED, RELEASED, COPIES_MADE, COPIES_FREED, BROKEN, N_COUNTS

COUNTS = ("connected", "adopted", "received", "writable", "disconnected", "released", "copies_made", "copies_freed",
          "broken")


cdef class Counting(TstNogilHandler):
    """Echoes messages, keeps a copy of each connection's last one, and counts what it is told.

    `adopted`: connections that were there before they got this handler. `broken` counts what must never happen: a state
    that isn't zeroed, has moved, or is used after its time.
    """
    cdef int64_t numbers[N_COUNTS]

    def __cinit__(self):
        self.state_size = sizeof(State)

    @property
    def counts(self):
        return {COUNTS[i]: load(&self.numbers[i]) for i in range(N_COUNTS)}

    cdef State *state_of(self, TstSocket sock) noexcept nogil:
        """The connection's state, marked as known when it is seen for the first time."""
        cdef State *state = <State *>sock.state
        cdef State zeros
        memset(&zeros, 0, sizeof(State))
        if state.place == NULL:
            if memcmp(state, &zeros, sizeof(State)) != 0:
                add(&self.numbers[BROKEN], 1)
            state.place = state
            add(&self.numbers[ADOPTED], 1)
        elif state.place != state or state.over:
            add(&self.numbers[BROKEN], 1)
        return state

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        self.state_of(sock)
        add(&self.numbers[ADOPTED], -1)
        add(&self.numbers[CONNECTED], 1)
        return TST_RUN

    cdef void keep(self, State *state, const char *data, size_t size) noexcept nogil:
        if state.last != NULL:
            free(state.last)
            add(&self.numbers[COPIES_FREED], 1)
        state.last = <char *>malloc(size + 1)
        if state.last != NULL:
            memcpy(state.last, data, size)
            add(&self.numbers[COPIES_MADE], 1)

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef State *state = self.state_of(sock)
        state.n += 1
        self.keep(state, data, size)
        add(&self.numbers[RECEIVED], 1)
        return TST_SUSPEND if tst_send_message(sock, data, size) >= 0 else TST_DISCONNECT

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        self.state_of(sock)
        add(&self.numbers[WRITABLE], 1)
        return TST_RUN

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        self.state_of(sock).over = True
        add(&self.numbers[DISCONNECTED], 1)

    cdef void release(self, void *state) noexcept nogil:
        cdef State *own = <State *>state
        if own.place != NULL and own.place != state:
            add(&self.numbers[BROKEN], 1)
        if own.last != NULL:
            free(own.last)
            add(&self.numbers[COPIES_FREED], 1)
        add(&self.numbers[RELEASED], 1)


cdef class Refusing(Counting):
    """Says why, and refuses everybody."""

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        Counting.connected(self, sock)
        tst_send(sock, b"go away", 7)
        return TST_DISCONNECT


cdef class Defaults(TstNogilHandler):
    """Has a C state and asks for `writable`, but has neither that hook nor `release`."""

    def __cinit__(self):
        self.state_size = 8

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        tst_need_send(sock)
        return TST_SUSPEND


cdef class Writing(Defaults):
    """As above, and answers in `writable`."""

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        tst_send(sock, b"room", 4)
        return TST_SUSPEND


cdef class Calls(TstNogilHandler):
    """Counts its calls; has no state for a connection."""
    cdef int64_t n_connected, n_received, n_writable, n_disconnected       # atomic

    @property
    def connected_calls(self):
        return load(&self.n_connected)

    @property
    def received_calls(self):
        return load(&self.n_received)

    @property
    def writable_calls(self):
        return load(&self.n_writable)

    @property
    def disconnected_calls(self):
        return load(&self.n_disconnected)


cdef class PassesOn(Calls):
    """Answers each message with much, asks for `writable`, and passes the message on to Python."""

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef char much[100000]
        memset(much, b"r", sizeof(much))
        add(&self.n_received, 1)
        tst_send(sock, much, sizeof(much))
        tst_need_send(sock)
        return TST_RUN

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        add(&self.n_writable, 1)
        return TST_SUSPEND


cdef class Hearing(Calls):
    """Echoes."""

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        add(&self.n_connected, 1)
        return TST_SUSPEND

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        add(&self.n_received, 1)
        tst_send_message(sock, data, size)
        return TST_SUSPEND

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        add(&self.n_writable, 1)
        return TST_SUSPEND

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        add(&self.n_disconnected, 1)


cdef class Ending(Calls):
    """Echoes. When its peer has finished it says so, then does what it was made for: "end" (tst_send_eof, from here on
    it closes by itself), "keep", "close", or "pass" on to Python."""
    cdef int64_t n_eof, n_wrong    # atomic
    cdef char verdict

    def __cinit__(self, str verdict="end", *args):
        self.verdict = <char>ord(verdict[0])

    @property
    def eof_calls(self):
        return load(&self.n_eof)

    @property
    def wrong_results(self):
        return load(&self.n_wrong)

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        add(&self.n_received, 1)
        tst_send_message(sock, data, size)
        return TST_SUSPEND

    cdef TstStat eof(self, TstSocket sock) noexcept nogil:
        add(&self.n_eof, 1)
        tst_send(sock, b"over", 4)
        if self.verdict == c"p":
            return TST_RUN
        if self.verdict == c"c":
            return TST_DISCONNECT
        if self.verdict == c"e" and (
                tst_send_eof(sock) != 1 or tst_send_eof(sock) != 0 or tst_send(sock, b"x", 1) >= 0):
            add(&self.n_wrong, 1)
        return TST_SUSPEND

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        add(&self.n_disconnected, 1)


cdef class Huge(TstNogilHandler):
    """Wants more state for a connection than there is memory."""

    def __cinit__(self):
        self.state_size = <size_t>1 << 50


cdef class Empty(TstNogilHandler):
    """Answers with an empty message, which is no memory at all."""

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        tst_send(sock, NULL, 0)
        tst_send_message(sock, NULL, 0)
        return TST_SUSPEND


cdef bytes outcome(function):
    try:
        return repr(function()).encode()
    except Exception as error:
        return type(error).__name__.encode()


cdef class Commands(Counting):
    """The first byte of a message says what is done with it.

        e  echo it                           r  pass it on to Python
        s  return TST_SEND                   n  ask for `writable`
        b  wait for open_gate(), echo it     B  wait for open_gate(), pass it on to Python
        p  as b, after a message "waiting"   w  as b, but compute meanwhile
        z  sleep 0.15 s, echo it
        q  say "bye" and return TST_DISCONNECT      c  say "closed" and close itself by tst_close()
        h  tst_pause() itself: a thread calls resume() below       H  the same, and pass it on to Python
        -  return a number that is none of TstStat's, as one does who returns what tst_send() has returned
        g  say what happens to one that takes the GIL, which it may not, to read or to change the framing
        x  return TST_RECONNECTED, with what new_descriptor is put under the socket's descriptor
    """
    cdef int64_t gate          # atomic: open_gate() was called so often
    cdef int64_t inside        # atomic: hooks that wait at the gate
    cdef public int new_descriptor
    cdef public bint blocks_connects       # `connected` waits at the gate, too

    @property
    def waiting(self):
        return load(&self.inside)

    def open_gate(self):
        add(&self.gate, 1)

    cdef void wait(self, bint sleeping) noexcept nogil:
        """Until the gate is open, but for no more than 30 s."""
        cdef timespec begin, now
        clock_gettime(CLOCK_MONOTONIC, &begin)
        now = begin
        add(&self.inside, 1)
        while not load(&self.gate) and now.tv_sec - begin.tv_sec < 30:
            if sleeping:
                usleep(1000)
            clock_gettime(CLOCK_MONOTONIC, &now)
        add(&self.inside, -1)

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        if self.blocks_connects:
            self.wait(True)
        return Counting.connected(self, sock)

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef char command = data[0] if size else 0
        if command == c"r" or command == c"H":
            self.state_of(sock)
            if command == c"H":
                tst_pause(sock)
            return TST_RUN
        if command == c"-":
            return <TstStat><int>-105
        if command == c"g":
            with gil:
                said = b" ".join([outcome(lambda: sock.read()), outcome(lambda: setattr(sock, "framing", None))])
                sock.send_message(said)
            return TST_SUSPEND
        if command == c"s" or command == c"n" or command == c"q" or command == c"c" or command == c"x" or (
                command == c"h"):
            return self.control(sock, command)
        if command == c"p":
            tst_send_message(sock, b"waiting", 7)
        if command == c"b" or command == c"B" or command == c"p" or command == c"w":
            self.wait(command != c"w")
            if command == c"B":
                return TST_RUN
        elif command == c"z":
            usleep(150000)
        return Counting.received(self, sock, data, size)

    cdef TstStat control(self, TstSocket sock, char command) noexcept nogil:
        cdef TstStat stat = TST_SUSPEND
        self.state_of(sock)
        if command == c"s":
            stat = TST_SEND
        elif command == c"n":
            tst_need_send(sock)
        elif command == c"h":
            tst_pause(sock)
        elif command == c"c":
            tst_send(sock, b"closed", 6)
            tst_close(sock)
        elif command == c"x":
            dup2(self.new_descriptor, <int>(sock.id & 0x7fffffff))
            stat = TST_RECONNECTED
        elif command == c"q":
            tst_send(sock, b"bye", 3)
            stat = TST_DISCONNECT
        add(&self.numbers[RECEIVED], 1)        # last: who sees it knows that the above is done
        return stat

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        Counting.writable(self, sock)
        tst_send(sock, b"writable;", 9)
        return TST_RUN


# ------------------------------------------------------------------------------------- several connections

cdef enum:
    MEMBERS = 64


cdef class Relay(TstNogilHandler):
    """Each message goes to every other connection. "close" closes them all, the sender last."""
    cdef pthread_mutex_t mutex             # hooks of different connections run at the same time
    cdef void *members[MEMBERS]            # borrowed TstSockets: valid from `connected` to `disconnected`

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def __len__(self):
        cdef int i
        pthread_mutex_lock(&self.mutex)
        n = sum([self.members[i] != NULL for i in range(MEMBERS)])
        pthread_mutex_unlock(&self.mutex)
        return n

    cdef bint exchange(self, void *old, void *new) noexcept nogil:
        cdef int i
        cdef bint found = False
        pthread_mutex_lock(&self.mutex)
        for i in range(MEMBERS):
            if self.members[i] == old:
                self.members[i] = new
                found = True
                break
        pthread_mutex_unlock(&self.mutex)
        return found

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        return TST_SUSPEND if self.exchange(NULL, <void *>sock) else TST_DISCONNECT

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef int i
        cdef bint closing = size == 5 and memcmp(data, b"close", 5) == 0
        pthread_mutex_lock(&self.mutex)
        for i in range(MEMBERS):
            if self.members[i] != NULL and self.members[i] != <void *>sock:
                if closing:
                    tst_close(<TstSocket>self.members[i])
                else:
                    tst_send_message(<TstSocket>self.members[i], data, size)
        pthread_mutex_unlock(&self.mutex)
        return TST_DISCONNECT if closing else TST_SUSPEND

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        self.exchange(<void *>sock, NULL)


cdef class Meeting(TstNogilHandler):
    """Answers each message with how many of these hooks were inside at once, at most `wanted`. Waits 10 s for them."""
    cdef int64_t arrived
    cdef public int64_t wanted
    cdef public double seconds

    def __cinit__(self):
        self.wanted = 2
        self.seconds = 10

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef int _n
        cdef char seen
        add(&self.arrived, 1)
        for _n in range(<int>(self.seconds * 1000)):
            if load(&self.arrived) >= self.wanted:
                break
            usleep(1000)
        seen = <char>(c"0" + load(&self.arrived))
        tst_send(sock, &seen, 1)
        return TST_SUSPEND


# --------------------------------------------------------------------------------------------- any thread

cdef struct Push:
    void *sock             # borrowed: run_threads() holds it
    pthread_t thread
    int64_t n              # messages to send
    int64_t number         # of the thread
    int64_t sent           # messages that were taken
    ssize_t result         # of the last call


cdef void *push_all(void *argument) noexcept nogil:
    """A thread's life: numbered messages, until all are sent or the connection is closed."""
    cdef Push *push = <Push *>argument
    cdef int64_t message[2]
    message[0] = push.number
    while push.sent < push.n:
        message[1] = push.sent
        push.result = tst_send_message(<TstSocket>push.sock, message, sizeof(message))
        if push.result < 0:
            break
        push.sent += 1
    return NULL


def pause(TstSocket sock):
    """What tst_pause returns."""
    return tst_pause(sock)


def answer_and_resume(TstSocket sock, bytes answer):
    """What tst_resume returns, behind a message."""
    cdef const char *bytes = answer
    cdef size_t size = len(answer)
    cdef int result
    with nogil:
        tst_send_message(sock, bytes, size)
        result = tst_resume(sock)
    return result


def push(TstSocket sock, int threads, int64_t n):
    """Sends n messages from each of so many threads that Python knows nothing of; each is two 64-bit numbers, the
    thread's and the message's. Returns [(messages sent, last result)]."""
    cdef Push pushes[16]
    cdef int i
    if not 0 < threads <= 16:
        raise ValueError("1 to 16 threads")
    for i in range(threads):
        pushes[i].sock = <void *>sock
        pushes[i].n = n
        pushes[i].number = i
        pushes[i].sent = pushes[i].result = 0
        if pthread_create(&pushes[i].thread, NULL, push_all, &pushes[i]):
            raise MemoryError("no thread")
    with nogil:
        for i in range(threads):
            pthread_join(pushes[i].thread, NULL)
    return [(pushes[i].sent, pushes[i].result) for i in range(threads)]


def send(TstSocket sock, bytes data):
    """tst_send() as it is: how many bytes wait, or a negative errno."""
    return tst_send(sock, <const char *>data, <size_t>len(data))


def send_message(TstSocket sock, bytes data):
    return tst_send_message(sock, <const char *>data, <size_t>len(data))


def close(TstSocket sock):
    return tst_close(sock)


def need_send(TstSocket sock):
    return tst_need_send(sock)


def state_of(TstSocket sock):
    """Where the connection's state lies; 0 when it has none."""
    return <size_t>load_pointer(&sock.state, ACQUIRE)      # the tests ask from a thread of their own
