"""What the loaders of other libraries share: weights meet a tuner whose own state gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selectune.delta import digest_bits
from selectune.errors import IntegrityError
from selectune.train import Tuner


class KeptOut:
    """Weights that are to be loaded into a tuner's model stay out of it; `agree` asks whether they may be forgotten.

    To whoever loads them it looks as if they had been: every tensor of the model gets its own present value. `then` is
    called after each load.
    """

    def __init__(self, tuner: Tuner, then: Callable[[], None] | None = None) -> None:
        self._model, self._then = tuner.model, then
        self._digests: dict[str, str] = {}
        self._handle = self._model.register_load_state_dict_pre_hook(self._keep_out)

    def __len__(self) -> int:
        return len(self._digests)

    def release(self) -> None:
        """Weights get in again."""
        self._handle.remove()

    def agree(self, where: str | Path) -> None:
        """Raises IntegrityError, naming tensors, if what was kept out is not what the model holds now."""
        now = dict(_tensors(self._model))
        wrong = [name for name, digest in self._digests.items() if digest_bits(now[name].cpu()) != digest]
        if wrong:
            raise IntegrityError(
                f"{len(wrong)} of the {len(self._digests)} tensors in {where} are not the base's with the tuner's "
                f"state on it: {', '.join(wrong[:5])}. Its weights were changed, or the state is of another checkpoint."
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
