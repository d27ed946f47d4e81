# cython: language_level=3
"""Replies, written into one buffer, which goes to the client when a chunk of requests is done, or when it is full.

In each turn a client is sent REPLY_ROOM bytes at most. What goes beyond that waits in its `rest` (_rest.pxd) for the
next turn, and its next requests wait for that. So a long reply holds nobody up, and a value that waits is not copied.
And whoever reads gets it, however little others do: for a client that nothing waits for, a pool takes so many bytes in
any case (its high_water); whether it takes more depends on what waits for others.

Nothing fails here but the client: once it takes no more (`gone`, `too_much`), what is written is dropped.

They are RESP2. A client that asks for RESP3 (HELLO 3, which some libraries insist on) gets that for the few kinds of
reply in which it differs: null, map, set, and text for people.
"""
from libc.errno cimport ENOBUFS
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, strlen

from tstkv._libc cimport kv_rarely
from tstkv._rest cimport kv_rest, rest_add, rest_add_value, rest_next, rest_took
from tstkv._table cimport entry_value, kv_entry, kv_table
from tstkv._text cimport integer_to_text

cdef enum:
    REPLY_ROOM = 65536         # bytes in the buffer, and that a client is sent in one turn; the usual high_water
    REPLY_SMALL = 4096         # bytes that are copied sooner than it is asked whether anybody gets them
    HEADER_MOST = 23           # bytes in a reply's first line: a sign, an integer and its end


# Takes a copy of the bytes. Returns how many bytes wait for the client now; -ENOBUFS: too much waits, for it or for all
# clients, so that it may take them later; any other negative number: it takes no more.
ctypedef ssize_t (*kv_send)(void *client, const char *bytes, size_t size) noexcept nogil


cdef struct kv_reply:
    char *bytes                # owned
    size_t size                # bytes written and not sent yet
    kv_send send
    void *client               # borrowed for one chunk of requests
    kv_rest *rest              # borrowed from the client, likewise
    kv_table *table            # borrowed from the server
    size_t share               # bytes that the client may still be sent in this turn; 0 also once it was refused some
    size_t waiting             # bytes that wait for the client, as of the last send
    size_t waiting_most
    bint too_much              # more than that would wait, or than there is memory for: the client is to be closed
    bint gone                  # the client takes nothing more; what it has sent is run all the same
    bint resp3                 # the client has asked for it


cdef inline int reply_init(kv_reply *reply, kv_table *table, size_t waiting_most) noexcept nogil:
    """-1: no memory."""
    reply.bytes = <char *>malloc(REPLY_ROOM)
    reply.table = table
    reply.waiting_most = waiting_most
    return 0 if reply.bytes != NULL else -1


cdef inline void reply_free(kv_reply *reply) noexcept nogil:
    free(reply.bytes)
    reply.bytes = NULL


cdef inline void reply_begin(kv_reply *reply, kv_send send, void *client, kv_rest *rest, bint resp3) noexcept nogil:
    """A turn: what is written from here on is for `client`, behind the `rest` of what was written before."""
    reply.size = reply.waiting = 0
    reply.share = REPLY_ROOM
    reply.send = send
    reply.client = client
    reply.rest = rest
    reply.too_much = reply.gone = False
    reply.resp3 = resp3


cdef inline bint reply_is_full(const kv_reply *reply) noexcept nogil:
    """The client has had its turn: its next requests are for another one."""
    return (reply.share < REPLY_ROOM // 2 or reply.rest.size != 0) and not reply.gone


cdef inline bint reply_send(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    """Hands bytes to the client. False: it does not take them, for now or (`gone`) at all."""
    cdef ssize_t waiting = reply.send(reply.client, bytes, size)
    if kv_rarely(waiting < 0):
        reply.gone = waiting != -ENOBUFS
        reply.share = 0
        return False
    reply.share -= size
    reply.waiting = <size_t>waiting
    reply.too_much = reply.waiting > reply.waiting_most
    return True


cdef inline void reply_keep(kv_reply *reply, const char *bytes, size_t size, kv_entry *entry) noexcept nogil:
    """Adds bytes to the rest. entry: whose value they are, or NULL."""
    cdef int result
    if reply.too_much or reply.gone:
        return
    result = rest_add(reply.rest, bytes, size) if entry == NULL else rest_add_value(reply.rest, entry)
    reply.too_much = result < 0 or reply.waiting + reply.rest.size > reply.waiting_most


cdef inline void reply_send_rest(kv_reply *reply) noexcept nogil:
    """Sends as much of the rest as the client may still get in this turn."""
    cdef const char *bytes
    cdef size_t size
    while reply.rest.size and reply.share and not reply.too_much and not reply.gone:
        size = reply.share
        bytes = rest_next(reply.rest, &size)
        if not reply_send(reply, bytes, size):
            return
        rest_took(reply.rest, reply.table, size)


cdef inline void reply_flush(kv_reply *reply) noexcept nogil:
    """Empties the buffer."""
    cdef size_t size = reply.size
    reply.size = 0
    if size == 0 or reply.too_much or reply.gone:
        return
    if kv_rarely(reply.rest.size != 0 or size > reply.share) or not reply_send(reply, reply.bytes, size):
        reply_keep(reply, reply.bytes, size, NULL)


cdef inline char *reply_reserve(kv_reply *reply, size_t size) noexcept nogil:
    """Where the next `size` bytes go; at most REPLY_ROOM."""
    if size > REPLY_ROOM - reply.size:
        reply_flush(reply)
    return reply.bytes + reply.size


cdef inline void reply_large(kv_reply *reply, const char *bytes, size_t size, kv_entry *entry) noexcept nogil:
    """entry: whose value it is, or NULL. Copies nothing that nobody will get, and no value that has to wait."""
    cdef bint waits = size > REPLY_ROOM
    if reply.too_much or reply.gone:
        return
    if entry != NULL:
        waits = reply.size + size > reply.share or reply.rest.size != 0
    if waits:
        reply_flush(reply)
        reply_keep(reply, bytes, size, entry)
        return
    memcpy(reply_reserve(reply, size), bytes, size)
    reply.size += size


cdef inline void reply_bytes(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    if size > REPLY_SMALL:
        reply_large(reply, bytes, size, NULL)
        return
    memcpy(reply_reserve(reply, size), bytes, size)
    reply.size += size


cdef inline void reply_text(kv_reply *reply, const char *text) noexcept nogil:
    """A text that ends with a NUL, as it is."""
    reply_bytes(reply, text, strlen(text))


cdef inline void reply_header(kv_reply *reply, char kind, int64_t number) noexcept nogil:
    """One line: `kind` and a number."""
    cdef char *place = reply_reserve(reply, HEADER_MOST)
    cdef size_t size = 1 + integer_to_text(number, place + 1)
    place[0] = kind
    place[size] = c'\r'
    place[size + 1] = c'\n'
    reply.size += size + 2


cdef inline void reply_integer(kv_reply *reply, int64_t number) noexcept nogil:
    reply_header(reply, c':', number)


cdef inline void reply_array(kv_reply *reply, size_t n) noexcept nogil:
    """The head of an array; its `n` elements are to follow."""
    reply_header(reply, c'*', <int64_t>n)


cdef inline void reply_map(kv_reply *reply, size_t n) noexcept nogil:
    """The head of a map; its `n` keys, each with its value, are to follow."""
    if reply.resp3:
        reply_header(reply, c'%', <int64_t>n)
    else:
        reply_array(reply, 2 * n)


cdef inline void reply_set(kv_reply *reply, size_t n) noexcept nogil:
    """The head of a set; its `n` elements are to follow."""
    reply_header(reply, c'~' if reply.resp3 else c'*', <int64_t>n)


cdef inline void reply_bulk(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    reply_header(reply, c'$', <int64_t>size)
    reply_bytes(reply, bytes, size)
    reply_text(reply, "\r\n")


cdef inline void reply_value(kv_reply *reply, kv_entry *entry) noexcept nogil:
    reply_header(reply, c'$', entry.value_size)
    if kv_rarely(entry.value_size > REPLY_SMALL):
        reply_large(reply, entry_value(entry), entry.value_size, entry)
    else:
        reply_bytes(reply, entry_value(entry), entry.value_size)
    reply_text(reply, "\r\n")


cdef inline void reply_bulk_text(kv_reply *reply, const char *text) noexcept nogil:
    reply_bulk(reply, text, strlen(text))


cdef inline void reply_lines(kv_reply *reply, const char *text) noexcept nogil:
    """Text for people."""
    if not reply.resp3:
        reply_bulk_text(reply, text)
        return
    reply_header(reply, c'=', <int64_t>strlen(text) + 4)
    reply_text(reply, "txt:")
    reply_text(reply, text)
    reply_text(reply, "\r\n")


cdef inline void reply_null(kv_reply *reply) noexcept nogil:
    reply_text(reply, "_\r\n" if reply.resp3 else "$-1\r\n")


cdef inline void reply_ok(kv_reply *reply) noexcept nogil:
    reply_text(reply, "+OK\r\n")


cdef inline void reply_error(kv_reply *reply, const char *text) noexcept nogil:
    """An error of which nothing comes from a client."""
    reply_text(reply, "-ERR ")
    reply_text(reply, text)
    reply_text(reply, "\r\n")


cdef inline void reply_peer_text(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    """What a client has sent, inside a line: what would end the line becomes a space, and a NUL ends the text."""
    cdef size_t i
    cdef char byte
    for i in range(size):
        byte = bytes[i]
        if byte == 0:
            break
        if byte == c'\r' or byte == c'\n':
            byte = c' '
        reply_bytes(reply, &byte, 1)


cdef inline void reply_peer_end(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    """The same at the end of a line: without the line ends that it ends with, as Redis does it."""
    cdef const char *end = <const char *>memchr(bytes, 0, size)
    if end != NULL:
        size = <size_t>(end - bytes)
    while size and (bytes[size - 1] == c'\r' or bytes[size - 1] == c'\n'):
        size -= 1
    reply_peer_text(reply, bytes, size)
    reply_text(reply, "\r\n")
