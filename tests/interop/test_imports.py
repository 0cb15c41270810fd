"""`selectune delta import`: pairs and the authors' toolkit; and files that are neither."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_kit import call, load, make_llama, train, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import selectune as st
from selectune.errors import DeltaError, DeltaFormatError
from selectune.interop import bridges
from selectune.interop.toolkit import read_summary
from selectune.models.restore import Source


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


def test_pairs_go_out_and_come_in(llama, tmp_path):
    run = trained(llama, tmp_path / "run", st.random(budget=300))
    call("export", "safetensors-diff", "--model", llama, "--delta", run, "--out", tmp_path / "out")
    call("delta", "import", "safetensors-diff", tmp_path / "out", "--model", llama, "--out", tmp_path / "back")
    ours, back = load(llama), load(llama)
    st.load(run).apply(ours)
    st.load(tmp_path / "back").apply(back, full=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))
    pairs = load_file(tmp_path / "out" / "changed.safetensors")
    assert len(pairs) == 2 * len(st.load(run).patches)


def changed(llama: Path, tmp_path: Path, edit: Mapping[str, Tensor | None]) -> Any:
    name = "model.norm.weight"
    pairs: dict[str, Any] = {f"{name}.indices": torch.tensor([4, 1]), f"{name}.values": torch.tensor([2.0, 3.0])}
    pairs = {key: value for key, value in {**pairs, **edit}.items() if value is not None}
    save_file(pairs, tmp_path / "pairs.safetensors")
    return bridges.import_delta("safetensors-diff", tmp_path / "pairs.safetensors", Source(str(llama)))


def test_pairs_of_another_program_may_be_int32_and_in_any_order(llama, tmp_path):
    for edit in ({}, {"model.norm.weight.indices": torch.tensor([4, 1], dtype=torch.int32)}):
        delta = changed(llama, tmp_path, edit)
        assert delta.support["model.norm.weight"].tolist() == [1, 4]
        assert delta.values["model.norm.weight"].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"model.norm.weight.indices": torch.tensor([1, 1])}, "occurs twice"),
        ({"model.norm.weight.indices": torch.tensor([1, 32])}, "outside its 32 entries"),
        ({"model.norm.weight.indices": torch.tensor([-1, 2])}, "outside its 32 entries"),
        ({"model.norm.weight.indices": torch.tensor([1.0, 2.0])}, "needs int32 or int64 places"),
        ({"model.norm.weight.values": torch.tensor([1.0])}, "needs int32 or int64 places"),
        ({"model.norm.weight.values": torch.tensor([1.0, 2.0]).half()}, "needs int32 or int64 places"),
        ({"model.norm.weight.values": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"model.norm.weight.values": None}, "has no pair"),
        ({"other.indices": torch.tensor([1]), "other.values": torch.tensor([1.0])}, 'no tensor "other"'),
    ],
)
def test_pairs_that_do_not_fit_are_refused(edit, why, llama, tmp_path):
    with pytest.raises(DeltaError, match=why):
        changed(llama, tmp_path, edit)


# -- the authors' toolkit


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A file that the toolkit wrote after a run of its own ID3, and the model that it had trained."""
    wrapped = pytest.importorskip("selective_optimizers.wrap")
    storing = pytest.importorskip("selective_optimizers.load_store")
    folder = tmp_path_factory.mktemp("toolkit")
    model = net()
    optimizer = wrapped.get_selective_optimizer(torch.optim.AdamW, "id3")(
        model.parameters(), lr=0.05, budget=12, max_steps=4, exp=1, eps=1.0, verify=False
    )
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    made = storing.create_summary_from_param_groups(optimizer.param_groups, model)
    assert storing.write_summary_to_disk(str(folder / "summary.pt"), made)
    return folder / "summary.pt", model


def test_what_the_toolkit_wrote_gives_its_model(summary):
    path, theirs = summary
    model = net()
    told = dict(read_summary(path, model))
    assert told
    model.load_state_dict({**model.state_dict(), **told})
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_summary_of_another_model_is_refused(summary):
    path, _ = summary
    with pytest.raises(DeltaError, match="of a model with 6 parameters"):
        list(read_summary(path, nn.Linear(6, 5)))
    other = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(DeltaError, match="has shape"):
        list(read_summary(path, other))


class Hostile:
    """Unpickling it would run code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def packed(pickled: bytes, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (extra or {}).items():
            file.writestr(name, data)
    return target.getvalue()


def test_hostile_and_broken_files_are_refused_and_nothing_runs(summary, tmp_path):
    path, _ = summary
    good = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    (structure,) = (data for name, data in parts.items() if name.endswith("data.pkl"))
    hostile = Hostile(tmp_path / "ran")
    bad = {
        "runs code": packed(pickle.dumps(hostile, 2)),
        "within a list": packed(pickle.dumps([{"values": hostile}], 2)),
        "newer opcodes": packed(pickle.dumps(hostile, 5)),
        "another value": packed(pickle.dumps({"values": []}, 2)),
        "no zip": b"\x80\x02}q\x00.",
        "cut": good[: len(good) // 2],
        "no tensors": packed(structure),
        "compressed": packed(structure, compression=zipfile.ZIP_DEFLATED),
        "another global": good.replace(b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v1"),
        "pops too much": packed(b"\x80\x02tq\x00."),
        "empty": packed(b""),
    }
    for what, data in bad.items():
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(DeltaFormatError):
            raise AssertionError(what, list(read_summary(tmp_path / "bad.pt", net())))
    assert not (tmp_path / "ran").exists()


def test_every_cut_and_flip_of_the_structure_is_refused_or_harmless(summary, tmp_path):
    path, _ = summary
    with zipfile.ZipFile(path) as file:
        names = {name: file.read(name) for name in file.namelist()}
    root = next(name for name in names if name.endswith("data.pkl")).partition("/")[0]
    structure = bytearray(names[f"{root}/data.pkl"])
    extra = {name.replace(root, "archive", 1): data for name, data in names.items() if not name.endswith("data.pkl")}
    for at in range(0, len(structure), 7):
        flipped = bytearray(structure)
        flipped[at] ^= 1 + at % 255
        for data in (flipped, structure[:at]):
            (tmp_path / "bad.pt").write_bytes(packed(bytes(data), extra))
            try:
                for _, tensor in read_summary(tmp_path / "bad.pt", net()):
                    assert isinstance(tensor, Tensor)
            except DeltaError:
                pass


def test_the_toolkit_comes_in_through_the_command_line(llama, tmp_path):
    storing = pytest.importorskip("selective_optimizers.load_store")
    model = load(llama)
    delta = train(model, st.random(budget=200, scope=["*proj*"]))
    delta.apply(model)
    masks = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
    for mask, (name, _) in zip(masks, model.named_parameters(), strict=True):
        if name in delta.support:
            mask.view(-1)[delta.support[name]] = True
    groups = [{"params": list(model.parameters()), "chosen_masks": masks}]
    made = storing.create_summary_from_param_groups(groups, model)
    assert storing.write_summary_to_disk(str(tmp_path / "summary.pt"), made)
    call("delta", "import", "toolkit", tmp_path / "summary.pt", "--model", llama, "--out", tmp_path / "back")
    back = load(llama)
    st.load(tmp_path / "back").apply(back, full=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
