"""`aiproxy serve` on a socket that was passed, with an event loop that is blocked now and then.

    python tests/blocked.py FD SEED SHARE serve --config FILE

Descriptor FD is a listening socket; the daemon gets it as systemd passes one, as descriptor 3.
SHARE is how much of the time the loop is blocked, by 0 to 200 ms at a time, at moments that SEED
decides. What blocks it is here alone: a callback of the loop that sleeps.
"""

import asyncio
import os
import random
import sys
import time

from aiproxy.__main__ import main
from aiproxy.daemon import Daemon
from aiproxy.systemd import FIRST_SOCKET

LONGEST = 0.2  # seconds of one block
_run = Daemon.run


class Blocker:
    """Blocks the loop that it is started in, for ever again.

    Args:
        seed: decides when and how long.
        share: of the time, below 1; 0: never.
    """

    def __init__(self, seed: str, share: float) -> None:
        self._choose = random.Random(seed)  # noqa: S311 - moments, no secrets
        self._share = share

    def start(self) -> None:
        """Block from now on."""
        if self._share:
            self._later()

    def _later(self) -> None:
        pause = LONGEST * (1 - self._share) / self._share
        loop = asyncio.get_running_loop()
        loop.call_later(self._choose.uniform(0, pause), self._block)

    def _block(self) -> None:
        time.sleep(self._choose.uniform(0, LONGEST))
        self._later()


def pass_socket(number: int) -> None:
    """Let this process have a socket as if systemd had passed it."""
    if number != FIRST_SOCKET:
        os.dup2(number, FIRST_SOCKET)
        os.close(number)
    given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
    os.environ.update(given)


if __name__ == "__main__":
    descriptor, seed, share, *command = sys.argv[1:]
    blocker = Blocker(seed, float(share))

    async def run(self: Daemon) -> None:
        """Run the daemon in the loop that is blocked."""
        blocker.start()
        await _run(self)

    Daemon.run = run  # type: ignore[method-assign]  # no product code knows of it
    pass_socket(int(descriptor))
    sys.exit(main(command))
