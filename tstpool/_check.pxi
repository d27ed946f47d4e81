# What users give, checked; and the one place where the engine's -errno becomes an exception.

cdef object system_error(int number, str text=None):
    """The OSError of an errno; Python picks the subclass."""
    return OSError(number, text or os.strerror(number))


cdef int check(ssize_t result, str what) except -1:
    """The one place that turns the engine's -errno into an exception."""
    if result >= 0:
        return 0
    if result == -ENOTCONN:
        raise ConnectionClosed("the socket is closed, or send_eof() was called")
    if result == -ENOMEM:
        raise MemoryError(what)
    if result == -EINVAL:
        raise ValueError(what)
    if result == -EBUSY:
        raise BufferError(what)
    if result == -EMSGSIZE:
        raise MessageTooLarge(what)
    if result == -ENOBUFS:
        raise SendQueueFull("too much output waits for a peer that does not take it")
    raise system_error(<int>-result, what)


cdef object integer(object value, str name):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


cdef size_t size_from(object value, str name) except? 0:
    """A size that a user gave: an integer from 0 up. TypeError for what is no integer."""
    number = integer(value, name)
    if number < 0 or number > 0x7fffffffffffffff:
        raise ValueError(f"{name} must not be negative, or beyond 2**63: {number}")
    return number


cdef size_t limit_from(object value, str name) except? 0:
    """A limit in bytes; 0 is the engine's word for None, no limit."""
    cdef size_t limit = 0 if value is None else size_from(value, name)
    if limit == 0 and value is not None:
        raise ValueError(f"{name} must not be 0; None: no limit")
    return limit


cdef object positive(object value, str name):
    number = integer(value, name)
    if number <= 0 or number > 0x7fffffff:
        raise ValueError(f"{name} must be a positive number below 2**31: {number}")
    return number


cdef object number_within(object value, str name, object least, object most):
    number = integer(value, name)
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}: {number}")
    return number


cdef uint64_t nanoseconds(object seconds, str name) except? 0:
    if not hasattr(seconds, "__float__") and not hasattr(seconds, "__index__"):    # of a text float() would make one
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    number = float(seconds)
    if not 0.0 <= number <= 1e9:
        raise ValueError(f"{name} must be between 0 and 1e9 seconds: {seconds}")
    return <uint64_t>(<double>number * NANOSECOND)


cdef uint32_t ticks_from(object seconds, str name) except? 0:
    """A limit in ticks of the wheel, rounded up; 0 for None. One more, for it begins within a tick."""
    cdef uint64_t number
    if seconds is None:
        return 0
    number = nanoseconds(seconds, name)
    if not 0 < number <= <uint64_t>4000000 * NANOSECOND:
        raise ValueError(f"{name} must be more than 0 seconds and at most 4,000,000, or None: {seconds}")
    return <uint32_t>((number >> TICK_BITS) + 2)


cdef dict OVERFLOWS = {"raise": OVERFLOW_REFUSE, "block": OVERFLOW_BLOCK, "close": OVERFLOW_CLOSE}


cdef int fill_limits(tst_limits *limits, dict given) except -1:
    """Limits as the engine has them, from what a user gave by the names of TstPool's parameters."""
    memset(limits, 0, sizeof(tst_limits))
    if given["linger_timeout"] is None:
        raise ValueError("linger_timeout must be a number of seconds: a closing connection may not wait for ever")
    limits.first_byte = ticks_from(given["first_byte_timeout"], "first_byte_timeout")
    limits.message = ticks_from(given["message_timeout"], "message_timeout")
    limits.idle = ticks_from(given["idle_timeout"], "idle_timeout")
    limits.write = ticks_from(given["write_timeout"], "write_timeout")
    limits.linger = ticks_from(given["linger_timeout"], "linger_timeout")
    limits.high_water = size_from(given["high_water"], "high_water")
    limits.low_water = size_from(given["low_water"], "low_water")
    limits.max_queued = limit_from(given["max_queued"], "max_queued")
    limits.auto_pause = bool(given["auto_pause"])
    if given["on_overflow"] not in tuple(OVERFLOWS):   # of which any object may be asked
        raise ValueError(f"on_overflow must be 'raise', 'block' or 'close': {given['on_overflow']!r}")
    limits.overflow = OVERFLOWS[given["on_overflow"]]
    if limits.low_water > limits.high_water or (limits.max_queued and limits.high_water > limits.max_queued):
        raise ValueError("low_water <= high_water <= max_queued must hold: "
                         f"{given['low_water']}, {given['high_water']}, {given['max_queued']}")
    return 0


cdef object usual_max_connections():
    """Redis' rule: some descriptors are left for everything else."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(10000, 10000 if soft == resource.RLIM_INFINITY else soft - 32))


cdef object arity_of(object function, object numbers):
    """The first of these numbers of arguments with which it may be called; -1: with none of them; None: it does not
    say."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    for n in numbers:
        try:
            signature.bind(*range(n))
        except TypeError:
            continue
        return n
    return -1


cdef object with_arity(object function, int least, int most):
    """Lets a hook take fewer arguments than there are: f(sock) where f(sock, reason) would do."""
    if not callable(function):
        raise TypeError(f"not callable: {function!r}")
    n = arity_of(function, range(most, least - 1, -1))
    if n is None or n == most:
        return function
    if n >= 0:
        return lambda *arguments: function(*arguments[:n])
    raise TypeError(f"{function!r} must take {least if least == most else f'{least} or {most}'} arguments")


cdef object contiguous(object data):
    """An object whose bytes lie in one piece: `data` itself, or a copy. TypeError when it has no buffer."""
    view = memoryview(data)
    return view if view.c_contiguous else view.tobytes()


cdef enum:
    STAT_EXIT = 9                      # TstStat's numbers that the Cython interface does not name
    STAT_EXITED = 10
    NO_STAT = 100                      # of what is none of them


cdef bint is_stat(object result) except -1:
    """A TstStat, or a number of one."""
    cdef int stat
    if not isinstance(result, int):
        return False
    stat = stat_from(result)
    return 0 <= stat <= <int>TST_DISCONNECT or stat == STAT_EXIT or stat == STAT_EXITED


cdef int stat_from(object number) except -1:
    """A number that a handler has returned as one of TstStat's; NO_STAT when it is far from any."""
    cdef int overflow = 0
    cdef long value = PyLong_AsLongAndOverflow(number, &overflow)      # asks no method of a class of the user's
    return <int>value if not overflow and 0 <= value < NO_STAT else NO_STAT
