"""The benchmarks' own tools: a load generator that believes anything, or a C peer that cheats, would prove nothing."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import PATIENCE, SANITIZER, patient

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "benchmarks" / "c"
# A sanitizer that is preloaded for tstpool has no business in these programs: it would change their exit code.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not SOURCES.is_dir(), reason="needs a C compiler and benchmarks/"
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All C programs, compiled as strictly as the compiler can."""
    where = tmp_path_factory.mktemp("bench")
    for source in SOURCES.glob("*.c"):
        command = ["cc", "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread"]
        command += ["-o", str(where / source.stem), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(60))
        assert done.returncode == 0, done.stderr
    return {path.name: path for path in where.iterdir()}


@contextmanager
def c_echo(program: Path, *arguments: str) -> Iterator[tuple[int, int]]:
    """Gives port and process id."""
    with subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


@contextmanager
def python_echo(change: Callable[[bytes, int], bytes | None]) -> Iterator[int]:
    """An echo server for one connection that passes each chunk through `change(chunk, offset)`; None: hang up."""

    def serve() -> None:
        offset = 0
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            try:
                while data := connection.recv(65536):
                    reply = change(data, offset)
                    if reply is None:
                        return
                    offset += len(data)
                    connection.sendall(reply)
            except (ConnectionError, TimeoutError):
                return  # the generator has seen enough and left

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve, name="python-echo")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def python_loop(rest: float = 0.0, neglected: int = -1) -> Iterator[int]:
    """An echo server for many connections. Each turn of its loop accepts one of them, and then rests for so many
    seconds. Connection number `neglected` gets nothing but its first reply until nobody else has said anything for half
    a second."""

    def serve() -> None:
        served: dict[socket.socket, int] = {}  # in the order of their numbers
        late: list[tuple[socket.socket, bytes]] = []
        end = time.monotonic() + 30
        with selectors.DefaultSelector() as ready, ExitStack() as clients, suppress(ConnectionError):
            ready.register(listener, selectors.EVENT_READ)
            while time.monotonic() < end:
                events = ready.select(0.5)
                while late and not events:
                    client, data = late.pop()
                    client.sendall(data)
                for key, _ in events:
                    if key.fileobj is listener:
                        client = clients.enter_context(listener.accept()[0])
                        ready.register(client, selectors.EVENT_READ, len(served))
                        served[client] = 0
                        time.sleep(rest)
                        continue
                    client = key.fileobj
                    data = client.recv(65536)
                    if not data:
                        return  # the generator has seen enough and left
                    if key.data == neglected and served[client]:
                        late.append((client, data))
                    else:
                        client.sendall(data)
                    served[client] += 1

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=serve, name="python-loop")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(40)
            assert not thread.is_alive()


@contextmanager
def python_broadcast(change: Callable[[bytes, int], bytes]) -> Iterator[tuple[int, int]]:
    """Sends to each connection what `change(message, connection)` makes of what is written to it. Gives its port and
    the descriptor to write to."""

    def serve() -> None:
        with listener, ExitStack() as clients:
            members: list[socket.socket] = []
            while len(members) < 3:
                members.append(clients.enter_context(listener.accept()[0]))
                members[-1].sendall(members[-1].recv(1))
            with suppress(ConnectionError):  # the generator has seen enough and left
                while message := os.read(orders, 4096):
                    for number, member in enumerate(members):
                        member.sendall(change(message, number))

    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    orders, control = os.pipe()
    thread = threading.Thread(target=serve, name="python-broadcast")
    thread.start()
    try:
        yield listener.getsockname()[1], control
    finally:
        os.close(control)
        thread.join(30)
        assert not thread.is_alive()
        os.close(orders)


def run_json(command: list[str], **options: Any) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, **options)
    return done.returncode, json.loads(done.stdout)


def generate(programs: dict[str, Path], port: int, *arguments: str, by: str = "loadgen") -> tuple[int, dict[str, Any]]:
    return run_json([str(programs[by]), "-p", str(port), "-t", "0.3", "-w", "0.1", *arguments])


def drive(port: int, pid: int, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.drivers", *arguments, "--port", str(port), "--pid", str(pid)]
    return run_json(command, cwd=REPOSITORY)


TRIES = 1 if PATIENCE == 1 else 8  # beside other suites a server or a generator may be held up while it is measured


def in_flight(result: dict[str, Any]) -> float:
    """Little's law: connections = rate x mean time. It ties the two ways of measuring together."""
    return result["messages_per_s"] * result["latency_us"]["mean"] / 1e6


def undisturbed(number: int, measure: Callable[[], tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]]:
    """What is measured when nobody is held up at an end of so short a time: that breaks the law. Else the last try."""
    for _ in range(TRIES):
        code, result = measure()
        if code or in_flight(result) == pytest.approx(number, rel=0.1):
            break
    return code, result


@pytest.mark.parametrize("server", [(), ("--oneshot",)], ids=["level", "oneshot"])
@pytest.mark.parametrize(
    "load",
    [
        "-c 1 -s 1",
        "-c 50 -s 64",
        "-c 50 -s 64 -d 128",
        "-c 20 -s 100 -d 7 --framing length4",
        # More in flight than the kernel's buffers hold: the C loop must keep the rest of a reply and use EPOLLOUT.
        "-c 4 -s 1048576 -d 16",
        "-c 1 -s 64 --spin",
    ],
)
def test_every_byte_of_the_c_loop_is_verified(programs: dict[str, Path], server: tuple[str, ...], load: str) -> None:
    with c_echo(programs["epoll_echo"], *server) as (port, _):
        code, result = generate(programs, port, *load.split())
    assert (code, result["ok"]) == (0, True)
    header = 4 if "length4" in load else 0
    # Whole messages were counted, and all bytes of them (a last one may have come in part).
    assert result["messages"] > 0
    whole = result["messages"] * (result["size"] + header)
    assert abs(result["bytes_verified"] - whole) <= result["connections"] * (result["size"] + header)


def test_generator_stops_after_so_many_messages(programs: dict[str, Path]) -> None:
    with c_echo(programs["epoll_echo"]) as (port, _):
        code, result = generate(programs, port, "-c", "10", "-n", "5000", "-t", "60")
    assert (code, result["ok"]) == (0, True)
    assert 5000 <= result["messages"] < 5000 + 256 * 10  # those that came in the same turn count too


def test_figures_are_consistent(programs: dict[str, Path]) -> None:
    with c_echo(programs["epoll_echo"]) as (port, pid):
        _, result = undisturbed(10, lambda: generate(programs, port, "-c", "10", "--pid", str(pid)))
    assert result["messages_per_s"] == pytest.approx(result["messages"] / result["seconds"], rel=1e-3)
    latency = result["latency_us"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    assert in_flight(result) == pytest.approx(10, rel=0.1)
    server = result["server"]
    assert 0 < server["busy"] <= 1.05
    assert server["cpu_us_per_message"] == pytest.approx(server["cpu_s"] * 1e6 / result["messages"], rel=1e-2)


def test_clock_begins_when_all_connections_are_served(programs: dict[str, Path]) -> None:
    def measure() -> tuple[int, dict[str, Any]]:
        with python_loop(rest=0.005) as port:  # it takes a second to accept them all
            return generate(programs, port, "-c", "200")

    code, result = undisturbed(200, measure)
    assert (code, result["ok"]) == (0, True)
    assert in_flight(result) == pytest.approx(200, rel=0.1)


def test_neglected_connection_shows(programs: dict[str, Path]) -> None:
    """In the longest latency, which is longer than the measurement; and in what was in flight."""

    def measure() -> tuple[int, dict[str, Any]]:
        with python_loop(neglected=7) as port:
            return generate(programs, port, "-c", "10")

    code, result = undisturbed(9, measure)
    assert (code, result["ok"]) == (0, True)
    assert result["latency_us"]["max"] > result["seconds"] * 1e6
    assert result["latency_us"]["p50"] < 0.1e6
    assert in_flight(result) == pytest.approx(9, rel=0.1)


def in_benchmarks(code: str, **variables: str) -> Any:
    """What `code` prints as JSON, in a process of its own: the package is not on the tests' path."""
    command, environment = [sys.executable, "-c", "import json\n" + code], ENVIRONMENT | variables
    return json.loads(subprocess.check_output(command, cwd=REPOSITORY, text=True, env=environment, timeout=patient(60)))


def test_runner_refuses_what_was_not_in_flight() -> None:
    code = """if True:
        from benchmarks.measure import Failure, check_in_flight
        def answer(mean, seconds=0.7, others=0.0):
            figures = {"messages_per_s": 100_000.0, "seconds": seconds, "latency_us": {"mean": mean}}
            try:
                return check_in_flight(figures | {"others": others, "steal": 0.0}, 1000)
            except Failure as failure:
                return str(failure)
        # In a short time the ends may do as much; and so may whatever disturbs.
        passing = [answer(10_000), answer(8_800, seconds=0.2), answer(8_800, others=0.3)]
        print(json.dumps([passing, answer(8_800), answer(11_500)]))"""
    complaint = "rate x mean latency says that {} messages were in flight, not 1000"
    assert in_benchmarks(code) == [[None] * 3, complaint.format(880), complaint.format(1150)]


@pytest.mark.parametrize(
    ("load", "bad"),  # where in the stream
    [
        ("-s 64", 123_456),
        ("-s 64 -d 16", 123_456),
        ("-s 5000 --framing length4", 123_456),
        ("-s 1000000", 123_456),
        ("-s 1000000", 2_000_000),  # the first of a message
        ("-s 300000 --framing length4", 2 * 300_004 + 1),  # in a header
        ("-s 300000 --framing length4", 2 * 300_004 + 4),  # behind that
        ("-s 300000 --framing length4", 3 * 300_004 - 1),  # and the last of that message
    ],
)
def test_generator_detects_one_corrupted_byte(programs: dict[str, Path], load: str, bad: int) -> None:

    def corrupt(data: bytes, offset: int) -> bytes:
        if not offset <= bad < offset + len(data):
            return data
        changed = bytearray(data)
        changed[bad - offset] ^= 1
        return bytes(changed)

    with python_echo(corrupt) as port:
        code, result = generate(programs, port, "-t", "10", *load.split())
    assert (code, result["ok"]) == (1, False)
    assert re.search(rf"wrong byte: connection 0, offset {bad}\b", result["error"])


def test_generator_detects_replies_that_change_places(programs: dict[str, Path]) -> None:
    def swap(data: bytes, offset: int) -> bytes:
        return data if offset < 100_000 or len(data) != 128 else data[64:] + data[:64]

    with python_echo(swap) as port:
        code, result = generate(programs, port, "-s", "64", "-d", "2", "-t", "10")
    assert code == 1
    assert "wrong byte" in result["error"]


def test_generator_detects_a_lost_reply(programs: dict[str, Path]) -> None:
    with python_echo(lambda data, offset: data if offset < 640 else b"") as port:
        code, result = generate(programs, port)
    assert code == 1
    assert result["error"] == "no reply from the server for 5 s: 1 had not come"


def test_generator_detects_bytes_too_many(programs: dict[str, Path]) -> None:
    with python_echo(lambda data, offset: data * 2) as port:
        code, result = generate(programs, port)
    assert code == 1
    assert "more bytes" in result["error"] or "wrong byte" in result["error"]


@pytest.mark.parametrize(("size", "before"), [(64, 640), (1_000_000, 1_500_000)])
def test_generator_detects_a_closed_connection(programs: dict[str, Path], size: int, before: int) -> None:
    with python_echo(lambda data, offset: data if offset < before else None) as port:
        code, result = generate(programs, port, "-s", str(size))
    assert code == 1
    assert "connection 0" in result["error"]


def test_generator_reports_that_nobody_listens(programs: dict[str, Path]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can take the port
        code, result = generate(programs, bound.getsockname()[1])
    assert code == 3
    assert "connect" in result["error"]


@pytest.mark.parametrize("wrong", ["-p 0", "-p 1 -c 0", "-p 1 -s 0", "-p 1 --framing lines", "-p 1 -t 0", "-p 1 extra"])
def test_generator_refuses_nonsense(programs: dict[str, Path], wrong: str) -> None:
    done = subprocess.run(
        [programs["loadgen"], *wrong.split()], capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(10)
    )
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_connections_are_counted(programs: dict[str, Path]) -> None:
    with c_echo(programs["epoll_echo"]) as (port, pid):
        options = ["-c", "20", "-s", "1000", "--pid", str(pid)]
        code, result = undisturbed(20, lambda: generate(programs, port, *options, by="connect_rate"))
    assert (code, result["ok"]) == (0, True)
    assert in_flight(result) == pytest.approx(20, rel=0.1)
    assert result["server"]["cpu_s"] > 0


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "wrong byte: connection 0, offset 63"),
        (lambda data: data + b"x", "more bytes"),
        (lambda data: None, "closed"),
    ],
)
def test_connecting_notices_a_wrong_reply(
    programs: dict[str, Path], wrong: Callable[[bytes], bytes | None], complaint: str
) -> None:
    with python_echo(lambda data, offset: wrong(data)) as port:
        code, result = generate(programs, port, by="connect_rate")
    assert (code, result["ok"]) == (1, False)
    assert complaint in result["error"]


def broadcast(programs: dict[str, Path], port: int, control: int, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [str(programs["broadcast_load"]), "-p", str(port), "--control", str(control), "-t", "0.2", *arguments]
    return run_json(command, pass_fds=[control])


def test_broadcasts_reach_everybody(programs: dict[str, Path]) -> None:
    def measure() -> tuple[int, dict[str, Any]]:
        with subprocess.Popen(
            [programs["broadcast"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                port, pid = int(process.stdout.readline()), str(process.pid)
                return broadcast(programs, port, process.stdin.fileno(), "-c", "200", "--pid", pid)
            finally:
                process.kill()

    code, result = undisturbed(200, measure)
    assert (code, result["ok"]) == (0, True)
    assert result["messages"] % 200 == 0
    assert in_flight(result) == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda message: message[:40] + bytes([message[40] ^ 1]) + message[41:], "connection 2, offset 40"),
        (lambda message: message + b"?", "connection 2: more bytes"),
        (lambda message: b"", "1 of 3 clients had not got"),
    ],
)
def test_broadcasting_notices_what_is_wrong(
    programs: dict[str, Path], change: Callable[[bytes], bytes], complaint: str
) -> None:
    with python_broadcast(lambda message, number: change(message) if number == 2 else message) as (port, control):
        code, result = broadcast(programs, port, control, "-c", "3")
    assert (code, result["ok"]) == (1, False)
    assert complaint in result["error"]


def test_idle_connections_are_weighed(programs: dict[str, Path]) -> None:
    with c_echo(programs["epoll_echo"]) as (port, pid):
        code, result = drive(port, pid, "idle", "--connections", "2000", "--seconds", "0.2")
    assert (code, result["ok"]) == (0, True)
    assert 0 < result["values"]["bytes_per_connection"] < 1000
    assert result["values"]["cpu_share"] < 0.5


def test_idle_notices_a_wrong_byte() -> None:
    with python_echo(lambda data, offset: data[:-1] + bytes([data[-1] ^ 1])) as port:
        code, result = drive(port, os.getpid(), "idle", "--connections", "1")
    assert (code, result) == (1, {"ok": False, "error": "wrong bytes came back"})


def test_sleeping_workers_are_waited_for() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.tstpool_options", "sleep", "--workers", "3"]
    command += ["--shards", "1"]
    for _ in range(TRIES):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
            assert process.stdout is not None
            try:
                port = int(process.stdout.readline())
                code, result = drive(port, process.pid, "asleep", "--connections", "5", "--workers", "3")
            finally:
                process.kill()
        assert (code, result["ok"]) == (0, True)
        values = result["values"]
        if not values["served_early"]:  # else one of them began to sleep late, or it was looked when they were awake
            break
    assert (values["served_early"], values["served"]) == (0, 100)
    assert values["cpu_share"] < 0.5
    assert 1.0 <= values["seconds_until_served"] < patient(5)


def peer_names(kind: str) -> list[str]:
    """As the runner lists them; none where the benchmarks are not part of the tree."""
    if not SOURCES.is_dir():
        return []
    listing = f"from benchmarks.peers import PEERS; print(*(p.name for p in PEERS if {kind}))"
    return subprocess.check_output([sys.executable, "-c", listing], cwd=REPOSITORY, text=True).split()


@contextmanager
def peer(name: str) -> Iterator[tuple[int, list[str], int]]:
    """A peer as the runner starts it: port, framings, standard input. Skips where what it needs is missing."""
    asking = f"""if True:
        import json
        from benchmarks.peers import BY_NAME
        peer = BY_NAME[{name!r}]
        why = peer.missing()
        print(json.dumps([why, [] if why else peer.command(), peer.framings]))"""
    answer = subprocess.check_output([sys.executable, "-c", asking], cwd=REPOSITORY, text=True, timeout=patient(120))
    why, command, framings = json.loads(answer)
    if why:
        pytest.skip(why)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline()), framings, process.stdin.fileno()
        finally:
            process.kill()


def has_the_agreed_backlog(port: int) -> bool:
    """The socket that listens there. Where nothing can tell, it has."""
    if shutil.which("ss") is None:
        return True
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    fields = subprocess.check_output(["ss", "-Hltn", f"sport = :{port}"], text=True, timeout=patient(10)).split()
    return int(fields[2]) == min(4096, limit)


others_libraries = pytest.mark.skipif(bool(SANITIZER), reason="other people's libraries under our sanitizers")


@others_libraries
@pytest.mark.parametrize("name", peer_names("p.framings"))
def test_each_peer_returns_every_byte(programs: dict[str, Path], name: str) -> None:
    """In messages of many sizes, so that each way of cutting and of putting together is taken."""
    with peer(name) as (port, framings, _):
        assert has_the_agreed_backlog(port)
        for framing in framings:
            for load in ("-c 5 -s 1 -d 50", "-c 5 -s 5000 -d 20", "-c 2 -s 1048576 -d 2"):
                options = ["-t", "0.1", "-w", "0", "--framing", framing, *load.split()]
                code, result = generate(programs, port, *options)
                assert (code, result["ok"]) == (0, True), result


@others_libraries
@pytest.mark.parametrize("name", peer_names("p.name.startswith('broadcast-')"))
def test_each_broadcasting_peer_reaches_everybody(programs: dict[str, Path], name: str) -> None:
    with peer(name) as (port, _, control):
        code, result = broadcast(programs, port, control, "-c", "100")
    assert (code, result["ok"]) == (0, True), result


@others_libraries
@pytest.mark.parametrize("handler", ["echo", "work", "sleep"])
def test_options_reach_the_pool(programs: dict[str, Path], handler: str) -> None:
    command = [sys.executable, "-m", "benchmarks.peers.tstpool_options", handler, "--workers", "3", "--shards", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            framing = "length4" if handler == "sleep" else "none"
            code, result = generate(programs, port, "--framing", framing)
            threads = os.listdir(f"/proc/{process.pid}/task")
        finally:
            process.kill()
    assert (code, result["ok"]) == (0, True), result
    assert len(threads) == 1 + 3  # the main thread is no worker


def test_options_of_polling_reach_the_pool() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.tstpool_options", "echo", "--busy-poll", "-1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode != 0
    assert "busy_poll" in done.stderr


def checked_file(path: Path, **cases: list[float]) -> Path:
    """As check.py writes it: ratios to the C loop, one for each start of the servers."""
    machine = {"cpu": "a", "virtual": False, "cores": 2, "kernel": "6", "python": "3", "commit": "0", "date": "today"}
    path.write_text(json.dumps({"machine": machine, "turns": {}, "ratios": cases}))
    return path


def check(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.check", "--baseline", str(tmp_path / "baseline.json")]
    done = [*command, *map(str, arguments)]
    return subprocess.run(done, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(60))


def test_check_says_that_there_is_no_baseline(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 2
    assert "There is no baseline" in done.stdout


def test_check_refuses_a_baseline_of_the_older_kind(tmp_path: Path) -> None:
    """Its ratios were of servers one after the other, one connection without polling: they are others."""
    (tmp_path / "baseline.json").write_text(json.dumps({"machine": {}, "ratios": {"echo": [1.0] * 9}}))
    done = check(tmp_path)
    assert done.returncode == 2
    assert "from before servers were measured side by side, so nothing was measured" in done.stdout


BEFORE = [0.78, 0.79, 0.79, 0.80, 0.80, 0.80, 0.81, 0.81, 0.82]


def against_baseline(tmp_path: Path, *arguments: str, before: list[float] = BEFORE, **now: list[float]) -> Any:
    stored = check(tmp_path, "--store", "--measured", checked_file(tmp_path / "then", echo=before))
    assert stored.returncode == 0, stored.stdout
    return check(tmp_path, *arguments, "--measured", checked_file(tmp_path / "now", **now))


@pytest.mark.parametrize(
    ("times", "arguments", "slower"),
    [
        (1.0, (), False),
        (1.1, (), False),
        (0.97, (), False),  # within the tolerance
        (0.97, ("--tolerance", "0.01"), True),
        (0.92, (), True),
    ],
)
def test_check_sees_losses_larger_than_the_tolerance(
    tmp_path: Path, times: float, arguments: tuple[str, ...], slower: bool
) -> None:
    done = against_baseline(tmp_path, *arguments, echo=[times * ratio for ratio in BEFORE])
    assert done.returncode == slower, done.stdout
    assert ("SLOWER" in done.stdout) == slower


def test_one_lucky_start_hides_no_loss(tmp_path: Path) -> None:
    done = against_baseline(tmp_path, echo=[0.85 * ratio for ratio in BEFORE[1:]] + [0.95])
    assert done.returncode == 1
    assert re.search(r"echo +0\.80 +0\.6\d +-1\d\.\d%  -1\d\.\d% to -1\d\.\d%  SLOWER", done.stdout)


def test_check_says_what_noise_hides(tmp_path: Path) -> None:
    noisy = [0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1]
    done = against_baseline(tmp_path, before=noisy, echo=[0.9 * ratio for ratio in noisy])
    assert done.returncode == 0
    unseen = re.search(r"Losses of less than (\d+)% would not have been noticed", done.stdout)
    assert unseen and int(unseen[1]) > 20


@pytest.mark.parametrize("now", [{}, {"echo": BEFORE[:5]}])
def test_check_fails_for_a_case_without_enough_quiet_starts(tmp_path: Path, now: dict[str, list[float]]) -> None:
    done = against_baseline(tmp_path, **now)
    assert done.returncode == 1
    assert "NOT MEASURED" in done.stdout
    (tmp_path / "baseline.json").unlink()
    few = checked_file(tmp_path / "few", echo=BEFORE[:5])
    assert check(tmp_path, "--store", "--measured", few).returncode == 2
    assert not (tmp_path / "baseline.json").exists()


def test_check_measures_servers_side_by_side(tmp_path: Path) -> None:
    code = f"""if True:
        import contextlib, io, sys
        from pathlib import Path
        from benchmarks import check, pairs, results
        results.QUIET, pairs.ROUNDS, pairs.TURN_SECONDS = 1.0, 1, 0.05
        check.wait_until_quiet, check.MEASURED = lambda patience: 0.0, Path({str(tmp_path / "check.json")!r})
        check.CASES = {{"echo-64B-c50": ("c-level", "asyncio")}}
        sys.argv = ["check", "--store", "--starts", "6", "--baseline", {str(tmp_path / "baseline.json")!r}]
        with contextlib.redirect_stdout(io.StringIO()):
            code = check.main()
        print(code)"""
    assert in_benchmarks(code) == 0
    document = json.loads((tmp_path / "baseline.json").read_text())
    assert document == json.loads((tmp_path / "check.json").read_text())
    assert document["turns"] == {"starts": 6, "rounds": 1, "seconds": 0.05, "network": document["turns"]["network"]}
    [(case, ratios)] = document["ratios"].items()
    assert case == "echo-64B-c50, asyncio"
    assert len(ratios) == 6


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for the generator")
def test_generator_polls_where_the_workload_says_so() -> None:
    code = """if True:
        from benchmarks.measure import choose_cores, polling
        from benchmarks.workloads import BY_NAME
        cores = choose_cores("split")[1], choose_cores("shared")[1]
        print(json.dumps([polling(BY_NAME[name], c) for name in ("echo-64B-c1", "echo-64B-c50") for c in cores]))"""
    assert in_benchmarks(code) == [["--spin"], [], [], []]


@pytest.mark.parametrize("wrong", ["--rounds 0", "--rounds -1", "--seconds 0", "--seconds -1", "--warm-up -1"])
def test_runner_refuses_nonsense(tmp_path: Path, wrong: str) -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "benchmarks", "--only", "c-level", "--output", str(tmp_path), *wrong.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(60))
    assert done.returncode == 2
    assert "--rounds must be 1 or more" in done.stderr


def test_compiler_may_be_a_command_of_several_words(tmp_path: Path) -> None:
    code = f"""if True:
        from pathlib import Path
        from benchmarks import build, machine
        build.BUILD = Path({str(tmp_path)!r})
        print(json.dumps([str(build.program("broadcast")), machine.describe()["compiler"]]))"""
    program, version = in_benchmarks(code, CC="env cc -g")
    assert os.access(program, os.X_OK)
    assert version == subprocess.check_output(["cc", "--version"], text=True).partition("\n")[0]


def sample(peer: str, number: int, rate: float, **latency: float) -> dict[str, Any]:
    """As measure() and take() make it."""
    cpu = {"cpu_s": 0.5, "busy": 1.0, "cpu_us_per_message": 1e6 / rate, "user_ticks": 10, "system_ticks": 40}
    figures = {"messages": 50_000, "messages_per_s": rate, "seconds": 0.5, "server": cpu, "generator": cpu}
    names = {"workload": "echo-64B-c50", "peer": peer, "round": number, "others": 0.0, "steal": 0.0}
    usual = {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "p999": 1.0, "max": 1.0}
    return figures | names | {"latency_us": usual | latency}


def test_neighbours_change_from_round_to_round() -> None:
    pytest.importorskip("rich")
    code = """if True:
        from benchmarks import peers, workloads
        from benchmarks.__main__ import schedule
        plan = [(workloads.WORKLOADS[0], list(peers.RAW))]
        print(json.dumps([(number, peer.name) for _, number, peer in schedule(plan, 10)]))"""
    order = [[name for number, name in in_benchmarks(code) if number == wanted] for wanted in range(10)]
    assert all(len(names) == len({*names}) > 10 for names in order)
    neighbours = Counter(pair for names in order for pair in itertools.pairwise(names))
    assert max(neighbours.values()) <= 5


def test_longest_latency_is_that_of_all_rounds() -> None:
    samples = [sample("tstpool", number, 1e5, p99=latency, max=latency) for number, latency in enumerate([1, 9, 2])]
    code = f"from benchmarks.results import summarise; print(json.dumps(summarise({samples})))"
    latency = in_benchmarks(code)["echo-64B-c50"]["tstpool"]["latency_us"]
    assert (latency["p99"], latency["max"]) == (2, 9)


def test_measurements_have_a_network_of_their_own() -> None:
    code = """if True:
        import socket
        from benchmarks import network
        said = network.enter()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            names = [name for _, name in socket.if_nameindex()]
        print(json.dumps([said, names, network.CONTROL.read_text().strip()]))"""
    said, interfaces, control = in_benchmarks(code)
    if said.startswith("this machine's own network"):
        pytest.skip("this process may have no network namespace of its own")
    assert "lo" in interfaces
    assert control in ("cubic", "reno") or not os.access("/proc/sys/net/ipv4/tcp_congestion_control", os.W_OK)
    assert said.startswith(f"a network namespace ({control}")


def test_who_may_have_none_measures_in_the_machines() -> None:
    code = """if True:
        import os
        from benchmarks import network
        def refuse(name):
            raise PermissionError
        network._up = refuse  # the last of what it takes
        before = os.readlink("/proc/self/ns/net")
        said = network.enter()
        assert os.readlink("/proc/self/ns/net") == before
        print(json.dumps([said, network.CONTROL.read_text().strip()]))"""
    said, control = in_benchmarks(code)
    assert said == f"this machine's own network ({control})"


def test_report_says_in_which_network(tmp_path: Path) -> None:
    settings = {"rounds": 3, "seconds": 0.5, "warm_up": 0.1, "cores": "split"}
    samples = [sample("c-level", number, 1e5) for number in range(3)]
    assert "over loopback, in this machine's own network, every" in report(tmp_path, samples)
    text = report(tmp_path, samples, settings=settings | {"network": "a network namespace (reno)"})
    assert "over loopback, in a network namespace (reno), every byte" in text


def test_check_says_that_the_baseline_is_of_another_network(tmp_path: Path) -> None:
    for path, network in ((tmp_path / "baseline.json", "A"), (tmp_path / "now", "B")):
        document = json.loads(checked_file(path, echo=BEFORE).read_text())
        path.write_text(json.dumps(document | {"turns": {"network": network}}))
    assert "! measured in B, the baseline in A" in check(tmp_path, "--measured", tmp_path / "now").stdout
    assert "! measured in" not in check(tmp_path, "--measured", tmp_path / "baseline.json").stdout


@functools.cache
def this_machine() -> Any:
    return in_benchmarks("from benchmarks.machine import describe; print(json.dumps(describe()))")


def report(tmp_path: Path, samples: list[dict[str, Any]], code: int = 0, **found: Any) -> str:
    """The RESULTS.md that is made of them, and of what else was found; `code` is the runner's exit code.

    Without the chart, and in this process: matplotlib takes two seconds for each, and keeps files open."""
    pytest.importorskip("rich")
    settings = {"rounds": 3, "seconds": 0.5, "warm_up": 0.1, "cores": "split"}
    document = {
        "machine": this_machine(),
        "settings": settings,
        "skipped": {},
        "summary": {},
        "samples": samples,
    } | found
    (tmp_path / "samples.json").write_text(json.dumps(document))
    command = ["benchmarks", "--report", str(tmp_path / "samples.json"), "--output", str(tmp_path)]
    with mock.patch.object(sys, "argv", command), mock.patch.object(sys, "path", [str(REPOSITORY), *sys.path]):
        runner = importlib.import_module("benchmarks.__main__")
        with mock.patch.object(runner.report, "draw", return_value=False):
            assert runner.main() == code
    return (tmp_path / "RESULTS.md").read_text()


def test_servers_are_sorted_by_ratio(tmp_path: Path) -> None:
    """Here tstpool has the higher ratio in two of three rounds, uvloop the higher median of rates."""
    rates = {"c-level": (100e3, 200e3, 300e3), "uvloop": (90e3, 180e3, 270e3), "tstpool": (99e3, 160e3, 297e3)}
    samples = [sample(peer, number, rate) for peer, each in rates.items() for number, rate in enumerate(each)]
    rows = re.findall(r"^\| (\w+)[^|]* \| ([\d,]+) \| ([\d.]+) ", report(tmp_path, samples), re.MULTILINE)
    assert rows == [("C", "200,000", "1.00"), ("tstpool", "160,000", "0.99"), ("uvloop", "180,000", "0.90")]


def test_report_says_what_the_kernel_takes(tmp_path: Path) -> None:
    samples = [sample(peer, number, 1e5) for peer in ("c-level", "tstpool", "uvloop") for number in range(3)]
    for one in samples[:3]:
        one["server"] |= {"user_ticks": 0, "system_ticks": 50}
    text = report(tmp_path, samples)
    title = "64 B, 50 connections, one in flight"
    assert f"| {title} | C epoll, level-triggered | 0.00 | 10.00 | 100% | 1.00 |" in text
    assert f"| {title} | tstpool, handler object | 2.00 | 8.00 | 80% | 0.80 |" in text
    assert f"| {title} | uvloop" not in text


@pytest.mark.parametrize("by", ["others", "steal"])
@pytest.mark.parametrize(("disturbed", "complains"), [(0, False), (1, False), (4, True)])
def test_report_believes_what_the_runner_believes(tmp_path: Path, by: str, disturbed: int, complains: bool) -> None:
    samples = [sample("c-level", number, 1e5) for number in range(10)]
    for disturbed_one in samples[:disturbed]:
        disturbed_one[by] = 0.5
    text = report(tmp_path, samples)
    assert ("do not believe the figures" in text) == complains
    assert (f"{disturbed} of 10 measurements ran while something else" in text) == (disturbed > 0)


def test_cases_carry_the_rates_of_the_generator(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k", "c1-c-level"]
    file = tmp_path / "measured.json"
    done = subprocess.run(
        [*command, f"--benchmark-json={file}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=patient(60),
    )
    assert done.returncode == 0, done.stdout
    [case] = json.loads(file.read_text())["benchmarks"]
    rates = case["extra_info"]["messages_per_s"]
    assert len(rates) == case["stats"]["rounds"]
    # 5,000 messages: by themselves they take less time than with all that is around them.
    assert all(5000 / rate < case["stats"]["max"] for rate in rates)


@others_libraries
@pytest.mark.parametrize("workload", ["slow-mix-c46", "connect-c50"])
def test_runner_measures_special_workloads(tmp_path: Path, workload: str) -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "benchmarks", "--only", workload, "sleep-4", "tstpool", "--rounds", "1"]
    command += ["--seconds", "0.2", "--warm-up", "0.1", "--patience", "0", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(120)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    [(name, figures)] = document["summary"].items()
    assert name == workload
    assert len(figures) == 2  # with the one that ratios are taken to
    assert all(row["messages_per_s"] > 0 and row["rate_ratio"] for row in figures.values())
    assert "| server | messages/s |" in (tmp_path / "RESULTS.md").read_text()


def test_runner_measures_reports_and_leaves_no_process(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "benchmarks", "--only", "c-oneshot", "echo-64B-c50", "--rounds", "1"]
    command += ["--seconds", "0.2", "--warm-up", "0.1", "--patience", "0", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, timeout=patient(120)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    figures = document["summary"]["echo-64B-c50"]
    assert set(figures) == {"c-level", "c-oneshot"}  # the reference is always measured
    assert figures["c-level"]["rate_ratio"] == [1.0, 1.0, 1.0]
    assert figures["c-oneshot"]["messages_per_s"] > 0
    assert "C epoll, oneshot" in done.stdout


# ---- floors, system calls, statistics ----------------------------------------------------------------------------

STRACE_TABLE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 57.12    0.101234          10      8592         3 recvfrom
 42.00    0.074100           8      8571           sendto
  0.88    0.001500           7       213           epoll_wait
  0.00    0.000000           0        50           accept4
------ ----------- ----------- --------- --------- ----------------
100.00    0.176834          10     17426         3 total
"""


def test_calls_are_read_from_what_strace_writes() -> None:
    code = f"from benchmarks.calls import parse; print(json.dumps([parse({STRACE_TABLE!r}), parse('')]))"
    calls = {"recvfrom": 8592, "sendto": 8571, "epoll_wait": 213, "accept4": 50}
    assert in_benchmarks(code) == [calls, {}]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_c_loop_receives_and_sends_once_for_each_message() -> None:
    code = """if True:
        from benchmarks.calls import measure
        from benchmarks.peers import BY_NAME as PEERS
        from benchmarks.workloads import BY_NAME as WORKLOADS
        print(json.dumps(measure(SECONDS, [(WORKLOADS["echo-64B-c50"], PEERS["c-level"])])))"""
    found = in_benchmarks(code.replace("SECONDS", str(patient(0.2))))
    [counted] = found["counts"]
    if "not permitted" in counted.get("error", ""):
        pytest.skip(counted["error"])
    assert re.fullmatch(r"strace [\d.]+", found["tool"])
    assert counted["messages"] >= 100
    assert counted["calls"]["sendto"] == counted["messages"]
    # One more for each connection's end, and it may be called for what has not arrived yet.
    assert counted["messages"] <= counted["calls"]["recvfrom"] <= counted["messages"] * 1.1 + 50


def test_page_says_that_strace_is_missing(tmp_path: Path) -> None:
    code = "from benchmarks import calls; print(json.dumps([calls.measure(0.2, [])]))"
    assert in_benchmarks(code, PATH=str(tmp_path)) == [{"missing": "strace is not installed"}]
    found = {"calls": {"missing": "strace is not installed"}}
    text = report(tmp_path, [sample("c-level", 0, 1e5)], **found)
    assert "System calls were not counted: strace is not installed." in text
    assert "What statistics cost is not known" in text


def test_page_has_calls_by_name(tmp_path: Path) -> None:
    """With columns for what belongs to messages; what belongs to connecting is added up."""
    calls = {"recvfrom": 10_000, "sendto": 10_000, "epoll_wait": 630, "accept4": 50, "setsockopt": 50}
    counted = {"workload": "echo-64B-c50", "peer": "c-level", "messages": 10_000, "calls": calls}
    refused = {"workload": "echo-64B-c50", "peer": "tstpool", "error": "Operation not permitted"}
    found = {"calls": {"tool": "strace 6.1", "counts": [counted, refused]}}
    text = report(tmp_path, [sample("c-level", 0, 1e5)], **found)
    assert "| workload | server | epoll_wait | recvfrom | sendto | others | all |" in text
    row = "64 B, 50 connections, one in flight | C epoll, level-triggered | 0.063 | 1.00 | 1.00 | 0.01 | 2.07"
    assert f"| {row} |" in text
    assert "tstpool, handler object: Operation not permitted." in text


def test_statistics_are_timed_and_related_to_a_message(tmp_path: Path) -> None:
    found = in_benchmarks("from benchmarks import counting; print(json.dumps(counting.measure()))")
    assert 0 < found["lowest"] <= found["nanoseconds"] <= found["highest"]
    samples = [sample(peer, 0, 1e5) for peer in ("c-level", "tstpool")]  # 10 us of CPU each
    text = report(tmp_path, samples, statistics={"nanoseconds": 250.0, "lowest": 240.0, "highest": 260.0})
    assert "| 64 B, 50 connections, one in flight | tstpool, handler object | 2.5% |" in text
    assert re.search(r"tstpool, handler object \| statistics, of its CPU \|  \| <= 3.0% \| 2.5% \|  \| yes \|", text)


def test_floors_are_what_the_committed_run_measures() -> None:
    pytest.importorskip("rich")
    code = """if True:
        from argparse import Namespace
        from benchmarks.__main__ import selection
        from benchmarks.floors import FLOORS
        plan = selection(Namespace(set="floors", only=[]))
        measured = {(workload.name, peer.name) for workload, peers in plan for peer in peers}
        needed = {(floor.workload, peer) for floor in FLOORS for peer in (floor.peer, *floor.against)}
        print(json.dumps([len(needed), sorted(needed - measured)]))"""
    number, missing = in_benchmarks(code)
    assert number > 30
    assert missing == []


def test_no_figure_has_two_floors() -> None:
    """The weaker of them would be counted as one more that is met."""
    code = """if True:
        from benchmarks.floors import FLOORS
        print(json.dumps([[f.workload, f.peer, f.quantity.title, f.comparison, f.against] for f in FLOORS]))"""
    floors = in_benchmarks(code)
    assert len(floors) == 30
    assert [floor for floor in floors if floors.count(floor) > 1] == []


def floor_rows(text: str) -> list[list[str]]:
    """Of the headline's workload: server, figure, beside, wanted, measured, between, met."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") == 9]
    return [row[1:] for row in rows if row[0] == "64 B, 50 connections, one in flight"]


def test_floors_are_met_missed_or_missing(tmp_path: Path) -> None:
    rates = {"c-level": (100e3, 200e3, 300e3), "tstpool": (94e3, 192e3, 300e3), "tstpool-nogil": (97e3, 194e3, 291e3)}
    samples = [sample(peer, number, rate) for peer, each in rates.items() for number, rate in enumerate(each)]
    rows = floor_rows(report(tmp_path, samples))
    c_loop, handler = "C epoll, level-triggered", "tstpool, handler object"
    nogil = "tstpool, nogil handler"
    assert rows[0] == [nogil, "messages/s", c_loop, ">= 0.98", "0.970", "0.970 - 0.970", "**no**"]
    assert rows[1] == [handler, "messages/s", c_loop, ">= 0.95", "0.960", "0.940 - 1.000", "yes"]
    assert rows[2][3:] == [">= 1.03", "missing", "", "uvloop Protocol: not measured"]


def test_hardest_of_several_counts() -> None:
    """There are two servers tuned by hand; the one that does best is the one to be compared with."""
    rates = {"tstpool-framed": 300e3, "uvloop-tuned": 100e3, "uvloop-tuned-buffered": 250e3}
    samples = [sample(peer, 0, rate) | {"workload": "framed-64B-c50-d16"} for peer, rate in rates.items()]
    document = {"machine": {"python": "3.11"}, "skipped": {}, "samples": samples}
    code = f"""if True:
        from benchmarks import floors, results
        document = {document}
        document["summary"] = results.summarise(document["samples"])
        found = [one for one in floors.findings(document) if not one.missing]
        print(json.dumps([[one.floor.wanted, one.against, one.measured, one.met] for one in found]))"""
    assert in_benchmarks(code) == [[1.5, "uvloop-tuned-buffered", [1.2, 1.2, 1.2], False]]


def test_bounds_of_a_median_hold_as_often_as_they_say() -> None:
    """The ranks of both, and that of the true median lies outside: heads in so many throws of a coin."""
    code = """if True:
        from benchmarks.results import interval
        print(json.dumps([interval([float(x) for x in range(n)]) for n in range(6, 101)]))"""
    bounds = in_benchmarks(code)
    for n, (middle, low, high) in enumerate(bounds, 6):
        assert (middle, high) == ((n - 1) / 2, n - 1 - low)
        outside = 2 * sum(math.comb(n, heads) for heads in range(int(low) + 1)) / 2**n
        assert outside <= 0.05
    assert [bounds[n - 6][1:] for n in (9, 36)] == [[1, 7], [11, 24]]


def test_bounds_of_a_change_are_those_of_the_rank_sum_test() -> None:
    """Of nine and nine: 11 is the largest sum of ranks beyond which chance leads once in 200 times."""
    code = """if True:
        from benchmarks.results import change
        now = [2.0 ** x for x in range(9)]
        print(json.dumps([change(now, [1.0] * 9), change([2.0] * 6, [1.0] * 6), change([2.0] * 4, [1.0] * 4)]))"""
    nine, six, four = in_benchmarks(code)
    assert nine == [16.0, 2.0 ** (10 // 9), 2.0 ** (70 // 9)]
    assert six == [2.0, 2.0, 2.0]
    assert four == [2.0, 0.0, math.inf]  # too few to say


def line(peer: str, rates: list[float | None], workload: str = "echo-64B-c50", **more: Any) -> dict[str, Any]:
    """As pairs.py makes it."""
    found = [None if rate is None else 0.0 for rate in rates]
    usual = {"workload": workload, "peer": peer, "rounds_per_start": 4, "others": found, "steal": found}
    return usual | {"messages_per_s": rates, "latency_us.p99": rates} | more


def test_each_start_counts_once(tmp_path: Path) -> None:
    """With the median of its rounds; rounds of one start are not independent of each other."""
    ours = [rate for start in range(9) for rate in (90.0 + start, 90.0 + start, 90.0 + start, 1e6)]
    pairs = [line("tstpool", ours), line("c-level", [100.0] * 36)]
    text = report(tmp_path, [sample("c-level", 0, 100e3), sample("tstpool", 0, 50e3)], pairs=pairs)
    assert floor_rows(text)[1][3:] == [">= 0.95", "0.940", "0.910 - 0.970", "**no**"]
    assert "36 times, 4 of them after each of 9 starts." in text


@pytest.mark.parametrize("by", ["others", "steal"])
@pytest.mark.parametrize("whose", [0, 1])
def test_disturbed_turns_do_not_count(tmp_path: Path, by: str, whose: int) -> None:
    """Neither of the two that a ratio is made of; and a reader learns how many there were."""
    pairs = [line("tstpool", [99.0] * 12 + [1.0] * 12 + [99.0] * 12), line("c-level", [100.0] * 36)]
    pairs[whose][by] = [0.0] * 12 + [0.06] * 12 + [0.0] * 12
    samples = [sample("c-level", 0, 100e3), sample("tstpool", 0, 50e3)]
    text = report(tmp_path, samples, pairs=pairs)
    assert floor_rows(text)[1][4:] == ["0.990", "0.990 - 0.990", "yes"]
    assert re.search(r"12 of 72 turns side by side ran while something else .*: they do not count\.", text)
    pairs[whose][by] = [0.06] * 16 + [0.0] * 20  # five starts are left
    text = report(tmp_path, samples, pairs=pairs)
    assert floor_rows(text)[1][4:] == ["0.500", "0.500 - 0.500", "**no**"]
    assert re.search(r"16 of 72 turns side by side .*: do not believe the figures", text)


def test_failed_turns_are_reported(tmp_path: Path) -> None:
    pairs = [line("tstpool", [99.0] * 34 + [None] * 2), line("c-level", [100.0] * 36)]
    errors = [
        {"workload": "echo-64B-c50", "peer": "tstpool", "round": number, "error": f"wrong byte {number}"}
        for number in (34, 35)
    ]
    text = report(tmp_path, [sample("c-level", 0, 100e3)], code=1, pairs=pairs, pair_errors=errors)
    title = "tstpool, handler object, 64 B, 50 connections, one in flight"
    assert f"> {title}: 2 of 36 turns side by side failed: wrong byte 34" in text


def test_page_explains_servers_that_are_slow_when_fresh(tmp_path: Path) -> None:
    samples = [sample("c-level", 0, 100e3), sample("asyncio", 0, 12e3), sample("uvloop-aiofastnet", 0, 60e3)]
    pairs = [line("asyncio", [46.0] * 36), line("uvloop-aiofastnet", [66.0] * 36), line("c-level", [100.0] * 36)]
    text = report(tmp_path, samples, pairs=pairs)
    assert "a new block of 256 KiB each time: asyncio Protocol 0.12 here, 0.46 there. Here each round" in text
    assert "compare rates within one of the two only" in text
    assert "a new block" not in report(tmp_path, samples)


def test_page_says_that_tstpool_polls(tmp_path: Path) -> None:
    """Where that decides, and with the figures of a server that does not."""
    text = report(tmp_path, [sample("c-level", 0, 1e5) | {"workload": "echo-64B-c1"}])
    assert "tstpool polls for up to 20 us before it sleeps" in text
    assert "tstpool polls" not in report(tmp_path, [sample("c-level", 0, 1e5)])
    code = """if True:
        from argparse import Namespace
        from benchmarks.__main__ import selection
        found = [[w.name for w, peers in selection(Namespace(set=set_, only=[])) for p in peers
                  if p.name == "tstpool-no-poll"] for set_ in ("default", "floors")]
        print(json.dumps(found))"""
    assert in_benchmarks(code) == [["echo-64B-c1"]] * 2


def test_older_results_can_still_be_reported(tmp_path: Path) -> None:
    """Without what tells which rounds belong to one start: there each of them counts. A round that only one of the two
    has counts for nothing."""
    samples = [sample("c-level", 0, 100e3), sample("tstpool", 0, 50e3)]
    ours, theirs = [float(96 + number) for number in range(20)] + [1e6], [100.0] * 20 + [None]
    pairs = [
        {"workload": "echo-64B-c50", "peer": peer, "messages_per_s": rates, "latency_us.p99": rates}
        for peer, rates in (("tstpool", ours), ("c-level", theirs))
    ]
    rows = floor_rows(report(tmp_path, samples, pairs=pairs))
    ratio = ["1.055", "1.010 - 1.100"]  # 96 to 115 of 100; reach 1.96 * sqrt(20) / 2 = 4.4 of 20 places
    assert rows[1][2:] == ["C epoll, level-triggered", ">= 0.95", *ratio, "yes"]
    few = [line | {"messages_per_s": line["messages_per_s"][:5]} for line in pairs]
    rows = floor_rows(report(tmp_path, samples, pairs=few))
    assert rows[1][4:] == ["0.500", "0.500 - 0.500", "**no**"]


def test_pairs_run_side_by_side_and_in_turns() -> None:
    code = """if True:
        from benchmarks import pairs, workloads
        from benchmarks.peers import BY_NAME
        pairs.ROUNDS, pairs.TURN_SECONDS = 2, 0.05
        chosen = [BY_NAME["c-level"], BY_NAME["asyncio"]]
        found = list(pairs.turns(workloads.BY_NAME["echo-64B-c50"], chosen, "split", 2))
        names = [[peer.name for peer in servers] for _, servers in pairs.plan({"uvloop": "why"})]
        print(json.dumps([sorted((number, peer) for number, peer, _ in found), names]))"""
    turns, names = in_benchmarks(code)
    assert turns == [[number, peer] for number in range(4) for peer in ("asyncio", "c-level")]
    assert names[0] == ["c-level", "tstpool", "tstpool-nogil", "asyncio", "socketserver", "uvloop-aiofastnet"]


def test_pairs_keep_what_failed_and_how_disturbed_it_was() -> None:
    code = """if True:
        import sys
        from benchmarks import pairs, workloads
        from benchmarks.peers import BY_NAME, Peer
        pairs.ROUNDS, pairs.TURN_SECONDS = 2, 0.05
        rude = (
            "import socket; listener = socket.create_server(('127.0.0.1', 0), backlog=4096); "
            "print(listener.getsockname()[1], flush=True); [listener.accept()[0].close() for _ in iter(int, 1)]"
        )
        wrong = [Peer("rude", "rude", lambda: [sys.executable, "-c", rude]), Peer("none", "none", lambda: ["false"])]
        print(json.dumps(pairs.take(workloads.BY_NAME["echo-64B-c50"], [BY_NAME["c-level"], *wrong], "split", 2)))"""
    lines, errors = in_benchmarks(code)
    good, *bad = lines
    assert (good["peer"], good["rounds_per_start"]) == ("c-level", 2)
    assert all(isinstance(x, float) for name in ("messages_per_s", "others", "steal") for x in good[name])
    assert [one["messages_per_s"] for one in bad] == [[None] * 4] * 2
    assert sorted((one["peer"], one["round"]) for one in errors) == [(p, n) for p in ("none", "rude") for n in range(4)]
    assert {one["workload"] for one in errors} == {"echo-64B-c50"}
    why = {one["peer"]: one["error"] for one in errors}
    assert "did not start" in why["none"]
    assert "connection" in why["rude"]


def test_default_set_takes_six_minutes() -> None:
    """As the Makefile's help, README.md and CONTRIBUTING.md say; and all an hour and a quarter, with the turns side by
    side, which take eleven minutes more."""
    pytest.importorskip("rich")
    code = """if True:
        from argparse import Namespace
        from benchmarks.__main__ import minutes, schedule, selection
        def taken(set_, seconds):
            plan = schedule(selection(Namespace(set=set_, only=[])), 5)
            return minutes(list(plan), Namespace(seconds=seconds, warm_up=0.3))
        print(json.dumps([taken("default", 0.7), taken("full", 2.0)]))"""
    default, full = in_benchmarks(code)
    assert 5.5 < default < 6.5
    assert 70 < full + 11 < 80


def test_free_threaded_servers_have_an_interpreter_of_their_own() -> None:
    code = """if True:
        import sys
        from benchmarks.peers import BY_NAME
        free = BY_NAME["work-8-2"]
        print(json.dumps([free.command()[0], free.missing(), BY_NAME["work-8"].command()[0] == sys.executable]))"""
    interpreter, why, usual = in_benchmarks(code, TSTPOOL_BENCH_FREE_THREADED="/nowhere/python3.13t")
    assert (interpreter, usual) == ("/nowhere/python3.13t", True)
    assert "/nowhere/python3.13t" in why


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("", ["default", False]),
        ("--limits", ["default", True]),
        ("--write-results", ["floors", True]),
        ("--full --write-results", ["full", True]),
        ("--quick", ["quick", False]),
    ],
)
def test_what_is_committed_has_floors_and_limits(given: str, chosen: list[Any]) -> None:
    pytest.importorskip("rich")
    code = f"""if True:
        import sys
        from benchmarks.__main__ import arguments
        sys.argv = ["benchmarks", *{given.split()}]
        options = arguments()
        print(json.dumps([options.set, options.limits]))"""
    assert in_benchmarks(code) == chosen
