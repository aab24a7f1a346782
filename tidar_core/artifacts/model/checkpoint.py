"""Identity of an AR checkpoint: a Hugging Face folder that was not converted yet.

Which files of the folder are the model, and what are their hashes?

Only files that are read here count: weights in safetensors, configs, tokenizer and chat templates. A README, weights in
another format or a cache beside them change nothing.
"""

import hashlib
from pathlib import Path

from tidar_core.artifacts.model.hf_config import read_config
from tidar_core.artifacts.model.hf_files import weight_files
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.file_hashes import file_sha256
from tidar_core.artifacts.text.chat_template import TEMPLATE_FILE, TEMPLATE_FOLDER
from tidar_core.artifacts.text.end_tokens import GENERATION_CONFIG
from tidar_core.artifacts.text.tokenizer import TOKENIZER_JSON
from tidar_core.errors import BundleError

__all__ = ["checkpoint_files", "content_hash"]

READ = (
    "config.json",
    GENERATION_CONFIG,
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
)


def checkpoint_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint in a local folder, by name.

    Raises WeightsError for a folder whose architecture or weight format is not supported. Raises BundleError for a part
    of a bundle: its draft link is there and tidar.json is not.
    """
    if read_config(folder).link_rank:
        raise BundleError(
            f"{folder} has a draft link in config.json and no tidar.json, so it is part of a bundle; "
            "fetch the bundle again"
        )
    found = [folder / name for name in READ if (folder / name).is_file()]
    found += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    found += weight_files(folder)
    return {str(path.relative_to(folder)): file_sha256(path) for path in found}


def content_hash(files: dict[str, str]) -> str:
    """Identity of a checkpoint, which its files alone determine."""
    return hashlib.sha256(locations.canonical_json({"files": files}).encode()).hexdigest()
