"""What one run leaves behind: what tables, reports, recordings and result folders are made from.

A script or a notebook takes its rows as a table: `Outcome.to_arrow`, `Outcome.to_pandas`. `chairlift.sim.report.plots`
draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from chairlift.sim.results.reader import RunResults, of_run
from chairlift.sim.results.records import RequestRecords, RunRecords
from chairlift.sim.results.run_tables import extra_of, labels_of, replica_table, request_table, run_facts
from chairlift.sim.study import Setup

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("requests", "steps", "events")


@dataclass(repr=False)
class Outcome:
    """What one run left behind; `simulate` makes it.

    >>> from chairlift import load, simulate
    >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
    >>> outcome
    <Outcome of vllm: 300 requests completed>
    >>> outcome.summary["failed"]
    0
    """

    setup: Setup
    requests: RequestRecords
    runs: list[RunRecords]  # one a replica
    summary: dict[str, Any]  # the metrics of ``summary.json``, by their names there
    assumptions: dict[str, str]
    engine: dict[str, str] = field(default_factory=dict)  # of an executed run: the GPU and the software
    up_ps: list[int] = field(default_factory=list)  # how long each replica was up, and paid for

    def __repr__(self) -> str:
        label = " / ".join(filter(None, (self.setup.case, self.setup.variant)))
        return f"<Outcome{f' of {label}' * bool(label)}: {self.summary['completed']:,} requests completed>"

    def to_arrow(self, rows: str = "requests") -> pa.Table:
        """The ``rows`` of the run: "requests", "steps" or "events", with the columns of the Parquet files.

        A row of "requests" is a request, in the order of the trace: lengths in tokens, times in ps (``arrival_ps``,
        ``first_token_ps``, …; null where it did not happen), latencies in ms (``ttft_ms``, ``tpot_ms``, ``e2el_ms``;
        null where it was not completed). A row of "steps" is a run of equal engine steps of one replica. "events" are
        what happened to the requests, if the run kept a journal: ``simulate(setup, journal=True)``.

        Raises ValueError: no such rows, or no journal.

        >>> import pyarrow.compute as pc
        >>> from chairlift import load, simulate
        >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
        >>> requests = outcome.to_arrow()
        >>> requests.num_rows, requests["status"][0].as_py()
        (300, 'finished')
        >>> pc.sum(requests["emitted_tokens"]).as_py() == outcome.summary["total_output_tokens"]
        True
        """
        if rows == "requests":
            return request_table(self.requests, {}, extra_of([self.setup]), labels_of(self.setup))
        if rows == "steps":
            return replica_table(self.runs, {}, RunRecords.run_parts)
        if rows != "events":
            raise ValueError(f"no such rows: {rows!r}; there are {', '.join(TABLES)}")
        if not any(each.event_rows for each in self.runs):
            raise ValueError("this run kept no events: simulate(setup, journal=True) does")
        return replica_table(self.runs, {}, RunRecords.event_parts)

    def to_pandas(self, rows: str = "requests") -> pd.DataFrame:
        """`to_arrow` as a data frame.

        Raises ValueError as there, and ImportError without pandas, which ``pip install 'chairlift[notebook]'`` brings.

        >>> from chairlift import load, simulate
        >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
        >>> frame = outcome.to_pandas()
        >>> bool(abs(frame.ttft_ms.mean() - outcome.summary["mean_ttft_ms"]) < 1e-6)
        True
        >>> bool((frame.groupby("replica").size() > 0).all())  # both replicas served requests
        True
        """
        table = self.to_arrow(rows)
        try:
            import pandas  # noqa: F401 - named here, so that the message can say how to get it
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install 'chairlift[notebook]'") from None
        return table.to_pandas()

    def as_read(self) -> RunResults:
        """The run as `reader.read` gives one of a results folder: what reports are drawn from."""
        journal = any(each.event_rows for each in self.runs)
        tables = {name: self.to_arrow(name) for name in TABLES if name != "events" or journal}
        return of_run(tables, run_facts(self.setup, self.runs), self.summary)
