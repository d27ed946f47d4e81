"""Types of the compiled part. The docstrings are in _kv.pyx."""

from typing_extensions import Self, disjoint_base

from tstpool import TstNogilHandler

@disjoint_base
class KeyValueHandler(TstNogilHandler):
    def __new__(
        cls,
        *,
        maxmemory: int = 268435456,
        maxclients: int = 10000,
        max_argument: int = 33554432,
        max_request: int = 67108864,
        max_waiting: int = 1073741824,
        max_output: int = 268435456,
        output_pause: int = 1048576,
    ) -> Self: ...
    def stats(self) -> dict[str, int]: ...
