"""``python -m tstpool``: the echo command as a process of its own, wrong use, and life without rich."""

import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
from helpers import ROOT, connect, patient, recv_exact, recv_until_eof, run_python, wait_until


class Command:
    """``python -m tstpool ...`` in the background; ``lines`` is what it has printed so far."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tstpool", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        with self.process.stdout as stdout:
            self.lines.extend(line.rstrip("\n") for line in stdout)

    def wait_for(self, pattern, timeout=20):
        """Wait for a line that matches and return the match."""

        def search():
            return next(filter(None, (re.search(pattern, line) for line in list(self.lines))), None)

        return wait_until(search, timeout, lambda: f"{pattern!r} in {self.lines}")

    def address(self):
        found = self.wait_for(r"echo on (.+):(\d+)$")
        return found[1], int(found[2])

    def signal(self, number):
        self.process.send_signal(number)

    def result(self, timeout=20):
        """Wait for the end and return the exit code."""
        code = self.process.wait(timeout=patient(timeout))
        self.reader.join()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()


def talk(client, data):
    client.sendall(data)
    assert recv_exact(client, len(data)) == data


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
def test_echo_serves_until_ctrl_c_and_says_how_it_went(trigger):
    with Command("echo", "--port", "0", "--workers", "2", "--trigger", trigger) as command:
        with connect(command.address()) as client:
            for size in (1, 1000, 100_000):
                talk(client, bytes(range(250)) * (size // 250 + 1))
            command.wait_for(r"^connections +messages/s +MB/s in +MB/s out +slowest job +jobs/s of each worker")
            command.wait_for(r"^ +1 +\S+ +\d+\.\d\d +\d+\.\d\d +[\d.]+ m?s  \S")
            command.signal(signal.SIGINT)  # with a connection that is still open
            assert command.result(timeout=5) == 0
        assert f"2 workers, trigger {trigger}" in command.lines[0]
        assert re.match(r"stopped: 1 connections, \d+ messages, 10[12] kB in, 10[12] kB out", command.lines[-1])
        assert "Traceback" not in "\n".join(command.lines)


def test_echo_prints_one_status_line_a_second_though_nobody_comes():
    with Command("echo", "--port", "0") as command:
        wait_until(lambda: sum(re.match(r" +0 +0 +0\.00 +0\.00 ", line) is not None for line in command.lines) >= 2)
        command.signal(signal.SIGINT)
        assert command.result() == 0


def test_echo_ends_on_sigterm_too():
    with Command("echo", "--port", "0") as command:
        command.address()
        command.signal(signal.SIGTERM)
        assert command.result() == 0
        assert command.lines[-1].startswith("stopped: 0 connections, 0 messages")


def test_echo_ends_by_itself_after_the_seconds_asked_for():
    done = run_python("-m", "tstpool", "echo", "--port", "0", "--seconds", "0.2")
    assert done.stdout.splitlines()[-1].startswith("stopped: ")
    assert done.stderr == ""


def test_echo_listens_on_a_unix_socket(tmp_path):
    address = f"unix:{tmp_path}/echo"
    with Command("echo", "--host", address) as command:
        command.wait_for(f"echo on {re.escape(address)}$")
        with connect(address) as client:
            talk(client, b"hello")
        command.signal(signal.SIGINT)
        assert command.result() == 0


def refuses(address):
    try:
        connect(address).close()
    except (ConnectionRefusedError, FileNotFoundError):  # the latter where it was a unix socket's file
        return True
    except ConnectionResetError:
        pass  # the listener went while we were in its backlog
    return False


def stop_with_output_waiting(command, client, address):
    """The client sends until the server waits for it to read. Returns when the server has begun to stop."""
    while select.select([], [client], [], patient(0.5))[1]:
        client.send(bytes(4096), socket.MSG_DONTWAIT)
    command.signal(signal.SIGINT)
    wait_until(lambda: refuses(address))


def test_the_last_line_counts_what_was_sent_while_the_server_stopped(tmp_path):
    """A unix socket's buffers are small, so that what waits then is a good part of it all."""
    from tstpool._cli import show

    address = f"unix:{tmp_path}/echo"
    with Command("echo", "--host", address) as command:
        command.wait_for("echo on ")
        with connect(address) as client:
            stop_with_output_waiting(command, client, address)
            received = len(recv_until_eof(client))
        assert command.result() == 0
        assert f", {show.size(received)} out, " in command.lines[-1]


def test_ctrl_c_while_the_server_stops_exits_with_130(tmp_path):
    """The first one ends the server, and that is how it ends; this one cuts short what it was still doing."""
    address = f"unix:{tmp_path}/echo"
    with Command("echo", "--host", address) as command:
        command.wait_for("echo on ")
        with connect(address) as client:
            stop_with_output_waiting(command, client, address)
            command.signal(signal.SIGINT)
            assert command.result() == 130
        assert "Traceback" not in "\n".join(command.lines)


def test_echo_on_a_port_in_use_says_so_in_one_line_and_exits_with_1():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_python("-m", "tstpool", "echo", "--port", str(port), check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["echo", "--port", "70000"],
        ["echo", "--port", "http"],
        ["echo", "--workers", "0"],
        ["echo", "--trigger", "hair"],
        ["echo", "--seconds", "nan"],
        ["echo", "--seconds", "soon"],
        ["demo", "--seconds", "0"],
        ["demo", "--workers", "1"],
    ],
)
def test_wrong_use_is_explained_and_exits_with_2(arguments, capsys):
    import tstpool.__main__

    with pytest.raises(SystemExit) as ended:
        tstpool.__main__.main(arguments)
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert "usage: python -m tstpool" in complaint
    assert not arguments or arguments[-1] in complaint


@pytest.mark.parametrize("command", ["echo", "demo"])
def test_ctrl_c_that_a_command_did_not_catch_exits_with_130(command, monkeypatch):
    """As a shell does; no traceback."""
    import tstpool.__main__
    from tstpool._cli import demo, echo

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr({"echo": echo, "demo": demo}[command], "run", interrupted)
    assert tstpool.__main__.main([command]) == 130


def run_without_rich(*arguments):
    hide = "import runpy, sys; sys.modules['rich'] = None; runpy.run_module('tstpool', run_name='__main__')"
    return run_python("-c", hide, *arguments, check=False)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["echo", "--help"], ["demo", "--help"]])
def test_help_and_version_work_without_rich(arguments):
    done = run_without_rich(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tstpool" in done.stdout


@pytest.mark.parametrize("command", ["echo", "demo"])
def test_a_command_without_rich_says_how_to_get_it_and_exits_with_2(command):
    done = run_without_rich(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tstpool: the command line needs the package 'rich': pip install rich\n"


def test_an_import_error_that_is_not_about_rich_is_not_hidden():
    hide = (
        "import runpy, sys; sys.modules['tstpool._cli.wire'] = None; runpy.run_module('tstpool', run_name='__main__')"
    )
    done = run_python("-c", hide, "echo", check=False)
    assert done.returncode == 1
    assert "tstpool._cli.wire" in done.stderr
    assert "pip install" not in done.stderr


def test_importing_the_package_imports_neither_the_command_line_nor_what_it_needs():
    code = "import sys, tstpool; print([name for name in sys.modules if name.startswith(('rich', 'tstpool._cli'))])"
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0.00 ms"), (0.000312, "0.31 ms"), (0.0124, "12.4 ms"), (0.301, "301 ms"), (1.2, "1.20 s")],
)
def test_a_duration_is_three_digits_and_a_unit(seconds, text):
    from tstpool._cli import show

    assert show.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (640, "640 B"), (12_345, "12.3 kB"), (350e6, "350 MB"), (1.2e9, "1.20 GB")]
)
def test_a_size_has_the_unit_that_suits(count, text):
    from tstpool._cli import show

    assert show.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (999_949, "999.9k"), (1.25e6, "1.2M")]
)
def test_a_count_is_shortened(count, text):
    from tstpool._cli import show

    assert show.short(count) == text


def test_a_status_line_names_the_busiest_workers_only(make_pool):
    """With 32 workers the line still fits: idle ones are left out and the rest is counted."""
    import dataclasses

    import tstpool
    from tstpool._cli import echo

    before = make_pool(tstpool.TstHandler(), workers=12).stats()
    busy = [dataclasses.replace(worker, exec_count=worker.exec_count + 2000) for worker in before.workers]
    after = dataclasses.replace(before, workers=tuple(busy), messages=before.messages + 24_000)
    assert echo.status_line(before, before, 1.0).endswith("  -")
    line = echo.status_line(before, after, 2.0)
    assert " 12.0k " in line
    assert line.endswith("0:1.0k 1:1.0k 2:1.0k 3:1.0k 4:1.0k 5:1.0k 6:1.0k 7:1.0k and 4 more")


def test_the_echo_example_echoes(make_pool, make_client):
    example = runpy.run_path(str(ROOT / "examples" / "echo.py"))
    talk(make_client(make_pool(example["Echo"]())), b"hello")
