"""What is checked of a policy once its run is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.command import POLICY, SCENARIO, chairlift, replaced

LIMITED = "    budget: Positive = 2048\n\n    @property\n    def sequence_limit(self) -> int:\n        return {}\n"


@pytest.mark.parametrize(("limit", "status"), [(2, 2), (3, 0)])
def test_a_policy_keeps_the_limit_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, status: int
) -> None:
    """Three requests at once, and a policy that starts whoever fits: their prompts share a step."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(replaced("    budget: Positive = 2048\n", LIMITED.format(limit), POLICY))
    Path("s.yaml").write_text(SCENARIO)
    burst = "workload={requests: 3, arrivals: {burst: {}}, prompt_tokens: 10, output_tokens: 5}"
    result = chairlift("run", "s.yaml", "--policy", "mine.py", "--set", burst)

    assert result.status == status
    if status:
        assert result.err == "error: policy Mine: step 1: a step of 3 requests: its sequence_limit is 2\n"
        assert "a step of" in chairlift("check", "mine.py", "--case", "room").out
