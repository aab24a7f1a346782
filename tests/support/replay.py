"""A substitute for CUDA graphs: it records the operations of a step and their addresses, and keeps no tensor alive.

As with a graph, replaying calls no Python of the step. Memory that was allocated during the capture belongs to the
capture. For older memory only the address is recorded, so the replay fails if nothing else keeps the tensor.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Address:
    """The address of a tensor whose memory the capture does not own."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple
    offset: int

    @classmethod
    def of(cls, tensor):
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def tensor(self):
        assert not self.storage.expired(), f"a captured step reads a freed tensor {list(self.size)} of {self.dtype}"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Recording(TorchDispatchMode):
    """The record of every operation of a run."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.results = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_map(self._kept, (args, kwargs))
        result = func(*args, **kwargs)
        known = {address_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [x for x in tensors_in(result) if address_of(x) not in known]
        for tensor in fresh:
            self.made[address_of(tensor)] = tensor.untyped_storage()
        self.results += [weakref.ref(x) for x in tensors_in(result)]
        if fresh or func._schema.is_mutable:  # else it is a view, and no work
            self.calls.append((func, given, [self._kept(x) for x in fresh]))
        return result

    def _kept(self, x):
        """The recorded form of an argument: the capture's own memory, an address, or a number by value."""
        if not isinstance(x, torch.Tensor):
            return x
        if address_of(x) in self.made:
            return x.view(x.shape)  # a new object, so that references to the step's own tensor stay countable
        return x.clone() if x.dim() == 0 else Address.of(x)


@dataclass
class StandInRecorder:
    """Captures on a CPU: a `cuda_graphs.Recorder`."""

    kept_bytes: list[int] = field(default_factory=list)
    """Bytes per capture: memory allocated in it that its caller still held at the end."""
    made_bytes: list[int] = field(default_factory=list)
    """Bytes per capture: all memory allocated in it."""

    def record(self, run, undo):
        with Recording() as recording:
            run()
        undo()
        held = {address_of(x): x for ref in recording.results if (x := ref()) is not None}
        self.kept_bytes.append(sum(bytes_of(x) for address, x in held.items() if address in recording.made))
        self.made_bytes.append(sum(storage.nbytes() for storage in recording.made.values()))
        calls = recording.calls

        def replay():
            for func, given, made in calls:
                args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, given)
                for place, value in zip(made, tensors_in(func(*args, **kwargs))):
                    place.copy_(value)

        return replay


def address_of(tensor):
    return tensor.untyped_storage()._cdata


def bytes_of(tensor):
    return tensor.untyped_storage().nbytes()


def tensors_in(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
