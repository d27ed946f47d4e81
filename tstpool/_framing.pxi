# Framing and its kinds: how a stream is cut into messages. The cutting itself is _frame.pxd's.

cdef enum:
    MAX_MESSAGE = 1048576              # bytes: nginx' limit for a request's body


cdef class Framing:
    """How a stream of bytes is cut into messages. Make one of Raw, Fixed, Delimited, LengthPrefixed; they never change,
    and one may serve any number of pools and sockets."""

    def __cinit__(self, *args, **kwargs):
        if type(self) is Framing:
            raise TypeError("use Raw, Fixed, Delimited or LengthPrefixed")
        self.framing.object = <void *>self

    @property
    def max_message(self):
        """Bytes in the largest message, what is around it not counted. A longer one is a MessageTooLarge; with Raw,
        what has arrived is handed out in pieces of that size."""
        return self.framing.max_message

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options)})"

    def __eq__(self, other):
        return type(self) is type(other) and self.options == (<Framing>other).options

    def __hash__(self):
        return hash((type(self), self.options))

    def __reduce__(self):
        return remake, (type(self), self.options)

    cdef int set_limit(self, object max_message, object default) except -1:
        """First step of each __init__: there is no second one."""
        if self.options is not None:
            raise TypeError("a framing never changes")
        self.framing.max_message = number_within(default if max_message is None else max_message, "max_message", 1,
                                                 2**40)
        return 0


def remake(kind, options):
    """Unpickles a Framing. Not for users."""
    return kind(**dict(options))


@cython.final
cdef class Raw(Framing):
    """Raw(max_message=None)
--

    No framing: a message is whatever has arrived.

    max_message: most bytes handed out at once, and in one send_message() or one reply that a handler returns; None: no
    limit.
    """

    @cython.embedsignature(False)
    def __init__(self, max_message=None):
        self.framing.kind = FRAME_RAW if max_message is None else FRAME_PIECES
        self.set_limit(max_message, 2**40)
        framing_settle(&self.framing)
        self.options = () if max_message is None else (("max_message", max_message),)


@cython.final
cdef class Fixed(Framing):
    """Fixed(n, *, max_message=None)
--

    Messages of `n` bytes each.

    n: bytes, at most max_message, which is 1 MiB, or `n` if that is more, unless given. A message of another size can't
    be sent: send_message() raises ValueError.
    """

    @cython.embedsignature(False)      # Cython would put the star in a wrong place
    def __init__(self, n, *, max_message=None):
        self.framing.kind = FRAME_FIXED
        self.set_limit(max_message, max(MAX_MESSAGE, operator.index(n)))
        self.framing.fixed = number_within(n, "n", 1, self.framing.max_message)
        framing_settle(&self.framing)
        self.options = (("n", n),) + (() if max_message is None else (("max_message", max_message),))


@cython.final
cdef class Delimited(Framing):
    """Delimited(delimiter=b"\\n", keep=False, *, max_message=None)
--

    Messages that end with a delimiter: lines, for example.

    delimiter: 1 to 255 bytes. keep: hand it out with the message. max_message: bytes before the delimiter, 1 MiB unless
    given. send_message() and replies take messages without the delimiter and add it; with `keep` also those that end
    with it, as they are handed out.
    """

    @cython.embedsignature(False)
    def __init__(self, delimiter=b"\n", keep=False, *, max_message=None):
        cdef bytes raw = bytes(memoryview(delimiter))
        self.framing.kind = FRAME_DELIMITED
        self.set_limit(max_message, MAX_MESSAGE)
        self.framing.n_delimiter = <unsigned char>number_within(len(raw), "len(delimiter)", 1, DELIMITER_MOST)
        memcpy(self.framing.delimiter, PyBytes_AS_STRING(raw), self.framing.n_delimiter)
        self.framing.keep = bool(keep)
        framing_settle(&self.framing)
        self.options = (("delimiter", raw), ("keep", bool(keep)), ("max_message", self.framing.max_message))


@cython.final
cdef class LengthPrefixed(Framing):
    """LengthPrefixed(size=4, byteorder="big", offset=0, adjust=0, strip=True, *, max_message=None)
--

    Messages with their length in front.

    size: bytes in the length field: 1, 2, 3, 4 or 8. byteorder: "big" or "little". offset: bytes before the length
    field. adjust: what to add to its number to get the size of the body that follows it; -size if it counts itself.
    strip: hand out the body alone; else all from the first byte. max_message: bytes in the body, 1 MiB unless given.
    send_message() and replies take bodies and write what goes before them, with zeros before the length field; what was
    not stripped goes back as it is with send().
    """

    @cython.embedsignature(False)
    def __init__(self, size=4, byteorder="big", offset=0, adjust=0, strip=True, *, max_message=None):
        if operator.index(size) not in (1, 2, 3, 4, 8):
            raise ValueError(f"size must be 1, 2, 3, 4 or 8: {size!r}")
        if byteorder not in ("big", "little"):
            raise ValueError(f"byteorder must be 'big' or 'little': {byteorder!r}")
        self.framing.kind = FRAME_LENGTH
        self.set_limit(max_message, MAX_MESSAGE)
        self.framing.length_size = <unsigned char>operator.index(size)
        self.framing.little = byteorder == "little"
        self.framing.offset = number_within(offset, "offset", 0, OFFSET_MOST)
        self.framing.adjust = number_within(adjust, "adjust", -2**40, 2**40)
        self.framing.keep = not strip
        framing_settle(&self.framing)
        self.options = (("size", self.framing.length_size), ("byteorder", byteorder), ("offset", self.framing.offset),
                        ("adjust", self.framing.adjust), ("strip", bool(strip)),
                        ("max_message", self.framing.max_message))


cdef Framing framing_from(object value):
    """What a user gave as framing; None for bytes as they arrive."""
    if value is None or (isinstance(value, Framing) and (<Framing>value).options is not None):
        return value
    raise TypeError(f"framing must be None, Raw, Fixed, Delimited or LengthPrefixed, not {type(value).__name__}")


cdef const tst_framing *framing_pointer(Framing framing) noexcept:
    return NULL if framing is None else &framing.framing
