# SPDX-License-Identifier: Apache-2.0
"""How the server ends: answers that are being written have some seconds, then each ends with an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from uvicorn.config import Config
from uvicorn.server import Server


class EndingServer(Server):  # type: ignore[misc]  # checked without uvicorn
    """One that calls ``end``, in a thread, ``grace`` seconds after it began to stop, unless it is through by then. What
    is still being written can so be ended with an error, which clients understand; cut off, they could not tell it
    from a defect."""

    def __init__(self, config: Config, grace: float, end: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._grace, self._end = grace, end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        later = threading.Timer(self._grace, self._end or (lambda: None))
        later.start()
        try:
            await super().shutdown(sockets)
        finally:
            later.cancel()
