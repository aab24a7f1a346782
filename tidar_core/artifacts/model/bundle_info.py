"""Identity of a model on disk, without its weights: tidar.json of a bundle, or the hashes of a checkpoint's files.

The bundle hash is the hash of tidar.json without its own entry. It covers every byte of the folder, because tidar.json
holds the hashes of all other files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tidar_core.artifacts.model.hf_config import read_config
from tidar_core.artifacts.store import locations
from tidar_core.config import AdapterConfig, ModelConfig
from tidar_core.errors import BundleError, ConfigError

__all__ = [
    "BUNDLE_JSON",
    "FORMAT_VERSION",
    "FROZEN_FORMAT_VERSION",
    "REFETCH",
    "BundleInfo",
    "DraftsInfo",
    "base_location",
    "bundle_hash",
    "hf_location",
    "info_of",
    "is_bundle",
    "model_config",
    "model_info",
    "no_drafts_note",
    "read_bundle_info",
    "require_file",
    "verify_bundle",
]

BUNDLE_JSON = "tidar.json"
FORMAT_VERSION = 1
FROZEN_FORMAT_VERSION = 2
"""Version of a bundle with a frozen checkpoint. Code that knows version 1 alone would read it without its drafts."""
REFETCH = "fetch the bundle again or train it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsInfo:
    """Shape of the drafts of a bundle, and the checkpoint that they were trained for."""

    adapter: AdapterConfig
    link_rank: int
    base_hash: str
    """Content hash of the checkpoint."""
    base_uri: str | None = None
    """Address of the checkpoint; `None`: the bundle holds a copy of its files."""

    def config(self, base: ModelConfig) -> ModelConfig:
        """Config of the checkpoint with these drafts."""
        return replace(base, adapter=self.adapter, link_rank=self.link_rank)

    def values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> "DraftsInfo":
        """Inverse of `values`. Raises KeyError, TypeError or ConfigError for values of another form."""
        adapter = dict(values["adapter"])
        adapter["places"] = tuple(adapter["places"])
        given = dict(values)
        given["adapter"] = AdapterConfig(**adapter)
        return DraftsInfo(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleInfo:
    """Contents of tidar.json; for a checkpoint, what a bundle of the same model would have."""

    block_len: int
    """K of the training; 1 for a checkpoint."""
    mask_id: int | None
    """Id of the mask token; None if no entry of the vocabulary is a mask token, as in a checkpoint."""
    objective: str
    """`ar` or `dual`: the objective of the last training. Only a `dual` model drafts well."""
    lineage: Mapping[str, Any]
    """Identities of the artifacts that the model was made from."""
    files: Mapping[str, str]
    """SHA-256 of every file but tidar.json, by name."""
    bundle_hash: str
    """Content hash of the folder."""
    format_version: int = FORMAT_VERSION
    drafts: DraftsInfo | None = None
    """Drafts of a frozen checkpoint; None: the weights of the model draft, or nothing does."""


def base_location(uri: str | Path, info: BundleInfo) -> str:
    """Location of the Hugging Face files of a bundle or checkpoint: its own folder, or the address that it names."""
    return str(uri) if info.drafts is None or info.drafts.base_uri is None else info.drafts.base_uri


def hf_location(uri: str | Path) -> str:
    """Location of the Hugging Face files of the folder at `uri`: a bundle, a checkpoint, or a tokenizer's folder."""
    return base_location(uri, read_bundle_info(uri)) if is_bundle(uri) else str(uri)


def is_bundle(uri: str | Path) -> bool:
    """Whether the folder at `uri` is a bundle; otherwise it is a checkpoint or no model."""
    return locations.exists(locations.join(str(uri), BUNDLE_JSON))


def model_info(uri: str | Path) -> BundleInfo:
    """Identity of the model at `uri`: tidar.json of a bundle, or the hashes of a checkpoint's files.

    A checkpoint in an object store is downloaded first, once. Raises BundleError if the folder is neither.
    """
    if is_bundle(uri):
        return read_bundle_info(uri)
    if not locations.exists(locations.join(str(uri), "config.json")):
        raise BundleError(
            f"{uri} holds neither {BUNDLE_JSON} nor config.json; give the folder of a bundle or of a Hugging Face model"
        )
    from tidar_core.artifacts.model.checkpoint import checkpoint_files, content_hash  # it loads torch

    files = checkpoint_files(locations.local_copy(str(uri)))
    return BundleInfo(
        block_len=1, mask_id=None, objective="ar", lineage={}, files=files, bundle_hash=content_hash(files)
    )


def model_config(uri: str | Path) -> ModelConfig:
    """Config of the model at `uri`, with its mask token or its drafts; no weights are read."""
    if not is_bundle(uri):
        return read_config(uri)
    info = read_bundle_info(uri)
    config = replace(read_config(base_location(uri, info)), mask_id=info.mask_id)
    return config if info.drafts is None else info.drafts.config(config)


def read_bundle_info(uri: str | Path) -> BundleInfo:
    """Read tidar.json of the bundle at `uri`; other files are not read.

    Raises BundleError if the file is missing, damaged or of another format version.
    """
    where = locations.join(str(uri), BUNDLE_JSON)
    if not locations.exists(where):
        raise BundleError(f"{uri} holds no {BUNDLE_JSON}; give the folder of a bundle, as train writes it")
    try:
        values = locations.read_json(where)
        version, stated = values["format_version"], values["bundle_hash"]
        if version not in (FORMAT_VERSION, FROZEN_FORMAT_VERSION):
            raise BundleError(
                f"{where} has format version {version}; this code reads {FORMAT_VERSION} and {FROZEN_FORMAT_VERSION}; "
                "train it again"
            )
        if bundle_hash(values) != stated:
            raise BundleError(f"{where} differs from its own bundle_hash {str(stated)[:12]}; {REFETCH}")
        return info_of(values)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise BundleError(f"{where} is damaged ({type(error).__name__}: {error}); {REFETCH}") from error


def verify_bundle(uri: str | Path) -> BundleInfo:
    """Compare every file of the bundle at `uri` with its hash. Raises BundleError naming the file that differs."""
    info = read_bundle_info(uri)
    found = {entry.name: entry.uri for entry in locations.list_files(locations.absolute(str(uri)))}
    for name in sorted(found.keys() - info.files.keys() - {BUNDLE_JSON}):
        raise BundleError(f"{locations.join(str(uri), name)} is not listed in {BUNDLE_JSON}; remove it from the bundle")
    for name, stated in info.files.items():
        where = locations.join(str(uri), name)
        if name not in found:
            raise BundleError(f"{where} is missing; {REFETCH}")
        require_file(where, found[name], stated)
    return info


def require_file(where: str, uri: str, stated: str) -> None:
    """Raise BundleError if the file at `uri`, a copy of the file at `where`, has another hash than stated."""
    if (digest := locations.sha256(uri)) != stated:
        raise BundleError(f"{where} has hash {digest[:12]}; {BUNDLE_JSON} has {stated[:12]}; {REFETCH}")


def no_drafts_note(uri: str) -> str:
    """One line for the user of a checkpoint: nothing drafts yet, and how to convert it."""
    return (
        f"{uri} does not draft yet, so it decodes in autoregressive mode; to convert it, give it as init_from to "
        "tidar train (infra/jobs/train.small.yaml)"
    )


def info_of(values: Mapping[str, Any]) -> BundleInfo:
    """The content of tidar.json as an object.

    Raises ValueError, KeyError, TypeError or ConfigError for other keys, and for values of other types.
    """
    given, drafts = dict(values), values.get("drafts")
    given["drafts"] = None if drafts is None else DraftsInfo.of(drafts)
    info = BundleInfo(**given)
    try:
        TypeAdapter(BundleInfo).validate_json(locations.canonical_json(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if info.block_len < 1:
        raise ValueError(f"block_len is {info.block_len}; it must be at least 1")
    return info


def bundle_hash(values: Mapping[str, Any]) -> str:
    """The hash of tidar.json without its own entry."""
    stated = {name: value for name, value in values.items() if name != "bundle_hash"}
    return hashlib.sha256(locations.canonical_json(stated).encode()).hexdigest()
