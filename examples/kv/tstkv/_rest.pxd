# cython: language_level=3
"""The rest of a reply: what is too long for one turn waits here, in pieces, until what went before has been sent.

    rest      [ sent | to send ] -> [ to send ] -> [ to send ]
               first                                last

The bytes of a value are not copied: its piece is a user of the entry, which stays as it is until the last of its users
lets go of it, whatever becomes of the key meanwhile. All other bytes are copied.
"""
from libc.errno cimport ENOMEM
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from tstkv._table cimport MALLOC_EXTRA, entry_let_go, entry_use, entry_value, kv_entry, kv_table


cdef struct kv_piece:
    kv_piece *next             # owned
    kv_entry *entry            # shared: the piece is one of its users; NULL: the bytes are the piece's own
    const char *bytes          # borrowed from the entry, or behind the struct
    size_t size


cdef struct kv_rest:
    kv_piece *first            # owned; NULL: nothing waits
    kv_piece *last             # borrowed from the chain
    size_t sent                # bytes of the first piece that have been sent
    size_t size                # bytes that wait
    size_t memory              # bytes that the pieces take; entries are the table's


cdef inline size_t piece_memory(const kv_piece *piece) noexcept nogil:
    return sizeof(kv_piece) + MALLOC_EXTRA + (piece.size if piece.entry == NULL else 0)


cdef inline void rest_link(kv_rest *rest, kv_piece *piece, const char *bytes, size_t size) noexcept nogil:
    piece.next = NULL
    piece.bytes, piece.size = bytes, size
    if rest.first == NULL:
        rest.first = piece
    else:
        rest.last.next = piece
    rest.last = piece
    rest.size += size
    rest.memory += piece_memory(piece)


cdef inline int rest_add(kv_rest *rest, const char *bytes, size_t size) noexcept nogil:
    """Adds a copy of the bytes, of which there is at least one. 0 or -ENOMEM."""
    cdef kv_piece *piece = <kv_piece *>malloc(sizeof(kv_piece) + size)
    if piece == NULL:
        return -ENOMEM
    piece.entry = NULL
    memcpy(<char *>(piece + 1), bytes, size)
    rest_link(rest, piece, <const char *>(piece + 1), size)
    return 0


cdef inline int rest_add_value(kv_rest *rest, kv_entry *entry) noexcept nogil:
    """Adds the entry's value, which is not empty. 0 or -ENOMEM."""
    cdef kv_piece *piece = <kv_piece *>malloc(sizeof(kv_piece))
    if piece == NULL:
        return -ENOMEM
    piece.entry = entry
    entry_use(entry)
    rest_link(rest, piece, entry_value(entry), entry.value_size)
    return 0


cdef inline const char *rest_next(const kv_rest *rest, size_t *size) noexcept nogil:
    """What is to be sent next; `size`: at most so many bytes, and then how many they are. Something must wait."""
    size[0] = min(size[0], rest.first.size - rest.sent)
    return rest.first.bytes + rest.sent


cdef inline void rest_drop_first(kv_rest *rest, kv_table *table) noexcept nogil:
    cdef kv_piece *piece = rest.first
    rest.size -= piece.size - rest.sent
    rest.memory -= piece_memory(piece)
    rest.sent = 0
    rest.first = piece.next
    if piece.entry != NULL:
        entry_let_go(table, piece.entry)
    free(piece)


cdef inline void rest_took(kv_rest *rest, kv_table *table, size_t size) noexcept nogil:
    """So many bytes of what rest_next has shown have been sent."""
    rest.sent += size
    rest.size -= size
    if rest.sent == rest.first.size:
        rest_drop_first(rest, table)


cdef inline void rest_forget(kv_rest *rest, kv_table *table) noexcept nogil:
    """Nobody gets it any more."""
    while rest.first != NULL:
        rest_drop_first(rest, table)
