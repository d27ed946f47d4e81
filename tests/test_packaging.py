"""What is shipped holds what its users need, says what it is, and refuses in one sentence where it cannot work."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import FREE_THREADED, ROOT, connect, patient, recv_exact, run_python

import tstpool
import tstpool._core

PUBLIC = {
    *("TstNogilHandler", "get_include"),
    *("TstPool", "TstHandler", "TstSocket", "TstData", "TstStat", "TstSockType", "PoolStats", "WorkerStats"),
    *("Raw", "Fixed", "Delimited", "LengthPrefixed"),
    *("serve", "TstError", "ConnectionClosed", "MessageTooLarge", "SendQueueFull"),
    *("EPOLLIN", "EPOLLOUT", "EPOLLPRI", "EPOLLRDHUP", "EPOLLERR", "EPOLLHUP", "EPOLLET", "EPOLLONESHOT"),
}


def test_version_is_the_one_of_the_metadata():
    assert tstpool.__version__ == importlib.metadata.version("tstpool")


def test_engine_has_no_runtime_dependency():
    required = importlib.metadata.requires("tstpool") or []
    assert [line for line in required if "extra ==" not in line] == []


def test_only_public_names_in_dir():
    shown = {name for name in dir(tstpool) if not name.startswith("_")}
    assert shown == PUBLIC
    assert set(tstpool.__all__) - {"__version__"} == PUBLIC


def test_import_leaves_the_gil_as_it_was():
    """B57."""
    # In a fresh interpreter: the test runner's own plugins may have switched it on. -W error: CPython warns then.
    code = "import sys, tstpool; print(getattr(sys, '_is_gil_enabled', lambda: True)())"
    done = run_python("-W", "error", "-c", code)
    assert done.stdout.strip() == str(not FREE_THREADED)


def test_import_says_in_one_sentence_that_it_needs_linux():
    done = run_python("-c", "import sys; sys.platform = 'win32'; import tstpool", check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "Linux" in last and "win32" in last


def test_import_of_an_unbuilt_tree_says_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "tstpool", tmp_path / "tstpool", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = run_python("-S", "-c", "import tstpool", check=False, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "pip install" in last or "make" in last


def test_build_says_in_one_sentence_that_it_needs_linux():
    code = "import sys; sys.platform = 'darwin'; exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    done = run_python("-c", code, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "tstpool builds only on Linux, because it is made of epoll and eventfd; this is darwin."
    )


def build(what, source, target, path=None):
    """`what`: "wheel" or "sdist", made of the folder `source` by its own pyproject.toml, as a user's pip would.

    `path`: where the build finds other packages beside the environment's. What is in the files matters here and not how
    fast they are: none of the flavours of setup.py, and -O0, which has to come last to be heard.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("TSTPOOL_")}
    compiler = target / "cc-O0"
    compiler.write_text(f'#!/bin/sh\nexec {env.get("CC", "cc")} "$@" -O0\n')
    compiler.chmod(0o755)
    env["CC"] = str(compiler)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    code = f"import setuptools.build_meta as backend; backend.build_{what}({str(target)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True, timeout=patient(100)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stderr, done.stderr


def without_what_was_made(source, target):
    made = [".git", ".venv*", ".*_cache", ".hypothesis", "build", "dist", "*.so", "*.egg-info", "__pycache__"]
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(*made))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel): the sdist made of this tree, the wheel made of that sdist."""
    work = tmp_path_factory.mktemp("packaging")
    build("sdist", without_what_was_made(ROOT, work / "tree"), work)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    build("wheel", work / sdist.name.removesuffix(".tar.gz"), work)
    (wheel,) = work.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A folder with nothing but what the wheel holds."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def downstream(site, tmp_path_factory):
    """A folder with tests/downstream, built as a package of somebody else's against the wheel alone."""
    work = tmp_path_factory.mktemp("downstream")
    source = without_what_was_made(ROOT / "tests" / "downstream", work / "source")
    build("wheel", source, work, path=site)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def package_files(*patterns):
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "tstpool").rglob(pattern)}


def test_wheel_holds_the_package_its_types_and_the_cython_headers(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    extension = "tstpool/_core" + sysconfig.get_config_var("EXT_SUFFIX")
    expected = {extension} | package_files("*.py", "*.pxd", "*.pyi", "py.typed")
    assert {"tstpool/__init__.pxd", "tstpool/_core.pxd", "tstpool/py.typed"} <= expected
    found = {name for name in names if ".dist-info/" not in name}
    assert found == expected  # so: no tests, no .pyx, no .pxi, no C
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_what_it_takes_to_build_and_test(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "README.md", "tests/helpers.py", ".ci/prepare"}
    assert expected | package_files("*.py", "*.pyx", "*.pxi", "*.pxd", "*.pyi", "py.typed") <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name in ("tstpool/_core.c",)]


def test_wheel_works_where_no_source_is(site, tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import socket, tstpool
assert tstpool.__file__.startswith(sys.argv[1]), tstpool.__file__
class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)
pool = tstpool.TstPool(Echo(), workers=1)
address = pool.listen("127.0.0.1", 0)
with pool, socket.create_connection(address, timeout=10) as client:
    client.sendall(b"hello")
    print(client.recv(5).decode())
"""
    done = run_python("-I", "-c", code, str(site), cwd=tmp_path)
    assert done.stdout.strip() == "hello"


def test_handlers_in_cython_leave_the_gil_as_it_was(site, downstream, tmp_path):
    code = """
import os, sys
import downstream_handlers, tstpool
for module, folder in zip((tstpool, downstream_handlers), sys.argv[1:]):
    assert module.__file__.startswith(folder + os.sep), module.__file__
assert tstpool.get_include() == sys.argv[1]  # where its setup.py has taken the headers from
print(getattr(sys, "_is_gil_enabled", lambda: True)())
"""
    path = os.pathsep.join([str(site), str(downstream)])
    done = run_python("-W", "error", "-c", code, str(site), str(downstream), cwd=tmp_path, env={"PYTHONPATH": path})
    assert done.stdout.strip() == str(not FREE_THREADED)


def test_handlers_in_cython_need_nothing_but_the_wheel(site, downstream, tmp_path):
    """Their server, in a process that knows no source of ours, serves bytes, messages and Python hooks."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(downstream)])}
    with subprocess.Popen(
        [sys.executable, "-m", "downstream_server"],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            ports = dict(server.stdout.readline().split() for _ in range(3))
            for name, sent, expected in [
                ("raw", b"hello", b"hello"),
                ("framed", b"\0\0\0\5hello" * 100, b"\0\0\0\5hello" * 100),
                ("upper", b"\0\0\0\5hello", b"\0\0\0\5HELLO"),
            ]:
                with connect(("127.0.0.1", int(ports[name]))) as client:
                    client.sendall(sent)
                    assert recv_exact(client, len(expected)) == expected
            out, _ = server.communicate(timeout=patient(20))  # the end of its input ends it
        finally:
            server.kill()
    assert server.returncode == 0
    counts = json.loads(out)
    assert (counts["connected"], counts["received"], counts["released"], counts["broken"]) == (1, 100, 1, 0)


def test_the_tree_under_test_is_this_one():
    assert Path(tstpool._core.__file__).parent == ROOT / "tstpool"
