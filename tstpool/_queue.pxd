# cython: language_level=3
"""Output that waits for the kernel: a queue of chunks.

    head                                          tail
    [ sent |  to send  ] -> [   to send   ] -> [ to send |  room  ]
           begin     end                                end      capacity

Writers append behind `end` of the tail; the one flusher takes from `begin` of the head. They meet only under the
connection's lock, and the flusher sends with the lock released: bytes between begin and end never move and never
change, so what it has picked up stays valid whatever is appended meanwhile.

`queued` and `sent` count bytes since the connection began; their difference is what waits. 64 bits do not wrap.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from tstpool._libc cimport iovec

cdef enum:
    # A first chunk that malloc serves from its per-thread cache (requests up to 1,032 bytes); most replies fit in it.
    FIRST_CHUNK = 1000
    NEXT_CHUNK = 16384
    LARGE_CHUNK = 65536
    # Pieces given to one sendmsg. More only matter above a megabyte, where the copy dominates.
    QUEUE_PIECES = 16


cdef struct tst_chunk:
    tst_chunk *next        # owned
    size_t begin
    size_t end
    size_t capacity        # bytes follow the struct


cdef struct tst_queue:
    tst_chunk *head        # owned
    tst_chunk *tail        # borrowed: the last of the chain
    uint64_t queued
    uint64_t sent


cdef inline char *chunk_bytes(tst_chunk *chunk) noexcept nogil:
    return <char *>(chunk + 1)


cdef inline size_t queue_size(tst_queue *queue) noexcept nogil:
    return <size_t>(queue.queued - queue.sent)


cdef inline tst_chunk *queue_grow(tst_queue *queue, size_t size) noexcept nogil:
    """Adds a chunk with room for at least `size` bytes. NULL: no memory."""
    cdef tst_chunk *chunk
    cdef size_t capacity = FIRST_CHUNK
    if queue.tail != NULL:
        capacity = NEXT_CHUNK if queue.tail.capacity <= FIRST_CHUNK else LARGE_CHUNK
    if capacity < size:
        capacity = size
    chunk = <tst_chunk *>malloc(sizeof(tst_chunk) + capacity)
    if chunk == NULL:
        return NULL
    chunk.next = NULL
    chunk.begin = 0
    chunk.end = 0
    chunk.capacity = capacity
    if queue.tail == NULL:
        queue.head = chunk
    else:
        queue.tail.next = chunk
    queue.tail = chunk
    return chunk


cdef inline int queue_append(tst_queue *queue, const char *bytes, size_t size) noexcept nogil:
    """Copies `size` bytes behind the last. All of them or, with -ENOMEM, none."""
    cdef tst_chunk *last = queue.tail
    cdef tst_chunk *fresh = NULL
    cdef size_t room = last.capacity - last.end if last != NULL else 0
    if room > size:
        room = size
    if room < size:
        fresh = queue_grow(queue, size - room)
        if fresh == NULL:
            return -ENOMEM
    if room:
        memcpy(chunk_bytes(last) + last.end, bytes, room)
        last.end += room
    if fresh != NULL:
        memcpy(chunk_bytes(fresh), bytes + room, size - room)
        fresh.end = size - room
    queue.queued += size
    return 0


cdef inline int queue_pieces(tst_queue *queue, iovec *pieces, size_t *total) noexcept nogil:
    """Lists what waits, at most QUEUE_PIECES pieces. Returns their number."""
    cdef tst_chunk *chunk = queue.head
    cdef int n = 0
    total[0] = 0
    while chunk != NULL and n < QUEUE_PIECES:
        if chunk.end > chunk.begin:
            pieces[n].iov_base = chunk_bytes(chunk) + chunk.begin
            pieces[n].iov_len = chunk.end - chunk.begin
            total[0] += chunk.end - chunk.begin
            n += 1
        chunk = chunk.next
    return n


cdef inline void queue_consume(tst_queue *queue, size_t size) noexcept nogil:
    """The kernel took `size` bytes."""
    cdef tst_chunk *chunk
    cdef size_t piece
    queue.sent += size
    while queue.head != NULL:
        chunk = queue.head
        piece = chunk.end - chunk.begin
        if size < piece:
            chunk.begin += size
            return
        size -= piece
        queue.head = chunk.next
        if queue.head == NULL:
            queue.tail = NULL
        free(chunk)


cdef inline void queue_drop(tst_queue *queue) noexcept nogil:
    """Forgets what waits."""
    cdef tst_chunk *chunk
    while queue.head != NULL:
        chunk = queue.head
        queue.head = chunk.next
        free(chunk)
    queue.tail = NULL
    queue.sent = queue.queued
