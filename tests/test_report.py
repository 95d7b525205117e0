"""The report: one file that shows everything and runs nothing."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from puna.errors import UsageError
from puna.report import duration, number, render, verdict, what_runs_here, write_report
from puna.report.chart import MOST_POINTS, line_chart, smoothed, thinned, ticks

EVIL = "<script>alert('&')</script>\n</pre>{{ 7 * 7 }}"

RESULTS: dict[str, Any] = {
    "title": "A run",
    "lead": "What came of it.",
    "facts": [{"value": "1.9", "label": "bits per byte"}],
    "scores": {
        "columns": ["before", "after"],
        "rows": [{"name": "bits per byte", "unit": "", "better": "lower", "values": [3.9, 1.9]}],
        "notes": ["on 12 files"],
    },
    "curves": [
        {"title": "Loss", "x": "step", "y": "nats", "lines": [{"name": "training", "points": [[1, 8.3], [2, 7.1]]}]}
    ],
    "samples": [{"title": "Completes", "note": "greedy", "parts": [["given", "def f(x):"], ["written", EVIL]]}],
    "stages": [{"title": "Train", "command": "puna train mine", "seconds": 61.0, "said": "done"}],
    "run": {"machine": "two cores"},
    "recipes": {"mine": "model: tiny-64\n"},
}


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "polyline", "line", "circle"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_every_part_is_on_the_page() -> None:
    text = Page(render(RESULTS)).text
    for words in ("A run", "What came of it.", "before", "1.9", "on 12 files", "Loss", "def f(x):", "puna train mine",
                  "1 min 1 s", "two cores", "model: tiny-64"):  # fmt: skip
        assert words in text


def test_what_a_model_wrote_is_shown_as_it_is_and_never_interpreted() -> None:
    page = Page(render(RESULTS))
    assert EVIL in page.text
    assert "script" not in page.tags
    assert page.open == []


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    html = render(RESULTS)
    assert Page(html).addresses == []
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


@pytest.mark.parametrize("part", [part for part in RESULTS if part != "title"])
def test_a_missing_part_is_left_out(part: str) -> None:
    page = Page(render({name: value for name, value in RESULTS.items() if name != part}))
    assert page.open == []
    assert "None" not in page.text


def test_a_title_alone_makes_a_page() -> None:
    assert "h2" not in Page(render({"title": "Nothing yet"})).tags


def test_a_part_that_no_page_has_is_refused() -> None:
    with pytest.raises(UsageError, match="no part scoers; it has title, lead, facts, scores"):
        render({"title": "A run", "scoers": {}})


def test_a_page_without_a_title_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a title"):
        render({"lead": "x"})


def test_a_page_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report({"title": "New"}, path) == path
    assert "New" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_chart_is_well_formed_and_stays_within_its_frame() -> None:
    lines = [
        {"name": "training", "points": [[step, 8 / step] for step in range(1, 1000)], "style": "faint"},
        {"name": "a<b>&", "points": [[1, 8.0], [999, -1.5]], "style": "dots"},
    ]
    svg = ElementTree.fromstring(line_chart({"title": "Loss & co", "x": "step", "y": "nats", "lines": lines}))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    polylines = svg.findall("polyline")
    assert len(polylines) == 2
    for x, y in (map(float, pair.split(",")) for line in polylines for pair in line.attrib["points"].split()):
        assert 0 <= x <= width
        assert 0 <= y <= height
    assert [title.text for title in svg.iter("title")] == ["a<b>&, step 1: 8", "a<b>&, step 999: -1.5"]


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    curve = {
        "title": "t",
        "x": "x",
        "y": "y",
        "lines": [{"name": "n", "points": [[1, 2.0], [2, float("nan")], [3, 4.0]]}],
    }
    assert "nan" not in line_chart(curve)


def test_a_chart_without_points_is_nothing() -> None:
    assert line_chart({"title": "t", "x": "x", "y": "y", "lines": [{"name": "n", "points": []}]}) == ""


def test_a_chart_of_one_point_has_axes() -> None:
    curve = {"title": "t", "x": "x", "y": "y", "lines": [{"name": "n", "points": [[5, 0.0]], "style": "dots"}]}
    ElementTree.fromstring(line_chart(curve))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.9, 8.31), (1, 400), (-3, 12_345), (5, 5), (0, 0), (1e-5, 3e-5)])
def test_ticks_enclose_the_values_in_a_few_round_steps(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 8
    assert all(later > earlier for earlier, later in pairwise(marks))


def test_thinning_keeps_the_mean() -> None:
    points = [[float(i), float(i * i)] for i in range(MOST_POINTS * 4)]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(sum(y for _, y in points) / len(points))


def test_smoothing_leaves_a_straight_line_as_it_is() -> None:
    line = [[x, 3.0 * x + 1] for x in range(50)]
    assert smoothed(line, 7) == line


def test_times_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 125)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 0 s", "2 min 5 s",
    ]  # fmt: skip


def test_scores_read_in_three_figures() -> None:
    assert [number(2.8878), number(1.9), number(0.08333, "%"), number(None), number(12_345.6), number(3)] == [
        "2.89", "1.90", "8.3%", "–", "12,346", "3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("better", "values", "says"),
    [
        ("lower", [3.0, 2.0], "better"),
        ("higher", [3.0, 2.0], "worse"),
        ("higher", [2.0, 2.0], "equal"),
        ("higher", [None, 2.0], ""),
        ("lower", [3.7, 1.8, 2.3], "worse"),
    ],
)
def test_a_score_is_better_or_worse_by_its_own_measure(better: str, values: list[float | None], says: str) -> None:
    assert verdict({"better": better, "values": values}) == says


def test_the_record_names_versions_and_machine() -> None:
    here = what_runs_here()
    assert here["puna"].startswith("0.")
    assert "torch 2." in here["packages"]
    assert "cores" in here["machine"]
