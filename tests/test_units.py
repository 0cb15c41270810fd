"""Units: rows, columns, blocks, heads and subnets are taken whole, the last in part, so that the budget is exact."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import selectune as st
from selectune.select import GlobalTopK, PerTensor
from selectune.structure import Structure, pooled, spread, subnet


class Conv1D(torch.nn.Module):
    """transformers' linear layer, whose weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf, self.weight = outputs, torch.nn.Parameter(torch.zeros(inputs, outputs))


def numbered(*shapes: tuple[int, ...]) -> torch.nn.ParameterList:
    """Tensors whose entries are 1, 2, 3, ... throughout."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = torch.arange(1.0, sum(sizes) + 1).split(sizes)
    return torch.nn.ParameterList(torch.nn.Parameter(p.view(s)) for p, s in zip(pieces, shapes, strict=True))


def magnitude(budget: int, structure: Structure, select: GlobalTopK | PerTensor = GlobalTopK()) -> st.Method:
    score, once = st.scores.magnitude(), st.schedule.OneShot(budget)
    return st.Method(score=score, select=select, schedule=once, structure=structure)


def support(model: torch.nn.Module, method: st.Method, **more: object) -> dict[str, list[int]]:
    tuner = st.attach(model, method, **more)  # pyright: ignore
    found = {n: f.tolist() for n, f in tuner.support.items()}
    tuner.detach()
    return found


def test_units_by_hand():
    """1 ... 12 in 3 x 4. Means of rows: 2.5, 6.5, 10.5; of columns: 5, 6, 7, 8; of blocks: 3.5, 5.5, 9.5, 11.5."""
    for unit, size, expected in (
        ("row", None, [8, 9, 10, 11]),
        ("column", None, [2, 3, 7, 11]),  # the last one, 4, 8 and 12, and the first entry of the one before
        ("block", 2, [10, 11, 8, 9]),  # the lower blocks are cut at the edge: 9, 10 and 11, 12
        ("head-rows", 2, [8, 9, 10, 11]),
        ("head-columns", 2, [2, 3, 6, 7]),
        ("entry", None, [8, 9, 10, 11]),
    ):
        found = support(numbered((3, 4)), magnitude(4, Structure(unit, size)))
        assert found == {"0": sorted(expected)}, unit


def test_the_sum_prefers_larger_units_and_the_mean_does_not():
    model = numbered((1, 2), (1, 9))  # means 1.5 and 7; now 20 for the first
    with torch.no_grad():
        model[0].fill_(20.0)
    assert list(support(model, magnitude(2, Structure("row")))) == ["0"]
    assert list(support(model, magnitude(2, Structure("row", pool="sum")))) == ["1"]


@settings(deadline=None, max_examples=25)
@given(
    some.lists(some.tuples(some.integers(1, 7), some.integers(1, 7)), min_size=1, max_size=3),
    some.sampled_from(["row", "column", "block", "head-rows", "head-columns"]),
    some.integers(1, 4), some.floats(0.01, 1), some.booleans(), some.integers(0, 9),
)  # fmt: skip
def test_units_are_whole_but_for_one_and_the_budget_is_exact(shapes, unit, size, part, by_tensor, seed):
    torch.manual_seed(seed)
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape)) for shape in shapes)
    structure = Structure(unit, size)
    budget = max(1, round(part * sum(r * c for r, c in shapes)))
    found = support(model, magnitude(budget, structure, PerTensor() if by_tensor else GlobalTopK()))
    assert sum(map(len, found.values())) == budget
    partial = dict.fromkeys(found, 0)
    least, most = [], []
    for name, flat in found.items():
        r, c = model[int(name)].shape
        a, b = {"row": (1, c), "column": (r, 1), "block": (size, size)}.get(unit, (0, 0))
        a, b = {"head-rows": (size, c), "head-columns": (r, size)}.get(unit, (a, b))
        mask = torch.zeros(r * c).index_fill(0, torch.tensor(flat), 1.0).view(r, c)
        full, held = pooled(torch.ones(r, c), (a, b)), pooled(mask, (a, b))
        partial[name] = int(((held > 0) & (held < full)).sum())
        means = pooled(model[int(name)].detach().abs(), (a, b)) / full
        least += means[held == full].tolist()
        most += [] if by_tensor else means[held == 0].tolist()
        if by_tensor and (held == 0).any() and (held == full).any():
            assert means[held == full].min() >= means[held == 0].max()
    assert max(partial.values()) <= 1
    assert by_tensor or sum(partial.values()) <= 1
    assert not least or not most or min(least) >= max(most)


def test_tied_units_stay_whole():
    assert support(
        torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3, 4))]), magnitude(6, Structure("column"))
    ) == {"0": [0, 1, 4, 5, 8, 9]}


def test_pooling_and_spreading_are_one_another_s_inverse_on_tiles():
    units = torch.arange(6.0).view(2, 3)
    entries = spread(units, (2, 2), (4, 6))
    assert torch.equal(pooled(entries, (2, 2)) / 4, units.double())


def test_a_subnet_by_hand():
    """Four entries of 3 x 3: two rows and columns. Row sums 11, 10, 9 and column sums 10, 10, 10: rows 0 and 1. Then
    columns within these rows: 8, 7, 6, so 0 and 1, with 15 inside; the other orders give no more."""
    scores = torch.tensor([[5.0, 3.0, 3.0], [3.0, 4.0, 3.0], [2.0, 3.0, 4.0]])
    i, j = subnet(scores, 4)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    i, j = subnet(scores, 5)  # the first row of the next column
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@given(some.integers(1, 9), some.integers(1, 9), some.data())
def test_a_subnet_has_exactly_the_entries_asked_for(r, c, data):
    count = data.draw(some.integers(1, r * c))
    i, j = subnet(torch.rand(r, c, generator=torch.Generator().manual_seed(count)), count)
    places = set(zip(i.tolist(), j.tolist(), strict=True))
    assert len(places) == count
    assert all(0 <= a < r and 0 <= b < c for a, b in places)
    rows, columns = ({place[side] for place in places} for side in (0, 1))
    assert len(rows) * len(columns) < count + len(rows) or len(rows) == 1


def test_a_padding_row_is_in_no_unit():
    table = torch.nn.Embedding(4, 3, padding_idx=1)
    with torch.no_grad():
        table.weight.fill_(1.0)
    for unit in ("column", "subnet"):
        found = support(table, magnitude(9, Structure(unit), PerTensor()))
        assert found == {"weight": [0, 1, 2, 6, 7, 8, 9, 10, 11]}


def test_a_stored_transpose_has_the_rows_and_columns_of_its_outputs_and_inputs():
    layer, turned = torch.nn.Linear(4, 3, bias=False), Conv1D(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(3, 4))
        turned.weight.copy_(layer.weight.T)
    for unit in ("row", "column", "subnet"):
        numbers = []
        for module in (layer, turned):
            flat = support(module, magnitude(5, Structure(unit), PerTensor()))["weight"]
            numbers.append(sorted(module.weight.detach().reshape(-1)[flat].tolist()))
        assert numbers[0] == numbers[1]


def test_the_head_size_is_the_config_s():
    model = numbered((8, 2))
    model.config = SimpleNamespace(hidden_size=8, num_attention_heads=4)  # pyright: ignore
    assert support(model, magnitude(4, Structure("head-rows"))) == {"0": [12, 13, 14, 15]}
    model.config = SimpleNamespace(head_dim=4)  # pyright: ignore
    assert support(model, magnitude(8, Structure("head-rows"))) == {"0": list(range(8, 16))}
    del model.config
    with pytest.raises(st.errors.ConfigError, match=r"Give size="):
        st.attach(model, magnitude(4, Structure("head-rows")))


def test_what_units_cannot_be():
    calibrated, once = st.scores.d3_pooled(), st.schedule.OneShot(4)
    with pytest.raises(st.errors.ConfigError, match="at least 1, or None for what the config says, got 0"):
        st.s2ft(60, head=0)
    with pytest.raises(st.errors.ConfigError, match="at least 1, or None for once, got 0"):
        st.losia(60, 10, every=0)
    with pytest.raises(st.errors.ConfigError, match="reads gradient"):
        st.Method(score=st.scores.d3(), schedule=once, structure=Structure("row"))
    with pytest.raises(st.errors.ConfigError, match="one subnet"):
        st.Method(score=calibrated, schedule=once, structure=Structure("subnet"))
    with pytest.raises(st.errors.ConfigError, match="Unknown unit 'line'"):
        Structure("line")
    with pytest.raises(st.errors.ConfigError, match="no other unit beside"):
        Structure("subnet", also=(("*", "row"),))
    grows = st.Method(score=st.scores.magnitude(), schedule=st.schedule.Increment(4, 2), structure=Structure("row"))
    with pytest.raises(st.errors.ConfigError, match="chosen all at once"):
        st.attach(numbered((3, 4)), grows)


def test_linear_is_a_role_of_modules():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), Conv1D(2, 2))
    assert [t.name for t in st.Scope("@linear").find(model).tensors] == ["1.weight", "3.weight"]
    assert [t.name for t in st.Scope(exclude="@linear").find(model).tensors] == [
        "0.weight", "1.bias", "2.weight", "2.bias",
    ]  # fmt: skip
