"""The commands that measure, predict and examine, put on the command line together."""

from __future__ import annotations

import typer

from selectune.cli import bench, doctor, plan


def register(app: typer.Typer) -> None:
    """`bench`, `plan` and `doctor`."""
    app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
    app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
    app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
