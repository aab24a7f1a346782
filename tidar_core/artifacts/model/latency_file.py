"""Latency tables in files: beside a bundle, or in the cache of this machine.

How long did decode steps of this model take on this device, when they were last timed?

A table fits every model of the same shape on the same device, with the same threads, dtype and block length. `tidar
profile` writes its table beside the bundle, where every machine finds it. A start that finds no table times decode
steps within its budget, and writes the table to this machine's cache. The bundle itself is never changed.
"""

import hashlib
import math
import platform
import re
import time
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
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.planner import AUTO, planner_of
from tidar_core.planning.step_timing import BUDGET_SECONDS, decoding_latency

__all__ = ["bundle_planner", "bundle_table", "stored_table", "time_and_store"]

PROFILE_SECONDS = 120.0
"""Most seconds that `tidar profile` times decode steps."""
LEAST_SECONDS = 1e-9
"""No step is as fast."""
TABLE_FORM = 2
"""Form of the stored tables; tables of another form are timed again."""
Report = Callable[[str], None]
"""Function that receives a line about the current work, for a log or a terminal."""


def stored_table(bundle: str, decoder: Decoder, context_len: int | None = None) -> LatencyTable | None:
    """Find the table of this decoder, beside the bundle or in the cache.

    Returns None if neither covers batch and context. Raises BundleError if the table beside the bundle is damaged.

    context_len  longest context that is planned for; the decoder's own by default
    """
    beside, cached = _read(_uri(bundle, decoder), decoder, context_len), None
    with suppress(TidarError):  # a damaged cache counts as missing
        cached = _read(_cached(decoder), decoder, context_len)
    return beside or cached


def time_and_store(bundle: str, decoder: Decoder, on_point: Callable[[], None] = lambda: None) -> str:
    """Time the decode steps of a decoder, write the table beside the bundle and return its address."""
    table = decoding_latency(decoder, budget=PROFILE_SECONDS, on_point=on_point)
    uri = _uri(bundle, decoder)
    _write(uri, decoder, None, table)
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
    report(f"decode steps are timed, for {budget:g} s at most: no latency table of this device is stored")
    began = time.monotonic()
    table = decoding_latency(decoder, budget=budget, context_len=context_len)
    report(f"{len(table.points)} shapes of decode steps were timed in {time.monotonic() - began:.1f} s")
    try:
        _write(_cached(decoder), decoder, context_len, table)
    except (OSError, TidarError) as error:
        report(f"the latency table could not be stored, so the next start times again: {error}")
    return table


def _read(uri: str, decoder: Decoder, context_len: int | None) -> LatencyTable | None:
    """The table at an address; None if there is none, or if it was made for less than this decoder needs."""
    if not locations.exists(uri):
        return None
    try:
        stored = locations.read_json(uri)
        if stored["made_with"] != _made_with(decoder):
            return None
        table, covered = LatencyTable(tuple(map(_point, stored["points"]))), stored["covers"]
        needed = _covers(decoder, context_len)
        enough = all(covered[size] >= least for size, least in needed.items())
        table.formula.seconds(1, 1, 1)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise BundleError(f"{uri} holds no latency table; remove it or run tidar profile again") from error
    return table if enough else None


def _point(values: dict[str, Any]) -> LatencyPoint:
    """A measured shape. Raises ValueError for sizes and times that nothing can have; a formula of them would be nan."""
    point = LatencyPoint(**values)
    sizes, least = (point.rows, point.batch, point.context), (1, 1, 0)
    if not all(type(size) is int and low <= size < 2**31 for size, low in zip(sizes, least)):
        raise ValueError(f"a shape has sizes {sizes}")
    if not isinstance(point.seconds, float) or not LEAST_SECONDS < point.seconds < math.inf:
        raise ValueError(f"a step took {point.seconds} s")
    if not isinstance(point.drafts, bool):
        raise ValueError(f"drafts is {point.drafts!r}")
    return point


def _write(uri: str, decoder: Decoder, context_len: int | None, table: LatencyTable) -> None:
    points = [asdict(point) for point in table.points]
    stored = {"made_with": _made_with(decoder), "covers": _covers(decoder, context_len), "points": points}
    locations.write_json(uri, stored)


def _covers(decoder: Decoder, context_len: int | None) -> dict[str, int]:
    """Largest batch and context of the table of a decoder."""
    return {"batch": decoder.slots, "context": min(context_len or decoder.context_len, decoder.context_len)}


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
        "dtype": decoder.model.weights or str(weight.dtype).removeprefix("torch."),
        "block_len": decoder.draft.block_len,
        "torch": torch.__version__,
        "form": TABLE_FORM,
    }


def _uri(bundle: str, decoder: Decoder) -> str:
    facts = _made_with(decoder)
    del facts["torch"], facts["form"]
    words = (re.sub(r"[^A-Za-z0-9]+", "-", str(value)).strip("-").lower() for value in facts.values())
    return f"{bundle.rstrip('/')}.latency/{'_'.join(words)}.json"
