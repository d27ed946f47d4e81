"""examples/chat.py, driven by Debian's clients, several at once, and by sockets."""

import contextlib
import importlib.util
import re
import signal
import socket
import subprocess
import sys
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


@pytest.fixture
def chat(monkeypatch):
    """The example as a module, whose limits a test may change."""
    spec = importlib.util.spec_from_file_location("example_chat", ROOT / "examples" / "chat.py")
    chat = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example_chat", chat)  # dataclasses look there
    spec.loader.exec_module(chat)
    return chat


def make_room(chat, make_pool, **options):
    """A room in this process."""
    return make_pool(chat.Room(), framing=Delimited(b"\n", max_message=chat.LINE_MOST), **options)


def allow_any_number_of_lines(chat, monkeypatch):
    for limit in ["LINES_AT_ONCE", "LINES_A_SECOND"]:
        monkeypatch.setattr(chat, limit, 1 << 40)


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


def test_help_lists_the_commands(room):
    with Person(room.addr, "ann") as ann:
        ann.say("/help")
        assert len(ann.lines_up_to("* anything else")) == 5


def test_a_message_reaches_oneself_too_however_the_name_is_written(room):
    with Person(room.addr, "ann") as ann:
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
    with Tool("ncat", room.addr) as ann:
        ann.wait_for("* you are guest")
        ann.type("/nick ann")
        ann.wait_for(" is now ann\n")
        for evil in EVIL:
            with Person(room.addr, "bob") as bob:
                for before in [b"", b"/msg ann ", b"/nick ", b"/nick bo", b"/", b"/msg "]:
                    bob.say(before + evil)
                bob.say("that was all")
                ann.wait_for("<bob> that was all")
            ann.wait_for("* bob left")
        assert "owned" in ann.shown
        assert is_harmless(ann.shown.encode())
        assert is_harmless(room.output)


def test_no_run_of_spaces_moves_the_rest_of_a_line_to_a_row_of_its_own(room):
    """Where it would look like a line from the room."""
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        bob.say("so long" + " " * 66 + "\t\u3000\u00a0* ann left")
        assert ann.wait_for("<bob>") == "<bob> so long * ann left"
        bob.say("/msg  ann  so" + " " * 66 + "long")
        assert ann.wait_for("[bob to you]") == "[bob to you] so long"


def test_blanks_that_count_as_printable_are_spaces(room):
    with Person(room.addr, "ann") as ann:
        for blank in "\u115f\u1160\u2800\u3164\uffa0\U0001d159":
            with Person(room.addr) as other:
                other.say("so long" + blank * 70 + f" {blank}* ann left")
                assert ann.wait_for("<") == f"<{other.name}> so long * ann left"
                other.say(blank * 70)  # nothing is left of it
                other.say(f"one{blank}more")
                assert ann.wait_for("<") == f"<{other.name}> one more"


def test_marks_make_neither_towers_nor_rows_of_blanks(room):
    """Those that cannot be seen would, between spaces, make one wide blank of them."""
    with Person(room.addr, "ann") as ann:
        for mark in "\u0301\u0e34\u20dd\ufe0f\u034f":
            with Person(room.addr) as other:
                other.say("a" + mark * 4 + "b" + mark * 100 + "c")
                assert ann.wait_for("<") == f"<{other.name}> a" + mark * 4 + "b" + mark * 4 + "\ufffd" * 96 + "c"
                other.say(mark + f" {mark}" * 70)
                assert ann.wait_for("<") == f"<{other.name}> \ufffd" + " \ufffd" * 70


def test_marks_that_languages_use_are_left_alone(room):
    texts = {
        "German": "gru\u0308\u00dfe",
        "Vietnamese": "Vie\u0323\u0302t",
        "Hindi": "\u0928\u092e\u0938\u094d\u0924\u0947",
        "Thai": "\u0e17\u0e35\u0e48",
        "emoji": "1\ufe0f\u20e3",
    }
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        for text in texts.values():
            bob.say(text)
            assert ann.wait_for("<bob>") == f"<bob> {text}"


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
    """As soon in a new connection as in an old one: to come again is no way round the limit."""
    with Person(room.addr, "ann") as ann, Person(room.addr, "bob") as bob:
        ann.say("\n".join(f"line {i}" for i in range(200)))
        lines = bob.lines_up_to("* ann left")
        said = [line for line in lines if line.startswith("<ann>")]
        assert said == [f"<ann> line {i}" for i in range(len(said))]
        assert 8 <= len(said) < min(patient(45), 190)  # ten more for each second that the room is held up
        bob.say("/who")
        assert bob.wait_for("* here: ") == "* here: bob"


def test_who_has_been_silent_for_long_may_say_more_at_once(chat, make_pool, monkeypatch):
    addr = make_room(chat, make_pool).addresses[0]
    with Person(addr, "ann") as ann, Person(addr, "bob") as bob:
        monkeypatch.setattr(chat, "LINES_A_SECOND", 1 << 40)
        ann.say("a long time has passed")
        bob.wait_for("<ann> a long time has passed")
        monkeypatch.setattr(chat, "LINES_A_SECOND", 0)
        ann.say("\n".join(f"line {i}" for i in range(1, 100)))
        said = [line for line in bob.lines_up_to("* ann left") if line.startswith("<ann>")]
        assert said == [f"<ann> line {i}" for i in range(1, 50)]


def test_who_comes_and_goes_without_a_word_is_not_mentioned(room):
    with Person(room.addr, "ann") as ann:
        for _ in range(200):
            with Person(room.addr):
                pass
        with Person(room.addr) as bob:
            bob.say("hello")
            heard = ann.lines_up_to("hello")
            assert heard == [f"* {bob.name} joined", f"<{bob.name}> hello"]
        ann.wait_for(f"* {bob.name} left")


@pytest.mark.parametrize("max_queued", [1 << 20, 1 << 17], ids=["limit of the room", "limit of the pool"])
def test_who_does_not_read_has_to_leave(chat, make_pool, monkeypatch, max_queued):
    """Others need not: neither ann, who has as much to read, nor bob, who says it. The pool also takes no more when too
    much waits for all members together."""
    allow_any_number_of_lines(chat, monkeypatch)
    addr = make_room(chat, make_pool, max_queued=max_queued, linger_timeout=0.2).addresses[0]
    with Person(addr) as slow, Person(addr, "ann") as ann, Person(addr, "bob") as bob:
        names = slow.name
        while slow.name in names:
            for _ in range(20):
                bob.say(b"\xff" * 1000)  # U+FFFD is longer than what it stands for
            bob.say("is anybody gone?")
            ann.wait_for("<bob> is anybody gone?")
            ann.say("/who")
            names = ann.wait_for("* here: ")
        assert names == "* here: ann bob"
        with contextlib.suppress(ConnectionResetError):
            slow.wait_for_end()


# ------------------------------------------------------------------------------------------------- threads


def test_everybody_hears_the_same_in_the_same_order(chat, make_pool, monkeypatch):
    """Ten talk at once, on four threads where there is no GIL."""
    n_lines = 40
    allow_any_number_of_lines(chat, monkeypatch)
    addr = make_room(chat, make_pool, shards=4, workers=4).addresses[0]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Person(addr, f"listener{i}")) for i in range(3)]
        talkers = [stack.enter_context(Person(addr, f"talker{i}")) for i in range(10)]

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


def test_a_full_room_says_so(chat, make_pool, monkeypatch):
    monkeypatch.setattr(chat, "MEMBERS_MOST", 2)
    pool = make_room(chat, make_pool)
    with Person(pool.addresses[0]), Person(pool.addresses[0], "bob") as bob:
        with connect(pool) as third:
            assert third.makefile("rb").read() == b"* the room is full\n"
        bob.say("/quit")
        bob.wait_for_end()
        wait_until(lambda: len(pool) == 1)
        with Person(pool.addresses[0], "bob"):
            pass


def test_it_says_where_it_listens_only_if_it_does():
    example = [sys.executable, str(ROOT / "examples" / "chat.py")]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run([*example, "--port", str(port)], capture_output=True, text=True, timeout=patient(60))
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"127.0.0.1:{port}" in done.stderr
    with subprocess.Popen([*example, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r" on 127.0.0.1:(\d+);", process.stdout.readline())[1])
            with Person(("127.0.0.1", port), "ann"):
                pass
        finally:
            process.terminate()
        assert process.wait(patient(20)) == 0
