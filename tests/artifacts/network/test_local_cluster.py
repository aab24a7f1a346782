"""A local Ray cluster on a busy machine, and which of Ray's processes it has."""

from types import SimpleNamespace

import pytest

from tidar_core.artifacts.network.local_cluster import start_local_cluster
from tidar_core.errors import TidarError

LATE = Exception("The current node timed out during startup. This could happen because the GCS has become overloaded.")


def starts(*outcomes):
    """A start with these outcomes one after the other, and the calls so far."""
    left, calls = list(outcomes), []

    def start():
        calls.append(None)
        if (outcome := left.pop(0)) is not None:
            raise outcome

    return start, calls


def ray():
    """Stand-ins of Ray's class of nodes and its module of processes."""
    return SimpleNamespace(start_log_monitor="logs"), SimpleNamespace(start_api_server="dashboard")


def test_a_node_that_is_late_is_started_once_more():
    start, calls = starts(LATE, None)
    start_local_cluster(start, *ray())
    assert len(calls) == 2


def test_a_node_that_is_late_twice_is_one_line():
    start, calls = starts(LATE, LATE)
    with pytest.raises(TidarError, match="within 30 s, twice; end other work or give it more cores"):
        start_local_cluster(start, *ray())
    assert len(calls) == 2


def test_another_error_is_raised_as_it_is():
    start, calls = starts(OSError("no room"))
    with pytest.raises(OSError, match="no room"):
        start_local_cluster(start, *ray())
    assert len(calls) == 1


def test_neither_logs_nor_a_dashboard_have_a_process_and_a_later_ray_of_others_has_both():
    node, services = ray()
    started = []
    start_local_cluster(
        lambda: started.append((node.start_log_monitor(node), services.start_api_server(False))), node, services
    )
    assert started == [(None, ("", None))]
    assert (node.start_log_monitor, services.start_api_server) == ("logs", "dashboard")
