"""Stage of a replica that is not ready yet.

A replica sends no response while it loads, so it leaves a line in the key-value store of its Ray cluster. The ingress
shows that line at /ready, and `tidar serve` prints it.
"""

import json
import time

from ray.experimental import internal_kv

__all__ = ["clear", "latest", "publish"]

NAMESPACE = b"tidar"
PREFIX = b"start:"


def publish(replica: str, line: str) -> None:
    """Leave the line of a replica; nothing happens without Ray."""
    if internal_kv._internal_kv_initialized():
        stage = json.dumps({"line": line, "at": time.time()}).encode()
        internal_kv._internal_kv_put(_key(replica), stage, overwrite=True, namespace=NAMESPACE)


def clear(replica: str) -> None:
    """Remove the line of a replica."""
    if internal_kv._internal_kv_initialized():
        internal_kv._internal_kv_del(_key(replica), namespace=NAMESPACE)


def latest() -> str | None:
    """The line that was left last; None if no replica loads."""
    if not internal_kv._internal_kv_initialized():
        return None
    keys = internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE) or []
    kept = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    stages = [json.loads(stage) for stage in kept if stage is not None]
    return max(stages, key=lambda stage: float(stage["at"]))["line"] if stages else None


def _key(replica: str) -> bytes:
    return PREFIX + replica.encode()
