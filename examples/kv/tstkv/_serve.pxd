# cython: language_level=3
"""From bytes that a client has sent to bytes that it gets: runs each whole request of a chunk and keeps what is left.

    unread      [ run already |  not run yet  |  room  ]
                0           begin            end    capacity

A chunk that finds nothing unread is run where it was received, and only what is left of it is kept. Its replies are
collected and sent once, at the end of the chunk. If they are long they are sent over several turns (_reply.pxd), and
until all of them have been sent what has come behind stays unread.

What one client can make us hold has these limits (kv_limits):

    argument        longer: an error as Redis words it, and the connection is closed
    request         more unread, or more since MULTI: closed. The buffers are at most four times as large. From half of
                    it on nothing is received while requests wait (holds_back): not earlier, for there are clients that
                    send all of theirs before they read a reply
    output_pause    more replies waiting: its next requests stay unread until it has read the replies (SERVE_PAUSED)
    output          more, by one command: closed
    waiting         more unread, and copied to be sent, by all clients together: who then needs more memory is closed,
                    unless that is little (CLIENT_SMALL), for those who hold the most are others

Nobody else is served meanwhile. So who has sent much work is interrupted after RUN_MOST, and goes on when others have
had their turn (SERVE_PAUSED too).
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from tstkv._call cimport CALL_CLOSE, CALL_DONE, kv_call, kv_client, kv_server, now_milliseconds
from tstkv._dispatch cimport commands_init, dispatch
from tstkv._libc cimport kv_rarely, pthread_mutex_destroy, pthread_mutex_init
from tstkv._multi cimport queued_forget
from tstkv._reply cimport (
    kv_reply, kv_send, reply_begin, reply_flush, reply_free, reply_init, reply_is_full, reply_peer_text,
    reply_send_rest, reply_text)
from tstkv._resp cimport (
    LINE_MOST, RESP_BROKEN, RESP_PARTIAL, RESP_WHOLE, kv_request, request_free, request_init, request_memory,
    request_reset, request_seen, resp_parse)
from tstkv._rest cimport rest_forget
from tstkv._table cimport table_free, table_init

cdef enum:
    UNREAD_LEAST = 1024        # bytes in a buffer
    CLIENT_SMALL = 65536       # bytes that a client may have in any case
    RUN_MOST = 10              # milliseconds for requests of one client, beside what the last of them needs
    RUN_STEP = 65536           # bytes of a backlog that are run before the clock is looked at

# What is to be done with the connection now.
cdef enum:
    SERVE_MORE = 0             # wait for more requests
    SERVE_PAUSED = 1           # call serve_again once its replies have been sent and others have been served
    SERVE_CLOSE = 2            # close it when what is queued has been sent
    SERVE_CUT = 3              # inside this file: close it, although it may not have got all of its replies


# ---------------------------------------------------------------------------------------- server and client

cdef inline int server_init(kv_server *server, uint64_t maxmemory, const uint64_t *hash_key) noexcept nogil:
    """Of a zeroed server whose limits are set. 0 or -ENOMEM."""
    pthread_mutex_init(&server.mutex, NULL)
    commands_init(server)
    server.started = now_milliseconds()
    server.line = <char *>malloc(LINE_MOST)
    if server.line == NULL or reply_init(&server.reply, &server.table, server.limits.output) < 0:
        return -ENOMEM
    return table_init(&server.table, maxmemory, hash_key)


cdef inline void server_free(kv_server *server) noexcept nogil:
    table_free(&server.table)
    reply_free(&server.reply)
    free(server.line)
    pthread_mutex_destroy(&server.mutex)


cdef inline bint client_begin(kv_server *server, kv_client *client) noexcept nogil:
    """Of a zeroed client. False: there are too many."""
    request_init(&client.request)
    server.n_connections += 1
    client.id = server.n_connections
    if server.n_clients >= server.limits.clients:
        client.closed = True
        return False
    client.counted = True
    server.n_clients += 1
    return True


cdef inline void client_close(kv_server *server, kv_client *client) noexcept nogil:
    """Nothing more of it is run, so that nothing that it has sent is needed; also of one that never began."""
    client.closed = True
    client.waits = False
    if client.id:
        request_reset(&client.request)
        request_free(&client.request)
    queued_forget(&client.queued)
    rest_forget(&client.rest, &server.table)
    free(client.unread)
    client.unread = NULL
    client.begin = client.end = client.capacity = 0
    server.waiting_memory -= client.memory
    client.memory = 0


cdef inline void client_forget(kv_server *server, kv_client *client) noexcept nogil:
    """The last that is done with a client."""
    client_close(server, client)
    server.n_clients -= client.counted
    client.counted = False


# --------------------------------------------------------------------------------------------------- unread

cdef inline bint unread_grow(kv_client *client, size_t size) noexcept nogil:
    """Makes room for `size` bytes behind `end`. False: no memory."""
    cdef size_t capacity = max(client.capacity, <size_t>UNREAD_LEAST)
    cdef char *unread
    # Moving them up is paid for by as many that were run; so a long backlog is not moved for each few of them.
    if client.begin > 0 and client.begin >= client.end - client.begin:
        memmove(client.unread, client.unread + client.begin, client.end - client.begin)
        client.end -= client.begin
        client.begin = 0
    while capacity - client.end < size:
        capacity *= 2
    if capacity == client.capacity:
        return True
    unread = <char *>realloc(client.unread, capacity)
    if unread == NULL:
        return False
    client.unread, client.capacity = unread, capacity
    return True


cdef inline bint unread_keep(kv_server *server, kv_client *client, const char *bytes, size_t size) noexcept nogil:
    """Appends. False: that is more than the client may have, or than there is."""
    if size > server.limits.request or client.end - client.begin > server.limits.request - size:
        return False
    if client.capacity - client.end < size and not unread_grow(client, size):
        return False
    memcpy(client.unread + client.end, bytes, size)
    client.end += size
    return True


cdef inline void unread_took(kv_client *client, size_t size) noexcept nogil:
    """The first `size` unread bytes have been run."""
    client.begin += size
    if client.begin == client.end:
        free(client.unread)
        client.unread = NULL
        client.begin = client.end = client.capacity = 0


cdef inline bint client_account(kv_server *server, kv_client *client) noexcept nogil:
    """Enters what the client holds now. False: all of them together hold too much, and it has made that worse."""
    cdef size_t before = client.memory
    client.memory = client.capacity + client.queued.capacity + request_memory(&client.request) + client.rest.memory
    server.waiting_memory += client.memory - before
    return client.memory <= before or client.memory <= CLIENT_SMALL or (
        server.waiting_memory <= server.limits.waiting)


# ------------------------------------------------------------------------------------------------- requests

cdef inline void reply_broken(kv_reply *reply, kv_request *request) noexcept nogil:
    reply_text(reply, "-ERR Protocol error: ")
    reply_text(reply, request.error)
    if request.unexpected:
        reply_text(reply, "'")
        reply_peer_text(reply, &request.unexpected, 1)
        reply_text(reply, "'")
    reply_text(reply, "\r\n")


cdef inline int run(kv_server *server, kv_client *client, const char *bytes, size_t size, size_t *done) noexcept nogil:
    """Runs the whole requests at the beginning of `bytes`; they took `done` bytes. Returns SERVE_*."""
    cdef kv_call call
    cdef size_t used = 0
    cdef int found, result
    cdef int64_t begin = now_milliseconds()
    call.server, call.client, call.reply, call.request = server, client, &server.reply, &client.request
    call.now = begin
    done[0] = 0
    while done[0] < size:
        if kv_rarely(reply_is_full(&server.reply)):
            return SERVE_PAUSED
        found = resp_parse(&client.request, bytes + done[0], size - done[0], server.limits.argument, server.line, &used)
        if found == RESP_PARTIAL:
            return SERVE_MORE
        if kv_rarely(found != RESP_WHOLE):
            if found == RESP_BROKEN:
                reply_broken(&server.reply, &client.request)
            return SERVE_CLOSE
        call.bytes, call.size, call.steps = bytes + done[0], used, 0
        result = dispatch(&call) if client.request.n else CALL_DONE
        request_reset(&client.request)
        done[0] += used
        if kv_rarely(result != CALL_DONE or server.reply.too_much):
            if result == CALL_CLOSE or server.reply.too_much:
                return SERVE_CLOSE
            call.now = now_milliseconds()
            if call.now - begin >= RUN_MOST and done[0] < size:
                return SERVE_PAUSED
    return SERVE_MORE


cdef inline int run_unread(kv_server *server, kv_client *client) noexcept nogil:
    """Runs what is unread, or only its beginning: it may be a lot of work."""
    cdef int64_t begin = now_milliseconds()
    cdef size_t size, done = 0
    cdef int outcome
    while True:
        size = min(request_seen(&client.request) + RUN_STEP, client.end - client.begin)
        outcome = run(server, client, client.unread + client.begin, size, &done)
        unread_took(client, done)
        if outcome != SERVE_MORE or size - done == client.end - client.begin:
            return outcome
        if now_milliseconds() - begin >= RUN_MOST:
            return SERVE_PAUSED


cdef inline int run_chunk(kv_server *server, kv_client *client, const char *bytes, size_t size) noexcept nogil:
    cdef size_t done = 0
    cdef int outcome
    if client.ends:
        return SERVE_CLOSE
    if client.unread != NULL or client.waits:
        if not unread_keep(server, client, bytes, size):
            return SERVE_CUT
        return SERVE_PAUSED if client.waits else run_unread(server, client)
    outcome = run(server, client, bytes, size, &done)
    if outcome != SERVE_CLOSE and done < size and not unread_keep(server, client, bytes + done, size - done):
        return SERVE_CUT
    return outcome


cdef inline int finish(kv_server *server, kv_client *client, int outcome) noexcept nogil:
    """Ends a chunk: sends its replies, or the beginning of them. Returns SERVE_*."""
    reply_flush(&server.reply)
    reply_send_rest(&server.reply)
    if server.reply.gone or server.reply.too_much or not client_account(server, client) or outcome == SERVE_CUT:
        outcome = SERVE_CLOSE
    elif client.rest.size:
        client.ends = outcome == SERVE_CLOSE   # which is for later
        outcome = SERVE_PAUSED
    elif outcome == SERVE_MORE and server.reply.waiting >= server.limits.output_pause:
        outcome = SERVE_PAUSED
    client.waits = outcome == SERVE_PAUSED
    client.holds_back = client.waits and client.end - client.begin >= server.limits.request // 2
    if outcome == SERVE_CLOSE:
        client_close(server, client)
    return outcome


# The caller holds server.mutex for each of these.

cdef inline int serve_chunk(kv_server *server, kv_client *client, const char *bytes, size_t size, kv_send send,
                            void *to) noexcept nogil:
    """The client has sent `bytes`. Its replies go through send(to, ...). Returns SERVE_*."""
    if client.closed:
        return SERVE_CLOSE
    reply_begin(&server.reply, send, to, &client.rest, client.resp3)
    if client.waits:
        server.reply.share = 0                 # however much it sends, it gets more when it has read what it was sent
    return finish(server, client, run_chunk(server, client, bytes, size))


cdef inline int serve_again(kv_server *server, kv_client *client, kv_send send, void *to) noexcept nogil:
    """The client has read what it was sent: it gets more of the rest, and once that is gone its requests that waited
    are run. Returns SERVE_*."""
    cdef size_t before = client.rest.size
    if client.closed:
        return SERVE_CLOSE
    client.waits = False
    reply_begin(&server.reply, send, to, &client.rest, client.resp3)
    if before:
        reply_send_rest(&server.reply)
        # It has read all that it was sent, and is refused more: the pool's high_water is less than REPLY_ROOM. It would
        # be tried again at once, for ever.
        if client.rest.size == before and not server.reply.gone:
            return finish(server, client, SERVE_CUT)
    if client.ends:
        return finish(server, client, SERVE_CLOSE)
    return finish(server, client, run_unread(server, client) if client.unread != NULL else SERVE_MORE)


cdef inline ssize_t send_nowhere(void *client, const char *bytes, size_t size) noexcept nogil:
    return -1


cdef inline void serve_end(kv_server *server, kv_client *client) noexcept nogil:
    """The client is gone. What it had sent is run, as if it had been run when it came; nobody gets the replies. What is
    too much work for one turn is not run: there is no other turn."""
    rest_forget(&client.rest, &server.table)
    if client.waits and not client.closed:
        serve_again(server, client, send_nowhere, NULL)
    client_close(server, client)
