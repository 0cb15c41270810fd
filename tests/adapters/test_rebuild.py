"""A selection from an adapter is trained, saved and put on a plain base again, bit for bit, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters_kit import classifier, inputs, trace

import selectune as st
from selectune.adapters import KINDS, put_on, rebuild, spec_of
from selectune.delta import Delta, base_info
from selectune.errors import BaseMismatchError, ConfigError, DeltaFormatError

SMALL = {
    "super": ":sparsity=0.9",
    "shira": ":r=2",
    "prefix": ":tokens=4",
    "prompt": ":tokens=4",
    "ptuning": ":tokens=4",
    "pasta": ":ids=3+4",
}
HEAD = ("classifier.weight", "classifier.bias")
BATCH = {**inputs("bert"), "labels": torch.tensor([0, 1])}


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def trained(kind: str, method: st.Method, keep=HEAD, seed=5):
    """The delta of a few steps, and the output of the trained model."""
    adapted = put_on(classifier(), f"{kind}{SMALL.get(kind, '')}", seed, keep=keep)
    base = base_info(adapted.model, id="base", full=True)
    tuner = st.attach(adapted.model, method, seed=1)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(4):
        adapted.model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta, said = tuner.delta(base=base), logits(adapted.model)
    tuner.detach()
    assert not torch.equal(logits(adapted.model), said)
    return Delta.from_bytes(delta.to_bytes()), said


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].on])
@pytest.mark.parametrize("recipe", ["id3", "pafi", "full"])
def test_a_delta_brings_its_module_along(kind, recipe):
    if KINDS[kind].peft:
        pytest.importorskip("peft")
    methods = {"id3": st.id3(40, steps=4), "pafi": st.pafi(40), "full": st.full()}
    delta, said = trained(kind, methods[recipe])
    assert delta.info["module"]["kind"] == kind
    assert delta.selected == (0 if recipe == "full" else 40)
    model = classifier()
    before = trace(model)
    adapted = rebuild(model, delta)
    assert delta.verify(adapted.model, full=True).ok
    with delta.applied(adapted.model):
        assert torch.equal(logits(adapted.model), said)
    adapted.remove()
    assert trace(model) == before


def test_only_the_module_and_the_head_are_selected_from():
    delta, _ = trained("lora", st.id3(200, steps=4))
    assert all("lora_" in name or name in HEAD for name in delta.support)
    dense, _ = trained("pfeiffer", st.id3(40, steps=4, train_fully="classifier.*"), keep=HEAD)
    assert {d.name for d in dense.dense} == set(HEAD)
    assert all("bottleneck" in name for name in dense.support)


def test_a_plain_base_says_what_is_missing():
    delta, _ = trained("pfeiffer", st.id3(40, steps=4))
    model = classifier()
    before = trace(model)
    with pytest.raises(
        BaseMismatchError, match=r"carried pfeiffer: selectune\.adapters\.rebuild\(model, delta\) puts it"
    ):
        delta.apply(model)
    assert trace(model) == before


def test_another_seed_is_seen_where_no_trained_entry_tells():
    """LoRA's B is 0 from any seed: only the module's digest can tell that A is another one."""
    pytest.importorskip("peft")
    scope = st.Scope(include="*lora_B*")
    delta, _ = trained("lora", st.Method(scope, st.scores.d3(), schedule=st.id3(40, steps=4).schedule), keep=())
    wrong = put_on(classifier(), "lora", seed=6)
    with pytest.raises(BaseMismatchError, match=r"the lora on the model was initialised otherwise.* from seed 5"):
        delta.apply(wrong.model)
    report = delta.verify(wrong.model)
    assert not report.ok
    wrong.remove()
    right = put_on(classifier(), "lora", seed=5)
    delta.apply(right.model)


def test_what_cannot_be_rebuilt_is_refused_and_nothing_changes():
    delta, _ = trained("pfeiffer", st.id3(40, steps=4))
    model = classifier()
    before = trace(model)
    for change, error, message in (
        ({"digest": "0" * 64}, BaseMismatchError, "does not have the bits that the delta was trained on.*Nothing was"),
        ({"options": {"width": 3}}, DeltaFormatError, "pfeiffer takes no option width"),
        ({"options": {"reduction": 0}}, DeltaFormatError, "reduction=0 is not allowed"),
        ({"kind": "exec"}, DeltaFormatError, r"info\.module cannot be rebuilt: Unknown adapter 'exec'\. Known: lora"),
    ):
        info = {**delta.info, "module": {**delta.info["module"], **change}}
        with pytest.raises(error, match=message):
            rebuild(model, Delta(delta.patches, delta.dense, info))
        assert trace(model) == before
    plain = st.attach(model, st.pafi(5))
    on_the_base = plain.delta(allow_empty=True)
    plain.detach()
    with pytest.raises(ConfigError, match="was trained on the base itself"):
        rebuild(model, on_the_base)


def test_the_same_call_draws_the_same_bits_and_leaves_the_generator_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first, second, other = (put_on(classifier(seed=0), "houlsby", seed=s) for s in (1, 1, 2))
    bits = [{n: t.numpy().tobytes() for n, t in a.model.state_dict().items()} for a in (first, second, other)]
    assert bits[0] == bits[1] != bits[2]
    model = classifier()
    torch.manual_seed(9)
    put_on(model, "pfeiffer", seed=2)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_kind_in_a_file_does_nothing_but_name_itself():
    """The file format accepts any name as a kind. Nothing is made from it, and the bits are compared as usual."""
    delta, _ = trained("pfeiffer", st.id3(40, steps=4))
    unknown = Delta(delta.patches, delta.dense, {**delta.info, "module": {**delta.info["module"], "kind": "exec"}})
    unknown = Delta.from_bytes(unknown.to_bytes())
    with pytest.raises(DeltaFormatError, match=r"Unknown adapter 'exec'\. Known: lora"):
        spec_of(unknown)
    with pytest.raises(BaseMismatchError, match="is missing"):
        unknown.apply(classifier())
    wrong = put_on(classifier(), "pfeiffer", seed=6, keep=HEAD)
    before = trace(wrong.model)
    with pytest.raises(BaseMismatchError, match="the pfeiffer on the model was initialised otherwise"):
        unknown.apply(wrong.model)
    assert trace(wrong.model) == before


def test_a_copy_of_the_model_carries_the_adapter_too():
    delta, said = trained("pfeiffer", st.id3(40, steps=4))
    model = copy.deepcopy(rebuild(classifier(), delta).model)
    with delta.applied(model):
        assert torch.equal(logits(model), said)
    with pytest.raises(ConfigError, match="carries pfeiffer already"):
        put_on(model, "pfeiffer")
    tuner = st.attach(model, st.pafi(5))
    assert tuner.delta(allow_empty=True).info["module"] == delta.info["module"]


def test_an_adapter_that_is_on_no_record_is_refused():
    delta, _ = trained("pfeiffer", st.id3(40, steps=4))
    unknown = put_on(classifier(), "pfeiffer", seed=5, keep=HEAD, record=False)
    with pytest.raises(BaseMismatchError, match=r"no adapter is on record.*with pfeiffer.*adapters\.rebuild"):
        delta.apply(unknown.model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_peft_model_of_ones_own():
    """An adapter of any library can be selected from: freeze the rest, as peft does, and attach."""
    peft = pytest.importorskip("peft")
    own = peft.get_peft_model(classifier(), peft.LoraConfig(r=4, target_modules=["query", "value"]))
    tuner = st.attach(own, st.id3(30, steps=2))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(2):
        own(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().changed == 30
    assert all("lora_" in name for name in tuner.support)
    assert "module" not in tuner.delta().info  # ours to rebuild only if put on by put_on
