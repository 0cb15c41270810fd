"""Plain values from untrusted files: strict JSON, JSON lines and tables of text, within stated limits."""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from selectune.errors import DeltaError, SelectuneError
from selectune.files.durable import open_regular, read_owned

MAX_INT = 2**63 - 1
MAX_DEPTH = 16
"""Levels of nested objects and lists."""
MAX_JSON = 1 << 20
"""Bytes of a JSON file, unless the caller sets another limit."""
MAX_LINE = 1 << 20
"""Bytes of a line, including its end."""
MAX_ROWS = 1 << 24
MAX_RATIO = 100
"""Unpacked bytes per byte of gzip, counted from the file's beginning; text has 3 to 20."""
FREE = 4 << 20
"""Unpacked bytes that a gzip file of any size may have."""
MAX_EMPTY = 1 << 20

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped surrogate: half of a character beyond 16 bits


class NotPlain(ValueError):
    """Why a text is not plain JSON: the end of a sentence whose subject is the text."""


def parse(text: str, depth: int = MAX_DEPTH, most: int = MAX_INT) -> Any:
    """Parse strict JSON: keys that occur twice, NaN and integers beyond `most`, which Python accepts, are refused.

    Raises NotPlain. Only Python's own limit of nesting holds here; the message names `depth`. `plain` checks it.
    """
    whole = functools.partial(_int, most)
    hooks = {"object_pairs_hook": _no_duplicates, "parse_constant": _refuse, "parse_float": _float, "parse_int": whole}
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise NotPlain(f"is nested too deeply; at most {depth} levels are read") from error
    except ValueError as error:
        raise NotPlain(f"is not valid JSON: {str(error)[:200]}") from error


def plain(data: bytes | bytearray, depth: int = MAX_DEPTH, most: int = MAX_INT) -> Any:
    """`parse` UTF-8 bytes, and refuse more than `depth` levels and strings that cannot be encoded again.

    >>> plain(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> plain(b'{"a": NaN}')
    Traceback (most recent call last):
    selectune.files.reading.NotPlain: is not valid JSON: NaN is not a number that JSON allows
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotPlain(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    value = parse(text, depth, most)
    if _HALF.search(text) or text.count("[") + text.count("{") > depth:
        _walk(value, depth, depth)
    return value


def read_json(path: str | os.PathLike[str], *, limit: int = MAX_JSON, error: type[SelectuneError]) -> Any:
    """Read a JSON file of at most `limit` bytes; raises `error`, which names the path, for every fault."""
    try:
        return plain(read_owned(path, limit))
    except NotPlain as why:
        raise error(f"{path} {why}.") from why
    except DeltaError as why:
        raise error(sentence(why)) from why


def read_lines(
    path: str | os.PathLike[str],
    *,
    error: type[SelectuneError],
    line_limit: int = MAX_LINE,
    row_limit: int = MAX_ROWS,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON lines file, one line at a time; .gz is unpacked, empty lines are skipped.

    Raises `error`, which names path and line, for every fault: a line that is no object or longer than `line_limit`
    bytes, more than `row_limit` objects or MAX_EMPTY empty lines, and gzip that unpacks to far more than text does.
    """
    rows = 0
    for number, line in raw_lines(path, error=error, line_limit=line_limit):
        where = f"{path}, line {number}"
        if not line.strip():
            if number - rows > MAX_EMPTY:
                raise error(f"{where} is one empty line more than the {MAX_EMPTY:,} that are left out.")
            continue
        rows += 1
        if rows > row_limit:
            raise error(f"{where} is one row more than the {row_limit:,} that are read.")
        try:
            row = plain(line)
        except NotPlain as why:
            raise error(f"{where} {why}.") from why
        if not isinstance(row, dict):
            raise error(f"{where}: expected one JSON object a line, got {short(row)}.")
        yield number, row


def read_csv(
    path: str | os.PathLike[str], *, error: type[SelectuneError], delimiter: str = ",", row_limit: int = MAX_ROWS
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, {column: text}) of each row of a table whose first line names the columns.

    .gz is unpacked, empty lines are skipped. Raises `error`, which names path and line, for a column without a name or
    with another's, a row with more or fewer cells than there are columns, a quote that does not end, text that is not
    UTF-8, and whatever `raw_lines` refuses.
    """
    rows = csv.reader(_decoded(path, error), delimiter=delimiter, strict=True)
    header: list[str] = []
    count = 0
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        number = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as why:
            raise error(f"{where} is no row of a table: {why}.") from why
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            if "" in header or len(set(header)) != len(header):
                raise error(f"{where}: each column needs a name of its own, got {', '.join(map(short, header))}.")
            continue
        if len(cells) != len(header):
            raise error(f"{where} has {len(cells)} cells, and the table has {len(header)} columns.")
        count += 1
        if count > row_limit:
            raise error(f"{where} is one row more than the {row_limit:,} that are read.")
        yield number, dict(zip(header, cells, strict=True))


def raw_lines(
    path: str | os.PathLike[str], *, error: type[SelectuneError], line_limit: int = MAX_LINE
) -> Iterator[tuple[int, bytes]]:
    """(number, line with its end) of a file, one line at a time; .gz is unpacked, a byte order mark left out.

    Raises `error`, which names path and line, for a file that cannot be read, a line longer than `line_limit` bytes,
    and gzip that unpacks to far more than text does.
    """
    try:
        handle = open_regular(path)
    except DeltaError as why:
        raise error(sentence(why)) from why
    number = size = 0
    with open(handle, "rb") as raw:
        packed = os.fspath(path).endswith(".gz")
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 16) if packed else raw
        while line := _next(file, line_limit + 1, path, number + 1, error):
            number, size = number + 1, size + len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = f"{path}, line {number}"
            if len(line) > line_limit:
                raise error(f"{where} is longer than the {line_limit:,} bytes that a line may have.")
            if packed and size > FREE and size > FREE + MAX_RATIO * raw.tell():
                raise error(
                    f"{where}: {raw.tell():,} bytes of gzip became {size:,}; at most {MAX_RATIO} times as "
                    f"many, and {FREE:,} more, are unpacked. Unpack the file yourself if you trust it."
                )
            yield number, line


def _decoded(path: str | os.PathLike[str], error: type[SelectuneError]) -> Iterator[str]:
    for number, line in raw_lines(path, error=error):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as why:
            raise error(f"{path}, line {number} is not UTF-8: {why.reason} at byte {why.start}.") from why


def _next(file: io.BufferedIOBase, size: int, path: Any, number: int, error: type[SelectuneError]) -> bytes:
    try:
        return file.readline(size)
    except (OSError, EOFError, zlib.error) as why:
        raise error(f"{path}, line {number} cannot be read: {str(why).rstrip('.')}.") from why


def sentence(why: DeltaError) -> str:
    """The message of an error of `read_owned`, as a sentence."""
    said = str(why)
    return f"{said[:1].upper() if said.startswith('cannot ') else said[:1]}{said[1:]}."


def short(value: Any) -> str:
    """A value in at most 80 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def some(items: Sequence[str], between: str = "; ", most: int = 5) -> str:
    """The first items in one line, and how many more there are.

    >>> some(["a", "b", "c"], ", ", 2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more


def _walk(value: Any, depth: int, left: int) -> None:
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise NotPlain(f"holds half of a surrogate pair, which no text can: {short(value)}")
    elif isinstance(value, dict | list):
        if left == 0:
            raise NotPlain(f"is nested too deeply; at most {depth} levels are read")
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _walk(item, depth, left - 1)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {short(twice)} occurs twice")
    return found


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a number that JSON allows")


def _float(literal: str) -> float:
    if len(literal) > 40 or not math.isfinite(float(literal)):
        raise ValueError(f"number {short(literal)} is not finite or too long")
    return float(literal)


def _int(most: int, literal: str) -> int:
    if len(literal) > 20 or abs(int(literal)) > most:
        raise ValueError(f"integer {short(literal)} is beyond 64 bits")
    return int(literal)
