"""What would the model say, one token per forward?

The plain loop: no slots, no layout, no drafts, one sequence. It is the oracle that every faster way must equal, so it
shares with them the model and the sampler's draws alone.
"""

import torch
from torch import Tensor

from tidar_core.attention import attend
from tidar_core.config import SamplingConfig
from tidar_core.model import TidarModel
from tidar_core.sampling import TARGET, SamplingTensors, sample

__all__ = ["generate_autoregressive"]


@torch.inference_mode()
def generate_autoregressive(model: TidarModel, prompt: tuple[int, ...], sampling: SamplingConfig) -> tuple[int, ...]:
    """Token ids that continue `prompt`, up to max_tokens or the first end-of-text token (included)."""
    fields = SamplingTensors.of([sampling], model.embedding.weight.device)
    memory = _GrowingMemory()
    unread = list(prompt)
    generated: list[int] = []
    while len(generated) < sampling.max_tokens:
        position = torch.arange(memory.length, memory.length + len(unread), device=fields.seed_B.device)[None]
        hidden = model(torch.tensor([unread], device=position.device), position, memory)
        token = int(sample(model.head(hidden[:, -1:]), fields, position[:, -1:] + 1, TARGET))
        generated.append(token)
        unread = [token]
        if token in sampling.eos_ids:
            break
    return tuple(generated)


class _GrowingMemory:
    """Keys and values of all tokens so far, joined anew at every step."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        if layer in self.layers:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        rows, columns = q.shape[2], k.shape[2]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        return attend(q, k, v, visible.expand(q.shape[0], -1, -1)).transpose(1, 2)
