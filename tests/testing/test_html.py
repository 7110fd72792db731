"""The page of a report: what is on it, that nothing is fetched or run, and that a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from torchbatch.testing import drawing
from torchbatch.testing.compare import compare
from torchbatch.testing.html import save_html, to_html
from torchbatch.testing.precision import precision_policy
from torchbatch.testing.report import Argument, Check, Report

from . import reports

VOID = {"meta", "br", "hr", "img", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """The elements of a page, and that each is closed where it has to be."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def having(self, tag, kind=None):
        """The attributes of all elements of a tag, with a class."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [attributes for attributes in found if kind is None or kind in attributes.get("class", "").split()]


@pytest.fixture(scope="module")
def bad():
    return Page(to_html(reports.bad()))


@pytest.fixture(scope="module")
def good():
    return Page(to_html(reports.good()))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_outcome_comes_first(good, bad):
    assert good.having("header", "passed") and not good.having("header", "failed")
    assert "✓ check_vmap(f) 3 checks passed, 1 skipped 3 passed 0 failed 1 skipped" in good.text
    assert bad.having("header", "failed")
    assert "✕ check_vmap(<lambda>) 4 of 7 checks failed, 1 skipped 3 passed 4 failed 1 skipped" in bad.text


def test_nothing_is_fetched_and_nothing_is_run(bad):
    source = to_html(reports.bad())
    assert not {tag for tag, _ in bad.elements} & {"script", "link", "img", "iframe", "object", "form"}
    for _, attributes in bad.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes.get(name, "#").startswith("#") for name in ("href", "src"))
    assert "http" not in source and "url(" not in source and "@import" not in source


def test_it_is_light_and_dark(bad):
    source = to_html(reports.bad())
    assert "color-scheme:light dark" in source and "@media (prefers-color-scheme:dark)" in source
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", source)), re.findall(r"(--[\w-]+):", source)
    assert used == set(defined) and all(defined.count(name) == 2 for name in used)


def test_every_text_is_escaped():
    evil = "</pre><script>alert(1)</script>\x00\ud800"
    leaf = compare({evil: torch.ones(2)}, {evil: torch.zeros(2)}, {evil: torch.zeros(2)})
    checks = (Check.of_leaves(evil, evil, evil, evil, leaf), Check(evil, evil, evil, evil, "failed", evil, evil))
    skipped = Check(evil, evil, evil, evil, "skipped", None, f'{evil}" onclick="alert(2)')
    arguments = (Argument(evil, evil, (2,), 0),)
    report = Report(evil, (*checks, skipped), (evil,), (evil,), precision_policy(), evil, arguments, arguments)
    page = Page(to_html(report))
    assert not page.having("script") and "\x00" not in to_html(report)
    assert all("onclick" not in attributes for _, attributes in page.elements)
    assert "<script>alert(1)</script>" in page.text
    assert Page(to_html(Report("f", inputs=(evil,)))).text.count("<script>") == 1


def test_it_can_be_written(tmp_path):
    report = Report("f\ud800")
    save_html(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == to_html(report)


def test_an_empty_report_is_a_page():
    page = Page(to_html(Report("nothing")))
    assert "nothing checked" in page.text and not page.having("table")


# --- the checks ------------------------------------------------------------------------------------------------------


def test_every_check_has_a_line(good, bad):
    assert len(good.having("tr", "passed-row")) == 3 and len(good.having("tr", "skipped-row")) == 1
    assert len(bad.having("tr", "failed-row")) == 4 and len(bad.having("tr", "passed-row")) == 3


def test_outcomes_are_told_by_sign_and_word_not_only_by_color(bad):
    for words in ("✓ passed", "✕ failed", "– skipped"):
        assert words in bad.text
    assert "no compiler <b>here</b>" in bad.text


def test_at_a_glance(bad):
    """Three variants with their rows below them, and a sign for each check."""
    assert [attributes["colspan"] for attributes in bad.having("th") if "colspan" in attributes] == ["6"] * 3
    glance = bad.text.partition("At a glance")[2].partition("What differs")[0]
    order = ["as given", "values", "✓ equal", "✕ nonfinite", "✕ shape", "✕ error", "– skipped", "reverse-mode", "✕ dtype"]
    place = 0
    for words in [*order, "batch of 1", "axes moved: in_axes=(1, None)"]:
        place = glance.index(words, place)


def test_signs_of_failures_lead_to_what_is_said_of_them(bad):
    targets = {found["id"] for _, found in bad.elements if "id" in found}
    links = [found["href"] for found in bad.having("a")]
    assert len(links) == 8 and {link.removeprefix("#") for link in links} == targets == {f"failure-{i}" for i in range(4)}


def test_two_failures_that_look_alike_have_places_of_their_own():
    check = Check("a", "b", "values", "as given", "failed", "error", "x")
    twin = Check("a", "b", "values", "as given", "failed", "error", "x")
    page = Page(to_html(Report("f", (check, twin))))
    assert [link["href"] for link in page.having("a")] == ["#failure-0", "#failure-1"] * 2


def test_long_lists_are_folded():
    check = Check("a", "b", "values", "as given", "failed", "error", "x")
    few, many = (Page(to_html(Report("f", (check,) * count))) for count in (3, 60))
    assert sum("open" in found for found in few.having("details")) == 4
    assert sum("open" in found for found in many.having("details")) == 4
    assert len(many.having("details")) == 61


# --- what failed -----------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_leaf(bad):
    text = bad.text.partition("What differs")[2]
    for words in (
        "output['loss']: 1 of 8 differ, most at [2]: nan instead of",
        "NaN 1 instead of 0",
        "numbers that differ 31 of 38400",
        "largest absolute difference 1000",
        "largest difference in last places",
        "worst at [3, 7, 89]",
        "float64 reference there",
        "jit is off",
        "shape (8, 120, 40) instead of (8, 40, 120)",
        "1 other leaf is the same.",
        "AxisError: <script>alert('&')</script> second line",
        "320 × 120 numbers, folded into 48 × 96 cells that show their largest",
        "1 × 8 numbers",
    ):
        assert words in text, words


def test_who_is_off_is_drawn(bad):
    assert len(bad.having("div", "blame")) == 4
    assert len(bad.having("i", "beyond")) == 2 and len(bad.having("i", "within")) == 2
    assert "not finite where the reference is" in bad.text


@pytest.mark.parametrize(("off", "width"), [(0.0, "0.0"), (1.0, "40.0"), (1e9, "100.0"), (float("inf"), "100.0")])
def test_bars(off, width):
    bar = drawing.blame_bar("jit", off)
    assert len(Page(bar).having("div", "blame")) == 1
    assert f"width:{width}%" in bar and ("✓" in bar) == (off <= 1)


def test_notes_settings_and_program(bad, good):
    for words in ("tolerance: chosen & noted", "In plain PyTorch import torch assert 1 < 2", "default_dtype float32"):
        assert words in bad.text
    assert "Precision policy" not in good.text and "Reproduce it" not in good.text


def test_warnings_are_shown():
    with torch.autocast("cpu", torch.bfloat16):
        report = Report("f", precision=precision_policy(["torch"]))
    assert "autocast is on (cpu: bfloat16)" in Page(to_html(report)).text.partition("Precision policy")[0]


# --- axes ------------------------------------------------------------------------------------------------------------


def test_the_axes_are_drawn(bad):
    assert len(bad.having("svg", "sheets")) == len(reports.ARGUMENTS) + len(reports.OUTPUTS)
    assert len(bad.having("span", "batch")) == 5
    for words in ("40 axis 0 8 axis 1, batch", "no axes", "× 8", "float32, shared by all samples", "query: 8 samples"):
        assert words in bad.text


@pytest.mark.parametrize(
    ("argument", "sheets", "kind"),
    [
        (Argument("x", "float32", (8, 3), 0), 4, "sample"),
        (Argument("x", "float32", (2, 3), 0), 2, "sample"),
        (Argument("x", "float32", (3, 0), 1), 1, "none"),
        (Argument("x", "float32", (3, 4), None), 1, "shared"),
        (Argument("x", "float32", (), None), 1, "shared"),
    ],
)
def test_one_sheet_for_each_sample_up_to_four(argument, sheets, kind):
    page = Page(drawing.axes(argument))
    assert len(page.having("rect", kind)) == len(page.having("rect")) == sheets


def test_sizes_stand_at_their_edges():
    page = Page(drawing.axes(Argument("x", "float32", (5, 8, 7, 6), 1)))
    words = [word for word in page.words if word.strip()]
    assert words[1:5] == ["6", "7", "5 ×", "× 8"]


def test_as_text_where_nothing_else_is_known():
    page = Page(to_html(Report("f", inputs=("x: float32[3]",))))
    assert "x: float32[3]" in page.text and not page.having("svg")


def test_without_a_batch_nothing_is_shared():
    assert "shared" not in Page(to_html(Report("f", arguments=(Argument("x", "float32", (3,)),)))).text


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (0.0, "equal"),
        (1e-9, "≤ 1/100"),
        (0.01, "≤ 1/100"),
        (0.02, "≤ 1/10"),
        (1.0, "≤ 1"),
        (1.001, "≤ 10"),
        (99.0, "≤ 100"),
        (1e4, "≤ 10⁴"),
        (1.1e4, "> 10⁴"),
        (1.7e308, "> 10⁴"),
        (np.inf, "not finite"),
        (np.nan, "not finite"),
    ],
)
def test_shades(error, label):
    (shade,) = drawing.shades(np.array([error]))
    assert drawing.SHADES[shade][1] == label


def difference(shape, place, seed=0):
    """A leaf that differs in one place."""
    expected = np.zeros(shape)
    got = expected.copy()
    got[place] = 1.0
    (leaf,) = compare(got, expected)
    return leaf


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (100, 200), (7, 49, 97), (5, 1), (1, 500), (200, 300)])
def test_the_worst_place_is_marked(shape):
    generator = np.random.default_rng(0)
    for _ in range(20):
        place = tuple(int(generator.integers(size)) for size in shape)
        leaf = difference(shape, place)
        assert leaf.worst.index == place
        assert leaf.heat[drawing.worst_cell(leaf)] == leaf.heat.max() > 0


def test_a_heat_map_covers_every_cell_once():
    leaf = difference((6, 7), (2, 3))
    source = drawing.heat_map(leaf)
    page = Page(source)
    (picture,) = page.having("svg", "heat")
    cell = int((int(picture["width"]) - 8) / 7)
    widths = [int(width) for path in page.having("path") for width in re.findall(r"h(\d+)v", path["d"])]
    assert sum(widths) == 6 * 7 * cell
    assert [path["class"] for path in page.having("path")] == ["h0", "h7" if leaf.heat.max() < np.inf else "h8"]
    assert f"M{3 * cell} {2 * cell}h{cell}v{cell}h-{cell}z" in source
    assert len(page.having("circle")) == 2


def test_a_page_stays_small():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((500, 500))
    leaves = compare(a * (1 + 10.0 ** generator.uniform(-18, 0, a.shape)), a)
    assert len(to_html(Report("f", (Check.of_leaves("a", "b", "values", "as given", leaves),)))) < 200_000


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(()), torch.zeros(2).bool()])
def test_without_numbers_there_is_no_heat_map(other):
    (leaf,) = compare(torch.ones(2), other)
    assert drawing.heat_map(leaf) == ""


def test_of_one_number_there_is_no_heat_map():
    assert drawing.heat_map(difference((), ())) == drawing.heat_map(difference((1, 1), (0, 0))) == ""


# --- a browser -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_in_a_browser(tmp_path):
    save_html(reports.bad(), tmp_path / "report.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    shown = Page(done.stdout)
    written = Page(to_html(reports.bad()))
    assert [tag for tag, _ in shown.elements] == [tag for tag, _ in written.elements]
    assert len(shown.having("tr", "failed-row")) == 4
    assert shown.text.split() == written.text.split()
