"""Commands on a checkpoint that was not converted: the autoregressive mode, with the texts of transformers."""

import json
import sys

import pytest
from chat_templates import chat_tokenizer
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint, their_text

import tidar
from tidar_core.artifacts.model.bundle import load_for_decoding
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.kernels.linear import weight_bytes

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None, "head_dim": 16},
}
PROMPT = "def add(a, b):\n    return"
NOTE = "does not draft yet, so it decodes in autoregressive mode"


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("qwen2.5", trained_on=["import os\n\n\n" + PROMPT + " a + b\n"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """Folder of a family; one of each for the whole module."""
    folders = {}

    def of(kind):
        if kind not in folders:
            folders[kind] = save_checkpoint(tmp_path_factory.mktemp("hf") / kind, tokenizer, kind, **FAMILIES[kind])
        return folders[kind]

    return of


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line and return exit code, standard output and standard error."""

    def call(*arguments):
        capfd.readouterr()  # transformers shows its progress when it saves and loads
        monkeypatch.setattr(sys, "argv", ["tidar", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            tidar.main()
        return left.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def facts(run):
    """The JSON object that a command prints, if it prints the note as well."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert sum(NOTE in line for line in err.splitlines()) == 1
        return json.loads(out)

    return call


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_generates_the_text_of_transformers(facts, checkpoint, tokenizer, kind):
    folder = checkpoint(kind)
    expected = their_text(folder, tokenizer.encode(PROMPT), 24)
    assert len(set(expected)) > 4
    answer = facts("generate", folder, PROMPT, "--max-tokens", 24)
    assert (answer["token_ids"], answer["mode"], answer["forwards"]) == (expected, "autoregressive", 24)


def test_a_text_ends_where_generation_config_ends_it(facts, tmp_path, tokenizer):
    folder = save_checkpoint(tmp_path, tokenizer)
    ids = tokenizer.encode(PROMPT)
    endless = their_text(folder, ids, 24)
    end = next(token for token in endless[5:] if token not in endless[:5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, end]}))
    expected = their_text(folder, ids, 24)
    assert expected[-1] == end
    answer = facts("generate", folder, PROMPT, "--max-tokens", 24, "--mode", "auto")
    assert (answer["token_ids"], answer["finish_reason"]) == (expected, "stop")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "single-pass"), "mode is single-pass and the model does not draft; give the mode autoregressive"),
        (("--mode", "two-pass"), "mode is two-pass and the model does not draft"),
        (("--block-len", 4), "block_len is 4 and the model has no mask token"),
    ],
)
def test_drafts_of_a_checkpoint_are_refused_in_one_line(run, checkpoint, arguments, words):
    code, out, err = run("generate", checkpoint("llama"), PROMPT, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_bench_times_the_autoregressive_mode_and_transformers_on_chat_prompts(facts, checkpoint, tmp_path, tokenizer):
    folder = checkpoint("llama")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"turns": ["import os", "more"]}) + "\n" + json.dumps({"prompt": PROMPT}) + "\n")
    options = ("--prompts", prompts, "--max-tokens", 6, "--repeats", 1)
    found = facts("bench", folder, *options, "--transformers", "--plot", tmp_path / "bench.png")
    assert (list(found["modes"]), found["block_len"], found["chat"]) == (["autoregressive"], 1, True)
    own, theirs = found["modes"]["autoregressive"], found["transformers"]
    assert theirs["equal_to_ar"] is True
    assert theirs["ar_over"] == pytest.approx(own["tokens_per_second"] / theirs["tokens_per_second"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert facts("bench", folder, *options, "--no-chat")["chat"] is False
    assert facts("bench", folder, "--count", 1, "--max-tokens", 2, "--repeats", 1)["chat"] is False


def test_weights_are_rounded_at_load_for_commands_that_decode(facts, run, checkpoint):
    folder = checkpoint("llama")
    answer = facts("generate", folder, PROMPT, "--max-tokens", 24, "--weights", "int8")
    assert answer["forwards"] == 24
    found = facts("bench", folder, "--count", 1, "--max-tokens", 4, "--repeats", 1, "--weights", "int8")
    assert found["weights"] == "int8"
    of_plain, of_int8 = (
        json.loads(run("serve", folder, *options, "--dry-run", "--json")[1])["weights"]
        for options in ((), ("--weights", "int8"))
    )
    assert of_plain != of_int8
    code, out, err = run("generate", folder, PROMPT, "--weights", "int4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "from 48 to 80 features; int4 needs a multiple of 32 features in; give int8" in err


def test_bench_without_llama_cpp_or_its_file_is_refused_in_one_line(run, checkpoint, tmp_path, monkeypatch):
    file, options = tmp_path / "x.gguf", ("--count", 1, "--max-tokens", 2)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    for words in ("there is no such file; give a GGUF file", "needs the package xllamacpp, which is not installed"):
        code, out, err = run("bench", checkpoint("llama"), *options, "--llama-cpp", file)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err
        file.write_bytes(b"GGUF")


def test_a_prompt_of_a_file_is_a_users_message_if_there_is_a_template(checkpoint, tmp_path):
    from pipelines.evaluation.measure import bench_prompts, loaded_bundle

    folder = checkpoint("llama")
    prompts, bundle = tmp_path / "prompts.jsonl", loaded_bundle(str(folder), 1, "fp32")
    prompts.write_text(json.dumps({"question": PROMPT}) + "\n")
    found = bench_prompts(str(folder), bundle, prompts, 1, 4)
    template, tokenizer = load_chat_template(folder), load_tokenizer(folder)
    assert found.tokens == [tuple(encode_chat(template, tokenizer, [{"role": "user", "content": PROMPT}]))]
    assert found.end_ids == (tokenizer.eos_id, tokenizer.special_ids["<|im_end|>"])
    continued = bench_prompts(str(folder), bundle, prompts, 1, 4, chat=False)
    assert (continued.tokens, continued.end_ids) == ([tuple(tokenizer.encode(PROMPT))], bundle.end_ids)


def test_commands_take_a_bundle_that_names_its_checkpoint(run, checkpoint, tmp_path, tokenizer):
    folder = checkpoint("llama")
    bundle = save_drafts_bundle(tmp_path / "drafts", folder, seed=1, base_uri=str(folder))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}))
    options = ("--prompts", prompts, "--max-tokens", 4, "--repeats", 1)
    printed = [
        run(*arguments, "--json")
        for arguments in (
            ("generate", bundle, PROMPT, "--max-tokens", 24),
            ("bench", bundle, *options, "--transformers"),
            ("serve", bundle, "--dry-run"),
        )
    ]
    assert [code for code, _, _ in printed] == [0, 0, 0], printed
    text, timed, memory = (json.loads(out) for _, out, _ in printed)
    assert (text["token_ids"], text["mode"]) == (their_text(folder, tokenizer.encode(PROMPT), 24), "single-pass")
    assert timed["chat"]
    assert timed["transformers"]["equal_to_ar"]
    assert memory["weights"] == weight_bytes(load_for_decoding(bundle).model)


def test_chat_without_a_prompts_file_or_a_template_is_refused_in_one_line(run, checkpoint, tmp_path, tokenizer):
    plain = save_checkpoint(tmp_path / "plain", tokenizer)
    (plain / "chat_template.jinja").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    for arguments, words in (
        ((checkpoint("llama"), "--chat"), "--chat needs a prompts file; drop --chat"),
        ((plain, "--chat", "--prompts", tmp_path / "prompts.jsonl"), "plain has none; drop --chat"),
    ):
        code, _, err = run("bench", *arguments, "--max-tokens", 2)
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err


def test_profile_times_forwards_of_a_checkpoint(facts, tmp_path, tokenizer):
    found = facts("profile", save_checkpoint(tmp_path / "own", tokenizer), "--batch", 1)
    assert {point["rows"] for point in found["points"]} >= {1, 512}
    table = json.loads((tmp_path / "own.latency" / found["stored"].rsplit("/", 1)[1]).read_text())
    assert table["made_with"]["block_len"] == 1


def test_a_dry_run_of_the_service_counts_no_masks(run, checkpoint):
    code, out, err = run("serve", checkpoint("llama"), "--dry-run", "--json", "--rows", 2)
    assert code == 0, err
    assert json.loads(out)["weights"] > 0
    code, _, err = run("serve", checkpoint("llama"), "--dry-run", "--mode", "single-pass")
    assert (code, err.count("\n")) == (2, 1), err
    assert "mode is single-pass and the model does not draft" in err


def test_plans_of_a_checkpoint_that_makes_no_drafts_are_refused(run, checkpoint):
    code, out, err = run("bench", checkpoint("llama"), "--every-plan")
    assert (code, out) == (2, "")
    assert "makes no drafts, so it has one plan; give a bundle that drafts" in err
