"""Reports: one page that needs nothing else, Markdown, JSON, tables and plots of measurements."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dass import plots, report, tables
from dass.report import (
    Plot,
    Report,
    Section,
    Table,
    print_report,
    save_report,
    to_html,
    to_markdown,
)

BARS = Plot("bars", "Bars", {"dense": [3.0, 2.0], "sparse": [1.0, 0.5]}, "us", categories="ab")
LINES = Plot(
    "lines",
    "Lines",
    {"x, train": [(1, 2.0), (2, 3.0)], "x": [(1, 1.0), (2, 2.0)]},
    "epoch",
    "%",
    marks=("one", "two"),
    dashed=("x, train",),
    log_x=True,
)
NASTY = '<script>alert("1")</script> & [red]x[/red] | y'


def full():
    table = Table(("what", "speed-up"), [(NASTY, "2.00x"), ("b", "0.50x")], NASTY, ["speed-up"])
    sections = [Section("One " + NASTY, [NASTY], [table, BARS, LINES])]
    return Report("Title " + NASTY, [NASTY], [("1.5x", NASTY)], sections, {"a": [1, None]})


class Page(HTMLParser):
    """Checks that elements close in order; collects ids and what refers to something."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(text):
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), page.links
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<script|<img", text)
    return page


def test_the_page_is_well_formed_and_refers_to_nothing_outside():
    page = assert_self_contained(to_html(full()))
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 1


def test_words_are_escaped_everywhere():
    text = to_html(full())
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6
    out = io.StringIO()
    print_report(full(), Console(file=out, width=200))
    assert out.getvalue().count("[red]x[/red]") >= 5


def test_two_plots_of_a_page_do_not_share_ids():
    same = [Section("s", (), [BARS, Plot("bars", "Other", {"dense": [1.0, 9.0]}, categories="ab")])]
    text = to_html(Report("t", sections=same))
    defined = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(defined) == len(set(defined))


def test_a_plot_is_the_same_text_each_time():
    assert plots.to_svg(LINES) == plots.to_svg(LINES)


def test_plots_take_the_colour_of_the_page():
    svg = plots.to_svg(BARS)
    assert "currentColor" in svg
    assert plots._INK not in svg
    assert "dense" in svg  # text stays text


def test_an_unknown_kind_of_plot_is_refused():
    with pytest.raises(ValueError, match="known: bars, lines"):
        plots.to_svg(Plot("pie", "t", {}))


def test_without_matplotlib_the_page_says_so_and_has_its_tables(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    text = to_html(full())
    page = assert_self_contained(text)
    assert "svg" not in page.tags
    assert "table" in page.tags
    assert text.count("needs matplotlib") == 2


def test_markdown_has_the_tables_and_no_broken_rows():
    text = to_markdown(full())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert rows[1] == "| :-- | --: |"
    assert text.startswith("# Title")


def test_the_files_are_written_and_hold_the_data(tmp_path):
    paths = save_report(full(), tmp_path / "a" / "b")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }
    found = json.loads(paths["json"].read_text())
    assert set(found) == {"format", "title", "created", "intro", "figures", "data"}
    assert found["format"] == 1
    assert found["data"] == {"a": [1, None]}
    assert found["figures"] == [{"value": "1.5x", "what": NASTY}]


def test_numbers_that_are_none_do_not_get_into_the_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_report(Report("t", data={"a": float("nan")}), tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    report.write_text(path, "old")

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        report.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Table(("a", "b"), [("1",)])


@pytest.mark.parametrize("cell", ["1", "-1.5", "1,234", "2.00x", "95.1 %", "3.2 MB", "1e-07", "4*"])
def test_columns_of_numbers_go_right(cell):
    assert Table(("a",), [(cell,), ("-",)]).right(0)


@pytest.mark.parametrize("cell", ["conv1", "3x3", "1x3x32x32", "18/21", "10 cats"])
def test_columns_of_words_go_left(cell):
    assert not Table(("a",), [(cell,), ("1",)]).right(0)


def test_only_ratios_that_are_gains_are_stressed():
    table = full().sections[0].items[0]
    assert table.stressed(1, "2.00x")
    assert not table.stressed(1, "0.50x")
    assert not table.stressed(0, "2.00x")


def test_the_terminal_leaves_out_what_it_has_no_room_for():
    table = Table(("a", "wide"), [("1", "secret")], aside=["wide"])
    shown = io.StringIO()
    print_report(Report("t", sections=[Section("s", (), [table])]), Console(file=shown))
    hidden = io.StringIO()
    print_report(
        Report("t", sections=[Section("s", (), [table], brief=False)]), Console(file=hidden)
    )
    assert "secret" not in shown.getvalue()
    assert "1" in shown.getvalue()
    assert hidden.getvalue().count("\n") < shown.getvalue().count("\n")


# What was measured


def taken(us, spread=0.01, **more):
    return {"median_us": us, "spread": spread, "rounds": 7, **more}


def network(**sparse):
    return {
        "input": [16, 3, 32, 32],
        "dense": {"nchw": taken(8000), "frozen": taken(4000)},
        "best": "frozen",
        "sparse": {
            label: taken(us, speedup=4000 / us, sparse_layers=3, layers=5)
            for label, us in sparse.items()
        },
    }


def test_the_network_table_has_a_row_per_network_and_a_dash_where_nothing_is():
    table = tables.network_table([("a", network(x=2000)), ("b", network(x=1000, y=8000))])
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert table.columns.count("speed-up") == 2
    assert table.rows[0][4:8] == ["2.00", "2.00x", "-", "-"]
    assert table.rows[1][4:8] == ["1.00", "4.00x", "8.00", "0.50x"]
    assert rows[1]["sparse layers"] == "3/5, 3/5"
    assert {row["as"] for row in rows} == {"frozen"}


def test_a_network_without_a_rival_has_its_dense_time():
    table = tables.network_table([("a", network())])
    assert table.rows == [["a", "16x3x32x32", "4.00", "frozen", "1 %"]]


def test_the_ways_table_marks_the_fastest():
    assert tables.ways_table([("a", network())]).rows[0][2:] == ["8.00", "4.00*"]


def test_bars_are_per_image():
    plot = tables.network_plot([("a", network(x=2000))], "t")
    assert plot.series == {"dense, fastest way": [0.25], "x zeros": [0.125]}
    assert plot.categories == ["a, batch 16"]


def test_layers_alike_are_one_row():
    row = {
        "names": ["l1", "l2", "l3"],
        "kind": "3x3",
        "weight": [8, 8, 3, 3],
        "input": [1, 8, 4, 4],
        "dense": {"nchw": taken(30.0)},
        "best": "nchw",
        "sparse": {"90 %": taken(10.0, speedup=3.0, density=0.1)},
    }
    table = tables.layer_table([row])
    assert table.rows[0] == [
        "l1 and 2 alike", "3x3", "8x8x3x3", "1x8x4x4", "30.0", "nchw", "10.0", "3.00x",
    ]  # fmt: skip
    assert tables.layer_plot([row], "t").series["90 % zeros"] == [10.0]


def test_a_busy_machine_is_told():
    assert tables.busy([network(x=1000)]) is None
    noisy = network(x=1000)
    noisy["sparse"]["x"]["spread"] = 0.6
    assert "60 %" in tables.busy([noisy])


def test_curves_go_on_where_the_history_before_ended():
    history = [{"epoch": 1, "train_accuracy": 0.5, "test_accuracy": 0.25}]
    plot = tables.curves({"dense": history, "90 %": history}, "t")
    assert plot.series["dense, train"] == [(1, 50.0)]
    assert plot.series["90 %, test"] == [(2, 25.0)]
    assert plot.dashed == ["dense, train", "90 %, train"]
    json.dumps(plot.to_dict())
