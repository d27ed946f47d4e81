"""``python -m tstpool demo``: right when all is right, and precise about each thing that can be wrong.

The faults are planted in a process of their own, by a script that changes one thing and then runs the command: the
clients, which check, are untouched processes and do not know.
"""

import re
import signal

import pytest
from helpers import PATIENCE, patient, run_python, wait_until
from test_cli import Command

KINDS = [
    "ping-pong",
    "header, then body",
    "slow reader",
    "peer that resets",
    "broadcast",
    "blocking handler",
    "client mode",
]

PLANT = """
import os, sys, threading, time
import tstpool.__main__
from tstpool import TstHandler, TstStat
from tstpool._cli import demo, services
from tstpool._cli.services import Service
from tstpool._cli.wire import Kind

{fault}
sys.exit(tstpool.__main__.main(["demo", "--seconds", "0.5"]))
"""


LATE = "  ping-pong: one round trip in "


def run_with(fault, latency=False):
    """Run the demo with a fault planted; return what it complained of, one line each. On a busy machine it may also
    complain of late replies, which is another scene's business: without `latency` that is left out."""
    done = run_python("-c", PLANT.format(fault=fault), check=False, timeout=90)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG:" in done.stdout, done.stdout + done.stderr
    assert "OK: " not in done.stdout
    complaints = done.stdout.partition("WRONG:\n")[2].splitlines()
    return [line for line in complaints if latency or not line.startswith(LATE)]


def run_without(*arguments):
    """Run the demo without a fault. Beside other suites all of a process may be held up for as long as the handlers
    that block sleep, and the demo can't tell that from a fault: then once more."""
    for _ in range(1 if PATIENCE == 1 else 4):
        done = run_python("-m", "tstpool", "demo", "--seconds", "0.5", *arguments, check=False)
        complaints = done.stdout.partition("WRONG:\n")[2].splitlines()
        if not complaints or not all(line.startswith(LATE) for line in complaints):
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_the_demo_serves_every_kind_and_exits_with_0(trigger):
    done = run_without("--trigger", trigger)
    assert done.stderr == ""
    for kind in KINDS:
        row = re.search(rf"^{kind} +([\d,]+) +([\d,]+) +\S+ [kMG]?B .*OK", done.stdout, re.MULTILINE)
        assert row, f"no row of {kind} in:\n{done.stdout}"
        assert "0" not in row.groups()
    assert re.search(r"^accepted (\d+) \+ added 4 = closed \d+ \+ open 0;", done.stdout, re.MULTILINE)
    assert re.match(r"OK: [\d,]+ messages, .*, every byte as it should be\.$", done.stdout.splitlines()[-1])


def test_two_workers_suffice_for_the_demo():
    done = run_without("--workers", "2")
    assert re.search(r"^blocking handler +1 ", done.stdout, re.MULTILINE)


def test_one_wrong_byte_is_found_and_named():
    complaints = run_with(
        """
class FlipsOneByte(TstHandler):
    count = 0
    def on_message(self, sock, data):
        self.count += 1
        if self.count == 100:
            data = data[:-1] + bytes([data[-1] ^ 1])
        sock.send(data)

services.SERVICES[Kind.PING_PONG] = Service(FlipsOneByte())
"""
    )
    assert len(complaints) == 1
    place = re.match(
        r"  ping-pong: connection \d+: reply \d+: byte (\d+) of (\d+) is 0x[0-9a-f]{2} and should be 0x[0-9a-f]{2}$",
        complaints[0],
    )
    assert place, complaints
    assert int(place[1]) == int(place[2]) - 1


def test_a_byte_too_many_is_found():
    complaints = run_with(
        """
class TalksTooMuch(services.LargeReply):
    def on_writable(self, sock):
        stat = super().on_writable(sock)
        if stat != TstStat.SEND:
            sock.send(b"!")
        return stat

services.SERVICES[Kind.SLOW_READER] = Service(TalksTooMuch(), first_request=8)
"""
    )
    assert len(complaints) == 3
    assert all("slow reader: connection" in line and "1 bytes too many" in line for line in complaints)


def test_a_server_that_does_not_answer_is_given_up():
    grace = min(patient(3.0), 8.0)  # clients themselves give up after 10 s
    complaints = run_with(f"services.SERVICES[Kind.CLIENT] = Service(TstHandler()); demo.CLIENTS_GRACE = {grace}")
    assert complaints == ["  client mode: did not finish in time and was ended"]


def test_handlers_that_hold_others_up_are_found():
    complaints = run_with(
        """
class Holds(services.Echo):
    def on_message(self, sock, data):
        time.sleep(0.6)
        sock.send(data)

services.SERVICES[Kind.PING_PONG] = Service(Holds())
""",
        latency=True,
    )
    assert len(complaints) == 1
    assert re.match(
        r"  ping-pong: one round trip in (a hundred|two) took .* or more, as if it had waited for", complaints[0]
    )


def test_a_handler_that_raises_is_reported_with_its_exception():
    complaints = run_with(
        """
class Raises(TstHandler):
    def on_message(self, sock, data):
        raise ZeroDivisionError("planted")

services.SERVICES[Kind.BLOCKING] = Service(Raises())
"""
    )
    text = "\n".join(complaints)
    assert "blocking handler: connection 0: the server closed after 0 of 512 bytes" in text
    assert re.search(r"the engine logged .*ZeroDivisionError\('planted'\)", text)
    assert "blocking handler: a connection ended with ZeroDivisionError('planted')" in text


def test_copies_of_a_broadcast_that_do_not_come_are_counted():
    complaints = run_with(
        """
class Counts(demo.Broadcaster):
    def run(self):
        super().run()
        self.sent += 1

demo.Broadcaster = Counts
"""
    )
    assert len(complaints) == 1
    sent, came = re.match(r"  broadcast: (\d+) copies were sent, (\d+) came", complaints[0]).groups()
    assert int(sent) == int(came) + 1


def test_a_connection_without_an_end_is_found():
    complaints = run_with(
        """
class Forgets(services.Books):
    calls = 0
    def disconnected(self, sock, reason):
        with self.lock:
            self.calls += 1
            if self.calls == 5:
                return
        super().disconnected(sock, reason)

demo.Books = Forgets
demo.CLOSING_GRACE = 0.5
"""
    )
    assert any("on_disconnect calls had come" in line for line in complaints), complaints


def test_a_leaked_descriptor_and_a_thread_left_behind_are_found():
    complaints = run_with(
        """
class Leaks(services.Broadcaster):
    def run(self):
        self.leaked = os.pipe()
        threading.Thread(target=time.sleep, args=(30,), name="tstpool-99", daemon=True).start()
        super().run()

demo.Broadcaster = Leaks
"""
    )
    assert len(complaints) == 2
    assert re.match(r"  1 descriptors were leaked: pipe:\[\d+\]$|  2 descriptors were leaked", complaints[0])
    assert complaints[1] == "  threads were left behind: tstpool-99"


def test_a_hang_ends_with_every_stack_and_1():
    fault = "demo.WATCHDOG_GRACE = 1.5; demo.Demo.finish = lambda demo: threading.Event().wait()"
    done = run_python("-c", PLANT.format(fault=fault), check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    assert "most recent call first" in done.stderr


def children(process):
    """The processes that this one has started."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as listing:
        return listing.read().split()


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_ctrl_c_ends_the_demo_and_its_clients():
    with Command("demo", "--seconds", "30") as command:
        wait_until(lambda: len(children(command.process)) == len(KINDS), 20)
        clients = children(command.process)
        command.signal(signal.SIGINT)
        assert command.result(timeout=10) == 130
        assert command.lines[-1] == "Interrupted: clients ended, server stopped."
        assert "Traceback" not in "\n".join(command.lines)
        wait_until(lambda: not any("tstpool._cli.clients" in command_line(pid) for pid in clients), 5)


def test_clients_and_server_agree_on_messages_and_no_two_are_alike():
    from tstpool._cli.wire import Kind, Plan, Tally, difference, payload

    messages = {
        payload(kind, connection, number, 64) for kind in Kind for connection in range(9) for number in range(9)
    }
    assert len(messages) == len(Kind) * 81
    assert payload(Kind.CLIENT, 1, 2, 640).startswith(payload(Kind.CLIENT, 1, 2, 64))
    assert difference(b"same", b"same") is None
    assert difference(b"\x00same", b"\x00sane") == "byte 3 of 5 is 0x6e and should be 0x6d"
    plan = Plan(Kind.RESET, "127.0.0.1", 1, 2, 3.0)
    assert Plan.from_json(plan.to_json()) == plan
    tally = Tally(Kind.RESET, failures=["one"], median=0.25)
    assert Tally.from_json(tally.to_json()) == tally
    assert str(tally.kind) == f"{tally.kind}" == "peer that resets"


def test_a_client_process_that_dies_is_reported_with_its_last_words():
    complaints = run_with(
        """
import tstpool._cli.wire as wire
to_json = wire.Plan.to_json
wire.Plan.to_json = lambda plan: "no plan" if plan.kind is Kind.RESET else to_json(plan)
"""
    )
    assert len(complaints) == 1
    assert complaints[0].startswith("  peer that resets: the client process ended with 1: ")
    assert "JSONDecodeError" in complaints[0]
