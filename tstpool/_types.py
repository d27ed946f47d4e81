"""The plain types of the public face: return codes, kinds of socket, errors, statistics. No engine in here."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class TstStat(enum.IntEnum):
    """What a handler returns to say how its connection goes on. The numbers are those of the original."""

    SUSPEND = 0
    """Wait for the next message. Returning None means the same."""
    RUN = 1
    """From a handler set on one socket: pass the message, or that it may write, on to the pool's handler; of a compiled
    one that has state for each connection (state_size), to its hooks in Python."""
    SEND = 2
    """Send what `send_data` asks for, then call the handler with EPOLLOUT."""
    RECONNECTED = 3
    """The handler has put a fresh connection under the same descriptor: forget the old one's bytes, go on.

    Send nothing in the call that does so. If it blocks in the middle and another worker takes over, what it has sent
    goes out at once, to whichever connection is under the descriptor at that moment. What another thread is sending
    in that moment may do the same; what waits when the handler returns is dropped.
    """
    DISCONNECT = 4
    """Send what is queued, then close."""
    EXIT = 9
    """As DISCONNECT; the original used it between its own threads."""
    EXITED = 10
    """As DISCONNECT; the original used it between its own threads."""


class TstSockType(enum.IntEnum):
    """What a socket is. USER1 to USER3 are the user's own groups of channels."""

    SUB = 0
    """Accepted from a listener."""
    WEBSOCKET = 1
    LISTEN = 2
    """A listener; handlers never see one."""
    CLIENT = 3
    """Connected by this side, and added to the pool."""
    USER1 = 4
    USER2 = 5
    USER3 = 6


class TstError(Exception):
    """Wrong use of the engine, or a limit of it. Failures of the operating system are OSError."""


class ConnectionClosed(TstError):
    """The socket is closed, or is closing and accepts no more output."""


class MessageTooLarge(TstError):
    """A peer announced or sent a message over `max_message`."""


class SendQueueFull(TstError):
    """The output queue of a connection is at its limit."""


@dataclass(frozen=True)
class WorkerStats:
    """What one worker has done since the pool started. Times in seconds; begin and end on time.monotonic()'s clock."""

    thread_no: int
    exec_count: int
    """Jobs: handler calls."""
    idle_count: int
    """How many times it had nothing to do for `idle_time`."""
    sum_time: float
    most_elapsed: float
    """The longest job. Quick handler calls are timed together, up to 32 of one connection, and a compiled handler's
    always: each then has their average, or, if they took long together, all of it."""
    begin_time: float
    """Begin of the last job."""
    end_time: float
    """End of the last job."""

    @property
    def average(self) -> float:
        """Mean time of a job, in seconds; 0.0 before the first."""
        return self.sum_time / self.exec_count if self.exec_count else 0.0


@dataclass(frozen=True)
class PoolStats:
    """A pool's counters, a snapshot. `accepted + added == closed + connections` whenever nothing is in motion."""

    connections: int
    """Open now, listeners not counted."""
    listeners: int
    accepted: int
    added: int
    """By addsocket() and connect()."""
    closed: int
    messages: int
    """Handler calls for input."""
    bytes_in: int
    bytes_out: int
    spins: int
    """Handler calls repeated at once although nothing new had come: SEND with nothing to send, input left unread."""
    slow_calls: int
    """Handler calls that took `slow_handler` or longer; those that are timed together (see `most_elapsed`) count as
    one."""
    stale_events: int
    """Events that arrived for a connection that was gone already."""
    stale_reused: int
    """Of these, the ones whose descriptor was another connection's by then."""
    accept_errors: int
    controls: int
    """epoll_ctl calls made for connections that were registered already, or were being registered."""
    accept_pauses: int
    """Times that accepting stopped for a while: `max_connections` were open, or the process ran out of something."""
    rejected_connections: int
    """Refused by on_connect, or closed because there were too many (`when_full="close"`)."""
    idle_closed: int
    """Connections closed because they were silent for `idle_timeout`."""
    first_byte_closed: int
    """Connections closed because nothing came within `first_byte_timeout`."""
    message_closed: int
    """Connections closed because a message was not whole within `message_timeout`."""
    write_closed: int
    """Connections closed because the peer took no output for `write_timeout`."""
    linger_closed: int
    """Connections cut off while closing: nothing moved for `linger_timeout`, or it took six times as long in all."""
    overflow_closed: int
    """Connections closed because too much output waited for them (`on_overflow="close"`, or a handler's send_data)."""
    overflow_refused: int
    """How often output was not taken because too much waited: by a send() that raised or went to wait, or a broadcast
    that left the connection out."""
    bytes_queued: int
    """Output that waits now because the kernel did not take it, and the sent part of the pieces that it is in."""
    auto_pauses: int
    """How often a connection came to have more than `high_water` waiting: with `auto_pause` its messages wait then."""
    too_large_closed: int
    """Connections closed because of a message over their framing's `max_message`."""
    handler_errors: int
    """Errors that on_error was told of (`MessageTooLarge` among them), and those of on_error, on_slow and on_idle
    themselves. All of them: of the log's records, at most ten of a class in a second are written."""
    workers: tuple[WorkerStats, ...]

    @property
    def deadline_closed(self) -> int:
        """All that missed a deadline other than `idle_timeout`."""
        return self.first_byte_closed + self.message_closed + self.write_closed + self.linger_closed
