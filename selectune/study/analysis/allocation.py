"""A selection by layer and role: the heat map of a transformer, and what lies outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectune.adapters.roles import ENDS, LINEAR, Role, RoleMap, find, head_names
from selectune.delta import canonical_name
from selectune.study.analysis.supports import Support

ROWS = (*LINEAR, *(f"cross {kind}" for kind in LINEAR[:5]))
"""Roles in the order of a map's rows; `qkv` only where it cannot be taken apart."""

OTHER = ("embeddings", "head", "pooler", "biases and norms", "rest")
"""Where entries lie that are in no matrix of a layer."""

Cell = tuple[str, str]  # role and layer


@dataclass(frozen=True)
class Allocation:
    """How many entries of each cell are selected. All cells and `other` together are the support's B, exactly.

    `counts` and `sizes`: by (role, layer), of matrices only. `other`: by kind of tensor (`OTHER`).
    """

    counts: Mapping[Cell, int]
    sizes: Mapping[Cell, int]
    other: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values()) + sum(self.other.values())

    @property
    def rows(self) -> list[str]:
        """The roles that the model has."""
        return [row for row in ROWS if any(role == row for role, _ in self.sizes)]

    @property
    def columns(self) -> list[str]:
        """The layers that the model has."""
        return list(dict.fromkeys(layer for _, layer in self.sizes))

    def share(self, cell: Cell) -> float:
        """|P n L| / |P| of a cell."""
        return self.counts[cell] / self.sizes[cell]

    def as_json(self) -> dict[str, Any]:
        """Rows, columns, and the number and share of each cell; None where a layer has no such matrix."""
        cells = [[(row, column) for column in self.columns] for row in self.rows]
        return {
            "rows": self.rows, "columns": self.columns, "other": dict(self.other), "total": self.total,
            "counts": [[self.counts.get(cell) for cell in row] for row in cells],
            "shares": [[self.share(cell) if cell in self.sizes else None for cell in row] for row in cells],
        }  # fmt: skip


def allocate(support: Support, model: nn.Module, roles: RoleMap | None = None) -> Allocation:
    """The allocation of a support to the layers and roles of its base model.

    Modules are found by `selectune.adapters.roles`, a map of names for each architecture. GPT-2's fused query, key and
    value count in thirds; DeBERTa (v1) mixes them by heads, so they stay one row. Of an adapter, all matrices on a
    module belong to its cell. Raises ConfigError for an architecture without a map; `roles` gives one.
    Source: Agarwal et al. (2024), arXiv 2408.14470v1, Fig. 7.
    """
    places = places_of(model, roles)
    counts: dict[Cell, int] = {}
    sizes: dict[Cell, int] = {}
    other: dict[str, int] = dict.fromkeys(OTHER, 0)
    none = torch.zeros(0, dtype=torch.int64)
    for name, size in support.sizes.items():
        place, flat = places[name], support.entries.get(name, none)
        if isinstance(place, str):
            other[place] += flat.numel()
            continue
        for cell, mine, own in place.split(flat, size):
            counts[cell] = counts.get(cell, 0) + mine
            sizes[cell] = sizes.get(cell, 0) + own
    return Allocation(counts, sizes, other)


@dataclass(frozen=True)
class _Matrix:
    """The cell of a matrix. `width`: of a fused query, key and value (n, 3 width), whose thirds are cells."""

    role: Role
    width: int = 0

    @property
    def layer(self) -> str:
        return f"{self.role.stack} {self.role.layer}".strip()

    @property
    def row(self) -> str:
        return f"cross {self.role.kind}" if self.role.cross else self.role.kind

    def split(self, flat: Tensor, size: int) -> list[tuple[Cell, int, int]]:
        """(cell, selected entries, all entries) of the matrix or of each third."""
        if not self.width:
            return [((self.row, self.layer), flat.numel(), size)]
        counts = torch.bincount(flat % (3 * self.width) // self.width, minlength=3).tolist()
        return [((row, self.layer), n, size // 3) for row, n in zip(("query", "key", "value"), counts, strict=True)]


def kinds_of(model: nn.Module) -> dict[str, str]:
    """{parameter's name: its kind, one of `OTHER`}. It needs no role map. A tied head counts as embeddings."""
    heads = head_names(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            kind = "embeddings"
        elif heads.intersection(_above(name)):
            kind = "head"
        elif "pooler" in name.split("."):
            kind = "pooler"
        else:
            kind = "biases and norms" if parameter.ndim < 2 else "rest"
        kinds[canonical_name(name)] = kind
    return kinds


def places_of(model: nn.Module, roles: RoleMap | None = None) -> dict[str, _Matrix | str]:
    """{parameter's name: its cell, or its kind}."""
    found = {role.name: role for role in find(model, roles) if role.kind not in ENDS}
    places: dict[str, _Matrix | str] = {**kinds_of(model)}
    for name, parameter in model.named_parameters():
        role = next((found[module] for module in reversed(_above(name)) if module in found), None)
        if role is not None and parameter.ndim > 1:
            fused = role.kind == "qkv" and name == f"{role.name}.weight" and _transposed(model, role)
            places[canonical_name(name)] = _Matrix(role, parameter.shape[1] // 3 if fused else 0)
    return places


def _above(name: str) -> list[str]:
    """The modules that a parameter is in, the outermost first."""
    return [name[:at] for at, mark in enumerate(name) if mark == "."]


def _transposed(model: nn.Module, role: Role) -> bool:
    """Whether a fused layer is GPT-2's Conv1D, whose columns are all queries, then all keys, then all values."""
    return hasattr(model.get_submodule(role.name), "nf")


def label_of(place: _Matrix | str) -> str:
    """The row that a tensor's place belongs to, whatever its layer."""
    return place if isinstance(place, str) else place.row
