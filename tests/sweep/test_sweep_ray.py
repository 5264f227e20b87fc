"""A sweep on a Ray cluster of two nodes gives the rows that it gives here, also when workers and a node die."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.command import POLICY, SCENARIO, chairlift, replaced
from kit.places import IMPORTS
from kit.sweeping import SWEEP, table, written

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'chairlift[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(IMPORTS), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("RAY_DEDUP_LOGS", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.second = made.add_node(num_cpus=1)
        yield made
        ray.shutdown()
        made.shutdown()


def on_ray(cluster: Any, folder: Path, *arguments: str, ask: tuple[str, str] = ("sweep", "sweep.yaml")) -> str:
    where = ("--out", str(folder), "--executor", "ray", "--address", cluster.address)
    result = chairlift(*ask, *where, *arguments)
    assert result.status == 0, result.err
    return result.out


def here(folder: Path, *arguments: str) -> None:
    result = chairlift("sweep", "sweep.yaml", "--out", str(folder), "--jobs", "2", *arguments)
    assert result.status == 0, result.err


def test_two_nodes_give_the_rows_that_this_machine_gives(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    on_ray(cluster, tmp_path / "ray")
    here(tmp_path / "local")

    assert len(cluster.list_all_nodes()) == 2
    assert table(tmp_path / "ray").equals(table(tmp_path / "local"), check_metadata=True)
    assert "0 new, 12 known" in on_ray(cluster, tmp_path / "ray")


def test_a_plan_has_the_same_answer_on_two_nodes(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(SCENARIO.replace("seed: 7\n", ""))
    (tmp_path / "plan.yaml").write_text(
        "base: base.yaml\nslo: [{percentile: 90, ttft_ms: 300}]\nrate_per_s: 8\n"
        "search: {requests: 200, most_requests: 400}\naxes: {gpu: [h100, a100-80gb], replicas: [1, 2]}\n"
    )
    spread = json.loads(on_ray(cluster, tmp_path / "ray", "--json", ask=("plan", "plan.yaml")))
    here = chairlift("plan", "plan.yaml", "--out", str(tmp_path / "here"), "--jobs", "1", "--json")

    assert spread["cheapest"][0]["winner"] is not None
    assert spread == json.loads(here.out)


def test_files_travel_and_a_worker_that_is_killed_loses_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = "    def schedule(self, step: Step) -> int:\n"
    flag = tmp_path / "killed"
    kill = (
        "        import os\n"
        f"        if self.budget == 2002 and {os.getpid()} not in (os.getpid(), os.getppid()):\n"
        f"            if not os.path.exists({str(flag)!r}):\n"
        f"                open({str(flag)!r}, 'w').close()\n"
        "                os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.py").write_text(POLICY.replace(head, head + kill))
    rows = "".join(f"{i / 4},{20 + i % 90},{1 + i % 7}\n" for i in range(200))
    trace = gzip.compress(b"arrival_s,prompt_tokens,output_tokens\n" + rows.encode())
    (tmp_path / "deep" / "trace.csv.gz").write_bytes(trace)
    base = replaced("policy: {name: vllm}", "policy: {name: 'deep/mine.py:Mine'}").partition("workload:")[0]
    sweep = "base: base.yaml\nseeds: 2\naxes: {policy.budget: [2000, 2001, 2002, 2003]}\n"
    written(tmp_path, sweep, base + "workload: {file: deep/trace.csv.gz}\n")
    on_ray(cluster, tmp_path / "ray", "--trust")

    assert flag.exists()
    here(tmp_path / "local", "--trust")
    assert table(tmp_path / "ray").equals(table(tmp_path / "local"), check_metadata=True)


def test_folders_and_files_of_one_name_travel(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, length in (("small", 10), ("large", 90)):
        (tmp_path / folder / "clients").mkdir(parents=True)
        (tmp_path / folder / "clients" / "chunk-0-trace.csv").write_text("0,2,1,Gamma,1,0.5\n600,2,1,Gamma,1,0.5\n")
        lengths = {"0": {"input_tokens": f"{{{length}: 1.0}}", "output_tokens": "{5: 1.0}"}}
        (tmp_path / folder / "clients" / "chunk-0-dataset.json").write_text(json.dumps(lengths))
    clients = "".join(f"{f}: {{servegen: {{file: {f}/clients}}, requests: 20}}, " for f in ("small", "large"))
    base = SCENARIO.partition("workload:")[0] + f"workload: {{mix: {{{clients}}}}}\n"
    written(tmp_path, "base: base.yaml\nseeds: 2\n", base)
    on_ray(cluster, tmp_path / "ray")

    assert [row["total_input_tokens"] for row in table(tmp_path / "ray").to_pylist()] == [2000, 2000]
    here(tmp_path / "local")
    assert table(tmp_path / "ray").equals(table(tmp_path / "local"), check_metadata=True)


def test_a_node_that_dies_in_mid_sweep_loses_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chairlift.sim.cli import sweep as cli_sweep

    monkeypatch.chdir(tmp_path)
    written(tmp_path, SWEEP.replace("seeds: 3", "seeds: 10"), SCENARIO.replace("requests: 30", "requests: 500"))
    real = cli_sweep.results
    count = 0

    def watched(*arguments: Any) -> Any:
        nonlocal count
        for found in real(*arguments):
            count += 1
            if count == 6:
                cluster.remove_node(cluster.second, allow_graceful=False)
            yield found

    monkeypatch.setattr(cli_sweep, "results", watched)
    on_ray(cluster, tmp_path / "ray")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    assert count == 40
    here(tmp_path / "local")
    assert table(tmp_path / "ray").equals(table(tmp_path / "local"), check_metadata=True)


def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "")
    written(tmp_path)
    monkeypatch.setattr(ray, "init", _nowhere)
    result = chairlift("sweep", "sweep.yaml", "--out", "out", "--executor", "ray")

    assert result.status == 2
    assert "--address: no Ray cluster there" in result.err
    assert "ray start --head" in result.err


def _nowhere(**_: Any) -> None:
    raise ConnectionError("Could not find any running Ray instance")
