"""`selectune train --report-to`: an events file with the counts, names that are wrong, packages that are missing."""

from __future__ import annotations

import pytest
from cli_kit import call

from selectune.errors import ConfigError
from selectune.runs.config import RunConfig
from selectune.runs.resume import settings_of

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def command(tiny, data):
    return ("train", "--model", tiny, "--task", "glue/rte", "--budget", 120, "--max-steps", 2, "--data", data)


def test_a_run_reports_to_tensorboard(command, tmp_path):
    event_file_loader = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")
    del event_file_loader
    call(*command, "--out", tmp_path / "told", "--report-to", "tensorboard")
    call(*command, "--out", tmp_path / "plain")
    (events,) = (tmp_path / "told").rglob("events.out.tfevents.*")
    assert b"train/selected" in events.read_bytes()
    assert b"train/loss" in events.read_bytes()
    assert not list((tmp_path / "plain").rglob("events.out.*"))
    name = "delta.safetensors"
    assert (tmp_path / "told" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", r"Unknown tracker 'tensorbord' in report_to. Known: .* Did you mean tensorboard\?"),
        ("nothing-like-it", r"Unknown tracker 'nothing-like-it' in report_to. Known: .*wandb"),
        ("neptune", r"The tracker 'neptune' needs a package that is not installed: pip install neptune\."),
        ("flyte", r"needs a package that is not installed: pip install flytekit\."),
    ],
)
def test_wrong_names_and_missing_packages(name, said, monkeypatch):
    with pytest.raises(ConfigError, match=said):
        RunConfig(model="demo", task="glue/rte", budget=10, report_to=(name,))


def test_on_the_command_line(command, tmp_path):
    found = call(*command, "--out", tmp_path / "out", "--report-to", "tensorbord", code=2)
    assert found.stderr.startswith("error: Unknown tracker")
    assert not (tmp_path / "out").exists()
    call(*command, "--out", tmp_path / "out", "--report-to", "none")


def test_a_resumed_run_may_report_elsewhere():
    plain = RunConfig(model="demo", task="glue/rte", budget=10)
    object.__setattr__(plain, "report_to", ("wandb",))
    assert "report_to" not in settings_of(plain)
