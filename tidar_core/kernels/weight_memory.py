"""Memory for the weights of a decoder on a CPU.

Where do weights lie, so that a decode step reads them fastest?

A decode step reads all weights, one after the other. In pages of 4 KiB, the processor looks up an address every 64
lines, and what it requests ahead ends with a page. So weights lie together in pages of 2 MiB, where Linux gives these.
"""

import mmap

import torch
from torch import Tensor

__all__ = ["WeightMemory"]

PAGE = 2**21
LINE = 64
"""Bytes that a tensor begins at a multiple of."""


class WeightMemory:
    """One region for several tensors. It is freed with the last of them."""

    def __init__(self, size: int, tensors: int) -> None:
        """size     bytes of all tensors
        tensors  their number, at most
        """
        size += LINE * tensors
        self._left: Tensor | None = None
        """Bytes of the region that no tensor has; None where there is no region."""
        if size >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                region = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                region.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # the kernel has no such pages, or not so much memory at a time
                return
            whole = torch.frombuffer(region, dtype=torch.uint8)
            self._left = whole[-whole.data_ptr() % PAGE :]

    def holding(self, tensor: Tensor) -> Tensor:
        """A copy in the region, or the tensor itself where there is none."""
        if self._left is None:
            return tensor
        size = tensor.numel() * tensor.element_size()
        copy = self._left[:size].view(tensor.dtype).view(tensor.shape)
        self._left = self._left[size + -size % LINE :]
        return copy.copy_(tensor)
