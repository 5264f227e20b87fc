"""What stands on a plan's page, held to what one must be able to see."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest

from chairlift.sim.plan.flips import Change
from chairlift.sim.plan.page import SCALE, logarithmic, tornado
from chairlift.sim.report.html import ASSETS, apart, ticks

LEAST = 3.0  # of graphics beside what is next to them: WCAG 2.2, success criterion 1.4.11


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrasts_by_hand() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WebAIM's example


def test_rings_off_the_front_are_seen_on_light_and_on_dark_paper() -> None:
    """A ring is drawn in the colour of its number alone."""
    papers = set(re.findall(r"--paper: (#[0-9a-f]{6})", (ASSETS / "page.css").read_text()))

    assert len(papers) == 2
    assert all(contrast(colour, paper) >= LEAST for _, colour in SCALE for paper in papers)


def test_an_assumption_under_which_nothing_will_do_is_told_in_the_tornado() -> None:
    """A bar of no length has the words beside it, and room for them: of a bar without a value Plotly draws none."""
    now = SimpleNamespace(winner=SimpleNamespace(usd_per_hour=3.0))
    change = Change("load", None, None, (3.0, math.inf))
    [(_, figure, _)] = tornado(now, [change])  # type: ignore[arg-type]
    less, more = figure["data"]

    assert (less["x"], less["text"]) == ([0.0], [""])
    assert (more["x"], more["text"]) == ([0.0], ["nothing will do"])
    assert figure["layout"]["margin"]["r"] >= 100


def test_ticks_of_a_logarithmic_axis_are_whole_numbers() -> None:
    assert logarithmic(6, 63)["ticktext"] == ["1", "2", "5", "10", "20", "50", "100", "200", "500"]
    assert logarithmic(120, 9000)["ticktext"][3:] == ["1,000", "2,000", "5,000", "10,000", "20,000", "50,000"]
    assert logarithmic(2, 90_000)["ticktext"] == ["1", "10", "100", "1,000", "10,000", "100,000"]


def test_ticks_stand_at_the_rates_that_were_bought_for() -> None:
    assert apart([10, 25, 50]) == [10, 25, 50]
    assert apart([10, 10.5, 25, 50]) == [10, 25, 50]  # 10.5 has no room beside 10
    assert apart([2, 3]) == [2, 3]


def test_ticks_are_said_in_four_digits_where_those_tell_values_apart() -> None:
    assert ticks([4, 4 * 2**0.5, 8, 16, 32])["ticktext"] == ["4", "8", "16", "32"]  # 5.657 has no room
    assert ticks([5.656854, 11.313708])["ticktext"] == ["5.657", "11.31"]
    assert ticks([2048, 131072]) == {"tickvals": [2048, 131072], "ticktext": ["2,048", "131,072"]}
    assert ticks([0.90001, 0.90002])["ticktext"] == ["0.90001", "0.90002"]
