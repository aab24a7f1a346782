"""An experiment: variants from one start, the same rows, a table and a plot; a finished run is not run again."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.jobs import read_job
from pipelines.research.experiments import ExperimentJob, experiment, main, table
from pipelines.research.token_slots import TokenSlotsJob
from tidar_core.artifacts.shards import ShardReader
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

FILES = sorted((Path(__file__).parents[3] / "infra/experiments").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path):
    """A tiny bundle, tiny shards, and an experiment with two variants."""
    save_tiny_bundle(tmp_path / "start")
    save_tiny_shards(tmp_path / "shards")
    (tmp_path / "job.yaml").write_text(f"""
title: Tiny
shards: {tmp_path}/shards
init_from: {tmp_path}/start
output: {tmp_path}/out/tiny
train: {{block_len: 4, steps: 2, rows_per_step: 2, rows_per_forward: 2, learning_rate: 1.0e-2}}
variants:
  full: {{}}
  random: {{masking: random, mask_start: zero}}
seeds: [1]
decode_lens: [2, 4]
prompts: 2
prompt_len: 4
max_tokens: 6
held_out_rows: 10
threads: 1
""")
    return tmp_path


def test_an_experiment_leaves_a_table_and_a_plot_and_is_not_run_twice(folder, capsys):
    assert main([str(folder / "job.yaml")]) == 0
    printed, progress = capsys.readouterr()
    found = json.loads((folder / "out/tiny/results.json").read_text())
    assert [(run["variant"], run["seed"]) for run in found] == [("full", 1), ("random", 1)]
    for run in found:
        assert (run["steps"], run["clean_tokens"], list(run["tokens_per_forward"])) == (2, 2 * 2 * 32, ["2", "4"])
        assert all(1 / 2 < speed <= int(length) for length, speed in run["tokens_per_forward"].items())
    assert found[0]["diffusion_loss"] != found[1]["diffusion_loss"]
    assert (folder / "out/tiny/table.md").read_text() == printed[:-1] == table(found)
    assert len(printed.splitlines()) == 2 + 2 * 2 + 1
    assert (folder / "out/tiny/plot.png").read_bytes().startswith(b"\x89PNG")
    assert "random, seed 1: 128 tokens" in progress
    shutil.rmtree(folder / "out/tiny")
    again = experiment(read_job(ExperimentJob, folder / "job.yaml"))
    assert again == found
    job = read_job(ExperimentJob, folder / "job.yaml")
    fixed = job.model_copy(update={"train": job.train | {"random_phase": False}})
    assert fixed.run_name("full", 1) != job.run_name("full", 1)  # though neither names a value that is not a default
    assert capsys.readouterr().err == ""


def test_a_variant_that_is_no_train_job_is_refused_in_one_line(folder, capsys):
    path = folder / "job.yaml"
    path.write_text(path.read_text().replace("masking: random", "masking: half"))
    assert main([str(path)]) == 2
    line = capsys.readouterr().err
    assert "variant 'random': masking: Input should be 'full' or 'random'" in line
    assert line.count("\n") == 1


def test_a_table_has_means_and_ranges_over_seeds():
    run = {
        "variant": "a", "steps": 5, "diffusion_loss": 4.0, "draft_accuracy": [0.5, 0.25],
        "tokens_per_forward": {"8": 1.5},
    }  # fmt: skip
    lines = table([run | {"ar_loss": 2.0}, run | {"ar_loss": 3.0}]).splitlines()
    same = "(4.000 to 4.000) | 0.250 (0.250 to 0.250) | 8 | 1.500 (1.500 to 1.500) |"
    assert lines[2] == "| a | 5 | 2.500 (2.000 to 3.000) | 4.000 " + same


def test_sizes_are_trained_from_random_weights_as_ar_models_first(folder, capsys):
    path, shapes = folder / "job.yaml", ("tiny", "quickstart-small")
    text = path.read_text().replace(f"init_from: {folder}/start", "ar_steps: 20")
    text = text.replace("full: {}", "a: {shape: tiny}")
    path.write_text(text.replace("{masking: random, mask_start: zero}", "{shape: quickstart-small}"))
    found = experiment(read_job(ExperimentJob, path))
    vocab_len = ShardReader(str(folder / "shards")).manifest.vocab_len
    models = [TidarModel(named_shape(shape, vocab_len=vocab_len)) for shape in shapes]
    assert [run["weights"] for run in found] == [sum(p.numel() for p in model.parameters()) for model in models]
    first, *_, last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a, seed 1")]
    assert ("diffusion loss" in first, "seed 1: 128 tokens" in last) == (False, True)
    path.write_text(path.read_text().replace("ar_steps: 20", "ar_steps: 0"))
    assert experiment(read_job(ExperimentJob, path))[0]["ar_loss"] > found[0]["ar_loss"]


def test_any_experiment_runs_at_another_size_beside_the_first(folder, capsys):
    path, shape = folder / "job.yaml", "quickstart-small"
    assert main([str(path), "--shape", shape]) == 2
    assert "--shape needs ar_steps" in capsys.readouterr().err
    path.write_text(f"ar_steps: 2\n{path.read_text()}")
    assert main([str(path), "--shape", shape]) == 0
    found = json.loads((folder / f"out/tiny-{shape}/results.json").read_text())
    vocab_len = ShardReader(str(folder / "shards")).manifest.vocab_len
    weights = sum(p.numel() for p in TidarModel(named_shape(shape, vocab_len=vocab_len)).parameters())
    assert [(run["variant"], run["weights"]) for run in found] == [("full", weights), ("random", weights)]
    assert not (folder / "out/tiny").exists()
    assert {run["weights"] for run in experiment(read_job(ExperimentJob, path))} != {weights}
    path.write_text(path.read_text().replace("full: {}", "full: {shape: tiny}"))
    assert main([str(path), "--shape", shape]) == 2
    assert "variant 'full' has a shape of its own" in capsys.readouterr().err


def test_token_slots_are_timed_and_leave_a_table_and_a_plot(folder, capsys):
    (folder / "slots.yaml").write_text(f"""
title: Slots
init_from: {folder}/start
output: {folder}/out/slots
token_slots: [1, 8]
batches: [1, 2]
contexts: [16]
repeats: 1
""")
    assert main([str(folder / "slots.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| batch, context | 1 | 8 |", "|---|---|---|"]
    points = json.loads((folder / "out/slots/results.json").read_text())
    assert [(p["rows"], p["batch"], p["context"]) for p in points] == [(1, 1, 16), (8, 1, 16), (1, 2, 16), (8, 2, 16)]
    assert lines[2] == f"| 1, 16 | {1000 * points[0]['seconds']:.2f} | {1000 * points[1]['seconds']:.2f} |"
    assert (folder / "out/slots/table.md").read_text().splitlines() == lines[:4]
    assert (folder / "out/slots/plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_file_is_valid(path):
    job = read_job(TokenSlotsJob if path.stem == "token-slots" else ExperimentJob, path)
    assert Path(job.output).name == path.stem
