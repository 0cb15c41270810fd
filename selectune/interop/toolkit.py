"""A summary of the authors' toolkit (selective-optimizers), read without unpickling: opcodes are data here.

`torch.save` writes a zip with a pickle of the structure and a file for each tensor's bytes. The reader knows the
opcodes and the four callables that such a summary needs, makes tuples, lists, dicts and tensors of them, and refuses
anything else. No class is imported and nothing in the file is called.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectune.delta import canonical_name
from selectune.errors import DeltaError, DeltaFormatError
from selectune.files import read_owned
from selectune.interop.pairs import replaced

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
}
_SUMMARY = "selective_optimizers.load_store SelectivePeftSummary"
_PRIVATE = "_utils"
_REBUILD, _SIZE, _ORDERED = f"torch.{_PRIVATE} _rebuild_tensor_v2", "torch Size", "collections OrderedDict"
_FIELDS = {"values", "pointers", "shapes", "bn_metadata", "budget_used"}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MOST = 1 << 20  # opcodes of a summary: a few dozen a tensor


@dataclass(frozen=True)
class _Name:
    """A global that a pickle names; here it is a name and nothing more."""

    text: str


def read_summary(path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, new tensor) of each tensor that a summary changes; `model`: its base.

    The toolkit writes values by the order of `model.parameters()`, without names, so shapes are all that is compared.
    Raises DeltaFormatError for any other file, DeltaError for a summary of another model.
    """
    summary = _unpack(read_owned(path), path)
    parameters = list(model.named_parameters())
    rows = summary["values"], summary["pointers"], summary["shapes"]
    if len({len(parameters), *map(len, rows)}) != 1:
        raise DeltaError(f"{path} is of a model with {len(rows[0])} parameters; this one has {len(parameters)}")
    for (name, parameter), values, pointers, shape in zip(parameters, *rows, strict=True):
        if values is None:
            continue
        if shape != tuple(parameter.shape) or pointers.shape != (values.numel(), parameter.dim()):
            raise DeltaError(f'{path} has shape {shape} where the model has "{name}" {tuple(parameter.shape)}')
        strides = torch.tensor([math.prod(shape[i + 1 :]) for i in range(len(shape))])
        sizes = torch.tensor(shape)
        if bool(((pointers < 0) | (pointers >= sizes)).any()):
            raise DeltaError(f'{path} names places outside of "{name}" {tuple(shape)}')
        known = canonical_name(name)
        yield known, replaced(known, {known: parameter}, (pointers * strides).sum(1), values)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
    if len(norms) != len(summary["bn_metadata"]):
        raise DeltaError(f"{path} has {len(summary['bn_metadata'])} batch norms; the model has {len(norms)}")
    for (name, module), told in zip(norms, summary["bn_metadata"], strict=True):
        buffers = dict(module.named_buffers(recurse=False))
        for buffer, new in told.items():
            if buffer not in buffers or not isinstance(new, Tensor):
                raise DeltaError(f'{path} has a batch norm with "{buffer}", which "{name}" does not have')
            yield canonical_name(f"{name}.{buffer}" if name else buffer), new


def _unpack(data: bytearray, path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            if any(item.compress_type != zipfile.ZIP_STORED for item in packed.infolist()):
                raise DeltaFormatError(f"{path} has compressed parts, which torch.save does not write")
            names = [name for name in packed.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise DeltaFormatError(f"{path} is no file of torch.save: it has {len(names)} structures")
            root = names[0].removesuffix("data.pkl")
            if f"{root}byteorder" in packed.namelist() and packed.read(f"{root}byteorder") != b"little":
                raise DeltaFormatError(f"{path} was written on a big-endian machine")
            value = _Machine(packed, root).run(packed.read(names[0]))
    except (zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, RuntimeError, EOFError) as why:
        raise DeltaFormatError(f"{path} is no summary of the toolkit: {str(why)[:200] or type(why).__name__}") from why
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise DeltaFormatError(f"{path} is no summary of the toolkit: it holds {type(value).__name__}, not one")
    lists = all(isinstance(value[key], list) for key in ("values", "pointers", "shapes", "bn_metadata"))
    tensors = lists and all(
        (v is None) == (p is None) and (v is None or (isinstance(v, Tensor) and isinstance(p, Tensor)))
        for v, p in zip(value["values"], value["pointers"], strict=False)
    )
    if not tensors or not all(isinstance(told, dict) for told in value["bn_metadata"]):
        raise DeltaFormatError(f"{path} is a summary whose fields are not lists of tensors, None and dicts")
    return value


class _Machine:
    """A stack machine for the opcodes of such a pickle. Raises ValueError for any other opcode, name or call."""

    def __init__(self, packed: zipfile.ZipFile, root: str) -> None:
        self.packed, self.root = packed, root
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, code: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(code)):
            if count > _MOST:
                raise ValueError("its structure is too long")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("its structure does not end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Name(argument))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self.marked() if name == "TUPLE" else self.popped(int(name[-1]))
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.marked()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.marked() if name == "SETITEMS" else self.popped(2)
                self.top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "NEWOBJ":
                cls, arguments = self.popped(2)
                if cls != _Name(_SUMMARY) or arguments != ():
                    raise ValueError(f"it holds an object of {cls}")
                stack.append({})
            case "BUILD":
                state = stack.pop()
                self.top(dict).update(state)
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                stack.append(self.called(*self.popped(2)))
            case _:
                raise ValueError(f"it has the opcode {name}")

    def marked(self) -> list[Any]:
        return self.popped(len(self.stack) - self.marks.pop())

    def popped(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("its structure takes more than there is")
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"it adds to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def storage(self, told: Any) -> Tensor:
        """The flat tensor of a storage's file."""
        tag, kind, key, _, count = told
        if tag != "storage" or not isinstance(kind, _Name) or kind.text not in _STORAGES or not str(key).isdigit():
            raise ValueError("it names a storage of another kind")
        data = bytearray(self.packed.read(f"{self.root}data/{key}"))
        dtype = _STORAGES[kind.text]
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {len(data)} bytes, and {count} numbers of {dtype} are announced")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def called(self, what: Any, arguments: tuple[Any, ...]) -> Any:
        match what:
            case _Name(text) if text == _ORDERED and arguments == ():
                return {}
            case _Name(text) if text == _SIZE:
                (shape,) = arguments
                return _shape(shape)
            case _Name(text) if text == _REBUILD:
                storage, offset, shape, stride, *_ = arguments
                if not isinstance(storage, Tensor) or type(offset) is not int or offset < 0:
                    raise ValueError("it builds a tensor of no storage")
                return torch.as_strided(storage, _shape(shape), _shape(stride), offset).clone()
        raise ValueError(f"it calls {what}")


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or len(sizes) > 16 or not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes):
        raise ValueError("it has a shape that is none")
    return sizes
