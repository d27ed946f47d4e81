# cython: language_level=3
"""Numbers and words as they stand in requests and replies."""
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t

cdef enum:
    INTEGER_MOST = 20          # characters in the longest integer: -9223372036854775808
    WORD_MOST = 8              # letters in the longest name of a command


cdef inline bint text_to_integer(const char *text, size_t size, int64_t *number) noexcept nogil:
    """The integer that `text` is. False unless it is written the one way in which we would write it ourselves: no sign
    but '-', no zero in front, no space; and it fits 64 bits."""
    cdef bint negative = False
    cdef uint64_t value = 0
    cdef uint8_t digit
    cdef size_t i = 0
    if size == 0 or size > INTEGER_MOST:
        return False
    if text[0] == c'-':
        negative = True
        i = 1
        if size == 1:
            return False
    if text[i] == c'0':
        number[0] = 0
        return size == 1
    while i < size:
        digit = <uint8_t>text[i] - <uint8_t>c'0'
        # Twenty digits may go beyond 64 bits, but only in the last step.
        if digit > 9 or value > (<uint64_t>INT64_MAX + 1) // 10:
            return False
        value = value * 10 + digit
        i += 1
    if value > <uint64_t>INT64_MAX + negative:
        return False
    number[0] = <int64_t>(0 - value) if negative else <int64_t>value
    return True


cdef inline size_t integer_to_text(int64_t number, char *text) noexcept nogil:
    """Writes the integer and returns how many characters it has, at most INTEGER_MOST."""
    cdef char backwards[INTEGER_MOST]
    cdef uint64_t left = 0 - <uint64_t>number if number < 0 else <uint64_t>number
    cdef size_t n = 0, size = 0
    while True:
        backwards[n] = <char>(c'0' + <char>(left % 10))
        n += 1
        left //= 10
        if left == 0:
            break
    if number < 0:
        text[0] = c'-'
        size = 1
    while n:
        n -= 1
        text[size] = backwards[n]
        size += 1
    return size


cdef inline char lower(char letter) noexcept nogil:
    return letter + 32 if c'A' <= letter <= c'Z' else letter


cdef inline bint text_is(const char *text, size_t size, const char *word) noexcept nogil:
    """True: `text` is `word`, which is written in lower case and ends with a NUL, in whatever case. As in Redis, a NUL
    ends `text` too."""
    cdef size_t i
    for i in range(size):
        if text[i] == 0:
            return word[i] == 0
        if word[i] == 0 or lower(text[i]) != word[i]:
            return False
    return word[size] == 0


cdef inline uint64_t word_of(const char *text, size_t size) noexcept nogil:
    """A name of one to eight letters as a number, the same in whatever case. 0: `text` is no such name."""
    cdef uint64_t word = 0
    cdef uint8_t letter
    cdef size_t i
    if size > WORD_MOST:
        return 0
    for i in range(size):
        letter = <uint8_t>text[i] & 0xdf       # without the bit that tells lower case from upper
        if not c'A' <= letter <= c'Z':
            return 0
        word = word << 8 | letter
    return word
