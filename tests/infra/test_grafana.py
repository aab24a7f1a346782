"""The dashboard opens in Grafana, and its queries select metrics that the service exports."""

import json
import re
from pathlib import Path

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from metric_names import exported

DASHBOARD = json.loads((Path(__file__).parents[2] / "infra/grafana/tidar.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SHOWN = {
    "traffic": ("requests_total",),
    "tokens per second": ("generation_tokens_total", "prompt_tokens_total"),
    "acceptance": ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"),
    "tokens per round": ("spec_decode_num_accepted_tokens_total", "spec_decode_num_drafts_total"),
    "KV use": ("kv_cache_usage_perc",),
    "preemptions": ("num_preemptions_total",),
    "the planner's mode": ("decode_mode",),
    "time to first token": ("time_to_first_token_seconds_bucket",),
    "time between pieces": ("inter_token_latency_seconds_bucket",),
    "where the time goes": tuple(
        f"request_{part}_time_seconds_{what}" for part in ("queue", "prefill", "decode") for what in ("sum", "count")
    ),
    "acceptance by place": ("spec_decode_num_accepted_tokens_per_pos_total",),
}


def expressions(panel):
    return [target["expr"] for target in panel["targets"]]


def metrics(expression):
    """Names that an expression selects; TiDAR's names without their prefix."""
    return set(re.findall(r"tidar:(\w+)", expression))


def readable(expression):
    """The expression with Grafana's variables substituted."""
    return expression.replace("$__rate_interval", "1m").replace("$model", ".*")


def missing(given, known, path=""):
    """Paths of `given` whose key is not in `known` or whose value differs. `known` may have further defaults."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from missing(value, known.get(key, "no such key"), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for index, (value, kept) in enumerate(zip(given, known)):
            yield from missing(value, kept, f"{path}[{index}]")
    elif given != known:
        yield path


def test_grafana_s_own_model_knows_every_key_and_value():
    register_default_plugins()
    known = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    assert not list(missing(DASHBOARD, known))
    misspelt = json.loads(json.dumps(DASHBOARD).replace("legendFormat", "legend"))
    assert list(missing(misspelt, json.loads(json.dumps(Dashboard.from_json(misspelt), cls=JSONEncoder))))
    assert DASHBOARD["schemaVersion"] >= 36


def test_panels_have_unique_ids_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_every_panel_uses_the_data_source_chosen_at_the_top():
    source, model = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    assert model["datasource"] == chosen
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_expression_is_promql_over_metrics_that_the_service_exports(panel):
    for expression in expressions(panel):
        promql_parser.parse(readable(expression))
        assert metrics(expression)
        assert metrics(expression) <= exported()
        assert expression.count('model_name=~"$model"') == expression.count("tidar:")
        for name in metrics(expression):  # a total is useful only as a rate
            assert ("rate(tidar:" + name in expression) == name.endswith(("_total", "_bucket", "_sum", "_count"))


@pytest.mark.parametrize("subject", SHOWN)
def test_a_panel_shows(subject):
    assert any(set(SHOWN[subject]) <= metrics(e) for panel in PANELS for e in [" ".join(expressions(panel))])
