"""Framing in plain Python: what the engine's _frame.pxd must agree with."""

import dataclasses

import tstpool

TOO_LARGE = "too large"


@dataclasses.dataclass
class Model:
    """Options as those of tstpool's framings, by the same names."""

    kind: type
    max_message: int
    size: int = 0
    delimiter: bytes = b""
    byteorder: str = "big"
    offset: int = 0
    adjust: int = 0
    keep: bool = False

    def real(self):
        """The tstpool.Framing of these options; ValueError when it refuses them."""
        limit = {"max_message": self.max_message}
        if self.kind is tstpool.Raw:
            return tstpool.Raw(self.max_message)
        if self.kind is tstpool.Fixed:
            return tstpool.Fixed(self.size, **limit)
        if self.kind is tstpool.Delimited:
            return tstpool.Delimited(self.delimiter, self.keep, **limit)
        return tstpool.LengthPrefixed(self.size, self.byteorder, self.offset, self.adjust, not self.keep, **limit)

    def first(self, stream, begin):
        """(message, bytes that it takes up) of what begins there; None: it is not whole yet; TOO_LARGE."""
        left = len(stream) - begin
        if self.kind is tstpool.Raw:
            size = min(left, self.max_message)
            return (stream[begin : begin + size], size) if size else None
        if self.kind is tstpool.Fixed:
            return (stream[begin : begin + self.size], self.size) if left >= self.size else None
        if self.kind is tstpool.Delimited:
            return self.first_delimited(stream, begin)
        return self.first_prefixed(stream, begin)

    def first_delimited(self, stream, begin):
        end = stream.find(self.delimiter, begin)
        if end < 0:  # the last bytes may be the beginning of a delimiter
            beyond = len(stream) - begin - (len(self.delimiter) - 1) > self.max_message
            return TOO_LARGE if beyond else None
        whole = end + len(self.delimiter)
        return (
            TOO_LARGE
            if end - begin > self.max_message
            else (stream[begin : whole if self.keep else end], whole - begin)
        )

    def first_prefixed(self, stream, begin):
        header = begin + self.offset + self.size
        if len(stream) < header:
            return None
        body = int.from_bytes(stream[begin + self.offset : header], self.byteorder) + self.adjust
        if not 0 <= body <= self.max_message:
            return TOO_LARGE
        end = header + body
        return (stream[begin if self.keep else header : end], end - begin) if len(stream) >= end else None

    def header(self, size):
        """What goes before a body of `size` bytes; TOO_LARGE: there is no frame for it."""
        if size > self.max_message or (self.kind is tstpool.Fixed and size != self.size):
            return TOO_LARGE
        if self.kind is not tstpool.LengthPrefixed:
            return b""
        if not 0 <= size - self.adjust < 256**self.size:
            return TOO_LARGE
        return bytes(self.offset) + (size - self.adjust).to_bytes(self.size, self.byteorder)


def cut(model, stream, changes=(), taken=()):
    """(messages, what is left, whether it ended as too large). `changes`: {number of messages: the Model from there};
    `taken`: {number of messages: bytes that the handler has read there by itself}. For Raw: as if all came in one
    read."""
    messages, begin, changes, taken = [], 0, dict(changes), dict(taken)
    while True:
        by_handler = taken.get(len(messages), b"")
        known = by_handler[: max(0, len(stream) - begin)]  # the handler may know more than we do yet
        assert stream.startswith(known, begin), "read() gave other bytes than were next"
        begin += len(by_handler)
        model = changes.get(len(messages), model)
        if model is None:
            found = (stream[begin:], len(stream) - begin) if begin < len(stream) else None
        else:
            found = model.first(stream, begin)
        if found is None:
            return messages, stream[begin:], False
        if found is TOO_LARGE:
            return messages, b"", True
        messages.append(found[0])
        begin += found[1]


# Where limits, sign bits and buffers end.
EDGES = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 257, 4096, 65535, 65536, 2**20, 2**31, 2**32, 2**40, 2**40 + 1, 2**63]


def edge(source):
    """A small number, or one near an edge."""
    choice = source.number()
    return choice if choice < 128 else EDGES[choice % len(EDGES)]


def model_from(source, kinds=None):
    """A Model out of a Source's bytes; its options may be such that tstpool refuses them."""
    kind = source.choose(kinds or [tstpool.Raw, tstpool.Fixed, tstpool.Delimited, tstpool.LengthPrefixed])
    model = Model(kind, max_message=edge(source))
    if kind is tstpool.Fixed:
        model.size = edge(source)
    if kind is tstpool.Delimited:
        model.keep = source.flag()
        model.delimiter = source.some(source.choose([3, 3, 3, 255]))
    if kind is tstpool.LengthPrefixed:
        model.size = source.choose([1, 2, 3, 4, 8])
        model.byteorder = source.choose(["big", "little"])
        model.offset = source.choose([0, 0, 0, 1, 5, 255, 65535, 65536])
        model.adjust = source.choose([-1, 1]) * edge(source)
        model.keep = source.flag()
    return model


def acceptable(model):
    """What the documentation allows."""
    if not 1 <= model.max_message <= 2**40:
        return False
    if model.kind is tstpool.Fixed:
        return 1 <= model.size <= model.max_message
    if model.kind is tstpool.Delimited:
        return 1 <= len(model.delimiter) <= 255
    return model.kind is not tstpool.LengthPrefixed or (model.offset <= 65535 and abs(model.adjust) <= 2**40)
