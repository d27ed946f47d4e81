# TstHandler and TstNogilHandler, which users subclass; Binding, a handler whose hooks have been looked up.

cdef class TstHandler:
    """What a pool calls. Override what you need; a hook that is not overridden costs nothing.

    Hooks of one socket never run at the same time, and its messages come in order. A hook may block: other connections
    go on as long as the pool has workers left. Unless said otherwise a hook returns None or a TstStat.
    """

    def on_connect(self, sock):
        """A connection is there; no message has been handed out yet. It may send. Anything above TstStat.SEND refuses
        it: what is queued is sent, it is closed, and on_disconnect is not called."""

    def on_message(self, sock, data):
        """`data`: one whole message as bytes, or, if the pool was made with copy=False, as a memoryview; without
        framing, whatever has arrived. Returning bytes (a bytearray, a memoryview, `data` itself) sends them as one
        message; a number that is no TstStat, such as the count that send() returns, is an error.

        A peer that has finished sending is let go when its messages are handled and what was queued is sent,
        unless there is an on_eof. Who is to answer later, from another thread, and has none calls sock.pause() here,
        and sock.resume() once that is sent."""

    def on_writable(self, sock):
        """need_send() was asked for and the kernel takes output; a TstStat.SEND has been handed to it whole; or, of a
        socket for which more than high_water had waited, no more than low_water still does. Of a TstNogilHandler it is
        not called for the last of these: tst_need_send() asks for it."""

    def on_eof(self, sock):
        """The peer has finished sending; all its messages have been handled. It may still read.

        Whoever overrides this keeps the connection open: it sends for as long as it likes, if never silent for an
        accepted connection's idle_timeout, and ends it with sock.close() or sock.send_eof(); on_disconnect follows.
        TstStat.DISCONNECT closes it; TstStat.RUN is as if there were no such hook. What came of a message that did not
        become whole is there for sock.read()."""

    def on_disconnect(self, sock, reason):
        """The connection is over; called once for each on_connect that accepted, or raised. reason: None when the peer
        or this side closed cleanly, else an exception: also when output was lost after this side had closed it, be it
        that the peer broke, that it took none for linger_timeout (TimeoutError), or that stop() did not wait for it
        (ConnectionAbortedError). close(abort=True) is a clean end."""

    def on_idle(self, worker_no):
        """Worker `worker_no` has had nothing to do for the pool's idle_time."""

    def on_slow(self, sock, seconds):
        """A hook of `sock` took longer than the pool's slow_handler. It is called when that hook has returned.

        Unless overridden it logs a warning; another one, with the stack of the thread, is logged while the hook still
        runs, by a worker that is free. (Without a GIL there is no stack: frames of a running thread change.) Of either
        there are at most ten records a second and pool, and the next one says how many were left out.
        """
        log_caused((<TstSocket?>sock).pool, "slow", logging.WARNING,
                   "a handler took %.3f s on socket %d", seconds, sock.sd)

    def on_error(self, sock, exc):
        """A hook raised `exc`, or what it returned was nothing for a hook to return, or could not be sent; or the
        peer's message was too long (MessageTooLarge), or there was no memory for it. The socket is disconnected
        afterwards, what this sends first, unless it was a hook and this returns TstStat.SUSPEND. Either way what the
        hook has sent before it raised goes out, and what it has put into send_data and asked for by req_len.

        Unless overridden it logs them, a hook's with its traceback, in which control characters are escaped. Of each
        class of exceptions that is at most ten records a second and pool, for peers may cause any number; the next
        record says how many were left out.
        """
        log_failure((<TstSocket?>sock).pool, sock.sd, exc)


cdef class TstNogilHandler(TstHandler):
    """A handler whose hooks may be written in Cython, without the GIL: subclass it there, with `cimport tstpool`. What
    its C hooks pass on with TST_RUN reaches the Python hooks of TstHandler. See _core.pxd for the C hooks."""

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        return TST_RUN

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        return TST_RUN

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        return TST_RUN

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        pass

    cdef void release(self, void *state) noexcept nogil:
        pass

    cdef TstStat eof(self, TstSocket sock) noexcept nogil:
        return TST_RUN

    cdef void _reserved_1(self) noexcept nogil:
        pass

    cdef void _reserved_2(self) noexcept nogil:
        pass

    cdef void _reserved_3(self) noexcept nogil:
        pass

    cdef void _reserved_4(self) noexcept nogil:
        pass

    cdef void _reserved_5(self) noexcept nogil:
        pass

    cdef void _reserved_6(self) noexcept nogil:
        pass

    cdef void _reserved_7(self) noexcept nogil:
        pass


# The engine calls a TstNogilHandler through these: it knows no classes.

cdef int call_connected(void *handler, void *sock) noexcept nogil:
    return (<TstNogilHandler>handler).connected(<TstSocket>sock)


cdef int call_received(void *handler, void *sock, const char *data, size_t size) noexcept nogil:
    return (<TstNogilHandler>handler).received(<TstSocket>sock, data, size)


cdef int call_writable(void *handler, void *sock) noexcept nogil:
    return (<TstNogilHandler>handler).writable(<TstSocket>sock)


cdef int call_eof(void *handler, void *sock) noexcept nogil:
    return (<TstNogilHandler>handler).eof(<TstSocket>sock)


cdef int call_disconnected(void *handler, void *sock) noexcept nogil:
    (<TstNogilHandler>handler).disconnected(<TstSocket>sock)
    return 0


cdef tuple HOOKS = ("on_connect", "on_message", "on_writable", "on_eof", "on_disconnect", "on_idle", "on_slow",
                    "on_error", "on_most_elapsed")


@cython.final
cdef class Binding:
    """A handler with its hooks looked up: None where the user has not overridden one."""


cdef object hook_of(object handler, str name):
    """The handler's hook as a bound method; None when it is TstHandler's own and does nothing."""
    method = getattr(handler, name, None)
    if name not in ("on_slow", "on_error") and getattr(type(handler), name, None) is getattr(TstHandler, name, None):
        if name not in getattr(handler, "__dict__", ()):
            return None
    return method


cdef bint logs_slow(Binding binding):
    """on_slow is TstHandler's own."""
    return getattr(binding.on_slow, "__func__", None) is TstHandler.on_slow or binding.function is not None


cdef bint takes_message(object function) except -1:
    """A function of a socket and a message, not of a socket alone, which reads messages itself. Of one that does not
    say what it takes the latter is assumed."""
    n = arity_of(function, (1, 2))
    if n is None or n > 0:
        return n == 2
    raise TypeError(f"a function that is a handler takes a socket, or a socket and a message: {function!r}")


cdef Binding bind(object handler, dict hooks):
    """Looks a handler's hooks up; `hooks` from setEvent... win. TypeError for what is no handler."""
    cdef Binding binding = Binding.__new__(Binding)
    cdef object source = handler
    cdef object on_message = None
    if not isinstance(handler, TstHandler):
        if not callable(handler) or isinstance(handler, type):
            raise TypeError(f"a handler is a TstHandler instance or a function, not {handler!r}")
        source = DEFAULT_HANDLER
        if takes_message(handler):
            on_message = handler
        else:
            binding.function = handler
    found = {name: hook_of(source, name) if hooks.get(name) is None else hooks[name] for name in HOOKS}
    binding.handler = handler
    binding.on_connect = found["on_connect"]
    binding.on_message = found["on_message"] if on_message is None else on_message
    binding.on_writable = found["on_writable"]
    binding.on_eof = found["on_eof"]
    binding.on_disconnect = found["on_disconnect"]
    binding.on_idle = found["on_idle"]
    binding.on_slow = found["on_slow"]
    binding.on_error = found["on_error"]
    binding.on_most_elapsed = found["on_most_elapsed"]
    if isinstance(handler, TstNogilHandler):
        binding.compiled.handler = <void *>handler     # borrowed: binding.handler holds it
        binding.compiled.connected = call_connected
        binding.compiled.received = call_received
        binding.compiled.writable = call_writable
        binding.compiled.eof = call_eof
        binding.compiled.disconnected = call_disconnected
    return binding


DEFAULT_HANDLER = TstHandler()
