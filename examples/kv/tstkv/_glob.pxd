# cython: language_level=3
"""Glob patterns as Redis has them: `*`, `?`, `[abc]`, `[^a-z]`, and a backslash before what is meant literally.

Everything but `*` matches exactly one byte. So when a match fails, only the last `*` need take one byte more; what an
earlier one took can stay. No recursion, then, and at most size of pattern times size of text steps. That may still be
very many; so they are counted, and have a limit.
"""
from libc.stdint cimport uint64_t
from libc.string cimport memchr

from tstkv._text cimport lower


cdef inline bint in_range(signed char first, signed char last, signed char byte, bint any_case) noexcept nogil:
    """The order of the two is one of bytes, also where their case does not count, as in Redis."""
    if first > last:
        first, last = last, first
    if any_case:
        return <signed char>lower(first) <= <signed char>lower(byte) <= <signed char>lower(last)
    return first <= byte <= last


cdef enum:
    PATTERN_MOST = 1024        # bytes in a pattern with `*` or `[`, which are gone through for each byte of a text


cdef inline bint glob_is_too_long(const char *pattern, size_t size) noexcept nogil:
    return size > PATTERN_MOST and (memchr(pattern, c'*', size) != NULL or memchr(pattern, c'[', size) != NULL)


cdef inline size_t glob_set(const char *pattern, size_t size, char byte, bint any_case, bint *matches) noexcept nogil:
    """Matches a byte with the `[...]` at the beginning of `pattern`; returns how much of the pattern that is.

    One that is not closed reaches to the end. Bytes are signed here, as they are in Redis on most machines.
    """
    cdef size_t i = 1
    cdef bint inverted = i < size and pattern[i] == c'^'
    cdef bint found = False
    i += inverted
    while i < size and pattern[i] != c']':
        if pattern[i] == c'\\' and i + 1 < size:
            i += 1
            found |= pattern[i] == byte
        elif i + 2 < size and pattern[i + 1] == c'-':
            found |= in_range(<signed char>pattern[i], <signed char>pattern[i + 2], <signed char>byte, any_case)
            i += 2
        else:
            found |= lower(pattern[i]) == lower(byte) if any_case else pattern[i] == byte
        i += 1
    matches[0] = found != inverted
    return i + 1 if i < size else size


cdef inline size_t glob_one(const char *pattern, size_t size, char byte, bint any_case, bint *matches) noexcept nogil:
    """Matches a byte with the beginning of `pattern`, which is there and no `*`; returns how much of it was used."""
    cdef size_t i = 0
    if pattern[0] == c'?':
        matches[0] = True
        return 1
    if pattern[0] == c'[':
        return glob_set(pattern, size, byte, any_case, matches)
    if pattern[0] == c'\\' and size >= 2:
        i = 1
    matches[0] = lower(pattern[i]) == lower(byte) if any_case else pattern[i] == byte
    return i + 1


cdef inline bint glob_matches(const char *pattern, size_t pattern_size, const char *text, size_t text_size,
                              bint any_case, uint64_t *steps) noexcept nogil:
    """Takes what it has looked at, bytes of the pattern, from `steps`. Once that is 0 nothing matches."""
    cdef size_t at = 0, i = 0, used
    cdef size_t retry_at = 0, retry_i = 0  # behind the last `*`, and the byte from which what follows it is tried
    cdef bint matches, star = False
    if text_size == 0:
        return pattern_size == 0           # in Redis no `*` matches nothing at all
    while i < text_size:
        if at < pattern_size and pattern[at] == c'*':
            at += 1
            star, retry_at, retry_i = True, at, i
            continue
        if at < pattern_size:
            used = glob_one(pattern + at, pattern_size - at, text[i], any_case, &matches)
            if used >= steps[0]:
                steps[0] = 0
                return False
            steps[0] -= used
            if matches:
                at += used
                i += 1
                continue
        if not star:
            return False
        retry_i += 1
        at, i = retry_at, retry_i
    while at < pattern_size and pattern[at] == c'*':
        at += 1
    return at == pattern_size
