"""Several processes (ranks) that train one model, each on its share of the batch, and select the same entries.

What is scored is the mean over the ranks of their gradients, as DistributedDataParallel averages them: one tensor at a
time, in the backward pass that selects. Only entries that may be selected travel where that is possible
(`choose.shares`). Every rank then chooses alone, from equal numbers, by one total order. The gradient of a new entry is
the mean already, so that averaging it once more changes nothing. Digests of what the ranks must agree on are compared
at attach, at each selection, and now and then. A step that selects nothing sends the B offsets' gradient only.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selectune import ops
from selectune.bits import wide
from selectune.delta import file_of
from selectune.errors import DeltaError, TunerError
from selectune.internals import after_backward, averages, backward_id, fsdp_modules, is_sharded, joining, pause, resume
from selectune.seeds import mixed, signed
from selectune.train.support.ledger import Ledger
from selectune.train.support.shards import Shards, refuse_zero

EVERY = 100
"""Steps between two comparisons of the offsets where nothing is selected."""

_DONE = -1


def join() -> None:
    """Joins the processes that torchrun or accelerate launch started, if that has not happened yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def size() -> int:
    """How many processes train together: those of torch.distributed, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return size() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Waits until every process is here."""
    if size() > 1:
        dist.barrier()


def written_by_first(write: Callable[[str | Path], Path], path: str | Path) -> Path:
    """Writes a file in the first process, while the others wait; the file's path. Fails in all of them or in none."""
    error: Exception | None = None
    if first():
        try:
            write(path)
        except DeltaError as why:
            error = why
    if any_rank(error is not None):
        raise error or DeltaError(f"The first process could not write {path}; its error says why.")
    return file_of(path)


def any_rank(flag: bool) -> bool:
    """Whether the flag is up in any of the processes, which all ask at the same time."""
    if size() == 1:
        return flag
    found = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


Told = Mapping[str, int]


class World:
    """The processes of one run; one alone unless torch.distributed has a group of several.

    `told` gives the digests of what the ranks must have in common as they meet.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, told: Callable[[], Told], shards: Shards) -> None:
        self._model, self._ledger, self._told, self._shards = weakref.ref(model), ledger, told, shards
        self._group: Any = None
        self._held: dict[int, Tensor] = {}  # dense gradients that the ranks did not offer at the same time
        self._looked = False  # at whether the model is sharded
        self._covered = False  # the gradients are averaged, by DistributedDataParallel or here
        self._late = False  # a DistributedDataParallel was there before the tuner
        self._syncs = self._resumed = True  # whether its user lets it average after this pass
        self._whole: list[nn.Parameter] = []  # trained in full, and averaged here
        self._waits: int | None = None  # the backward pass at whose end they are

    @property
    def averages(self) -> bool:
        """Whether gradients are averaged here, and not by a DistributedDataParallel that was made after attach."""
        return self._late or bool(self._shards)

    @property
    def many(self) -> bool:
        return self._group is not None and dist.is_initialized()

    # -- meeting

    def meet(self) -> None:
        """Joins the other processes if there are any and it has not happened yet. All of them come here together.

        Raises TunerError if the model, the method or the seed differs between them, or the run is one that a single
        process must train.
        """
        if self.many or size() == 1:
            return
        self._group = dist.new_group()  # of our own, so that nothing of ours meets another's collective
        try:
            self.compare("attached to", self._told())
        except TunerError:
            self._group = None
            raise

    def inside(self) -> None:
        """Looks at what the model runs in. Raises TunerError for a wrapper that would leave the ranks apart."""
        refuse_zero([self._ledger.offsets])
        if not self.many:
            return
        averaged = averages(self._ledger.offsets)
        if averaged is False and not self._late:
            raise TunerError(
                "DistributedDataParallel was put around the model before the tuner was attached, so it does not know "
                "the tuner's offsets and would not average their gradient. Attach first, and wrap the model then; or "
                "give attach the DistributedDataParallel itself."
            )
        if joining():
            raise TunerError(
                "The model runs inside DistributedDataParallel.join(), where a process may run out of batches. The "
                "others could not select then, because a selection is by the gradients of all. Give every process as "
                "many batches, as torch's DistributedSampler, the Trainer and accelerate do, and leave join() out."
            )
        if not self.averages:
            self._covered = averaged is True
        model = self._model()
        if self._looked or model is None:
            return
        self._looked = True
        refuse_zero(model.parameters())
        split = any(is_sharded(p) or hasattr(p, "ds_id") for p in model.parameters())  # the latter by DeepSpeed
        if not self._shards and (split or fsdp_modules(model)):
            raise TunerError(
                "The model was sharded between the processes after the tuner was attached, so the tuner holds weights "
                "that no longer take part. Call fully_shard first, and attach then."
            )

    def take_over(self, around: Any) -> list[Any]:
        """Lets a DistributedDataParallel that was there before the tuner, and waits for other gradients, average none.

        `average` does that instead, where and when the DistributedDataParallel would. Returns the hooks. Raises
        TunerError for one that waits in every pass.
        """
        if around.static_graph:
            raise TunerError(
                "The DistributedDataParallel was made with static_graph=True before the tuner was attached, so it "
                "waits for the gradients of weights that are frozen now. Attach first, and wrap the model then."
            )
        self._late = True
        return [
            around.register_forward_pre_hook(self._before_ddp),
            around.register_forward_hook(self._after_ddp, always_call=True),
        ]

    def _before_ddp(self, around: Any, args: Any) -> None:
        syncs = pause(around)
        self._resumed = syncs
        if torch.is_grad_enabled():
            self._syncs = syncs

    def _after_ddp(self, around: Any, args: Any, output: Any) -> None:
        resume(around, self._resumed)

    # -- gradients

    def average(self, parameter: Tensor) -> None:
        """A backward pass has added to the gradient of a parameter that nothing else averages: makes it the mean.

        `set_requires_gradient_sync(False)` puts that off, as DistributedDataParallel's `no_sync` does.
        """
        if not self.many or not self.averages or parameter.grad is None:
            return
        self._covered = self._shards.averages if self._shards else self._syncs
        if self._covered:
            parameter.grad.div_(dist.get_world_size(self._group))
            dist.all_reduce(parameter.grad, group=self._group)

    def average_whole(self, parameters: Sequence[nn.Parameter]) -> list[Any]:
        """From now on makes the gradients of these, which are trained in full, means too. Returns the hooks."""
        self._whole = list(parameters)
        return [one.register_post_accumulate_grad_hook(self.average_later) for one in self._whole]

    def average_later(self, parameter: Tensor) -> None:
        """A pass gives gradients: those of whole tensors are averaged as it ends, since ranks may use other ones."""
        del parameter
        if self.many and self.averages and self._whole and self._waits != backward_id():
            self._waits = backward_id()
            after_backward(self._average_whole)

    def _average_whole(self) -> None:
        self._waits = None
        if not (self._shards.averages if self._shards else self._syncs):
            return
        used = self.gather([parameter.grad is not None for parameter in self._whole]).any(0).tolist()
        for parameter in (one for one, there in zip(self._whole, used, strict=True) if there):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.average(parameter)

    @property
    def ranks(self) -> int:
        """How many processes train together."""
        return dist.get_world_size(self._group) if self.many else 1

    def mean(self, gradient: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, in float32 or float64; the tensor itself if there is one process."""
        if not self.many:
            return gradient
        total = gradient.to(wide(gradient.dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total.div_(dist.get_world_size(self._group))

    def part(self, share: Tensor) -> tuple[int, Tensor]:
        """One part of the mean over the ranks of a flat tensor, another part on each rank: its first entry, and it."""
        size = -(-share.numel() // self.ranks)
        first, total = min(dist.get_rank(self._group) * size, share.numel()), share.to(wide(share.dtype))
        if short := size * self.ranks - share.numel():
            total = nn.functional.pad(total, (0, short))
        mine = total.new_empty(size)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        reduce_scatter(mine, total, group=self._group)
        return first, mine[: share.numel() - first].div_(self.ranks)

    def scatters(self, share: Tensor) -> bool:
        """Whether `part` works where this tensor is: gloo reduces and scatters on the CPU only."""
        return share.device.type == "cpu" or dist.get_backend(self._group) != "gloo"

    def joined(self, mine: Tensor, counts: Sequence[int]) -> Tensor:
        """The columns of all ranks, rank by rank: each gives (k, its count)."""
        padded = nn.functional.pad(mine, (0, max(counts) - mine.shape[1]))
        if not self.scatters(mine):
            padded = padded.cpu()  # nor does gloo gather elsewhere
        found = padded.new_empty((self.ranks, *padded.shape))
        dist.all_gather(list(found.unbind()), padded.contiguous(), group=self._group)
        columns = [columns[:, :count] for columns, count in zip(found, counts, strict=True)]
        return torch.cat(columns, 1).to(mine.device)

    def offered(self, index: int, share: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Takes this rank's share of a tensor's gradient; gives it back if all ranks are at the same tensor.

        Where the ranks' graphs differ, `rest` gives it at the end of the pass.
        """
        if not self.many or len(set(self.gather([index])[:, 0].tolist())) == 1:
            yield index, share
        else:
            self._held[index] = share.clone()  # the next gradient may be formed in the same memory

    def forget(self) -> None:
        """A backward pass broke off: the gradients that wait are void."""
        self._held.clear()

    def rest(self) -> Iterator[tuple[int, Tensor]]:
        """The pass has ended on this rank: its shares of tensors that were not offered by all at one time."""
        if not self.many:
            return
        while bool((self.gather([_DONE]) != _DONE).any()):
            continue  # another rank still offers a tensor, and holds it
        tensors = self._ledger.tensors
        waits = self.gather([index in self._held for index in range(len(tensors))]).any(0).tolist()
        for index in (index for index, waiting in enumerate(waits) if waiting):
            mine = self._held.pop(index, None)
            form = tensors[index].parameter
            zeros = torch.zeros(form.shape, dtype=form.dtype, device=form.device)
            yield index, zeros if mine is None else mine

    def watched(self, pieces: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The means of the gradients of watched entries in one backward pass, by tensor."""
        if not self.many:
            return pieces
        pages = enumerate(self._ledger.pages)
        sizes = {index: page.watched.flat.numel() for index, page in pages if page.watched is not None}
        zeros = self._ledger.offsets.new_zeros
        return {i: self.mean(pieces[i].detach() if i in pieces else zeros(n)) for i, n in sizes.items()}

    # -- agreement

    def compare(self, what: str, told: Told) -> None:
        """Raises TunerError on every rank, which names what differs and on which ranks, if `told` is not the same."""
        if not self.many:
            return
        names = list(told)
        counts = self.gather([len(names), signed(_of_text("\n".join(names)))])
        if not bool((counts == counts[0]).all()):
            raise TunerError(f"The ranks are not {what} the same: {_apart(counts[:, 1])} have other tensors.")
        rows = self.gather([signed(value) for value in told.values()])
        wrong = (rows != rows[0]).any(0).nonzero()[:, 0].tolist()
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise TunerError(
                f"The ranks are not {what} the same {names[wrong[0]]}{more}: {_apart(rows[:, wrong[0]])} differ from "
                "the others. Every rank needs the same base, method, seed and calibration data, and its own share of "
                "the batches."
            )

    def compare_support(self) -> None:
        """Raises TunerError if the ranks' supports, slots or offsets differ."""
        if self.many:
            self.compare("training", {"support": support_digest(self._ledger), **self._offsets()})

    def before_step(self, step: int) -> None:
        """The optimizer is about to step: the gradients have been averaged, or this raises TunerError."""
        if not self.many:
            return
        if not self._covered:
            gradient = self._ledger.offsets.grad
            try:
                self.compare("stepping with", {"gradient": 0 if gradient is None else ops.checksum(gradient)})
            except TunerError as error:
                instead = "run the model inside DistributedDataParallel, or all_reduce the gradients of "
                instead += "tuner.parameters() before optimizer.step()"
                if self._shards:
                    instead = "call set_requires_gradient_sync(True) before the last backward pass of a step"
                raise TunerError(f"{error} Nothing averages the gradients: {instead}.") from error
        if step % EVERY == 0:
            self.compare("training", self._offsets())

    def _offsets(self) -> Told:
        return {"offsets": ops.checksum(self._ledger.offsets.detach())}

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """The numbers of every rank, int64 (ranks, k), on the CPU."""
        home = self._ledger.offsets.device if dist.get_backend(self._group) == "nccl" else torch.device("cpu")
        mine = torch.tensor(numbers, dtype=torch.int64, device=home)
        found = mine.new_empty((dist.get_world_size(self._group), *mine.shape))
        dist.all_gather(list(found.unbind()), mine, group=self._group)
        return found.cpu()


def support_digest(ledger: Ledger) -> int:
    """64 bits of which entry is trained in which slot."""
    found = 0
    for index, page in enumerate(ledger.pages):
        if page.flat.numel():
            found = mixed(found, index, ops.checksum(page.slot.to(page.flat.device), page.flat))
    return found


def _of_text(text: str) -> int:
    return mixed(*text.encode())


def _apart(column: Tensor) -> str:
    """The ranks whose number is not that of most, in words."""
    most = Counter(column.tolist()).most_common(1)[0][0]
    ranks = (column != most).nonzero()[:, 0].tolist()
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
