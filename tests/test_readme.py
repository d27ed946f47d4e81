"""README.md: its server and its handler in C run, its commands and its links exist."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import sysconfig

import pytest
from contract_helpers import ServerProcess, free_port, round_trip
from helpers import ROOT, connect, patient

import tstpool

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]

# These tests read the repository; a copy of the tree that a sanitizer's build is tested in has only a part of it.
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="not the whole repository")


def test_the_thirty_second_server_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    port = free_port()
    assert "port=20001" in code
    tell = (
        "def tell():\n"
        "    while True:\n"
        "        try:\n"
        f"            socket.create_connection(('127.0.0.1', {port}), 10).close()\n"
        f"            return print({port})\n"
        "        except ConnectionRefusedError:\n"
        "            time.sleep(0.001)\n"
        "threading.Thread(target=tell).start()\n"
    )
    with ServerProcess(tell + code.replace("port=20001", f"port={port}")) as server, connect(server.addr) as client:
        assert round_trip(client, b"hello") == b"hello"
        server.process.send_signal(signal.SIGINT)
        assert client.recv(1) == b""
        server.finish()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_handler_in_c_compiles_and_echoes(make_pool, make_client, tmp_path):
    (code,) = re.findall(r"```cython\n(.*?)```", README, re.S)
    source, built = tmp_path / "readme_echo.pyx", tmp_path / f"readme_echo{sysconfig.get_config_var('EXT_SUFFIX')}"
    source.write_text(code)
    compiler = ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source.with_suffix(".c"))]
    for command in (
        [sys.executable, "-m", "cython", "-I", tstpool.get_include(), str(source)],
        [*compiler, "-o", str(built)],
    ):
        subprocess.run(command, check=True, timeout=patient(120))
    spec = importlib.util.spec_from_file_location("readme_echo", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    client = make_client(make_pool(module.Echo(), framing=tstpool.LengthPrefixed(4)))
    assert round_trip(client, b"\0\0\0\5hello") == b"\0\0\0\5hello"


@pytest.mark.parametrize("page", PAGES)
def test_make_knows_every_command_that_is_named(page):
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()}
    commands = set(re.findall(r"(?:`|^    )make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    assert commands <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / link).exists(), link
