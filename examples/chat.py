"""A chat room for whoever sends lines: ``nc 127.0.0.1 20002``, telnet, socat. Once there, type /help.

What is typed reaches everybody else's terminal, so nothing of it is trusted: lines have a limit, control characters are
replaced, names are plain ASCII, and what comes from the room itself begins with an asterisk, which no name does. Who
types faster than anybody reads is shut out, and so is who does not read. These limits are for a connection: how many
of them one address may have, or make in a second, is for a firewall to say.

Hooks of one socket never run at the same time, but those of different sockets do where there is no GIL: `lock` guards
what they share. Nobody waits for a peer while holding it, because send() only queues. Who logs waits for the log, with
the lock or without: where that may block, put logging's QueueHandler in between.
"""

import argparse
import contextlib
import logging
import re
import signal
import threading
import time
import unicodedata
from dataclasses import dataclass, field

import tstpool
from tstpool import ConnectionClosed, Delimited, MessageTooLarge, SendQueueFull, TstHandler, TstSocket, TstStat

LINE_MOST = 1000  # bytes
UNSENT_MOST = 256 * 1024  # bytes that may wait for a member who does not read
MEMBERS_MOST = 1000
LINES_AT_ONCE = 50  # what a member may send in a burst ...
LINES_A_SECOND = 10  # ... and in the long run; no more at once for a newcomer, or it would pay to come anew

NAME = re.compile(r"(?!guest)[a-z][a-z0-9_-]{0,19}", re.ASCII | re.IGNORECASE)
NAME_RULE = "a name is a letter, then up to 19 letters, digits, - or _; guest... is for those who have none"

HELP = """\
* /nick NAME      call yourself NAME
* /msg NAME TEXT  tell NAME alone
* /who            who is here
* /quit           leave
* anything else is said to everybody"""


# Blank on the screen, though isprintable() and not isspace().
BLANKS = dict.fromkeys(map(ord, "\u115f\u1160\u2800\u3164\uffa0\U00013441\U00013442\U0001d159"), " ")
MARKS_MOST = 4  # accents and the like on one character


def printable(line: bytes) -> str:
    """The text of a line, fit for any terminal and any log: no control character, escape sequence or bad UTF-8, nor
    blanks in a row or a tower of accents. Still, where a terminal wraps a long line is for its writer to choose."""
    room = 0  # for marks; none behind a space, where some cannot be seen and would make one blank of many
    text = ""
    for char in " ".join(line.decode("utf-8", "replace").translate(BLANKS).split()):
        if unicodedata.category(char).startswith("M"):
            room -= 1
        else:
            room = 0 if char == " " else MARKS_MOST
        text += char if char.isprintable() and room >= 0 else "\N{REPLACEMENT CHARACTER}"
    return text


@dataclass(eq=False)
class Member:
    sock: TstSocket
    name: str
    credit: float = LINES_A_SECOND  # lines; for its own hooks only, as are the next two
    counted: float = field(default_factory=time.monotonic)
    announced: bool = False

    def may_send(self) -> bool:
        """Counts one line. False: too many came too fast."""
        now = time.monotonic()
        self.credit = min(self.credit + (now - self.counted) * LINES_A_SECOND, LINES_AT_ONCE) - 1
        self.counted = now
        return self.credit >= 0

    def tell(self, text: str) -> None:
        """Queues a line for this member, who is disconnected when too much waits already. It raises nothing: that would
        end the connection of whoever typed the line."""
        try:
            if self.sock.send(text.encode() + b"\n") > UNSENT_MOST:
                logging.info("%s does not read", self.name)
                self.sock.close()
        except ConnectionClosed:
            pass  # on_disconnect is on its way
        except SendQueueFull:  # the pool also limits what may wait for all members together
            logging.info("%s does not read, and too much waits for all", self.name)
            self.sock.close(abort=True)


class Room(TstHandler):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.members: dict[str, Member] = {}  # by name in lower case; guarded by `lock`, as are the names themselves
        self.guests = 0  # so far; guarded by `lock`

    # -- hooks

    def on_connect(self, sock: TstSocket) -> TstStat | None:
        with self.lock:
            if len(self.members) >= MEMBERS_MOST:
                sock.send(b"* the room is full\n")
                return TstStat.DISCONNECT
            self.guests += 1
            member = sock.user_data = Member(sock, f"guest{self.guests}")
            self.members[member.name] = member
            logging.info("%s joined from %s", member.name, sock.peer)
            member.tell(f"* you are {member.name}; /help lists what you can do")
        return None

    def on_message(self, sock: TstSocket, data: bytes) -> TstStat | None:
        member: Member = sock.user_data
        line = printable(data)
        with self.lock:
            if not member.may_send():
                member.tell("* too many lines too fast")
                return TstStat.DISCONNECT
            if not member.announced:  # not earlier: to come and go, again and again, must not fill anybody's screen
                member.announced = True
                self.say(f"* {member.name} joined", but=member)
            if line.startswith("/"):
                return self.obey(member, line)
            if line:
                self.say(f"<{member.name}> {line}", but=member)
        return None

    def on_disconnect(self, sock: TstSocket, reason: BaseException | None) -> None:
        member: Member = sock.user_data
        with self.lock:
            del self.members[member.name.lower()]
            logging.info("%s left", member.name)
            if member.announced:
                self.say(f"* {member.name} left")

    def on_error(self, sock: TstSocket, exc: BaseException) -> TstStat | None:
        if not isinstance(exc, MessageTooLarge):
            return super().on_error(sock, exc)
        sock.user_data.tell(f"* a line has at most {LINE_MOST} bytes")
        return TstStat.DISCONNECT

    # -- commands; lock held

    def obey(self, member: Member, line: str) -> TstStat | None:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return TstStat.DISCONNECT
        if command == "/nick":
            self.rename(member, rest)
        elif command == "/msg":
            name, _, text = rest.partition(" ")
            self.whisper(member, name, text)
        elif command == "/who":
            member.tell("* here: " + " ".join(sorted(other.name for other in self.members.values())))
        elif command == "/help":
            member.tell(HELP)
        else:
            member.tell("* no such command; /help lists them")
        return None

    def rename(self, member: Member, name: str) -> None:
        if not NAME.fullmatch(name):
            return member.tell(f"* {NAME_RULE}")
        if self.members.get(name.lower(), member) is not member:
            return member.tell(f"* {name} is taken")
        del self.members[member.name.lower()]
        old, member.name = member.name, name
        self.members[name.lower()] = member
        logging.info("%s is now %s", old, name)
        self.say(f"* {old} is now {name}")

    def whisper(self, member: Member, name: str, text: str) -> None:
        other = self.members.get(name.lower())
        if other is None or not text:
            return member.tell("* nobody is called that" if text else "* /msg NAME TEXT")
        other.tell(f"[{member.name} to you] {text}")
        member.tell(f"[you to {other.name}] {text}")

    def say(self, text: str, but: Member | None = None) -> None:
        """Tells everybody. The pool's broadcast() would leave out who has too much waiting; tell() makes them leave. As
        the lock is held, everybody hears the same in the same order."""
        for member in self.members.values():
            if member is not but:
                member.tell(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A chat room.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=20002)
    parser.add_argument("--workers", type=int, help="threads")
    parser.add_argument("--shards", type=int, help="how many of them poll and run hooks; more than 1 needs no GIL")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does
    pool = tstpool.TstPool(
        Room(),
        framing=Delimited(b"\n", max_message=LINE_MOST),
        workers=options.workers,
        shards=options.shards,
        first_byte_timeout=3600.0,  # who only listens is welcome
        idle_timeout=3600.0,
    )
    host, port = pool.listen(options.host, options.port)
    with contextlib.suppress(KeyboardInterrupt):
        print(f"chat on {host}:{port}; Ctrl-C ends it", flush=True)
        pool.serve_forever()
