"""infra/gpu: a corpus that travels, and the run that trains on it, at the smallest size on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.config import SamplingConfig
from tidar_core.planning.mode_benchmark import compare_modes

SCRIPTS = Path(__file__).parents[1] / "infra/gpu"


@pytest.fixture(scope="module")
def corpus():
    """The module infra/gpu/corpus.py."""
    sys.path.insert(0, str(SCRIPTS))
    import corpus

    yield corpus
    sys.path.remove(str(SCRIPTS))
    del sys.modules["corpus"]


def test_a_copy_of_another_version_is_dropped_and_new_text_is_kept(corpus):
    seen = set()
    first = "\n".join(f"a line of text with the number {i}" for i in range(20))
    changed = first.replace("number 3", "figure 3")
    other = "\n".join(f"something else is said here, part {i}" for i in range(20))
    assert [corpus._is_new(text, seen) for text in (first, first, changed, other)] == [True, False, False, True]


def test_versions_of_one_module_land_in_one_split(corpus):
    for number in range(300):
        splits = {corpus.Document(f"stdlib:/part{chr(97 + number % 26)}/lib{v}/m{v}.py", "").held_out for v in (8, 12)}
        assert len(splits) == 1


def test_the_text_of_a_page_is_what_its_reader_sees(corpus):
    html = "<head><title>T</title></head><p>One\n two</p><pre>a\n  b</pre><script>x()</script><p>3 &lt; 4"
    assert corpus._TextOfHtml.of(html) == "One two\n\na\n  b\n\n3 < 4\n"


@pytest.mark.slow
def test_a_corpus_becomes_a_trained_bundle_with_curves(corpus, tmp_path):
    sources = sorted((SCRIPTS.parents[1] / "tidar_core/decoding").glob("*.py"))
    documents = [corpus.Document(f"venv:tidar/{path.name}", path.read_text()) for path in sources]
    held_out = corpus.Document("venv:tidar/x.py", documents[0].text)
    held_out = next(d for i in range(5000) if (d := corpus.Document(f"venv:t/{'x' * i}.py", held_out.text)).held_out)
    corpus.write_corpus([*documents, held_out], tmp_path / "corpus")
    texts = corpus.read_corpus(tmp_path / "corpus")
    assert texts == {"train": [d.text for d in documents if not d.held_out], "held_out": [held_out.text]}
    options = (
        "--shape tiny --row-len 64 --rows-per-step 8 --rows-per-forward 4 --block-len 4 --link-rank 8 --sample-mb 1 "
        f"--seconds 6 --device cpu --corpus {tmp_path}/corpus --out {tmp_path}/out --report {tmp_path}/report"
    )
    command = [sys.executable, SCRIPTS / "real_model.py", "train", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "report/run.json").read_text())
    assert run["evaluations"]["dual"]["ar_loss"] < run["evaluations"]["start"]["ar_loss"]
    assert len(run["evaluations"]["dual"]["draft_accuracy_K"]) == 4
    phases = {json.loads(line)["phase"] for line in (tmp_path / "report/curves.jsonl").read_text().splitlines()}
    assert phases == {"ar", "dual"}
    bundle = load_bundle(tmp_path / "out/bundle")
    assert bundle.info.block_len == 4
    assert bundle.model.link.after.any()  # it has learned something
    prompts = read_prompts(tmp_path / "out/prompts.jsonl", 2)
    tokens = [tuple(bundle.tokenizer.encode(text)[:32]) for text in prompts]
    modes = compare_modes(bundle.model, tokens, SamplingConfig(max_tokens=8), block_len=4, repeats=1)
    assert all(mode.equal_to_ar for mode in modes.values())
    assert "--- continuation" in (tmp_path / "report/samples.txt").read_text()
