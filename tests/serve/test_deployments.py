"""Options of each deployment, and the configuration that Serve makes of them; without a cluster."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve._private import constants
from ray.serve._private.common import ReplicaState
from ray.serve._private.deployment_state import (
    ActorReplicaWrapper,
    DeploymentState,
    ReplicaHealthCheckResponse,
)
from ray.serve._private.version import DeploymentVersion

from serve_apps import app, shared_cluster
from serve_apps.api import bounds
from serve_apps.settings import ServeSettings


@pytest.fixture(scope="module")
def deployments(bundle):
    """Deployments by name."""
    settings = ServeSettings(model=bundle, hang_seconds=12, drain_seconds=7, max_replicas=3)
    ingress = app.build_app(settings)._bound_deployment
    decoder = ingress.init_args[0]._bound_deployment
    return {each.name: each._deployment_config for each in (ingress, decoder)}


def test_a_replica_that_goes_has_drain_seconds_to_finish(deployments):
    assert {name: config.graceful_shutdown_timeout_s for name, config in deployments.items()} == {
        "http": 7,
        "decoder": 7,
    }


def test_a_replica_is_replaced_after_three_failed_health_checks_in_hang_seconds(deployments):
    checks = constants.REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD
    assert (checks, checks * deployments["decoder"].health_check_period_s) == (3, 12)


@pytest.mark.parametrize(("response", "checks"), [("ACTOR_CRASHED", 1), ("APP_FAILURE", 3)])
def test_serve_replaces_a_replica_whose_process_has_died_after_one_check_and_another_after_three(response, checks):
    replica = SimpleNamespace(
        _check_active_health_check=lambda: ReplicaHealthCheckResponse[response], _replica_id="r", _healthy=True,
        _consecutive_health_check_failures=0, _should_start_new_health_check=lambda: False,
    )  # fmt: skip
    assert [ActorReplicaWrapper.check_health(replica) for _ in range(checks)] == [True] * (checks - 1) + [False]


def test_another_user_config_alone_reconfigures_a_replica_and_restarts_none(deployments):
    config = deployments["decoder"]
    before, after = (
        DeploymentVersion("code", config.model_copy(update={"user_config": {"model": model}}), {})
        for model in ("models:/m/1", "models:/m/2")
    )
    assert before.requires_actor_reconfigure(after)
    assert not before.requires_actor_restart(after)
    assert before.requires_actor_restart(DeploymentVersion("other code", after.deployment_config, {}))


def test_there_is_one_ingress_whatever_the_number_of_replicas(deployments):
    assert (deployments["http"].num_replicas, deployments["http"].autoscaling_config) == (1, None)
    assert deployments["decoder"].autoscaling_config.max_replicas == 3


@pytest.mark.parametrize(("replicas", "stopped"), [(1, 1), (4, 1), (10, 2)])
def test_serve_stops_a_fifth_of_the_old_replicas_before_a_new_one_starts(deployments, replicas, stopped):
    """The step of a roll-out before any replica of the new version runs."""
    budgets = []

    def count(states, exclude_version=None, version=None):
        return replicas if exclude_version and ReplicaState.RUNNING in states else 0

    state = SimpleNamespace(
        _target_state=SimpleNamespace(target_num_replicas=replicas, version="new"),
        _deployed_info=SimpleNamespace(deployment_config=deployments["decoder"]),
        _is_gang_deployment=False,
        _terminally_failed=lambda: False,
        _replicas=SimpleNamespace(count=count),
        _stop_or_update_outdated_version_replicas=budgets.append,
    )
    state._rollout_size = lambda: DeploymentState._rollout_size(state)
    assert not DeploymentState._surge_rollout_in_progress(state)
    DeploymentState._check_and_stop_outdated_version_replicas(state)
    assert budgets == [stopped]


def test_messages_between_processes_hold_many_times_what_the_bounds_let_through():
    (variable, length), *_ = shared_cluster.UNBOUNDED_HEADERS_ENV.items()
    assert variable in Path(constants.__file__).read_text()  # Serve reads it
    assert int(length) > 10 * bounds.COPIES * bounds.BODY_BYTES


@pytest.mark.parametrize("of_node", [{}, shared_cluster.UNBOUNDED_HEADERS_ENV])
def test_actors_set_the_length_of_messages_on_a_cluster_whose_nodes_do_not(monkeypatch, of_node):
    monkeypatch.setattr(shared_cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr("os.environ", dict(of_node))
    expected = {} if of_node else {"runtime_env": {"env_vars": shared_cluster.UNBOUNDED_HEADERS_ENV}}
    assert shared_cluster.wide_actor() == expected


class Ingress:
    """In the place of a handle: one request is answered for as long as anybody looks."""

    looks = 0

    def broadcast(self, method):
        assert method == "drain"
        self.looks += 1
        return SimpleNamespace(results=lambda timeout_s: [1])


def test_a_service_that_ends_waits_for_its_requests_for_drain_seconds_at_most(monkeypatch):
    ingress = Ingress()
    monkeypatch.setattr(app.serve, "get_app_handle", lambda name: ingress)
    monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(app, "DRAIN_LOOK_SECONDS", 0.05)
    began = time.monotonic()
    app._drain(0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert ingress.looks > 1
