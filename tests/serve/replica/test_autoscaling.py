"""Numbers of replicas: literal cases of the policy, and the decisions of Serve."""

import itertools
from types import SimpleNamespace

import cloudpickle
import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config

from serve_apps.messages.replica_load import Load
from serve_apps.replica.autoscaling import Busy, Policy, autoscaling, replicas_needed, stats
from serve_apps.settings import ServeSettings

BARS = {"queue_seconds": 10, "kv_use": 0.9}


def busy(rows, kv=0.0, waiting=0, tokens=4, forwards=25):
    """A replica that works off a hundred tokens a second."""
    return Busy(rows=rows, kv=kv, waiting_tokens=waiting, tokens_per_forward=tokens, forwards_per_second=forwards)


@pytest.mark.parametrize(
    ("replicas", "needed"),
    [
        ([], 0),
        ([busy(0)], 0),
        ([busy(0.5), busy(0.25)], 0.75),
        ([busy(1)], 1),
        ([busy(1, waiting=500)], 1.5),  # 500 tokens / (4 a forward x 25 a second x 10 seconds)
        ([busy(1, waiting=3000)], 4),
        ([busy(1, waiting=1500), busy(1, waiting=1500)], 5),
        ([busy(1, waiting=3000, tokens=8)], 2.5),  # drafts that are accepted more often save replicas
        ([busy(1, waiting=3000, forwards=50)], 2.5),
        ([busy(1, waiting=400), busy(0, tokens=0, forwards=0)], 1.4),  # a replica without requests has no throughput
        ([busy(1, waiting=3000, tokens=0, forwards=0)], 1),
        ([busy(0.5, kv=0.9)], 1),
        ([busy(0.5, kv=0.99)], 1.1),
        ([busy(0.1, kv=0.6), busy(0.1, kv=0.75)], 1.5),
    ],
)
def test_what_runs_needs_its_rows_what_waits_its_time_and_caches_their_bar(replicas, needed):
    assert replicas_needed(replicas, **BARS) == pytest.approx(needed)


def load(**fields):
    zero = dict.fromkeys(Load.__slots__, 0) | {"replica": "a", "mode": "auto", "rows": 8, "pages": 100}
    return Load(**zero | fields)


def test_a_replica_reports_its_fullest_engine_all_waiting_tokens_and_no_unknown_throughput():
    champion = load(running=4, pages_held=90, waiting_tokens=30, tokens_per_forward=4.0, forwards_per_second=25.0)
    challenger = load(running=6, pages_held=10, waiting_tokens=3, tokens_per_forward=1.0, forwards_per_second=9.0)
    report = {"rows": 0.75, "kv": 0.9, "waiting_tokens": 33.0}
    assert stats([champion, challenger]) == report | {"tokens_per_forward": 4.0, "forwards_per_second": 25.0}
    assert stats([load()]) == {"rows": 0, "kv": 0, "waiting_tokens": 0}


def context(report, running, target=None, requests=0, config=None):
    """In the form of Serve's: metric by replica."""
    metrics = {name: {n: each[name] for n, each in enumerate(report) if name in each} for name in Busy.__slots__}
    return SimpleNamespace(
        aggregated_metrics={name: values for name, values in metrics.items() if values},
        current_num_replicas=running, target_num_replicas=running if target is None else target,
        total_num_requests=requests, policy_state={}, config=config,
    )  # fmt: skip


FULL = stats([load(running=8, waiting_tokens=1500, tokens_per_forward=4.0, forwards_per_second=25.0)])


def test_the_policy_reads_the_reports_of_replicas_and_holds_still_until_one_comes():
    policy = Policy(**BARS)
    assert policy(context([FULL, stats([load()])], 2)) == (pytest.approx(2.5), {})
    assert policy(context([], 2, target=3)) == (3, {})
    assert policy(context([], 0)) == (0, {})


def serve_decisions(settings, contexts, monkeypatch, seconds):
    """Decisions of Serve, which calls the policy once a second in `contexts`, and holds decisions around it."""
    config = autoscaling(settings)
    clock = itertools.count(1000, seconds)
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: next(clock))
    decide, state = _apply_autoscaling_config(config.policy.get_policy()(**config.policy.policy_kwargs)), {}
    decisions = []
    for given in contexts:
        given.config, given.policy_state = config, state
        decision, state = decide(given)
        decisions.append(decision)
    return decisions


def test_more_and_fewer_replicas_must_be_needed_for_a_while_and_the_first_of_none_at_once(monkeypatch):
    settings = ServeSettings(model="m", min_replicas=0, max_replicas=9, scale_up_seconds=2, scale_down_seconds=3)
    full, idle = context([FULL], 1), context([stats([load()])], 1)
    assert serve_decisions(settings, [full] * 4, monkeypatch, 1) == [1, 1, 3, 1]
    assert serve_decisions(settings, [idle] * 4, monkeypatch, 1) == [1, 1, 1, 0]
    assert serve_decisions(settings, [full, full, idle, full, full], monkeypatch, 1) == [1] * 5
    assert serve_decisions(settings, [context([], 0, requests=1)], monkeypatch, 1) == [1]


def test_serve_gets_the_settings_and_begins_with_one_replica_even_if_the_minimum_is_0():
    config = autoscaling(
        ServeSettings(
            model="m", min_replicas=0, max_replicas=5, scale_look_seconds=4, scale_up_seconds=1, scale_down_seconds=2,
            scale_queue_seconds=7, scale_kv_use=0.5,
        )
    )  # fmt: skip
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 5)
    assert (config.metrics_interval_s, config.look_back_period_s) == (4, 12)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 2)
    assert config.policy.policy_kwargs == {"queue_seconds": 7, "kv_use": 0.5}


def test_the_policy_needs_nothing_of_this_project_where_it_is_called():
    sent = autoscaling(ServeSettings(model="m")).policy.get_serialized_policy_def()
    assert cloudpickle.loads(sent)(**BARS)(context([FULL], 1)) == (pytest.approx(2.5), {})
    assert b"replica_load" not in sent
    assert b"serve_apps.settings" not in sent
