"""Errors that a caller can act on.

    TidarError                 any error that this project raises on purpose
    ├── UserError              the user's input is wrong: exit code 2, HTTP 4xx
    │   ├── ConfigError        a configuration or job file
    │   ├── StorageError       a disk or an object store that refuses: permissions, space, a path
    │   ├── CorpusError        raw text: missing, empty, unreadable
    │   ├── TokenizerError     a tokenizer that cannot be used here
    │   ├── ShardError         packed shards: truncated, tampered with, of another layout
    │   ├── WeightsError       a model folder whose weights do not fit
    │   ├── BundleError        a bundle: missing, changed, incomplete
    │   ├── DivergedError      a training run whose losses or gradients are not finite
    │   ├── RegistryError      a registry name, version or alias
    │   ├── GateError          a report that misses its thresholds
    │   └── RequestError       one generation request
    │       ├── PromptError          no tokens, or ids that are not tokens of text
    │       └── ContextLengthError   prompt and max_tokens together are too long
    └── CapacityError          correct input, no capacity now: try again later

Every message is one line: what was given; what is needed; what to do. Errors cross process borders inside Ray, so each
takes one message and can be pickled.
"""

__all__ = [
    "BundleError",
    "CapacityError",
    "ConfigError",
    "ContextLengthError",
    "CorpusError",
    "DivergedError",
    "GateError",
    "PromptError",
    "RegistryError",
    "RequestError",
    "ShardError",
    "StorageError",
    "TidarError",
    "TokenizerError",
    "UserError",
    "WeightsError",
]


class TidarError(Exception):
    """Base of every error that this project raises on purpose."""


class UserError(TidarError):
    """The user's input is wrong; the same call will fail again."""


class ConfigError(UserError):
    """A configuration or job file that cannot be used."""


class StorageError(UserError, OSError):
    """A disk or an object store that refuses to read or write; also an OSError."""


class CorpusError(UserError):
    """Raw text that is missing, empty or unreadable."""


class TokenizerError(UserError):
    """A tokenizer that cannot be used here."""


class ShardError(UserError):
    """Packed shards that are truncated, changed or of another layout."""


class WeightsError(UserError):
    """A model folder whose weights or architecture do not fit."""


class BundleError(UserError):
    """A bundle that is missing, changed or incomplete."""


class DivergedError(UserError):
    """A training run whose losses or gradients are not finite."""


class RegistryError(UserError):
    """A registry name, version or alias that does not exist or cannot be set."""


class GateError(UserError):
    """A report that misses the thresholds of a release."""


class RequestError(UserError):
    """A generation request that cannot be honoured."""


class PromptError(RequestError):
    """A prompt without tokens, or with ids that are not tokens of text."""


class ContextLengthError(RequestError):
    """A prompt and max_tokens that together exceed the context."""


class CapacityError(TidarError):
    """Correct input, but no capacity for it now."""
