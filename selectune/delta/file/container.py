"""The outer form of the file: a safetensors container. The one metadata string in its header determines the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectune.bits import DTYPES
from selectune.delta.file.schema import canonical_json, parse_json
from selectune.errors import DeltaFormatError

KEY = "selectune"
MAX_HEADER = 8 << 20

_PICKLES = (b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class ByteStream:
    """One tensor of the file: its key, dtype name and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def layout(streams: list[ByteStream]) -> list[ByteStream]:
    """Streams in the file's order: largest items first, then by key."""
    return sorted(streams, key=lambda stream: (-DTYPES[stream.dtype].itemsize, stream.key))


def pack(metadata: str, streams: list[ByteStream]) -> bytes:
    """The header's bytes, length and padding included; `streams` in the file's order."""
    begin = 0
    parts = [f'"__metadata__":{canonical_json({KEY: metadata})}']
    for stream in streams:
        end = begin + stream.nbytes
        shape = canonical_json(list(stream.shape))
        parts.append(f'"{stream.key}":{{"dtype":"{stream.dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}')
        begin = end
    text = ("{" + ",".join(parts) + "}").encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise DeltaFormatError(
            f"the delta has too many tensors: its header would take {len(text)} bytes, and {MAX_HEADER} are allowed"
        )
    return len(text).to_bytes(8, "little") + text


def header_length(head: Any, size: int) -> int:
    """Length of the JSON header, from the file's first bytes; `size` is that of the whole file."""
    length = int.from_bytes(head[:8], "little")
    if size >= 8 and 2 <= length <= MAX_HEADER and length % 8 == 0 and 8 + length <= size:
        return length
    # Pickles are looked for last, because the length of a real header may begin with a pickle's first two bytes.
    if bytes(head[:4]) in _PICKLES or bytes(head[:2]) in _PICKLES:
        raise DeltaFormatError(
            "the file is a pickle (or a zip of pickles, as torch.save writes); selectune never opens those, "
            "because they can run code. Expected a delta in safetensors format"
        )
    if size < 8:
        raise DeltaFormatError(f"the file is not a delta: it has {size} bytes, fewer than a header needs")
    raise DeltaFormatError(
        f"the file is not a delta, or it is damaged: its header claims {length} bytes; expected a multiple of 8 that "
        f"is at most {MAX_HEADER} and fits into the file of {size} bytes"
    )


def read_metadata(head: Any, size: int) -> tuple[str, bytes, dict[str, Any]]:
    """Parse the header: the metadata string, the header's raw bytes and its entries."""
    length = header_length(head, size)
    raw_header = bytes(head[: 8 + length])
    try:
        text = raw_header[8:].decode("ascii")
    except UnicodeDecodeError as error:
        raise DeltaFormatError("the file's header is not ASCII: it is not a delta, or it is damaged") from error
    header = parse_json(text, "the file's header")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, Mapping) or KEY not in metadata:
        raise DeltaFormatError(f'the file is not a delta: its header has no "{KEY}" in "__metadata__"')
    if len(metadata) != 1 or not isinstance(metadata[KEY], str):
        raise DeltaFormatError(f'"__metadata__" must hold "{KEY}", a string, and nothing else')
    return metadata[KEY], raw_header, header
