"""Fixtures of the tiny model and its data. A test file asks for them with pytest_plugins = ("tiny_fixtures",)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_kit import make_data, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The benchmark data beside the checkout or where SELECTUNE_DATA says; skips without it."""
    for place in (os.environ.get("SELECTUNE_DATA"), Path(__file__).parent.parent.parent / "shared" / "data"):
        if place and (Path(place) / "glue").is_dir():
            return Path(place)
    pytest.skip("no benchmark data: SELECTUNE_DATA is not set and ../shared/data is not there")
