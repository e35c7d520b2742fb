"""Writes rows of a workdir as parquet files in the schema of the PyTorch reference, which `datasets` reads.

Files are written in pieces, so they may be larger than memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nlae_jax.interop.datasets import INJECT, LAYER, RESPONSE, TEXT, VECTOR
from nlae_jax.interop.sidecar import SCALE, tokens_and_templates, write_sidecar
from nlae_jax.roles.protocol import CLOSING, OPENING, Protocol
from nlae_jax.runtime.files import write_atomically

_ROWS = 1024  # rows that are written at a time
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclasses.dataclass(frozen=True)
class Exported:
    """The rows of a workdir to export, in order, and functions that read their columns."""

    rows: np.ndarray
    vectors: Callable[[np.ndarray], np.ndarray]  # rows -> [n, d]
    doc_id: Callable[[int], str]
    position: Callable[[int], int]
    text: Callable[[int], str]
    description: Callable[[int], str]


def export_dataset(path: Path, name: str, source: Exported, protocol: Protocol, extraction: dict[str, Any]) -> None:
    """Writes the rows as a file `name` of `datasets.SPLIT_OF` in the reference's schema, with its sidecar.

    `extraction` holds the fields of the sidecar's section `extraction`. The file appears complete or not at all.
    """
    prompt = [{"role": "user", "content": protocol.encoder_template.replace("{injection_char}", INJECT)}]
    columns: dict[str, tuple[pa.DataType, Callable[[int], Any]]] = {
        "prompt": (_MESSAGES, lambda row: prompt),
        RESPONSE: (pa.string(), lambda row: f"{OPENING}{source.description(row)}\n{CLOSING}"),
    }
    if name == "ar_sft":
        filled = lambda row: protocol.decoder_template.replace("{explanation}", source.description(row))  # noqa: E731
        columns = {"prompt": (pa.string(), filled)}
    elif name != "av_sft":
        del columns[RESPONSE]
    vector = pa.list_(pa.float32(), extraction["d_model"])
    provenance: dict[str, tuple[pa.DataType, Callable[[int], Any]]] = {
        "n_raw_tokens": (pa.int64(), lambda row: source.position(row) + 1),
        LAYER: (pa.int64(), lambda row: extraction["layer_index"]),
        "doc_id": (pa.string(), source.doc_id),
        TEXT: (pa.string(), source.text),
    }
    schema = pa.schema(
        [(key, kind) for key, (kind, _) in columns.items()]
        + [(VECTOR, vector)]
        + [(key, kind) for key, (kind, _) in provenance.items()]
    )

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for start in range(0, len(source.rows), _ROWS):
                rows = source.rows[start : start + _ROWS]
                values = pa.array(np.ascontiguousarray(source.vectors(rows)).reshape(-1), pa.float32())
                arrays = {
                    key: pa.array([make(row) for row in rows.tolist()], kind)
                    for key, (kind, make) in (columns | provenance).items()
                }
                arrays[VECTOR] = pa.FixedSizeListArray.from_arrays(values, type=vector)
                writer.write_table(pa.table({field.name: arrays[field.name] for field in schema}, schema=schema))

    write_atomically(path, write)
    stage = "rl" if name == "held_out" else name
    sidecar = {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": path.stem,
        "stage": stage,
        "row_count": len(source.rows),
        "extraction": extraction,
        # Not in `extraction`, where the reference refuses a field that it does not know. It passes over this one.
        SCALE: protocol.injection_scale or None,
        **tokens_and_templates(protocol),
    }
    write_sidecar(path, sidecar)
