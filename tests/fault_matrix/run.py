"""Makes each system call of the engine fail with each errno that it can have, and looks what becomes of it.

    python tests/fault_matrix/run.py [--jobs N] [--output FILE] [CALL ...]        needs strace, and leave to trace

A cell is one call, one errno, one trigger, and a time: "early" (the first call in what one client does), "later" (in
the midst of clients of all kinds) or "every" (each third call, where that is harmless). strace makes the call fail in a
server process (server.py) that is running; cells.py has the calls and what is expected; clients.py the clients. A cell
counts only if strace's log says INJECTED. After each: other connections, a newcomer, descriptors, threads and CPU time
are looked at. The table goes to build/fault-matrix.md. Exits with 1 when an outcome is not the expected one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import clients  # noqa: E402
from cells import CALLS, Call  # noqa: E402
from helpers import patient, wait_until  # noqa: E402

WORKERS = {"level": 2, "oneshot": 8, "edge": 1}
ALL_FAIL = 3  # every third call, in "every"
LATER = (5, 3, 2)  # which call of a thread fails in "later"; the next where a scene has not so many
# So that malloc asks the kernel for nearly everything, from every thread in the same way, and gives it back at once.
ASKING_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0",
                 "MALLOC_TRIM_THRESHOLD_": "4096"}  # fmt: skip
ENOUGH = 5  # cells of a group that are not as expected
WINDOW = 0.02  # seconds in which a quiet server must use no CPU


class Broken(Exception):
    """The server is of no more use: crashed, hangs, or left something behind."""


class Server:
    """A process of server.py and its commands."""

    def __init__(self, trigger: str):
        self.trigger = trigger
        command = [sys.executable, str(HERE / "server.py"), trigger, str(WORKERS[trigger])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
               "PYTHONFAULTHANDLER": "1", **ASKING_MALLOC}  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=env)
        self.lock = threading.Lock()
        self.bystanders: list[clients.Client] = []

    def command(self, text: str, timeout: float = 20) -> dict:
        with self.lock:
            try:
                self.process.stdin.write(text + "\n")
                self.process.stdin.flush()
                if not select.select([self.process.stdout], [], [], patient(timeout))[0]:
                    self.process.send_signal(signal.SIGABRT)  # faulthandler shows where
                    self.process.wait()
                    raise Broken(f"{text!r} hangs\n{self.said()}")
                return json.loads(self.process.stdout.readline())
            except (OSError, json.JSONDecodeError):
                raise Broken(f"the server died ({self.process.wait(5)})\n{self.said()}") from None

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def start(self) -> dict:
        """Starts the pool; its answer is an error or has the addresses. Then bystanders connect."""
        answer = self.command("start")
        if "error" not in answer:
            self.raw, self.framed, self.quick = answer["raw"], answer["framed"], answer["quick"]
            self.bystanders = [clients.Client(self.raw), clients.Client(self.framed)]
            self.check_bystanders()
        return answer

    def stop(self) -> None:
        for client in self.bystanders:
            client.sock.close()
        self.bystanders = []
        answer = self.command("stop")
        if answer != {"stopped": True}:
            raise Broken(f"stop(): {answer}")

    def state(self) -> dict:
        return self.command("state")

    def check_bystanders(self) -> None:
        try:
            self.bystanders[0].talk(b"bystander")
            self.bystanders[1].talk(clients.framed(b"e bystander"))
        except (clients.Ended, clients.Hangs) as error:
            raise Broken(f"another connection was hurt: {error!r}") from None

    def cpu(self) -> float:
        """Seconds of CPU time that all threads have used, to the nanosecond."""
        total = 0.0
        for schedstat in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            total += int(schedstat.read_text().split()[0]) / 1e9
        return total

    def spins(self) -> bool:
        """A quiet server uses CPU time; looked at once more for longer before it is said."""
        for window in (WINDOW, 0.3):
            before = self.cpu()
            time.sleep(window)
            if self.cpu() - before < window / 5:
                return False
        return True

    def end(self) -> None:
        for client in self.bystanders:
            client.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()


class Fault:
    """Makes calls of some threads fail while the `with` block runs; `hits` are the lines of strace's log that did."""

    def __init__(self, call: Call, name: str, when: str, threads: list[int], follow: bool):
        self.call, self.name, self.when, self.threads, self.follow = call, name, when, threads, follow
        self.hits: list[str] = []

    def __enter__(self):
        self.log = tempfile.NamedTemporaryFile("r")
        tids = ",".join(map(str, self.threads))
        command = ["strace", "-o", self.log.name, "-y", "-e", f"trace={self.call.name}", "-e", "signal=none",
                   "-e", f"inject={self.call.name}:{self.result()}:when={self.when}",
                   *(["-f"] if self.follow else []), "-p", tids]  # fmt: skip
        self.strace = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in self.threads:
            line = self.strace.stderr.readline()
            if "attached" not in line:
                self.strace.kill()
                self.strace.communicate()
                self.log.close()
                raise Broken(f"strace: {line}")
        self.rest()  # the attachment itself interrupts a wait: that is to be over
        return self

    def rest(self) -> None:
        """Waits until all threads sleep: strace is about none of them then."""
        for _ in range(0 if self.follow else 2):
            time.sleep(0.002)
            wait_until(self.asleep, message="the threads do not come to rest")

    def result(self) -> str:
        """What the call returns. brk says that there is no memory by returning where the break is, or 0 for all that
        glibc cares; a negative number would be taken for a very high break."""
        return "retval=0" if self.call.name == "brk" else f"error={self.name}"

    def asleep(self) -> bool:
        """No thread runs or is stopped by strace."""
        for tid in self.threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended at once
                if Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
                    return False
        return True

    def __exit__(self, *exc_info):
        try:
            self.rest()  # who is let go in the middle of a call that is to fail gets ENOSYS
        finally:
            self.strace.send_signal(signal.SIGINT)
            self.strace.communicate(timeout=30)
        with self.log:
            self.hits = [line for line in self.log if "(INJECTED)" in line]


@dataclass
class Cell:
    call: Call
    name: str
    trigger: str
    mode: str
    expected: str
    outcome: str = ""
    details: str = ""

    @property
    def right(self) -> bool:
        """In "later" the call may be that of a connection whose client has got everything."""
        return self.outcome in self.expected.split("|") or (
            self.mode == "later" and self.expected == "ended" and self.outcome == "served"
        )


def cells_of(call: Call, trigger: str):
    """The cells of a call under one trigger, as cells.py has them."""
    changed = {name for names in call.edge.values() for name in names.split()} if trigger == "edge" else set()
    groups = [(call.expected, False)] + ([(call.edge, True)] if trigger == "edge" else [])
    for group, is_change in groups:
        for outcome, names in group.items():
            for name in names.split():
                if not is_change and name in changed:
                    continue
                yield Cell(call, name, trigger, "early", outcome)
                if call.later and not is_change:
                    yield Cell(call, name, trigger, "later", outcome)
                if name in call.every.split() and not is_change:
                    yield Cell(call, name, trigger, "every", outcome)


# ------------------------------------------------------------------------------------------- one client, or all kinds


def finish(generator) -> str:
    """Runs the rest of a client of clients.py; the outcome in a word."""
    try:
        next(generator)
    except StopIteration as end:
        return end.value or "served"
    except clients.Ended:
        return "ended"
    except ConnectionError:  # while connecting: the listener is gone
        return "ended"
    except clients.Hangs as error:
        return f"hangs: {generator.__name__}, {error}"
    except clients.Wrong as error:
        return f"wrong: {generator.__name__} got {error}"
    raise AssertionError("a client yields once")


def crowd(server: Server) -> list[str]:
    """Clients of all kinds at the same time."""
    outcomes: list[str] = []

    def one(kind):
        generator = kind(server)
        try:
            next(generator)
        except (clients.Ended, ConnectionError):
            outcomes.append("ended")
        except (clients.Hangs, clients.Wrong, OSError) as error:
            outcomes.append(f"wrong: {error!r}")
        else:
            outcomes.append(finish(generator))

    threads = [threading.Thread(target=one, args=(kind,)) for kind in clients.KINDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def summed_up(outcomes: list[str], failures: int) -> str:
    """One word for a crowd of which `failures` calls failed."""
    bad = [outcome for outcome in outcomes if outcome not in ("served", "late", "ended")]
    if bad:
        return bad[0]
    if outcomes.count("ended") > failures:
        return f"{outcomes.count('ended')} ended, but {failures} calls failed"
    if "ended" in outcomes:
        return "ended"
    return "late" if "late" in outcomes else "served"


# ------------------------------------------------------------------------------------------------------- kinds of cells


def traced(server: Server, call: Call) -> tuple[list[int], bool]:
    if call.kind == "start":
        return [server.process.pid], call.threads != "main"
    if call.kind == "connect":
        return [server.process.pid], False
    state = server.state()
    return ([state["speaker"]] if call.threads == "speaker" else state["workers"]), False


def play_running(server: Server, cell: Cell, when: str) -> None:
    """A cell in a pool that runs: sets its outcome, and raises Broken when the pool is not as it was."""
    call = cell.call
    before = server.state()
    generator = getattr(clients, call.kind)(server)
    if cell.mode == "early":
        next(generator)
    fault = Fault(call, cell.name, when, *traced(server, call))
    with fault:
        outcomes = [finish(generator)] if cell.mode == "early" else crowd(server)
    generator.close()
    hits = [line for line in fault.hits if call.argument in line]
    outcome = summed_up(outcomes, len(fault.hits))
    if cell.expected == "stopped" and hits:
        outcome = stopped(server, cell)
    if not hits:
        outcome = "not reached"
    cell.outcome = outcome
    if server.process.poll() is not None:
        raise Broken(f"crashed\n{server.said()}")
    if cell.outcome != "stopped":
        settle(server, before, len(fault.hits) if call.leaks else 0)


def stopped(server: Server, cell: Cell) -> str:
    """The pool has ended by itself, with the error; it starts again."""
    wait_until(lambda: not server.state()["running"], message="the pool is still there")
    fault = wait_until(lambda: server.state()["fault"], message="serve_forever raises nothing")
    server.stop()
    before = server.state()
    if fault != getattr(errno, cell.name):
        return f"raised errno {fault}"
    if before["workers"]:
        return f"threads are left: {before}"
    server.start()
    return "stopped"


def settle(server: Server, before: dict, leaks: int) -> None:
    """Waits until nothing is left of the clients; bystanders and a newcomer are served, and then all is quiet."""

    def same():
        now = server.state()
        counts = ("open", "threads", "descriptors")  # fewer: somebody of the cell before had not quite gone
        return all(now[key] == before[key] for key in ("running", "fault", "broken")) and all(
            now[key] <= before[key] + (leaks if key == "descriptors" else 0) for key in counts
        )

    try:
        wait_until(same, message=lambda: f"\n  was: {before}\n   is: {server.state()}")
    except AssertionError as error:
        raise Broken(f"something stayed behind {error}") from None
    server.check_bystanders()
    newcomer = clients.newcomer(server)
    next(newcomer)
    if (outcome := finish(newcomer)) != "served":
        raise Broken(f"a newcomer afterwards: {outcome}")
    if server.spins():
        raise Broken("it spins")


def play_start(server: Server, cell: Cell, when: str) -> None:
    """A cell in which listen() or start() fails."""
    server.stop()
    before = server.state()
    with Fault(cell.call, cell.name, when, *traced(server, cell.call)) as fault:
        answer = server.command("start")
    hits = [line for line in fault.hits if cell.call.argument in line]
    if "error" in answer:
        given = answer["errno"] in (getattr(errno, cell.name), None) or cell.call.name in ("mmap", "mprotect", "brk")
        cell.outcome = "refused" if given else f"raised {answer}"
    else:
        server.raw, server.framed, server.quick = answer["raw"], answer["framed"], answer["quick"]
        newcomer = clients.newcomer(server)
        next(newcomer)
        cell.outcome = finish(newcomer)
        server.command("stop")
    if not hits:
        cell.outcome = "not reached"
    after = server.state()
    if any(after[key] != before[key] for key in ("descriptors", "threads", "broken")):
        raise Broken(f"something stayed behind\n  was: {before}\n   is: {after}")
    if "error" in server.start():
        raise Broken("it does not start any more")
    settle(server, server.state(), 0)


def play_connect(server: Server, cell: Cell, when: str) -> None:
    """A cell in which pool.connect() fails."""
    before = server.state()
    port = server.raw[1]
    with Fault(cell.call, cell.name, when, *traced(server, cell.call)) as fault:
        answer = server.command(f"connect {port}")
    hits = [line for line in fault.hits if cell.call.argument in line]
    if "error" in answer:
        cell.outcome = "raised" if answer["errno"] == getattr(errno, cell.name) else f"raised {answer}"
    else:
        cell.outcome = "served"
    if not hits:
        cell.outcome = "not reached"
    if "error" not in answer:  # both of its ends are the pool's: gone with it
        server.stop()
        server.start()
    settle(server, before if "error" in answer else server.state(), 0)


PLAY = {"start": play_start, "connect": play_connect}


def play(server: Server, cell: Cell) -> None:
    """Plays a cell, at another call when the scene did not get to the one that was to fail."""
    call = cell.call
    if cell.mode == "early":
        tries = ["1", "1", "1"]  # who is awake at the moment is not for us to say
    elif cell.mode == "every":
        tries = ["1+"] if call.each else [f"2+{ALL_FAIL}", "1+2"]
    elif call.kind == "start":
        tries = ["2"]
    else:
        tries = [*map(str, LATER), "1"]
    for when in tries:
        PLAY.get(call.kind, play_running)(server, cell, when)
        if cell.outcome != "not reached":
            return


def play_group(call: Call, trigger: str) -> list[Cell]:
    """All cells of a call under a trigger, in one server as long as it holds. What is not as expected is told at once;
    when it is too much the rest is not tried, as each such cell may take its whole deadline."""
    cells = list(cells_of(call, trigger))
    server = None
    wrong = 0
    for cell in cells:
        if wrong == ENOUGH:
            cell.outcome = "not tried"
            continue
        try:
            if server is None:
                server = Server(trigger)
                server.start()
            play(server, cell)
        except (Broken, AssertionError, clients.Ended, clients.Hangs, OSError) as error:
            cell.details, cell.outcome = f"{error}", "broken" if cell.right or not cell.outcome else cell.outcome
        if server is not None and (cell.details or call.fresh):
            server.end()
            server = None
        if not cell.right:
            wrong += 1
            about = f"{call.title}, {cell.name}, {trigger}, {cell.mode}"
            print(f"{about}: {cell.outcome}, not {cell.expected}\n{cell.details}".rstrip(), flush=True)
    if server is not None:
        server.end()
    return cells


# --------------------------------------------------------------------------------------------------------- the table


def outcomes_of(cells: list[Cell]) -> str:
    """ "served", or "served; edge: late"."""
    by_outcome: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        by_outcome[cell.outcome if cell.right else f"**{cell.outcome}**"].append(cell.trigger)
    if len(by_outcome) < 2:
        return "".join(by_outcome)
    return "; ".join(f"{', '.join(triggers)}: {outcome}" for outcome, triggers in by_outcome.items())


def table(cells: list[Cell]) -> str:
    rows: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        rows[cell.call.title, cell.name].append(cell)
    lines = ["| call | errno | early | later | every |", "|---|---|---|---|---|"]
    for (title, name), group in rows.items():
        modes = [outcomes_of([cell for cell in group if cell.mode == mode]) for mode in ("early", "later", "every")]
        lines.append(f"| {title} | {name} | {' | '.join(modes)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calls", nargs="*", help="only these system calls")
    parser.add_argument("--jobs", type=int, default=3, help="servers at the same time")
    parser.add_argument("--output", default=str(ROOT / "build" / "fault-matrix.md"))
    options = parser.parse_args()
    begin = time.monotonic()
    calls = [call for call in CALLS if not options.calls or call.name in options.calls]
    groups = [(call, trigger) for call in calls for trigger in call.triggers]
    with ThreadPoolExecutor(options.jobs) as pool:
        cells = [cell for group in pool.map(lambda group: play_group(*group), groups) for cell in group]
    text = table(cells)
    print(text)
    wrong = [cell for cell in cells if not cell.right]
    missed = sum(cell.outcome == "not reached" for cell in cells)
    seconds = time.monotonic() - begin
    last = f"{len(cells)} cells in {seconds:.0f} s, {len(wrong)} not as expected, {missed} of them not reached"
    print(f"\n{last}")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(f"# The fault matrix\n\n{text}\n\n{last}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
