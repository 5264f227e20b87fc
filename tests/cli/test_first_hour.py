"""What somebody meets in the first hour: names, help, and messages that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.cli import completion
from chairlift.sim.cli.shipped import SCENARIOS, complete, shipped
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.command import SCENARIO, chairlift

TWO = SCENARIO + "compare: [{name: a, policy: vllm}, {name: b, policy: orca}]\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SCENARIO)


@pytest.mark.parametrize("name", ["routing", "policy_zoo", "research/policy_zoo", "chat_knee", "n_plus_one"])
def test_show_prints_the_file_with_its_comments(name: str) -> None:
    [path] = SCENARIOS.rglob(f"{name.rpartition('/')[2]}.yaml")

    assert chairlift("show", name).out == path.read_text()


@pytest.mark.parametrize("name", ["anyscale_23x", "anyscale_latency", "routing", "policy_zoo"])
def test_new_begins_with_a_copy_that_is_the_same_study(name: str) -> None:
    (Path("deep") / "er").mkdir(parents=True)
    made = chairlift("new", "deep/er/my.yaml", "--from", name)

    assert (made.status, made.err) == (0, "")
    assert "next: chairlift run deep/er/my.yaml" in made.out
    original, copy = (next(p for full, p in shipped().items() if full.endswith(name)), Path("deep/er/my.yaml"))
    said = [line for line in original.read_text().splitlines() if "#" in line]
    assert [line for line in said if line not in copy.read_text().splitlines()] == []
    ours, theirs = load(copy), load(original)
    assert [(s.case, s.variant, s.trace.prompt_tokens.tolist()) for s in ours.setups] == [
        (s.case, s.variant, s.trace.prompt_tokens.tolist()) for s in theirs.setups
    ]


def test_a_run_of_a_copy_lies_beside_the_originals() -> None:
    assert chairlift("new", "mine.yaml", "--from", "routing").status == 0
    assert chairlift("run", "mine.yaml", "--quiet", "--set", "workload.requests=9").status == 0

    assert [path.name for path in Path("runs").iterdir()] == ["mine"]


def test_new_says_which_command_runs_it() -> None:
    assert "next: chairlift sweep a.yaml" in chairlift("new", "a.yaml", "--from", "chat_knee").out
    assert "next: chairlift plan b.yaml" in chairlift("new", "b.yaml", "--from", "n_plus_one").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "small.yaml", "--from", "routing"], "small.yaml: is there already: choose another name"),
        (["list"], "list: say of what – allowed: backends, formats, gpus, models, plans, policies, routers,"),
        (["new", "a.txt", "--from", "routing"], "FILE: must end in .yaml (got 'a.txt')"),
        (["new", "no/where.yaml", "--from", "routing"], "no/where.yaml: cannot be written: No such file or directory"),
        (["new", "a.yaml", "--from", "routin"], "did you mean 'routing'?"),
        (["show", "chat_kne"], "did you mean 'chat_knee'?"),
        (["run", "small.yaml", "--set", "model=qwen3-30b-a3x-7b"], "known: "),
        (["run", "small.yaml", "--set", "model=llama-3.1-8"], "did you mean 'llama-3.1-8b'?"),
        (["run", "sweep.yaml"], "sweep.yaml:1: base: is a key of sweeps and plans, not of scenarios: run this file"),
        (["run", "sweep.yaml"], "with chairlift sweep"),
        (["run", "plan.yaml"], "run this file with chairlift plan"),
        (["sweep", "small.yaml"], "workload: is a key of scenarios: run this file with chairlift run, or name"),
        (["plan", "small.yaml"], "run this file with chairlift run, or name it as the base of a plan"),
        (["sweep", "plan.yaml"], "plan.yaml:2: slo: is a key of plans: run this file with chairlift plan"),
        (["plan", "seeds.yaml"], "seeds.yaml:2: seeds: is a key of sweeps: run this file with chairlift sweep"),
        (["sweep", "on_sweep.yaml"], "sweep.yaml:1: base: is a key of sweeps and plans, not of scenarios"),
        (["sweep", "on_folder.yaml"], "kept: is a folder, not a file"),
        (["run", "bare.yaml", "--router", "round_robin"], "policy: is required: --router takes the place of compare"),
    ],
)  # fmt: skip
def test_messages_say_what_to_do(arguments: list[str], said: str) -> None:
    Path("sweep.yaml").write_text("base: small.yaml\naxes: {seed: [1]}\n")
    Path("plan.yaml").write_text("base: small.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\n")
    Path("seeds.yaml").write_text("base: small.yaml\nseeds: 3\naxes: {gpu: [l4]}\n")
    Path("on_sweep.yaml").write_text("base: sweep.yaml\naxes: {gpu: [l4]}\n")
    Path("on_folder.yaml").write_text("base: kept\naxes: {gpu: [l4]}\n")
    Path("kept").mkdir()
    Path("bare.yaml").write_text(TWO.replace("policy: {name: vllm}\n", ""))
    result = chairlift(*arguments)

    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert Path("small.yaml").read_text() == SCENARIO


def test_a_setting_may_be_set_where_the_policy_is_a_bare_name() -> None:
    Path("bare.yaml").write_text(SCENARIO.replace("{name: vllm}", "vllm"))
    [setup] = load(Path("bare.yaml"), ["policy.max_num_seqs=3"]).setups

    assert setup.groups[0].scheduler_settings["max_num_seqs"] == 3


def test_backends_are_listed_with_their_settings() -> None:
    told = chairlift("list", "backends").out

    assert "mfu: float = 0.55" in told
    assert "profile: str" in told


def test_explain_report_and_compare_take_the_name_of_a_run() -> None:
    chairlift("run", "small.yaml", "-q")

    assert chairlift("explain", "1", "--in", "small").out == chairlift("explain", "1", "--in", "runs/small").out != ""
    assert chairlift("report", "small").status == 0
    assert Path("runs/small/report.html").is_file()


def test_a_run_without_a_journal_is_named() -> None:
    chairlift("run", "small.yaml", "-q", "--no-events")

    assert "the run: kept no journal" in chairlift("explain", "1", "--in", "small").err


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (("--policy", "vllm", "--set", "policy.max_num_seqs=3"), "max_num_seqs", 3),
        (("--set", "policy.max_num_seqs=3", "--policy", "vllm"), "max_num_seqs", 3),
        (("--policy", "vllm", "--router", "least_outstanding", "--set", "policy.max_num_seqs=3"), "max_num_seqs", 3),
    ],
)
def test_set_changes_a_setting_of_the_policy_that_an_option_names(
    options: tuple[str, ...], key: str, value: int
) -> None:
    Path("two.yaml").write_text(TWO.replace("{name: vllm}", "orca"))
    assert chairlift("run", "two.yaml", *options, "-q").status == 0
    [setup] = load(Path("runs/two/scenario.yaml")).setups  # what ran

    assert setup.groups[0].scheduler_settings[key] == value
    assert setup.groups[0].scheduler.__name__ == "Vllm"


def test_a_setting_of_one_policy_holds_beside_several_routers() -> None:
    options = (
        "--policy",
        "vllm",
        "--router",
        "least_outstanding",
        "--router",
        "round_robin",
        "--set",
        "policy.max_num_seqs=3",
    )
    assert chairlift("run", "small.yaml", *options, "-q").status == 0
    setups = load(Path("runs/small/scenario.yaml")).setups

    assert [(s.variant, s.router.__name__) for s in setups] == [
        ("vllm least_outstanding", "LeastOutstanding"),
        ("vllm round_robin", "RoundRobin"),
    ]
    assert {s.groups[0].scheduler_settings["max_num_seqs"] for s in setups} == {3}


def test_set_changes_a_setting_of_the_backend_that_an_option_names() -> None:
    result = chairlift("run", "small.yaml", "--backend", "roofline", "--set", "backend.mfu=0.25")

    assert "MFU 0.25" in result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--set", "policy.max_num_seqs=3"),
            "has no effect: every variant of compare says its own policy; set compare.0.",
        ),
        (("--set", "policy=orca"), "--set policy=orca: has no effect: every variant of compare says its own policy"),
        (("--policy", "vllm", "--set", "policy=orca"), "must not be given beside --policy: each says the policy"),
        (("--policy", "vllm", "--policy", "tgi", "--set", "policy.x=1"), "must not be given beside several --policy"),
        (("--policy", "vllm", "--set", "compare.0.policy=tgi"), "must not be given beside --policy or --router"),
        (("--backend", "roofline", "--set", "backend=roofline"), "must not be given beside --backend: each says the"),
        (("--set", "cases=[{name: x, set: {policy: tgi}}]"), "cases.0.set.policy: has no effect: every variant of"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: tuple[str, ...], said: str) -> None:
    Path("two.yaml").write_text(TWO)
    result = chairlift("run", "two.yaml", *options)

    assert (result.status, result.out) == (2, "")
    assert said in result.err


def test_a_sweep_whose_base_lacks_a_policy_is_refused_at_once() -> None:
    Path("bare.yaml").write_text(TWO.replace("policy: {name: vllm}\n", ""))
    Path("w.yaml").write_text("base: bare.yaml\nset: {compare: []}\nseeds: 2\naxes: {workload.requests: [3, 4]}\n")
    result = chairlift("sweep", "w.yaml", "-j1")

    assert result.status == 2
    assert "policy: is required" in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        (
            "sweep",
            "policy.max_num_seqs=8",
            "--set policy.max_num_seqs=8: has no effect: policy is an axis, and its values",
        ),
        ("sweep", "workload.requests=8", "--set workload.requests=8: has no effect: workload.requests is an axis"),
        ("sweep", "gpu=l4", ""),  # what no axis says may be set
        ("plan", "gpu=l4", "--set gpu=l4: has no effect: gpu is an axis, and its values take this one's place"),
        ("plan", "policy.max_num_seqs=8", ""),
    ],
)
def test_what_an_axis_says_cannot_be_set(command: str, option: str, said: str) -> None:
    Path("w.yaml").write_text("base: small.yaml\naxes: {policy: [vllm, orca], workload.requests: [3, 4]}\n")
    Path("base.yaml").write_text(SCENARIO.replace("seed: 7\n", ""))
    Path("p.yaml").write_text(
        "base: base.yaml\nslo: [{percentile: 90, ttft_ms: 900}]\naxes: {gpu: [h100, a100-40gb]}\nrate_per_s: 1\n"
    )
    result = chairlift(command, "w.yaml" if command == "sweep" else "p.yaml", "--set", option, "--dry-run")

    assert result.status == (2 if said else 0), result.err
    assert said in result.err


def test_a_sweep_that_sets_what_its_axis_says_is_told() -> None:
    Path("w.yaml").write_text("base: small.yaml\nset: {gpu: l4}\naxes: {gpu: [h100, a100-40gb]}\n")

    assert "w.yaml:2: set.gpu: has no effect: gpu is an axis" in chairlift("sweep", "w.yaml", "--dry-run").err


def test_a_command_that_is_given_anothers_results_says_which_one_shows_them() -> None:
    chairlift("run", "small.yaml", "-q")
    chairlift("run", "small.yaml", "--policy", "vllm", "--policy", "orca", "--out", "runs/several", "-q")
    Path("w.yaml").write_text("base: small.yaml\naxes: {policy: [vllm, orca]}\n")
    chairlift("sweep", "w.yaml", "-q", "-j", "1")
    Path("runs/p").mkdir()
    Path("runs/p/plan.json").write_text("{}")  # to make one takes a quarter of a minute

    one = "holds one run: chairlift report runs/small shows it"
    several = "holds several runs: chairlift report runs/several shows them"
    sweep = "holds a sweep: chairlift compare runs/w shows it"
    plan = "holds a plan: chairlift plan showed it, and its page is runs/p/plan.html"
    for command, folder, told in [
        *(("compare", "small", one), ("compare", "several", several), ("compare", "p", plan)),
        *(("agree runs/several", "small", one), ("agree", "w runs/several", sweep), ("agree runs/several", "p", plan)),
        *(("report", "w", sweep), ("report", "p", plan), ("explain 0 --in", "w", sweep)),
    ]:
        result = chairlift(*f"{command} {folder}".split())
        assert (result.status, result.err) == (2, f"error: runs/{folder.split()[0]}: {told}\n"), command


def test_names_and_keys_are_completed() -> None:
    assert complete("policy_z") == ["policy_zoo"]
    assert completion.policies("vl") == ["vllm", "vllm_v0"]
    assert completion.routers("round") == ["round_robin"]
    assert "h200-llama-3.1-8b-vllm-0.23" in completion.backends("h200")
    assert completion.keys("workload.rate") == ["workload.rate_per_s="]
    assert completion.keys("slo.t") == ["slo.ttft_ms=", "slo.tpot_ms="]


def test_doctor_says_what_there_is_and_checks_it() -> None:
    told = chairlift("doctor")

    assert told.status == 0
    for words in ("chairlift", "python", "numpy", "torch", "GPUs", "check passed: 2,000 requests"):
        assert words in told.out


def test_doctor_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(setup: Any, leap: bool = True) -> Any:
        outcome = simulate(setup, leap=leap)
        if not leap:
            outcome.requests.finished[3] += 1
        return outcome

    monkeypatch.setattr("chairlift.sim.cli.doctor.simulate", other)
    told = chairlift("doctor")

    assert told.status == 1
    assert "differ in finished_ps" in told.out
