"""Reports: the same words and tables on the terminal, in Markdown and in one HTML file.

    report = Report("dass bench", intro=("...",), sections=(Section("Layers", items=(table,)),))
    save_report(report, folder)        # report.md, report.html, report.json
    print_report(report)

The HTML refers to nothing outside itself. Its plots need matplotlib; without it the page says so.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from dass import plots
from dass.plots import Plot

__all__ = [
    "Drawing",
    "Plot",
    "Report",
    "Section",
    "Table",
    "machine_table",
    "print_report",
    "save_report",
    "to_html",
    "to_json",
    "to_markdown",
    "write_text",
]

FORMAT = 1
_NUMBER = re.compile(r"^[-+]?\d[\d,.]*(e-\d+|x|\*| ?%| ([kMG]?B|us|ms|s))?$|^-?$")


@dataclass(frozen=True)
class Table:
    """Rows of text. A column of numbers is set to the right.

    strong: columns to stress. aside: columns that the terminal has no room for.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[str] = ()
    aside: Sequence[str] = ()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    def stressed(self, column: int, cell: str) -> bool:
        """Whether a cell is to be stressed: not where a ratio says slower."""
        slower = cell.endswith("x") and self.right(column) and float(cell[:-1]) < 1
        return self.columns[column] in self.strong and not slower

    def right(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return bool(self.rows) and all(_NUMBER.match(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Drawing:
    """A picture that is SVG already."""

    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, then tables and plots. The terminal shows only what is `brief`."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Table | Plot | Drawing] = ()
    brief: bool = True


@dataclass(frozen=True)
class Report:
    """Words and tables for people, `data` for programs (plain JSON types).

    figures: (number, what it is) for the top of the page.
    """

    title: str
    intro: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    data: Mapping[str, object] = field(default_factory=dict)


def machine_table(facts: Mapping[str, object]) -> Table:
    """`dass.timing.machine_facts()`, one row per fact."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append((key.replace("_", " "), str(value)))
    return Table(("fact", "value"), rows)


def save_report(report: Report, folder: str | os.PathLike) -> dict[str, Path]:
    """Writes report.json, report.md and report.html, each whole or not at all; -> their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(to_json(report), indent=1, allow_nan=False) + "\n",
        "md": to_markdown(report),
        "html": to_html(report),
    }
    paths = {kind: folder / f"report.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_text(paths[kind], text)
    return paths


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none: a kill half-way leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(report: Report) -> dict:
    """Plain JSON types: format, title, created (UTC), intro, figures, data."""
    return {
        "format": FORMAT,
        "title": report.title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "intro": list(report.intro),
        "figures": [{"value": value, "what": what} for value, what in report.figures],
        "data": dict(report.data),
    }


# Markdown


def to_markdown(report: Report) -> str:
    """GitHub's Markdown; plots are only in the HTML."""
    parts = [f"# {report.title}", *report.intro]
    if report.figures:
        parts.append("\n".join(f"- **{value}** {what}" for value, what in report.figures))
    for section in report.sections:
        parts += [f"## {section.title}", *section.text]
        for item in section.items:
            if isinstance(item, Table):
                parts += [f"*{item.caption}*"] * bool(item.caption) + [_markdown_table(item)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    rule = ["--:" if table.right(i) else ":--" for i in range(len(table.columns))]
    return "\n".join([line(table.columns), line(rule), *map(line, table.rows)])


# HTML

_CSS = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6577; --page: #f6f7f9; --card: #fff;
  --line: #e3e6eb; --accent: #2f7ff0; --stress: #0c8667; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa4b5; --page: #12161d;
  --card: #1a2029; --line: #2b3340; --accent: #6aa6ff; --stress: #3fd6ad; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 82ch; }
header p, .note, caption { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin-top: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin-top: 20px; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 18px; }
.figures b { display: block; font-size: 26px; line-height: 1.25; color: var(--accent);
  font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.figures span { color: var(--soft); font-size: 13px; line-height: 1.4; display: block; }
.wide { overflow-x: auto; margin: 12px 0 4px; }
table { border-collapse: collapse; font-size: 13px; min-width: 50%; }
caption { text-align: left; font-size: 13px; padding-bottom: 6px; }
th, td { padding: 5px 9px; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; color: var(--soft); font-size: 12.5px; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.s { font-weight: 650; color: var(--stress); }
figure { margin: 14px 0 4px; }
svg { width: 100%; max-width: 820px; height: auto; display: block; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 26px; }
"""


def to_html(report: Report) -> str:
    """One page with its styles and plots inside, light or dark as the reader's system is."""
    title = html.escape(report.title)
    body = [f"<header><h1>{title}</h1>"]
    body += [f"<p>{html.escape(text)}</p>" for text in report.intro]
    if report.figures:
        body.append('<div class="figures">')
        body += [
            f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>"
            for value, what in report.figures
        ]
        body.append("</div>")
    body.append("</header>")
    for section in report.sections:
        body += ["<section>", f"<h2>{html.escape(section.title)}</h2>"]
        body += [f"<p>{html.escape(text)}</p>" for text in section.text]
        body += [_html_item(item) for item in section.items]
        body.append("</section>")
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    body.append(f"<footer>Written {created}. All numbers are in report.json.</footer>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _html_item(item: Table | Plot | Drawing) -> str:
    if isinstance(item, Table):
        return _html_table(item)
    label = html.escape(item.title)
    if isinstance(item, Drawing):
        return f'<figure role="img" aria-label="{label}">{plots.embed(item.svg)}</figure>'
    if plots.available():
        return f'<figure role="img" aria-label="{label}">{plots.to_svg(item)}</figure>'
    return (
        f'<p class="note">The plot "{html.escape(item.title)}" needs matplotlib: '
        "pip install matplotlib, then run the command again.</p>"
    )


def _html_table(table: Table) -> str:
    right = [table.right(i) for i in range(len(table.columns))]

    def cell(tag: str, i: int, text: str, stress: bool = False) -> str:
        words = " ".join(["n"] * right[i] + ["s"] * stress)
        cls = f' class="{words}"' if words else ""
        return f"<{tag}{cls}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", i, column) for i, column in enumerate(table.columns))
    rows = "\n".join(
        "<tr>"
        + "".join(cell("td", i, text, table.stressed(i, text)) for i, text in enumerate(row))
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


# Terminal


def print_report(report: Report, console: Console | None = None) -> None:
    """The report's words and its brief tables."""
    console = console or Console()
    console.print()
    console.rule(f"[bold]{escape(report.title)}")
    for text in report.intro:
        console.print(escape(text))
    for value, what in report.figures:
        console.print(f"  [bold cyan]{escape(value)}[/] {escape(what)}")
    for section in report.sections:
        if section.brief:
            console.print(f"\n[bold]{escape(section.title)}[/]")
            for text in section.text:
                console.print(escape(text), style="dim")
            for table in _tables(section):
                console.print(_rich_table(table))


def _tables(section: Section) -> Iterator[Table]:
    return (item for item in section.items if isinstance(item, Table))


def _rich_table(table: Table) -> RichTable:
    out = RichTable(
        title=escape(table.caption) if table.caption else None,
        title_justify="left",
        title_style="dim",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    shown = [i for i, column in enumerate(table.columns) if column not in table.aside]
    for i in shown:
        justify = "right" if table.right(i) else "left"
        out.add_column(escape(table.columns[i]), justify=justify, overflow="fold")
    for row in table.rows:
        cells = ((escape(row[i]), table.stressed(i, row[i])) for i in shown)
        out.add_row(*(f"[green]{text}[/]" if stress else text for text, stress in cells))
    return out
