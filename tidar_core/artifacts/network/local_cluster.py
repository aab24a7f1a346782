"""Start of a Ray cluster on this machine.

What if the machine is too busy to start Ray in time?

Ray waits 30 s for a new node and has no setting for it. Two busy cores take longer at times, although nothing is wrong.
"""

from collections.abc import Callable

from tidar_core.errors import TidarError

__all__ = ["start_local_cluster"]

LATE = "timed out during startup"
"""Words of Ray's error, which has no class of its own."""


def start_local_cluster(start: Callable[[], object]) -> None:
    """Call `start`, which starts Ray; call it once more if the node is not up in time.

    Raises TidarError, in one line, if it is late again.
    """
    for attempts_left in (1, 0):
        try:
            start()
            return
        except Exception as error:
            if LATE not in str(error):
                raise
            if not attempts_left:
                raise TidarError(
                    "Ray did not start on this machine within 30 s, twice; end other work or give it more cores"
                ) from error
