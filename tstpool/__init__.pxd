# cython: language_level=3
# What `from tstpool cimport ...` offers.
from tstpool._core cimport TstData, TstHandler, TstPool, TstSocket
