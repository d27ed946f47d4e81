# TstData: a request of the original's interface, and the buffer that it is read into or sent from.

@cython.final
cdef class TstData:
    """One of a socket's two transfer buffers: `recv_data` or `send_data`.

    `req_len` bytes are transferred to or from position `req_pos` of the buffer `s`; `com_len` of them are done. Fields
    may be read on any thread. Assign them inside the socket's handler; another thread may fill `send_data` and then
    call `pool.need_send(sock)`. It sets `req_len` to 0 first and to the new length last, for to assign `req_pos`
    asks for a transfer too: a handler that returns just then would send the old length from there.
    """

    def __cinit__(self, key=None):
        if key is not POOLS_KEY:
            raise TypeError("a TstData is made by its pool, not by hand")

    def __dealloc__(self):
        free(self.data.s)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef int result
        spin_lock(&self.data.lock)
        result = data_make(&self.data)
        if result == 0:
            self.data.exports += 1
        spin_unlock(&self.data.lock)
        check(result, "no memory for the buffer")
        try:
            PyBuffer_FillInfo(buffer, self, self.data.s, <Py_ssize_t>self.data.s_len, False, flags)
        except BaseException:
            self.release_export()
            raise

    def __releasebuffer__(self, Py_buffer *buffer):
        self.release_export()

    cdef void release_export(self) noexcept:
        spin_lock(&self.data.lock)
        self.data.exports -= 1
        spin_unlock(&self.data.lock)

    def __len__(self):
        return data_read(&self.data, &self.data.s_len)

    def __repr__(self):
        return (f"<TstData s_len={self.s_len} req_pos={self.req_pos} req_len={self.req_len} com_len={self.com_len} "
                f"checked_len={self.checked_len}>")

    @property
    def s(self):
        """A writable memoryview of the whole buffer. It stays valid after the connection has closed; resize() is
        refused while one is held."""
        return memoryview(self)

    @property
    def s_len(self):
        """Size of the buffer in bytes. Its memory is taken when the buffer is first used."""
        return data_read(&self.data, &self.data.s_len)

    @property
    def req_pos(self):
        """Where in the buffer the transfer begins. ValueError, and nothing changed, when it would run over the end."""
        return data_read(&self.data, &self.data.req_pos)

    @req_pos.setter
    def req_pos(self, value):
        check(data_request(&self.data, size_from(value, "req_pos"), self.data.req_len),
              "req_pos + req_len exceeds s_len")

    @property
    def req_len(self):
        """How many bytes are to be transferred; assigning it begins a new transfer (com_len = 0). 0: none. ValueError,
        and nothing changed, when it would run over the end of the buffer."""
        return data_read(&self.data, &self.data.req_len)

    @req_len.setter
    def req_len(self, value):
        check(data_request(&self.data, self.data.req_pos, size_from(value, "req_len")),
              "req_pos + req_len exceeds s_len")

    @property
    def com_len(self):
        """How many bytes of the transfer are done; of a sending one, how many the engine has taken over."""
        return data_read(&self.data, &self.data.com_len)

    @com_len.setter
    def com_len(self, value):
        check(data_set_done(&self.data, size_from(value, "com_len")), "com_len exceeds req_len")

    @property
    def checked_len(self):
        """Bytes that wait to be read with sock.read(), when the handler is called with req_len == 0."""
        return data_read(&self.data, &self.data.checked_len)

    @property
    def trans_time(self):
        """Seconds between the first and the last byte of the transfer that finished last."""
        return data_read(&self.data, &self.data.trans_time) / 1e9

    def resize(self, n):
        """Makes the buffer `n` bytes long and keeps its contents; new bytes are zero.

        Raises BufferError while a memoryview of it is held, or a compiled handler is given what is in it, ValueError
        when n <= 0 or the current request would not fit.
        """
        cdef int result = data_resize(&self.data, size_from(n, "n"))
        check(result, "the buffer is in use: a memoryview holds it, or a handler" if result == -EBUSY
              else "the new size is 0, or below req_pos + req_len")


cdef TstData new_transfer(size_t s_len):
    cdef TstData transfer = TstData.__new__(TstData, POOLS_KEY)
    transfer.data.s_len = s_len
    return transfer
