# cython: language_level=3
"""The commands that work on keys, one function each. They answer, and err, as Redis 7.0 does."""
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint64_t

from tstkv._call cimport (
    CALL_DONE, CALL_LONG, argument, argument_integer, argument_is, argument_size, clock_milliseconds, kv_call,
    n_arguments, reply_no_memory, reply_syntax, reply_wrong_number, reply_wrong_time, time_fits)
from tstkv._glob cimport glob_is_too_long, glob_matches
from tstkv._libc cimport CLOCK_REALTIME
from tstkv._reply cimport (
    reply_array, reply_bulk, reply_error, reply_integer, reply_null, reply_ok, reply_peer_end, reply_text, reply_value)
from tstkv._table cimport (
    entry_expire, entry_key, entry_value, kv_entry, kv_slot, memory_for, room_for, table_clear, table_find, table_hash,
    table_next, table_prepare, table_remove, table_set)
from tstkv._text cimport INTEGER_MOST, integer_to_text, text_to_integer

cdef enum:
    KEYS_STEPS = 1 << 24       # that KEYS may take to compare, and two more for each byte of memory that is used


cdef inline kv_slot *find_key(kv_call *call, size_t i, uint64_t *hash) noexcept nogil:
    """The slot of the key that is argument `i`, or NULL; and its hash."""
    hash[0] = table_hash(&call.server.table, argument(call, i), argument_size(call, i))
    return table_find(&call.server.table, hash[0], argument(call, i), argument_size(call, i), call.now)


cdef inline void reply_found(kv_call *call, kv_slot *slot) noexcept nogil:
    if slot == NULL:
        reply_null(call.reply)
    else:
        reply_value(call.reply, slot.entry)


# -------------------------------------------------------------------------------------------- get and set

cdef inline int command_get(kv_call *call) noexcept nogil:
    cdef uint64_t hash = 0
    reply_found(call, find_key(call, 1, &hash))
    return CALL_DONE


cdef inline int command_mget(kv_call *call) noexcept nogil:
    cdef uint64_t hash = 0
    cdef size_t i
    reply_array(call.reply, n_arguments(call) - 1)
    for i in range(1, n_arguments(call)):
        reply_found(call, find_key(call, i, &hash))
    return CALL_DONE


# In what the time is given.
cdef enum:
    NO_TIME = 0
    SECONDS = 1                # from now on, as all but the last two
    MILLISECONDS = 2
    SECONDS_OF_DAY = 3         # since 1970
    MILLISECONDS_OF_DAY = 4


# What SET may be told beside key and value.
cdef struct kv_set_options:
    bint only_new              # NX
    bint only_old              # XX
    bint keep_ttl
    bint get
    int unit                   # of the time, or NO_TIME
    size_t time                # the argument with it


cdef inline int set_unit(kv_call *call, size_t i) noexcept nogil:
    """What time the option that is argument `i` stands before."""
    if argument_is(call, i, "ex"):
        return SECONDS
    if argument_is(call, i, "px"):
        return MILLISECONDS
    if argument_is(call, i, "exat"):
        return SECONDS_OF_DAY
    return MILLISECONDS_OF_DAY if argument_is(call, i, "pxat") else NO_TIME


cdef inline bint set_option(kv_call *call, size_t i, kv_set_options *options) noexcept nogil:
    """Reads the option that is argument `i`. False: there is no such option, or not beside those before it."""
    cdef int unit = set_unit(call, i)
    if argument_is(call, i, "nx") and not options.only_old:
        options.only_new = True
    elif argument_is(call, i, "xx") and not options.only_new:
        options.only_old = True
    elif argument_is(call, i, "get"):
        options.get = True
    elif argument_is(call, i, "keepttl") and options.unit == NO_TIME:
        options.keep_ttl = True
    elif unit and i + 1 < n_arguments(call) and not options.keep_ttl and options.unit in (NO_TIME, unit):
        options.unit, options.time = unit, i + 1
    else:
        return False
    return True


cdef inline bint set_options(kv_call *call, kv_set_options *options) noexcept nogil:
    """False: something is wrong with them, and the client has been told."""
    cdef size_t i = 3
    options.only_new = options.only_old = options.keep_ttl = options.get = False
    options.unit, options.time = NO_TIME, 0
    while i < n_arguments(call):
        if not set_option(call, i, options):
            reply_syntax(call)
            return False
        i = max(i, options.time) + 1
    return True


cdef inline bint in_milliseconds(int64_t *seconds) noexcept nogil:
    """False: so many seconds have no 64-bit number of milliseconds."""
    cdef int64_t most = INT64_MAX // 1000
    if not -most <= seconds[0] <= most:
        return False
    seconds[0] *= 1000
    return True


cdef inline int64_t from_time_of_day(kv_call *call, int64_t milliseconds) noexcept nogil:
    """The same time on our clock, at least 1: it may have passed."""
    cdef int64_t left = milliseconds - clock_milliseconds(CLOCK_REALTIME)
    if left <= -call.now:
        return 1
    return call.now + min(left, INT64_MAX - call.now)


cdef inline bint set_expires(kv_call *call, const kv_set_options *options, int64_t *expires) noexcept nogil:
    """When the key is to end; 0: never. False: that is no time, and the client has been told."""
    cdef bint in_seconds = options.unit in (SECONDS, SECONDS_OF_DAY)
    expires[0] = 0
    if options.unit == NO_TIME:
        return True
    if not argument_integer(call, options.time, expires):
        return False
    if expires[0] <= 0 or (in_seconds and not in_milliseconds(expires)):
        reply_wrong_time(call)
        return False
    if options.unit in (SECONDS_OF_DAY, MILLISECONDS_OF_DAY):
        expires[0] = from_time_of_day(call, expires[0])
        return True
    if not time_fits(call.now, expires[0]):
        reply_wrong_time(call)
        return False
    expires[0] += call.now
    return True


cdef inline kv_entry *set_argument(kv_call *call, size_t i, uint64_t hash, kv_slot *slot) noexcept nogil:
    """Sets the key that is argument `i`, and was found in `slot`, to the argument behind it. NULL: no memory."""
    return table_set(&call.server.table, hash, slot, argument(call, i), argument_size(call, i),
                     argument(call, i + 1), argument_size(call, i + 1))


cdef inline void reply_done(kv_call *call, const kv_entry *entry) noexcept nogil:
    if entry == NULL:
        reply_no_memory(call)
    else:
        reply_ok(call.reply)


cdef inline int command_set(kv_call *call) noexcept nogil:
    cdef kv_set_options options
    cdef int64_t expires = 0
    cdef uint64_t hash = 0
    cdef kv_slot *slot
    cdef kv_entry *entry
    if n_arguments(call) > 3:
        if not set_options(call, &options) or not set_expires(call, &options, &expires):
            return CALL_DONE
    else:
        options.only_new = options.only_old = options.keep_ttl = options.get = False
    if table_prepare(&call.server.table, 1, memory_for(room_for(argument_size(call, 1), argument_size(call, 2))),
                     call.now) < 0:
        reply_no_memory(call)
        return CALL_DONE
    slot = find_key(call, 1, &hash)
    if options.get:
        reply_found(call, slot)
    if (options.only_new and slot != NULL) or (options.only_old and slot == NULL):
        if not options.get:
            reply_null(call.reply)
        return CALL_DONE
    entry = set_argument(call, 1, hash, slot)
    if entry != NULL and not options.keep_ttl:
        entry_expire(&call.server.table, entry, expires)
    if not options.get:
        reply_done(call, entry)
    return CALL_DONE


cdef inline int command_mset(kv_call *call) noexcept nogil:
    cdef uint64_t hash = 0, memory = 0
    cdef kv_slot *slot
    cdef kv_entry *entry = NULL
    cdef size_t i
    if n_arguments(call) % 2 == 0:
        reply_wrong_number(call)
        return CALL_DONE
    # All or nothing, as far as maxmemory goes: there is enough for all of them, or nothing is set.
    for i in range(1, n_arguments(call), 2):
        memory += memory_for(room_for(argument_size(call, i), argument_size(call, i + 1)))
    if table_prepare(&call.server.table, n_arguments(call) // 2, memory, call.now) < 0:
        reply_no_memory(call)
        return CALL_DONE
    for i in range(1, n_arguments(call), 2):
        slot = find_key(call, i, &hash)
        entry = set_argument(call, i, hash, slot)
        if entry == NULL:
            break                          # malloc has refused what maxmemory allows: those before it are set
        entry_expire(&call.server.table, entry, 0)
    reply_done(call, entry)
    return CALL_DONE


# ----------------------------------------------------------------------------------------------- numbers

cdef inline int add_to(kv_call *call, int64_t difference) noexcept nogil:
    """Adds to the number that is the value of the first argument, or to 0; answers the sum."""
    cdef char text[INTEGER_MOST]
    cdef int64_t number = 0
    cdef uint64_t hash = 0
    cdef kv_slot *slot
    if table_prepare(&call.server.table, 1, memory_for(room_for(argument_size(call, 1), INTEGER_MOST)), call.now) < 0:
        reply_no_memory(call)
        return CALL_DONE
    slot = find_key(call, 1, &hash)
    if slot != NULL and not text_to_integer(entry_value(slot.entry), slot.entry.value_size, &number):
        reply_error(call.reply, "value is not an integer or out of range")
        return CALL_DONE
    if (difference > 0 and number > INT64_MAX - difference) or (difference < 0 and number < INT64_MIN - difference):
        reply_error(call.reply, "increment or decrement would overflow")
        return CALL_DONE
    number += difference
    if table_set(&call.server.table, hash, slot, argument(call, 1), argument_size(call, 1), text,
                 integer_to_text(number, text)) == NULL:
        reply_no_memory(call)
        return CALL_DONE
    reply_integer(call.reply, number)
    return CALL_DONE


cdef inline int command_incr(kv_call *call) noexcept nogil:
    return add_to(call, 1)


cdef inline int command_decr(kv_call *call) noexcept nogil:
    return add_to(call, -1)


cdef inline int command_incrby(kv_call *call) noexcept nogil:
    cdef int64_t difference = 0
    return add_to(call, difference) if argument_integer(call, 2, &difference) else CALL_DONE


cdef inline int command_decrby(kv_call *call) noexcept nogil:
    cdef int64_t difference = 0
    if not argument_integer(call, 2, &difference):
        return CALL_DONE
    if difference == INT64_MIN:
        reply_error(call.reply, "decrement would overflow")
        return CALL_DONE
    return add_to(call, -difference)


# -------------------------------------------------------------------------------------------- there or not

cdef inline int command_del(kv_call *call) noexcept nogil:
    cdef int64_t n = 0
    cdef uint64_t hash = 0
    cdef kv_slot *slot
    cdef size_t i
    for i in range(1, n_arguments(call)):
        slot = find_key(call, i, &hash)
        if slot != NULL:
            table_remove(&call.server.table, slot)
            n += 1
    reply_integer(call.reply, n)
    return CALL_DONE


cdef inline int command_exists(kv_call *call) noexcept nogil:
    cdef int64_t n = 0
    cdef uint64_t hash = 0
    cdef size_t i
    for i in range(1, n_arguments(call)):
        n += find_key(call, i, &hash) != NULL
    reply_integer(call.reply, n)
    return CALL_DONE


cdef inline kv_entry *next_matching(kv_call *call, size_t *i, uint64_t *steps) noexcept nogil:
    """The next entry, from the slot `i` on, whose key matches the first argument; or NULL, as when `steps` are 0."""
    cdef const char *pattern = argument(call, 1)
    cdef size_t size = argument_size(call, 1)
    cdef bint all_keys = size == 1 and pattern[0] == c'*'
    cdef kv_entry *entry = NULL
    while steps[0] and table_next(&call.server.table, i, call.now, &entry):
        if entry != NULL and (
                all_keys or glob_matches(pattern, size, entry_key(entry), entry.key_size, False, steps)):
            return entry
    return NULL


cdef inline uint64_t steps_left(kv_call *call) noexcept nogil:
    """That KEYS may take now: all of a transaction take from the same, for nobody else is served before EXEC ends."""
    cdef uint64_t most = KEYS_STEPS + 2 * call.server.table.used
    return most - call.steps if call.steps < most else 0


cdef inline int command_keys(kv_call *call) noexcept nogil:
    """Goes through the table twice: the reply begins with how many there are. The second time ends with the last one,
    and takes no more steps than the first; they count only for what comes behind in the same transaction."""
    cdef uint64_t most = steps_left(call), steps = most
    cdef size_t i = 0, n = 0
    cdef kv_entry *entry
    if glob_is_too_long(argument(call, 1), argument_size(call, 1)):
        reply_error(call.reply, "pattern is too long")
        return CALL_DONE
    while next_matching(call, &i, &steps) != NULL:
        n += 1
    call.steps += most - steps
    if steps == 0:
        reply_error(call.reply, "pattern takes too long")
        return CALL_LONG
    reply_array(call.reply, n)
    i, steps = 0, most
    while n:
        entry = next_matching(call, &i, &steps)
        reply_bulk(call.reply, entry_key(entry), entry.key_size)
        n -= 1
    call.steps += most - steps
    return CALL_LONG


cdef inline int command_dbsize(kv_call *call) noexcept nogil:
    reply_integer(call.reply, <int64_t>call.server.table.count)
    return CALL_DONE


cdef inline int command_flush(kv_call *call) noexcept nogil:
    if n_arguments(call) > 2 or (
            n_arguments(call) == 2 and not argument_is(call, 1, "sync") and not argument_is(call, 1, "async")):
        reply_syntax(call)
    elif table_clear(&call.server.table) < 0:
        reply_no_memory(call)
    else:
        reply_ok(call.reply)
    return CALL_DONE


# ------------------------------------------------------------------------------------------------- expiry

# When EXPIRE is to do it.
cdef struct kv_expire_options:
    bint unset                 # NX: no time is set yet
    bint isset                 # XX
    bint later                 # GT: it would end later; never counts as the latest
    bint earlier               # LT


cdef inline bint expire_options(kv_call *call, kv_expire_options *options) noexcept nogil:
    """False: something is wrong with them, and the client has been told."""
    cdef size_t i
    options.unset = options.isset = options.later = options.earlier = False
    for i in range(3, n_arguments(call)):
        if argument_is(call, i, "nx"):
            options.unset = True
        elif argument_is(call, i, "xx"):
            options.isset = True
        elif argument_is(call, i, "gt"):
            options.later = True
        elif argument_is(call, i, "lt"):
            options.earlier = True
        else:
            reply_text(call.reply, "-ERR Unsupported option ")
            reply_peer_end(call.reply, argument(call, i), argument_size(call, i))
            return False
    if options.unset and (options.isset or options.later or options.earlier):
        reply_error(call.reply, "NX and XX, GT or LT options at the same time are not compatible")
        return False
    if options.later and options.earlier:
        reply_error(call.reply, "GT and LT options at the same time are not compatible")
        return False
    return True


cdef inline bint expire_agrees(const kv_expire_options *options, int64_t before, int64_t after) noexcept nogil:
    """The options allow this change. 0 is never."""
    if options.unset and before != 0:
        return False
    if options.isset and before == 0:
        return False
    if options.later and (before == 0 or after <= before):
        return False
    return not (options.earlier and before != 0 and after >= before)


cdef inline int expire_in(kv_call *call, bint seconds) noexcept nogil:
    """EXPIRE, and PEXPIRE with its milliseconds. A time in the past is one: the key goes at once."""
    cdef kv_expire_options options
    cdef int64_t expires = 0
    cdef uint64_t hash = 0
    cdef kv_slot *slot
    if not expire_options(call, &options) or not argument_integer(call, 2, &expires):
        return CALL_DONE
    if (seconds and not in_milliseconds(&expires)) or not time_fits(call.now, expires):
        reply_wrong_time(call)
        return CALL_DONE
    expires += call.now
    slot = find_key(call, 1, &hash)
    if slot == NULL or not expire_agrees(&options, slot.entry.expires, expires):
        reply_integer(call.reply, 0)
        return CALL_DONE
    if expires <= call.now:
        table_remove(&call.server.table, slot)
    else:
        entry_expire(&call.server.table, slot.entry, expires)
    reply_integer(call.reply, 1)
    return CALL_DONE


cdef inline int command_expire(kv_call *call) noexcept nogil:
    return expire_in(call, True)


cdef inline int command_pexpire(kv_call *call) noexcept nogil:
    return expire_in(call, False)


cdef inline int64_t time_left(kv_call *call) noexcept nogil:
    """Milliseconds; -1: it never ends; -2: there is no such key."""
    cdef uint64_t hash = 0
    cdef kv_slot *slot = find_key(call, 1, &hash)
    if slot == NULL:
        return -2
    return slot.entry.expires - call.now if slot.entry.expires else -1


cdef inline int command_ttl(kv_call *call) noexcept nogil:
    cdef int64_t left = time_left(call)
    reply_integer(call.reply, left if left < 0 else left // 1000 + (left % 1000 >= 500))
    return CALL_DONE


cdef inline int command_pttl(kv_call *call) noexcept nogil:
    reply_integer(call.reply, time_left(call))
    return CALL_DONE
