"""The report of a study or of one run: a page that needs nothing else, and its tables for a text.

material   what lies in a folder: results, histories, what is missing
estimates  means, differences and their intervals
heat       where the selected scalars are, read off deltas
numbers    how numbers are written
shown      everything that a report shows, as one value
sentences  the answer in three sentences, and notes
drawing    where the marks of a chart are
page       the value as HTML: page.html, charts.html, style.css, script.js
markup     the value as Markdown and LaTeX
"""

from selectune.study.report.markup import latex, markdown
from selectune.study.report.material import gather
from selectune.study.report.page import page
from selectune.study.report.shown import Shown, content

FORMATS = {"html": page, "md": markdown, "tex": latex}
"""{name of a format: what writes it}."""

__all__ = ["FORMATS", "Shown", "content", "gather"]
