"""The command line: its output, its exit codes, and one line for every wrong input."""

import json
import socket
import sys
from pathlib import Path

import pytest
import yaml
from tiny import save_lost_bundle, save_tiny_bundle

import tidar
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.text.end_tokens import EndTokens

DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line and return exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tidar", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            tidar.main()
        return left.value.code, *capfd.readouterr()

    return call


def refused(run, *arguments):
    """Return the one line that a wrong input prints."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("tidar: ")
    return err


def test_generate_prints_one_json_object_and_all_modes_give_the_same_text(run, bundle):
    answers = []
    for mode in ("single-pass", "autoregressive", "two-pass", "auto"):
        code, out, _ = run("generate", bundle, "def f(x", "--max-tokens", 12, "--mode", mode, "--json")
        assert code == 0
        answers.append(json.loads(out))
    assert all(answer["token_ids"] == answers[1]["token_ids"] for answer in answers)
    assert len(answers[0]["token_ids"]) == 12
    assert answers[1]["forwards"] == 12
    assert answers[0]["finish_reason"] == "length"


def test_generated_text_is_the_same_streamed_or_in_json(run, bundle):
    _, whole, _ = run("generate", bundle, "x", "--max-tokens", 9, "--temperature", 1, "--seed", 3, "--json")
    _, streamed, err = run("generate", bundle, "x", "--max-tokens", 9, "--temperature", 1, "--seed", 3)
    assert streamed == json.loads(whole)["text"] + "\n"
    assert "9 tokens" in err


def test_generate_takes_every_field_of_a_completion(run, bundle):
    def generate(mode, fields, *options):
        code, out, _ = run(
            "generate", bundle, "def f(x", "--mode", mode, "--fields", json.dumps(fields), "--json", *options
        )
        assert code == 0
        return json.loads(out)

    plain = generate("autoregressive", {"logprobs": 2}, "--max-tokens", 12)
    cut = generate("single-pass", {}, "--max-tokens", 12, "--stop", plain["text"][5:8])
    assert cut["text"] == plain["text"][: plain["text"].index(plain["text"][5:8])]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", plain["text"][5:8])
    assert len(plain["logprobs"]["token_logprobs"]) == 12
    assert (
        generate("two-pass", {"logprobs": 2}, "--max-tokens", 12)["logprobs"]["tokens"] == plain["logprobs"]["tokens"]
    )
    assert generate("single-pass", {"guided_regex": "[ab]{4}", "max_tokens": 12})["text"].strip("ab") == ""


def test_generate_ends_at_a_special_token_that_a_stop_string_names(run, bundle):
    fields = json.dumps({"logit_bias": {"0": 100}, "ignore_eos": True})
    _, out, _ = run(
        "generate", bundle, "hi", "--max-tokens", 8, "--stop", "<|endoftext|>", "--fields", fields, "--json"
    )
    answer = json.loads(out)
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == ("", "stop", "<|endoftext|>")
    assert answer["token_ids"] == [0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [("[1]", "JSON object"), ("{", "JSON object"), ('{"n": 2}', "n = 1"), ('{"speed": 2}', "speed"),
     ('{"min_p": 3}', "min_p is 3"), ('{"top_k": 1, "top_k": 2}', "--fields gives the key 'top_k' twice"),
     ('{"prompt": "y"}', "prompt is an argument"), ('{"model": "y"}', "model is an argument"),
     ('{"logprobs": 0}', "add --json"), ('{"stream": true}', "stream is in --fields")],
)  # fmt: skip
def test_a_wrong_field_is_refused(run, bundle, fields, words):
    assert words in refused(run, "generate", bundle, "x", "--fields", fields)


def test_a_field_of_both_an_option_and_fields_is_refused(run, bundle):
    both = "--temperature", 1, "--fields", '{"temperature": 0}'
    assert "temperature is given by --temperature and in --fields; give one" in refused(
        run, "generate", bundle, "x", *both
    )


def test_a_model_of_nan_is_refused_by_every_command_that_would_decode_with_it(run, tmp_path):
    lost = save_lost_bundle(tmp_path / "lost")
    for command in (("generate", lost, "x"), ("bench", lost, "--count", 1), ("profile", lost)):
        assert "weights that are not finite" in refused(run, *command)


def test_a_report_of_nan_is_refused_by_publish_and_a_version_of_it_by_promote(run, tmp_path):
    lost, tracking = save_lost_bundle(tmp_path / "lost"), f"sqlite:///{tmp_path}/mlflow.db"
    info, nan = read_bundle_info(lost), float("nan")
    report = {"bundle_hash": info.bundle_hash, "shards": "s", "ar_loss": nan, "greedy_equal": True, "prompts": 1,
              "prompts_equal": 1, "tokens_per_forward": 1.0}  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    job = {"bundle": str(lost), "report": str(tmp_path / "report.json"), "name": "m", "tracking_uri": tracking}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert "ar_loss nan" in refused(run, "publish", tmp_path / "job.yaml")
    version = model_registry.publish_version(tracking, "m", str(lost), info, {"ar_loss": nan})  # by an older release
    assert "its gates have ar_loss nan" in refused(run, "promote", "m", version, "--tracking-uri", tracking)
    assert "has no alias" in refused(run, "generate", "models:/m@champion", "x", "--tracking-uri", tracking)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--count", 1, "--batch", 10**9), "--batch"),
        (("profile", "--batch", 10**9), "--batch"),
        (("bench", "--threads", 10**5), "--threads"),
        (("serve", "--rows", 10**9, "--dry-run"), "1000000000 sequences are to run together"),
        (("serve", "--threads", 10**5, "--dry-run"), "threads"),
    ],
    ids=str,
)
def test_sizes_that_no_machine_has_are_refused_and_not_tried(run, bundle, arguments, words):
    command, *options = arguments
    assert words in refused(run, command, bundle, *options)


def test_bench_compares_the_modes_and_finds_them_equal(run, bundle):
    code, out, _ = run("bench", bundle, "--count", 2, "--max-tokens", 8, "--repeats", 2, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["prompts"] == 2
    assert list(facts["modes"]) == ["autoregressive", "single-pass", "two-pass", "auto"]
    for mode in facts["modes"].values():
        assert mode["equal_to_ar"] is True
        low, high = mode["tokens_per_second_spread"]
        assert 0 < low <= mode["tokens_per_second"] <= high
        least, greatest = mode["over_ar_spread"]
        assert 0 < least <= mode["over_ar"] <= greatest
    assert facts["modes"]["autoregressive"]["over_ar_spread"] == [1, 1]
    assert len(facts["modes"]["single-pass"]["acceptance_histogram"]) == facts["block_len"] == 4


def test_bench_ends_texts_at_any_end_token_of_the_model(run, bundle, tmp_path):
    loaded = load_bundle(bundle)
    mask_id = loaded.info.mask_id
    save_bundle(str(tmp_path), loaded.model, loaded.tokenizer, block_len=4, mask_id=mask_id, objective="dual",
                lineage={}, made_by={}, ends=EndTokens(tuple(range(300))))  # fmt: skip
    code, out, _ = run("bench", tmp_path, "--count", 2, "--max-tokens", 8, "--repeats", 1, "--json")
    assert code == 0
    assert json.loads(out)["modes"]["single-pass"]["tokens_per_forward"] == 1  # a text is its first token


def test_profile_finds_the_knee_and_draws_the_curve(run, bundle, tmp_path):
    code, out, _ = run("profile", bundle, "--batch", 1, "--plot", tmp_path / "new/curve.png", "--json")
    assert code == 0
    facts = json.loads(out)
    assert {(p["rows"], p["batch"], p["context"]) for p in facts["points"]} >= {(1, 1, 64), (512, 1, 64)}
    one_token = next(p["seconds"] for p in facts["points"] if p["rows"] == 1)
    free = [p["rows"] for p in facts["points"] if p["seconds"] <= 1.25 * one_token]
    assert facts["knee_rows"] == max(free)
    assert (tmp_path / "new/curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not DATA.exists(), reason="the measuring prompts are not on this machine")
@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "gsm8k-train-1000.jsonl", "spec-bench-dev.jsonl"])
def test_bench_reads_the_public_prompt_sets(run, bundle, name):
    code, out, _ = run(
        "bench", bundle, "--prompts", DATA / name, "--count", 2, "--max-tokens", 4, "--repeats", 1, "--json"
    )
    assert (code, json.loads(out)["prompts"]) == (0, 2)


@pytest.mark.parametrize("stage", ["answers", "pack", "train", "evaluate", "publish"])
def test_an_unknown_key_in_a_job_is_named(run, tmp_path, stage):
    path = tmp_path / "job.yaml"
    path.write_text("outptu: x\n")
    assert "unknown key 'outptu'" in refused(run, stage, path)


def test_a_missing_corpus_is_named_and_leaves_nothing(run, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({"corpus": f"{tmp_path}/no", "output": f"{tmp_path}/out", "tokenizer": {"vocab_size": 300}})
    )
    assert "does not exist" in refused(run, "pack", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.yaml"]


def test_prompts_that_are_missing_are_named_and_leave_nothing(run, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(f"prompts: {tmp_path}/no.jsonl\noutput: {tmp_path}/out\nmodel: {tmp_path}\n")
    assert f"prompts {tmp_path}/no.jsonl does not exist" in refused(run, "answers", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["job.yaml"]


def test_no_tokens_to_generate_is_refused(run, bundle):
    assert "max_tokens is 0" in refused(run, "generate", bundle, "x", "--max-tokens", 0)


def test_a_prompt_longer_than_the_context_is_refused(run, bundle):
    assert "context of 128" in refused(run, "generate", bundle, "x " * 300)


def test_a_flipped_byte_in_a_bundle_is_found_before_it_generates(run, tmp_path):
    folder = save_tiny_bundle(tmp_path / "bundle")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors" in refused(run, "generate", folder, "x")


def test_a_folder_that_is_no_bundle_is_refused(run, tmp_path):
    assert "tidar.json" in refused(run, "generate", tmp_path, "x")


def test_an_unknown_alias_is_named(run, tmp_path):
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    error = refused(run, "generate", "models:/nobody@champion", "x", "--tracking-uri", tracking)
    assert "nobody" in error
    assert "nobody" in refused(run, "rollback", "nobody", "--tracking-uri", tracking)
    assert "nobody" in refused(run, "promote", "nobody", 1, "--tracking-uri", tracking)


def test_a_taken_port_is_named_before_anything_starts(run, bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refused(run, "serve", bundle, "--port", port)
        assert str(port) in refused(run, "quickstart", "--workdir", tmp_path / "work", "--port", port)
    assert not (tmp_path / "work").exists()


def test_looking_a_model_up_makes_no_registry(run, tmp_path):
    refused(run, "generate", "models:/nobody@champion", "x", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "fast"), "fast"),
        (("--block-len", 0), "--block-len"),
        (("--block-len", 1000), "built for 128 positions"),
        (("--max-tokens", "many"), "--max-tokens"),
        (("--speed", 3), "--speed"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(run, bundle, arguments, words):
    assert words in refused(run, "generate", bundle, "x", *arguments)


def test_a_prompt_that_is_no_text_is_refused(run, bundle):
    assert "half a character" in refused(run, "generate", bundle, "\udcff\udcfe")


def test_a_job_file_that_is_no_text_is_refused(run, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"corpus: \xff\xfe\n")
    assert "not YAML" in refused(run, "pack", path)


def test_a_bench_that_cannot_hold_a_prompt_is_refused_at_once(run, bundle):
    assert "context of 128" in refused(run, "bench", bundle, "--max-tokens", 128)


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(run, tmp_path, command):
    plots = {tmp_path: "a folder; give the path of a PNG file", f"{__file__}/x.png": "Not a directory"}
    for plot, words in plots.items():
        assert words in refused(run, command, tmp_path / "no model", "--plot", plot)


@pytest.mark.parametrize("options", [("--count", 3), ("--batch", 3)])
def test_more_prompts_than_there_are_is_refused(run, bundle, tmp_path, options):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n' * 2)
    found = refused(run, "bench", bundle, "--prompts", tmp_path / "p.jsonl", *options)
    assert f"{options[0]} is 3, and bench has 2 prompts" in found
    assert "--count is 9, and bench has 8" in refused(run, "bench", bundle, "--count", 9)


def test_prompts_that_lose_their_beginning_are_counted(run, bundle, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "x " * 300}) + '\n{"text": "a"}\n')
    options = "--prompts", tmp_path / "p.jsonl", "--max-tokens", 2, "--repeats", 1
    _, out, _ = run("bench", bundle, *options)
    assert "2 prompts (1 without their beginning, for the context)" in " ".join(out.split())
    _, out, _ = run("bench", bundle, *options, "--every-plan", "--json")
    assert json.loads(out)["prompts_shortened"] == 1


@pytest.mark.parametrize("content", ["", "not json\n", '{"answer": 1}\n'])
def test_a_prompts_file_without_prompts_is_refused(run, bundle, tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    assert "prompts.jsonl" in refused(run, "bench", bundle, "--prompts", path)


@pytest.mark.parametrize(
    "options", [("--batch", 1, "--batch", 4), ("--context", 64), ("--shape", "tiny"), ("--random-weights",)]
)
def test_a_bench_option_that_would_be_ignored_is_refused(run, bundle, options):
    assert "--shape" in refused(run, "bench", bundle, *options)


@pytest.mark.parametrize("option", [("--transformers",), ("--prompts", "p.jsonl"), ("--max-tokens", 8), ("--chat",)])
def test_a_bench_of_a_shape_refuses_what_it_would_ignore(run, option):
    message = refused(run, "bench", "--shape", "tiny", "--random-weights", *option)
    assert f"bench with --shape does not take {option[0]}; drop {option[0]}" in message


def test_a_bench_of_long_prompts_refuses_what_it_would_ignore(run, bundle):
    options = "--batch", 2, "--plot", "x.png", "--count", 8
    assert "with --prompt-len does not take --batch or --count or --plot" in refused(
        run, "bench", bundle, "--prompt-len", 8, *options
    )
    of_a_shape = "--shape", "tiny", "--random-weights", "--prompt-len", 8, "--transformers"
    assert "does not take --transformers" in refused(run, "bench", *of_a_shape)
    assert "give at most 111" in refused(run, "bench", bundle, "--prompt-len", 112)


def test_long_prompts_of_a_shape_have_the_context_that_they_need(run):
    code, out, _ = run("bench", "--shape", "tiny", "--random-weights", "--prompt-len", 700, "--repeats", 1, "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["shape"], [cost["prompt_tokens"] for cost in facts["prompts"]]) == ("tiny", [700])


def test_auto_stands_beside_every_plan(run, bundle):
    options = "--every-plan", "--count", 2, "--max-tokens", 8, "--block-len", 4, "--repeats", 1
    code, out, _ = run("bench", bundle, *options)
    assert code == 0
    assert "of the speed of the best fixed plan: " in out
    code, out, _ = run("bench", bundle, *options, "--json")
    facts = json.loads(out)
    assert list(facts["finals"])[:2] == ["auto", "autoregressive"]
    assert len(facts["tried"]) > len(facts["finals"]) == 6


def test_a_comparison_of_plans_refuses_what_it_would_ignore(run, bundle):
    assert "with --every-plan does not take --plot" in refused(run, "bench", bundle, "--every-plan", "--plot", "x.png")


def test_long_prompts_are_timed_beside_transformers(run, bundle):
    options = "--prompt-len", 100, "--prompt-len", 20, "--repeats", 1, "--transformers", "--json"
    code, out, _ = run("bench", bundle, *options)
    costs = json.loads(out)["prompts"]
    assert code == 0
    assert [cost["prompt_tokens"] for cost in costs] == [20, 100]
    assert all(cost["tokens_per_second"] > 0 < cost["over_transformers"] for cost in costs)


def test_a_shape_that_is_not_known_is_refused(run):
    assert "known are" in refused(run, "bench", "--shape", "gpt-9", "--random-weights")
