"""The trackers of transformers that a run can report to. Name and package are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from selectune.errors import ConfigError, did_you_mean

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit", "tensorboard": "tensorboardX"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that transformers does not know, or whose package is not installed."""
    from transformers.integrations import integration_utils as known

    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            trackers = sorted(known.INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"Unknown tracker '{name}' in report_to. Known: {', '.join(trackers)}.{did_you_mean(name, trackers)}"
            )
        there = name in known.get_available_reporting_integrations()
        if name == "azure_ml":  # not listed beside mlflow, but usable
            there = known.is_azureml_available()
        elif name == "flyte":  # never listed, but usable
            there = known.is_flytekit_available()
        if not there:
            package = _PACKAGES.get(name, name)
            raise ConfigError(f"The tracker '{name}' needs a package that is not installed: pip install {package}.")
