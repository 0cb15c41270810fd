"""The documentation: its examples run, its links lead somewhere, its generated page is current, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import blocks

import selectune

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TUTORIALS = sorted((DOCS / "tutorial").glob("*.md"))
RUN = [DOCS / "index.md", *TUTORIALS, *sorted((DOCS / "how-to").glob("*.md"))]
NEEDS = {"trl.md": "trl", "trainer.md": "transformers", "adapters.md": "peft", "export.md": "peft"}

_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_NAMED = re.compile(r"^::: (\S+)", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tool(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_examples_run(path, tmp_path, monkeypatch):
    if path.name in NEEDS:
        pytest.importorskip(NEEDS[path.name])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__example__"}
    for line, code in blocks(path.read_text("utf-8")):
        # The blank lines make a traceback point at the line of the document.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


def test_every_tutorial_has_examples_that_run():
    assert [path.stem for path in TUTORIALS] == ["own-loop", "trainer", "trl"]
    assert all(list(blocks(path.read_text("utf-8"))) for path in TUTORIALS)


def anchors(path: Path) -> set[str]:
    """Ids of a page's headings, as the site makes them, and of the names that its reference shows."""
    text = path.read_text("utf-8")
    headings = _HEADING.findall(_FENCED.sub("", text))
    ids = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return ids | set(_NAMED.findall(text))


def broken(path: Path, text: str) -> list[str]:
    wrong = []
    for link in _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCED.sub("", text))):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", file):
            continue
        target = (path.parent / file).resolve() if file else path
        if not target.is_file():
            wrong.append(f"{name_of(path)}: {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{name_of(path)}: {link}: no such heading")
    return wrong


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=name_of)
def test_links_lead_to_files(path):
    assert not broken(path, path.read_text("utf-8"))


def test_a_broken_link_is_seen():
    text = "[a](nowhere.md) [b](methods.md#id3) [c](methods.md#nothing) `x[0](1)` [d](https://arxiv.org)"
    assert broken(DOCS / "index.md", text) == [
        "docs/index.md: nowhere.md",
        "docs/index.md: methods.md#nothing: no such heading",
    ]


@pytest.mark.parametrize("script", ["gallery", "commands"])
def test_written_pages_are_current(script):
    made = tool(script)
    assert made.PAGE.read_text("utf-8") == made.written(), f"run `python docs/{script}.py`"


def test_every_public_name_is_in_the_reference():
    shown = {name for path in PAGES for name in _NAMED.findall(path.read_text("utf-8"))}
    modules = {"scores", "algebra", "sync"}  # their functions are shown one by one
    names = {f"selectune.{name}" for name in selectune.__all__ if name not in modules}
    for module in modules:
        names |= {f"selectune.{module}.{name}" for name in getattr(selectune, module).__all__}
    assert not names - shown
    rooms = ("selectune.integrations.", "selectune.adapters.", "selectune.interop.")
    own = [name for name in shown if not name.startswith(rooms)]
    assert set(own) == names


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == {path.relative_to(DOCS).as_posix() for path in PAGES}


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="griffe is not installed here: `make docs` installs it")
    text = "Of |a|*b and `c*d`:\n\n* x_1\n\n    a  table\n\n>>> 1 + 1\n2"
    made = "Of |a|\\*b and `c*d`:\n\n* x\\_1\n\n```text\na  table\n```\n\n```pycon\n>>> 1 + 1\n2\n```"
    assert tool("doctests").as_markdown(text) == made


def test_the_site_builds_and_needs_no_network(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("mkdocs is not installed here: `make docs` installs it, builds the site strictly and checks it")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    check = tool("check_site")
    assert list(check.external(site)) == []
    assert "Step-by-Step Unmasking" in (site / "reference" / "recipes.html").read_text("utf-8")


def test_a_resource_from_elsewhere_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<link rel=canonical href="https://x.org/"><a href="https://x.org/">x</a><img src="a.png">'
        '<script src="//x.org/a.js"></script><style>@import "https://x.org/a.css";</style>'
        '<pre class="mermaid">a</pre>'
    )
    (tmp_path / "a.css").write_text("a{background:url(https://x.org/a.png)} b{background:url(b.png)}")
    assert list(tool("check_site").external(tmp_path)) == [
        "a.html: <script src=//x.org/a.js>",
        "a.html: <pre>: the theme asks another host for diagrams and repositories",
        "a.html: https://x.org/a.css",
        "a.css: https://x.org/a.png",
    ]
