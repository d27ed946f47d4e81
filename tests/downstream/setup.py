from Cython.Build import cythonize
from setuptools import Extension, setup

import tstpool

setup(
    py_modules=["downstream_server"],
    ext_modules=cythonize(
        [Extension("downstream_handlers", ["downstream_handlers.pyx"])],
        include_path=[tstpool.get_include()],
    ),
)
