# cython: language_level=3
"""What a command works with: the server, the client who sent it, its arguments, and where the reply goes."""
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from tstkv._libc cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, clockid_t, pthread_mutex_t, timespec
from tstkv._reply cimport kv_reply, reply_error, reply_text
from tstkv._resp cimport kv_request
from tstkv._rest cimport kv_rest
from tstkv._table cimport kv_table
from tstkv._text cimport text_is, text_to_integer

cdef enum:
    COMMANDS_MOST = 48
    NAME_MOST = 64             # bytes in the name that a client gives itself

# What a command returns.
cdef enum:
    CALL_DONE = 0
    CALL_CLOSE = 1             # close the connection once the replies have been sent
    CALL_LONG = 2              # done; it may have taken long

# What a command is; COMMAND tells clients.
cdef enum:
    COMMAND_WRITES = 1
    COMMAND_READS = 2
    COMMAND_GROWS = 4          # needs memory, and is refused when there is none
    COMMAND_FAST = 8
    COMMAND_AT_ONCE = 16       # runs inside MULTI too, instead of being queued
    COMMAND_LONG = 32          # a few bytes of it make much work; it returns CALL_LONG


cdef struct kv_call            # below


ctypedef int (*kv_function)(kv_call *call) noexcept nogil


cdef struct kv_command:
    uint64_t word              # its name, by word_of
    uint64_t parent            # the same of CONFIG, for CONFIG GET; else 0
    const char *name           # "get", or "config|get"
    int arity                  # arguments with the name itself; -n: n or more
    int flags                  # COMMAND_*
    int first_key              # argument; 0: there is none
    int last_key               # -1: the last argument
    int key_step
    bint has_children
    kv_function function


cdef struct kv_limits:
    size_t argument            # bytes in one argument
    size_t request             # bytes of a client that wait here to be run: a request that is not whole, or more
    size_t output              # bytes of replies that wait for a client to read them
    size_t output_pause        # ... and from which its further requests wait until it has
    uint64_t waiting           # bytes of all clients that wait here: requests to be run, replies to be sent
    uint64_t clients


cdef struct kv_server:
    pthread_mutex_t mutex      # guards all that follows; held for one chunk of one client's requests
    kv_table table
    kv_reply reply
    kv_limits limits
    kv_command commands[COMMANDS_MOST]
    int n_commands
    char *line                 # owned: LINE_MOST bytes for the words of an inline command
    int64_t started            # milliseconds on the monotonic clock
    uint64_t n_clients         # open now
    uint64_t n_connections     # since the start
    uint64_t n_calls           # commands since the start
    uint64_t waiting_memory    # bytes that wait to be run or sent, all clients'


# The requests between MULTI and EXEC, as they were sent.
cdef struct kv_queued:
    bint open                  # MULTI was sent
    bint spoiled               # one of them was refused, so that EXEC will be
    size_t n
    size_t n_long              # of which are COMMAND_LONG
    char *bytes                # owned; NULL: none
    size_t size
    size_t capacity


# One connection. The handler's state: zeroed at first.
cdef struct kv_client:
    uint64_t id                # from 1 on
    kv_request request         # the one that is coming in
    char *unread               # owned: what has come and is not run yet, from `begin` to `end`; NULL: nothing
    size_t begin
    size_t end
    size_t capacity
    kv_rest rest               # of its replies: what is to be sent in the next turns
    size_t memory              # its part of waiting_memory
    bint counted               # in n_clients
    bint waits                 # its requests wait for another turn, or until it has read its replies
    bint holds_back            # it has sent much meanwhile: no more is to be received until some of that has been run
    bint ends                  # nothing more is run; it is to be closed once the rest of its replies has been sent
    bint closed                # nothing more is run, nothing more is sent
    bint resp3                 # it has asked for RESP3
    kv_queued queued           # what it has sent since MULTI
    size_t name_size
    char name[NAME_MOST]


cdef struct kv_call:
    kv_server *server
    kv_client *client
    kv_reply *reply            # the server's
    kv_command *command
    kv_request *request
    const char *bytes          # of the whole request, as it was sent
    size_t size
    int64_t now                # milliseconds on the monotonic clock
    uint64_t steps             # that KEYS has taken in this request; EXEC is one, whatever it runs


cdef inline int64_t clock_milliseconds(clockid_t clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return <int64_t>now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef inline int64_t now_milliseconds() noexcept nogil:
    return clock_milliseconds(CLOCK_MONOTONIC)


cdef inline bint time_fits(int64_t now, int64_t milliseconds) noexcept nogil:
    """False: so far from now there is no 64-bit time, neither on our clock nor on that of the day, which is Redis's."""
    return milliseconds <= INT64_MAX // 2 or (
        milliseconds <= INT64_MAX - now and milliseconds <= INT64_MAX - clock_milliseconds(CLOCK_REALTIME))


# ------------------------------------------------------------------------------------------------ arguments

cdef inline size_t n_arguments(kv_call *call) noexcept nogil:
    """The name of the command is the first one."""
    return call.request.n


cdef inline const char *argument(kv_call *call, size_t i) noexcept nogil:
    return call.request.base + call.request.spans[i].offset


cdef inline size_t argument_size(kv_call *call, size_t i) noexcept nogil:
    return call.request.spans[i].size


cdef inline bint argument_is(kv_call *call, size_t i, const char *word) noexcept nogil:
    """In whatever case; `word` is in lower case."""
    return text_is(argument(call, i), argument_size(call, i), word)


cdef inline bint argument_integer(kv_call *call, size_t i, int64_t *number) noexcept nogil:
    """False: it is none, and the client has been told."""
    if text_to_integer(argument(call, i), argument_size(call, i), number):
        return True
    reply_error(call.reply, "value is not an integer or out of range")
    return False


# --------------------------------------------------------------------------------------------------- errors

cdef inline void reply_about(kv_call *call, const char *before, const char *after) noexcept nogil:
    """An error that names the command."""
    reply_text(call.reply, "-ERR ")
    reply_text(call.reply, before)
    reply_text(call.reply, call.command.name)
    reply_text(call.reply, after)
    reply_text(call.reply, "\r\n")


cdef inline void reply_wrong_number(kv_call *call) noexcept nogil:
    reply_about(call, "wrong number of arguments for '", "' command")


cdef inline void reply_wrong_time(kv_call *call) noexcept nogil:
    reply_about(call, "invalid expire time in '", "' command")


cdef inline void reply_syntax(kv_call *call) noexcept nogil:
    reply_error(call.reply, "syntax error")


cdef inline void reply_no_memory(kv_call *call) noexcept nogil:
    reply_text(call.reply, "-OOM command not allowed when used memory > 'maxmemory'.\r\n")
