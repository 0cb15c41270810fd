"""Files from strangers: every one is refused with DeltaFormatError, before anything else happens."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc

import pytest
import torch
from delta_kit import canonical, close_up, edited, mutated, open_up, repacked, sealed, small, stream_of

from selectune.delta import Delta
from selectune.errors import DeltaFormatError

MUTANTS = int(os.environ.get("MUTANTS", "3000"))  # 20000 in the long form
MODEL, DELTA = small()
GOOD = DELTA.to_bytes()
META, ENTRIES, PAYLOAD = open_up(GOOD)


def header_of(text: bytes, payload: bytes = b"") -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def row(which: str, i: int, column: int, value):
    """An edit that sets one cell of a patch's or dense tensor's row."""
    return lambda m: m[which][i].__setitem__(column, value)


def module(**change):
    return {"kind": "lora", "options": {"r": 8}, "seed": 0, "digest": "0" * 64, **change}


def model(**change):
    good = {"architecture": "BertModel", "dtype": "float32", "labels": ["a", "b"], "num_labels": 2}
    return {**good, "pad_token_id": 0, "path": "/base", "problem_type": None, **change}


def info(key: str, value):
    return lambda m: m["info"].__setitem__(key, value)


def base(key: str, value):
    return lambda m: m["info"]["base"].__setitem__(key, value)


def renamed(name):
    return lambda: edited(GOOD, row("patches", 0, 0, name))


def entry(key: str, **changes):
    return lambda: close_up(sealed(META), {**ENTRIES, key: {**ENTRIES[key], **changes}}, PAYLOAD)


def text_of(change):
    """The file with its metadata string changed as text, not sealed again."""
    return lambda: close_up(change(sealed(META)), ENTRIES, PAYLOAD)


def values_with(number: float):
    return lambda: repacked(GOOD, "values.F32", torch.tensor([number, 7.0, 8.0]).numpy().tobytes())


def words_with(words: list[int]):
    return lambda: repacked(GOOD, "indices", b"".join(word.to_bytes(2, "little") for word in words))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def many_tensors(count: int) -> bytes:
    def edit(m):
        m["dense"] += [["buffer", f"b{i}", [0], "U8", "0" * 16] for i in range(count)]
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        m["digests"] |= {f"dense.{i + 2}": empty for i in range(count)}

    return edited(GOOD, edit)


ROWS = {
    # the container
    "empty": (lambda: b"", "fewer than a header"),
    "seven bytes": (lambda: b"\0" * 7, "fewer than a header"),
    "header length 0": (lambda: b"\0" * 8 + b"{}", "header claims 0"),
    "header length 2^63": (lambda: (1 << 63).to_bytes(8, "little") + GOOD[8:], "header claims"),
    "header length beyond the file": (lambda: (1 << 20).to_bytes(8, "little") + GOOD[8:], "header claims"),
    "header above the cap": (lambda: header_of(b"{" + b" " * (8 << 20)), "header claims"),
    "header length odd": (lambda: (len(GOOD) - 9 | 1).to_bytes(8, "little") + GOOD[8:], "header claims"),
    "header not ASCII": (lambda: header_of('{"é":1}'.encode()), "ASCII"),
    "header with BOM": (lambda: header_of(b"\xef\xbb\xbf{}"), "ASCII"),
    "header no JSON": (lambda: header_of(b"{nonsense"), "not valid JSON"),
    "header is a list": (lambda: header_of(b"[1,2]"), "not a delta"),
    "header nested 100,000 deep": (lambda: header_of(nested(100_000)), "too deeply"),
    "header with a huge integer": (lambda: header_of(b'{"a":' + b"9" * 100_000 + b"}"), "64 bits"),
    "header with NaN": (lambda: header_of(b'{"a":NaN}'), "NaN"),
    "header with 1e999": (lambda: header_of(b'{"a":1e999}'), "not finite"),
    "no metadata": (
        lambda: header_of(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0000"),
        "not a delta",
    ),
    "metadata of another tool": (lambda: close_up({"format": "pt"}, ENTRIES, PAYLOAD), "not a delta"),
    "a second metadata key": (
        lambda: close_up({"selectune": sealed(META), "more": "x"}, ENTRIES, PAYLOAD),
        "nothing else",
    ),
    "metadata no string": (lambda: close_up({"selectune": 5}, ENTRIES, PAYLOAD), "a string"),
    "metadata twice": (
        lambda: header_of(b'{"__metadata__":{"selectune":"{}"},"__metadata__":{"selectune":"{}"}}'),
        "occurs twice",
    ),
    "stream twice": (
        lambda: close_up(
            sealed(META),
            ",".join(f"{json.dumps(k)}:{canonical(e)}" for k, e in [*ENTRIES.items(), *ENTRIES.items()]),
            PAYLOAD,
        ),
        "occurs twice",
    ),
    "stream with a foreign key": (
        lambda: close_up(sealed(META), {**ENTRIES, "../../x": ENTRIES["indices"]}, PAYLOAD),
        "not those",
    ),
    "stream missing": (
        lambda: close_up(sealed(META), {k: e for k, e in ENTRIES.items() if k != "order"}, PAYLOAD),
        "not those",
    ),
    "stream of another dtype": (entry("indices", dtype="I16"), "calls for"),
    "stream of floats as indices": (entry("indices", dtype="F16"), "calls for"),
    "stream of sub-byte dtype": (entry("indices", dtype="F4"), "calls for"),
    "stream of another shape": (entry("indices", shape=[2, 2]), "calls for"),
    "stream of shape [0, 2^60]": (entry("indices", shape=[0, 1 << 60]), "calls for"),
    "stream beyond the file": (entry("indices", data_offsets=[0, 1 << 40]), "calls for"),
    "streams overlap": (entry("indices", data_offsets=ENTRIES["order"]["data_offsets"]), "calls for"),
    "streams in another order": (
        lambda: close_up(sealed(META), dict(reversed(ENTRIES.items())), PAYLOAD),
        "calls for",
    ),
    "header with a space more": (
        lambda: header_of(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")].replace(b'":{"d', b'": {"d', 1), PAYLOAD),
        "calls for",
    ),
    "trailing byte": (lambda: GOOD + b"\0", "appended"),
    "trailing file": (lambda: GOOD + GOOD, "appended"),
    "cut short": (lambda: GOOD[:-1], "cut short"),
    # the metadata
    "metadata no JSON": (text_of(lambda t: "hello"), "not valid JSON"),
    "metadata a list": (text_of(lambda t: "[]"), "not a delta"),
    "metadata nested": (text_of(lambda t: nested(50_000).decode()), "too deeply"),
    "metadata with a space": (text_of(lambda t: t.replace(",", ", ", 1)), "canonical"),
    "metadata unsorted": (
        text_of(lambda t: json.dumps(dict(reversed(META.items())), separators=(",", ":"))),
        "canonical",
    ),
    "metadata with a key twice": (text_of(lambda t: t[:-1] + ',"version":1}'), "occurs twice"),
    "metadata with Infinity": (text_of(lambda t: t.replace('"version":1', '"version":Infinity')), "Infinity"),
    "metadata edited": (text_of(lambda t: t.replace('"id3"', '"id4"')), "digest it claims"),
    "digest of the metadata missing": (
        text_of(lambda t: canonical({k: v for k, v in META.items() if k != "digest"})),
        "missing: digest",
    ),
    "digest of the metadata no hex": (text_of(lambda t: t.replace(META["digest"], "Z" * 64)), "hex"),
    "format of another name": (lambda: edited(GOOD, lambda m: m.update(format="x")), "not a delta"),
    "later version": (lambda: edited(GOOD, lambda m: m.update(version=3)), "format version 3; this"),
    "version 2 without offsets beside": (lambda: edited(GOOD, lambda m: m.update(version=2)), "missing: beside"),
    "version 1 with offsets beside": (lambda: edited(GOOD, lambda m: m.update(beside=["w"])), "unknown: 'beside'"),
    "version true": (lambda: edited(GOOD, lambda m: m.update(version=True)), "format version True"),
    "version 1.0": (lambda: edited(GOOD, lambda m: m.update(version=1.0)), "format version 1.0"),
    "unknown key": (lambda: edited(GOOD, lambda m: m.update(extra=1)), "unknown: 'extra'"),
    "missing key": (lambda: edited(GOOD, lambda m: m.pop("info")), "missing: info"),
    "patches no list": (lambda: edited(GOOD, lambda m: m.update(patches={})), "list of rows"),
    "patch row too short": (lambda: edited(GOOD, lambda m: m["patches"][0].pop()), "list of rows"),
    "count as true": (lambda: edited(GOOD, row("patches", 1, 3, True)), "integer from"),
    "count as float": (lambda: edited(GOOD, row("patches", 1, 3, 1.0)), "integer from"),
    "count 0": (lambda: edited(GOOD, row("patches", 1, 3, 0)), "integer from"),
    "count negative": (lambda: edited(GOOD, row("patches", 1, 3, -1)), "integer from"),
    "count above the tensor": (lambda: edited(GOOD, row("patches", 1, 3, 5)), "integer from"),
    "count of 10^18": (lambda: edited(GOOD, row("patches", 1, 3, 10**18)), "integer from"),
    "words below the count": (lambda: edited(GOOD, row("patches", 0, 4, 2)), "integer from"),
    "words above what gaps can take": (lambda: edited(GOOD, row("patches", 0, 4, 4)), "integer from"),
    "words of 2^63": (lambda: edited(GOOD, row("patches", 0, 4, 1 << 63)), "64 bits"),
    "shape no list": (lambda: edited(GOOD, row("patches", 0, 1, "4x6")), "list of at most"),
    "shape negative": (lambda: edited(GOOD, row("patches", 0, 1, [-4, -6])), "integer from"),
    "shape product overflows": (lambda: edited(GOOD, row("patches", 0, 1, [1 << 60, 1 << 60])), "number of entries"),
    "shape of 100 dimensions": (lambda: edited(GOOD, row("patches", 0, 1, [1] * 100)), "list of at most"),
    "shape smaller than the indices": (lambda: edited(GOOD, row("patches", 0, 1, [4, 5])), "leave the tensor"),
    "dtype unknown": (lambda: edited(GOOD, row("patches", 0, 2, "F128")), "F128"),
    "dtype of integers": (lambda: edited(GOOD, row("patches", 0, 2, "I32")), "I32"),
    "dtype a list": (lambda: edited(GOOD, row("patches", 0, 2, ["F32"])), "allowed"),
    "base digest short": (lambda: edited(GOOD, row("patches", 0, 5, "abc")), "hex"),
    "old values of another base": (lambda: edited(GOOD, row("patches", 0, 5, "0" * 16)), "digest"),
    "name twice": (lambda: edited(GOOD, row("patches", 1, 0, "layer.weight")), "occurs twice"),
    "name of a patch and a dense tensor": (lambda: edited(GOOD, row("dense", 0, 1, "layer.bias")), "occurs twice"),
    "name ../": (renamed("../../etc/passwd"), "not allowed"),
    "name absolute": (renamed("/etc/passwd"), "not allowed"),
    "name with backslash": (renamed("..\\x"), "not allowed"),
    "name with NUL": (renamed("w\0"), "not allowed"),
    "name with newline": (renamed("w\n"), "not allowed"),
    "name bidirectional": (renamed("w\u202ecod"), "not allowed"),
    "name zero width": (renamed("w\u200b"), "not allowed"),
    "name lone surrogate": (renamed("w\ud800"), "not allowed"),
    "name empty": (renamed(""), "not allowed"),
    "name dots": (renamed("a..b"), "not allowed"),
    "name long": (renamed("w" * 513), "not allowed"),
    "name of a megabyte": (renamed("w" * 1_000_000), "not allowed"),
    "name __class__": (renamed("__class__"), "not allowed"),
    "name not canonical": (renamed("module.layer.weight"), "not canonical"),
    "name no string": (renamed(["w"]), "must be a string"),
    "kind unknown": (lambda: edited(GOOD, row("dense", 0, 0, "module")), "kind"),
    "100,000 tensors": (lambda: many_tensors(100_000), "header claims|more than"),
    "66,000 tensors": (
        lambda: edited(GOOD, lambda m: m.update(dense=
            [["buffer", f"b{i}", [0], "U8", "0" * 16] for i in range(66_000)])),
        "more than",
    ),
    "digests a list": (lambda: edited(GOOD, lambda m: m.update(digests=[])), "must be an object"),
    "digest of a stream missing": (lambda: edited(GOOD, lambda m: m["digests"].pop("order")), "not those"),
    "digest of a stream too many": (
        lambda: edited(GOOD, lambda m: m["digests"].update({"values.F64": "0" * 64})),
        "not those",
    ),
    "digest of a stream wrong": (lambda: edited(GOOD, lambda m: m["digests"].update({"indices": "0" * 64})), "damaged"),
    "old values for some only": (
        lambda: edited(GOOD, lambda m: [m["digests"].pop(k) for k in ("old_dense.0", "old_dense.1")]),
        "not those",
    ),
    # the streams
    "gap words end open": (words_with([1, 0, 65535, 3]), "cannot be read"),
    "gap words leave the tensor": (words_with([1, 0, 21, 3]), "leave the tensor"),
    "value NaN": (values_with(float("nan")), "not finite"),
    "value infinite": (values_with(float("inf")), "not finite"),
    "dense NaN": (
        lambda: repacked(GOOD, "dense.0", torch.tensor([1.0, float("nan"), 2.0]).numpy().tobytes()),
        "not finite",
    ),
    "order beyond 2^31": (lambda: repacked(GOOD, "order", b"\xff" * 4 + stream_of(GOOD, "order")[4:]), "ranks"),
    "old values changed": (lambda: repacked(GOOD, "old.F32", bytes(12)), "digest"),
    # info
    "info unknown key": (lambda: edited(GOOD, info("time", 0)), "unknown: 'time'"),
    "info no object": (lambda: edited(GOOD, lambda m: m.update(info=[])), "must be an object"),
    "budget below the scalars": (lambda: edited(GOOD, info("budget", 3)), "below the 4"),
    "budget true": (lambda: edited(GOOD, info("budget", True)), "integer from"),
    "budget of 10^19": (lambda: edited(GOOD, info("budget", 10**19)), "64 bits"),
    "selected not the sum": (lambda: edited(GOOD, info("selected", 3)), "hold 4"),
    "method a string": (lambda: edited(GOOD, info("method", "os.system")), "must be an object"),
    "method nested": (lambda: edited(GOOD, info("method", {"a": json.loads(nested(40))})), "too deeply"),
    "method with a lone surrogate": (lambda: edited(GOOD, info("method", {"a": "\ud800"})), "must be a string"),
    "versions of numbers": (lambda: edited(GOOD, info("versions", {"torch": 2})), "must be a string"),
    "module of a kind with dots": (lambda: edited(GOOD, info("module", module(kind="os.system"))), "must be a name"),
    "module of a private kind": (lambda: edited(GOOD, info("module", module(kind="__import__"))), "must be a name"),
    "module of a kind that is a path": (lambda: edited(GOOD, info("module", module(kind="../lora"))), "must be a name"),
    "module of a kind in Cyrillic": (lambda: edited(GOOD, info("module", module(kind="l\u043era"))), "must be a name"),
    "module of a kind with a line end": (lambda: edited(GOOD, info("module", module(kind="lora\n"))), "must be a name"),
    "module of a kind too long": (lambda: edited(GOOD, info("module", module(kind="a" * 65))), "must be a name"),
    "module of no kind": (lambda: edited(GOOD, info("module", module(kind=""))), "must be a name"),
    "module of a list as kind": (lambda: edited(GOOD, info("module", module(kind=["lora"]))), "must be a name"),
    "module with another key": (lambda: edited(GOOD, info("module", module(path="x"))), "unknown: 'path'"),
    "module without a seed": (lambda: edited(GOOD, info("module", {"kind": "lora"})), "missing: digest, options, seed"),
    "module seed below 0": (lambda: edited(GOOD, info("module", module(seed=-1))), "integer from 0"),
    "module options nested": (lambda: edited(GOOD, info("module", module(options={"r": [1]}))), "must be a number"),
    "module digest short": (lambda: edited(GOOD, info("module", module(digest="0" * 63))), "64 lower-case hex"),
    "model with another key": (lambda: edited(GOOD, info("model", model(auto_map="x.py"))), "unknown: 'auto_map'"),
    "model without a class": (lambda: edited(GOOD, info("model", {"dtype": None})), "missing: architecture"),
    "model class of a module": (lambda: edited(GOOD, info("model", model(architecture="os.system"))), "of a class"),
    "model class private": (lambda: edited(GOOD, info("model", model(architecture="__import__"))), "of a class"),
    "model class empty": (lambda: edited(GOOD, info("model", model(architecture=""))), "of a class"),
    "model dtype unknown": (lambda: edited(GOOD, info("model", model(dtype="int8"))), "null or one of float64"),
    "model dtype a list": (lambda: edited(GOOD, info("model", model(dtype=[]))), "null or one of float64"),
    "model path relative": (lambda: edited(GOOD, info("model", model(path="../base"))), "absolute path"),
    "model path bidirectional": (lambda: edited(GOOD, info("model", model(path="/a\u202eb"))), "absolute path"),
    "model labels too few": (lambda: edited(GOOD, info("model", model(num_labels=3))), "num_labels strings"),
    "model labels of numbers": (lambda: edited(GOOD, info("model", model(labels=[0, 1]))), "must be a string"),
    "model labels an object": (lambda: edited(GOOD, info("model", model(labels={"0": "a"}))), "num_labels strings"),
    "model num_labels true": (lambda: edited(GOOD, info("model", model(num_labels=True))), "integer from"),
    "model padding below -1": (lambda: edited(GOOD, info("model", model(pad_token_id=-2))), "integer from"),
    "model problem a number": (lambda: edited(GOOD, info("model", model(problem_type=1))), "must be a string"),
    "created_by a number": (lambda: edited(GOOD, info("created_by", 2)), "must be a string"),
    "base unknown key": (lambda: edited(GOOD, base("auto_map", "x.py")), "unknown: 'auto_map'"),
    "base without structure": (lambda: edited(GOOD, base("structure", None)), "hex"),
    "base seed true": (lambda: edited(GOOD, base("seed", True)), "integer from"),
    "base id a number": (lambda: edited(GOOD, base("id", 1)), "must be a string"),
    "base weights short": (lambda: edited(GOOD, base("weights", "ab")), "hex"),
    "base fingerprint of another": (lambda: edited(GOOD, base("fingerprint", "0" * 64)), "fingerprint"),
    "base initialised no list": (lambda: edited(GOOD, base("initialised", {})), "must be a list"),
    "base initialised twice": (
        lambda: edited(GOOD, base("initialised", [{"name": "head", "digest": "0" * 16}] * 2)),
        "twice",
    ),
    "base initialised open": (
        lambda: edited(GOOD, base("initialised", [{"name": "head", "digest": "0" * 16, "x": 1}])),
        "unknown",
    ),
}  # fmt: skip


def test_the_helpers_make_the_good_file():
    assert edited(GOOD, lambda m: None) == GOOD
    assert repacked(GOOD, "order", stream_of(GOOD, "order")) == GOOD
    assert Delta.from_bytes(GOOD) == DELTA
    for change in ({}, {"path": "C:\\models\\base"}, {"labels": None, "num_labels": None, "path": None, "dtype": None}):
        given = model(**change)
        assert Delta.from_bytes(edited(GOOD, info("model", given))).info["model"] == given


@pytest.mark.parametrize(("make", "message"), ROWS.values(), ids=ROWS.keys())
def test_hostile_file_is_refused(make, message):
    data = make()
    start = time.process_time()
    with pytest.raises(DeltaFormatError, match=message):
        Delta.from_bytes(data)
    assert time.process_time() - start < 3.0


def test_every_single_bit_flip_is_refused(tries):
    data = bytearray(GOOD)
    tries(8 * len(data))
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(DeltaFormatError):
            Delta.from_bytes(data)
        data[bit >> 3] ^= 1 << (bit & 7)
    assert Delta.from_bytes(bytes(data)) == DELTA


def test_every_truncation_is_refused(tries):
    tries(len(GOOD))
    for length in range(len(GOOD)):
        with pytest.raises(DeltaFormatError):
            Delta.from_bytes(GOOD[:length])


def test_structured_mutants_raise_nothing_else(tries):
    """Sealed again, so they get past the digest; what loads must be a valid delta that says what it says."""
    source = random.Random(3)
    loaded = tried = 0
    for _ in range(MUTANTS):
        metadata = mutated({k: v for k, v in META.items() if k != "digest"}, source)
        if not isinstance(metadata, dict):
            continue
        tried += 1
        data = close_up(sealed(metadata), ENTRIES, PAYLOAD)
        if source.random() < 0.2:
            header = {"__metadata__": {"selectune": sealed(metadata)}, **ENTRIES}
            data = header_of(json.dumps(mutated(header, source), separators=(",", ":")).encode(), PAYLOAD)
        try:
            delta = Delta.from_bytes(data)
        except DeltaFormatError:
            continue
        loaded += 1
        assert delta.to_bytes() == data
    tries(tried)
    assert loaded < 0.5 * MUTANTS


def test_splices_of_two_good_files_are_refused(tries):
    source = random.Random(4)
    other = Delta(DELTA.patches, DELTA.dense, {**DELTA.info, "budget": 5}).to_bytes()
    tries(1000)
    for _ in range(1000):
        cut, back = source.randrange(len(GOOD)), source.randrange(len(other))
        data = GOOD[:cut] + other[back:]
        if data not in (GOOD, other):
            with pytest.raises(DeltaFormatError):
                Delta.from_bytes(data)


def test_memory_stays_near_the_file_size():
    big = edited(GOOD, lambda m: m["patches"].append(["big", [1 << 40], "F64", 1 << 30, 1 << 30, "0" * 16]))
    tracemalloc.start()
    with pytest.raises(DeltaFormatError):
        Delta.from_bytes(big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(big) + (1 << 20)
