"""A local Ray cluster on a busy machine."""

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


def test_a_node_that_is_late_is_started_once_more():
    start, calls = starts(LATE, None)
    start_local_cluster(start)
    assert len(calls) == 2


def test_a_node_that_is_late_twice_is_one_line():
    start, calls = starts(LATE, LATE)
    with pytest.raises(TidarError, match="within 30 s, twice; end other work or give it more cores"):
        start_local_cluster(start)
    assert len(calls) == 2


def test_another_error_is_raised_as_it_is():
    start, calls = starts(OSError("no room"))
    with pytest.raises(OSError, match="no room"):
        start_local_cluster(start)
    assert len(calls) == 1
