"""Calling the command line in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from selectune.cli.app import app

runner = CliRunner()


def call(*args: object, code: int = 0, env: dict[str, str] | None = None) -> Any:
    """What a command printed; fails unless it ended with this code."""
    found = runner.invoke(app, [str(arg) for arg in args], env=env or {})
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    return found
