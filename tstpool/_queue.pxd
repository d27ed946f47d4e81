# cython: language_level=3
"""Output that waits for the kernel: a queue of chunks.

    head                                          tail
    [ sent |  to send  ] -> [   to send   ] -> [ to send |  room  ]
           begin     end                                end      capacity

Writers append behind `end` of the tail; the one flusher takes from `begin` of the head. They meet only under the
connection's lock, and the flusher sends with the lock released: bytes between begin and end never move and never
change, so what it has picked up stays valid whatever is appended meanwhile.

`queued` and `sent` count bytes since the connection began; their difference is what waits. 64 bits do not wrap.

A chunk's bytes lie behind it, or they are shared (`tst_shared`): a large bytes object of Python's, or the payload of a
broadcast, is queued without being copied. Other chunks are of one size while a handler runs, and come from a stock that
the connections of a shard share: malloc would give their pages back to the system after each turn and ask for them
again in the next. The same stock has blocks, for long messages that compiled handlers get.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from tstpool._libc cimport (
    ACQUIRE, ACQ_REL, RELAXED, RELEASE, add32, add64, iovec, load32, load_pointer, store_pointer, sub32, tst_rarely,
    tst_usually)
from tstpool._lock cimport spin_lock, spin_unlock

cdef enum:
    CHUNK_SIZE = 16384         # bytes of memory in a chunk: about what one reply, or the replies of one turn, take
    SMALL_CHUNK = 1000         # bytes, from threads outside: malloc has what is below 1,032 at hand
    SHARE_LEAST = 8192         # bytes from which sharing an object costs less than copying it
    SHARE_BEHIND = 1024        # bytes from which sharing costs little more memory than is counted
    STOCK_MOST = 256           # chunks kept in stock: 4 MiB, as many as a batch may have connections
    BLOCKS_MOST = 8388608      # bytes of blocks that the stocks of a pool keep, ...
    BLOCKS_LEAST = 2097152     # ... or each of them, with many shards
    # Pieces given to one sendmsg. More only matter above a megabyte, where the copy dominates.
    QUEUE_PIECES = 16


# Bytes that never change and that several queues may hold.
cdef struct tst_shared:
    uint32_t users         # shared, atomic
    void *object           # owned reference to the Python object that they are part of; NULL: they follow the struct
    tst_shared *next       # owned by the litter
    const char *bytes      # borrowed from the object, or behind the struct
    size_t size
    size_t front           # bytes before them, the object's hash: whoever is alone with it may use them for a header
    size_t block           # bytes behind the struct, if it is a block of a stock's: `size` or a few more; else 0
    uint64_t *held         # borrowed, atomic: where the bytes of broadcasts are counted; NULL: nowhere, as an object's


cdef struct tst_chunk:
    tst_chunk *next        # owned
    char *bytes            # behind the struct, or shared.bytes
    tst_shared *shared     # counted; NULL: the bytes are its own
    size_t begin
    size_t end
    size_t capacity


# Chunks that nobody uses at the moment, and shared bytes that nobody needs any more but whose objects only the
# interpreter can let go: the litter.
cdef struct tst_stock:
    uint32_t lock          # shared, atomic: guards the rest
    uint32_t n
    tst_chunk *first       # owned
    tst_shared *litter     # owned; atomic, so that a look costs nothing
    tst_shared *blocks     # owned: what long messages lay in, the last one first
    size_t blocks_size     # bytes in them, ...
    size_t blocks_most     # ... and how many there may be


cdef struct tst_queue:
    tst_stock *stock       # borrowed, shared; NULL: none
    bint burst             # a handler runs, so that more is likely to come: chunks of the usual size
    tst_chunk *head        # owned
    tst_chunk *tail        # borrowed: the last of the chain
    uint64_t queued
    uint64_t sent


cdef inline tst_shared *shared_new(const char *bytes, size_t size) noexcept nogil:
    """A copy of the bytes, used once. NULL: no memory."""
    cdef tst_shared *shared = <tst_shared *>malloc(sizeof(tst_shared) + size)
    if shared == NULL:
        return NULL
    shared.users = 1
    shared.object = NULL
    shared.held = NULL
    shared.next = NULL
    shared.size = size
    shared.front = shared.block = 0
    shared.bytes = <const char *>(shared + 1)
    memcpy(<char *>(shared + 1), bytes, size)
    return shared


cdef inline tst_shared *block_new(tst_stock *stock, size_t size) noexcept nogil:
    """Memory for `size` bytes, used once: a block in stock that is hardly larger, or a new one. NULL: no memory."""
    cdef tst_shared *block
    spin_lock(&stock.lock)
    block = stock_take_block(stock, size, size + size // 4)
    spin_unlock(&stock.lock)
    if block == NULL:
        block = <tst_shared *>malloc(sizeof(tst_shared) + size)
        if block == NULL:
            return NULL
        memset(block, 0, sizeof(tst_shared))
        block.block = size
        block.bytes = <const char *>(block + 1)
    block.users = 1
    block.size = size
    return block


cdef inline tst_shared *stock_take_block(tst_stock *stock, size_t least, size_t most) noexcept nogil:
    """One of such a size, or NULL. Stock locked."""
    cdef tst_shared **place = &stock.blocks
    cdef tst_shared *block
    while place[0] != NULL:
        block = place[0]
        if least <= block.block <= most:
            place[0] = block.next
            block.next = NULL
            stock.blocks_size -= block.block
            return block
        place = &block.next
    return NULL


cdef inline void block_keep(tst_stock *stock, tst_shared *block) noexcept nogil:
    """Nobody needs it any more. Those that were kept first go, when there are too many."""
    cdef tst_shared *gone
    if block.block > stock.blocks_most:
        free(block)
        return
    spin_lock(&stock.lock)
    block.next = stock.blocks
    stock.blocks = block
    stock.blocks_size += block.block
    gone = stock_cut_blocks(stock, stock.blocks_most)
    spin_unlock(&stock.lock)
    blocks_free(gone)


cdef inline tst_shared *stock_cut_blocks(tst_stock *stock, size_t most) noexcept nogil:
    """Takes those away that were kept first, so that no more than `most` bytes are left. Stock locked."""
    cdef tst_shared **place = &stock.blocks
    cdef tst_shared *gone
    cdef size_t size = 0
    if stock.blocks_size <= most:
        return NULL
    while place[0] != NULL and size + place[0].block <= most:
        size += place[0].block
        place = &place[0].next
    stock.blocks_size = size
    gone = place[0]
    place[0] = NULL
    return gone


cdef inline void blocks_free(tst_shared *block) noexcept nogil:
    cdef tst_shared *next
    while block != NULL:
        next = block.next
        free(block)
        block = next


cdef inline void stock_free_blocks(tst_stock *stock) noexcept nogil:
    """Gives all blocks in stock back to the system."""
    cdef tst_shared *gone
    spin_lock(&stock.lock)
    gone = stock_cut_blocks(stock, 0)
    spin_unlock(&stock.lock)
    blocks_free(gone)


cdef inline void shared_leave(tst_shared *shared, tst_stock *stock) noexcept nogil:
    """Gives one use back. The last one frees the bytes, keeps the block they lie in, or leaves their object to whoever
    attaches next."""
    if sub32(&shared.users, 1, ACQ_REL):
        return
    if shared.block:
        block_keep(stock, shared)
        return
    if shared.object == NULL:
        if shared.held != NULL:
            add64(shared.held, -<uint64_t>shared.size, RELAXED)
        free(shared)
        return
    spin_lock(&stock.lock)
    shared.next = stock.litter
    store_pointer(<void **>&stock.litter, shared, RELEASE)
    spin_unlock(&stock.lock)


cdef inline tst_shared *stock_take_litter(tst_stock *stock) noexcept nogil:
    cdef tst_shared *litter
    spin_lock(&stock.lock)
    litter = stock.litter
    store_pointer(<void **>&stock.litter, NULL, RELEASE)
    spin_unlock(&stock.lock)
    return litter


cdef inline bint stock_has_litter(tst_stock *stock) noexcept nogil:
    return load_pointer(<void **>&stock.litter, RELAXED) != NULL


cdef inline size_t queue_size(tst_queue *queue) noexcept nogil:
    return <size_t>(queue.queued - queue.sent)


cdef inline size_t queue_held(tst_queue *queue) noexcept nogil:
    """Bytes that wait, and those before them that are sent but must stay, because they are part of the same piece. (Not
    of a broadcast's, which is there for others too.)"""
    cdef tst_chunk *chunk = queue.head
    if chunk == NULL or (chunk.shared != NULL and chunk.shared.object == NULL):
        return queue_size(queue)
    return queue_size(queue) + chunk.begin


cdef inline size_t chunk_room() noexcept nogil:
    """Bytes that fit into a chunk of the usual size."""
    return CHUNK_SIZE - sizeof(tst_chunk)


cdef inline tst_chunk *chunk_new(tst_queue *queue, size_t size) noexcept nogil:
    """An empty chunk, to be the last, with room for at least `size` bytes. NULL: no memory.

    Behind shared bytes it is a small one: it may be for no more than the header between two of them."""
    cdef tst_stock *stock = queue.stock
    cdef tst_chunk *chunk = NULL
    cdef bint burst = queue.burst and (queue.tail == NULL or queue.tail.shared == NULL)
    cdef size_t capacity = chunk_room() if burst else SMALL_CHUNK
    if size > capacity:
        capacity = size
    elif tst_usually(burst) and tst_usually(stock != NULL):
        spin_lock(&stock.lock)
        chunk = stock.first
        if tst_usually(chunk != NULL):
            stock.first = chunk.next
            stock.n -= 1
        spin_unlock(&stock.lock)
    if tst_rarely(chunk == NULL):
        chunk = <tst_chunk *>malloc(sizeof(tst_chunk) + capacity)
        if chunk == NULL:
            return NULL
        chunk.capacity = capacity
        chunk.bytes = <char *>(chunk + 1)
        chunk.shared = NULL
    chunk.next = NULL
    chunk.begin = chunk.end = 0
    return chunk


cdef inline void chunk_free(tst_queue *queue, tst_chunk *chunk) noexcept nogil:
    cdef tst_stock *stock = queue.stock
    if tst_rarely(chunk.shared != NULL):
        shared_leave(chunk.shared, stock)
    elif tst_usually(stock != NULL) and tst_usually(chunk.capacity == chunk_room()):
        spin_lock(&stock.lock)
        if tst_usually(stock.n < STOCK_MOST):
            chunk.next = stock.first
            stock.first = chunk
            stock.n += 1
            chunk = NULL
        spin_unlock(&stock.lock)
    free(chunk)


cdef inline void stock_free(tst_stock *stock) noexcept nogil:
    """Gives all chunks and blocks in stock back to the system. The litter is the caller's business."""
    cdef tst_chunk *chunk
    while stock.first != NULL:
        chunk = stock.first
        stock.first = chunk.next
        free(chunk)
    stock.n = 0
    stock_free_blocks(stock)


cdef inline tst_chunk *queue_grow(tst_queue *queue, size_t size) noexcept nogil:
    """Adds a chunk with room for at least `size` bytes. NULL: no memory."""
    cdef tst_chunk *chunk = chunk_new(queue, size)
    if chunk != NULL:
        queue_link(queue, chunk)
    return chunk


cdef inline void queue_link(tst_queue *queue, tst_chunk *chunk) noexcept nogil:
    if tst_usually(queue.tail == NULL):
        queue.head = chunk
    else:
        queue.tail.next = chunk
    queue.tail = chunk


cdef inline void queue_settle(tst_queue *queue) noexcept nogil:
    """Output that the kernel does not take for now moves into memory of its own size: thousands of peers that do not
    read must not each hold a chunk for a few bytes."""
    cdef tst_chunk *chunk = queue.head
    cdef tst_chunk *small
    cdef size_t left
    if chunk == NULL or chunk != queue.tail or chunk.shared != NULL or chunk.capacity != chunk_room():
        return
    left = chunk.end - chunk.begin
    if left > chunk.capacity // 4:
        return
    small = <tst_chunk *>malloc(sizeof(tst_chunk) + left)
    if small == NULL:
        return
    small.bytes = <char *>(small + 1)
    memcpy(small.bytes, chunk.bytes + chunk.begin, left)
    small.next = NULL
    small.shared = NULL
    small.begin = 0
    small.end = small.capacity = left
    queue.head = queue.tail = small
    chunk_free(queue, chunk)


cdef inline char *queue_room(tst_queue *queue, size_t size) noexcept nogil:
    """Where the next `size` bytes may be written in one piece, to be followed by queue_commit. NULL: no room there."""
    cdef tst_chunk *last = queue.tail
    if tst_rarely(last == NULL):
        last = queue_grow(queue, size)
    if tst_rarely(last == NULL) or tst_rarely(last.capacity - last.end < size):
        return NULL
    return last.bytes + last.end


cdef inline int queue_reserve(tst_queue *queue, size_t size) noexcept nogil:
    """If nothing waits, and `size` bytes are too many for a usual chunk, they get one piece. 0, or -ENOMEM."""
    if queue.tail != NULL or size <= chunk_room() or queue_grow(queue, size) != NULL:
        return 0
    return -ENOMEM


cdef inline int queue_append(tst_queue *queue, const char *bytes, size_t size) noexcept nogil:
    """Copies `size` bytes behind the last. All of them or, with -ENOMEM, none."""
    cdef char *room
    if tst_rarely(size == 0):
        return 0
    room = queue_room(queue, size)
    if tst_rarely(room == NULL):
        return queue_append_pieces(queue, bytes, size)
    memcpy(room, bytes, size)
    queue_commit(queue, size)
    return 0


cdef inline int queue_append_pieces(tst_queue *queue, const char *bytes, size_t size) noexcept nogil:
    """The same, where the last chunk has no room for all."""
    cdef tst_chunk *last = queue.tail
    cdef tst_chunk *fresh
    cdef size_t room = last.capacity - last.end if last != NULL else 0
    fresh = queue_grow(queue, size - room)
    if fresh == NULL:
        return -ENOMEM
    if room:
        memcpy(last.bytes + last.end, bytes, room)
        last.end += room
    memcpy(fresh.bytes, bytes + room, size - room)
    fresh.end = size - room
    queue.queued += size
    return 0


cdef inline int queue_share(tst_queue *queue, tst_shared *shared) noexcept nogil:
    """Queues shared bytes behind the last, without copying them. 0, or -ENOMEM.

    A few bytes are copied where something waits already: if the peer does not read, a chunk for each message would take
    many times the memory that the limits count."""
    cdef tst_chunk *chunk
    if shared.size == 0:
        return 0                           # a chunk of nothing would stay until something comes behind it
    if queue.tail != NULL and shared.size < SHARE_BEHIND:
        return queue_append(queue, shared.bytes, shared.size)
    chunk = <tst_chunk *>malloc(sizeof(tst_chunk))
    if chunk == NULL:
        return -ENOMEM
    add32(&shared.users, 1, RELAXED)
    chunk.next = NULL
    chunk.bytes = <char *>shared.bytes
    chunk.shared = shared
    chunk.begin = 0
    chunk.end = chunk.capacity = shared.size
    queue_link(queue, chunk)
    queue.queued += shared.size
    return 0


cdef inline tst_shared *queue_headed(tst_queue *queue) noexcept nogil:
    """The shared bytes that wait behind nothing but their header, which has room in front of them; NULL: it is not
    so."""
    cdef tst_chunk *head = queue.head
    cdef tst_shared *shared
    if head == NULL or head.shared != NULL or head.begin or head.next == NULL:
        return NULL
    shared = head.next.shared
    if shared == NULL or head.end > shared.front or load32(&shared.users, ACQUIRE) != 1:
        return NULL
    return shared


cdef inline void queue_join(tst_queue *queue) noexcept nogil:
    """The header of queue_headed's bytes moves in front of them, so that both are one piece for the kernel: two of
    them cost it a thirtieth more.

        [ header ] -> [ hash |  to send  ]          becomes          [ header |  to send  ]
    """
    cdef tst_chunk *head = queue.head
    cdef tst_chunk *chunk = head.next
    chunk.bytes -= head.end
    chunk.end += head.end
    chunk.capacity += head.end
    memcpy(chunk.bytes, head.bytes, head.end)
    queue.head = chunk
    chunk_free(queue, head)


cdef inline void queue_commit(tst_queue *queue, size_t size) noexcept nogil:
    queue.tail.end += size
    queue.queued += size


cdef inline int queue_pieces(tst_queue *queue, iovec *pieces, size_t *total) noexcept nogil:
    """Lists what waits, at most QUEUE_PIECES pieces. Returns their number."""
    cdef tst_chunk *chunk = queue.head
    cdef int n = 0
    total[0] = 0
    while chunk != NULL and n < QUEUE_PIECES:
        if chunk.end > chunk.begin:
            pieces[n].iov_base = chunk.bytes + chunk.begin
            pieces[n].iov_len = chunk.end - chunk.begin
            total[0] += chunk.end - chunk.begin
            n += 1
        chunk = chunk.next
        if tst_usually(chunk == NULL):
            break
    return n


cdef inline void queue_consume(tst_queue *queue, size_t size) noexcept nogil:
    """The kernel took `size` bytes."""
    cdef tst_chunk *chunk
    cdef size_t piece
    queue.sent += size
    while queue.head != NULL:
        chunk = queue.head
        piece = chunk.end - chunk.begin
        if tst_rarely(size < piece):
            chunk.begin += size
            return
        size -= piece
        queue.head = chunk.next
        chunk_free(queue, chunk)
        if tst_usually(queue.head == NULL):
            queue.tail = NULL
            return


cdef inline void queue_drop(tst_queue *queue) noexcept nogil:
    """Forgets what waits."""
    cdef tst_chunk *chunk
    while queue.head != NULL:
        chunk = queue.head
        queue.head = chunk.next
        chunk_free(queue, chunk)
    queue.tail = NULL
    queue.sent = queue.queued
