"""Weight files are written one at a time."""

import weakref

import torch
from safetensors.torch import load_file

from tidar_core.artifacts.model import hf_writer
from tidar_core.artifacts.model.hf_files import stored_tensors


def test_only_the_tensors_of_one_file_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "FILE_BYTES", 1000)
    alive = weakref.WeakSet()
    most = 0

    def read(name):
        nonlocal most
        value = torch.full((25,), float(name))  # 100 bytes
        alive.add(value)
        most = max(most, len(alive))
        return value

    hf_writer.write_weights(tmp_path, {str(i): 100 for i in range(35)}, read)
    assert most == 10
    assert len(list(tmp_path.glob("model-0000?-of-00004.safetensors"))) == 4
    stored = stored_tensors(tmp_path)
    assert all(load_file(stored[str(i)].path)[str(i)].eq(i).all() for i in range(35))


def test_a_tensor_larger_than_a_file_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "FILE_BYTES", 150)
    hf_writer.write_weights(tmp_path, {"a": 100, "b": 400, "c": 100}, lambda name: torch.zeros(25))
    assert len({tensor.path for tensor in stored_tensors(tmp_path).values()}) == 3
