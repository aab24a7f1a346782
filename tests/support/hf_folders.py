"""Tiny Hugging Face folders with random weights, and their logits by transformers and by TiDAR."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from tidar_core.artifacts.model.hf_weights import load_model
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))


def save_folder(folder, kind="llama", **changes):
    """A folder for the model_type `kind`, as transformers writes it."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | {"tie_word_embeddings": False} | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at constants, which would hide swapped tensors
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def save_checkpoint(folder, tokenizer, kind="llama", **changes):
    """A checkpoint: such a folder with a tokenizer and a context that holds a prompt of some sentences."""
    ids = {"vocab_size": tokenizer.vocab_len + 7, "bos_token_id": None, "eos_token_id": tokenizer.eos_id}
    save_folder(folder, kind, **{**ids, "max_position_embeddings": 1024, **changes})
    tokenizer.save(folder)
    return folder


def their_text(folder, ids, max_tokens, **settings):
    """The greedy continuation of `ids` by transformers' `generate`, with the end tokens that the folder names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    whole = model.generate(
        prompt, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, **settings
    )
    return whole[0, len(ids) :].tolist()


def change_config(folder, drop=(), **keys):
    """Adds, changes and drops keys of config.json."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in drop}))


def change_tensors(folder, drop=(), **tensors):
    """Adds, changes and drops tensors of model.safetensors."""
    path = folder / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: value for name, value in held.items() if name not in drop}, path, metadata={"format": "pt"})


def their_logits(folder):
    """Logits of transformers for IDS."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def our_logits(folder):
    """Logits of TiDAR's model for IDS."""
    model, layout = load_model(folder), causal_layout(torch.zeros_like(IDS))
    with torch.no_grad():
        return model.head(model(IDS, layout.position, DenseAttention(layout)))


def assert_read_alike(folder):
    """Asserts that TiDAR's logits equal the logits of transformers."""
    # fp32 through two layers; the order of sums differs
    torch.testing.assert_close(our_logits(folder), their_logits(folder), rtol=0, atol=1e-4)
