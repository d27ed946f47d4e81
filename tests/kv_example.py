"""What the tests of examples/kv share: its build, the two servers, and conversations with them."""

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from helpers import ROOT, SANITIZER, connect, patient, recv_until_eof, wait_until

SOURCE = ROOT / "examples" / "kv"
TOOLS = ("redis-server", "redis-cli", "redis-benchmark")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
WHY_MISSING = f"not installed: {', '.join(MISSING)} (Debian: apt-get install redis-server redis-tools)"
# A sanitizer that is preloaded for tstpool has no business in Redis's programs.
PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@functools.cache
def built_site():
    """The directory that holds what the example's wheel installs, and the probe. Built once, as a user's pip would."""
    work = Path(tempfile.mkdtemp(prefix="tstkv-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    made = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(SOURCE, work / "source", ignore=made)
    flags = f"-fsanitize={SANITIZER} -fno-omit-frame-pointer -g -O1" if SANITIZER else "-O1"
    env = {**os.environ, "TSTKV_PROBE": "1", "CFLAGS": f"{os.environ.get('CFLAGS', '')} {flags}"}
    if SANITIZER:
        env["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} -fsanitize={SANITIZER}"
        env["ASAN_OPTIONS"] = f"{os.environ.get('ASAN_OPTIONS', '')}:detect_leaks=0"  # compilers leave that to exit()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(work)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=work / "source", env=env, capture_output=True, text=True, timeout=patient(200), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Cython's and the compiler's.
    complaint = r"^(?:warning|performance hint): \S+\.p(?:yx|xd):.*|.*: warning: .*"
    complaints = re.findall(complaint, done.stdout + done.stderr, re.MULTILINE)
    assert not complaints, complaints
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


@functools.cache
def probe():
    """The module through which tests reach the layers without a connection."""
    (path,) = built_site().glob("_tstkv_probe*.so")
    spec = importlib.util.spec_from_file_location("_tstkv_probe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running_tstkv(*arguments, script=None):
    """`python -m tstkv` with these arguments, or a script of one's own that prints the same line; gives its address."""
    command = [sys.executable, *(["-c", script] if script else ["-m", "tstkv", "--port", "0"]), *arguments]
    paths = [str(built_site()), str(ROOT), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"tstkv \S+ listens on (\S+) port (\d+)\n", line)
            assert found, f"it printed {line!r} instead of its address"
            yield found[1], int(found[2])
        finally:
            process.terminate()
            status = process.wait(patient(20))
    assert status == 0, f"tstkv ended with {status}"


@contextlib.contextmanager
def running_redis(*arguments):
    """A real redis-server that is as empty-handed as tstkv; gives the address of its Unix socket."""
    with tempfile.TemporaryDirectory(prefix="tstkv-redis-") as where:
        path = f"{where}/redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", path, "--dir", where, "--databases", "1"]
        command += ["--save", "", "--appendonly", "no", "--proto-max-bulk-len", "32mb", *arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=PLAIN_ENVIRONMENT) as process:
            try:
                wait_until(lambda: accepts(path), message="redis-server accepts connections")
                yield f"unix:{path}"
            finally:
                process.terminate()


def accepts(path):
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def talk(address, pieces):
    """Sends these pieces, one after the other, and returns all that the server sends until it closes."""
    with connect(address, timeout=20) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may close before it has read everything
            for piece in pieces:
                client.sendall(piece)
        return recv_until_eof(client)


def array(*arguments):
    """A request, as client libraries send it."""
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in arguments)


def arrays(requests):
    return b"".join(array(*words) for words in requests)


def inline(*arguments):
    """A request, as people type it: a line. Every word is quoted, every byte of it that needs it escaped."""
    return b" ".join(b'"' + b"".join(map(escaped, word)) + b'"' for word in arguments) + b"\r\n"


def escaped(byte):
    return b"%c" % byte if 32 <= byte < 127 and byte not in b'"\\' else b"\\x%02x" % byte


def cut(stream, places):
    """The stream in pieces, cut at these places."""
    places = sorted({place for place in places if 0 < place < len(stream)})
    return [stream[begin:end] for begin, end in zip([0, *places], [*places, len(stream)], strict=True)]


def replies(stream):
    """The replies that a stream of RESP2 or RESP3 consists of, each as the server has sent it."""
    found, at = [], 0
    while at < len(stream):
        end = reply_end(stream, at)
        found.append(stream[at:end])
        at = end
    return found


def reply_end(stream, at):
    line_end = stream.index(b"\r\n", at) + 2
    kind, text = stream[at : at + 1], stream[at + 1 : line_end - 2]
    if kind in b"$=" and text != b"-1":
        return line_end + int(text) + 2
    if kind in b"*~%" and text != b"-1":
        for _ in range(int(text) * (2 if kind == b"%" else 1)):
            line_end = reply_end(stream, line_end)
    return line_end


def elements(reply):
    """What an array holds, each element as the server has sent it."""
    return replies(reply[reply.index(b"\r\n") + 2 :])
