"""Memory bound of a replica, and the check that it fits into the memory of its device.

The bound is computed from the bundle's description before any weights are loaded: `tidar serve --dry-run` prints it,
and a replica reports it first.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import tidar_core
from serve_apps.rollout.model_version import ModelVersion, resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.artifacts.model.bundle_info import model_config
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.cache import cache_folder
from tidar_core.config import DraftConfig, ModelConfig
from tidar_core.decoding.decoder_size import DecoderSize
from tidar_core.decoding.page_pool import PAGE_LEN
from tidar_core.errors import ConfigError, TidarError
from tidar_core.kernels.linear import held_bytes
from tidar_core.planning.decode_memory import META, MemoryBound, memory_bound
from tidar_core.planning.decode_step_benchmark import random_model

__all__ = ["ReplicaMemory", "free_bytes", "memory_facts", "replica_memory"]

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """Most memory that a replica needs, and free memory of its device."""

    device: str
    need: MemoryBound
    free: int | None
    """Free bytes of the device now; None if they are unknown, as for a GPU that this machine lacks."""

    @property
    def fits(self) -> bool:
        """False if the need is known to exceed the free memory."""
        return self.free is None or self.need.total <= self.free

    @property
    def line(self) -> str:
        """The bound as a line of text."""
        parts = ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in asdict(self.need).items() if size)
        left = "free memory is unknown here"
        if self.free is not None:
            over = self.need.total - self.free
            left = f"does not fit: {_size(over)} too much" if over > 0 else f"{_size(-over)} left"
        return f"memory of a replica on {self.device}, at most: {parts}; {_size(self.need.total)} in all, {left}"

    def facts(self) -> dict[str, object]:
        """Bytes by name, for a report."""
        left = None if self.free is None else self.free - self.need.total
        return {"device": self.device, **asdict(self.need), "total": self.need.total, "free": self.free, "left": left}

    def require_fit(self) -> None:
        """Raise ConfigError if the replica does not fit."""
        if not self.fits:
            raise ConfigError(f"{self.line}; give fewer rows or pages, a shorter context_len, or dtype bf16")


def replica_memory(served: ModelVersion) -> ReplicaMemory:
    """Memory bound of a replica of `served`, with the free memory of this machine. Raises ConfigError."""
    settings = served.settings
    config = model_config(served.bundle_uri)
    draft = DraftConfig(block_len=served.block_len, kind=settings.draft_kind)
    size = DecoderSize.of(
        config, draft, slots=settings.rows, context_len=settings.context_len, pages=settings.pages, page_len=PAGE_LEN
    )
    return ReplicaMemory(settings.device, _bound(served, config, draft, size), free_bytes(settings.device))


def _bound(served: ModelVersion, config: ModelConfig, draft: DraftConfig, size: DecoderSize) -> MemoryBound:
    """The bound, from this machine's cache if the same code computed it before.

    To compute it, torch loads its compiler, which takes seconds of every start.
    """
    settings, dtype = served.settings, DTYPES[served.settings.dtype]
    held = held_bytes(random_model(config, dtype, META), settings.device, settings.weights)  # depends on kernels too
    facts = [asdict(config), asdict(draft), asdict(size), settings.dtype, served.mode, settings.device]
    key = hashlib.sha256(
        locations.canonical_json([*facts, settings.weights, held, torch.__version__, _code()]).encode()
    )
    path = cache_folder() / "memory" / f"{key.hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, TypeError):  # missing or damaged, so it is computed
        found = MemoryBound(**json.loads(path.read_text()))
        if all(type(size) is int for size in asdict(found).values()):
            return found
    bound = memory_bound(
        config, draft, size, dtype=dtype, mode=served.mode, device=settings.device, weights=settings.weights
    )
    with suppress(OSError, TidarError):  # without a cache the next start computes it again
        locations.write_json(str(path), asdict(bound))
    return bound


def _code() -> str:
    """Hash of the core's sources, which decide the bound."""
    files = sorted(Path(tidar_core.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def memory_facts(settings: ServeSettings) -> dict[str, object]:
    """Bytes of a replica of the service by name, for a report. Raises ConfigError if it does not fit."""
    memory = replica_memory(resolve_model(settings)[0])
    memory.require_fit()
    return memory.facts()


def free_bytes(device: str) -> int | None:
    """Bytes that a process may still allocate on a device of this machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    if not MEMINFO.is_file():
        return None
    free = next(int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    return 1024 * free if limit is None or used is None else min(1024 * free, limit - used)


def _number(path: Path) -> int | None:
    """Number in a file of a control group; None without the file or without a limit."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
