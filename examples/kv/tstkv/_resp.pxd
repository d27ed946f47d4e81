# cython: language_level=3
"""Requests: RESP2 arrays and inline commands, parsed as they come in.

    *2\r\n$3\r\nGET\r\n$5\r\nhello\r\n        an array: how many arguments; of each, how many bytes and the bytes
    GET "hello"\r\n                           inline: a line of words, for people

The parser is given the unread bytes, which begin where a request begins. When the request is not whole yet it remembers
how far it has got (`at`, `searched`) and goes on from there once more has come: a request that comes byte by byte is
parsed once, and not from its beginning at every byte. The bytes may lie elsewhere then, so that arguments are noted as
distances from the beginning (kv_span) until the request is whole.

Each number that a client sends is compared with its limit before it is used. Errors are worded as Redis words them. It
differs where Redis takes a NUL for the end of what has arrived: here a NUL is a byte like others.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr

from tstkv._libc cimport kv_rarely
from tstkv._text cimport text_to_integer

cdef enum:
    LINE_MOST = 65536          # bytes in an inline command, or in the line before an argument
    ARGUMENTS_MOST = 1048576   # in one request
    FEW = 8                    # arguments for which there is always room
    KEPT = 128                 # arguments for which room is kept after a request that needed it

# What resp_parse returns.
cdef enum:
    RESP_PARTIAL = 0           # more must come
    RESP_WHOLE = 1             # a request, perhaps an empty one
    RESP_BROKEN = -1           # `error` says why; the stream can't be read any further
    RESP_NO_MEMORY = -2


cdef struct kv_span:
    uint32_t offset            # from the request's `base`
    uint32_t size


cdef struct kv_request:
    const char *base           # borrowed until the next call: what the spans count from
    kv_span *spans             # `few`, or owned
    uint32_t n                 # arguments found so far
    uint32_t room              # arguments that `spans` has room for
    uint32_t missing           # arguments of the array that are still to come; 0: a request begins
    uint32_t argument_size     # of the next argument, if has_size
    bint has_size
    size_t at                  # how far the request has been parsed
    size_t searched            # how far a line's end has been searched for in vain
    const char *error          # NULL, or the words after "Protocol error: "
    char unexpected            # what stands where a '$' must be, if error says so; else NUL
    kv_span few[FEW]


cdef inline void request_init(kv_request *request) noexcept nogil:
    request.spans = request.few
    request.room = FEW


cdef inline size_t request_memory(kv_request *request) noexcept nogil:
    """Bytes that it owns beside itself."""
    return request.room * sizeof(kv_span) if request.spans != request.few else 0


cdef inline size_t request_seen(kv_request *request) noexcept nogil:
    """Bytes at its beginning that are known to be no whole request."""
    return request.at + request.searched + (request.argument_size if request.has_size else 0)


cdef inline void request_reset(kv_request *request) noexcept nogil:
    """Forgets the request: the next bytes begin another one."""
    request.n = request.missing = 0
    request.at = request.searched = 0
    request.has_size = False
    if kv_rarely(request.room > KEPT):
        request_free(request)


cdef inline void request_free(kv_request *request) noexcept nogil:
    if request.spans != request.few:
        free(request.spans)
    request_init(request)


cdef inline int request_add(kv_request *request, size_t offset, size_t size) noexcept nogil:
    """Notes an argument. 0 or RESP_NO_MEMORY."""
    cdef kv_span *spans
    cdef int i
    if kv_rarely(request.n == request.room):
        spans = <kv_span *>realloc(NULL if request.spans == request.few else request.spans,
                                   <size_t>request.room * 2 * sizeof(kv_span))
        if spans == NULL:
            return RESP_NO_MEMORY
        if request.spans == request.few:
            for i in range(FEW):
                spans[i] = request.few[i]
        request.spans = spans
        request.room *= 2
    request.spans[request.n].offset = <uint32_t>offset
    request.spans[request.n].size = <uint32_t>size
    request.n += 1
    return 0


cdef inline int request_broken(kv_request *request, const char *error) noexcept nogil:
    request.error = error
    return RESP_BROKEN


# --------------------------------------------------------------------------------------------------- inline

cdef inline bint is_space(char byte) noexcept nogil:
    return byte == c' ' or c'\t' <= byte <= c'\r'


cdef inline int hex_digit(char digit) noexcept nogil:
    """Its value, or -1."""
    if c'0' <= digit <= c'9':
        return digit - c'0'
    if c'a' <= digit <= c'f':
        return digit - c'a' + 10
    if c'A' <= digit <= c'F':
        return digit - c'A' + 10
    return -1


cdef inline char unescaped(char byte) noexcept nogil:
    """What a letter means after a backslash between double quotes."""
    if byte == c'n':
        return c'\n'
    if byte == c'r':
        return c'\r'
    if byte == c't':
        return c'\t'
    if byte == c'b':
        return c'\b'
    return c'\a' if byte == c'a' else byte


cdef inline bint inline_quoted(const char *line, size_t size, size_t *at, char *text, size_t *end) noexcept nogil:
    """Copies what stands between the quote at `at` and the one that closes it. False: none does, or more follows it."""
    cdef char quote = line[at[0]]
    cdef size_t i = at[0] + 1
    cdef int high = -1, low = -1
    while i < size and line[i] != quote:
        if line[i] == c'\\' and i + 1 < size:
            if quote == c'"' and line[i + 1] == c'x' and i + 3 < size:
                high, low = hex_digit(line[i + 2]), hex_digit(line[i + 3])
            else:
                high = low = -1
            if high >= 0 and low >= 0:
                text[end[0]] = <char>(high * 16 + low)
                i += 3
            elif quote == c'"':
                text[end[0]] = unescaped(line[i + 1])
                i += 1
            elif line[i + 1] == c'\'':
                text[end[0]] = c'\''
                i += 1
            else:
                text[end[0]] = c'\\'
        else:
            text[end[0]] = line[i]
        end[0] += 1
        i += 1
    at[0] = i + 1
    return i < size and (i + 1 == size or is_space(line[i + 1]))


cdef inline int inline_split(kv_request *request, const char *line, size_t size, char *text) noexcept nogil:
    """Splits a line into words, which are copied to `text` (LINE_MOST bytes) without their quotes."""
    cdef size_t i = 0, end = 0, begin
    while True:
        while i < size and is_space(line[i]):
            i += 1
        if i == size:
            return RESP_WHOLE
        begin = end
        while i < size and line[i] != c' ' and not c'\t' <= line[i] <= c'\n' and line[i] != c'\r':
            if line[i] == c'"' or line[i] == c'\'':
                if not inline_quoted(line, size, &i, text, &end):
                    return request_broken(request, "unbalanced quotes in request")
                break
            text[end] = line[i]
            end += 1
            i += 1
        if request_add(request, begin, end - begin) < 0:
            return RESP_NO_MEMORY


cdef inline int parse_inline(kv_request *request, const char *bytes, size_t size, char *text,
                             size_t *used) noexcept nogil:
    cdef size_t most = size if size <= LINE_MOST else LINE_MOST + 1
    cdef const char *end = <const char *>memchr(bytes + request.searched, c'\n', most - request.searched)
    cdef size_t line
    if end == NULL:
        request.searched = most
        return RESP_PARTIAL if size <= LINE_MOST else request_broken(request, "too big inline request")
    line = <size_t>(end - bytes)
    used[0] = line + 1
    request.base = text
    return inline_split(request, bytes, line - 1 if line and bytes[line - 1] == c'\r' else line, text)


# --------------------------------------------------------------------------------------------------- arrays

cdef inline int parse_number(kv_request *request, const char *bytes, size_t size, int64_t *number,
                             bint *valid) noexcept nogil:
    """The number in the line at `at`, behind its first byte. RESP_WHOLE: `at` is behind the line. RESP_BROKEN: the line
    is too long."""
    cdef size_t begin = request.at
    cdef size_t left = size - begin
    cdef size_t most = left if left <= LINE_MOST else LINE_MOST + 1
    cdef const char *end
    cdef uint8_t digit
    # Nearly always it has one digit.
    if left >= 4 and bytes[begin + 2] == c'\r':
        digit = <uint8_t>bytes[begin + 1] - <uint8_t>c'0'
        if digit <= 9:
            number[0] = digit
            valid[0] = True
            request.at = begin + 4
            request.searched = 0
            return RESP_WHOLE
    end = <const char *>memchr(bytes + begin + request.searched, c'\r', most - request.searched)
    if end == NULL:
        request.searched = most
        return RESP_PARTIAL if left <= LINE_MOST else RESP_BROKEN
    request.searched = <size_t>(end - bytes) - begin
    if request.searched + 2 > left:
        return RESP_PARTIAL                # its line feed must be there too
    valid[0] = text_to_integer(bytes + begin + 1, request.searched - 1, number) if request.searched else False
    request.at = begin + request.searched + 2
    request.searched = 0
    return RESP_WHOLE


cdef inline int parse_count(kv_request *request, const char *bytes, size_t size) noexcept nogil:
    """The first line of an array."""
    cdef int64_t count = 0
    cdef bint valid = False
    cdef int found = parse_number(request, bytes, size, &count, &valid)
    if found == RESP_BROKEN:
        return request_broken(request, "too big mbulk count string")
    if found == RESP_WHOLE:
        if not valid or count > ARGUMENTS_MOST:
            return request_broken(request, "invalid multibulk length")
        request.missing = <uint32_t>count if count > 0 else 0
    return found


cdef inline int parse_argument(kv_request *request, const char *bytes, size_t size, size_t most) noexcept nogil:
    """The next argument of an array, of at most `most` bytes."""
    cdef int64_t number = 0
    cdef bint valid = False
    cdef size_t begin = request.at
    cdef int found
    if not request.has_size:
        if begin == size:
            return RESP_PARTIAL
        found = parse_number(request, bytes, size, &number, &valid)
        if found == RESP_BROKEN:
            return request_broken(request, "too big bulk count string")
        if found == RESP_PARTIAL:
            return found
        if bytes[begin] != c'$':
            request.unexpected = bytes[begin]
            return request_broken(request, "expected '$', got ")
        if not valid or number < 0 or number > <int64_t>most:
            return request_broken(request, "invalid bulk length")
        request.argument_size = <uint32_t>number
        request.has_size = True
    if size - request.at < <size_t>request.argument_size + 2:
        return RESP_PARTIAL
    if request_add(request, request.at, request.argument_size) < 0:
        return RESP_NO_MEMORY
    request.at += <size_t>request.argument_size + 2        # Redis does not look at these two bytes either
    request.has_size = False
    request.missing -= 1
    return RESP_WHOLE


cdef inline int resp_parse(kv_request *request, const char *bytes, size_t size, size_t most, char *text,
                           size_t *used) noexcept nogil:
    """Parses the request at the beginning of `bytes`; there is at least one byte, and those seen before come again.

    most: bytes in the longest argument. text: LINE_MOST bytes, where the words of an inline command go.
    RESP_WHOLE: it has `n` arguments and took `used` bytes. Call request_reset before the next one.
    """
    cdef int found
    if request.missing == 0:
        if bytes[0] != c'*':
            return parse_inline(request, bytes, size, text, used)
        found = parse_count(request, bytes, size)
        if found != RESP_WHOLE:
            return found
    while request.missing:
        found = parse_argument(request, bytes, size, most)
        if found != RESP_WHOLE:
            return found
    request.base = bytes
    used[0] = request.at
    return RESP_WHOLE
