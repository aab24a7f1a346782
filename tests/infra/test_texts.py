"""Names in the documents exist in the code: metrics, commands, options, files, settings, job keys, figures."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import click
import promql_parser
import pytest
import typer
import yaml
from metric_names import exported
from ray.scripts.scripts import cli as ray_cli
from ray.serve._private.constants import RAY_SERVE_TRACING_SAMPLING_RATIO
from ray.serve.scripts import cli as serve_cli

import tidar
from pipelines.evaluation.job import EvaluateJob, PublishJob
from pipelines.jobs import PackJob, TrainJob, read_job
from serve_apps.ingress import failover
from serve_apps.replica import engine_pool
from serve_apps.rollout.alias_watcher import STEPS
from serve_apps.settings import ServeSettings
from serve_apps.shared_cluster import UNBOUNDED_HEADERS_ENV
from tidar_core.artifacts.store import output_lock

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs/operations.md").read_text()
MENU = (ROOT / "infra/README.md").read_text()
FRONT = (ROOT / "README.md").read_text()
TEXTS = {"runbook": RUNBOOK, "menu": MENU, "readme": FRONT}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "infra/README.md"])
BY_NAME = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
[KUBERAY] = [path.stem.partition("-")[2] for path in (Path(__file__).parent / "schemas").glob("kuberay-*.yaml")]
COMMANDS = typer.main.get_command(tidar.app).commands


def quoted(text):
    """Texts in backticks, and the lines of fenced blocks."""
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return inline + [line.strip() for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]


def tidar_commands(text):
    """Words after `tidar` or `python -m tidar`, for every quoted command."""
    for code in quoted(text):
        words = shlex.split(code.split(" && ")[0], comments=True)
        for place, word in enumerate(words):
            if word == "tidar" and place + 1 < len(words) and re.fullmatch(r"[a-z]+", words[place + 1]):
                yield words[place + 1 :]


@pytest.mark.parametrize("name", TEXTS)
def test_every_tidar_command_exists_with_its_options(name):
    commands = list(tidar_commands(TEXTS[name]))
    assert commands
    for command, *rest in commands:
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= known, command
        needed = [p for p in COMMANDS[command].params if p.param_type_name == "argument" and p.required]
        assert not rest or len([word for word in rest if not word.startswith("--")]) >= len(needed)


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_of_ray_and_serve_exists_with_its_options(name):
    programs = {"ray": ray_cli, "serve": serve_cli}
    found = [shlex.split(code, comments=True) for code in quoted(TEXTS[name]) if re.match("(ray|serve) [a-z]", code)]
    assert found
    for program, *words in found:
        command = programs[program]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        words = words[: words.index("--")] if "--" in words else words
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, command.name


def test_every_metric_of_the_runbook_is_exported_and_every_query_is_promql():
    named = set(re.findall(r"tidar:([a-z_]\w*)", RUNBOOK))
    assert named <= exported() | {name.removesuffix("_bucket") for name in exported()}  # a histogram as a whole, too
    assert {"requests_total", "kv_cache_usage_perc", "spec_decode_num_accepted_tokens_total"} <= named
    for code in quoted(RUNBOOK):
        if re.search(r"tidar:[a-z]", code):
            promql_parser.parse(code)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"docs/LOG.md"}))
def test_every_file_that_a_document_names_exists(name):
    rooms = "infra|docs|tests|serve_apps|pipelines|tidar_core"
    codes = [code for code in quoted(BY_NAME[name].read_text()) if not code.startswith(("import ", "from "))]
    paths = {path for code in codes for path in re.findall(rf"(?<![\w/])(?:{rooms})/[\w./*-]*\w", code)}
    assert not [path for path in paths if not list(ROOT.glob(path))]
    bare = {code for code in codes if re.fullmatch(r"[a-z_0-9]+\.py", code)} - {"prof.py"}  # a script that was not kept
    known = {path.name for room in ("tidar", *rooms.split("|")) for path in (ROOT / room).rglob("*.py")}
    assert bare <= known


@pytest.mark.parametrize("name", BY_NAME)
def test_every_link_of_a_document_leads_to_a_file(name):
    page = BY_NAME[name]
    links = re.findall(r"\]\(([^)#\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_index_lists_every_document():
    index = (ROOT / "docs/index.md").read_text()
    listed = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+\.md)\)", index)}
    assert listed == {page.resolve() for page in PAGES} - {(ROOT / "docs/index.md").resolve()}


def test_the_readme_is_short_and_its_own_job_files_and_keys_exist():
    assert len(FRONT.splitlines()) < 120
    kinds = {"pack": PackJob, "train": TrainJob, "evaluate": EvaluateJob, "publish": PublishJob}
    shown = re.findall(r"tidar (\w+) mine/(\w+)\.small\.yaml +# (.*)", FRONT)
    assert [command for command, _, _ in shown] == list(kinds)
    for command, file, keys in shown:
        job = kinds[command]
        read_job(job, ROOT / f"infra/jobs/{file}.small.yaml")
        named = set(re.findall(r"\b(\w+)(?=[,:;. (]|$)", keys)) & set(job.model_fields)
        assert len(named) >= {"publish": 1}.get(command, 2)


def test_the_readme_of_infra_lists_every_file_there():
    rows = re.findall(r"^\| `([^`]+)` \|", MENU, re.M)
    named = {path for row in rows for path in (ROOT / "infra").glob(row)}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "infra"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    ).stdout.split()  # fmt: skip
    there = {ROOT / path for path in listed if (ROOT / path).is_file()}
    assert there - named == {ROOT / "infra/README.md"}


@pytest.mark.parametrize("subject", ["First cluster", "Promote", "Roll back", "A replica that runs out of memory",
                                     "A node that dies in training", "Acceptance drops"])  # fmt: skip
def test_the_runbook_has_a_symptom_a_metric_and_a_command_for_each_fault(subject):
    section = RUNBOOK.split(f"## {subject}\n")[1].split("\n## ")[0]
    assert [code for code in quoted(section) if re.match(r"(tidar|kubectl|ray|serve|helm) ", code)]
    if subject not in ("First cluster", "Promote"):
        assert "| symptom |" in section
        assert "| metric |" in section


@pytest.mark.parametrize("key", ["pages", "rows", "context_len", "dtype", "max_replicas", "model"])
def test_settings_that_the_runbook_names_exist(key):
    assert re.search(rf"`{key}[`:]", RUNBOOK)
    assert key in ServeSettings.model_fields


@pytest.mark.parametrize("key", ["max_failures", "checkpoint_every", "workers", "rows_per_step", "rows_per_forward"])
def test_job_keys_that_the_runbook_names_exist(key):
    assert f"`{key}`" in RUNBOOK
    assert key in TrainJob.model_fields


@pytest.mark.parametrize(("word", "source"), [
    ("acceptance_by_position", "tidar_core/planning/mode_benchmark.py"),
    ("tokens_per_second", "pipelines/training/train_metrics.py"),
    ("bundle_hash", "serve_apps/api/completion_response.py"),
])  # fmt: skip
def test_output_keys_that_the_runbook_names_are_written_by_the_code(word, source):
    assert f"`{word}`" in RUNBOOK
    assert any(word in path.read_text() for path in ROOT.glob(source))


@pytest.mark.parametrize(("words", "figure", "value"), [
    ("tried again every five minutes", 5 * 60, engine_pool.RETRY_SECONDS),
    ("go to another replica, three at most", 3, failover.TRIES),
    ("is renewed every 10 s", 10, output_lock.RENEW_SECONDS),
    ("not renewed for 45 s", 45, output_lock.LEASE_SECONDS),
    ("`timing_seconds` (20)", 20, ServeSettings.model_fields["timing_seconds"].default),
    ("`max_skipped_updates` train steps in a row (10 by default)", 10,
     TrainJob.model_fields["max_skipped_updates"].default),
    ("experiment `tidar`", "tidar", TrainJob.model_fields["experiment"].default),
    ("own default would be 0.01", 0.01, RAY_SERVE_TRACING_SAMPLING_RATIO),
    ("may have 2 GiB", 2**31 - 1, int(UNBOUNDED_HEADERS_ENV["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])),
    ("--version 1.6.2", "1.6.2", KUBERAY),
])  # fmt: skip
def test_figures_of_the_runbook_are_those_of_the_code(words, figure, value):
    assert words in " ".join(RUNBOOK.split())
    assert value == figure


@pytest.mark.parametrize("words", [
    "diverged at train step", "another job writes", "the decoder's process has ended with", "weights are loaded",
    "decode steps are timed",
])  # fmt: skip
def test_messages_that_the_runbook_quotes_are_in_the_code(words):
    assert words in RUNBOOK
    sources = [path for room in ("pipelines", "serve_apps", "tidar_core") for path in (ROOT / room).rglob("*.py")]
    assert any(f'"{words}' in text or f" {words}" in text for text in (path.read_text() for path in sources))


def test_the_canary_settings_in_the_runbook_are_the_defaults():
    [block] = [text for text in re.findall(r"```\n(.*?)```", RUNBOOK, re.S) if "challenger:" in text]
    shown = ServeSettings.model_validate({"model": "models:/m@champion"} | yaml.safe_load(block))
    assert (
        shown.challenger
        == ServeSettings.model_validate(
            {"model": "models:/m@champion", "follow_alias_seconds": 10, "challenger": {}}
        ).challenger
    )


def test_events_of_a_version_that_the_runbook_names_are_counted():
    named = set(re.findall(r'model_life_total\{step="(\w+)"\}', RUNBOOK))
    assert named
    assert named <= set(STEPS)


@pytest.mark.parametrize(
    ("span", "source"), [("ingress", "ingress/request_log.py"), ("replica", "replica/text_generator.py")]
)
def test_span_attributes_in_the_runbook_equal_the_attributes_set_by_the_code(span, source):
    row = re.search(rf"^\| {span} \| (.*) \|$", RUNBOOK.split("## Traces")[1], re.M).group(1)
    by_serve = {"request_id", "http.route"}
    named = set(re.findall(r"`((?:gen_ai|tidar)\.[\w.]+|request_id|http\.route)`", row)) - by_serve
    calls = [node for node in ast.walk(ast.parse((ROOT / "serve_apps" / source).read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "note"]  # fmt: skip
    assert named == {word.arg.replace("__", ".") for call in calls for word in call.keywords}


def test_kubernetes_objects_that_the_runbook_names_are_in_the_manifests():
    manifests = [m for path in (ROOT / "infra/k8s").glob("*.yaml") for m in yaml.safe_load_all(path.read_text())]
    there = {(m["kind"], m["metadata"].get("name")) for m in manifests}
    kinds = {"deploy": "Deployment", "svc": "Service", "pod": "Pod"}
    of_kuberay = {("RayService", "tidar"): {"tidar-head-svc", "tidar-serve-svc"}}
    made = {("Service", name) for owner, names in of_kuberay.items() if owner in there for name in names}
    kubectl = [code for code in quoted(RUNBOOK) if "kubectl" in code]
    named = {(kinds[kind], name) for code in kubectl for kind, name in re.findall(r"\b(deploy|svc|pod)/([\w-]+)", code)}
    assert len(named) > 4
    assert named <= there | made
    labels = {f"{name}={value}" for m in manifests if m["apiVersion"] == "ray.io/v1" for name, value in labels_of(m)}
    wanted = {pair for code in kubectl for pair in re.findall(r"(tidar/\w+=\w+)", code)}
    assert wanted
    assert wanted <= labels
    assert {f"--from-literal={key}=..." for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")} <= set(
        next(code for code in kubectl if "secret generic tidar-s3" in code).split()
    )


def labels_of(manifest):
    """Labels of a Ray cluster's pods."""
    spec = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield from group["template"]["metadata"]["labels"].items()
