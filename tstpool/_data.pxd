# cython: language_level=3
"""The two buffers that input passes through: a transfer that the handler asked for, and what was read ahead.

A transfer (`tst_data`, the TST_DATA of the original; one for receiving, one for sending):

    s                                                              s + s_len
    |---------------|=====================|--------------|---------|
    0            req_pos        req_pos + com_len   req_pos + req_len
                    |<---- done --------->|<-- to come ->|
                    |<------------- req_len ------------>|

Invariants, true whenever the lock is free:
  1. req_pos + req_len <= s_len          (checked where a field is assigned: nothing later can run over)
  2. com_len <= req_len
  3. s is NULL or holds s_len bytes; it is made when first needed and moves only while `exports` is 0

The engine and the handler use it on one thread at a time, but the contract lets a second thread fill another
connection's `send` buffer, so each operation takes the lock.

Input (`tst_input`): bytes that have arrived and that no handler has been given yet.

    in this turn:   view -> the worker's scratch buffer (borrowed until the handler returns)
    between turns:  view -> storage (owned); NULL when nothing is left over, which is the normal case
"""
from libc.errno cimport EBUSY, EINVAL, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from tstpool._libc cimport tst_rarely, tst_usually
from tstpool._lock cimport spin_lock, spin_unlock


# ---------------------------------------------------------------------------------------------- transfers

cdef struct tst_data:
    uint32_t lock          # shared, atomic: guards all below
    uint32_t exports       # memoryviews that Python holds on s, and whoever else uses it while the lock is free
    char *s                # owned; NULL until first needed
    size_t s_len           # bytes in s, or to be in s once it is made
    size_t req_pos
    size_t req_len
    size_t com_len
    size_t checked_len     # bytes that wait unread when the handler is called with req_len == 0
    uint64_t begin_time    # of the running transfer, monotonic nanoseconds; 0: none has begun
    size_t trans_time      # nanoseconds that the last finished transfer took


cdef inline int data_make(tst_data *data) noexcept nogil:
    """Makes s if it is not there yet. Zeroed, so that no byte of an older life of the memory can reach a peer. Lock
    held."""
    if data.s == NULL:
        data.s = <char *>calloc(data.s_len, 1)
        if data.s == NULL:
            return -ENOMEM
    return 0


cdef inline int data_request(tst_data *data, size_t req_pos, size_t req_len) noexcept nogil:
    """Asks for a new transfer. -EINVAL, and nothing changed, when it would run over the buffer."""
    cdef int result = 0
    spin_lock(&data.lock)
    if req_pos > data.s_len or req_len > data.s_len - req_pos:
        result = -EINVAL
    else:
        data.req_pos = req_pos
        data.req_len = req_len
        data.com_len = 0
        data.begin_time = 0
    spin_unlock(&data.lock)
    return result


cdef inline int data_set_done(tst_data *data, size_t com_len) noexcept nogil:
    cdef int result = -EINVAL
    spin_lock(&data.lock)
    if com_len <= data.req_len:
        data.com_len = com_len
        result = 0
    spin_unlock(&data.lock)
    return result


cdef inline int data_resize(tst_data *data, size_t s_len) noexcept nogil:
    """Keeps the contents. -EBUSY while a view is held, -EINVAL when the running request would not fit."""
    cdef char *moved
    cdef int result = 0
    spin_lock(&data.lock)
    if data.exports:
        result = -EBUSY
    elif s_len == 0 or s_len < data.req_pos + data.req_len:
        result = -EINVAL
    elif data.s == NULL:
        data.s_len = s_len
    else:
        moved = <char *>realloc(data.s, s_len)
        if moved == NULL:
            result = -ENOMEM
        else:
            if s_len > data.s_len:
                memset(moved + data.s_len, 0, s_len - data.s_len)
            data.s = moved
            data.s_len = s_len
    spin_unlock(&data.lock)
    return result


cdef inline void data_done(tst_data *data, size_t size, uint64_t now) noexcept nogil:
    """`size` more bytes of the transfer are done. Lock held."""
    data.com_len += size
    if data.com_len == data.req_len:
        data.trans_time = now - data.begin_time if data.begin_time else 0
        data.begin_time = 0
    elif data.begin_time == 0:
        data.begin_time = now


cdef inline ssize_t data_fill(tst_data *data, const char *bytes, size_t size, uint64_t now) noexcept nogil:
    """Moves input into a receiving transfer, up to its req_len. Returns how many bytes were used, or -ENOMEM.

    A request that is complete already begins anew: it was handed to the handler, which left it as it is.
    """
    cdef ssize_t result
    cdef size_t used
    spin_lock(&data.lock)
    if data.com_len == data.req_len:
        data.com_len = 0
    used = data.req_len - data.com_len
    if used > size:
        used = size
    result = data_make(data)
    if result == 0 and used:
        memcpy(data.s + data.req_pos + data.com_len, bytes, used)
        data_done(data, used, now)
        result = <ssize_t>used
    spin_unlock(&data.lock)
    return result


cdef inline size_t data_pin(tst_data *data, size_t least, char **place) noexcept nogil:
    """Where input may be received straight into the transfer, if at least `least` bytes are to come; 0: it may not.

    Counts as an export until data_unpin, so that s stays where it is while the lock is free.
    """
    cdef size_t room = 0
    spin_lock(&data.lock)
    if data.req_len:
        if data.com_len == data.req_len:
            data.com_len = 0
        room = data.req_len - data.com_len
    if room < least or data_make(data) < 0:
        room = 0
    if room:
        data.exports += 1
        place[0] = data.s + data.req_pos + data.com_len
    spin_unlock(&data.lock)
    return room


cdef inline void data_hold(tst_data *data) noexcept nogil:
    """It stays where it is until data_unpin: an export, too."""
    spin_lock(&data.lock)
    data.exports += 1
    spin_unlock(&data.lock)


cdef inline void data_unpin(tst_data *data, ssize_t received, uint64_t now) noexcept nogil:
    spin_lock(&data.lock)
    data.exports -= 1
    if received > 0 and <size_t>received <= data.req_len - data.com_len:   # else the request was changed meanwhile
        data_done(data, <size_t>received, now)
    spin_unlock(&data.lock)


cdef inline size_t data_read(tst_data *data, const size_t *field) noexcept nogil:
    """One of the transfer's numbers, for whoever may look while another thread works on it."""
    cdef size_t number
    spin_lock(&data.lock)
    number = field[0]
    spin_unlock(&data.lock)
    return number


cdef inline void data_set_unread(tst_data *data, size_t size) noexcept nogil:
    spin_lock(&data.lock)
    data.checked_len = size
    spin_unlock(&data.lock)


cdef inline bint data_requested(tst_data *data) noexcept nogil:
    cdef bint result
    spin_lock(&data.lock)
    result = data.req_len != 0
    spin_unlock(&data.lock)
    return result


cdef inline bint data_begun(tst_data *data) noexcept nogil:
    """A part of what was asked for is there. (When all of it was handed out, the same is asked for anew.)"""
    cdef bint result
    spin_lock(&data.lock)
    result = 0 < data.com_len < data.req_len
    spin_unlock(&data.lock)
    return result


cdef inline bint data_complete(tst_data *data) noexcept nogil:
    cdef bint result
    spin_lock(&data.lock)
    result = data.req_len != 0 and data.com_len == data.req_len
    spin_unlock(&data.lock)
    return result


# -------------------------------------------------------------------------------------------------- input

cdef enum:
    ROOMY = 131072             # bytes of storage from which little unread input does not keep it


cdef struct tst_input:
    const char *view       # borrowed from the scratch buffer, or a place in storage
    size_t size            # unread bytes at view
    char *storage          # owned
    size_t capacity


cdef inline bint input_is_stored(tst_input *input) noexcept nogil:
    return (input.storage != NULL and <size_t>input.view >= <size_t>input.storage
            and <size_t>input.view < <size_t>input.storage + input.capacity)


cdef inline void input_free(tst_input *input) noexcept nogil:
    if tst_rarely(input.storage != NULL):
        free(input.storage)
    memset(input, 0, sizeof(tst_input))


cdef inline void input_consume(tst_input *input, size_t size) noexcept nogil:
    """The first `size` unread bytes were handed out. Storage goes back as soon as it is empty: an idle connection has
    none."""
    input.view += size
    input.size -= size
    if tst_usually(input.size == 0):
        input_free(input)


cdef inline char *input_reserve(tst_input *input, size_t room) noexcept nogil:
    """Where `room` more bytes may be written behind the unread ones, in storage. NULL: no memory, nothing changed."""
    cdef char *grown
    cdef size_t capacity = input.size + room
    if input_is_stored(input):
        if input.view + input.size + room <= input.storage + input.capacity:
            return <char *>input.view + input.size
        if capacity <= input.capacity:
            memmove(input.storage, input.view, input.size)
            input.view = input.storage
            return input.storage + input.size
    if capacity < 2 * input.capacity:
        capacity = 2 * input.capacity
    grown = <char *>malloc(capacity)
    if grown == NULL:
        return NULL
    if input.size:
        memcpy(grown, input.view, input.size)
    free(input.storage)
    input.storage = grown
    input.capacity = capacity
    input.view = grown
    return grown + input.size


cdef inline int input_unread(tst_input *input, const char *bytes, size_t size) noexcept nogil:
    """Puts bytes that were taken back in front of the unread ones."""
    cdef char *whole = <char *>malloc(input.size + size)
    if whole == NULL:
        return -ENOMEM
    memcpy(whole, bytes, size)
    if input.size:
        memcpy(whole + size, input.view, input.size)
    free(input.storage)
    input.storage = whole
    input.capacity = input.size + size
    input.view = whole
    input.size += size
    return 0


cdef inline int input_keep(tst_input *input) noexcept nogil:
    """The turn ends: what is still unread moves out of the scratch buffer."""
    if tst_usually(input.size == 0):
        input_free(input)
    elif not input_is_stored(input):
        return 0 if input_reserve(input, 0) != NULL else -ENOMEM
    elif input.capacity > ROOMY and input.size < input.capacity // 4:
        input_shrink(input)
    return 0


cdef inline void input_shrink(tst_input *input) noexcept nogil:
    """What is left moves into memory of its own size: a byte behind a long message must not hold what that took."""
    cdef char *small = <char *>malloc(input.size)
    if small == NULL:
        return
    memcpy(small, input.view, input.size)
    free(input.storage)
    input.storage = small
    input.capacity = input.size
    input.view = small
