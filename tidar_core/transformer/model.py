"""Decoder-only transformer for the Llama, Qwen2, Qwen2.5 and Qwen3 families.

The same model serves training and decoding. The `Attention` that it is called with decides which token sees which, and
which keys are cached.

Shape letters: B sequences, L tokens (the last M of them mask tokens), E embedding, H heads, D head width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar_core.config import ModelConfig
from tidar_core.kernels import layers_on_cpu
from tidar_core.transformer.attention import Attention, SplitAttention
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS, DraftAdapter, LayerAdapter, LowRank
from tidar_core.transformer.draft_link import DraftLink

__all__ = ["TidarModel", "rotary_frequencies"]


class TidarModel(nn.Module):
    """Transformer from tokens and positions to hidden states; `head` computes the logits of chosen states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config)
        self.link = DraftLink(config) if config.link_rank else None
        self.adapter = DraftAdapter(config) if config.adapter else None
        self.tie()
        self.recompute = False
        """Whether a forward keeps only the input of each layer; the backward pass then computes the rest again."""
        self.weights: str | None = None
        """Form of the linear maps of a model that was prepared for decoding with fewer bits."""
        self._rotary: dict[torch.device, tuple[Tensor, float]] = {}

    def forward(self, token_BL: Tensor, position_BL: Tensor, attention: Attention) -> Tensor:
        """Hidden states [B, L, E] after the last norm; pass the states to sample from to `head`."""
        hidden = self.embedding(token_BL)
        rotation = self.rotation(position_BL, hidden.dtype)
        for layer in self.layers:
            hidden = self._run(layer, hidden, rotation, attention)
        return self.norm(hidden)

    def adapted(self, token_BL: Tensor, position_BL: Tensor, attention: SplitAttention, offset_BM: Tensor) -> Tensor:
        """Hidden states [B, L, E], where the adapter embeds the M last tokens and acts on them.

        Both streams of tokens meet in attention alone: masks read keys and values of clean tokens. If the checkpoint's
        weights need no gradient, nothing of the clean stream is kept for a backward pass.

        token_BL   ids; those of masks are not read
        offset_BM  index of each mask in its block, from 0
        """
        assert self.adapter is not None, "the model has no adapter"
        clean_len = token_BL.shape[1] - offset_BM.shape[1]
        clean, masks = self.embedding(token_BL[:, :clean_len]), self.adapter(offset_BM)
        rotation = self.rotation(self.adapter.turned(position_BL, clean_len), clean.dtype)
        of_clean, of_masks = zip(*([x.contiguous() for x in part.tensor_split([clean_len], 1)] for part in rotation))
        for layer, adapter in zip(self.layers, self.adapter.layers):
            clean = self._run(layer, clean, of_clean, attention.clean)
            masks = self._run(layer, masks, of_masks, attention.masks, adapter)
        return torch.cat([self.norm(clean), self.norm(masks)], 1)

    def _run(self, layer: nn.Module, hidden: Tensor, *inputs: object) -> Tensor:
        """Hidden states after a layer; with `recompute`, a gradient needs only its input."""
        if self.recompute and torch.is_grad_enabled() and hidden.requires_grad:
            return checkpoint(layer, hidden, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(hidden, *inputs)

    def link_logits(self, before: Tensor, hidden: Tensor) -> Tensor:
        """Logits [.., V] that the link adds to those of masks, once the tokens `before` theirs [..] are known.

        hidden  hidden states of the masks [.., E]
        """
        assert self.link is not None, "the model has no link"
        logits: Tensor = self.link(before, hidden, self.embedding, self.head)
        return logits

    def tie(self) -> None:
        """Use the embedding table as the head, if the config has `tied_head`."""
        if self.config.tied_head:
            self.head.weight = self.embedding.weight  # pyrefly: ignore[bad-assignment]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise weights: normal with width 0.02, narrower where a layer adds to the residual stream (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        if self.link is not None:
            self.link.start(generator)
        for name, parameter in self.named_parameters():
            if name.startswith(DRAFT_WEIGHTS):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
                scale = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if self.adapter is not None:
            self.adapter.start(self.embedding.weight, generator)

    def rotation(self, position_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, 1, D], computed in fp32 and rounded to `dtype`.

        Frequencies are kept outside the weights, because casts and engines convert weights.
        """
        device = position_BL.device
        if device not in self._rotary:
            frequency, scale = rotary_frequencies(self.config)
            self._rotary[device] = frequency.to(device), scale
        frequency, scale = self._rotary[device]
        angle = position_BL[..., None].float() * frequency
        angle = torch.cat([angle, angle], -1)[:, :, None]
        return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


class _Embedding(nn.Embedding):
    """Embedding whose weights are not drawn on the meta device, where torch would load its compiler for it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Head(nn.Module):
    """Projection from hidden states to logits. The mask token's logit is minus infinity, so it is never sampled."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.mask_id = config.mask_id

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., E] to logits [.., V]."""
        return F.linear(hidden, self.weight, self.mask_bias(hidden))

    def mask_bias(self, like: Tensor) -> Tensor | None:
        """Bias [V] in the dtype and on the device of `like`; None for a model without a mask token."""
        if self.mask_id is None:
            return None
        bias = like.new_zeros(self.weight.shape[0])
        bias[self.mask_id].fill_(float("-inf"))  # an assigned number would be copied from the host
        return bias


class Layer(nn.Module):
    """Attention and feed-forward network, each with a norm before it and a residual around it."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.attention = SelfAttention(config, index)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Attention,
        adapter: LayerAdapter | None = None,
    ) -> Tensor:
        """Hidden states [B, L, E] to hidden states [B, L, E].

        adapter  maps to add, if all tokens are masks of a draft adapter
        """
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, attention, adapter)
        return hidden + self.mlp(self.mlp_norm(hidden), adapter)


class SelfAttention(nn.Module):
    """Projections and rotation around the values that an `Attention` gathers."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        width = (config.heads + 2 * config.kv_heads) * config.head_size
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = nn.Linear(config.heads * config.head_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = RmsNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RmsNorm(config.head_size, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Attention,
        adapter: LayerAdapter | None = None,
    ) -> Tensor:
        """Hidden states [B, L, E] to hidden states [B, L, E]."""
        qkv = _added(self.qkv(hidden), hidden, None if adapter is None else adapter.qkv).unflatten(
            -1, (-1, self.head_size)
        )
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        gathered = attention(self.index, _rotate(q, *rotation), _rotate(k, *rotation), v)
        gathered = gathered.flatten(2)
        return _added(self.output(gathered), gathered, None if adapter is None else adapter.output)


class Mlp(nn.Module):
    """SwiGLU feed-forward network; gate and up projection in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, adapter: LayerAdapter | None = None) -> Tensor:
        """Hidden states [B, L, E] to hidden states [B, L, E]."""
        gated = _gated(_added(self.gate_up(hidden), hidden, None if adapter is None else adapter.gate_up))
        return _added(self.down(gated), gated, None if adapter is None else adapter.down)


class RmsNorm(nn.Module):
    """Norm that divides by the root mean square, then scales."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normed x [.., size]."""
        weight = self.weight.to(x.dtype)
        if not weight.requires_grad and layers_on_cpu.suits(x, weight):
            return layers_on_cpu.rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position for each pair of a head's dimensions [D / 2], and the factor on cosine and sine.

    Scaling follows the published forms: linear interpolation, Llama 3's, YaRN (arXiv 2309.00071, section 3.2).
    """
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency, 1.0
    slowed = frequency / scaling.factor
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "llama3":
        rotations = scaling.original_context_len * frequency / (2 * math.pi)
        keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequency + (1 - keep) * slowed, 1.0
    first, last = (
        _yarn_dimension(config, scaling.original_context_len, b) for b in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), config.head_size - 1)
    index = torch.arange(config.head_size // 2, dtype=torch.float32)
    slow = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return (1 - slow) * frequency + slow * slowed, scaling.attention_factor


def _yarn_dimension(config: ModelConfig, context_len: int, rotations: float) -> float:
    """Dimension whose frequency makes `rotations` turns within the original context."""
    turns = math.log(context_len / (rotations * 2 * math.pi))
    return config.head_size * turns / (2 * math.log(config.rope_theta))


def _added(y: Tensor, x: Tensor, adapter: LowRank | None) -> Tensor:
    """y, the product of a linear map with x, plus the adapter's product."""
    return y if adapter is None else adapter(x, y)


def _gated(gate_up: Tensor) -> Tensor:
    if layers_on_cpu.suits(gate_up):
        return layers_on_cpu.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if layers_on_cpu.suits(x, cos, sin):
        return layers_on_cpu.rotated(x, cos, sin)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
