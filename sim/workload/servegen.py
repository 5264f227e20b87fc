"""ServeGen: requests drawn from the measured behaviour of single clients of Alibaba's model service.

github.com/alibaba/ServeGen, data/<kind>/<model>/; Xiang et al., *ServeGen*, arXiv:2505.09999. Every client has two
files. ``chunk-N-trace.csv`` has a row a window of time: its start (s), rate (1/s), CV of the gaps, their family (Gamma
or Weibull), shape and scale. ``chunk-N-dataset.json`` has distributions of lengths, each with the time (s) from which
on it holds.

Here a client is a renewal process. Its gaps have the family and the shape of the window. The process is in equilibrium
at the start, and the client's rate drives its clock: a burst goes on across the border of two windows, and the mean
rates are those of the file.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chairlift.backend.checked import a_file, once, text_of
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, reading
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.strict import Spec
from chairlift.sim.workload.trace import IntArray, Trace

Floats = npt.NDArray[np.float64]

MOST_TOKENS = 2**31 - 1  # of a request
MOST_MEMBERS = 1 << 30  # bytes of all clients' files: ServeGen's largest model has a tenth of that

_MEMBER = re.compile(r"(?:.*/)?(chunk-\d{1,9})-(trace\.csv|dataset\.json)")
_PAIR = re.compile(r"(\d+): *([0-9.eE+-]+)")
_PROMPT = ("input_tokens", "text_tokens")  # fields of language models, of multimodal models
_ANSWER = "output_tokens"
_MEDIA = ("image", "audio", "video")
_READ = {*_PROMPT, _ANSWER, *(f"{medium}_{what}" for medium in _MEDIA for what in ("count", "tokens"))}
_KNOWN = {*_READ, "reason_ratio"}  # all fields of the published datasets; the last is a share, and changes no length


@dataclass
class Client:
    """What one client does, window by window. Shape of the arrays: ``(windows,)``."""

    name: str
    start_s: Floats
    rate: Floats
    weibull: npt.NDArray[np.bool_]
    shape: Floats
    lengths: dict[int, dict[str, str]] = field(default_factory=dict)  # from when on (s) → field → distribution as text

    def drawn(self, what: str, at_s: float, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` values of the field ``what`` of the dataset, as it is at ``at_s``; zeros if it has no such field."""
        begun = [start for start in self.lengths if start <= at_s] or list(self.lengths)
        text = self.lengths[max(begun)].get(what, "")
        pairs = _pairs(text)
        if pairs is None:
            return np.zeros(n, np.int64)
        values, edges = pairs
        found: IntArray = values[np.searchsorted(edges, rng.random(n) * edges[-1], side="right")]
        return found


class ServeGen(Spec):
    """Requests drawn from a table of clients; ``rate_per_s`` scales the rates of all, and windows stay as they are."""

    file: Annotated[str, Field(min_length=1)] = Field(
        description="A model's folder of chunk files, or a tar archive of it; relative to the scenario's folder."
    )
    start_s: float = Field(default=0, ge=0, le=9e6, description="Begin so many seconds into the recording.")
    clients: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only so many clients, the largest; null: all."
    )

    def files(self, folder: Path) -> list[Path]:
        """The files that `draw` reads: the archive, or the files of clients in the folder."""
        return _files(folder / self.file)

    def draw(self, n: int, seed: int, folder: Path, rate_per_s: float | None = None) -> Trace:
        """``n`` requests. Each client is a tenant and has random streams of its own.

        Args:
            n: how many requests.
            seed: of the random streams.
            folder: where a relative path starts.
            rate_per_s: the mean rate of all clients together, to which their rates are scaled; the windows stay as
                long as they are. None: the rates of the file.

        Raises:
            BadInput: the file is wrong, or its clients send fewer requests until the recording ends.
        """
        path = folder / self.file
        found = _clients(path, *_stamp(path))
        known = [client for client in found if client.lengths]
        notes = [f"{len(found) - len(known)} clients left out: no lengths of theirs"] * (len(known) < len(found))
        known = sorted(known, key=lambda client: -client.rate.sum())[: self.clients]
        width = float(known[0].start_s[1] - known[0].start_s[0]) if known and len(known[0].start_s) > 1 else 600.0
        rates = [client.rate[client.start_s + width > self.start_s] for client in known]
        windows = max(map(len, rates), default=0)
        mean = sum(float(rate.sum()) for rate in rates) / windows if windows else 0.0
        if mean == 0:
            raise BadInput(Problem("no client sends anything from then on", str(path), path="servegen.start_s"))
        scale = 1.0 if rate_per_s is None else rate_per_s / mean
        if rate_per_s is not None:
            notes.append(f"rates of all clients times {scale:.4g}")
        players = [_Player(client, seed, scale) for client in known]
        count, parts = 0, []
        for start in sorted({float(s) for client in known for s in client.start_s if s + width > self.start_s}):
            for number, player in enumerate(players):
                times, prompts, outputs = player.window(start, width, max(start, self.start_s))
                parts.append((times - self.start_s, prompts, outputs, np.full(len(times), number)))
                count += len(times)
            if count >= n:
                break
        if count < n:
            rule = f"the clients send only about {count:,} requests until the end of the recording"
            raise BadInput(Problem(rule, str(path), path="requests", value=n))
        times, prompts, outputs, tenant = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(times, kind="stable")[:n]
        return Trace(
            arrival_ps=np.rint(times[order] * PS_PER_S).astype(np.int64),
            prompt_tokens=np.maximum(prompts[order], 1),
            output_tokens=np.maximum(outputs[order], 1),
            tenant=tenant[order],
            tenants=tuple(client.name for client in known),
            source=f"ServeGen clients of {path.name} (github.com/alibaba/ServeGen, arXiv:2505.09999; Apache-2.0)",
            notes=tuple(notes),
        )


class _Player:
    """A client as it sends requests. Between windows it remembers how many mean gaps its next request is away."""

    def __init__(self, client: Client, seed: int, scale: float) -> None:
        self.client = client
        self.scale = scale
        self._gaps = stream(seed, f"gaps of {client.name}")
        self._lengths = stream(seed, f"lengths of {client.name}")
        self._next: float | None = None

    def window(self, start: float, width: float, begin: float) -> tuple[Floats, IntArray, IntArray]:
        """Times (s), prompts and outputs of the requests sent from ``begin`` to the end of the window.

        The window starts at ``start`` and lasts ``width``, all in seconds.
        """
        client = self.client
        i = int(np.searchsorted(client.start_s, start))
        if i == len(client.start_s) or client.start_s[i] != start or client.rate[i] == 0:
            return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
        rate = float(client.rate[i]) * self.scale
        shape, weibull = float(client.shape[i]), bool(client.weibull[i])
        if self._next is None:
            self._next = _residual(shape, weibull, self._gaps)
        mass = rate * (start + width - begin)  # mean gaps that pass until the window ends
        at = [np.array([self._next])]
        while at[-1][-1] < mass:
            more = int((mass - at[-1][-1]) * 1.1) + 16
            at.append(at[-1][-1] + np.cumsum(_gaps(shape, weibull, more, self._gaps)))
        arrivals = np.concatenate(at)
        inside = arrivals < mass
        self._next = float(arrivals[~inside][0] - mass)
        n = int(inside.sum())
        rng = self._lengths
        prompts = np.zeros(n, np.int64)
        for what in _PROMPT:
            prompts += client.drawn(what, start, n, rng)
        for medium in _MEDIA:
            prompts += client.drawn(f"{medium}_count", start, n, rng) * client.drawn(f"{medium}_tokens", start, n, rng)
        return begin + arrivals[inside] / rate, prompts, client.drawn(_ANSWER, start, n, rng)


def _gaps(shape: float, weibull: bool, n: int, rng: np.random.Generator) -> Floats:
    """``n`` gaps of mean 1."""
    if weibull:
        return rng.weibull(shape, n) / math.gamma(1 + 1 / shape)
    return rng.gamma(shape, 1 / shape, n)


def _residual(shape: float, weibull: bool, rng: np.random.Generator) -> float:
    """The time to the first request of a process in equilibrium, in mean gaps.

    A process in equilibrium is met in a gap that is drawn in proportion to its length, at a uniform place of it.
    """
    if weibull:
        gap = rng.gamma(1 + 1 / shape) ** (1 / shape) / math.gamma(1 + 1 / shape)
    else:
        gap = rng.gamma(shape + 1) / shape
    return float(gap * rng.random())


# ---- reading ----


def _files(path: Path) -> list[Path]:
    """The files of clients in the folder ``path``, by name; or ``path`` itself, if it is no folder."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.glob("chunk-*") if _MEMBER.fullmatch(each.name))


def _stamp(path: Path) -> tuple[int, int]:
    """When one of the files last changed (ns), and their size together (bytes)."""
    stats = []
    for each in _files(path):
        with reading(each):
            stats.append(a_file(each).stat())
    return max((stat.st_mtime_ns for stat in stats), default=0), sum(stat.st_size for stat in stats)


@lru_cache(maxsize=4)
def _clients(path: Path, _mtime_ns: int, _size: int) -> list[Client]:
    """All clients in the folder or archive, in order of their numbers. The stamp tells a file that has changed."""
    texts: dict[str, dict[str, str]] = {}
    try:
        for name, text in _members(path):
            if found := _MEMBER.fullmatch(name):
                texts.setdefault(found[1], {})[found[2]] = text
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise BadInput(Problem(f"not a readable archive or folder: {error}", str(path), path="servegen.file")) from None
    chunks = {name: files for name, files in texts.items() if "trace.csv" in files}
    if not chunks:
        rule = "holds no chunk-N-trace.csv: name the folder of one model, or an archive of it"
        raise BadInput(Problem(rule, str(path), path="servegen.file"))
    if not any("dataset.json" in files for files in chunks.values()):
        raise BadInput(Problem("holds no chunk-N-dataset.json", str(path), path="servegen.file"))
    names = sorted(chunks, key=lambda name: int(name.partition("-")[2]))
    return [_client(f"{path}/{name}", name, chunks[name]) for name in names]


def _members(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each file of a client."""
    left = MOST_MEMBERS
    if path.is_dir():
        for each in _files(path):
            with reading(each):
                left -= a_file(each, left).stat().st_size
                text = text_of(each)
            yield each.name, text
        return
    with tarfile.open(a_file(path)) as archive:
        for member in archive:
            file = archive.extractfile(member) if _MEMBER.fullmatch(member.name) else None
            if file is not None:
                if (left := left - member.size) < 0:
                    raise OSError(f"its clients' files are longer than {MOST_MEMBERS:,} bytes")
                with reading(path / member.name):
                    text = file.read().decode("utf-8-sig")
                yield member.name, text


def _client(file: str, name: str, texts: dict[str, str]) -> Client:
    """The client of these texts; ``file`` is how messages begin the names of its files."""
    rows: list[tuple[float, float, str, float]] = []
    for line, text in enumerate(texts["trace.csv"].splitlines(), 1):
        cells = text.split(",")
        try:
            start, rate, family, shape = float(cells[0]), float(cells[1]), cells[3], float(cells[4])
            if family not in ("Gamma", "Weibull", "") or not (rate >= 0 and math.isfinite(rate + start)):
                raise ValueError
            if rate > 0 and not (shape > 0 and math.isfinite(shape)):
                shape = 1.0 if not family else shape
                if shape <= 0:
                    raise ValueError
        except (ValueError, IndexError):
            rule = "must be a window's start, rate, CV, Gamma or Weibull, shape and scale"
            raise BadInput(Problem(rule, f"{file}-trace.csv", line, value=text)) from None
        rows.append((start, rate, family, shape))
    lengths: dict[int, dict[str, str]] = {}
    if "dataset.json" in texts:
        try:
            data = json.loads(texts["dataset.json"], object_pairs_hook=once)
            lengths = {int(float(start)): dict(fields) for start, fields in data.items()}
            for start, fields in lengths.items():
                _check_fields(start, fields)
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise BadInput(Problem(f"not a dataset of ServeGen's: {error}", f"{file}-dataset.json")) from None
    columns: Sequence[Any] = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return Client(
        name,
        np.array(columns[0], float),
        np.array(columns[1], float),
        np.array([family == "Weibull" for family in columns[2]], bool),
        np.array(columns[3], float),
        lengths,
    )


def _check_fields(start: int, fields: dict[str, Any]) -> None:
    """Raise ValueError unless all fields are known, the needed ones there, and their texts distributions."""
    if unknown := [column for column in fields if column not in _KNOWN]:
        raise ValueError(f"{start}: {unknown[0]} is unknown{did_you_mean(unknown[0], sorted(_KNOWN))}")
    if _ANSWER not in fields or not any(column in fields for column in _PROMPT):
        raise ValueError(f"{start}: needs {_ANSWER}, and {' or '.join(_PROMPT)}")
    for medium in _MEDIA:
        if (f"{medium}_count" in fields) != (f"{medium}_tokens" in fields):
            raise ValueError(f"{start}: needs both of {medium}_count and {medium}_tokens, or none")
    for column, text in fields.items():
        if not isinstance(text, str):
            raise ValueError(f"{start}: {column} must be text like '{{45: 0.01}}'")
        if column in _READ:
            _pairs(text)


@lru_cache(maxsize=4096)
def _pairs(text: str) -> tuple[IntArray, Floats] | None:
    """The values and cumulative weights of a text like ``{45: 0.01, 46: 0.02}``; None if it has none."""
    found = _PAIR.findall(text)
    if not found:
        return None
    values = np.array([int(value) for value, _ in found], np.int64)
    edges = np.cumsum([float(weight) for _, weight in found])
    if not (values <= MOST_TOKENS).all() or not 0 < edges[-1] < math.inf:
        raise ValueError(f"numbers must be at most {MOST_TOKENS:,}, and weights above 0: {text[:40]}")
    return values, edges
