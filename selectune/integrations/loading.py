"""Parts that the integrations share: weights are kept out of a model whose tuner's state gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selectune.delta import digest_bits
from selectune.errors import ConfigError, IntegrityError, TunerError, some
from selectune.train import Tuner
from selectune.train.graph.own_hooks import Own


def refuse_other_windows(who: str, setting: str, passes: int, tuner: Tuner) -> None:
    """Raises ConfigError if a library's gradient accumulation does not fit the tuner's."""
    if tuner.accumulation_steps % passes:
        raise ConfigError(
            f"{who} makes a step of {setting}={passes} backward passes, the tuner was attached with "
            f"accumulation_steps={tuner.accumulation_steps}. The selection is exact over one step's passes, so both "
            f"must be the same: attach(..., accumulation_steps={passes})."
        )


def refuse_deepspeed(who: str, there: bool) -> None:
    """Raises ConfigError if a library would train by DeepSpeed, which splits and saves in ways of its own."""
    if there:
        raise ConfigError(
            f"{who} runs DeepSpeed, which is not supported: its ZeRO takes parameters out of a tuner's sight, and its "
            "checkpoints load weights before a tuner's state. Start the same script without DeepSpeed: under torchrun "
            "or accelerate launch it runs in DistributedDataParallel, where gradients and optimizer state have one "
            "number for each selected entry. If the weights do not fit on one device, use FSDP2 (docs/scale.md)."
        )


class KeptOut:
    """Keeps weights that a loader brings out of a tuner's model; `agree` checks that the model has the same bits.

    For the loader it looks as if they were loaded: every tensor of the model gets its own present value. `then` is
    called after each load.
    """

    def __init__(self, tuner: Tuner, then: Callable[[], None] | None = None) -> None:
        self._tuner, self._model, self._then = tuner, tuner.model, then
        self._digests: dict[str, str] = {}
        self._before: dict[str, Any] | None = None
        self._handle = self._model.register_load_state_dict_pre_hook(Own(self._keep_out))

    def __len__(self) -> int:
        return len(self._digests)

    def release(self) -> None:
        """Lets weights in again."""
        self._handle.remove()

    def load(self, state: dict[str, Any]) -> None:
        """Loads the tuner's state, and keeps the one before it for `agree`."""
        try:
            self._before = self._tuner.state_dict()
        except TunerError:  # within a window, whose gradient the loaded state drops
            self._before = None
        self._tuner.load_state_dict(state)

    def agree(self, where: str | Path) -> None:
        """Raises IntegrityError, naming tensors, if the weights that were kept out are not those of the model now.

        The tuner then has the state that it had before `load`.
        """
        now = dict(_tensors(self._model))
        wrong = [name for name, digest in self._digests.items() if digest_bits(now[name].cpu()) != digest]
        if wrong:
            if self._before is not None:
                self._tuner.load_state_dict(self._before)
            raise IntegrityError(
                f"{len(wrong)} of the {len(self._digests)} tensors in {where} are not the base's with the tuner's "
                f"state on it: {some(wrong)}. Its weights were changed, or the state is of another checkpoint."
            )

    def _keep_out(self, module: nn.Module, weights: dict[str, Any], prefix: str, *rest: Any) -> None:
        del module, rest
        for name, tensor in _tensors(self._model):
            found = weights.get(prefix + name)
            if isinstance(found, Tensor):
                self._digests[name] = digest_bits(found.detach().cpu())
                weights[prefix + name] = tensor
        if self._then is not None:
            self._then()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            yield name, tensor.detach()
