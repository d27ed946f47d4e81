"""Echo with tstpool's compiled handlers (_nogil.pyx); framed if `framed` is given."""

import sys

from tstpool import LengthPrefixed, TstPool

from ..build import extension

if __name__ == "__main__":
    handlers = extension("_nogil")
    pool = (
        TstPool(handlers.FramedEcho(), framing=LengthPrefixed(4))
        if sys.argv[1:] == ["framed"]
        else TstPool(handlers.Echo())
    )
    print(pool.listen("127.0.0.1", 0, backlog=4096)[1], flush=True)
    pool.serve_forever()
