"""What goes wrong on a sharded model is an error on every rank, and what is not supported is refused in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_kit import METHODS, STEPS, Net, Run, batch, sharded, whole
from ranks_kit import in_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import selectune as st


def attach(model: Any, method: Any = None, **more: Any) -> st.Tuner:
    return st.attach(model, METHODS["id3"]() if method is None else method, **more)


def mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def flipped_support(rank: int) -> Any:
    run = Run(rank, "fsdp", "id3").take(0, 1)
    if rank == 1:
        run.tuner.engine.ledger.pages[1].flat[-1] ^= 1
    run.take(2)


def flipped_offset(rank: int) -> Any:
    run = Run(rank, "fsdp", "id3").take(0, 1)
    if rank == 1:
        with torch.no_grad():
            run.tuner.parameters()[0][3] += 1e-9
    run.take(2)


def flipped_part(rank: int) -> Any:
    """One bit of a frozen weight, in the part of rank 1."""
    run = Run(rank, "fsdp", "by magnitude").take(0)
    if rank == 1:
        chosen, part = run.tuner.support["into.weight"], run.model.into.weight.detach().to_local()
        free = next(at for at in range(part.numel()) if at + 7 * 8 not in chosen.tolist())
        part.view(-1).view(torch.int64)[free] ^= 1
    run.tuner.verify()


def sharded_after_attach(rank: int) -> Any:
    model: Any = Net()
    attach(model)
    sharded(model)
    model(batch(rank))


def never_synced(rank: int) -> Any:
    run = Run(rank, "fsdp", "id3")
    run.model.set_requires_gradient_sync(False)
    run.take(0, 1)


def fsdp_1(rank: int) -> Any:
    attach(FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True))


def zero_3(rank: int) -> Any:
    model: Any = Net()
    model.into.weight.ds_id = 0  # as DeepSpeed marks what it has split
    attach(model)


def zero_before(rank: int) -> Any:
    model: Any = Net()
    model.into.weight._hp_mapping = None  # as ZeRO-1 and ZeRO-2 mark what is flat; None where another rank steps on it
    attach(model)


def zero_after(rank: int) -> Any:
    model: Any = Net()
    offsets: Any = attach(model).parameters()[0]
    model(batch(rank))
    offsets._hp_mapping = None
    model(batch(rank))


def zero_of_a_head(rank: int) -> Any:
    model: Any = Net()
    attach(model, st.id3(60, STEPS, train_fully="one.*"))
    model.one.weight._hp_mapping = None
    model(batch(rank))


def tensor_parallel(rank: int) -> Any:
    model: Any = Net()
    model.into.weight = nn.Parameter(distribute_tensor(model.into.weight.detach(), mesh(), [Shard(0)]))
    attach(model)


def replicated(rank: int) -> Any:
    model: Any = Net()
    model.into.weight = nn.Parameter(distribute_tensor(model.into.weight.detach(), mesh(), [Replicate()]))
    attach(model)


def hybrid(rank: int) -> Any:
    attach(fully_shard(Net(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))))


def by_columns(rank: int) -> Any:
    attach(fully_shard(Net(), mesh=mesh(), shard_placement_fn=lambda p: Shard(1) if p.shape[1:] == (8,) else None))


def offloaded(rank: int) -> Any:
    attach(fully_shard(Net(), mesh=mesh(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def on_meta(rank: int) -> Any:
    with torch.device("meta"):
        model: Any = Net()
    attach(fully_shard(model, mesh=mesh()))


def sharded_head(rank: int) -> Any:
    attach(sharded(Net()), st.id3(60, STEPS, train_fully="one.*"))


def calibrated(rank: int) -> Any:
    attach(sharded(Net()), st.fish(40, examples=2), calibration=[], loss=lambda model, x: model(x).sum())


def dense_phase(rank: int) -> Any:
    attach(sharded(Net()), st.lt_sft(60, STEPS))


def zeroed(rank: int) -> Any:
    attach(sharded(Net()), st.sparse_adapter(0.5))


def attached_twice(rank: int) -> Any:
    model = sharded(Net())
    attach(model)
    attach(model)


def checked(rank: int) -> Any:
    attach(sharded(Net())).check(batch(0), lambda model, x: model(x).sum())


PLANTED: dict[Callable[[int], Any], str] = {  # what goes wrong, and the error that every rank raises
    flipped_support: "TunerError: .*not training the same support",
    flipped_offset: "TunerError: .*not training the same offsets",
    flipped_part: r"IntegrityError: 1 tensors changed outside the support since attach: into\.weight",
    sharded_after_attach: "TunerError: .*Call fully_shard first, and attach then",
    never_synced: r"TunerError: .*call set_requires_gradient_sync\(True\) before the last backward pass",
    fsdp_1: r"TunerError: .*FullyShardedDataParallel \(FSDP1\), which is not supported\. Use fully_shard",
    zero_3: 'TunerError: DeepSpeed ZeRO-3 splits the weight "into.weight", which is not supported. Use fully_shard',
    zero_before: "TunerError: DeepSpeed ZeRO-1 or ZeRO-2 has taken .* Use DistributedDataParallel, or",
    zero_after: "TunerError: DeepSpeed ZeRO-1 or ZeRO-2 has taken",
    zero_of_a_head: "TunerError: DeepSpeed ZeRO-1 or ZeRO-2 has taken",
    tensor_parallel: 'TunerError: The weight "into.weight" is split .* not supported',
    replicated: 'TunerError: The weight "into.weight" is split .* not supported',
    hybrid: r'TunerError: The weight ".*" is split .* over a mesh of \(1, 2\)',
    by_columns: 'TunerError: The weight ".*" is split .* not supported',
    offloaded: "TunerError: .*without offload_policy",
    on_meta: "ScopeError: .*to_empty",
    sharded_head: "ScopeError: 2 tensors that are trained whole are sharded: .*ignored_params",
    calibrated: "TunerError: .*reads calibration data for its score .*on sharded weights",
    dense_phase: "TunerError: .*trains every entry for a while, which a tuner does not do on sharded weights",
    zeroed: "TunerError: .*sharded weights",
    attached_twice: "AlreadyAttachedError: The model carries a tuner already",
    checked: r"TunerError: check\(\) compares gradients of whole weights",
}


def traffic(rank: int) -> dict[str, list[int]]:
    """The bytes that this rank gives to collectives in each step: ours, and FSDP2's own."""
    sent: dict[str, list[int]] = {"ours": [], "gathered": [], "reduced": []}

    def counted(key: str, name: str, which: int) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **more: Any) -> Any:
            given = [*args, *more.values()][which]
            sent[key][-1] += given.numel() * given.element_size()
            return real(*args, **more)

        return name, real, call

    run = Run(rank, "fsdp", "id3 every third step")
    names = [counted("ours", "all_reduce", 0), counted("ours", "all_gather", 1)]
    of_fsdp = "all_gather_single", "reduce_scatter_single"
    if not hasattr(dist, "all_gather_single"):  # before torch 2.13
        of_fsdp = "all_gather_into_tensor", "reduce_scatter_tensor"
    names += [counted(key, name, 1) for key, name in zip(("gathered", "reduced"), of_fsdp, strict=True)]
    for name, _, call in names:
        setattr(dist, name, call)
    try:
        for step in range(STEPS):
            for key in sent:
                sent[key].append(0)
            run.take(step)
    finally:
        for name, real, _ in names:
            setattr(dist, name, real)
    return {**sent, "scalars": [sum(p.numel() for p in Net().parameters())]}


def bf16(rank: int) -> dict[str, Any]:
    """A run whose passes are in bfloat16 and whose weights are kept in float32."""
    model = sharded(Net().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    tuner = attach(model, st.id3(60, STEPS))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for step in range(STEPS):
        model(batch(step).chunk(2)[rank]).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "support": {name: flat.tolist() for name, flat in tuner.support.items()},
        "changed": tuner.verify().changed,
        "file": tuner.delta().to_bytes(),
        "weights": whole(model),
    }


def taken_off(rank: int) -> list[bool]:
    """Whether the model is the base again, bit for bit and trainable, and can be trained again."""
    base = {name: p.detach().numpy() for name, p in Net().named_parameters()}
    run = Run(rank, "fsdp", "chosen again", "keeps whole weights").take(0, 1)
    with torch.no_grad():
        run.model(batch(0))  # the outermost weights stay whole
    run.tuner.detach()
    found = whole(run.model)
    same = [(found[name] == value).all() for name, value in base.items()]
    again = attach(run.model)
    return [*map(bool, same), all(p.requires_grad for p in Net().parameters()), again.selected == 0]


def everything(rank: int) -> list[Any]:
    found: list[Any] = []
    for work in (traffic, bf16, taken_off, *PLANTED):
        try:
            found.append(work(rank))
        except Exception as error:  # noqa: BLE001  (whatever it is, the test shows it)
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    found = in_ranks(2, everything, seconds=900)
    for answers in found:
        assert isinstance(answers, list), answers
    return found


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[work.__name__ for work in PLANTED])
def test_it_is_an_error_on_every_rank(ranks, number):
    for answers in ranks:
        assert re.match(list(PLANTED.values())[number], str(answers[3 + number])), answers[3 + number]


def test_a_step_without_a_selection_sends_the_offsets_beside_the_weights_that_fsdp_gathers(ranks):
    sent = ranks[0][0]
    scalars, budget = sent["scalars"][0], 60
    for step in range(STEPS):
        selects = step % 3 == 0
        most = 8 * budget + 4096 + selects * 8 * (scalars + budget)
        assert 8 * budget + selects * 8 * scalars <= sent["ours"][step] <= most
        assert 0 < sent["gathered"][step] <= 2 * 8 * scalars  # forward and backward; a rank gives its part
    assert sent["reduced"] == [0] * STEPS


def test_passes_in_lower_precision_train_the_weights_that_are_kept(ranks):
    first, second = ranks[0][1], ranks[1][1]
    assert isinstance(first, dict), first
    assert first["support"] == second["support"]
    assert first["file"] == second["file"]
    assert first["changed"] == 60
    plain = Net().float()
    st.Delta.from_bytes(first["file"]).apply(plain)
    for name, p in plain.named_parameters():
        assert torch.equal(p.detach(), torch.from_numpy(first["weights"][name]))


def test_a_tuner_comes_off_a_sharded_model(ranks):
    for answers in ranks:
        assert answers[2] == [True] * len(answers[2]), answers[2]
