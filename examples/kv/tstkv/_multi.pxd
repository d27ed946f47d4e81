# cython: language_level=3
"""MULTI, EXEC, DISCARD: requests that wait until they are run together.

A request is run without anybody in between, and EXEC is one request, so that nothing more is needed to make them one.
Queued requests are kept as they were sent, and parsed anew by EXEC.
"""
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from tstkv._call cimport CALL_CLOSE, CALL_DONE, COMMAND_LONG, kv_call, kv_queued
from tstkv._reply cimport reply_error, reply_ok, reply_text

cdef enum:
    QUEUED_LEAST = 256         # bytes
    LONG_MOST = 16             # commands of a transaction that may take long: nobody else is served meanwhile


cdef inline void queued_forget(kv_queued *queued) noexcept nogil:
    free(queued.bytes)
    queued.bytes = NULL
    queued.open = queued.spoiled = False
    queued.n = queued.n_long = queued.size = queued.capacity = 0


cdef inline bint queued_add(kv_queued *queued, const char *bytes, size_t size, size_t most) noexcept nogil:
    """False: they are more than `most` bytes, or there is no memory for them."""
    cdef size_t capacity = max(queued.capacity, <size_t>QUEUED_LEAST)
    cdef char *grown
    if size > most or queued.size > most - size:
        return False
    while capacity - queued.size < size:
        capacity *= 2
    if capacity != queued.capacity:
        grown = <char *>realloc(queued.bytes, capacity)
        if grown == NULL:
            return False
        queued.bytes, queued.capacity = grown, capacity
    memcpy(queued.bytes + queued.size, bytes, size)
    queued.size += size
    queued.n += 1
    return True


cdef inline int queue_call(kv_call *call) noexcept nogil:
    """Keeps the request for EXEC."""
    if call.command.flags & COMMAND_LONG:
        if call.client.queued.n_long == LONG_MOST:
            call.client.queued.spoiled = True
            reply_error(call.reply, "too many commands that take long in one transaction")
            return CALL_DONE
        call.client.queued.n_long += 1
    if not queued_add(&call.client.queued, call.bytes, call.size, call.server.limits.request):
        return CALL_CLOSE
    reply_text(call.reply, "+QUEUED\r\n")
    return CALL_DONE


cdef inline int command_multi(kv_call *call) noexcept nogil:
    if call.client.queued.open:
        reply_error(call.reply, "MULTI calls can not be nested")
    else:
        call.client.queued.open = True
        reply_ok(call.reply)
    return CALL_DONE


cdef inline int command_discard(kv_call *call) noexcept nogil:
    if call.client.queued.open:
        queued_forget(&call.client.queued)
        reply_ok(call.reply)
    else:
        reply_error(call.reply, "DISCARD without MULTI")
    return CALL_DONE


cdef inline void exec_refuse(kv_call *call) noexcept nogil:
    """EXEC itself is wrong: for Redis that is the end of the transaction, if there is one."""
    queued_forget(&call.client.queued)
    reply_text(call.reply, "-EXECABORT Transaction discarded because of: "
                           "wrong number of arguments for 'exec' command\r\n")


cdef inline bint exec_is_allowed(kv_call *call) noexcept nogil:
    """False: there is nothing to run, and the client has been told why."""
    if not call.client.queued.open:
        reply_error(call.reply, "EXEC without MULTI")
        return False
    if call.client.queued.spoiled:
        queued_forget(&call.client.queued)
        reply_text(call.reply, "-EXECABORT Transaction discarded because of previous errors.\r\n")
        return False
    return True
