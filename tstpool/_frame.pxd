# cython: language_level=3
"""Framing: where in the unread input the next whole message lies.

    unread input:   [ header |      body      | delimiter ][ the next message ...
                    ^        ^                             ^
                    0      begin ... begin + size        whole
                             |<- what the handler gets ->|

    Raw             all that is there is a message, at most `max_message` bytes at a time
    Fixed           `fixed` bytes
    Delimited       up to a delimiter, which is dropped unless `keep`
    LengthPrefixed  `offset` bytes, a length field of `length_size` bytes, a body of length + `adjust` bytes; all before
                    the body is dropped unless `keep`

Nothing is stored but `scanned`: how far a delimiter was searched for in vain, so that a long message that comes byte by
byte is searched once and not from its beginning at every byte. Every number that a peer sends is unsigned and compared
before it is added to anything.
"""
from libc.errno cimport EMSGSIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp

from tstpool._libc cimport tst_rarely, tst_usually

cdef enum:
    FRAME_RAW = 0
    FRAME_FIXED = 1
    FRAME_DELIMITED = 2
    FRAME_LENGTH = 3
    FRAME_PIECES = 4           # Raw with a limit: of what has arrived, as much as that

cdef enum:
    DELIMITER_MOST = 255       # bytes in a delimiter
    OFFSET_MOST = 65535        # bytes before a length field
    HEADER_MOST = 65543        # offset and length field
    ONE_PIECE_MOST = 8191      # bytes; a longer message and its header are queued one after the other


cdef struct tst_framing:
    uint8_t kind               # FRAME_*
    uint8_t keep               # what is around the body is handed out with it
    uint8_t little             # the length field is little-endian
    uint8_t length_size        # bytes in the length field: 1, 2, 3, 4 or 8
    uint8_t n_delimiter
    uint32_t offset            # bytes before the length field
    int64_t adjust             # added to the length field's number
    uint64_t fixed             # bytes in a message of FRAME_FIXED
    uint64_t max_message       # bytes in the largest body
    char delimiter[DELIMITER_MOST]
    void *object               # borrowed: the Framing that this lies in
    # What follows from these, by framing_settle:
    uint32_t header            # bytes before the body
    uint32_t dropped           # of which so many are not handed out
    uint64_t least             # bytes in the smallest body that has a frame, ...
    uint64_t most              # ... and in the largest
    uint64_t number_least      # the least number that a length field may hold, ...
    uint64_t number_most       # ... and the greatest
    uint64_t one_piece         # a body of fewer bytes is sent in one piece with its length before it; 0: none is


cdef struct tst_frame:
    size_t begin               # where the message begins
    size_t size                # its bytes
    size_t whole               # bytes that it takes up, all around it included
    size_t needed              # when it is not whole yet: bytes that must be there, as far as is known


cdef inline void framing_settle(tst_framing *framing) noexcept nogil:
    """Works out the bounds, once, when all else is set. max_message < 2**62 and abs(adjust) <= 2**62: nothing wraps."""
    cdef int64_t field_most = (1 << 62) - 1        # as much as any message has
    cdef int64_t most = <int64_t>framing.max_message
    framing.header = framing.dropped = 0
    framing.one_piece = 0
    framing.least = framing.fixed if framing.kind == FRAME_FIXED else 0
    framing.most = framing.fixed if framing.kind == FRAME_FIXED else framing.max_message
    if framing.kind != FRAME_LENGTH:
        return
    framing.header = framing.offset + framing.length_size
    framing.dropped = 0 if framing.keep else framing.header
    if framing.length_size < 5:
        field_most = (<int64_t>1 << (8 * framing.length_size)) - 1
    framing.least = <uint64_t>max(framing.adjust, 0)
    framing.number_least = <uint64_t>max(-framing.adjust, 0)
    framing.most = <uint64_t>max(min(most, field_most + framing.adjust), 0)
    framing.number_most = <uint64_t>max(most - framing.adjust, 0)
    if field_most + framing.adjust < 0:            # no body is so small
        framing.least = 1
    if most < framing.adjust:                      # each body is longer than allowed
        framing.number_least = 1
    if framing.offset == 0 and framing.least == 0:
        framing.one_piece = min(framing.most, <uint64_t>ONE_PIECE_MOST) + 1


cdef inline uint64_t frame_length(const tst_framing *framing, const unsigned char *field) noexcept nogil:
    """The length field's number."""
    cdef uint64_t number = 0
    cdef int i
    if tst_usually(framing.length_size == 4) and tst_usually(not framing.little):      # compiled to one load
        return (<uint32_t>field[0] << 24) | (<uint32_t>field[1] << 16) | (<uint32_t>field[2] << 8) | <uint32_t>field[3]
    for i in range(framing.length_size):
        number = number << 8 | field[framing.length_size - 1 - i if framing.little else i]
    return number


cdef inline void frame_put_length(const tst_framing *framing, unsigned char *field, uint64_t number) noexcept nogil:
    cdef int i
    if tst_usually(framing.length_size == 4) and tst_usually(not framing.little):
        field[0] = <unsigned char>(number >> 24)
        field[1] = <unsigned char>(number >> 16 & 0xff)
        field[2] = <unsigned char>(number >> 8 & 0xff)
        field[3] = <unsigned char>(number & 0xff)
        return
    for i in range(framing.length_size):
        field[i if framing.little else framing.length_size - 1 - i] = <unsigned char>(number & 0xff)
        number >>= 8


cdef inline const char *find_delimiter(const tst_framing *framing, const char *bytes, size_t size) noexcept nogil:
    """The first delimiter, or NULL."""
    cdef const char *place = bytes
    cdef const char *end = bytes + size
    while <size_t>(end - place) >= framing.n_delimiter:
        place = <const char *>memchr(place, framing.delimiter[0], <size_t>(end - place) - framing.n_delimiter + 1)
        if place == NULL or memcmp(place, framing.delimiter, framing.n_delimiter) == 0:
            return place
        place += 1
    return NULL


cdef inline bint ends_in_delimiter(const tst_framing *framing, const char *bytes, size_t size) noexcept nogil:
    """With the delimiter behind it, there would be one that begins before the end: b"a\\n" and b"\\n\\n", say."""
    cdef size_t n = framing.n_delimiter
    cdef size_t part
    for part in range(1, min(n, size + 1)):
        if (memcmp(bytes + size - part, framing.delimiter, part) == 0
                and memcmp(framing.delimiter + part, framing.delimiter, n - part) == 0):
            return True
    return False


cdef inline size_t delimiter_kept(const tst_framing *framing, const char *bytes, size_t size) noexcept nogil:
    """Bytes of the delimiter that a message has at its end, as it was handed out with `keep`; 0: it has none."""
    cdef size_t n = framing.n_delimiter
    if framing.keep and 0 < n <= size and memcmp(bytes + size - n, framing.delimiter, n) == 0:
        return n
    return 0


cdef inline bint delimiter_fits(const tst_framing *framing, const char *bytes, size_t body, size_t size) noexcept nogil:
    """Sent with one delimiter behind its body, which is all of it or ends where the one that was kept begins, the
    message has no other that begins before that."""
    cdef const char *found = find_delimiter(framing, bytes, size)
    if body < size:
        return found == bytes + body
    return found == NULL and not ends_in_delimiter(framing, bytes, size)


cdef inline int frame_delimited(const tst_framing *framing, const char *bytes, size_t size, size_t *scanned,
                                tst_frame *frame) noexcept nogil:
    cdef size_t overlap = framing.n_delimiter - 1
    cdef size_t begin = 0
    cdef size_t body
    cdef const char *found
    if overlap < scanned[0] <= size:       # more than is there it never is, as long as who drops input says so
        begin = scanned[0] - overlap
    found = find_delimiter(framing, bytes + begin, size - begin)
    if found == NULL:
        scanned[0] = size
        frame.needed = size + 1
        # The last `overlap` bytes may be the beginning of a delimiter.
        return -EMSGSIZE if size > overlap and size - overlap > framing.max_message else 0
    body = <size_t>(found - bytes)
    if body > framing.max_message:
        return -EMSGSIZE
    scanned[0] = 0
    frame.begin = 0
    frame.whole = body + framing.n_delimiter
    frame.size = frame.whole if framing.keep else body
    return 1


cdef inline int frame_prefixed(const tst_framing *framing, const char *bytes, size_t size,
                               tst_frame *frame) noexcept nogil:
    cdef uint64_t number
    frame.needed = framing.header
    if tst_rarely(size < framing.header):
        return 0
    number = frame_length(framing, <const unsigned char *>bytes + framing.offset)
    if tst_rarely(number < framing.number_least) or tst_rarely(number > framing.number_most):
        return -EMSGSIZE
    # The number is within bounds now, so that neither sum leaves 0 ... max_message + header.
    frame.whole = frame.needed = <size_t>(number + <uint64_t>framing.adjust) + framing.header
    frame.begin = framing.dropped
    frame.size = frame.whole - framing.dropped
    return size >= frame.whole


cdef inline int frame_next(const tst_framing *framing, const char *bytes, size_t size, size_t *scanned,
                           tst_frame *frame) noexcept nogil:
    """Looks for a whole message at the beginning of `bytes`.

    1: `frame` says where it is. 0: more input is needed; `frame.needed` says how much there must be, as far as known.
    -EMSGSIZE: it is longer than allowed, or its length is nonsense.
    """
    if tst_usually(framing.kind == FRAME_LENGTH):
        return frame_prefixed(framing, bytes, size, frame)
    if framing.kind == FRAME_DELIMITED:
        return frame_delimited(framing, bytes, size, scanned, frame)
    frame.begin = 0
    frame.size = <size_t>framing.fixed
    if framing.kind == FRAME_RAW or framing.kind == FRAME_PIECES:
        frame.size = size if size < framing.max_message else <size_t>framing.max_message
    frame.whole = frame.needed = frame.size
    return size >= frame.whole and size > 0


cdef inline bint framing_cuts(const tst_framing *framing) noexcept nogil:
    """There is one, and bytes do not go to the handler just as they arrive."""
    return framing != NULL and framing.kind != FRAME_RAW


cdef inline int frame_header(const tst_framing *framing, size_t size, unsigned char *header) noexcept nogil:
    """Writes what goes before a body of `size` bytes. Returns how many bytes that is, or -EMSGSIZE.

    `header` has room for HEADER_MOST bytes. Bytes before the length field are zero.
    """
    cdef uint32_t i
    if size < framing.least or size > framing.most:
        return -EMSGSIZE
    if framing.kind != FRAME_LENGTH:
        return 0
    for i in range(framing.offset):
        header[i] = 0
    frame_put_length(framing, header + framing.offset, size - <uint64_t>framing.adjust)
    return <int>framing.header
