"""The tree of commands, and the handling of errors that all commands share."""

from __future__ import annotations

import errno
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import selectune
from selectune.cli.commands import arithmetic, bench, deltas, demo, doctor, export, lists, plan, predict, runs
from selectune.cli.commands.study import analyze, checking, comparisons, grids, report
from selectune.cli.exits import INTERRUPTED, TABLE, WRONG, code_of
from selectune.cli.mistakes import UsageError, explained, wants_json
from selectune.cli.output import fail, log_to_stderr, refuse
from selectune.cli.signals import StoppedBySignal, exit_code, swallowed
from selectune.errors import SelectuneError, StoppedError

AS_JSON = "selectune.as_json"


class Guarded(TyperGroup):
    """A group of commands whose errors are one line and an exit code, not a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        ctx.meta[AS_JSON] = wants_json(args)
        for arg in args:
            if "\0" in arg:  # no path, model or task has one
                raise _ended(ctx, f"The argument {arg!a} holds a NUL character, which no name or path can.", WRONG)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            raise _ended(ctx, explained(error), WRONG) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # a group was named without a command
                raise
            raise _ended(ctx, explained(error), WRONG) from None
        except (StoppedError, StoppedBySignal) as stopped:
            raise _ended(ctx, str(stopped), exit_code(stopped.signal), "Stopped") from None
        except (SelectuneError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader has gone, as `head` does
                raise
            if (stopped := swallowed()) is not None:
                raise _ended(ctx, str(stopped), exit_code(stopped.signal), "Stopped") from None
            fail(error, code_of(error), ctx.meta.get(AS_JSON, False))
            raise typer.Exit(code_of(error)) from None
        except KeyboardInterrupt:
            raise _ended(ctx, "by Ctrl-C", INTERRUPTED, "Stopped") from None


def _ended(ctx: Any, why: str, code: int, kind: str = "UsageError") -> typer.Exit:
    refuse(why, kind, code, ctx.meta.get(AS_JSON, False))
    return typer.Exit(code)


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Start with: selectune demo. {TABLE} "
    "SELECTUNE_TRACEBACK=1 shows where an error came from; SELECTUNE_DATA names a folder of task data.",
)


def _version(asked: bool) -> None:
    if not asked:
        return
    try:
        torch = metadata.version("torch")  # from its metadata, without an import
    except metadata.PackageNotFoundError:
        torch = "is not installed"
    typer.echo(f"selectune {selectune.__version__}, torch {torch}")
    raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also log progress to stderr.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the versions of selectune and torch."),
    ] = False,
) -> None:
    """Selective fine-tuning: train the few scalars of a model that are worth training, and ship them as a delta."""
    log_to_stderr(verbose)


app.command("train", epilog=runs.TRAIN_EXAMPLES)(runs.train)
app.command("eval", epilog=runs.EVAL_EXAMPLES)(runs.evaluate)
app.command("predict", epilog=predict.EXAMPLES)(predict.predict)
app.command("generate", epilog=predict.GENERATE_EXAMPLES)(predict.generate)
app.command("verify", epilog=deltas.VERIFY_EXAMPLES)(deltas.verify)
arithmetic.register(deltas.app)
deltas.app.command("import", epilog=export.IMPORT_EXAMPLES)(export.import_)
app.add_typer(deltas.app, name="delta")
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("push", epilog=export.PUSH_EXAMPLES)(export.push)
app.command("tasks")(lists.tasks)
app.command("methods")(lists.methods)
app.command("compare", epilog=comparisons.EXAMPLES)(comparisons.compare)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.add_typer(grids.app, name="study")
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("analyze", epilog=analyze.EXAMPLES)(analyze.analyze)
app.add_typer(checking.app, name="check")
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("report", epilog=report.EXAMPLES)(report.report)
