"""The cells of the fault matrix: which system call fails how, what drives it there, and what is to become of it.

An outcome is one of
    served      every client got its bytes, the one whose call failed, too
    late        ... after another event had come
    ended       one connection ended for each failure, with right bytes up to there; the others were served
    stopped     the pool ended, and serve_forever raised that error
    refused     start or listen raised; nothing was left behind, and the next start worked
    raised      the method that was called raised; nothing was left behind
A call's errnos are what its manual page names and what kernels are known to return beside that.
"""

from dataclasses import dataclass, field


@dataclass
class Call:
    name: str  # the system call
    kind: str  # the client of clients.py that leads there, or "start" or "connect"
    expected: dict[str, str]  # outcome, or several "served|ended" -> errnos
    argument: str = ""  # what the failing call's line must have in it
    edge: dict[str, str] = field(default_factory=dict)  # differences under trigger="edge"
    every: str = ""  # errnos with which each third call may fail, and all is served
    each: bool = False  # in "every" that is not each third call, but each
    threads: str = "workers"  # who is traced: "workers", "speaker", "main", "all"
    triggers: tuple[str, ...] = ("level", "oneshot", "edge")
    later: bool = True  # also in the midst of all kinds of clients
    fresh: bool = False  # in a process of its own: a failure changes from where malloc takes memory afterwards
    leaks: bool = False  # a descriptor that the kernel would have closed stays open, as the call was not made

    @property
    def title(self):
        return f"{self.name} {self.argument}".strip(" ,") + f" ({self.kind})"


ENDS_RECV = "EBADF ECONNREFUSED ECONNRESET EFAULT EHOSTUNREACH EINVAL EIO ENOBUFS ENOMEM ENOTCONN ENOTSOCK ETIMEDOUT"
ENDS_SEND = (
    "EACCES EALREADY EBADF ECONNRESET EDESTADDRREQ EFAULT EHOSTUNREACH EINVAL EISCONN EMSGSIZE ENETDOWN ENETUNREACH "
    "ENOBUFS ENOMEM ENOTCONN ENOTSOCK EOPNOTSUPP EPERM EPIPE ETIMEDOUT"
)
ACCEPTS_AGAIN = (
    "EAGAIN EBADF ECONNABORTED EFAULT EHOSTDOWN EHOSTUNREACH EINTR EINVAL EMFILE ENETDOWN ENETUNREACH ENFILE ENOBUFS "
    "ENOMEM ENONET ENOPROTOOPT ENOSR ENOTSOCK EOPNOTSUPP EPERM EPROTO EPROTONOSUPPORT ESOCKTNOSUPPORT ETIMEDOUT"
)
MEMORY = {"served|ended": "ENOMEM EAGAIN EINVAL EPERM"}
WATCHED = ("level", "oneshot")  # those with more than one worker: see WORKERS in run.py

CALLS = [
    # -- a connection's life
    Call("accept4", "newcomer", {"served": ACCEPTS_AGAIN}, every=ACCEPTS_AGAIN),
    Call("setsockopt", "newcomer", {"served": "EBADF EFAULT EINVAL ENOMEM ENOPROTOOPT ENOTSOCK"}, every="EINVAL"),
    Call("epoll_ctl", "newcomer", {"ended": "EBADF EEXIST EINVAL ELOOP ENOENT ENOMEM ENOSPC EPERM"}, "EPOLL_CTL_ADD"),
    Call("epoll_ctl", "echo", {"ended": "EBADF EINVAL ENOENT ENOMEM EPERM"}, "EPOLL_CTL_MOD", triggers=("oneshot",)),
    Call(
        "epoll_ctl",
        "large",
        {"served|ended": "EBADF EINVAL ENOENT ENOMEM EPERM"},  # served where another MOD follows at once
        "EPOLL_CTL_MOD",
        later=False,
    ),
    Call("epoll_ctl", "leaver", {"served": "EBADF EINVAL ENOENT ENOMEM EPERM"}, "EPOLL_CTL_DEL", later=False),
    Call(
        "recvfrom",
        "echo",
        {"served": "EAGAIN EINTR", "ended": ENDS_RECV},
        edge={"late": "EAGAIN"},  # an edge promises that something is there: the kernel never does this
        every="EAGAIN EINTR",
    ),
    Call("recvfrom", "framed_echo", {"ended": ENDS_RECV}, later=False),
    Call(
        "recvfrom",
        "alike",
        {"served": "EAGAIN EINTR", "ended": ENDS_RECV},
        edge={"late": "EAGAIN"},
        later=False,
    ),
    Call("sendto", "echo", {"served": "EAGAIN EINTR", "ended": ENDS_SEND}, every="EAGAIN EINTR"),
    Call("sendmsg", "pieces", {"served": "EAGAIN EINTR", "ended": ENDS_SEND}, every="EAGAIN EINTR"),
    Call("sendto", "large", {"served": "EINTR", "ended": "EPIPE ENOMEM ECONNRESET"}, later=False),
    Call("sendto", "outsider", {"served": "EAGAIN EINTR", "ended": "EPIPE ENOMEM ECONNRESET"}, later=False),
    Call("shutdown", "told_to_end", {"served|ended": "EBADF EINVAL ENOTCONN ENOTSOCK ENOBUFS"}),
    Call("shutdown", "finisher", {"served|ended": "EBADF EINVAL ENOTCONN ENOTSOCK ENOBUFS"}, later=False),
    Call("getsockopt", "goner", {"served": "EBADF EFAULT EINVAL ENOPROTOOPT ENOTSOCK"}, "SO_ERROR", later=False),
    Call("ioctl", "told_to_end_whole", {"served|ended": "EBADF EFAULT EINVAL ENOTTY"}, "FIONREAD", later=False),
    Call("poll", "writable", {"served": "EFAULT EINTR EINVAL ENOMEM"}, every="EINTR ENOMEM"),
    Call("close", "leaver", {"served": "EBADF EDQUOT EINTR EIO ENOSPC"}, later=False, leaks=True),
    # -- workers
    Call("epoll_wait", "echo", {"served": "EINTR", "stopped": "EBADF EFAULT EINVAL"}, every="EINTR"),
    Call("read", "spoken_to", {"served": "EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR"}, ", 8)", later=False),
    # The alarm for deadlines: without it the time-out of epoll_wait has to do.
    Call(
        "timerfd_settime",
        "too_slow",
        {"served": "EBADF ECANCELED EFAULT EINVAL ENOMEM"},
        every="EINVAL ENOMEM",
        each=True,
    ),
    Call("read", "too_slow", {"served": "EAGAIN EBADF ECANCELED EFAULT EINTR EINVAL EIO"}, "timerfd", later=False),
    Call(
        "openat",
        "blocker",
        {"served": "EACCES EINTR EMFILE ENFILE ENOENT ENOMEM"},
        "/stat",
        later=False,
        triggers=WATCHED,
    ),
    Call("read", "blocker", {"served": "EINTR EIO ESRCH"}, ", 255)", later=False, triggers=WATCHED),
    # The counter of an eventfd that was not written to is nothing that a kernel does: whoever sleeps sleeps on, unless
    # something else, a timer say, wakes it.
    Call(
        "write",
        "spoken_to",
        {"served": "EINTR", "late|served": "EAGAIN EBADF EFAULT EFBIG EINVAL EIO ENOSPC EPERM EPIPE"},
        threads="speaker",
        later=False,
    ),
    Call("mmap", "large", MEMORY, every="ENOMEM", fresh=True),
    Call("mmap", "long", MEMORY, later=False, fresh=True),
    Call("brk", "many_pieces", {"served|ended": "ENOMEM"}, every="ENOMEM", fresh=True),
    # -- start
    Call("socket", "start", {"refused": "EACCES EAFNOSUPPORT EINVAL EMFILE ENFILE ENOBUFS ENOMEM EPROTONOSUPPORT"}),
    # EADDRINUSE: the port is left to the system here, so that another one is tried.
    Call(
        "bind",
        "start",
        {
            "refused": "EACCES EADDRNOTAVAIL EBADF EFAULT EINVAL ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTSOCK",
            "served": "EADDRINUSE",
        },
    ),
    Call("listen", "start", {"refused": "EBADF EINVAL ENOTSOCK EOPNOTSUPP", "served": "EADDRINUSE"}),
    Call("setsockopt", "start", {"refused": "EBADF EFAULT EINVAL ENOMEM ENOPROTOOPT ENOTSOCK"}, later=False),
    Call("getsockname", "start", {"refused": "EBADF EFAULT EINVAL ENOBUFS ENOTSOCK"}),
    Call("epoll_create1", "start", {"refused": "EINVAL EMFILE ENFILE ENOMEM"}, later=False),
    Call("eventfd2", "start", {"refused": "EINVAL EMFILE ENFILE ENODEV ENOMEM"}, later=False),
    Call("timerfd_create", "start", {"refused": "EINVAL EMFILE ENFILE ENODEV ENOMEM EPERM"}, later=False),
    Call(
        "epoll_ctl", "start", {"refused": "EBADF EEXIST EINVAL ELOOP ENOMEM ENOSPC EPERM"}, "EPOLL_CTL_ADD", later=False
    ),
    Call("accept4", "start", {"refused": "ENOSYS", "served": "EBADF EINVAL EPERM"}, later=False),
    Call("clone3", "start", {"refused": "EAGAIN EINVAL ENOMEM EPERM EUSERS", "served": "ENOSYS"}, triggers=WATCHED),
    # Of the thread only that calls start(): where a new one has no memory for its first steps in Python, start() waits
    # for ever, as threading.Thread.start() does.
    Call(
        "mmap", "start", {"served|refused": "ENOMEM EAGAIN EPERM"}, threads="main", triggers=("oneshot",), later=False
    ),
    # A stack for a new thread, which the thread makes that starts the workers.
    Call("mprotect", "start", {"served|refused": "ENOMEM EACCES EINVAL"}, triggers=("oneshot",), later=False),
    # -- the pool as a client
    Call("socket", "connect", {"raised": "EACCES EAFNOSUPPORT EINVAL EMFILE ENFILE ENOBUFS ENOMEM"}, later=False),
    Call(
        "connect",
        "connect",
        {
            "raised": "EACCES EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT EALREADY EBADF ECONNREFUSED EFAULT EHOSTUNREACH "
            "EISCONN ENETUNREACH ENOTSOCK EPERM EPROTOTYPE ETIMEDOUT"
        },
        later=False,
    ),
    Call("ioctl", "connect", {"raised": "EBADF EFAULT EINVAL ENOTTY"}, later=False),
    Call("setsockopt", "connect", {"served": "EBADF EFAULT EINVAL ENOMEM ENOPROTOOPT ENOTSOCK"}, later=False),
    Call("getpeername", "connect", {"served": "EBADF EFAULT EINVAL ENOBUFS ENOTCONN ENOTSOCK"}, later=False),
]
