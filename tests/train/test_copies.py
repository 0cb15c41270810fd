"""Copies of an attached model, what is registered on it, and an attach that fails: nothing is left behind."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from loop_kit import X
from torch import nn
from train_kit import bits, same

import selectune as st
from selectune.errors import AlreadyAttachedError, ConfigError, IntegrityError, ScopeError, SelectuneError, TunerError


def trained(steps=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    tuner = st.attach(model, st.id3(budget=20, steps=4))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(steps):
        model(X[step]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tuner, optimizer


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, through_torch])
def test_a_copy_is_an_ordinary_model_but_for_the_vector_and_can_be_stripped(duplicate):
    model, tuner, _ = trained()
    other = duplicate(model)
    assert {type(p) for p in other.parameters()} == {nn.Parameter}
    assert same(bits(other), bits(model))
    before = bits(model)
    other(X[0])
    with torch.no_grad():
        other[0].weight.zero_()
    assert same(bits(model), before)
    with pytest.raises(AlreadyAttachedError, match=r"selectune\.strip\(model\)"):
        st.attach(other, st.id3(budget=20, steps=4))
    assert st.tuner_of(model) is tuner
    assert st.tuner_of(other) is None
    assert st.strip(other) is other
    assert [n for n, _ in other.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(p.requires_grad for p in other.parameters())
    again = st.attach(other, st.id3(budget=20, steps=4))
    other(X[0]).sum().backward()
    again.detach()
    with pytest.raises(TunerError, match="detach"):
        st.strip(model)
    tuner.verify()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, through_torch])
def test_a_tuner_that_a_module_holds_stays_behind(duplicate):
    """As in a LightningModule, which an average of weights copies."""
    model, tuner, _ = trained()
    holder = nn.ModuleDict({"model": model})
    holder.tuner = tuner
    twin = duplicate(holder)
    assert torch.equal(twin["model"](X[0]), model(X[0]))
    assert st.tuner_of(twin) is None
    for use in (lambda: twin.tuner.parameters(), lambda: twin.tuner.delta(), lambda: copy.deepcopy(twin).tuner.step):
        with pytest.raises(TunerError, match=r"came along as a module was copied .* attach to it anew"):
            use()
    tuner.verify()


def test_what_was_frozen_before_attach_is_frozen_in_a_stripped_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    st.attach(model, st.id3(budget=5, steps=2))
    other = st.strip(copy.deepcopy(model))
    assert [p.requires_grad for p in other.parameters()] == [False, False, True, True]


def test_the_vector_is_the_last_parameter_and_pairs_with_a_model_from_before():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()
    average = copy.deepcopy(model)
    st.attach(model, st.id3(budget=20, steps=4))
    names = [n for n, _ in model.named_parameters()]
    assert names[:-1] == [n for n, _ in average.named_parameters()]
    assert names[-1] == "2.selectune_values"
    assert next(model.parameters()).dtype is torch.bfloat16
    for a, b in zip(average.parameters(), model.parameters(), strict=False):
        a.data.lerp_(b.data, 0.5)
    assert list(model.state_dict()) == list(average.state_dict())
    assert list(model[2].state_dict()) == ["weight", "bias"]
    model[2].load_state_dict(model[2].state_dict())


def test_newcomers_are_named_by_verify_and_delta():
    model = nn.ModuleDict({"body": nn.Linear(4, 8)})
    tuner = st.attach(model, st.id3(budget=5, steps=2))
    model["head"] = nn.Linear(8, 2)
    for ask in (tuner.verify, tuner.delta):
        with pytest.raises(
            IntegrityError, match=r"2 parameters joined the model after attach: head\.bias, head\.weight"
        ):
            ask()
    del model["head"]
    tuner.verify()
    model["body"].weight = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(IntegrityError, match=r"replaced by other Parameters since attach: body\.weight"):
        tuner.verify()
    del model["body"].weight
    with pytest.raises(IntegrityError, match=r"left the model since attach: body\.weight"):
        tuner.verify()


def test_weights_that_the_model_writes_itself_are_named():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 8))

        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.5, 0.5)
            return x * self.weight

    cases = (st.pafi(8), "Selected weights of 1 tensors are not what"), (st.pafi(1), "outside the support")
    for method, where in cases:
        model = Clamped()
        tuner = st.attach(model, method)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model(torch.ones(2, 8))
        with pytest.raises(IntegrityError, match=rf"{where}.*Scope\(exclude"):
            tuner.verify()
        tuner.detach()


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(4, 6)), nn.Linear(6, 2))


def hooked():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.register_hook(lambda g: g * 0)
    return model


def hooked_after():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [scripted, hooked, hooked_after])
def test_what_cannot_be_followed_is_refused_and_the_model_is_as_it_was(make):
    model = make()
    before, keys = bits(model), [sorted(m.__dict__) for m in model.modules()]
    with pytest.raises(ScopeError, match=r'"0\.weight".*(Exclude it|before torch\.jit)'):
        st.attach(model, st.id3(budget=5, steps=2))
    assert all(p.requires_grad for p in model.parameters())
    assert same(bits(model), before)
    assert [sorted(m.__dict__) for m in model.modules()] == keys
    model(torch.randn(2, 4)).sum().backward()
    tuner = st.attach(model, st.id3(budget=5, steps=2, scope=st.Scope(exclude="0.*")))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert tuner.verify().selected == 5


attaching, assembling = (importlib.import_module(f"selectune.train.{name}") for name in ("attach", "engine"))
STAGES = ("Ledger", "Tracker", "StepHooks", "copies.carrier", "BaseCopy", "copies.OfTuner")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_attach_that_fails_anywhere_leaves_the_model_as_it_was(monkeypatch, stage, error):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[1].requires_grad_(False)

    def state():
        hooks = [
            [len(v) for k, v in m.__dict__.items() if "hooks" in k and hasattr(v, "__len__")] for m in model.modules()
        ]
        kinds = [(n, type(p), p.requires_grad, p.grad) for n, p in model.named_parameters()]
        return kinds, hooks, [sorted(m.__dict__) for m in model.modules()]

    before, numbers = state(), bits(model)
    place, _, name = stage.rpartition(".")
    home = attaching if name == "OfTuner" else assembling
    where = getattr(home, place) if place else home
    real = getattr(where, name)

    def fails(*args, **kwargs):
        real(*args, **kwargs)
        raise error("in the midst of it")

    monkeypatch.setattr(where, name, fails)
    with pytest.raises(error):
        st.attach(model, st.pafi(budget=5))
    monkeypatch.undo()
    assert state() == before
    assert same(bits(model), numbers)
    st.attach(model, st.id3(budget=5, steps=2)).detach()
    assert state() == before


def test_two_models_that_share_a_weight_have_one_tuner_at_a_time():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    tuner = st.attach(first, st.id3(budget=5, steps=2))
    with pytest.raises(AlreadyAttachedError, match='"weight" is being trained by the tuner of another model'):
        st.attach(second, st.id3(budget=5, steps=2))
    tuner.detach()
    st.attach(second, st.id3(budget=5, steps=2)).detach()


def test_what_cannot_be_trained_whole_is_refused():
    model = nn.Linear(4, 4)
    model.waves = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ScopeError, match='"waves" is complex'):
        st.attach(model, st.id3(budget=3, steps=2, train_fully=("waves",)))
    with pytest.raises(ScopeError, match="has no shape before the model's first forward"):
        st.attach(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), st.id3(budget=3, steps=2))


def test_complex_parameters_and_quantised_layers_are_named(caplog):
    model = nn.Module()
    model.waves = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    model.linear = nn.Linear(4, 4)
    st.attach(model, st.id3(budget=5, steps=2)).detach()
    assert "1 complex parameters are left out" in caplog.text
    packed = nn.Module()
    packed.__class__ = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    model.packed = packed
    st.attach(model, st.id3(budget=5, steps=2)).detach()
    assert "1 quantised layers are left out of the selection and frozen (packed)" in caplog.text


@pytest.mark.parametrize("exp", [60.0, -60.0, 400.0])
def test_an_exponent_that_leaves_the_range_of_floats_is_refused(exp):
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 20.0)
    with pytest.raises(ConfigError, match=r"leaves the range of float32"):
        st.attach(model, st.id3(budget=5, steps=2, exp=exp))
    assert all(p.requires_grad for p in model.parameters())


def test_a_score_that_breaks_its_contract_is_named():
    @st.score(reads="gradient")
    def half(weight, gradient):
        return gradient.abs()[: (gradient.numel() + 1) // 2]

    @st.score(reads="gradient")
    def whole_numbers(weight, gradient):
        return gradient.abs().long()

    @st.score(reads="weight")
    def writes(weight):
        return weight.abs_()

    for bad in (half(), whole_numbers(), writes()):
        model = nn.Linear(5, 9)
        before = bits(model)
        with pytest.raises(ConfigError, match=f"The score '{bad.name}' has to give one floating number"):
            st.attach(model, st.Method(score=bad, schedule=st.static_d3(6).schedule))
        assert same(bits(model), before)


def test_errors_are_ours():
    for error in (AlreadyAttachedError, TunerError, IntegrityError, ScopeError):
        assert issubclass(error, SelectuneError)


def test_weights_are_frozen_but_while_their_model_runs_forward():
    """Optimizers, counts and wrappers see one trainable parameter. A forward that asks is told the same as without."""
    seen = []

    class Asking(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.requires_grad)
            return super().forward(x)

    model = Asking(4, 4)
    st.attach(model, st.id3(budget=5, steps=2))
    trainable = lambda: [n for n, p in model.named_parameters() if p.requires_grad]  # noqa: E731
    assert trainable() == ["selectune_values"]
    model(torch.randn(2, 4)).sum().backward()
    assert seen == [True]
    assert trainable() == ["selectune_values"]
    assert model.weight.is_leaf
    assert model.weight.grad is None


def test_names_that_a_delta_could_not_tell_apart_are_refused_at_attach():
    model = nn.Module()
    model.x = nn.Linear(3, 3)
    model.x.module = nn.Linear(3, 3)
    with pytest.raises(ScopeError, match=r'"x\.weight" and "x\.module\.weight" would have the same name'):
        st.attach(model, st.id3(budget=5, steps=2))
