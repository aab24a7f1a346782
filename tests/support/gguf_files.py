"""GGUF files of tiny transformers models, written by this module's own quantisers and its own order of rows."""

import copy
import json

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from vocabularies import BYTES, EOS, tokenizer_json

SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}}
MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PRE = {"gpt2": "gpt-2", "qwen2": "qwen2", "llama3": "llama-bpe", "smollm": "smollm"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def random_model(kind="llama", **changes):
    """A transformers model whose biases and norms are no constants, which would hide swapped tensors."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | FAMILIES[kind] | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_gguf(path, model, kind="F16", *, form="qwen2", permuted=None, drop=(), **keys):
    """Write a GGUF file, and return the model that has the values in it.

    kind      type of the matrices
    form      tokenizer, of vocabularies.py or `smollm`
    permuted  whether q and k have llama.cpp's order of rows; as the architecture has it by default
    drop      names of tensors and keys to leave out
    keys      further keys, with __ for a dot; a numpy array becomes a tensor
    """
    architecture, stored = model.config.model_type, copy.deepcopy(model)
    writer = gguf.GGUFWriter(path, architecture)
    given = {name.replace("__", "."): value for name, value in keys.items()}
    metadata = _metadata(model.config, architecture) | tokenizer_keys(form)
    metadata |= {name: value for name, value in given.items() if not isinstance(value, np.ndarray)}
    for key, value in metadata.items():
        if key not in drop and key != "general.architecture":
            _add(writer, key, value)
    permuted = architecture == "llama" if permuted is None else permuted
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            if gguf_name(name) in drop:
                continue
            exact = kind if parameter.dim() > 1 else "F32"
            rows = order_of_pairs(parameter, name, model.config) if permuted else list(range(len(parameter)))
            content, values = QUANTISERS[exact](parameter.numpy())
            writer.add_tensor(gguf_name(name), content[rows], raw_dtype=gguf.GGMLQuantizationType[exact])
            parameter.copy_(torch.from_numpy(values))
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def gguf_name(name):
    """GGUF's name of a tensor of transformers."""
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{MODULES[rest]}.{kind}"


def order_of_pairs(parameter, name, config):
    """Rows in llama.cpp's order: each dimension of a head's first half is followed by that of the second half."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return list(range(len(parameter)))
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    size = len(parameter) // heads
    return [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]


def tokenizer_keys(form):
    """Metadata of a tokenizer of vocabularies.py."""
    spec = json.loads(tokenizer_json("gpt2" if form == "smollm" else form))
    vocab = spec["model"]["vocab"]
    special = {token["content"] for token in spec["added_tokens"]}
    vocab |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    types = [6 if name in BYTES else 2 if name == "<unk>" else 3 if name in special else 1 for name in tokens]
    keys = {
        "tokens": tokens, "token_type": types, "bos_token_id": vocab["<s>"], "eos_token_id": vocab[EOS],
        "padding_token_id": vocab["<|end|>"],
    }  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    if form in PRE:
        keys |= {"model": "gpt2", "pre": PRE[form], "merges": merges, "add_bos_token": False}
    else:
        rank = {"".join(merge.split(" ")): place for place, merge in enumerate(merges)}
        scores = [-float(rank.get(name, 10_000)) for name in tokens]
        keys |= {"model": "llama", "scores": scores, "unknown_token_id": vocab["<unk>"]}
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | {"tokenizer.chat_template": TEMPLATE}


def made_tokenizer(form):
    """The tokenizer that `tokenizer_keys` describes."""
    fast = Tokenizer.from_str(tokenizer_json("gpt2" if form == "smollm" else form))
    if form == "smollm":
        digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    return fast


def _metadata(config, architecture):
    keys = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }  # fmt: skip
    if (size := getattr(config, "head_dim", None)) is not None:
        keys |= {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}
    return {f"{architecture}.{name}": value for name, value in keys.items()} | {"general.name": "tiny"}


def _add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def _f16(weight):
    return weight.astype(np.float16), weight.astype(np.float16).astype(np.float32)


def _bf16(weight):
    short = (weight.view(np.uint32) >> 16).astype(np.uint16)  # cut off, not rounded: any value will do
    return short.view(np.uint8), (short.astype(np.uint32) << 16).view(np.float32)


def _q8_0(weight):
    """Blocks of 32: an fp16 scale, then 32 signed bytes."""
    blocks = weight.reshape(len(weight), -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    quants = np.rint(blocks / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    content = np.concatenate([scale.view(np.uint8), quants.view(np.uint8)], -1)
    return content.reshape(len(weight), -1), (scale.astype(np.float32) * quants).reshape(weight.shape)


def _q4_1(weight):
    """Blocks of 32: an fp16 scale and minimum, then 16 bytes; the first 16 values are the low halves of the bytes."""
    blocks = weight.reshape(len(weight), -1, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale, low = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    wide = (scale.astype(np.float32), low.astype(np.float32))
    quants = np.rint((blocks - wide[1]) / wide[0]).clip(0, 15).astype(np.uint8)
    content = np.concatenate([scale.view(np.uint8), low.view(np.uint8), quants[..., :16] | quants[..., 16:] << 4], -1)
    return content.reshape(len(weight), -1), (wide[0] * quants + wide[1]).reshape(weight.shape)


def _q4_k(weight):
    """Blocks of 256, of random bytes: two fp16 scales, 8 scales and 8 minima of 6 bits, then 128 bytes of halves."""
    rng = np.random.default_rng(weight.size)
    blocks = weight.size // 256
    packed, halves = (rng.integers(0, 256, (blocks, size), dtype=np.uint8) for size in (12, 128))
    two = np.tile(np.array([[3e-4, 1.5e-3]], np.float16), (blocks, 1))
    values = np.empty((blocks, 8, 32), np.float32)
    for block in range(blocks):
        p = [int(byte) for byte in packed[block]]
        for j in range(8):
            if j < 4:
                scale, least = p[j] & 63, p[j + 4] & 63
            else:
                scale, least = (p[j + 4] & 15) | (p[j - 4] >> 6) << 4, (p[j + 4] >> 4) | (p[j] >> 6) << 4
            quants = halves[block, j // 2 * 32 : j // 2 * 32 + 32] >> (4 * (j % 2)) & 15
            values[block, j] = np.float32(two[block, 0]) * scale * quants - np.float32(two[block, 1]) * least
    content = np.concatenate([two.view(np.uint8), packed, halves], -1)
    return content.reshape(len(weight), -1), values.reshape(weight.shape)


QUANTISERS = {
    "F32": lambda weight: (weight, weight), "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_1": _q4_1, "Q4_K": _q4_k,
}  # fmt: skip
