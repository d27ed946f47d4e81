"""What a module compiled against another version of tstpool relies on. Where these fail, somebody's build breaks.

Functions may be added, never changed. Classes that others subclass (TstHandler, TstNogilHandler) keep their size: a new
hook takes the place of a reserved one. TstSocket and TstPool grow out of their _abi_reserve, so they keep theirs, too.
(When a class grows all the same, a module that was compiled before gets a RuntimeWarning at import; when it shrinks, a
ValueError.) What breaks the ABI in another way shortens TstNogilHandler._abi_fuse by one. Each belongs into the change
log's section for the ABI.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import downstream_handlers
import pytest
from helpers import ROOT, patient, run_python

import tstpool
import tstpool._core

PXD = (ROOT / "tstpool" / "_core.pxd").read_text()

SOCKET = "struct __pyx_obj_7tstpool_5_core_TstSocket *"
FUNCTIONS = {
    "tst_send": f"Py_ssize_t ({SOCKET}, void const *, size_t)",
    "tst_send_message": f"Py_ssize_t ({SOCKET}, void const *, size_t)",
    "tst_close": f"int ({SOCKET})",
    "tst_send_eof": f"int ({SOCKET})",
    "tst_need_send": f"int ({SOCKET})",
    "tst_pause": f"int ({SOCKET})",
    "tst_resume": f"int ({SOCKET})",
}

# Bytes behind what every Python object has.
SIZES = {"TstHandler": 8, "TstNogilHandler": 56, "TstSocket": 168, "TstData": 80, "TstPool": 232}

HOOKS = [
    "TstStat connected(self, TstSocket sock) noexcept nogil",
    "TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil",
    "TstStat writable(self, TstSocket sock) noexcept nogil",
    "void disconnected(self, TstSocket sock) noexcept nogil",
    "void release(self, void *state) noexcept nogil",
    "TstStat eof(self, TstSocket sock) noexcept nogil",
    *(f"void _reserved_{i}(self) noexcept nogil" for i in range(1, 8)),
]

STATS = {"TST_SUSPEND": 0, "TST_RUN": 1, "TST_SEND": 2, "TST_RECONNECTED": 3, "TST_DISCONNECT": 4}


def body_of(header):
    """The indented lines below a line of _core.pxd, without comments."""
    lines = PXD.partition(header + "\n")[2].splitlines()
    body = []
    for line in lines:
        if line and not line.startswith((" ", "#")):
            break
        body.append(line.partition("#")[0].strip())
    return [line for line in body if line]


def test_the_functions_have_the_signatures_that_others_were_compiled_with():
    found = {name: re.search('"(.*)"', repr(capsule))[1] for name, capsule in tstpool._core.__pyx_capi__.items()}
    assert {name: found.get(name) for name in FUNCTIONS} == FUNCTIONS


def test_all_public_functions_are_known_here():
    names = {name for name in tstpool._core.__pyx_capi__ if name.startswith("tst_")}
    assert names == set(FUNCTIONS)
    assert names <= set(re.findall(r"\w+", (ROOT / "tstpool" / "__init__.pxd").read_text()))


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of(name):
    assert getattr(tstpool, name).__basicsize__ - object.__basicsize__ == SIZES[name]


def test_the_table_of_hooks_is_only_changed_in_its_reserved_places():
    methods = [line.removeprefix("cdef ") for line in body_of("cdef class TstNogilHandler(TstHandler):") if "(" in line]
    assert methods == HOOKS


def test_the_fuse_has_its_length():
    attributes = [line for line in body_of("cdef class TstNogilHandler(TstHandler):") if "(" not in line]
    assert attributes == ["cdef size_t state_size", "cdef long long _abi_fuse[4]"]


def test_what_handlers_may_read_of_a_socket_comes_first():
    """The places of `id` and `state` do not depend on what is added behind them."""
    assert body_of("cdef class TstSocket:")[:2] == ["cdef readonly uint64_t id", "cdef void *state"]


def test_a_handler_in_c_returns_what_one_in_python_does():
    declared = dict(re.findall(r"(TST_\w+) = (\d+)", "\n".join(body_of("ctypedef enum TstStat:"))))
    assert {name: int(number) for name, number in declared.items()} == STATS
    for name, number in downstream_handlers.STATS.items():
        assert number == STATS["TST_" + name] == tstpool.TstStat[name]


def test_the_engine_means_the_same_numbers():
    """Its layers know no classes, so they have a list of their own."""
    text = (ROOT / "tstpool" / "_entry.pxd").read_text()
    assert {"TST_" + name: int(number) for name, number in re.findall(r" STAT_(\w+) = (\d+)", text)} == STATS


# ----------------------------------------------------------------------------------- compiled against another version

HANDLER = """# cython: language_level=3, freethreading_compatible=True
from tstpool cimport TST_SUSPEND, TstNogilHandler, TstSocket, TstStat, tst_send

cdef class Handler(TstNogilHandler):
    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        tst_send(sock, data, size)
        return TST_SUSPEND
"""

BUILD = """
import sys
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
sys.argv[1:] = ["--quiet", "build_ext", "--inplace"]
setup(ext_modules=cythonize([Extension("other", ["other.pyx"])], include_path=["headers"], quiet=True))
"""

USE = """
import socket, other, tstpool
pool = tstpool.TstPool(other.Handler(), workers=1)
address = pool.listen("127.0.0.1", 0)
with pool, socket.create_connection(address, timeout=10) as client:
    client.sendall(b"hello")
    print(client.recv(5).decode())
"""


def use_module_of_another_version(folder, before, after):
    """Builds a handler against headers in which `before` reads `after`, and uses it with the tstpool under test."""
    headers = folder / "headers" / "tstpool"
    headers.mkdir(parents=True)
    for header in (ROOT / "tstpool").glob("*.pxd"):
        shutil.copy(header, headers)
    text = (headers / "_core.pxd").read_text()
    assert before in text
    (headers / "_core.pxd").write_text(text.replace(before, after))
    (folder / "other.pyx").write_text(HANDLER)
    # The sanitizers' libraries are for the tests, not for the compiler.
    env = {**os.environ, "LD_PRELOAD": "", "CFLAGS": os.environ.get("CFLAGS", "") + " -O0"}
    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, env=env, capture_output=True, text=True, timeout=patient(60)
    )
    assert built.returncode == 0, built.stdout + built.stderr
    # -c puts the current directory in front: the engine must be found on the way it was found here.
    path = os.pathsep.join([str(ROOT), str(folder)])
    return run_python("-W", "error", "-c", USE, check=False, cwd=folder, env={"PYTHONPATH": path})


def test_a_module_of_an_older_abi_is_refused_at_import(tmp_path):
    """It was compiled against a longer fuse: a ValueError says so, instead of a crash later."""
    done = use_module_of_another_version(tmp_path, "_abi_fuse[4]", "_abi_fuse[5]")
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: tstpool._core.TstNogilHandler size changed")


def test_a_module_that_knows_a_hook_in_a_reserved_place_is_used(tmp_path):
    """So hooks are added: whoever was compiled with more or fewer of them works. (And the control for the test above:
    it isn't the way these modules are built that makes them fail.)"""
    done = use_module_of_another_version(
        tmp_path, "cdef void _reserved_1(self) noexcept nogil", "cdef void later(self, int number) noexcept nogil"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "hello"), done.stderr


def test_the_include_path_is_where_the_headers_are():
    assert (Path(tstpool.get_include()) / "tstpool" / "__init__.pxd").is_file()
