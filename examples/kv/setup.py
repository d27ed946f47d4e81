"""Builds tstkv._kv against the installed tstpool, as any package would that has a handler in Cython.

TSTKV_PROBE=1 also builds probe/_tstkv_probe.pyx, through which tests reach the layers without a connection.
"""

import glob
import os

from Cython.Build import cythonize
from setuptools import Extension, setup

import tstpool


def make_extension(name, source):
    depends = glob.glob("tstkv/*.pxd")
    return Extension(name, [source], depends=depends, extra_compile_args=["-fvisibility=hidden"])


extensions = [make_extension("tstkv._kv", "tstkv/_kv.pyx")]
if os.environ.get("TSTKV_PROBE", "0") not in ("", "0"):
    extensions.append(make_extension("_tstkv_probe", "probe/_tstkv_probe.pyx"))

setup(
    ext_modules=cythonize(
        extensions,
        include_path=[tstpool.get_include()],  # where `cimport tstpool` finds its headers
        compiler_directives={"language_level": "3"},
        build_dir="build/c",
    ),
)
