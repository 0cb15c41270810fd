"""The private names of torch that selectune uses: each does what we take it to do, on this torch.

A failure here names the torch and the name; `selectune/internals.py` is the one file to mend.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from selectune import internals

PACKAGE = Path(internals.__file__).parent
ON = f"on torch {torch.__version__}"


class Probe(torch.autograd.Function):
    """Identity; its backward calls `seen`."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.seen()
        return gradients[0], None


def one() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def test_a_backward_pass_has_a_number_of_its_own():
    x, inner, seen = one(), one(), []

    def look():
        seen.append(internals.backward_id())
        with torch.enable_grad():
            Probe.apply(inner, lambda: seen.append(internals.backward_id())).sum().backward()
        seen.append(internals.backward_id())

    assert internals.backward_id() == -1, ON
    for _ in range(2):
        Probe.apply(x, look).sum().backward()
    assert internals.backward_id() == -1, ON
    first, nested, after, second, *_ = seen
    assert first == after, ON
    assert len({-1, first, nested, second}) == 4, ON


def test_a_backward_pass_tells_where_it_will_come():
    x, y, seen = one(), one(), []
    first, second = Probe.apply(x, lambda: None), Probe.apply(y, lambda: None)
    total = Probe.apply(first + second, lambda: seen.extend(map(internals.will_reach, (first.grad_fn, second.grad_fn))))
    torch.autograd.grad(total.sum(), [x], retain_graph=True)
    assert seen == [True, False], ON
    total.sum().backward()
    assert seen[2:] == [True, True], ON


def test_what_comes_after_a_backward_pass_comes_after_all_of_it():
    x, order = one(), []
    x.register_post_accumulate_grad_hook(lambda _: order.append("gradient"))
    Probe.apply(x, lambda: internals.after_backward(lambda: order.append("after"))).sum().backward()
    assert order == ["gradient", "after"], ON


def test_hooks_on_saved_tensors_are_seen():
    seen = []

    def look(x):
        seen.append(internals.saved_tensors_are_hooked())
        return x * x

    look(one())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        look(one())
    checkpoint(look, one(), use_reentrant=False)
    look(one())
    assert seen[:3] == [False, True, True], ON
    assert seen[-1] is False, ON


def test_dispatch_modes_are_counted():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert internals.dispatch_modes() == 0, ON
    with Mode():
        assert internals.dispatch_modes() == 1, ON
    assert internals.dispatch_modes() == 0, ON


def test_fake_tensors_have_a_form_and_no_data():
    large = torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16, device="meta")
    with internals.fake_mode() as mode:
        fake = internals.fake_of(mode, large, torch.device("cpu"))
        assert fake.device.type == "cpu", ON
        assert (fake @ fake).shape == large.shape, ON
        assert (fake + 1).untyped_storage().nbytes() == 1 << 41, ON
        assert (torch.ones(2) + torch.ones(2)).dtype == torch.float32, ON
    assert torch.ones(1).item() == 1, ON


def test_nested_values_are_walked():
    nested = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert internals.tree_leaves(nested) == list(internals.tree_iter(nested)) == [torch.ones(1), 2, torch.zeros(1)]
    assert internals.tree_map(type, nested) == {"a": [torch.Tensor, int], "b": (torch.Tensor,)}
    doubled = internals.tree_map_only(torch.Tensor, lambda t: t * 2, nested)
    assert doubled == {"a": [torch.tensor([2.0]), 2], "b": (torch.zeros(1),)}


def test_apply_binds_to_the_class_that_is_asked():
    """A classmethod up to torch 2.13, a descriptor in C from 2.14 on; `graph/functions.py` binds either."""
    x = one()
    out = torch.autograd.Function.__dict__["apply"].__get__(None, Probe)(x, lambda: None)
    assert "Probe" in out.grad_fn.name(), ON


def test_what_a_node_saved_through_hooks_is_told():
    x = one()
    assert internals.kept_plain(F.gelu(x).grad_fn, "self"), ON
    assert internals.kept_plain((x * x).grad_fn, "self", "other"), ON
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not internals.kept_plain(F.gelu(x).grad_fn, "self"), ON
        assert not internals.kept_plain((x * x).grad_fn, "self", "other"), ON


def test_subclasses_are_plain_tensors_meanwhile():
    class Loud(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise LookupError

    x = Loud(torch.ones(2))
    with pytest.raises(LookupError):
        x + 1
    with internals.without_dispatch():
        assert type(x + 1) is torch.Tensor, ON


def test_a_parameter_takes_another_class_and_its_own_again():
    class Other(nn.Parameter):
        pass

    x = nn.Parameter(torch.ones(2))
    x.__class__ = Other
    assert isinstance(x, Other), ON
    x.__class__ = nn.Parameter
    assert type(x) is nn.Parameter, ON


def test_transforms_are_seen():
    assert not internals.in_transform(), ON
    assert torch.func.vmap(lambda x: x * internals.in_transform())(torch.ones(2)).tolist() == [1, 1], ON


def test_transforms_can_be_left_for_a_while():
    def inside(x):
        with internals.outside_transforms():
            assert not internals.in_transform(), ON
        return x * internals.in_transform()

    assert torch.func.vmap(inside)(torch.ones(2)).tolist() == [1, 1], ON


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_what_a_transform_is_given_can_be_put_in_place_of(transform, monkeypatch):
    seen = []
    for module, name in internals.WRAPPING:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *rest, own=own: seen.append(x) or own(x, *rest))
    x = torch.ones(2)
    transform(lambda x: x * 2)(x)
    assert [one is x for one in seen] == [True], ON


def test_scripted_calls_can_be_put_in_place_of():
    for kind in internals.SCRIPTED:
        assert "__call__" in kind.__dict__, ON


def test_a_parameter_in_a_pickle():
    make, arguments = internals.plain_parameter(torch.ones(2), False)
    found = make(*arguments)
    assert (type(found), found.requires_grad, found.tolist()) == (nn.Parameter, False, [1.0, 1.0]), ON


@pytest.mark.filterwarnings("ignore")
def test_code_is_not_compiled_where_that_is_said():
    torch._dynamo.reset()
    seen = []

    @internals.never_compiled
    def begin():
        seen.append(internals.stop_compiling())

    def inside(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def run(x):
        begin()
        y = inside(x)
        internals.go_on_compiling(seen[0])
        return y

    assert torch.compile(run, backend="eager")(torch.ones(2)).tolist() == [2, 2], ON
    assert seen[0] is not None, ON
    assert seen[1] is False, ON
    assert internals.stop_compiling() is None, ON


@pytest.mark.parametrize("make, name, kept", [
    (lambda x: F.gelu(x, approximate="tanh"), "GeluBackward0", {"_saved_approximate": "tanh"}),
    (F.silu, "SiluBackward0", {}),
    (lambda x: x * x, "MulBackward0", {}),
])  # fmt: skip
def test_nodes_have_the_names_and_inputs_that_rebuild_reads(make, name, kept):
    """`graph/recompute.py` makes outputs again from what these nodes saved."""
    x = one()
    node = make(x).grad_fn
    assert node.name() == name, ON
    assert torch.equal(node._saved_self, x), ON
    assert all(getattr(node, key) == value for key, value in kept.items()), ON


def test_a_product_keeps_only_what_its_gradients_need():
    """`graph/recompute.py` takes a factor of None to mean that the product cannot be computed again."""
    x = one()
    assert torch.equal((x * x).grad_fn._saved_other, x), ON
    assert (x * 2.0).grad_fn._saved_self is None, ON
    assert (x * torch.ones(2)).grad_fn._saved_self is None, ON


def test_versions_count_writes():
    x = torch.zeros(2)
    before = x._version
    x[0] = 1
    x.detach().add_(1)
    assert x._version == before + 2, ON


def test_a_module_keeps_its_parts_where_we_look():
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert list(module._modules) == ["0"], ON
    assert list(module[0]._parameters) == ["weight", "bias"], ON
    assert list(module[0]._buffers) == ["running_mean", "running_var", "num_batches_tracked"], ON


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_forgets_a_parameter(kind):
    first, second, arguments = one(), one(), {"initial_accumulator_value": 0.5} if kind is torch.optim.Adagrad else {}
    optimizer, fresh = kind([first], lr=0.1, **arguments), kind([second], lr=0.1, **arguments)
    (first * 3).sum().backward()
    optimizer.step()
    internals.forget(optimizer, first)
    with torch.no_grad():
        first.copy_(second)
    second.grad = first.grad
    optimizer.step()
    fresh.step()
    assert torch.equal(first, second), ON


def test_versions_are_kept_where_bits_come_back():
    weight = torch.ones(2)
    x = one()
    loss = (x * weight).sum()
    with internals.versions_kept((weight,)):
        weight.zero_()
        assert weight._version == 1, ON
        weight.fill_(1)
    assert weight._version == 0, ON
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1], ON


def test_a_name_that_torch_lacks_is_told_with_the_version():
    with pytest.raises(ImportError, match=re.escape(f"torch._C._gone, which torch {torch.__version__} does not have")):
        internals._name("_C._gone")


def test_private_names_stand_in_one_file():
    private = re.compile(r"torch\._[A-Za-z]|torch\.[\w.]+\._[a-z]|from torch\.[\w.]+ import _|_execution_engine")
    public = re.compile(r"torch\.ops\.")  # an operation's name is what the dispatcher calls it
    wrong = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "internals.py"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if private.search(line) and not public.search(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def group(tmp_path):
    """A process group of one. What uses it goes first: a group that dies with its last user may wait for ever."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def test_a_wrapper_that_averages_gradients_is_known_while_its_forward_runs(group):
    seen = []

    class Inner(nn.Linear):
        def forward(self, x):
            seen.append((internals.averages(self.weight), internals.averages(late), internals.joining()))
            return super().forward(x)

    model, late = Inner(2, 2), nn.Parameter(torch.zeros(2))
    around = nn.parallel.DistributedDataParallel(model)
    model.register_parameter("late", late)
    around(torch.ones(1, 2))
    with around.join(throw_on_early_termination=True):
        around(torch.ones(1, 2))
    model(torch.ones(1, 2))
    with around.no_sync():
        assert not internals.pause(around), ON
    assert internals.pause(around), ON
    around(torch.ones(1, 2)).sum().backward()
    assert not around.require_forward_param_sync, ON  # so it was as in no_sync, which averages nothing
    internals.resume(around, True)
    around(torch.ones(1, 2))
    assert around.require_forward_param_sync, ON
    assert seen[:3] == [(True, False, False), (True, False, True), (None, None, False)], ON


def test_what_fully_shard_keeps_of_a_weight(group):
    mesh: Any = init_device_mesh("cpu", (1,))
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    plain = model[1].weight
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert internals.fsdp_modules(model) == [model, model[0]], ON
    assert internals.fsdp_modules(model[1]) == [], ON
    assert (internals.class_before(model), internals.class_before(model[1])) == (nn.Sequential, nn.Linear), ON
    weight, bias = internals.fsdp_weights(model[0])
    part: Any = weight.parameter
    whole: Any = None
    assert part is model[0].weight, ON
    assert bias.parameter is model[0].bias, ON
    assert (internals.is_sharded(part), internals.is_sharded(plain)) == (True, False), ON
    assert (weight.used, weight.is_whole, weight.offloaded) == (None, False, False), ON
    for _ in range(2):
        model[0].unshard()
        whole = weight.used if whole is None else whole
        assert whole is weight.used is model[0].weight, ON
        assert weight.is_whole, ON
        model[0].reshard()
        assert model[0].weight is weight.parameter is part, ON
        assert not weight.is_whole, ON
        assert whole.untyped_storage().size() == 0, ON
    with torch.no_grad():
        internals.part_of(part).fill_(2.0)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    model(torch.ones(1, 2)).sum().backward()
    assert seen[0].tolist() == [[2.0, 2.0]] * 3, ON
    assert weight.used is whole, ON
    assert internals.fsdp_syncs(model[0]), ON
    model.set_requires_gradient_sync(False)
    assert not internals.fsdp_syncs(model[0]), ON
    offloads: Any = fully_shard(nn.Linear(2, 2), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert all(held.offloaded for held in internals.fsdp_weights(offloads)), ON
