"""Trackers that a run can report to: transformers' own, checked by name and by package before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from selectune.errors import ConfigError

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit", "tensorboard": "tensorboardX"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that transformers does not know, or whose package is not installed."""
    from transformers.integrations import integration_utils as known

    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, known.INTEGRATION_TO_CALLBACK, 1)
            raise ConfigError(
                f"Unknown tracker '{name}' in report_to."
                + (f" Did you mean '{near[0]}'?" if near else "")
                + f" Known: {', '.join(sorted(known.INTEGRATION_TO_CALLBACK))}."
            )
        there = name in known.get_available_reporting_integrations()
        if name == "azure_ml":  # not offered beside mlflow, but usable
            there = known.is_azureml_available()
        elif name == "flyte":  # never offered, but usable
            there = known.is_flytekit_available()
        if not there:
            package = _PACKAGES.get(name, name)
            raise ConfigError(f"The tracker '{name}' needs a package that is not installed: pip install {package}.")
