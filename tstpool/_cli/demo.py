"""``python -m tstpool demo``: a server under real traffic of seven kinds, every byte of it checked.

The server runs here; each kind of client is a process of its own, so that the engine meets real sockets and real
scheduling, and so that a fault in it can not hide in what it checks itself with. At the end the books must balance:
what clients counted, what the handlers saw and what the pool reports are three independent counts of the same thing.

Nothing may hang: clients give up by themselves, what they do not is killed, and should the engine hang with the
interpreter held, ``faulthandler`` prints every thread's stack and ends the process with 1.
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from rich.console import RenderableType
from rich.live import Live

import tstpool
from tstpool import PoolStats, TstPool
from tstpool._cli import show
from tstpool._cli.services import Books, Broadcaster, Echo
from tstpool._cli.wire import BLOCKING_SECONDS, GREETING, Kind, Plan, Tally

CONNECTIONS = {
    Kind.PING_PONG: 20,
    Kind.HEADER_BODY: 6,
    Kind.SLOW_READER: 3,
    Kind.RESET: 4,
    Kind.BROADCAST: 8,
    Kind.BLOCKING: 3,
    Kind.CLIENT: 4,
}
MANY = 500  # round trips: as many are needed to speak of one in a hundred
CLIENTS_GRACE = 25.0  # seconds beyond the talking that clients get to start, to give up and to report
CLOSING_GRACE = 5.0  # seconds for the last connections to be gone once all clients have left
WATCHDOG_GRACE = 60.0  # seconds beyond the talking after which the whole process is ended


class Client:
    """A client process and what it last reported."""

    def __init__(self, plan: Plan) -> None:
        self.tally = Tally(plan.kind)
        self.last_words: list[str] = []  # what it printed beside reports: a traceback, if anything
        package_parent = os.path.dirname(os.path.dirname(os.path.abspath(tstpool.__file__)))
        search_path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tstpool._cli.clients", plan.to_json()],
            stdin=subprocess.PIPE,  # nothing is written to it: it closes when this process ends, however that comes
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=() if plan.listener < 0 else (plan.listener,),
            start_new_session=True,  # Ctrl-C reaches only us: we end the clients
            env={**os.environ, "PYTHONPATH": search_path},
        )
        self.listener = threading.Thread(target=self._listen, name=f"demo-{plan.kind.name.lower()}", daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                try:
                    self.tally = Tally.from_json(line)
                except (ValueError, TypeError):
                    self.last_words.append(line.rstrip())

    @property
    def running(self) -> bool:
        return self.listener.is_alive()

    def close(self) -> None:
        """End the process if it has not ended, and collect it."""
        if self.running:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.listener.join()

    def failures(self) -> list[str]:
        """Say what this client found wrong, one sentence each."""
        failures = list(self.tally.failures)
        if self.last_words or (not self.tally.finished and self.process.returncode != -9):
            words = " / ".join(self.last_words[-3:])
            failures.append(f"the client process ended with {self.process.returncode}: {words}")
        elif not self.tally.finished:
            failures.append("did not finish in time and was ended")
        elif not self.tally.messages:
            failures.append("not one message was served")
        return [f"{self.tally.kind}: {failure}" for failure in failures]


class LogFailures(logging.Handler):
    """Collect what the engine logs as an error: in a demo where no handler raises, there is nothing to log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = f": {record.exc_info[1]!r}" if record.exc_info else ""
        self.failures.append(f"the engine logged {record.getMessage()!r}{cause}")


class Demo:
    """One run: the pool, its clients, and what was found wrong."""

    def __init__(self, seconds: float, workers: int | None, trigger: Literal["level", "oneshot", "edge"]) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self.failures: list[str] = []
        self.clients: list[Client] = []
        self.descriptors = open_descriptors()
        self.log = LogFailures()
        logging.getLogger("tstpool").addHandler(self.log)

        self.pool = TstPool(Echo(), workers=workers, trigger=trigger)
        self.addresses = {kind: self.pool.listen("127.0.0.1", 0) for kind in Kind if kind is not Kind.CLIENT}
        self.books = Books({address: kind for kind, address in self.addresses.items()})
        self.pool.setEventNewConnected(self.books.connected)
        self.pool.setEventDisconnected(self.books.disconnected)
        self.broadcaster = Broadcaster(self.pool, self.books, CONNECTIONS[Kind.BROADCAST], seconds)

    def start(self) -> None:
        """Start the server, a process for each kind of client, and the thread that broadcasts."""
        self.pool.start()
        for kind, (host, port) in self.addresses.items():
            # A pool serves others as long as one worker is free, so the handlers that sleep must leave one.
            connections = min(CONNECTIONS[kind], self.pool.workers - 1 if kind is Kind.BLOCKING else 1000)
            self.clients.append(Client(Plan(kind, host, port, connections, self.seconds)))
        self.start_client_mode()
        self.broadcaster.start()

    def start_client_mode(self) -> None:
        """Have the pool connect to a process that listens, in both ways that there are."""
        connections = CONNECTIONS[Kind.CLIENT]
        with socket.create_server(("127.0.0.1", 0), backlog=connections) as listener:
            host, port = listener.getsockname()
            plan = Plan(Kind.CLIENT, host, port, connections, self.seconds, listener=listener.fileno())
            self.clients.append(Client(plan))
        for number in range(connections):
            if number % 2:
                sock = self.pool.connect(host, port)
            else:
                sock = self.pool.addsocket(socket.create_connection((host, port)))
            sock.send(GREETING)

    def wait(self) -> None:
        """Wait for all clients; those that do not come to an end are named, with the stack of every thread."""
        deadline = self.began + self.seconds + CLIENTS_GRACE
        while any(client.running for client in self.clients):
            if time.monotonic() > deadline:
                faulthandler.dump_traceback(all_threads=True)
                break
            time.sleep(0.05)

    def finish(self) -> PoolStats:
        """End everything in order and hold the three counts against each other."""
        self.end_clients()
        balanced = wait_until(lambda: not len(self.pool) and self.books.balanced, CLOSING_GRACE)
        stats = self.pool.stats()
        for client in self.clients:
            self.failures += client.failures()
        self.check_connections(stats, balanced)
        self.check_latency()
        self.check_broadcast()
        if not self.pool.stop(drain=CLOSING_GRACE):
            self.failures.append(f"the pool did not stop within {CLOSING_GRACE:.0f} s")
        self.failures += self.books.failures + self.log.failures
        self.check_leaks()
        return stats

    def end_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.broadcaster.stop.set()
        if self.broadcaster.is_alive():
            self.broadcaster.join(CLOSING_GRACE)

    def abandon(self) -> None:
        """Leave nothing behind after an interruption or an error; harmless after :meth:`finish`."""
        self.end_clients()
        self.pool.stop(drain=0.5)
        logging.getLogger("tstpool").removeHandler(self.log)

    def check_connections(self, stats: PoolStats, balanced: bool) -> None:
        """Clients, handlers and pool must agree on how many connections there were, and that all have ended."""
        if not balanced:
            self.failures.append(
                f"{CLOSING_GRACE:.0f} s after the last client had left, {len(self.pool)} connections were open"
                f" and {self.books.left} of {self.books.arrived.total()} on_disconnect calls had come"
            )
        for tally in self.tallies:
            if tally.connections != self.books.arrived[tally.kind]:
                self.failures.append(
                    f"{tally.kind}: clients made {tally.connections} connections,"
                    f" on_connect was called for {self.books.arrived[tally.kind]}"
                )
        if stats.accepted + stats.added != stats.closed + stats.connections:
            self.failures.append(f"the pool's count is off: {show.balance(stats, self.books)}")

    def check_latency(self) -> None:
        """Handlers that block must have blocked their own connections, and nobody else's.

        Whoever waits for one of them waits about as long as it sleeps. A lower limit would be nicer to look at, but a
        machine that is busy with other things breaks it too: 160 ms were seen, with nothing wrong. Nor does it take
        more than two late ones to be one in a hundred of few.
        """
        tally = self.tally(Kind.PING_PONG)
        often, slow = ("a hundred", tally.percentile_99) if tally.messages >= MANY else ("two", tally.median)
        if slow is not None and slow >= BLOCKING_SECONDS:
            self.failures.append(
                f"ping-pong: one round trip in {often} took {show.duration(slow)} or more, as if it had waited for"
                f" the handlers that sleep {show.duration(BLOCKING_SECONDS)}"
            )

    def check_broadcast(self) -> None:
        """Each copy that broadcast() says it has queued must have come."""
        tally = self.tally(Kind.BROADCAST)
        if self.broadcaster.failure:
            self.failures.append(self.broadcaster.failure)
        elif tally.finished and tally.messages != self.broadcaster.sent:
            self.failures.append(f"broadcast: {self.broadcaster.sent} copies were sent, {tally.messages} came")

    def check_leaks(self) -> None:
        """The pool has stopped: no descriptor and no thread of it may be left."""
        leaked = {name for number, name in open_descriptors().items() if self.descriptors.get(number) != name}
        if leaked:
            self.failures.append(f"{len(leaked)} descriptors were leaked: {', '.join(sorted(leaked))}")
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("tstpool-")]
        if threads:
            self.failures.append(f"threads were left behind: {', '.join(threads)}")

    def view(self) -> RenderableType:
        """What is on the screen while clients talk."""
        return show.progress(self.tallies, time.monotonic() - self.began, self.seconds)

    @property
    def tallies(self) -> list[Tally]:
        return [client.tally for client in self.clients]

    def tally(self, kind: Kind) -> Tally:
        return next(tally for tally in self.tallies if tally.kind is kind)


def open_descriptors() -> dict[int, str]:
    """Return what each open descriptor of this process is, as the kernel names it."""
    descriptors = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the directory is closed again
            descriptors[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return descriptors


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition and return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def run(options: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 when all was right, 1 when not, 130 when interrupted."""
    console = show.make_console()
    faulthandler.dump_traceback_later(options.seconds + WATCHDOG_GRACE, exit=True)
    demo = Demo(options.seconds, options.workers, options.trigger)
    console.print(show.title(demo.pool, f"{options.seconds:g} s of traffic"), soft_wrap=True)
    try:
        with Live(get_renderable=demo.view, console=console, transient=True):
            demo.start()
            demo.wait()
        stats = demo.finish()
    except KeyboardInterrupt:
        demo.abandon()
        console.print("Interrupted: clients ended, server stopped.")
        return 130
    finally:
        demo.abandon()
        faulthandler.cancel_dump_traceback_later()
    show.report(console, demo.tallies, stats, demo.books, demo.failures)
    return 1 if demo.failures else 0
