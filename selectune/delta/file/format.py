"""A delta as bytes and back: the only place that knows the format (docs/delta-format.md)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectune.bits import DTYPES, FLOATS, dtype_name, raw
from selectune.delta.file import schema
from selectune.delta.file.codec import bits_of_ranks, decode_gaps, encode_gaps, packed_ranks, unpacked_ranks
from selectune.delta.file.container import MAX_HEADER, ByteStream, layout, pack, read_metadata
from selectune.delta.file.fingerprint import delta_fingerprint
from selectune.delta.file.parts import KINDS, Dense, Patch, check_parts
from selectune.delta.file.schema import canonical_json, check_hex, check_int, check_keys, check_name, parse_json, sha256
from selectune.errors import DeltaError, DeltaFormatError

FORMAT = "selectune-delta"
VERSION, BESIDE = 1, 2
"""Versions of the format; the second is that of files with offsets beside quantised weights, and of no others."""
MAX_TENSORS = 65_536
MAX_DIMS = 16
HEAD = 8 + MAX_HEADER
"""Bytes from the file's start that always hold the whole header."""

_BITS = {f"order.{bits}": bits for bits in range(1, 32)}  # streams of ranks that several scalars share
_KEYS = {"format", "version", "patches", "dense", "digests", "info", "digest"}


# --- writing ------------------------------------------------------------------------------------------------


def encode(patches: Sequence[Patch], dense: Sequence[Dense], info: dict[str, Any]) -> bytes:
    """Serialise a delta; the same delta always gives the same bytes. Patches without scalars are left out.

    Raises DeltaError or NonFiniteError for parts that do not fit each other, DeltaFormatError for an `info`
    outside the schema.
    """
    patches = [patch for patch in patches if patch.indices.numel() or patch.zeroed]
    dense = list(dense)
    check_parts(patches, dense)
    schema.check_info(info, sum(patch.indices.numel() for patch in patches))
    words = [encode_gaps(patch.indices.numpy()) for patch in patches]
    payload = _payload(patches, dense, words)
    beside = [p.name for p in patches if p.beside]
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": BESIDE if beside else VERSION,
        "patches": [
            [p.name, list(p.shape), dtype_name(p.dtype), p.indices.numel(), len(w), p.base_digest]
            for p, w in zip(patches, words, strict=True)
        ],
        "dense": [[d.kind, d.name, list(d.tensor.shape), dtype_name(d.tensor.dtype), d.base_digest] for d in dense],
        "digests": {key: sha256(data) for key, data in payload.items()},
        "info": info,
    }
    if any(p.zeroed for p in patches):
        metadata["zeroed"] = [p.name for p in patches if p.zeroed]
    if beside:
        metadata["beside"] = beside
    metadata["digest"] = sha256(canonical_json(metadata))
    streams = _streams(metadata)
    head = pack(canonical_json(metadata), streams)
    return b"".join([head, *(payload[stream.key].data for stream in streams)])


def _payload(patches: Sequence[Patch], dense: Sequence[Dense], words: list[np.ndarray]) -> dict[str, np.ndarray]:
    chunks: dict[str, list[np.ndarray]] = {}
    for patch, coded in zip(patches, words, strict=True):
        name = dtype_name(patch.dtype)
        chunks.setdefault("indices", []).append(coded)
        chunks.setdefault(f"values.{name}", []).append(raw(patch.values))
        if patch.base_values is not None:
            chunks.setdefault(f"old.{name}", []).append(raw(patch.base_values))
        if patch.order is not None:
            chunks.setdefault("order", []).append(patch.order.numpy().astype("<u4"))
    if "order" in chunks and (bits := bits_of_ranks(ranks := np.concatenate(chunks["order"]))) is not None:
        del chunks["order"]
        chunks[f"order.{bits}"] = [packed_ranks(ranks, bits)]
    for i, entry in enumerate(dense):
        chunks[f"dense.{i}"] = [raw(entry.tensor)]
        if entry.base_tensor is not None:
            chunks[f"old_dense.{i}"] = [raw(entry.base_tensor)]
    return {key: np.concatenate(parts) for key, parts in chunks.items()}


def _streams(metadata: dict[str, Any]) -> list[ByteStream]:
    """The streams that checked metadata announces, in the file's order."""
    digests = metadata["digests"]
    counts, olds = Counter[str](), Counter[str]()
    zeroed, beside = set(metadata.get("zeroed", ())), set(metadata.get("beside", ()))
    for name, shape, dtype, count, _, _ in metadata["patches"]:
        counts[dtype] += count
        if name not in beside:
            olds[dtype] += math.prod(shape) if name in zeroed else count
    found = []
    if counts:
        found.append(ByteStream("indices", "U16", (sum(row[4] for row in metadata["patches"]),)))
    if counts and "order" in digests:
        found.append(ByteStream("order", "U32", (sum(counts.values()),)))
    elif counts and (packed := next((key for key in _BITS if key in digests), None)):
        found.append(ByteStream(packed, "U8", (-(-sum(counts.values()) * _BITS[packed] // 8),)))
    old = any(key.startswith("old") for key in digests)
    for values, dense, sizes in (("values", "dense", counts), ("old", "old_dense", olds))[: 1 + old]:
        found += [ByteStream(f"{values}.{dtype}", dtype, (count,)) for dtype, count in sizes.items()]
        rows = enumerate(metadata["dense"])
        found += [ByteStream(f"{dense}.{i}", dtype, tuple(shape)) for i, (_, _, shape, dtype, _) in rows]
    return layout(found)


# --- reading ------------------------------------------------------------------------------------------------


def check_head(head: bytearray, size: int) -> None:
    """Refuse a file by its first HEAD bytes and its size, before the rest is read."""
    _read_head(head, size)


def decode(data: bytes | bytearray) -> tuple[list[Patch], list[Dense], dict[str, Any]]:
    """Read a delta from bytes and check everything that docs/delta-format.md lists. Nothing in the data is executed.

    If `data` is a bytearray, the tensors share its memory, so the caller must not change it. Raises DeltaFormatError
    for every fault.
    """
    owned = data if isinstance(data, bytearray) else bytearray(data)
    metadata, streams, begin = _read_head(owned, len(owned))
    payload = _split(owned, streams, begin, metadata["digests"])
    try:
        patches, dense = _read_patches(metadata, payload), _read_dense(metadata, payload)
        check_parts(patches, dense)
    except DeltaFormatError:
        raise
    except DeltaError as error:
        raise DeltaFormatError(f"the delta is damaged: {error}") from error
    base = metadata["info"]["base"]
    if delta_fingerprint(base["structure"], patches, dense) != base["fingerprint"]:
        raise DeltaFormatError("info.base.fingerprint does not agree with the digests of the patches")
    return patches, dense, metadata["info"]


def _read_head(head: bytes | bytearray, size: int) -> tuple[dict[str, Any], list[ByteStream], int]:
    text, raw_header, entries = read_metadata(head, size)
    metadata = _read_metadata(text)
    streams = _streams(metadata)
    announced, there = {stream.key for stream in streams}, set(entries)
    if announced != there or announced != set(metadata["digests"]):
        odd = sorted((announced ^ there) | (announced ^ set(metadata["digests"])))[:3]
        raise DeltaFormatError(
            "the tensors of the file are not those that its metadata announces: "
            + ", ".join(ascii(key)[:80] for key in odd)
        )
    if raw_header != pack(text, streams):
        raise DeltaFormatError(
            "the file's header is not the one that its metadata calls for: a dtype, a shape, an offset, the order or "
            "the spacing is wrong"
        )
    expected = len(raw_header) + sum(stream.nbytes for stream in streams)
    if size != expected:
        raise DeltaFormatError(
            f"the file has {size} bytes, and its metadata calls for {expected}: it was cut short or appended to"
        )
    return metadata, streams, len(raw_header)


def _read_metadata(text: str) -> dict[str, Any]:
    metadata = parse_json(text, "the delta's metadata")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DeltaFormatError(f'the file is not a delta: its metadata does not say format "{FORMAT}"')
    version = metadata.get("version")
    if type(version) is not int or version not in (VERSION, BESIDE):
        raise DeltaFormatError(
            f"the delta has format version {ascii(version)[:40]}; this selectune reads versions {VERSION} and "
            f"{BESIDE}. A newer selectune may have written it"
        )
    check_keys(metadata, _KEYS | ({"beside"} if version == BESIDE else set()), "the delta's metadata", {"zeroed"})
    if sum(len(metadata[key]) for key in ("patches", "dense") if isinstance(metadata[key], list)) > MAX_TENSORS:
        raise DeltaFormatError(f"the delta names more than {MAX_TENSORS} tensors")
    check_hex(metadata["digest"], 64, "the metadata's digest")
    if canonical_json(metadata) != text:
        raise DeltaFormatError("the delta's metadata is not in canonical form: it was damaged or edited")
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    if sha256(canonical_json(rest)) != metadata["digest"]:
        raise DeltaFormatError("the delta's metadata does not have the digest it claims: it was damaged or edited")
    _check_rows(metadata)
    if not isinstance(metadata["digests"], dict):
        raise DeltaFormatError("the delta's digests must be an object")
    for key, digest in metadata["digests"].items():
        check_hex(digest, 64, f"the digest of stream {ascii(key)[:80]}")
    schema.check_info(metadata["info"], sum(row[3] for row in metadata["patches"]))
    return metadata


def _check_rows(metadata: dict[str, Any]) -> None:
    for what, width in (("patches", 6), ("dense", 5)):
        rows = metadata[what]
        if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != width for row in rows):
            raise DeltaFormatError(f"the delta's {what} must be a list of rows of {width}")
    zeroed, beside = _check_named(metadata, "zeroed"), _check_named(metadata, "beside")
    for name, shape, dtype, count, words, base in metadata["patches"]:
        check_name(name)
        numel = _check_shape(name, shape)
        _check_among(dtype, ("F32",) if name in beside else tuple(FLOATS), f'patch "{name}" has dtype')
        check_int(count, f'the count of "{name}"', 0 if name in zeroed else 1, numel)
        check_int(words, f'the words of "{name}"', count, count + numel // 0xFFFF if count else 0)
        check_hex(base, 16, f'the base digest of "{name}"')
    for kind, name, shape, dtype, base in metadata["dense"]:
        check_name(name)
        _check_shape(name, shape)
        _check_among(kind, KINDS, f'dense "{name}" has kind')
        _check_among(dtype, tuple(DTYPES), f'dense "{name}" has dtype')
        check_hex(base, 16, f'the base digest of "{name}"')


def _check_among(value: Any, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise DeltaFormatError(f"{what} {ascii(value)[:40]}; allowed: {', '.join(allowed)}")


def _check_named(metadata: dict[str, Any], key: str) -> set[str]:
    """The names of the patches that `zeroed` or `beside` lists, in the order of the patches; none if it is absent."""
    if key not in metadata:
        return set()
    names = metadata[key]
    if not isinstance(names, list) or not names or any(not isinstance(name, str) for name in names):
        raise DeltaFormatError(f"the delta's {key} must be a list of names; the key is absent where there are none")
    known = set(names)
    if [row[0] for row in metadata["patches"] if isinstance(row[0], str) and row[0] in known] != names:
        raise DeltaFormatError(f"the delta's {key} must name some of its patches, each once, in their order")
    return known


def _check_shape(name: str, shape: Any) -> int:
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise DeltaFormatError(f'the shape of "{name}" must be a list of at most {MAX_DIMS} sizes')
    for size in shape:
        check_int(size, f'a size of "{name}"')
    return check_int(math.prod(shape), f'the number of entries of "{name}"', 0, 2**62)


def _split(data: bytearray, streams: list[ByteStream], begin: int, digests: dict[str, str]) -> dict[str, memoryview]:
    payload = {}
    view = memoryview(data)
    for stream in streams:
        end = begin + stream.nbytes
        payload[stream.key] = view[begin:end]
        if sha256(payload[stream.key]) != digests[stream.key]:
            raise DeltaFormatError(
                f'stream "{stream.key}" does not have the digest that the metadata gives: it is damaged'
            )
        begin = end
    return payload


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor over the bytes, in the machine's byte order."""
    if not len(data):
        return torch.empty(0, dtype=dtype)
    integers = np.frombuffer(data, dtype=f"<u{dtype.itemsize}").astype(f"=u{dtype.itemsize}", copy=False)
    if dtype == torch.bool and integers.max() > 1:
        raise DeltaFormatError("a stream of booleans holds bytes other than 0 and 1")
    return torch.from_numpy(integers).view(dtype)


def _read_patches(metadata: dict[str, Any], payload: dict[str, memoryview]) -> list[Patch]:
    words = np.frombuffer(payload.get("indices", b""), dtype="<u2")
    flat = {key: _tensor(data, dtype) for key, data in payload.items() if (dtype := _flat_dtype(key))}
    for key in _BITS.keys() & payload.keys():
        total = sum(row[3] for row in metadata["patches"])
        flat["order"] = torch.from_numpy(unpacked_ranks(np.frombuffer(payload[key], np.uint8), total, _BITS[key]))
    done = Counter[str]()

    def take(key: str, count: int) -> slice:
        """The next `count` items of a stream."""
        done[key] += count
        return slice(done[key] - count, done[key])

    zeroed, beside = set(metadata.get("zeroed", ())), set(metadata.get("beside", ()))
    patches = []
    for name, shape, dtype, count, length, base in metadata["patches"]:
        numel, values, old = math.prod(shape), f"values.{dtype}", f"old.{dtype}"
        indices = decode_gaps(words[take("indices", length)], count, numel, name)
        patches.append(
            Patch(
                name,
                tuple(shape),
                DTYPES[dtype],
                torch.from_numpy(indices),
                flat[values][take(values, count)],
                base,
                None if old not in flat or name in beside else flat[old][take(old, numel if name in zeroed else count)],
                flat["order"][take("order", count)] if "order" in flat else None,
                name in zeroed,
                name in beside,
            )
        )
    return patches


def _flat_dtype(key: str) -> torch.dtype | None:
    """The dtype of a stream that all patches share; None for any other stream, and for the indices."""
    stream, _, dtype = key.partition(".")
    return torch.int32 if key == "order" else DTYPES[dtype] if stream in ("values", "old") else None


def _read_dense(metadata: dict[str, Any], payload: dict[str, memoryview]) -> list[Dense]:
    dense = []
    for i, (kind, name, shape, dtype, base) in enumerate(metadata["dense"]):
        new, old = _tensor(payload[f"dense.{i}"], DTYPES[dtype]).view(shape), payload.get(f"old_dense.{i}")
        dense.append(Dense(name, kind, new, base, None if old is None else _tensor(old, DTYPES[dtype]).view(shape)))
    return dense
