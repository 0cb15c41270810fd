"""Importing this module teaches peft our method: `SelectuneConfig`, for `get_peft_model`, `PeftModel` and TRL.

    import selectune.interop.peft as bridge

    config = bridge.SelectuneConfig(method="id3:exp=1", budget=0.001, steps=1000)
    model = peft.get_peft_model(base, config)            # or peft_config=config of a trainer of TRL
    model.save_pretrained("run")
    model = peft.PeftModel.from_pretrained(base, "run")  # in another process, after the same import

peft takes no method from outside (its list of types is closed), so the tables that it looks methods up in are written
to here. The folder holds our delta file, with all its checks. A run under a Trainer is resumed if its checkpoints have
the tuner's state: `SelectuneCallback(selectune.tuner_of(trainer.model)).add_to(trainer)`. `TESTED` is the version that
this was tested with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from peft import PeftConfig, __version__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from selectune.bits import same_bits
from selectune.delta import Delta, Patch, inventory
from selectune.delta.file.content import refuse_beside
from selectune.errors import ConfigError, DeltaFormatError
from selectune.interop.to_peft import PREFIX
from selectune.recipes.named import named
from selectune.scope import Scope
from selectune.train import Tuner, attach, strip, tuner_of
from selectune.train.aside import Aside

log = logging.getLogger("selectune")

TESTED = "0.21.2"
TYPE = "SELECTUNE"
KEY = f"{PREFIX}selectune_delta"


@dataclass
class SelectuneConfig(PeftConfig):
    """A method for `peft.get_peft_model`.

    `method`: a recipe with options, `id3:exp=1`; `budget`, `steps`, `seed`: as for `attach`. `target_modules`: patterns
    of parameters to select from, all by default. `modules_to_save`: names of modules that are trained whole.
    """

    method: str = "id3"
    budget: float | int | None = None
    steps: int | None = None
    seed: int = 0
    accumulation_steps: int = 1
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = field(default=None, metadata={"help": "For TRL, which asks for it; must be None."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        if self.trainable_token_indices is not None:
            raise ConfigError("SelectuneConfig selects rows of an embedding by target_modules, not by token indices.")

    def scope(self) -> Scope:
        """The scope that the config names."""
        whole = [f"*{name}.*" for name in self.modules_to_save or ()]  # as peft reads names: by their end
        return Scope(include=self.target_modules or ("*",), train_fully=whole)


class SelectuneLayer(nn.Module, BaseTunerLayer):
    """What peft finds of an adapter within the model: no tensor, and the switch between base and tuned weights."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, owner: SelectuneModel, name: str) -> None:
        super().__init__()
        self.owner = [owner]  # in a list, so that it is no submodule
        self._active_adapter, self._disable_adapters, self.merged_adapters = name, False, []
        self.keep_out: Callable[[Delta], None] | None = None  # takes a checkpoint's delta while a Trainer resumes

    def enable_adapters(self, enabled: bool) -> None:
        """Bits of the base or of the tuned model: O(B)."""
        if enabled == self._disable_adapters:
            for owner in self.owner:
                owner.switch(enabled)
            self._disable_adapters = not enabled

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owner": [], "keep_out": None}  # a copy of the model alone is an ordinary model


class SelectuneModel(BaseTuner):
    """peft's side of a tuner, or of a delta that was loaded."""

    prefix = "selectune_"
    tuner_layer_cls = SelectuneLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attaches a tuner for training; a model that is loaded gets its delta later."""
        if len(self.peft_config) > 1:
            raise ConfigError("A model takes one selectune adapter; several deltas on one model are a selectune.Shelf.")
        config: Any = self.peft_config[adapter_name]
        self.tuner: Tuner | None = None
        self.delta: Delta | None = None
        self.aside: Aside | None = None  # the trained values, while the adapter of a run is disabled
        if config.inference_mode:
            model.requires_grad_(False)
        else:
            made = named(config.method).make(config.budget, config.steps, scope=config.scope())
            self.tuner = attach(model, made, seed=config.seed, accumulation_steps=config.accumulation_steps)
        model.add_module("selectune_adapter", SelectuneLayer(self, adapter_name))

    def hold(self, delta: Delta) -> None:
        """Applies a loaded delta; refuses another base. A Trainer that resumes brings it with the tuner's state."""
        if self.tuner is not None:
            if (keep_out := self.model.selectune_adapter.keep_out) is not None:
                return keep_out(delta)
            raise ConfigError(
                "What peft loads is a delta and no state of a run, so it cannot be trained on. To resume under a "
                "Trainer, call SelectuneCallback(selectune.tuner_of(trainer.model)).add_to(trainer) before it trains, "
                "also in the run that is to be resumed; in a loop of your own, continue by tuner.load_state_dict. To "
                "use the delta, load the folder for inference (is_trainable=False)."
            )
        delta.apply(self.model)
        self.delta = delta

    def present(self) -> Delta:
        """The delta of the run so far, or the one that was loaded; also while the adapter is disabled."""
        if self.tuner is not None:
            with self.switched(True):
                return self.tuner.delta(allow_empty=True)
        if self.delta is None:
            raise ConfigError("This model has no delta yet.")
        return self.delta

    def switch(self, enabled: bool) -> None:
        """Puts the tuned weights on the model, or the base's."""
        if self.tuner is None:
            if self.delta is not None:
                (self.delta.apply if enabled else self.delta.revert)(self.model)
        elif not enabled:
            self.aside = self.tuner.engine.aside()
        elif self.aside is not None:
            (self.aside.back if tuner_of(self.model) is self.tuner else self.aside.leave)()
            self.aside = None

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Within it the adapter is enabled or disabled; afterwards as before."""
        layer = self.model.selectune_adapter
        before = not layer.disable_adapters
        layer.enable_adapters(enabled)
        try:
            yield
        finally:
            layer.enable_adapters(before)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no tuner: it is like a model that was loaded with the present delta."""
        delta = self.present() if self.tuner is not None else self.delta
        return self.__dict__ | {
            "tuner": None,
            "aside": None,
            "delta": None if delta is None else self._reversible(delta),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        layer = self.model.selectune_adapter
        layer.owner = [self]
        strip(self.model).requires_grad_(False)
        if (delta := self.delta) is None:
            return
        self.delta = _light(delta)
        if not layer.disable_adapters:
            if any(part.old is not None and not same_bits(part.old, part.new) for part in delta.parts):
                delta.revert(self.model)
            self.delta.apply(self.model)

    def _reversible(self, delta: Delta) -> Delta:
        """The delta with the base's values, by which a copy finds its base."""
        with self.switched(False):
            found = inventory(self.model).find
            olds = {
                part.name: found[part.name].tensor.detach().cpu().contiguous().reshape(-1)
                for part in delta.parts
                if not (isinstance(part, Patch) and part.beside)
            }
            patches = [
                p if p.beside else replace(p, base_values=olds[p.name] if p.zeroed else olds[p.name][p.indices])
                for p in delta.patches
            ]
            dense = [replace(d, base_tensor=olds[d.name].reshape(d.shape).clone()) for d in delta.dense]
            return Delta(patches, dense, delta.info)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The plain model with the tuned weights as its own."""
        self.model.selectune_adapter.enable_adapters(True)
        delta = self.present()
        refuse_beside(delta, "merged into its base")
        if self.tuner is not None:
            self.tuner.detach()
        delta.merge(self.model)
        return self._left()

    def unload(self) -> nn.Module:
        """The plain model with the base's weights."""
        self.model.selectune_adapter.enable_adapters(True)
        if self.tuner is not None:
            self.tuner.detach()
        elif self.delta is not None:
            self.delta.revert(self.model)
        return self._left()

    def _left(self) -> nn.Module:
        self.tuner = self.delta = None
        del self.model.selectune_adapter, self.model.peft_config
        return self.model

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """No module is replaced."""

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        data = bytearray(model.base_model.present().to_bytes())
        return {KEY: torch.frombuffer(data, dtype=torch.uint8)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        data = state_dict.get(KEY)
        if data is None or data.dtype != torch.uint8 or len(state_dict) != 1:
            raise DeltaFormatError(f"the adapter's file must hold the tensor {KEY} of bytes and nothing else")
        model.base_model.hold(Delta.from_bytes(bytearray(data.cpu().numpy().tobytes())))
        return {}


def _light(delta: Delta) -> Delta:
    """The delta without the base's values."""
    patches = [replace(patch, base_values=None) for patch in delta.patches]
    return Delta(patches, [replace(dense, base_tensor=None) for dense in delta.dense], delta.info)


def _register() -> None:
    name: Any = TYPE  # the tables' keys are members of peft's closed list, and strings
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = SelectuneConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = SelectuneModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = SelectuneModel.prefix
    if __version__ != TESTED:
        log.warning("This bridge was tested with peft %s, and peft %s is installed.", TESTED, __version__)


_register()
