"""Published and named model shapes that can be built without a weight file."""

from dataclasses import replace

from tidar_core.config import ModelConfig, RopeScaling
from tidar_core.errors import ConfigError

__all__ = ["SHAPES", "named_shape"]

_QWEN2_5_1_5B = ModelConfig(
    architecture="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, layers=28, heads=12, kv_heads=2,
    head_size=128, context_len=32768, rope_theta=1e6, tied_head=True, qkv_bias=True,
)  # fmt: skip
_QWEN3_8B = ModelConfig(
    architecture="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, layers=36, heads=32, kv_heads=8,
    head_size=128, context_len=40960, rope_theta=1e6, qk_norm=True,
)  # fmt: skip
_LLAMA_3_1_8B = ModelConfig(
    architecture="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32, kv_heads=8,
    head_size=128, context_len=131072, rope_theta=5e5, norm_eps=1e-5,
    rope_scaling=RopeScaling(kind="llama3", factor=8, original_context_len=8192),
)  # fmt: skip
_QWEN3_125M = ModelConfig(
    architecture="qwen3", vocab_size=16384, hidden_size=768, intermediate_size=2304, layers=16, heads=12, kv_heads=4,
    head_size=64, context_len=2048, rope_theta=1e5, qk_norm=True, tied_head=True,
)  # fmt: skip
_SMOLLM2_135M = ModelConfig(
    architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3,
    head_size=64, context_len=8192, rope_theta=1e5, norm_eps=1e-5, tied_head=True,
)  # fmt: skip
_QUICKSTART = ModelConfig(
    architecture="qwen3", vocab_size=576, hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2,
    head_size=32, context_len=512, qk_norm=True, tied_head=True,
)  # fmt: skip
_QUICKSTART_SMALL = replace(_QUICKSTART, hidden_size=64, intermediate_size=192, layers=3, head_size=16)
_QUICKSTART_LARGE = replace(_QUICKSTART, hidden_size=256, intermediate_size=768, heads=8, kv_heads=4)
_TINY = ModelConfig(
    architecture="qwen3", vocab_size=512, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2,
    head_size=8, context_len=128, qk_norm=True, tied_head=True,
)  # fmt: skip

SHAPES = {
    "tiny": _TINY,
    "quickstart-small": _QUICKSTART_SMALL,
    "quickstart": _QUICKSTART,
    "quickstart-large": _QUICKSTART_LARGE,
    "qwen3-125m": _QWEN3_125M,
    "smollm2-135m": _SMOLLM2_135M,
    "qwen2.5-1.5b": _QWEN2_5_1_5B,
    "qwen3-8b": _QWEN3_8B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
}


def named_shape(name: str, *, vocab_len: int | None = None) -> ModelConfig:
    """The shape called `name`, with a reserved id for the mask token. Raises ConfigError for an unknown name.

    vocab_len  ids that the tokenizer can produce. If given, the vocabulary is the next multiple of 64 above it, and
               the mask token is the first id that no token uses.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape is {name!r}; known are {', '.join(SHAPES)}; or give init_from a model folder")
    shape = SHAPES[name]
    if vocab_len is None:
        return replace(shape, mask_id=shape.vocab_size - 1)
    return replace(shape, vocab_size=(vocab_len + 64) // 64 * 64, mask_id=vocab_len)
