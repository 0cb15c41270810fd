"""Other numbers and orders of backward passes and graphs than one of each give the dense oracle's support."""

from __future__ import annotations

import pytest
import torch
from loop_kit import Tied, X, assert_same, loss
from side_by_side import id3, increment_pafi
from torch import nn
from torch.utils.checkpoint import checkpoint

import selectune as st
from selectune.errors import AccumulationError


def test_two_backward_passes_through_one_forward():
    def loop(trainer, step):
        one, two = trainer.model(X[step])
        one.square().mean().backward(retain_graph=True)
        two.square().mean().backward()

    assert_same(Tied(), loop, accumulation=2)


def test_two_forwards_before_two_backward_passes():
    def loop(trainer, step):
        losses = [loss(trainer.model(X[2 * step + i])) for i in range(2)]
        for each in losses:
            each.backward()

    assert_same(Tied(), loop, accumulation=2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_input_gradients_out_of_the_graph_that_is_trained_on(accumulation):
    def loop(trainer, step):
        for i in range(accumulation):
            x = X[accumulation * step + i].clone().requires_grad_()
            each = loss(trainer.model(x))
            torch.autograd.grad(each, x, retain_graph=True)
            each.backward()

    assert_same(Tied(), loop, accumulation=accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_on_clean_and_adversarial_inputs_together(accumulation):
    """Virtual adversarial training: forward, input gradients of a second forward, a third one, one backward pass."""

    def loop(trainer, step):
        for i in range(accumulation):
            x = X[accumulation * step + i]
            clean = loss(trainer.model(x))
            noise = (0.1 * X[20 + step]).requires_grad_()
            (found,) = torch.autograd.grad(loss(trainer.model(x + noise)), noise)
            (clean + loss(trainer.model(x + found))).backward()

    assert_same(Tied(), loop, accumulation=accumulation)


@pytest.mark.parametrize("plan", [id3(12, 6, every=2), id3(2, 6, every=3), increment_pafi(30, 6)])
def test_a_forward_without_a_backward_pass_between_backward_and_step(plan):
    """The graph belongs to the step before, not to the next one, which selects or has new entries."""

    def loop(trainer, step):
        loss(trainer.model(X[step])).backward()
        trainer.model(X[step + 1])

    assert_same(Tied(), loop, steps=6, plan=plan)


def test_one_pass_through_graphs_from_before_and_after_another_says_so():
    model = Tied()
    tuner = st.attach(model, st.id3(40, 4))
    first = loss(model(X[0]))
    torch.autograd.grad(first, tuner.parameters(), retain_graph=True)
    with pytest.raises(AccumulationError, match="before and from after"):
        (first + loss(model(X[1]))).backward()


class Failing(nn.Module):
    """Its next backward pass raises, after most layers are done, when told so."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.tied, self.fails, self.reentrant = Tied(), False, reentrant

    def forward(self, x):
        h = self.tied.a(x)
        if h.requires_grad:
            h.register_hook(self.fail)
        return checkpoint(self.tied, h, use_reentrant=True) if self.reentrant else self.tied(h)

    def fail(self, gradient):
        if self.fails:
            self.fails = False
            raise RuntimeError("out of memory, say")


def fail(trainer, each, **options):
    if trainer.tuner is not None:
        trainer.model.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            each.backward(**options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_breaks_off_is_forgotten(reentrant):
    def loop(trainer, step):
        x = X[step].clone().requires_grad_()
        fail(trainer, loss(trainer.model(x)))
        trainer.optimizer.zero_grad()
        loss(trainer.model(x)).backward()

    assert_same(Failing(reentrant), loop)


def test_a_pass_that_breaks_off_is_run_again():
    def loop(trainer, step):
        each = loss(trainer.model(X[step]))
        fail(trainer, each, retain_graph=True)
        each.backward()

    assert_same(Failing(), loop)


def test_a_window_is_begun_anew_after_a_pass_that_broke_off():
    def loop(trainer, step):
        if step == 1 and trainer.tuner is not None:
            loss(trainer.model(X[9])).backward()
            fail(trainer, loss(trainer.model(X[8])))
            trainer.optimizer.zero_grad()
        for i in range(2):
            loss(trainer.model(X[2 * step + i])).backward()

    assert_same(Failing(), loop, accumulation=2)


def test_a_window_that_goes_on_after_a_pass_that_broke_off_selects_later():
    """The sums over the window contain a part of the broken pass, so nothing is selected."""
    model = Failing()
    tuner = st.attach(model, st.id3(40, 4), accumulation_steps=2)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    selected = []
    for step in range(4):
        loss(model(X[step])).backward()
        if step == 1:
            model.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                loss(model(X[9])).backward()
        loss(model(X[step + 4])).backward()
        optimizer.step()
        optimizer.zero_grad()
        selected.append(tuner.selected)
    assert selected == [10, 10, 30, 40]
    assert dict(tuner.events) == {"broken_windows": 1}
    tuner.verify()


def test_a_step_without_a_backward_pass_reaches_the_weights():
    """Momentum moves the values where gradients are 0: the state dict shows it before the next forward."""
    model = Tied()
    tuner = st.attach(model, st.pafi(40))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.1)
    loss(model(X[0])).backward()
    optimizer.step()
    before = model.a.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not torch.equal(model.a.weight, before)


def test_a_linear_function_of_a_vector():
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.linear = nn.Parameter(X[0][0].clone()), nn.Linear(8, 8).double()

        def forward(self, x):
            return nn.functional.linear(x, self.row), self.linear(x)

    assert_same(Row(), lambda trainer, step: loss(trainer.model(X[step])).backward())


class Towers(nn.Module):
    """Two towers that share nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(8, 4).double(), nn.Linear(8, 4).double()

    def forward(self, x, which):
        return {"logits": (self.one if which == 0 else self.two)(x), "ids": torch.arange(3)}


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_that_no_selected_entry_takes_part_in(every):
    """The step is taken as in dense training, and the support grows in the tensors that got gradients."""
    model = Towers()
    tuner = st.attach(model, st.id3(budget=12, steps=6, every=every))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(6):
        output = model(X[step], 0 if step == 0 else 1)
        assert output["ids"].tolist() == [0, 1, 2]
        logits = output["logits"]
        logits *= 2
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (tuner.step, tuner.selected) == (6, 12)


def test_a_static_mask_in_the_tower_that_is_not_used():
    model = Towers()
    tuner = st.attach(model, st.random(budget=9, scope="one.*"))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    before = model.one.weight.detach().clone()
    for step in range(4):
        output = model(X[step], step % 2)["logits"]
        with torch.no_grad():
            assert not model(X[step], 1)["logits"].requires_grad
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            after = model.one.weight.detach().clone()
    assert tuner.step == 4
    assert not torch.equal(before, after)
    assert tuner.verify().changed <= 9
