"""What did decode steps of this model take on this device, when they were last timed?

Timing takes seconds to minutes, so `tidar profile` keeps what it found beside the bundle, one file per device, thread
count, dtype and block length; the planner reads it instead of timing anew. The bundle itself is not touched.
"""

import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from tidar_core.artifacts import locations
from tidar_core.decoder import Decoder
from tidar_core.errors import BundleError
from tidar_core.latency import LatencyPoint, LatencyTable, decoding_latency
from tidar_core.modes import Planner
from tidar_core.planner import AUTO, planner_of

__all__ = ["bundle_planner", "stored_table", "time_and_store"]


def stored_table(bundle: str, decoder: Decoder) -> LatencyTable | None:
    """The table kept beside the bundle for this decoder's device; None if there is none that covers its batch."""
    uri = _uri(bundle, decoder)
    if not locations.exists(uri):
        return None
    try:
        kept = locations.read_json(uri)
        points = tuple(LatencyPoint(**point) for point in kept["points"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{uri} holds no latency table; remove it or run tidar profile again") from error
    covers = kept["made_with"] == _made_with(decoder) and max(point.batch for point in points) >= decoder.rows
    return LatencyTable(points) if covers else None


def time_and_store(bundle: str, decoder: Decoder, on_point: Callable[[], None] = lambda: None) -> str:
    """Time the decode steps of a decoder, keep the table beside the bundle and give its address."""
    table = decoding_latency(decoder, on_point=on_point)
    uri = _uri(bundle, decoder)
    locations.write_json(uri, {"made_with": _made_with(decoder), "points": [asdict(p) for p in table.points]})
    return uri


def bundle_planner(mode: str, bundle: str, decoder: Decoder, context_len: int | None = None) -> Planner:
    """The planner of a mode; `auto` plans with the table beside the bundle, or times forwards first.

    context_len  longest context that is planned for where timing is needed; the decoder's own by default
    """
    table = None
    if mode == AUTO:
        table = stored_table(bundle, decoder) or decoding_latency(decoder, context_len=context_len)
    return planner_of(mode, decoder, table)


def _made_with(decoder: Decoder) -> dict[str, Any]:
    """All that decides what a step costs, but for its shape."""
    weight = decoder.model.embedding.weight
    cuda = weight.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weight.device) if cuda else platform.processor() or platform.machine(),
        "threads": 0 if cuda else torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "block_len": decoder.draft.block_len,
        "torch": torch.__version__,
    }


def _uri(bundle: str, decoder: Decoder) -> str:
    facts = _made_with(decoder)
    del facts["torch"]
    words = (re.sub(r"[^A-Za-z0-9]+", "-", str(value)).strip("-").lower() for value in facts.values())
    return f"{bundle.rstrip('/')}.latency/{'_'.join(words)}.json"
