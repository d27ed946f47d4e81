"""Builds the one extension module, tstpool._core. Everything that is only data stands in pyproject.toml.

Environment variables choose a flavour of the build (the Makefile's targets set them):

    TSTPOOL_DEBUG=1          invariants are checked (`if TST_DEBUG:` in the sources), -O1 -g
    TSTPOOL_SANITIZE=...     "address,undefined" or "thread": gcc's sanitizers; "fuzzer-no-link,address": clang's, for
                             tests/fuzz, whose runtime library is preloaded
    TSTPOOL_COVERAGE=1       gcc counts how often each line is executed, -O0: tests/coverage_map.py reads the counts
    TSTPOOL_WERROR=1         every warning of the C compiler is an error
    TSTPOOL_WHITEBOX=1       also builds the tests' modules, each beside its source; never part of a wheel

Warnings and performance hints of Cython are errors in all of them: see cythonize_strictly.
"""

import contextlib
import glob
import os
import platform
import sys

if sys.platform != "linux":
    sys.exit(f"tstpool builds only on Linux, because it is made of epoll and eventfd; this is {sys.platform}.")
if platform.python_implementation() != "CPython" or sys.version_info < (3, 10):
    this = f"{platform.python_implementation()} {platform.python_version()}"
    sys.exit(f"tstpool needs CPython 3.10 or newer; this is {this}.")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def env_flag(name):
    return os.environ.get(name, "0") not in ("", "0")


DEBUG = env_flag("TSTPOOL_DEBUG")
COVERAGE = env_flag("TSTPOOL_COVERAGE")
WERROR = env_flag("TSTPOOL_WERROR")
WHITEBOX = env_flag("TSTPOOL_WHITEBOX")
SANITIZE = os.environ.get("TSTPOOL_SANITIZE", "")
if SANITIZE not in ("", "address,undefined", "thread", "fuzzer-no-link,address"):
    sys.exit(f"TSTPOOL_SANITIZE is {SANITIZE!r}: not one of those that the head of setup.py names.")

# Each flavour has its own directory of generated C and objects: neither Cython nor distutils notices changed options.
FLAVOUR = "-".join(
    name
    for name, wanted in [
        ("debug", DEBUG),
        ("asan", SANITIZE == "address,undefined"),
        ("tsan", SANITIZE == "thread"),
        ("fuzz", SANITIZE == "fuzzer-no-link,address"),
        ("coverage", COVERAGE),
        ("werror", WERROR),
    ]
    if wanted
)
BUILD_BASE = os.path.join("build", FLAVOUR or "release")


def compile_args():
    args = ["-fvisibility=hidden"]  # only PyInit__core is for others; internal calls become direct
    if SANITIZE:
        args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
        if "undefined" in SANITIZE:
            args += ["-fno-sanitize-recover=undefined"]
    elif COVERAGE:
        # Counters are shared by threads. -O0 and no -g: each line keeps code of its own.
        args += ["--coverage", "-fprofile-update=atomic", "-O0"]
    elif DEBUG:
        args += ["-g", "-O1"]
    else:
        args += ["-O3"]
    if WERROR:
        args += ["-Wall", "-Wextra", "-Werror"]
    return args


def make_extension(name, source, *c_sources):
    return Extension(
        name,
        [source, *c_sources],
        # A changed layer rebuilds all that is made of it.
        depends=glob.glob("tstpool/*.px[di]") + glob.glob(os.path.dirname(source) + "/*.h"),
        include_dirs=[os.path.dirname(source)] if c_sources else [],
        define_macros=[("TST_DEBUG", "1" if DEBUG else "0")],
        extra_compile_args=compile_args(),
        extra_link_args=([f"-fsanitize={SANITIZE}"] if SANITIZE and "fuzzer" not in SANITIZE else [])
        + (["--coverage"] if COVERAGE else []),
    )


class Heard:
    """Stands in for standard error: passes everything on and remembers it."""

    def __init__(self, stream):
        self.stream = stream
        self.text = ""

    def write(self, text):
        self.text += text
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def cythonize_strictly(extensions):
    """cythonize(), failing on every warning and performance hint.

    "Performance hint" is what Cython says of a function that takes the GIL back after each call because somebody
    forgot `noexcept`. It is printed and nothing more, and there is no option to make it an error, so we listen to
    what is printed. The C file is deleted then: it would be up to date, and the next build would hear nothing.
    """
    from Cython.Build import cythonize

    heard = Heard(sys.stderr)
    with contextlib.redirect_stderr(heard):
        cythonized = cythonize(
            extensions,
            # Directives that change what the code means stand in the head of each .pyx file, not here.
            compiler_directives={"language_level": "3"},
            build_dir=os.path.join(BUILD_BASE, "c"),
            # Reports of sanitizers and debuggers then name lines of the Cython files.
            emit_linenums=bool(SANITIZE or DEBUG),
        )
    complaints = [line for line in heard.text.splitlines() if line.startswith(("warning:", "performance hint:"))]
    if complaints:
        for extension in cythonized:
            for source in extension.sources:
                if source.endswith(".c") and os.path.exists(source):
                    os.unlink(source)
        sys.exit("\n".join(["Cython complained, and here that is an error:", *complaints]))
    return cythonized


class BuildExt(build_ext):
    """Cythonizes only when something is compiled: `pip` also runs setup.py to ask for names and requirements."""

    def build_extensions(self):
        c_sources = {extension.name: extension.sources for extension in cythonize_strictly(self.extensions)}
        for extension in self.extensions:
            extension.sources = c_sources[extension.name]
        super().build_extensions()


class Cythonize(BuildExt):
    """`setup.py cythonize` makes the C files alone. They are the same for each interpreter, which compiles them."""

    def run(self):
        cythonize_strictly(self.distribution.ext_modules)


extensions = [make_extension("tstpool._core", "tstpool/_core.pyx")]
if WHITEBOX:
    for name in ("tests.whitebox._whitebox", "tests.downstream.downstream_handlers"):
        extensions.append(make_extension(name, name.replace(".", "/") + ".pyx"))
    if not COVERAGE and not SANITIZE:  # they can't follow the simulation's threads, which are coroutines
        here = "tests/simulation/"
        extensions.append(
            make_extension(
                "tests.simulation._simulation", here + "_simulation.pyx", here + "kernel.c", here + "scheduler.c"
            )
        )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt, "cythonize": Cythonize},
    options={"build": {"build_base": BUILD_BASE}},
)
