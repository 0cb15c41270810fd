"""Reading what somebody else may have written: every fault is an error of the caller's class, with path and line."""

from __future__ import annotations

import gzip
import json
import os
import random
import stat
import subprocess
import sys

import pytest

from selectune.errors import ConfigError, TaskError
from selectune.files import read_json, read_lines
from selectune.files.reading import MAX_DEPTH, MAX_INT

RUN = {
    "state": "running", "method": "id3", "budget": 103_000, "lr": 5e-4, "steps": None, "data": "runs/é",
    "losses": [0.1, -2.5, 1e-9], "nested": {"a": [{"b": [True, False]}], "c": ""},
}  # fmt: skip

WRONG = {
    "NaN": (b'{"a": NaN}', "NaN is not a number that JSON allows"),
    "infinity": (b"[-Infinity]", "-Infinity is not a number"),
    "1e999": (b"[1e999]", "not finite"),
    "beyond 64 bits": (b"[%d]" % (MAX_INT + 1), "beyond 64 bits"),
    "digits that Python refuses": (b"[" + b"9" * 10_000 + b"]", "beyond 64 bits"),
    "a key twice": (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
    "half a pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a pair as a key": (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is not UTF-8"),
    "a surrogate's bytes": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),
    "nothing": (b"", "not valid JSON"),
    "more after it": (b"{} {}", "not valid JSON"),
    "deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
    "deeper than Python": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "unclosed": (b"[" * 100_000, "nested too deeply"),
    "too large": (b" " * (1 << 20) + b"{}", "is too large"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_json(tmp_path, name):
    file = tmp_path / "run.json"
    data, said = WRONG[name]
    file.write_bytes(data)
    with pytest.raises(ConfigError) as found:
        read_json(file, error=ConfigError)
    assert str(found.value).startswith(str(file))
    assert said in str(found.value)
    assert len(str(found.value)) < len(str(file)) + 300


def test_right_json(tmp_path):
    file = tmp_path / "run.json"
    nested = json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for value in (RUN, nested, {"a": "\U0001f600 ]["}, [MAX_INT, -MAX_INT], "text", None):
        file.write_text(json.dumps(value))
        assert read_json(file, error=ConfigError) == value
    file.write_text("[1]    ")
    assert read_json(file, limit=7, error=ConfigError) == [1]
    with pytest.raises(TaskError, match="at most 6 are read"):
        read_json(file, limit=6, error=TaskError)


def places(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "closed").write_text("{}")
    os.chmod(tmp_path / "closed", 0)
    yield from (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "none", "/dev/null", "a\0b", "\ud800")
    if os.geteuid() != 0:
        yield tmp_path / "closed"


def test_what_is_no_file(tmp_path):
    for path in places(tmp_path):
        with pytest.raises(ConfigError, match=r"^Cannot read .*\.$|is not a regular file"):
            read_json(path, error=ConfigError)
        with pytest.raises(TaskError, match=r"^Cannot read .*\.$|is not a regular file"):
            list(read_lines(path, error=TaskError))


def mutants(whole: bytes, count: int, seed: int):
    """Bytes flipped, changed, cut out, doubled, cut short; half of them several times."""
    draw = random.Random(seed)
    hostile = (b"NaN", b"1e999", b"9" * 5_000, b"\\ud800", b"[" * 3_000, b'{"a":' * 3_000, b"\0", b"\xff", b'"', b"-")
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            at, end = sorted(draw.choices(range(len(data) + 1), k=2))
            kind = draw.randrange(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1 and at < len(data):
                data[at] = draw.randrange(256)
            elif kind == 2:
                del data[at : min(end, at + 20)]
            elif kind == 3:
                data[at:at] = data[at : min(end, at + 200)]
            elif kind == 4:
                data[at:at] = draw.choice(hostile)
            elif draw.randrange(3) == 0:
                del data[at:]
        yield bytes(data)


def values_of(value):
    """The leaves of a JSON value."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from values_of(item)
    if not isinstance(value, dict | list):
        yield value


def test_500_mutants_of_a_run(tmp_path, tries):
    tries(500)
    file = tmp_path / "run.json"
    refused = read = 0
    for data in mutants(json.dumps(RUN, indent=1).encode(), 500, seed=1):
        file.write_bytes(data)
        try:
            found = read_json(file, error=ConfigError)
        except ConfigError as error:
            refused += str(error).startswith(f"{file} ")
        else:
            read += 1
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # plain, finite, and of true characters
            assert all(type(leaf) in (str, int, float, bool, type(None)) for leaf in values_of(found))
    assert refused + read == 500
    assert min(refused, read) > 20


ROWS = [{"sentence1": f"Row {n} is é.", "sentence2": "\U0001f600", "label": n % 2, "idx": n} for n in range(60)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_lines_plain_and_packed(tmp_path):
    for name, data in (("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES)), ("b.jsonl", LINES.rstrip())):
        (tmp_path / name).write_bytes(data)
        assert [row for _, row in read_lines(tmp_path / name, error=TaskError)] == ROWS
    (tmp_path / "c.jsonl").write_bytes(b"\n\r\n" + LINES.replace(b"\n", b"\r\n\n"))
    found = list(read_lines(tmp_path / "c.jsonl", error=TaskError))
    assert [row for _, row in found] == ROWS
    assert [number for number, _ in found] == list(range(3, 122, 2))


@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"nothing", "too large"}))
def test_wrong_lines(tmp_path, name):
    data, said = WRONG[name]
    for ending, pack in (("jsonl", bytes), ("jsonl.gz", gzip.compress)):
        file = tmp_path / f"train.{ending}"
        file.write_bytes(pack(b"{}\n\n" + data + b"\n"))
        with pytest.raises(TaskError) as found:
            list(read_lines(file, error=TaskError))
        assert str(found.value).startswith(f"{file}, line 3 ")
        assert said in str(found.value)


def test_limits(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"{}\n" * 4)
    assert len(list(read_lines(file, error=TaskError, row_limit=4, line_limit=3))) == 4
    with pytest.raises(TaskError, match=r"line 4 is one row more than the 3 that are read\.$"):
        list(read_lines(file, error=TaskError, row_limit=3))
    with pytest.raises(TaskError, match=r"line 1 is longer than the 2 bytes that a line may have\.$"):
        list(read_lines(file, error=TaskError, line_limit=2))
    file.write_bytes(b'{"a": "' + b"x" * (1 << 20) + b'"}\n')
    with pytest.raises(TaskError, match="line 1 is longer than the 1,048,576 bytes"):
        list(read_lines(file, error=TaskError))
    file.write_text("{}\n[1]\n")
    with pytest.raises(TaskError, match=r"line 2: expected one JSON object a line, got \[1\]"):
        list(read_lines(file, error=TaskError))


@pytest.mark.parametrize("packed", [False, True])
def test_300_mutants_of_lines(tmp_path, tries, packed):
    """gzip has a checksum, so a flipped bit that it does not report is in its own header, and the rows are the same."""
    file = tmp_path / ("train.jsonl.gz" if packed else "train.jsonl")
    refused = read = 0
    tries(300)
    for data in mutants(gzip.compress(LINES) if packed else LINES, 300, seed=2):
        file.write_bytes(data)
        try:
            found = [row for _, row in read_lines(file, error=TaskError)]
        except TaskError as error:
            refused += str(error).startswith(f"{file}, line ")
        else:
            read += 1
            assert not packed or found == ROWS or not data
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    assert refused + read == 300
    assert min(refused, read) > 0


_PEAK = """
import sys
from selectune.errors import TaskError
from selectune.files import read_json, read_lines
def most():  # of this process alone: ru_maxrss begins with what its parent had
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
start = most()
try:
    if sys.argv[1].endswith(".json"):
        kept = read_json(sys.argv[1], error=TaskError)
    else:
        kept = [((row["sentence"],), row["label"]) for _, row in read_lines(sys.argv[1], error=TaskError)]
    said = f"read {len(kept)}"
except TaskError as error:
    said = str(error)
print(most() - start, said)
"""


def peak(file):
    """The most bytes that reading a file took, in a process of its own, and the message."""
    run = subprocess.run([sys.executable, "-c", _PEAK, file], capture_output=True, text=True, timeout=120, check=True)
    taken, _, said = run.stdout.partition(" ")
    return int(taken) * 1024, said


LARGE = {
    "bomb.jsonl.gz": (b'{"sentence": "", "label": 0}\n' * 1_000_000, "at most 100 times as many"),
    "one line.jsonl.gz": (b" " * (100 << 20), "longer than"),
    "empty lines.jsonl.gz": (b"\n" * (2 << 20), "one empty line more than the 1,048,576"),
    "lists.json": (b"[" + b"[]," * 340_000 + b"[]]", "read 340001"),
    "deep.json": (b"[" + b"[[[[[[[[[[[[[[]]]]]]]]]]]]]]," * 36_000 + b"[]]", "read 36001"),
    "objects.json": (b"[" + b"{}," * 340_000 + b"[]]", "read 340001"),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory(tmp_path, name):
    """Below 3 x the file + 64 MiB, whatever is in it."""
    data, said = LARGE[name]
    file = tmp_path / name
    file.write_bytes(gzip.compress(data, 6) if name.endswith(".gz") else data)
    taken, found = peak(file)
    assert said in found
    assert taken < 3 * file.stat().st_size + (64 << 20)


def test_modes_are_left_alone(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("{}")
    os.chmod(file, 0o640)
    read_json(file, error=ConfigError)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
