"""Why some lines of the package are not executed by any test, or not in every run: tests/COVERAGE.md is made of this.

{reason: {"file function": [lines]}}. A line is known by its text and its function, so that it may move; one that stands
there twice is named twice.
"""

REASONS = {
    "Moments that no test waits for: no memory, Ctrl-C or the interpreter's end just there; a lock held at a fork.": {
        "tstpool/_data.pxd input_shrink": ["return"],
        "tstpool/_pool.pxi TstPool.add_listener": ["take_out(self.files, name)"],
        "tstpool/_pool.pxi TstPool.give_up": [
            "if time.monotonic() > until:       # Ctrl-C came within its start(): it never will run, or be joined",
            "break",
        ],
        "tstpool/_pool.pxi TstPool.serve_forever": [
            "except TstError:",
            "if interpreter_ends:           # since the look above",
            "return",
            "raise",
        ],
        "tstpool/_pool.pxi WorkersLife.__cinit__": ['raise TypeError("not to be made by hand")'],
        "tstpool/_pool.pxi unlock_transfer": ["store32(&data.lock, 0, RELEASE)"],
    },
    "Memory that can't be had. Each allocation of one scene fails in "
    "tests/test_memory_that_cannot_be_had_crashes_nothing.py; those behind these lines are not made in it, or not at a "
    "time when they may fail there.": {
        "tstpool/_collect.pxd accept_refuse": [
            "count(&worker.stats.accept_errors, 1)",
            "worker.accept_errno = ENOMEM",
        ],
        "tstpool/_conn.pxd queue_frame": ["return -ENOMEM", "return -ENOMEM"],
        "tstpool/_socket.pxi make_state": ["return -ENOMEM"],
        "tstpool/_pool.pxi TstPool.add": ['raise MemoryError("no slot for the socket")'],
        "tstpool/_workers.pxi make_room": ["raise MemoryError()"],
        "tstpool/_worker.pxi Worker.make_spares": [
            "except MemoryError:",
            "return 0                   # messages are received where there is room, as others are",
        ],
        "tstpool/_worker.pxi Loan.end": [
            "input_free(input)                  # what is left lies in what is the loan's now",
            'raise MemoryError("no memory for input")',
        ],
        "tstpool/_worker.pxi new_loan": ['raise MemoryError("no memory for a message")'],
        "tstpool/_worker.pxi Worker.serve": [
            "self.lack_memory()",
            "with nogil:",
            "shard_yield(self.engine, self.worker, shard)",
        ],
        "tstpool/_worker.pxi Worker.resume": ["time.sleep(0.01)", "own = batch_get(self.engine)"],
        "tstpool/_worker.pxi Worker.adopt_binding": [
            "connection_break(connection, ENOMEM)",
            "connection_begin_close(connection)",
        ],
        "tstpool/_data.pxd input_unread": ["return -ENOMEM"],
        "tstpool/_entry.pxd connection_cut_transfer": ["connection_break(connection, <int>-used)", "return False"],
        "tstpool/_entry.pxd connection_apply": ["connection_break(connection, -queued)"],
        "tstpool/_queue.pxd chunk_new": ["return NULL"],
        "tstpool/_queue.pxd queue_settle": ["return"],
        "tstpool/_queue.pxd queue_append_pieces": ["return -ENOMEM"],
        "tstpool/_shard.pxd batch_get": ["return NULL", "batch_leave(engine, batch, 2)", "return NULL"],
        "tstpool/_shard.pxd batch_empty": ["return -ENOMEM"],
        "tstpool/_turn.pxd shard_turn": ["return -ENOMEM"],
    },
    "Two threads must meet within a few instructions. Models and stress tests look for what goes wrong then; whether a "
    "run executes these lines is chance.": {
        "tstpool/_conn.pxd table_make": ["free(chunk)        # another thread was faster"],
        "tstpool/_collect.pxd accept_here_after_all": [
            "connection_settle_in(connection, engine, shard, TYPE_SUB)",
            "sub32(&home.open, 1, RELEASE)",
            "return True",
        ],
        "tstpool/_collect.pxd collect_event": ["count_stale(&worker.stats, connection)", "return"],
        "tstpool/_run.pxd batch_run_compiled": ["return False"],
        "tstpool/_run.pxd entry_run_compiled": ["entry_detach(entry, &worker.stats)"],
        "tstpool/_run.pxd run_compiled": [
            "return True                        # since it was collected another handler was assigned"
        ],
        "tstpool/_pool.pxi TstPool.close_descriptors": [
            "sched_yield()                  # between its look whether somebody sleeps and its write"
        ],
        "tstpool/_entry.pxd batch_give_up": [
            "connection_break(batch.entries[i].connection, EIO)",
            "connection_keep_input(batch.entries[i].connection)",
        ],
        "tstpool/_workers.pxi worker_broke": ["continue"],
        "tstpool/_pool.pxi TstPool.give_up": ["except RuntimeError:", "time.sleep(0.001)"],
        "tstpool/_workers.pxi wait_ended": ["return True", "return ended.is_set()"],
        "tstpool/_worker.pxi Worker.make_body": ["return 0"],
        "tstpool/_worker.pxi Worker.log_slow": [
            "store64(&self.engine.slow_look, clock_now() + self.engine.slow_handler, RELEASE)"
        ],
        "tstpool/_worker.pxi Worker.quick_messages": ["self.unsent_reply(sock, binding, <object>result, queued)"],
        "tstpool/_worker.pxi Worker.run_compiled_messages": ["self.report(sock)"],
        "tstpool/_worker.pxi Worker.resume": ["return NULL"],
        "tstpool/_entry.pxd connection_reconnect": ["sys_reset_on_close(connection.fd, False)"],
        "tstpool/_entry.pxd connection_wait_for_flusher": [
            "spin_unlock(&connection.lock)",
            "sched_yield()",
            "spin_lock(&connection.lock)",
        ],
        "tstpool/_entry.pxd connection_expire": [
            "return                             # nor did we see that the peer has taken something"
        ],
        "tstpool/_entry.pxd entry_finish": ["shard_ask(connection, entry.generation, PEND_IN)"],
        "tstpool/_park.pxd any_shard_running": ["return True"],
        "tstpool/_park.pxd thread_is_running": ["return False", "return False"],
        "tstpool/_poll.pxd connection_flush": ["spin_unlock(&connection.lock)", "connection_free(connection, stats)"],
        "tstpool/_turn.pxd milliseconds_until": ["return 0"],
        "tstpool/_turn.pxd slow_next": ["slow_note(worker, calls)"],
        "tstpool/_cli/demo.py Demo.end_clients": ["self.broadcaster.join(CLOSING_GRACE)"],
        "tstpool/_cli/services.py Broadcaster._wait_for_subscribers": ["break"],
        "tstpool/_turn.pxd shard_sleep": [
            "timeout = 0",
            "timeout = 0                        # it began before it could see us asleep",
        ],
    },
    "Two things at once that no test brings about: output that has failed, on a connection that is paused or full of "
    "input; a compiled `writable`, for a connection that needs Python for something else.": {
        "tstpool/_entry.pxd take_input": [
            "connection_break(connection, broken)       # nobody will make room for what may still be there",
            "return",
        ],
        "tstpool/_worker.pxi Worker.writable": [
            "stat = self.notify(sock, connection.compiled, connection.compiled.writable)",
            "if stat != TST_RUN:",
            "connection_apply(connection, self.worker, stat)",
            "return 0",
        ],
    },
    "A test would have to wait for an hour: a sleep is no longer, though the next deadline be.": {
        "tstpool/_turn.pxd milliseconds_until": ["ms = 3600000"],
    },
    "More at once than a test on a shared machine should make: a batch that is full, in the middle of accepting.": {
        "tstpool/_collect.pxd accept_burst": ["return"],
    },
    "Cannot happen as the callers are; what would be done if they changed.": {
        "tstpool/_core.pyx _stop_all": ["except BaseException as error:", "failure = error"],
        "tstpool/_collect.pxd engine_is_full": ["return False"],
        "tstpool/_collect.pxd listener_request": ["place = &place[0].timer_next"],
        "tstpool/_conn.pxd connection_release": ['tst_bug("release of a connection that nobody owns")'],
        "tstpool/_check.pxi check": ["raise system_error(<int>-result, what)"],
        "tstpool/_transfer.pxi TstData.__getbuffer__": ["except BaseException:", "self.release_export()", "raise"],
        "tstpool/_socket.pxi TstSocket.raise_unsent": ["return 0"],
        "tstpool/_worker.pxi Worker.drop_entry": [
            'log(logging.ERROR, "the connection with socket %d is broken", connection.fd, exc_info=error)',
        ],
        "tstpool/_worker.pxi Worker.log_slow": [
            "except BaseException as error:",
            'log(logging.ERROR, "a slow handler could not be logged", exc_info=error)',
        ],
        "tstpool/_timer.pxd connection_deadline": ["return DEADLINE_NONE"],
    },
    "System calls that do not fail here, and are not made to.": {
        "tstpool/_net.py _is_abandoned": ["except OSError:", "return False"],
        "tstpool/_poll.pxd sys_count": ["return 0"],
    },
    "Calls are timed together where they are quick, which in a build without optimisation they are not. "
    "tests/test_the_last_of_a_group_of_messages_is_reported.py needs these lines in any other.": {
        "tstpool/_worker.pxi Worker.quick_messages": ["self.report(sock)"],
    },
    "A machine of another kind: a clock that is not the processor's counter, no /sys.": {
        "tstpool/_workers.pxi kernel_counts_ticks": ["except OSError:", "return False"],
        "tstpool/_workers.pxi tick_scale": ["return 0"],
    },
    "Room for hooks to come: nobody calls them, and a module that knows one of them brings its own.": {
        "tstpool/_handler.pxi TstNogilHandler._reserved_1": ["cdef void _reserved_1(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_2": ["cdef void _reserved_2(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_3": ["cdef void _reserved_3(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_4": ["cdef void _reserved_4(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_5": ["cdef void _reserved_5(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_6": ["cdef void _reserved_6(self) noexcept nogil:"],
        "tstpool/_handler.pxi TstNogilHandler._reserved_7": ["cdef void _reserved_7(self) noexcept nogil:"],
    },
    "Executed only in processes that end without counting, by _exit or a signal: forked children, the interpreter's "
    "exit.": {
        "tstpool/_pool.pxi TstPool.serve_forever": [
            'raise TstError("serve_forever() in a handler would wait for itself")'
        ],
        "tstpool/_pool.pxi TstPool.check_alive": [
            'raise TstError("this pool belongs to the parent process: after fork() make a new one")'
        ],
        "tstpool/_pool.pxi TstPool.start_locked": ['raise TstError("the interpreter is shutting down")'],
    },
    "Another system, or a package without its compiled part. tests/test_packaging.py has the second; it makes builds "
    "of its own and does not run in this one.": {
        "tstpool/__init__.py ": [
            'raise ImportError(f"tstpool runs on Linux only: its engine is built on epoll, which {_sys.platform} does '
            'not have")',
            'if _error.name != "tstpool._core":',
            "raise",
            "raise ImportError(",
        ],
    },
    "What the demo's clients and the demo say when the engine is wrong or does not answer: it does not come to that.": {
        "tstpool/_cli/clients.py Conversation.send": [
            "except BlockingIOError:",
            'raise TimeoutError(f"the server took nothing for {REPLY_TIMEOUT:.0f} s") from None',
        ],
        "tstpool/_cli/clients.py Conversation.receive": [
            "except BlockingIOError:",
            'raise TimeoutError(f"{have} of {size} bytes came, then none for {REPLY_TIMEOUT:.0f} s") from None',
        ],
        "tstpool/_cli/clients.py Conversation.expect": ['raise WrongBytes(f"{what}: {wrong}")'],
        "tstpool/_cli/clients.py Conversation.expect_end": [
            "except BlockingIOError:",
            'raise TimeoutError(f"the server did not close within {REPLY_TIMEOUT:.0f} s") from None',
        ],
        "tstpool/_cli/clients.py broadcast": [
            'raise WrongBytes(f"message {number} came where {expected} should have")'
        ],
        "tstpool/_cli/clients.py meet": [
            "except BlockingIOError:",
            'raise TimeoutError(f"the pool did not connect within {REPLY_TIMEOUT:.0f} s") from None',
        ],
        "tstpool/_cli/clients.py end_with_the_demo": ["os._exit(1)"],
        "tstpool/_cli/demo.py Demo.finish": [
            'self.failures.append(f"the pool did not stop within {CLOSING_GRACE:.0f} s")'
        ],
        "tstpool/_cli/demo.py Demo.check_connections": [
            "self.failures.append(",
            'self.failures.append(f"the pool\'s count is off: {show.balance(stats, self.books)}")',
        ],
        "tstpool/_cli/demo.py Demo.check_broadcast": ["self.failures.append(self.broadcaster.failure)"],
        "tstpool/_cli/services.py header_then_body": ["return TstStat.DISCONNECT"],
        "tstpool/_cli/services.py Books.connected": [
            'self.failures.append(f"{kind}: on_connect came twice for connection {sock.id:#x}")'
        ],
        "tstpool/_cli/services.py Books.disconnected": [
            'self.failures.append(f"on_disconnect came for connection {sock.id:#x}, which was not here")'
        ],
        "tstpool/_cli/services.py Broadcaster.run": [
            "except Exception as error:",
            'self.failure = f"broadcast: the sending thread ended with {error!r}"',
        ],
    },
    "Only the pool's on_slow is asked, not that of a socket's own handler, which this is.": {
        "tstpool/_cli/services.py BlockingEcho.on_slow": ["pass  # it is slow on purpose: no warning"],
    },
}
