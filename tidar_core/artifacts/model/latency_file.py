"""Latency tables in files: beside a bundle, or in the cache of this machine.

How long did decode steps of this model take on this device, when they were last timed?

A table fits every model of the same shape on the same device, with the same threads, dtype and block length. `tidar
profile` writes its table beside the bundle, where every machine finds it. A start that finds no table times decode
steps within its budget, and writes the table to this machine's cache. The bundle itself is never changed.
"""

import hashlib
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.cache import cache_folder
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.step_plan import Planner
from tidar_core.errors import BundleError, TidarError
from tidar_core.planning.latency_table import LatencyPoint, LatencyTable
from tidar_core.planning.planner import AUTO, planner_of
from tidar_core.planning.step_timing import BUDGET_SECONDS, decoding_latency

__all__ = ["bundle_planner", "bundle_table", "stored_table", "time_and_store"]

PROFILE_SECONDS = 600.0
"""Most seconds that `tidar profile` times decode steps."""
Report = Callable[[str], None]
"""Function that receives a line about the current work, for a log or a terminal."""


def stored_table(bundle: str, decoder: Decoder, context_len: int | None = None) -> LatencyTable | None:
    """Find the table of this decoder, beside the bundle or in the cache.

    Returns None if neither covers batch and context. Raises BundleError if the table beside the bundle is damaged.

    context_len  longest context that is planned for; the decoder's own by default
    """
    beside, cached = _read(_uri(bundle, decoder), decoder), None
    with suppress(TidarError):  # a damaged cache counts as missing
        cached = _read(_cached(decoder), decoder)
    longest = min(context_len or decoder.context_len, decoder.context_len)
    found = (table for table in (beside, cached) if table is not None and _covers(table, decoder.slots, longest))
    return next(found, None)


def time_and_store(bundle: str, decoder: Decoder, on_point: Callable[[], None] = lambda: None) -> str:
    """Time the decode steps of a decoder, write the table beside the bundle and return its address."""
    table = decoding_latency(decoder, budget=PROFILE_SECONDS, on_point=on_point)
    uri = _uri(bundle, decoder)
    _write(uri, decoder, table)
    return uri


def bundle_planner(
    mode: str,
    bundle: str,
    decoder: Decoder,
    context_len: int | None = None,
    *,
    budget: float = BUDGET_SECONDS,
    report: Report = lambda line: None,
) -> Planner:
    """Make the planner of a mode; `auto` plans with `bundle_table`."""
    if mode != AUTO:
        return planner_of(mode, decoder)
    return planner_of(mode, decoder, bundle_table(bundle, decoder, context_len, budget=budget, report=report))


def bundle_table(
    bundle: str,
    decoder: Decoder,
    context_len: int | None = None,
    *,
    budget: float = BUDGET_SECONDS,
    report: Report = lambda line: None,
) -> LatencyTable:
    """Return the stored table, or time a new table and write it to this machine's cache.

    context_len  longest context that is planned for; the decoder's own by default
    budget       seconds for timing
    report       called when timing begins and ends
    """
    table = stored_table(bundle, decoder, context_len)
    if table is not None:
        return table
    report(f"decode steps are timed, for about {budget:g} s at most: no latency table of this device is stored")
    table = decoding_latency(decoder, budget=budget, context_len=context_len)
    timed = sum(point.timed for point in table.points)
    report(f"{timed} points of the latency table were timed, {len(table.points) - timed} predicted")
    try:
        _write(_cached(decoder), decoder, table)
    except (OSError, TidarError) as error:
        report(f"the latency table could not be stored, so the next start times again: {error}")
    return table


def _covers(table: LatencyTable, batch: int, context: int) -> bool:
    return (
        max(point.batch for point in table.points) >= batch and max(point.context for point in table.points) >= context
    )


def _read(uri: str, decoder: Decoder) -> LatencyTable | None:
    if not locations.exists(uri):
        return None
    try:
        stored = locations.read_json(uri)
        points = tuple(LatencyPoint(**point) for point in stored["points"])
        made_with = stored["made_with"]
        _covers(LatencyTable(points), 1, 1)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{uri} holds no latency table; remove it or run tidar profile again") from error
    return LatencyTable(points) if made_with == _made_with(decoder) else None


def _write(uri: str, decoder: Decoder, table: LatencyTable) -> None:
    locations.write_json(uri, {"made_with": _made_with(decoder), "points": [asdict(p) for p in table.points]})


def _cached(decoder: Decoder) -> str:
    """Return the address in this machine's cache.

    Models of one shape share it, so a challenger finds the champion's table.
    """
    shape = hashlib.sha256(locations.canonical_json(asdict(decoder.model.config)).encode()).hexdigest()[:16]
    return str(cache_folder() / "latency" / shape / Path(_uri("model", decoder)).name)


def _made_with(decoder: Decoder) -> dict[str, Any]:
    """Collect the facts that decide the cost of a decode step, except its shape."""
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
