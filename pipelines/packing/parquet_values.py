"""Values of Parquet as they were written, without the nulls that Parquet adds.

A struct has the same fields in every entry, so an entry's missing keys come back as null. Nulls of a struct are
dropped; a null in a map or a list was written on purpose and stays.
"""

from typing import Any

import pyarrow as pa

__all__ = ["written_entries"]


def written_entries(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The entries of a batch, each as it was written."""
    return [_written(entry, pa.struct(batch.schema)) for entry in batch.to_pylist()]


def _written(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return {field.name: _written(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if pa.types.is_map(kind):
        return {key: _written(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_written(item, kind.value_type) for item in value]
    return value
