"""The same prompts for llama.cpp: a file with other tokens under the same ids is refused."""

import pytest
from gguf_files import made_tokenizer, random_model, write_gguf
from vocabularies import EOS

from pipelines.evaluation.llama_cpp_baseline import require_same_tokens
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.errors import RequestError, WeightsError


@pytest.mark.parametrize("form", ["qwen2", "llama2"])
def test_a_file_of_the_same_tokenizer_is_accepted_and_another_is_refused_by_the_first_token(tmp_path, form):
    model = random_model("llama")
    write_gguf(tmp_path / "same.gguf", model, form=form)
    write_gguf(tmp_path / "other.gguf", model, form="gpt2" if form == "llama2" else "llama2")
    tokenizer = Tokenizer(made_tokenizer(form), {"eos_token": EOS})
    prompts = [tuple(tokenizer.encode("Hello world")), tuple(tokenizer.encode_with_special(f"the{EOS}"))]
    require_same_tokens(tmp_path / "same.gguf", prompts, tokenizer)
    with pytest.raises(RequestError, match=r"whose token \d+ is .*; give a GGUF file of the same model") as caught:
        require_same_tokens(tmp_path / "other.gguf", prompts, tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="whose token 9999 is None"):
        require_same_tokens(tmp_path / "same.gguf", [(9999,)], tokenizer)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "same.gguf").read_bytes()[:3000])
    with pytest.raises(WeightsError, match="cut short or damaged"):
        require_same_tokens(tmp_path / "cut.gguf", prompts, tokenizer)
