"""Charts as elements of an HTML page: the numbers land where they belong, and many charts share one page."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cortexloop.cli import charts

SEED = 20


def some_charts():
    rng = np.random.default_rng(SEED)
    steps = np.arange(30.0)
    return {
        "line": charts.line_chart(
            [charts.Series(steps, 80 * (1 - np.exp(-steps / 9))), charts.Series(steps, -steps, "b")],
            "step", "response", level=(9.4, "best image"),
        ),
        "scatter": charts.scatter(
            rng.normal(size=60), rng.normal(size=60), "predicted", "recorded", curve=charts.Series(steps - 9, steps)
        ),
        "histogram": charts.histogram(rng.gamma(2.0, size=90), "ms", "runs", marks=[(1.5, "median"), (5.0, "99 %")]),
    }  # fmt: skip


def paths(svg, color):
    """The points of every path drawn in a colour: arrays [points, 2]."""
    return [
        np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), float)
        for path in ElementTree.fromstring(str(svg)).iter("path")
        if f"var(--{color})" in path.get("style", "")
    ]


def texts(svg):
    return {text.text: text for text in ElementTree.fromstring(str(svg)).iter("text")}


def at(svg, axis, number):
    """Where an axis shows a number: x from its tick labels, y from the lines of the grid beside them."""
    anchor = "text-anchor: middle" if axis == "x" else "text-anchor: end"
    labels = [
        text
        for text in ElementTree.fromstring(str(svg)).iter("text")
        if "var(--faint)" in text.get("style", "") and anchor in text.get("style", "")
    ]
    numbers = [float(text.text.replace("\N{MINUS SIGN}", "-")) for text in labels]
    places = [float(text.get("x")) for text in labels] if axis == "x" else [line[0, 1] for line in paths(svg, "grid")]
    assert len(numbers) == len(places) >= 2, "an axis needs two numbers to be read"
    slope, start = np.polyfit(numbers, places, 1)
    return start + slope * number


@pytest.mark.parametrize("kind", ["line", "scatter", "histogram"])
def test_charts_share_a_page_and_its_theme(kind):
    svg = some_charts()[kind]
    assert svg.startswith("<svg viewBox=")
    for foreign in (" id=", "url(", "href", "<style", "<?xml", "<!", "xmlns", "metadata", "matplotlib", "&#10;"):
        assert foreign not in svg
    assert not re.search(r"#[0-9a-fA-F]{3,}", svg), "a colour that no theme can change"
    assert "DejaVu" not in svg
    assert set(re.findall(r"var\((--[a-z]+)\)", svg)) <= {
        "--a", "--b", "--bar", "--ink", "--soft", "--faint", "--grid", "--sans"
    }  # fmt: skip


def test_a_strip_has_a_dot_per_value_and_a_mark_at_the_median():
    values = [np.array([0.1, 0.5, np.nan, 0.3]), np.array([0.9])]
    svg = charts.strip_chart(["first", "second"], values, "r", styles=("a", "b"))
    first, second = (paths(svg, color) for color in ("a", "b"))
    dots, mark = first
    ticks = charts.strip_chart(["first", "second"], [np.array([0.0, 1.0]), np.array([0.9])], "r", styles=("a", "b"))
    assert len(np.unique(dots[:, 0])) == 3
    assert len(np.unique(dots[:, 1])) == 3
    np.testing.assert_allclose(mark[:, 0], at(svg, "x", 0.3), atol=0.02)
    np.testing.assert_allclose(second[1][:, 0], at(svg, "x", 0.9), atol=0.02)
    assert dots[:, 1].max() < second[0][:, 1].min(), "rows keep apart"
    assert {"first", "second"} <= texts(ticks).keys()


@pytest.mark.parametrize("kind", ["line", "scatter", "histogram"])
def test_nothing_reaches_beyond_the_plotting_area(kind):
    """The charts carry no clip paths."""
    svg = some_charts()[kind]
    _, _, width, height = (float(number) for number in re.search(r'viewBox="([^"]*)"', svg)[1].split())
    for color in ("a", "b", "bar", "ink", "faint", "grid"):
        for points in paths(svg, color):
            assert points[:, 0].min() >= charts.LEFT - 0.02
            assert points[:, 0].max() <= width - charts.RIGHT + 0.02
            assert points[:, 1].min() >= charts.TOP - 0.02
            assert points[:, 1].max() <= height - charts.BOTTOM + 0.02


def test_the_same_numbers_give_the_same_chart_whatever_the_configuration():
    before = some_charts()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "lines.linewidth": 9}):
        chosen = dict(matplotlib.rcParams)
        assert some_charts() == before
        assert dict(matplotlib.rcParams) == chosen


def test_a_curve_lies_where_the_axes_say():
    x, y = np.array([0.0, 4.0, 10.0]), np.array([-3.0, 12.0, 7.0])
    svg = charts.line_chart([charts.Series(x, y)], "step", "response", level=(5.0, "a <level>"))
    (curve,) = paths(svg, "a")
    np.testing.assert_allclose(curve, np.stack([at(svg, "x", x), at(svg, "y", y)], 1), atol=0.05)
    (level,) = paths(svg, "ink")
    np.testing.assert_allclose(level[:, 1], at(svg, "y", 5.0), atol=0.05)
    assert {"step", "response", "a <level>"} <= texts(svg).keys()


def test_points_lie_where_the_axes_say_without_those_that_are_not_numbers():
    x, y = np.array([1.0, np.nan, 3.0, 2.0]), np.array([5.0, 6.0, 9.0, np.nan])
    svg = charts.scatter(x, y, "predicted", "recorded")
    (dots,) = paths(svg, "b")
    expected = np.stack([at(svg, "x", x[[0, 2]]), at(svg, "y", y[[0, 2]])], 1)
    np.testing.assert_allclose(dots, np.repeat(expected, 2, 0), atol=0.05)
    assert charts.scatter(x[1:2], y[1:2], "predicted", "recorded") == ""


def test_bars_are_as_high_as_their_counts():
    values = np.array([0.0, 0.1, 0.2, 1.0, 1.9, 2.0, np.nan])
    svg = charts.histogram(values, "ms", "runs", bins=2, marks=[(1.5, "median")])
    bars = paths(svg, "bar")
    np.testing.assert_allclose([bar[:, 1].min() for bar in bars], at(svg, "y", np.array([3, 3])), atol=0.05)
    (mark,) = paths(svg, "ink")
    np.testing.assert_allclose(mark[:, 0], at(svg, "x", 1.5), atol=0.05)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-7, 3e6])
def test_a_single_value_still_makes_a_chart(value):
    one = np.array([value])
    assert "<path" in charts.line_chart([charts.Series(one, one)], "x", "y")
    assert "<path" in charts.scatter(one, one, "x", "y")
    assert "<path" in charts.histogram(one, "x", "y", marks=[(value, "median")])


def test_matplotlib_is_imported_by_the_first_chart():
    code = "import sys, cortexloop.cli.app, cortexloop.cli.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heat_map_colours_by_the_sign_of_the_deviation():
    uri = charts.heat_map(np.array([[1.0, 3.0, -1.0]]), base=1.0)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert image.shape == (1, 3, 4)
    assert image[0, :, 3].tolist() == [0, 255, 255]
    assert image[0, 1, 0] > image[0, 1, 2]
    assert image[0, 2, 0] < image[0, 2, 2]


def test_histogram_of_values_that_differ_by_rounding() -> None:
    """No bins fit between 1 and the next number."""
    values = np.array([1.0, np.nextafter(1.0, 0.0), 1.0])
    assert "<path" in charts.histogram(values, "r", "neurons", marks=[(1.0, "median")])
