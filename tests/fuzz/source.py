"""Decisions out of bytes: what a fuzzer mutates becomes numbers, choices and streams."""


class Source:
    """Reads decisions from the front; when the bytes are used up every decision is 0, so that any input is a case."""

    def __init__(self, data):
        self.data = data
        self.place = 0

    def __bool__(self):
        """Some bytes are left."""
        return self.place < len(self.data)

    def take(self, size):
        """Up to `size` bytes."""
        piece = self.data[self.place : self.place + size]
        self.place += len(piece)
        return piece

    def number(self, size=1):
        return int.from_bytes(self.take(size), "little")

    def below(self, most):
        """0 to most - 1; most is at most 256."""
        return self.number() % most

    def flag(self):
        return self.below(2) == 1

    def choose(self, things):
        return things[self.below(len(things))]

    def some(self, most=255):
        """A length and so many bytes."""
        return self.take(self.below(most + 1))

    def rest(self):
        return self.take(len(self.data))
