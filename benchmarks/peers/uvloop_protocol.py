"""Echo with uvloop: the asyncio program, run by uvloop. Its Protocol is uvloop's fastest interface without tuning."""

import uvloop

from .asyncio_protocol import serve

if __name__ == "__main__":
    uvloop.run(serve())
