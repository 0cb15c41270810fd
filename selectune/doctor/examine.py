"""Examines an installation: what is there, which kernels run, and a proof in seconds that training works.

Nothing that may be broken is imported here: the checks run in another process. If one crashes that process, it is
named, and a fresh process goes on with the rest.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from typing import Any

import selectune
from selectune.doctor import checks

WIDTH, LINES = 80, 24
PATIENCE = 600.0  # seconds after which a part without an answer has failed
_LABEL = 11


def examine(model: str | None = None, patience: float = PATIENCE) -> dict[str, Any]:
    """Everything that `selectune doctor` says, as plain JSON values; "problems" names each failed check and why."""
    found, problems, said = ask(list(checks.parts(model)), model, patience)
    looked = found.get(f"model {model}") or {}
    if looked and not looked["attach"]["works"]:
        problems.append({"part": f"model {model}", "problem": f"attach does not work: {looked['attach']['summary']}"})
    check, gpu = found.get("self-check"), found.get("self-check on the GPU")
    return {
        "ok": not problems,
        "problems": problems,
        "selectune": selectune.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found.get(f"package {name}") for name in (*checks.NEEDED, *checks.OPTIONAL)},
        "devices": found.get("devices") or [],
        "backend": found.get("backend"),
        "threads": {**(found.get("threads") or {}), **{name: os.environ.get(name) for name in checks.THREADS}},
        "caches": {name: os.environ.get(name) for name in (*checks.CACHES, "TMPDIR")},
        "self_check": {"ok": check is not None, "changed": None, "seconds": None, **(check or {})},
        "self_check_gpu": gpu,
        "model": None if model is None else {"path": model, **looked},
        "printed": said,
    }


def ask(
    names: list[str], model: str | None, patience: float = PATIENCE
) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """The values and problems of checks, and what was printed meanwhile. A process that dies costs one check."""
    values: dict[str, Any] = {}
    problems: list[dict[str, str]] = []
    printed = ""
    while names:
        lines, end, errors = _process(names, model, patience)
        printed += errors
        open_part: str | None = None
        for line in lines:
            part = open_part = line["part"]
            if "problem" in line:
                values[part], open_part = line["value"], None
                names = [name for name in names if name != part]
                if line["problem"]:
                    problems.append({"part": part, "problem": line["problem"]})
        if names:  # the process is gone, in the middle of a part or before it had begun with any
            part = open_part or names[0]
            problems.append({"part": part, "problem": end})
            names = [name for name in names if name != part] if open_part else []
    return values, problems, printed


def _process(names: list[str], model: str | None, patience: float) -> tuple[list[dict[str, Any]], str, str]:
    """The lines that a process wrote, how it ended, and what it printed on stderr."""
    command = [sys.executable, "-m", "selectune.doctor.checks", json.dumps({"parts": names, "model": model})]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        run = subprocess.run(command, capture_output=True, env=env, timeout=patience, check=False)
        out, errors, end = run.stdout, run.stderr, _end(run.returncode, run.stderr)
    except subprocess.TimeoutExpired as late:
        out, errors, end = late.stdout or b"", late.stderr or b"", f"no answer in {patience:g} s; it was stopped."
    except OSError as error:
        return [], f"no process could be started: {error}", ""
    lines = [value for line in out.decode("utf-8", "replace").splitlines() if (value := _read(line)) is not None]
    return lines, end, errors.decode("utf-8", "replace")


def _read(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # half a line, of a process that was stopped
        return None
    return value if isinstance(value, dict) and "part" in value else None


def _end(code: int, errors: bytes) -> str:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"it crashed: the process died of {names.get(-code, f'signal {-code}')}."
    last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
    return f"it ended the process with exit code {code}{': ' + last[0].strip() if last else ''}."


def page(value: dict[str, Any]) -> str:
    """What `examine` found, on one screen: the verdict, a line for each problem, then the installation."""
    problems = value["problems"]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"selectune {value['selectune']} " + (f"has {count} here." if problems else "works here.")]
    rest = [*_told(value), "--verbose shows all of it, --json as JSON."]
    room = LINES - len(rest) - len(lines)
    shown = problems if len(problems) <= room else problems[: max(room - 1, 1)]
    lines += [_cut(f"{'problem':<{_LABEL}}{row['part']}: {row['problem']}") for row in shown]
    if len(shown) < len(problems):
        lines.append(f"{'':<{_LABEL}}and {len(problems) - len(shown)} more")
    return "\n".join([*lines, *rest][:LINES])


def _told(value: dict[str, Any]) -> list[str]:
    known = {name: version for name, version in value["packages"].items() if version not in (None, checks.ABSENT)}
    lines = [_row("python", f"{value['python']}, {value['system']}")]
    lines += _wrapped("packages", [f"{name} {version}" for name, version in known.items()], 4)
    for device in value["devices"][:2]:
        memory = device.get("memory_mib", device.get("free_mib"))
        what = device.get("name") or f"{device.get('cores')} cores"
        size = "memory unknown" if memory is None else f"{memory:,} MiB"
        lines.append(_row("device", f"{device['device']}: {what}, {size}"))
    if value["backend"]:
        lines.append(_row("kernels", value["backend"]["use"]))
    threads = value["threads"]
    if threads.get("torch"):
        lines.append(_row("threads", f"{threads['torch']} of {threads['cores']} cores"))
    variables = {**value["caches"], **{name: threads.get(name) for name in checks.THREADS}}
    lines += _wrapped("variables", [f"{name}={setting}" for name, setting in variables.items() if setting], 4)
    for name, check in (("self-check", value["self_check"]), ("on the GPU", value["self_check_gpu"])):
        if check and check.get("changed"):
            text = f"trained, saved, took off, put on, took off: {check['changed']} scalars, {check['seconds']} s"
            lines.append(_row(name, text))
    model = value["model"]
    return lines + ([_cut(line) for line in told(model)] if model else [])


def told(model: dict[str, Any]) -> list[str]:
    """Lines about a model."""
    lines = [f"{'model':<{_LABEL}}{model['path']}" + (f": {model['class']}" if "class" in model else "")]
    for label in ("in scope", "tied", "left out", "attach"):
        if model.get(label.replace(" ", "_")):
            lines.append(f"{label:<{_LABEL}}{model[label.replace(' ', '_')]['summary']}")
    return lines


def _row(label: str, text: str) -> str:
    return _cut(f"{label:<{_LABEL}}{text}")


def _cut(line: str) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _wrapped(label: str, items: list[str], most: int) -> list[str]:
    """Items with commas between them on as few lines as possible, at most `most`."""
    lines, row = [], ""
    for place, item in enumerate(items):
        text = item + ("," if place + 1 < len(items) else "")
        if row and _LABEL + len(row) + 1 + len(text) > WIDTH:
            lines.append(row)
            row = ""
        row = f"{row} {text}".strip()
    lines = [*lines, row] if row else lines
    return [_row(label if place == 0 else "", line) for place, line in enumerate(lines[:most])]


def described(value: dict[str, Any], indent: str = "") -> list[str]:
    """Nested plain values as lines of text."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}", *described(item, indent + "  ")]
        elif isinstance(item, list) and item and all(isinstance(i, dict) for i in item):
            lines.append(f"{indent}{key}")
            lines += [indent + "  " + ", ".join(f"{k} {v}" for k, v in i.items() if v is not None) for i in item]
        else:
            shown = "not set" if item is None else "yes" if item is True else "no" if item is False else item
            lines.append(f"{indent}{key:<22} {shown}")
    return lines
