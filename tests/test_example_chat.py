"""examples/chat.py, driven by Debian's clients, several at once, and by sockets."""

import contextlib
import importlib.util
import signal
import threading

import pytest
from example_helpers import Example, Tool
from helpers import ROOT, connect, patient, wait_until

from tstpool import Delimited


class Person:
    """A member of the room over a plain socket."""

    def __init__(self, addr, name=None):
        self.sock = connect(addr)
        self.lines = self.sock.makefile("rb")
        self.name = self.wait_for("* you are guest").split()[3].rstrip(";")
        if name is not None:
            self.say(f"/nick {name}")
            self.wait_for(f"is now {name}")
            self.name = name

    def say(self, text):
        self.sock.sendall((text.encode() if isinstance(text, str) else text) + b"\n")

    def wait_for(self, text):
        """The next line that has this in it."""
        return self.lines_up_to(text)[-1]

    def lines_up_to(self, text):
        """All lines up to one that has this in it."""
        lines = []
        for line in self.lines:
            lines.append(line.decode().removesuffix("\n"))
            if text in lines[-1]:
                return lines
        raise AssertionError(f"{text!r} did not come, but {lines}")

    def wait_for_end(self):
        """Everything up to the end of the connection."""
        return self.lines.read()

    def close(self):
        self.lines.close()
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


@pytest.fixture
def room():
    with Example("chat.py") as room:
        yield room


# ----------------------------------------------------------------------------------------- Debian's clients


@pytest.mark.parametrize("tool", ["ncat", "socat", "telnet"])
def test_three_people_talk(room, tool):
    """Names, what is said to all and to one, who is there, and who leaves."""
    with Tool(tool, room.addr) as ann, Tool(tool, room.addr) as bob, Tool(tool, room.addr) as cyd:
        for name, person in {"ann": ann, "bob": bob, "cyd": cyd}.items():
            person.wait_for("* you are guest")
            person.type(f"/nick {name}")
            person.wait_for(f" is now {name}\n")
        ann.wait_for(" is now cyd\n")
        bob.wait_for(" is now cyd\n")
        ann.type("good morning, all")
        bob.wait_for("<ann> good morning, all\n")
        cyd.wait_for("<ann> good morning, all\n")
        bob.type("/msg cyd between us: grüße")
        cyd.wait_for("[bob to you] between us: grüße\n")
        bob.wait_for("[you to cyd] between us: grüße\n")
        cyd.type("/who")
        cyd.wait_for("* here: ann bob cyd\n")
        cyd.type("/quit")
        ann.wait_for("* cyd left\n")
        bob.type("are you there?")
        ann.wait_for("<bob> are you there?\n")
        assert "between us" not in ann.shown


def test_clients_of_all_kinds_meet(room):
    with Tool("ncat", room.addr) as one, Tool("socat", room.addr) as two, Tool("telnet", room.addr) as three:
        tools = {"one": one, "two": two, "three": three}
        for name, tool in tools.items():
            tool.wait_for("* you are guest")
            tool.type(f"/nick {name}")
            tool.wait_for(f" is now {name}\n")
        for name, tool in tools.items():
            tool.type(f"this is {name}")
            for other in tools.values():
                if other is not tool:
                    other.wait_for(f"<{name}> this is {name}\n")


def test_somebody_who_hangs_up_has_left(room):
    with Tool("ncat", room.addr) as ann:
        ann.wait_for("* you are guest")
        ann.type("/nick ann")
        ann.wait_for(" is now ann\n")
        with Tool("ncat", room.addr) as bob:
            bob.wait_for("* you are guest")
            bob.type("/nick bob")
            ann.wait_for(" is now bob\n")
            bob.process.kill()
        ann.wait_for("* bob left\n")


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "1st",
        "a b",
        "-x",
        "x" * 21,
        "Guest9",
        "guesthouse",
        "\xe5nn",
        "ann\u200b",
        "*",
        "ann\x07",
        "<ann>",
        "ann\x00",
    ],
)
def test_a_name_that_breaks_the_rules_is_refused(room, wrong):
    with Person(room.addr) as ann:
        ann.say(f"/nick {wrong}")
        ann.wait_for("* a name is a letter, then up to 19")
        ann.say("/who")
        assert ann.wait_for("* here: ") == f"* here: {ann.name}"


def test_a_name_has_one_owner_until_it_is_given_up(room):
    with Person(room.addr, "Ann") as ann, Person(room.addr, "bob") as bob:
        for taken in ["Ann", "ann", "ANN"]:
            bob.say(f"/nick {taken}")
            bob.wait_for(f"* {taken} is taken")
        ann.say("/nick ANN")
        bob.wait_for("* Ann is now ANN")
        ann.say("/nick x-1_Y")
        bob.wait_for("* ANN is now x-1_Y")
        bob.say("/nick ann")
        ann.wait_for("* bob is now ann")
        ann.close()
        bob.wait_for("* x-1_Y left")
        bob.say("/nick X-1_y")
        bob.wait_for("* ann is now X-1_y")
        bob.say("/who")
        assert bob.wait_for("* here: ") == "* here: X-1_y"


def test_only_one_of_many_gets_a_name():
    """They ask at the same time, on four threads where there is no GIL."""
    with Example("chat.py", "--shards", "4", "--workers", "4") as room, contextlib.ExitStack() as stack:
        people = [stack.enter_context(Person(room.addr)) for _ in range(12)]
        for person in people:
            person.say("/nick ann\n/who")
        refused = ["* ann is taken" in person.lines_up_to("* here: ") for person in people]
        assert sorted(refused) == [False] + [True] * 11
        people[0].say("/who")
        assert people[0].wait_for("* here: ").split().count("ann") == 1


# ------------------------------------------------------------------------------------------------ commands


def test_wrong_commands_are_answered(room):
    with Person(room.addr, "ann") as ann:
        for text in ["/dance", "/", "/NICK x", "//"]:
            ann.say(text)
            ann.wait_for("* no such command; /help lists them")
        for text in ["/msg", "/msg bob", "/msg bob  "]:
            ann.say(text)
            ann.wait_for("* /msg NAME TEXT")
        ann.say("/msg bob hello")
        ann.wait_for("* nobody is called that")
        ann.say("/help")
        assert len(ann.lines_up_to("* anything else")) == 5
        ann.say("/msg ANN to myself")
        ann.wait_for("[ann to you] to myself")


def test_empty_lines_are_nothing(room):
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        for text in [b"", b"\r", b"  \t ", b"something\r"]:
            ann.say(text)
        assert bob.lines_up_to("<ann>")[-1] == "<ann> something"


# ---------------------------------------------------------------------------------------------- bad people

EVIL = [
    b"\x1b[2J\x1b]0;owned\x07",  # clears a terminal, names its window
    b"\x9b31m \xc2\x9b31m",  # the same introducer in one byte, and as a control character in UTF-8
    b"\x00\x01\x08\x0b\x0c\x7f\x85",
    b"a\rb",  # would overwrite what stands before it
    "\u202etxt.exe\u2028\u2029\u200b\ufeff\U000e0001".encode(),  # turns text round, breaks lines, hides
    b"\xff\xfe\xc3(\xed\xa0\x80",
]


def is_harmless(text):
    return all(char.isprintable() or char == "\n" for char in text.decode())


def test_no_control_character_reaches_a_terminal_or_the_log(room):
    with Tool("ncat", room.addr) as ann, Person(room.addr, "bob") as bob:
        ann.wait_for("* you are guest")
        ann.type("/nick ann")
        ann.wait_for(" is now ann\n")
        for evil in EVIL:
            for text in [evil, b"/msg ann " + evil, b"/nick " + evil, b"/nick bo" + evil, b"/" + evil, b"/msg " + evil]:
                bob.say(text)
        bob.say("/who")
        bob.wait_for("* here: ")
        bob.say("that was all")
        ann.wait_for("<bob> that was all")
        assert "owned" in ann.shown
        assert is_harmless(ann.shown.encode())
        assert is_harmless(room.output)


def test_a_line_has_a_limit(room):
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        ann.say("x" * 1000)
        assert len(bob.wait_for("<ann> ")) == len("<ann> ") + 1000
        ann.say("x" * 1001)
        ann.wait_for("* a line has at most 1000 bytes")
        assert ann.wait_for_end() == b""
        bob.wait_for("* ann left")
        with Person(room.addr, "cyd") as cyd:
            cyd.sock.sendall(b"no end of it" * 100)
            bob.wait_for("* cyd left")


def test_who_types_too_fast_has_to_leave(room):
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        ann.say("\n".join(f"line {i}" for i in range(200)))
        lines = bob.lines_up_to("* ann left")
        said = [line for line in lines if line.startswith("<ann>")]
        assert said == [f"<ann> line {i}" for i in range(len(said))]
        assert 45 <= len(said) < 200
        bob.say("/who")
        assert bob.wait_for("* here: ") == "* here: bob"


def test_who_does_not_read_has_to_leave(room):
    """Others are not held up, and are not told to leave for having much to read."""
    with Person(room.addr, "ann") as ann, Person(room.addr) as slow:
        slow.say("/nick slow")
        ann.wait_for("is now slow")
        reading = threading.Thread(target=ann.lines_up_to, args=("* slow left",))
        reading.start()
        for _ in range(200):  # each newcomer may say so much at once, and U+FFFD is longer than what it stands for
            with Person(room.addr) as talker:
                for _ in range(20):
                    talker.say(b"/msg slow " + b"\xff" * 980)
                    talker.say(b"/msg ann " + b"\xff" * 980)
                talker.say("/who")
                talker.wait_for("* here: ")
            if b"slow does not read" in room.output:
                break
        assert b"slow does not read" in room.output
        slow.wait_for_end()
        reading.join(patient(10))
        ann.say("/who")
        assert "slow" not in ann.wait_for("* here: ")
        assert b"ann does not read" not in room.output


# ------------------------------------------------------------------------------------------------- threads


def test_everybody_hears_the_same_in_the_same_order():
    """Ten talk at once, on four threads where there is no GIL."""
    n_lines = 40
    with Example("chat.py", "--shards", "4", "--workers", "4") as room, contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Person(room.addr, f"listener{i}")) for i in range(3)]
        talkers = [stack.enter_context(Person(room.addr, f"talker{i}")) for i in range(10)]

        def talk(person):
            for n in range(n_lines):
                person.say(f"line {n}")

        threads = [threading.Thread(target=talk, args=(person,)) for person in talkers]
        for thread in threads:
            thread.start()
        heard = []
        for listener in listeners:
            said = []
            while len(said) < n_lines * len(talkers):
                said.append(listener.wait_for("<talker"))
            heard.append(said)
        for thread in threads:
            thread.join()
        assert heard[0] == heard[1] == heard[2]
        for i in range(len(talkers)):
            mine = [line for line in heard[0] if line.startswith(f"<talker{i}>")]
            assert mine == [f"<talker{i}> line {n}" for n in range(n_lines)]


# ---------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("end_by", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_people_in_the_room(end_by):
    with contextlib.ExitStack() as stack:
        with Example("chat.py", end_by=end_by) as room:
            people = [stack.enter_context(Person(room.addr)) for _ in range(5)]
        for person in people:
            person.wait_for_end()


def test_a_full_room_says_so(make_pool, monkeypatch):
    spec = importlib.util.spec_from_file_location("example_chat", ROOT / "examples" / "chat.py")
    chat = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "example_chat", chat)  # dataclasses look there
    spec.loader.exec_module(chat)
    monkeypatch.setattr(chat, "MEMBERS_MOST", 2)
    pool = make_pool(chat.Room(), framing=Delimited(b"\n", max_message=chat.LINE_MOST))
    with Person(pool.addresses[0]), Person(pool.addresses[0], "bob") as bob:
        with connect(pool) as third:
            assert third.makefile("rb").read() == b"* the room is full\n"
        bob.say("/quit")
        bob.wait_for_end()
        wait_until(lambda: len(pool) == 1)
        with Person(pool.addresses[0], "bob"):
            pass
