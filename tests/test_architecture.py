"""The walls: who may import whom, how long things may be, what the core shows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("tidar_core", "pipelines", "serve_apps")
SOURCES = [*sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")), ROOT / "tidar.py"]
CORE = [path for path in SOURCES if path.parent == ROOT / "tidar_core" or path.parent.name == "kernels"]
ARTIFACTS = [path for path in SOURCES if path.parent.name == "artifacts"]
HOMES = {
    "ray.data": "pipelines/pack.py",
    "ray.train": "pipelines/train.py",
    "deepspeed": "pipelines/train_engine.py",
    "matplotlib": "pipelines/plots.py",
    "mlflow": " ".join(
        f"tidar_core/artifacts/{name}.py" for name in ("mlflow_client", "registry", "promotions", "alias_order", "runs")
    ),
    "lm_eval": "pipelines/lm_eval_model.py pipelines/lm_eval_service.py pipelines/lm_eval_tasks.py",
    "datasets": "pipelines/lm_eval_tasks.py",
    "transformers": "pipelines/rival.py",  # what we are compared with
    "tokenizers": "tidar_core/artifacts/tokenizer.py tidar_core/artifacts/detokenizer.py",
    "llguidance": "tidar_core/artifacts/grammar.py tidar_core/artifacts/grammar_trial.py",
    "jinja2": "tidar_core/artifacts/chat_template.py",
    "safetensors": "tidar_core/artifacts/hf_weights.py tidar_core/artifacts/hf_files.py",
    "fsspec": "tidar_core/artifacts/locations.py",
    "s3fs": "tidar_core/artifacts/locations.py",
    "fastapi": "serve_apps/http_app.py",
    "opentelemetry": "serve_apps/tracing.py",
    "prometheus_client": "serve_apps/metrics.py serve_apps/version_metrics.py",
    "aiohttp": "serve_apps/cost_bench.py pipelines/lm_eval_service.py",
    "typer": "tidar.py",
}
HALL = ("errors", "config", "layout", "visibility", "attention", "kv_cache", "model", "shapes")
TRAINING = (
    "packing", "row_order", "recipe", "dual_mode", "flex", "losses", "sequence_parallel", "objective", "schedule",
    "flops", "single_device",
)  # fmt: skip
DECODING = (
    "sampling", "rules", "request", "logprobs", "verify", "modes", "pages", "sequence", "row_state", "plan_tensors",
    "decode_forward", "step", "step_graph", "decoder_size", "decoder", "ways", "timing", "latency", "served_latency",
    "step_timing", "acceptance", "planner", "batcher", "autoregressive", "stop_strings", "benchmark", "step_bench",
    "decode_memory",
)  # fmt: skip


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Full dotted names of what a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(path, package):
    return any(module == package or module.startswith(package + ".") for module in imports(path))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_imports_torch_and_the_standard_library_alone(path):
    allowed = {*sys.stdlib_module_names, "torch", "tidar_core", "triton"}
    assert {module.split(".")[0] for module in imports(path)} <= allowed
    assert not reaches(path, "tidar_core.artifacts")


@pytest.mark.parametrize("path", ARTIFACTS, ids=name)
def test_things_at_rest_know_neither_ray_nor_http(path):
    for package in ("ray", "fastapi", "deepspeed", "pipelines", "serve_apps"):
        assert not reaches(path, package)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name in ("pipelines", "serve_apps")], ids=name)
def test_jobs_and_service_meet_in_a_bundle_never_in_code(path):
    other = {"pipelines": "serve_apps", "serve_apps": "pipelines"}[path.parent.name]
    assert not reaches(path, other)
    assert not reaches(path, "tidar")


@pytest.mark.parametrize("package", HOMES)
def test_each_heavy_library_has_one_home(package):
    assert {name(path) for path in SOURCES if reaches(path, package)} <= set(HOMES[package].split())


def test_the_wings_of_the_core_use_the_hall_and_not_each_other():
    for wing, forbidden in ((TRAINING, DECODING), (DECODING, TRAINING), (HALL, TRAINING + DECODING)):
        for module in wing:
            for other in forbidden:
                assert not reaches(ROOT / f"tidar_core/{module}.py", f"tidar_core.{other}"), (module, other)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_and_public_name_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_core_shows_these_names_and_no_others():
    import tidar_core

    assert tidar_core.__all__ == [
        "Batcher", "DecodeStep", "Decoder", "DraftConfig", "ModelConfig", "Objective", "Request", "SamplingConfig",
        "TidarError", "TidarModel", "TokenLayout", "generate_autoregressive", "sees",
    ]  # fmt: skip


WITHOUT = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "mlflow", "deepspeed", "transformers", "tokenizers", "safetensors", "pydantic",
                                  "fsspec", "s3fs", "pyarrow", "fastapi", "rich", "typer", "llguidance"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Refuse())
from tidar_core import Batcher, Decoder, DraftConfig, Objective, Request, SamplingConfig, TidarModel
from tidar_core.batcher import complete
from tidar_core.benchmark import compare_modes
from tidar_core.shapes import named_shape
import torch

model = TidarModel(named_shape("tiny"))
model.init_weights(0)
Objective(model, dual=True, block_len=4).batch(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
request = Request(request_id="a", prompt=(1, 2), sampling=SamplingConfig(max_tokens=5))
done = complete(Batcher(Decoder(model, DraftConfig(block_len=4), rows=1)), [request])
print(len(done[0].token_ids), "ray" in sys.modules)
"""


def test_the_core_runs_with_torch_alone():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["5", "False"], "")


def test_importing_the_rooms_starts_nothing():
    code = "import pipelines.jobs, tidar, tidar_core, threading; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
