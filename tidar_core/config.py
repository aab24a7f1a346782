"""Configs of a model, a draft and a request.

Configs are frozen and validated when made: a config that exists is valid. Change one with `dataclasses.replace`.
"""

from dataclasses import dataclass

from tidar_core.errors import ConfigError, RequestError

__all__ = [
    "ADAPTER_PLACES",
    "AUTOREGRESSIVE",
    "COLDEST",
    "DRAFTING_MODES",
    "AdapterConfig",
    "DraftConfig",
    "ModelConfig",
    "RopeScaling",
    "SamplingConfig",
    "mode_of",
]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_KINDS = ("linear", "llama3", "yarn")
DRAFT_KINDS = ("argmax", "sampled")
AUTOREGRESSIVE = "autoregressive"
DRAFTING_MODES = ("single-pass", "two-pass")
ADAPTER_PLACES = ("qkv", "output", "gate_up", "down")
"""Linear maps of a layer that may have an adapter: query, key and value; attention output; gate and up; down."""
COLDEST = 1e-5
"""Lowest temperature above 0: logits divided by a lower one could overflow."""
MOST_LOGPROBS = 20
"""Most tokens whose log-probability is reported in addition to the chosen token's."""
STRONGEST_BIAS = 100
"""Largest absolute bias on a token's logit."""
STRONGEST_PENALTY = 2
"""Largest absolute presence or frequency penalty."""
STRONGEST_REPETITION_PENALTY = 1e5
"""Largest repetition penalty; the least is its inverse. Logits multiplied by more could overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the context that they were trained on."""

    kind: str
    factor: float
    """Extension of the context, at least 1."""
    original_context_len: int
    """Context of the original training, in tokens."""
    low_freq_factor: float = 1.0
    """llama3 only: frequencies of wavelengths above original_context_len / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3 only: frequencies of wavelengths below original_context_len / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn only: rotations within the original context above which a frequency stays as it is."""
    beta_slow: float = 1.0
    """yarn only: rotations below which a frequency is divided by `factor`."""
    attention_factor: float = 1.0
    """yarn only: factor on cosines and sines."""

    def __post_init__(self) -> None:
        _require(self.kind in ROPE_KINDS, f"rope scaling kind is {self.kind!r}; it must be one of {ROPE_KINDS}")
        _require(self.factor >= 1, f"rope scaling factor is {self.factor}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Shape of the draft adapter of a frozen checkpoint: maps of low rank that act on mask tokens alone."""

    rank: int
    """Rank of each map; a map serves all projections that read the same input."""
    block_len: int
    """K: mask tokens of a block with a vector of their own. Later masks use the last vector."""
    places: tuple[str, ...] = ADAPTER_PLACES
    shifted: bool = False
    """Whether a mask has the rotary phase of the position before its own. It then predicts the next token, as each
    token of the frozen checkpoint does."""
    causal: bool = False
    """Whether a mask sees no later mask of its block, as no token of the frozen checkpoint sees a later one."""
    link_reads_state: bool = False
    """Whether the link, if there is one, reads the mask's hidden state beside the token before it."""
    link_shares_tables: bool = False
    """Whether the link's tables are maps of the checkpoint's embedding table and head."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"adapter rank is {self.rank}; it must be at least 1")
        _require(self.block_len >= 1, f"adapter block_len is {self.block_len}; it must be at least 1")
        _require(
            0 < len(self.places) == len({*self.places} & {*ADAPTER_PLACES}),
            f"adapter places are {self.places}; name some of {', '.join(ADAPTER_PLACES)}, each at most once",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer of the Llama, Qwen2 or Qwen3 family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context_len: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_head: bool = False
    """Whether the output projection is the embedding table."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the attention output projection has a bias (Llama's `attention_bias`)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    mask_id: int | None = None
    """Id of the mask token, which stands for "to be predicted"; its logit is minus infinity everywhere."""
    link_rank: int = 0
    """Rank of the link from a draft to the token before it; 0: drafts of a block are independent, as in the paper."""
    adapter: AdapterConfig | None = None
    """Draft adapter, if the checkpoint's weights stay as they are. No id of the vocabulary is then a mask token."""

    @property
    def drafting(self) -> bool:
        """Whether the model has mask tokens; without them it decodes in autoregressive mode alone."""
        return self.mask_id is not None or self.adapter is not None

    @property
    def causal_masks(self) -> bool:
        """Whether a mask token sees no later mask token."""
        return self.adapter is not None and self.adapter.causal

    def __post_init__(self) -> None:
        _require(
            self.mask_id is None or self.adapter is None,
            f"mask_id is {self.mask_id} and the model has a draft adapter, whose mask token needs no id; give one",
        )
        _require(self.link_rank >= 0, f"link_rank is {self.link_rank}; it must be 0 (no link) or more")
        _require(
            self.architecture in ARCHITECTURES,
            f"architecture is {self.architecture!r}; this project runs {', '.join(ARCHITECTURES)}",
        )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context_len"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads is {self.heads} and kv_heads {self.kv_heads}; heads must be a multiple of kv_heads",
        )
        _require(self.head_size % 2 == 0, f"head_size is {self.head_size}; rotary embedding needs an even number")
        _require(
            self.mask_id is None or 0 <= self.mask_id < self.vocab_size,
            f"mask_id is {self.mask_id}; it must be an id of the vocabulary, 0..{self.vocab_size - 1}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Length of a draft block, and the way its tokens are chosen."""

    block_len: int = 8
    """K: tokens in a draft block, the final first token included (TiDAR, section 3)."""
    kind: str = "argmax"
    """`argmax`: a draft is the likeliest token, a point mass. `sampled`: a draft is drawn from the mask token's
    distribution, which is kept until the draft is verified."""

    def __post_init__(self) -> None:
        _require(self.block_len >= 1, f"block_len is {self.block_len}; it must be at least 1")
        _require(self.kind in DRAFT_KINDS, f"draft kind is {self.kind!r}; it must be one of {DRAFT_KINDS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Sampling settings of one request."""

    max_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 is greedy: the distribution is a point mass on the likeliest token."""
    top_k: int = 0
    """Number of likeliest tokens that are kept; 0 keeps all."""
    top_p: float = 1.0
    """Probability that the kept set must reach: the smallest set of likeliest tokens is kept."""
    min_p: float = 0.0
    """Share of the likeliest token's probability that a kept token needs."""
    repetition_penalty: float = 1.0
    """Factor for tokens of the prompt and the output: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output contains."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each of its occurrences in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and the numbers that are added to their logits, each token once."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output must not contain."""
    min_tokens: int = 0
    """Least number of output tokens before any of `eos_ids` is allowed."""
    seed: int = 0
    """Seed of the request's draws."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end generation. The first of them is part of the output, and is counted."""
    logprobs: int | None = None
    """Log-probabilities reported with each new token. `None`: no report. 0: the token's own. k: also the k likeliest
    tokens'. They are of the AR distribution, before any rule or temperature."""
    prompt_logprobs: bool = False
    """Whether log-probabilities are reported for the tokens of the prompt too."""
    beta: float = 1.0
    """Weight of the AR logits against the diffusion logits in verification (TiDAR, section 4.4.3). 1 is exact
    with respect to the AR mode. A lower weight defines another model, whose distribution depends on block_len."""

    def __post_init__(self) -> None:
        for holds, message in (
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be at least 1"),
            (
                self.temperature == 0 or COLDEST <= self.temperature <= 100,
                f"temperature is {self.temperature}; it must be 0 (greedy) or from {COLDEST} to 100",
            ),
            (self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must be from 0 (off) to 1"),
            (
                1 / STRONGEST_REPETITION_PENALTY <= self.repetition_penalty <= STRONGEST_REPETITION_PENALTY,
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, from "
                f"{1 / STRONGEST_REPETITION_PENALTY} to {STRONGEST_REPETITION_PENALTY:.0f}, and 1 is off",
            ),
            _within(STRONGEST_PENALTY, self.presence_penalty, "presence_penalty"),
            _within(STRONGEST_PENALTY, self.frequency_penalty, "frequency_penalty"),
            *(_within(STRONGEST_BIAS, bias, f"logit_bias of token {token}") for token, bias in self.logit_bias),
            (
                len(dict(self.logit_bias)) == len(self.logit_bias),
                "logit_bias names a token twice; give each token one bias",
            ),
            (all(self.bad_words), "bad_words holds an empty sequence; each must have at least one token"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens, here {self.max_tokens}",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs is {self.logprobs}; it must be from 0 to {MOST_LOGPROBS}, or absent",
            ),
            (0 <= self.beta <= 1, f"beta is {self.beta}; it must be from 0 to 1"),
            (abs(self.seed) < 2**63, f"seed is {self.seed}; it must be from {1 - 2**63} to {2**63 - 1}"),
        ):
            if not holds:
                raise RequestError(message)


def mode_of(config: ModelConfig, named: str | None, *, default: str) -> str:
    """The mode in which a model decodes; a model that does not draft has the autoregressive mode alone.

    Raises ConfigError if the user named a mode that drafts and the model does not draft.

    named    mode that the user named, if any
    default  mode of a model that drafts if the user named no mode
    """
    if config.drafting:
        return named or default
    if named in DRAFTING_MODES:
        raise ConfigError(
            f"mode is {named} and the model does not draft; give the mode {AUTOREGRESSIVE}, or convert the model "
            "with tidar train"
        )
    return AUTOREGRESSIVE


def _within(most: int, value: float, name: str) -> tuple[bool, str]:
    return -most <= value <= most, f"{name} is {value}; it must be from -{most} to {most}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
