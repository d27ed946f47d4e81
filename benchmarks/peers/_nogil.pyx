# cython: language_level=3, freethreading_compatible=True
"""Echo with tstpool in Cython: handlers that never touch the interpreter. tstpool_nogil.py serves them."""
from tstpool cimport TST_DISCONNECT, TST_SUSPEND, TstNogilHandler, TstSocket, TstStat, tst_send, tst_send_message


cdef class Echo(TstNogilHandler):
    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_SUSPEND if tst_send(sock, data, size) >= 0 else TST_DISCONNECT


cdef class FramedEcho(TstNogilHandler):
    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_SUSPEND if tst_send_message(sock, data, size) >= 0 else TST_DISCONNECT
