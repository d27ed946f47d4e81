"""tstkv: a key-value server that speaks Redis's protocol, in Cython on tstpool. ``python -m tstkv`` runs it."""

from tstkv._kv import KeyValueHandler

__version__ = "0.1.0"
__all__ = ["KeyValueHandler", "__version__"]
