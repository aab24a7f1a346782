"""Bandwidth of a device's memory, measured by copies."""

import torch

from tidar_core.timing import median_seconds

__all__ = ["copy_bandwidth"]

COPIES = 5
"""Number of timings that a bandwidth is the median of."""


def copy_bandwidth(device: torch.device, nbytes: int = 2**30) -> float:
    """Bytes per second of a large copy within the device's memory; read and written bytes both count."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * nbytes / median_seconds([copy], COPIES)[0]
