"""The page: text of files stays text, ids are unique, each chart has words and a table, nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_kit import METHODS, study

import selectune.study.report as room
from selectune.study.report import FORMATS, content, gather
from selectune.study.report.drawing import LETTER, nice, scatter

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Elements as (name, attributes, text within, names around)."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str], tuple[str, ...]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [], tuple(self.elements[i][0] for i in self.open)))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [], tuple(self.elements[i][0] for i in self.open)))

    def handle_endtag(self, tag):
        assert self.elements[self.open[-1]][0] == tag, f"</{tag}> ends <{self.elements[self.open[-1]][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, name):
        return [(attributes, "".join(text)) for tag, attributes, text, _ in self.elements if tag == name]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("<b>x&y") / HOSTILE.replace("/", ":")
    folder.mkdir()
    study(folder, ("full", "id3", HOSTILE, "a|b_c$d\\e%"), ("glue/stsb", "x\"onload='y'&<i>"), 2, 12, HOSTILE)
    return content(gather(folder))


@pytest.fixture(scope="module")
def text(shown):
    return FORMATS["html"](shown)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_text_of_files_stays_text(page, text):
    own = (Path(room.__file__).parent / "script.js").read_text("utf-8")
    assert page.all("script") == [({}, own)]
    assert not {tag for tag, *_ in page.elements} & {"b1", "i", "iframe", "img", "object", "embed", "form"}
    assert not [name for _, attributes, *_ in page.elements for name in attributes if name.startswith("on")]
    assert page.all("h1")[0][1] == HOSTILE
    assert any(HOSTILE in attributes.get("aria-label", "") for _, attributes, *_ in page.elements)
    assert "alert(1)" in text


def test_only_the_own_script_may_run_and_nothing_is_loaded(page, text):
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.all("script")[0][1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    links = [a[name] for _, a, *_ in page.elements for name in ("src", "href", "action", "data") if name in a]
    assert {link[:1] for link in links} == {"#", "d"}
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(?:https?:)?//[a-z]", text)


def test_ids_are_unique_and_links_lead_to_them(page):
    ids = [a["id"] for _, a, *_ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for _, a, *_ in page.elements if a.get("href", "").startswith("#")}
    labels = {id for _, a, *_ in page.elements for id in a.get("aria-labelledby", "").split()}
    assert links <= set(ids)
    assert labels <= set(ids)


def test_every_chart_has_words_and_a_table(page):
    named = {"aria-label", "aria-labelledby"}
    for tag, attributes, _, around in page.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] and named & set(attributes))
            assert "figure" in around
        if "data-mark" in attributes:
            assert attributes["aria-label"].strip()
            assert tag in ("a", "button") or attributes.get("tabindex") == "0"
        if tag == "section":
            assert attributes["aria-labelledby"]
    sections = {a["id"] for a, _ in page.all("section")}
    assert sections == {"answer", "scores", "cost", "retention", "maps", "lines", "runs"}
    tables = [around for tag, *_, around in page.elements if tag == "table"]
    assert all("section" in around for around in tables)
    for section in sections - {"answer"}:
        start = next(i for i, (tag, a, *_) in enumerate(page.elements) if tag == "section" and a["id"] == section)
        rest = page.elements[start + 1 :]
        end = next((i for i, (tag, *_) in enumerate(rest) if tag == "section"), len(rest))
        assert any(tag == "table" for tag, *_ in rest[:end]), section
    for attributes, _ in page.all("th"):
        assert attributes["scope"] in ("row", "col")


def test_markdown_and_latex_show_names_as_they_are(shown):
    markdown, tex = FORMATS["md"](shown), FORMATS["tex"](shown)
    assert "<script>" not in re.sub(r"\\<|`[^`]*`", "", markdown)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"a\|b\_c\$d\\e%" in markdown
    assert r"a\textbar{}b\_c\$d\textbackslash{}e\%" in tex
    assert r"\textless{}script\textgreater{}alert(1)" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\toprule") == 3
    for line in tex.splitlines():
        assert line.startswith("%") or not re.search(r"(?<!\\)[#%_]|[<>|~^]", line)


def test_labels_cover_nothing(tmp_path):
    study(tmp_path, METHODS, ("trec",), 2, 12)
    (board,) = content(gather(tmp_path)).boards
    for cost in ("seconds", "peak_bytes", "delta_bytes", "forgetting"):
        plot = scatter(board, "trec", cost)
        boxes = [(m.x - 4, m.x + 4, m.y - 4, m.y + 4) for m in plot.marks]
        for m in plot.marks:
            if m.text_x is not None:
                a, b = (m.text_x - LETTER * len(m.label), m.text_x)
                a, b = (a, b) if m.end else (m.text_x, m.text_x + LETTER * len(m.label))
                box = (a, b, m.text_y - 6, m.text_y + 6)
                assert not any(box[0] < x and w < box[1] and box[2] < y and z < box[3] for w, x, z, y in boxes)
                boxes.append(box)
        assert len(boxes) > 1.5 * len(plot.marks)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.013, 0.0021), (3, 47), (1e6, 1.2e6), (0.5, 0.5001)])
def test_ticks_are_few_and_within(low, high):
    found = nice(low, high)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-9 * abs(high) <= tick <= high + 1e-9 * abs(high) for tick in found)


def test_two_hundred_cells_are_a_light_page(tmp_path):
    study(tmp_path, METHODS, ("glue/stsb", "glue/cola", "trec", "conll"), 5, 300)
    text = FORMATS["html"](content(gather(tmp_path)))
    assert len(text.encode()) < 3_000_000
