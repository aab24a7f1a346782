"""Start of a Ray cluster on this machine.

What if the machine is too busy to start Ray in time?

Ray waits 30 s for a new node and has no setting for it. Two busy cores take longer at times, although nothing is wrong.

Which of Ray's processes are left out?

One reads the workers' logs for the driver, and one serves the dashboard. Callers set `log_to_driver` and
`include_dashboard` to False. Ray starts both processes nevertheless, and waits until the second is up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tidar_core.errors import TidarError

__all__ = ["start_local_cluster"]

LATE = "timed out during startup"
"""Words of Ray's error, which has no class of its own."""


def start_local_cluster(start: Callable[[], object], node: Any, services: Any) -> None:
    """Call `start`, which starts Ray; call it once more if the node is not up in time.

    node      Ray's class of nodes, and
    services  Ray's module of processes: the core does not import Ray

    Raises TidarError, in one line, if it is late again.
    """
    for attempts_left in (1, 0):
        try:
            with _fewer_processes(node, services):
                start()
            return
        except Exception as error:
            if LATE not in str(error):
                raise
            if not attempts_left:
                raise TidarError(
                    "Ray did not start on this machine within 30 s, twice; end other work or give it more cores"
                ) from error


@contextmanager
def _fewer_processes(node: Any, services: Any) -> Iterator[None]:
    """Make Ray start no reader of logs and no server of a dashboard."""
    with (
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),  # no address, no process
        _replaced(node, "start_log_monitor", lambda _: None),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
