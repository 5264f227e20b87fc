"""What a scenario says of kept drafts, against sums done by hand and the frequencies of the draws."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from chairlift.sim.scenario.yaml_document import read
from chairlift.sim.workload.acceptance import CURVES, Acceptance, Draws, curve_in, named_curve
from kit.places import TRUTH


@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1.0, 1.3, 1.9])
def test_a_length_is_a_geometric_series(drafts: int, length: float) -> None:
    shares = Acceptance(length=length).of(drafts)

    assert 1 + sum(shares) == pytest.approx(length)
    assert shares == pytest.approx([shares[0] ** j for j in range(1, drafts + 1)])


def test_a_synthetic_length_keeps_the_first_drafts_always() -> None:
    """2.4 tokens with 3 drafts: the first always, the second in 4 steps of 10, the third never."""
    assert Acceptance(synthetic=2.4).of(3) == pytest.approx([1, 0.4, 0])
    assert Acceptance(synthetic=1).of(2) == (0, 0)


def test_lengths_of_ones_own_are_a_curve() -> None:
    """1.8, 2.3 and 2.9: additions of 0.8, 0.5 and 0.6, the last two of which are pooled."""
    assert Acceptance(lengths=[1.8, 2.3, 2.9]).of(3) == pytest.approx([0.8, 0.55, 0.55])
    assert Acceptance(lengths=[1.8, 2.3, 2.9]).of(1) == pytest.approx([0.8])
    with pytest.raises(ValueError, match="lengths end at 2 drafts"):
        Acceptance(lengths=[1.8, 2.3]).of(3)
    with pytest.raises(ValueError, match="lengths must be at most 2 with 1 drafts"):
        Acceptance(lengths=[2.3]).of(1)


def test_a_file_holds_one_curve_or_several_by_label() -> None:
    on, off = {"1": 1.83, "2": 2.43}, {"1": 1.8, "2": 2}
    both = {"kimi": {"thinking_on": on, "thinking_off": off}}

    assert curve_in(on, "") == curve_in({"kimi": on}, "") == curve_in({"kimi": on}, "kimi") == [1.83, 2.43]
    assert curve_in(both, "thinking_off") == [1.8, 2]
    assert named_curve("a/b.yaml:thinking_off") == ("a/b.yaml", "thinking_off")
    assert named_curve("C:/b.yaml") == ("C:/b.yaml", "")


@pytest.mark.parametrize(
    ("data", "label", "said"),
    [
        ({"kimi": {"on": {"1": 1.8}, "off": {"1": 1.7}}}, "", "say which as FILE:LABEL (got on, off)"),
        ({"kimi": {"on": {"1": 1.8}}}, "of", "does not hold one curve of (got on)"),
        ({"kimi": 3}, "", "(got none)"),
        ({"1": 1.8, "3": 2.5}, "", "none left out (got those with [1, 3])"),
        ({"1": 1.8, "2": "much"}, "", "a curve must hold numbers by number of drafts (got 2: 'much')"),
        ({"1": 1.8, "note": 2.1}, "", "(got note: 2.1)"),
    ],
)
def test_a_file_without_such_a_curve_is_refused(data: dict[str, Any], label: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        curve_in(data, label)


@pytest.mark.skipif(not TRUTH.exists(), reason="needs the measured curves in ../shared/truth")
@pytest.mark.parametrize("name", CURVES)
def test_shipped_curves_are_those_measured(name: str) -> None:
    file, _, label = name.partition("/")
    data = read(TRUTH / "outside" / "acceptance_lengths" / f"{file}.yaml").data

    assert tuple(curve_in(data, label or "thinking_on")) == CURVES[name]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_keeps_its_length_at_each_number_of_drafts(name: str) -> None:
    for drafts, length in enumerate(CURVES[name], 1):
        shares = Acceptance(curve=name).of(drafts)

        assert 1 + sum(shares) == pytest.approx(length)
        assert list(shares) == sorted(shares, reverse=True)
        assert all(0 <= share <= 1 for share in shares)


def test_what_a_curve_adds_is_pooled_where_it_rises() -> None:
    """1.78, 2.38, 2.83, 3.11, 3.35 …: 0.78, 0.60, 0.45, 0.28, 0.24; of 3.45, 3.53, 3.74: 0.10 and 0.145 twice."""
    shares = Acceptance(curve="minimaxm3_eagle3").of(8)

    assert shares[:5] == pytest.approx([0.78, 0.60, 0.45, 0.28, 0.24])
    assert shares[5:] == pytest.approx([0.13] * 3)


@pytest.mark.parametrize(
    ("told", "drafts", "rule"),
    [
        ({"length": 4.5}, 3, "length must be at most 1 \\+ tokens, 4 \\(got 4.5\\)"),
        ({"synthetic": 3}, 1, "synthetic must be at most"),
        ({"rates": [0.8, 0.5]}, 3, "must have one for each of the 3 drafts"),
        ({"rates": [0.5, 0.6]}, 2, "must not rise"),
        ({"curve": "qwen3.5_mtp"}, 9, "ends at 8 drafts"),
    ],
)
def test_what_cannot_be_is_said(told: dict[str, object], drafts: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Acceptance(**told).of(drafts)  # type: ignore[arg-type]


def test_one_form_is_to_be_given_and_names_are_known() -> None:
    with pytest.raises(ValidationError, match="exactly one of"):
        Acceptance(length=2, synthetic=2)
    with pytest.raises(ValidationError, match="no such curve – did you mean"):
        Acceptance(curve="qwen3.5mtp")


def test_draws_keep_each_draft_as_often_as_said_and_depend_on_nothing_else() -> None:
    shares = (0.8, 0.6, 0.1)
    draws = Draws(shares, 7)
    kept = [draws(request, position, 3) for request in range(200) for position in range(100)]

    for j, share in enumerate(shares, 1):
        assert sum(k >= j for k in kept) / len(kept) == pytest.approx(share, abs=0.01)  # 3 standard errors
    assert [Draws(shares, 7)(5, p, 3) for p in range(50)] == [draws(5, p, 3) for p in range(50)]
    assert [Draws(shares, 8)(5, p, 3) for p in range(50)] != [draws(5, p, 3) for p in range(50)]
    assert all(draws(5, p, 1) == min(1, draws(5, p, 3)) for p in range(50))  # a draft less is one that is not asked
