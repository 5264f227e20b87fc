"""The comparison with a peer: what it runs, what it counts, and what it says when the peer fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chairlift.sim.cli import peers


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SIZES", (20, 60))


def command(folder: Path, body: str) -> Path:
    """A command that stands for the peer's."""
    path = folder / "aisimulate"
    path.write_text(f"#!{sys.executable}\nimport sys, time\nargs = sys.argv\n{body}\n")
    path.chmod(0o755)
    return path


def test_both_get_the_same_requests_and_their_cpu_time_is_told(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = (
        "import yaml\n"
        "config = yaml.safe_load(open(args[args.index('-c') + 1]))\n"
        "[path] = config['traffic']['source']['paths']\n"
        "rows = len(open(path).readlines())\n"
        "assert config['traffic']['source']['format'] == 'mooncake'\n"
        "while time.process_time() < 0.01 * rows: pass\n"  # 10 ms a request: 0.2 s and 0.6 s in all
    )

    assert peers.main(["--aisimulate", str(command(tmp_path, body)), "--times", "1"]) == 0

    [ours, theirs] = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] != [""]][-2:]
    assert ours[0] == "Chairlift"
    assert theirs[0] == "AISimulate"
    least, most, each_us, rate = (float(cell.replace(",", "")) for cell in theirs[1:])
    assert 0.2 <= least < most
    assert each_us == pytest.approx((most - least) / 40 * 1e6, rel=0.1)
    assert rate == pytest.approx(1e6 / each_us, rel=0.02)


def test_a_peer_that_fails_is_told_with_its_last_words(small: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"aisimulate failed: no such model"):
        peers.main(["--aisimulate", str(command(tmp_path, "sys.exit('no such model')")), "--times", "1"])
