"""Every Python example in the documentation runs, in order, one namespace for each file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/how-to-choose.md", "docs/extend.md")
MUST_HAVE_EXAMPLES = ("README.md",)
NO_RUN = "<!-- no-run -->"  # on the line before a block: shown, not run

_BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line of the first statement, code) of every block that is to be run."""
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1].strip()
        if before != NO_RUN:
            width = len(match["indent"])
            code = "".join(line[width:] if line.strip() else line for line in match["code"].splitlines(keepends=True))
            yield text[: match.start("code")].count("\n") + 1, code


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_run(document, tmp_path, monkeypatch):
    path = ROOT / document
    if not path.exists():
        pytest.fail(f"{document} is missing")
    found = list(blocks(path.read_text("utf-8")))
    if not found and document in MUST_HAVE_EXAMPLES:
        pytest.fail(f"{document} has no Python example that runs")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__example__"}
    for line, code in found:
        # The blank lines make a traceback point at the line of the document.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


SAMPLE = """\
```python
a = 1
```
text
<!-- no-run -->
```python
b = 2
```
* item
  ```python
  c = 3
  ```
```bash
d
```
"""


def test_blocks_are_found():
    assert list(blocks(SAMPLE)) == [(2, "a = 1\n"), (11, "c = 3\n")]
