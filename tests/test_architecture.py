"""Limits of the architecture: imports between rooms, lengths of files and functions, public names of the core."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tidar", "tidar_core", "pipelines", "serve_apps")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CORE = [path for path in SOURCES if path.is_relative_to(ROOT / "tidar_core")]
TORCH_ONLY = [path for path in CORE if not path.is_relative_to(ROOT / "tidar_core/artifacts")]
MAY_IMPORT = {
    "tidar": "tidar_core/ pipelines/ serve_apps/",
    "tidar_core": "tidar_core/transformer tidar_core/training tidar_core/decoding",
    "tidar_core/transformer": "tidar_core tidar_core/kernels/layers_on_cpu.py tidar_core/kernels/mask_attention.py",
    "tidar_core/kernels": "tidar_core tidar_core/transformer",
    "tidar_core/training": "tidar_core tidar_core/transformer tidar_core/kernels",
    "tidar_core/decoding": "tidar_core tidar_core/transformer tidar_core/kernels",
    "tidar_core/planning": "tidar_core tidar_core/transformer tidar_core/kernels tidar_core/decoding",
    "tidar_core/artifacts": "tidar_core tidar_core/transformer tidar_core/training tidar_core/artifacts/store",
    "tidar_core/artifacts/store": "tidar_core",
    "tidar_core/artifacts/network": "tidar_core",
    "tidar_core/artifacts/text": "tidar_core tidar_core/artifacts/store",
    "tidar_core/artifacts/model": "tidar_core/",
    "tidar_core/artifacts/registry": "tidar_core tidar_core/artifacts/",
    "pipelines": "tidar_core/",
    "pipelines/cluster": "tidar_core tidar_core/artifacts/",
    "pipelines/importing": "tidar_core/ pipelines/cluster",
    "pipelines/packing": "tidar_core/ pipelines pipelines/cluster",
    "pipelines/answers": "tidar_core/ pipelines pipelines/cluster pipelines/packing",
    "pipelines/training": "tidar_core/ pipelines pipelines/cluster",
    "pipelines/evaluation": "tidar_core/ pipelines pipelines/cluster pipelines/evaluation/sandbox",
    "pipelines/evaluation/sandbox": "tidar_core",
    "pipelines/quickstart": "tidar_core/ pipelines/",
    "pipelines/research": "tidar_core/ pipelines pipelines/cluster pipelines/evaluation",
    "serve_apps": "tidar_core/ serve_apps/",
    "serve_apps/api": "tidar_core tidar_core/decoding tidar_core/artifacts/text serve_apps/messages",
    "serve_apps/messages": "tidar_core",
    "serve_apps/streaming": "tidar_core tidar_core/decoding tidar_core/artifacts/ serve_apps/api serve_apps/messages",
    "serve_apps/rollout": "tidar_core tidar_core/artifacts/ serve_apps/settings.py serve_apps/api serve_apps/messages",
    "serve_apps/telemetry": "tidar_core serve_apps/settings.py serve_apps/messages serve_apps/rollout",
    "serve_apps/replica": "tidar_core/ serve_apps/settings.py serve_apps/api serve_apps/messages serve_apps/streaming"
    " serve_apps/rollout serve_apps/telemetry",
    "serve_apps/ingress": "tidar_core serve_apps/api serve_apps/messages serve_apps/streaming serve_apps/telemetry",
    "serve_apps/tools": "tidar_core/ serve_apps/",
}
"""Room -> further places that its files may import: `a/b` is the files of that folder itself, `a/b/` everything
below it, `a/b.py` one file."""
HOMES = {
    "ray.data": "pipelines/cluster/work_items.py",
    "ray.train": "pipelines/training/train.py",
    "deepspeed": "pipelines/training/train_engine.py",
    "matplotlib": "pipelines/evaluation/plots.py",
    "mlflow": "tidar_core/artifacts/registry/",
    "lm_eval": "pipelines/evaluation/lm_eval_",
    "datasets": "pipelines/evaluation/lm_eval_tasks.py",
    "transformers": "pipelines/evaluation/transformers_baseline.py",
    "xllamacpp": "pipelines/evaluation/llama_cpp_baseline.py",
    "tokenizers": "tidar_core/artifacts/text/tokenizer.py tidar_core/artifacts/text/detokenizer.py"
    " tidar_core/artifacts/text/gguf_tokenizer.py",
    "gguf": "tidar_core/artifacts/model/gguf_file.py",
    "llguidance": "tidar_core/artifacts/text/grammar",
    "jinja2": "tidar_core/artifacts/text/chat_template.py",
    "safetensors": "tidar_core/artifacts/model/hf_",
    "fsspec": "tidar_core/artifacts/store/locations.py",
    "s3fs": "tidar_core/artifacts/store/locations.py",
    "fastapi": "serve_apps/ingress/http_app.py",
    "opentelemetry": "serve_apps/telemetry/tracing.py",
    "prometheus_client": "serve_apps/telemetry/",
    "aiohttp": "serve_apps/tools/http_overhead_bench.py pipelines/evaluation/lm_eval_service.py",
    "typer": "tidar/",
}
"""Heavy library -> beginnings of the paths of the files that may import it."""


def name(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def imports(path):
    """Full dotted names that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(path, package):
    return any(module == package or module.startswith(package + ".") for module in imports(path))


def inside(path):
    """Files and packages of the project that a file imports, as paths from the root."""
    for module in imports(path):
        place = ROOT / module.replace(".", "/")
        if module.split(".")[0] in PACKAGES and (place.is_dir() or place.with_suffix(".py").is_file()):
            yield name(place if place.is_dir() else place.with_suffix(".py"))


def allows(rule, place):
    """Whether a rule of the table allows the import of a file or of a package."""
    room = place.rpartition("/")[0] if place.endswith(".py") else place
    return rule in (place, room) or (rule.endswith("/") and f"{room}/".startswith(rule))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_room_imports_the_rooms_that_the_table_names_and_no_others(path):
    rules = [name(path.parent), *MAY_IMPORT[name(path.parent)].split()]
    places = set(inside(path))
    for place in places:
        holds_another = any(other.startswith(f"{place}/") for other in places)  # `from package import module`
        assert holds_another or any(allows(rule, place) for rule in rules), place
    assert name(path.parent) == "tidar" or not reaches(path, "tidar")


def test_every_room_is_in_the_table_and_no_other():
    assert set(MAY_IMPORT) == {name(path.parent) for path in SOURCES}


@pytest.mark.parametrize("path", TORCH_ONLY, ids=name)
def test_the_core_imports_torch_and_the_standard_library_alone(path):
    allowed = {*sys.stdlib_module_names, "torch", "tidar_core", "triton"}
    assert {module.split(".")[0] for module in imports(path)} <= allowed


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_imports_neither_ray_nor_http(path):
    for package in ("ray", "fastapi", "deepspeed"):
        assert not reaches(path, package)


@pytest.mark.parametrize("package", HOMES)
def test_each_heavy_library_has_one_home(package):
    homes = tuple(HOMES[package].split())
    users = {name(path) for path in SOURCES if reaches(path, package)}
    assert all(user.startswith(homes) for user in users), users


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_and_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_core_shows_these_names_and_no_others():
    import tidar_core

    assert tidar_core.__all__ == [
        "DecodeStep", "Decoder", "DraftConfig", "ModelConfig", "Objective", "Request", "SamplingConfig", "Scheduler",
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
from tidar_core import Decoder, DraftConfig, Objective, Request, SamplingConfig, Scheduler, TidarModel
from tidar_core.decoding.completion import complete
from tidar_core.planning.mode_benchmark import compare_modes
from tidar_core.transformer.shapes import named_shape
import torch

model = TidarModel(named_shape("tiny"))
model.init_weights(0)
Objective(model, dual=True, block_len=4).batch(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
request = Request(request_id="a", prompt=(1, 2), sampling=SamplingConfig(max_tokens=5))
done = complete(Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1)), [request])
with torch.device("meta"):
    TidarModel(named_shape("tiny"))
print(len(done[0].token_ids), "ray" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_the_core_runs_with_torch_alone_and_without_its_compiler():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["5", "False", "False"], "")


def test_importing_the_rooms_starts_nothing():
    code = "import pipelines.jobs, tidar, tidar_core, threading; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_process_that_computes_no_model_starts_without_torch():
    modules = (
        "tidar", "tidar_core.artifacts.registry.model_registry", "serve_apps.app", "serve_apps.ingress.http_app",
        "serve_apps.replica.decoder_app", "serve_apps.rollout.watcher_app",
    )  # fmt: skip
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tests_that_run_alone_lie_in_the_folder_that_their_part_reads():
    marked = [name(path) for path in (ROOT / "tests").rglob("*.py") if "pytest.mark." + "alone" in path.read_text()]
    assert marked
    assert all(path.startswith("tests/serve/") for path in marked)
