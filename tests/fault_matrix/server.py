"""The server of the fault matrix: takes one command a line on standard input, answers each with one line of JSON.

    python server.py TRIGGER WORKERS

It serves an echo without framing and, on another port, messages with their length in front; the first byte of such a
message says what is to be done with it (Commands). Who is silent on a third port is soon
closed. run.py makes its system calls fail meanwhile.
"""

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time

from tstpool import LengthPrefixed, TstError, TstHandler, TstPool, TstStat

TRIGGER, WORKERS = sys.argv[1], int(sys.argv[2])
QUICK = 0.3  # seconds, idle_timeout of the third port
logging.disable(logging.CRITICAL)
threading.excepthook = lambda args: broken.append(repr(args.exc_value))

broken = []  # what ended a thread
spoken = queue.SimpleQueue()  # (socket, message) for the thread that sends from outside
kept = queue.SimpleQueue()  # pools for the thread that waits in serve_forever
sockets = {}  # name that a client gave -> TstSocket


def framed(data):
    return len(data).to_bytes(4, "big") + data


class Commands(TstHandler):
    """What a client may ask for; on the port without framing everything is echoed."""

    def on_message(self, sock, data):
        if sock.framing is None:
            sock.send(data)
            return None
        return getattr(self, f"do_{chr(data[0])}")(sock, data)

    def do_e(self, sock, data):  # echo
        return data

    def do_p(self, sock, data, times=4):  # an answer in pieces, which sendmsg sends
        answer = framed(data * times)
        for place in range(0, len(answer), 5000):
            sock.send(answer[place : place + 5000])

    def do_m(self, sock, data):  # in so many that they take more memory than malloc has in stock
        self.do_p(sock, data, 32)

    def do_l(self, sock, data):  # an answer that the kernel does not take at once
        sock.send_message(data * (int(data[1:]) // len(data)))

    def do_n(self, sock, data):  # an answer when there is room for it
        sock.user_data = "asked"
        self.pool.need_send(sock)

    def on_writable(self, sock):  # also called when a long answer or a transfer is through
        if sock.user_data == "asked":
            sock.user_data = None
            sock.send_message(b"writable")

    def do_i(self, sock, data):  # introduces itself
        sockets[data] = sock
        return data

    def do_t(self, sock, data):  # an answer from another thread
        spoken.put((sock, data))

    def do_b(self, sock, data):  # to all that have introduced themselves with the same letters
        known = [other for name, other in list(sockets.items()) if name[1:5] == data[1:5]]
        self.pool.broadcast(framed(data), where=lambda other: other in known)

    def do_h(self, sock, data):  # a handler that blocks
        time.sleep(0.02)
        return data

    def do_s(self, sock, data):  # the original's transfer
        sock.send_data.resize(20000)
        sock.send_data.s[: len(data) + 4] = framed(data)
        sock.send_data.req_len = len(data) + 4
        return TstStat.SEND

    def do_c(self, sock, data):  # an answer, then the end
        sock.send_message(data)
        sock.close()

    def do_f(self, sock, data):  # finishes before its client
        sock.send_message(data)
        sock.send_eof()

    def do_k(self, sock, data):  # stays open then
        sock.user_data = "stays"
        return data

    def on_eof(self, sock):
        return None if sock.user_data == "stays" else TstStat.RUN  # as without this hook

    def on_error(self, sock, exc):
        pass


class Server:
    """The commands of run.py."""

    def __init__(self):
        self.pool = None
        self.fault = None
        self.kept = threading.Event()

    def start(self, _argument):
        handler = Commands()
        pool = handler.pool = TstPool(handler, workers=WORKERS, trigger=TRIGGER, shards=1, max_queued=None)
        try:
            raw = pool.listen("127.0.0.1", 0)
            with_length = pool.listen("127.0.0.1", 0, framing=LengthPrefixed(4, max_message=1 << 24))
            quick = pool.listen("127.0.0.1", 0, idle_timeout=QUICK)
            pool.start()
        except BaseException:
            pool.stop()
            raise
        self.pool, self.fault = pool, None
        sockets.clear()
        broken.clear()
        self.kept.clear()
        kept.put(self)
        self.kept.wait()
        return {"raw": raw, "framed": with_length, "quick": quick}

    def state(self, _argument):
        """What must be as before when a cell is over."""
        return {
            "running": bool(self.pool and self.pool.running),
            "fault": self.fault,
            "broken": broken,
            "open": len(self.pool) if self.pool else 0,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "workers": [t.native_id for t in threading.enumerate() if t.name.startswith("tstpool-")],
            "speaker": next(t.native_id for t in threading.enumerate() if t.name == "speaker"),
        }

    def speak(self, name):
        """A message from a thread that is no worker."""
        spoken.put((sockets[name.encode()], b"spoken"))

    def connect(self, port):
        """The pool is the client, of somebody who introduces himself."""
        self.pool.connect("127.0.0.1", int(port), 5, framing=LengthPrefixed(4))

    def stop(self, _argument):
        return {"stopped": self.pool.stop(3)}


def speak():
    while True:
        sock, data = spoken.get()
        with contextlib.suppress(OSError, TstError, MemoryError):
            sock.send_message(data)


def keep():
    while True:
        server = kept.get()
        server.kept.set()
        try:
            server.pool.serve_forever()
        except OSError as error:
            server.fault = error.errno


def main():
    server = Server()
    for function in (speak, keep):
        threading.Thread(target=function, name=f"{function.__name__}er", daemon=True).start()
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        try:
            answer = getattr(server, command)(argument) or {}
        except (OSError, TstError, RuntimeError, MemoryError) as error:
            answer = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        print(json.dumps(answer), flush=True)


main()
