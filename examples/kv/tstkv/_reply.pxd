# cython: language_level=3
"""Replies, written into one buffer, which goes to the client when a chunk of requests is done, or when it is full.

A reply that is longer than the buffer goes to the client from where it lies. So nothing here grows, and nothing fails
but the client: once it takes no more (`gone`, `too_much`), what is written is dropped.

They are RESP2. A client that asks for RESP3 (HELLO 3, which some libraries insist on) gets that for the few kinds of
reply in which it differs: null, map, set, and text for people.
"""
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, strlen

from tstkv._text cimport integer_to_text

cdef enum:
    REPLY_ROOM = 65536         # bytes in the buffer
    REPLY_SMALL = 4096         # bytes that are copied sooner than it is asked whether anybody gets them
    HEADER_MOST = 23           # bytes in a reply's first line: a sign, an integer and its end


# Takes a copy of the bytes. Returns how many bytes wait for the client now, or a negative number: it takes no more.
ctypedef ssize_t (*kv_send)(void *client, const char *bytes, size_t size) noexcept nogil


cdef struct kv_reply:
    char *bytes                # owned
    size_t size                # bytes written and not sent yet
    kv_send send
    void *client               # borrowed for one chunk of requests
    size_t waiting             # bytes that wait for the client, as of the last send
    size_t waiting_most
    bint too_much              # more than that would wait: the client is to be closed
    bint gone                  # the client takes nothing more; what it has sent is run all the same
    bint resp3                 # the client has asked for it


cdef inline int reply_init(kv_reply *reply, size_t waiting_most) noexcept nogil:
    """-1: no memory."""
    reply.bytes = <char *>malloc(REPLY_ROOM)
    reply.waiting_most = waiting_most
    return 0 if reply.bytes != NULL else -1


cdef inline void reply_free(kv_reply *reply) noexcept nogil:
    free(reply.bytes)
    reply.bytes = NULL


cdef inline void reply_begin(kv_reply *reply, kv_send send, void *client, bint resp3) noexcept nogil:
    """What is written from here on is for `client`."""
    reply.size = reply.waiting = 0
    reply.send = send
    reply.client = client
    reply.too_much = reply.gone = False
    reply.resp3 = resp3


cdef inline void reply_pass(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    """Hands bytes to the client."""
    cdef ssize_t waiting
    if reply.too_much or reply.gone:
        return
    waiting = reply.send(reply.client, bytes, size)
    reply.gone = waiting < 0
    reply.waiting = 0 if reply.gone else <size_t>waiting
    reply.too_much = reply.waiting > reply.waiting_most


cdef inline void reply_flush(kv_reply *reply) noexcept nogil:
    if reply.size:
        reply_pass(reply, reply.bytes, reply.size)
        reply.size = 0


cdef inline char *reply_reserve(kv_reply *reply, size_t size) noexcept nogil:
    """Where the next `size` bytes go; at most REPLY_ROOM."""
    if size > REPLY_ROOM - reply.size:
        reply_flush(reply)
    return reply.bytes + reply.size


cdef inline void reply_large(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    """Copies nothing that nobody will get."""
    if reply.too_much or reply.gone:
        return
    if size > REPLY_ROOM:
        reply_flush(reply)
        reply_pass(reply, bytes, size)
        return
    memcpy(reply_reserve(reply, size), bytes, size)
    reply.size += size


cdef inline void reply_bytes(kv_reply *reply, const char *bytes, size_t size) noexcept nogil:
    if size > REPLY_SMALL:
        reply_large(reply, bytes, size)
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


cdef inline void reply_null_array(kv_reply *reply) noexcept nogil:
    reply_text(reply, "_\r\n" if reply.resp3 else "*-1\r\n")


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
