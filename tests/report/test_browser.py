"""Report pages in a real browser: nothing overlaps, no figure is empty, the console is silent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.report.slots import seat
from chairlift.sim.results import reader as results
from kit.command import SCENARIO, chairlift
from kit.places import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

LOOKS = {"light": (1240, "light"), "dark": (1240, "dark"), "narrow": (390, "light")}

OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll('main > *, section > *, .pair > *, .triple > *, .cards > *')]
    .filter((e) => e.offsetParent && !e.querySelector(':scope > section'));
  const found = [];
  for (const a of boxes) for (const b of boxes) {
    if (a === b || a.contains(b) || b.contains(a) || a.parentElement !== b.parentElement) continue;
    const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 1) found.push(`${a.className} / ${b.className}`);
  }
  return found;
}"""
OUTSIDE = """() => [...document.querySelectorAll('.cards dd, .cards dt, h3, .legend li, button')]
  .filter((e) => e.offsetParent)
  .filter((e) => {
    const card = e.closest('.card, main').getBoundingClientRect(), box = e.getBoundingClientRect();
    return box.right > card.right + 1 || box.left < card.left - 1;
  }).map((e) => e.textContent)"""
FIGURES = """() => [...document.querySelectorAll('.figure')].filter((e) => e.offsetParent).map((e) => ({
  name: e.dataset.figure || 'slots',
  marks: e.querySelectorAll('.trace path, .points path, .heatmaplayer image, .barlayer path').length,
  width: e.querySelector('.main-svg') ? e.querySelector('.main-svg').getBoundingClientRect().width : 0,
  room: e.clientWidth,
}))"""
LABELS = """() => [...document.querySelectorAll('.figure')].filter((e) => e.offsetParent).flatMap((figure) => {
  const found = [];
  for (const axis of ['.xaxislayer-above', '.yaxislayer-above']) figure.querySelectorAll(axis).forEach((layer) => {
    const boxes = [...layer.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, p] = boxes[i], [b, q] = boxes[j];
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 1) found.push(`${figure.dataset.figure}: ${a} / ${b}`);
    }
  });
  return found;
})"""
CLIPPED = """() => [...document.querySelectorAll(
    '.bartext, .annotation-text, .xtick text, .ytick text, .xtitle, .ytitle')]
  .filter((t) => t.closest('.figure').offsetParent && t.textContent)
  .filter((t) => {
    const box = t.getBoundingClientRect(), room = t.closest('.figure').getBoundingClientRect();
    const wide = box.left < room.left - 1 || box.right > room.right + 1;
    return wide || box.top < room.top - 1 || box.bottom > room.bottom + 1;
  }).map((t) => t.textContent)"""
GRID = """([run, replica]) => {
  const replay = new Replay(report.slots[run][replica]);
  const lines = Array.from({length: replay.slots}, () => new Array(replay.cumulative[replay.n]).fill('.'));
  SlotView.prototype.each.call({replay}, 0, replay.n - 1, (stay, low, high) => {
    for (let row = low; row < high; row++) {
      const glyph = '.PD~#'[replay.cell(stay, row)];
      for (let step = replay.cumulative[row]; step < replay.cumulative[row + 1]; step++) {
        lines[replay.stay.slot[stay]][step] = glyph;
      }
    }
  });
  return lines.map((line) => line.join(''));
}"""


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flagship's results with its report."""
    folder = tmp_path_factory.mktemp("flagship") / "out"
    result = chairlift("run", str(ROOT / "scenarios" / "anyscale_23x.yaml"), "--out", str(folder), "--report", "-q")
    assert (result.status, result.err) == (0, "")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: Any, path: Path, width: int = 1240, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page with all its figures drawn, and what its console said. It can reach no network."""
    said: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.add_init_script("addEventListener('error', (event) => console.error(event.message))")  # of no script: a loop
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
    page.wait_for_function(
        "[...document.querySelectorAll('.figure')].every((e) => !e.offsetParent || e.querySelector('.main-svg'))"
    )
    page.wait_for_timeout(300)  # plotly's margins settle
    return page, said


def check_whole(browser: Any, path: Path, look: str, figures: int) -> None:
    """A page of so many figures that are drawn, with nothing that overlaps or is cut off."""
    page, said = opened(browser, path, *LOOKS[look])

    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= LOOKS[look][0]
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(LABELS) == []
    assert page.evaluate(CLIPPED) == []
    found = page.evaluate(FIGURES)
    assert len(found) == figures
    assert [f for f in found if f["marks"] == 0 or abs(f["width"] - f["room"]) > 2] == []
    assert len(page.screenshot(full_page=True)) > 40_000
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 150) == (look == "dark")
    page.context.close()


@pytest.mark.parametrize("look", LOOKS)
def test_the_flagship_is_whole_in_every_look(flagship: Path, browser: Any, look: str) -> None:
    check_whole(browser, flagship / "report.html", look, figures=9)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison, three metrics and a Pareto plane."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "s.yaml").write_text(SCENARIO)
    (folder / "w.yaml").write_text(
        "base: s.yaml\nseeds: 3\naxes:\n  policy: {named: {<vllm>: vllm, b: {name: static, batch: 4}, c: sarathi}}\n"
        "  workload.arrivals.poisson.rate_per_s: [1, 2, 4]\n"
    )
    assert chairlift("sweep", str(folder / "w.yaml"), "-j1", "-q", "--out", str(folder / "w")).status == 0
    metrics = [f"--metric={name}" for name in ("p99_ttft_ms", "median_e2el_ms", "output_throughput")]
    fronts = ["--pareto=p99_ttft_ms", "--pareto=output_throughput"]
    page = str(folder / "page.html")
    assert chairlift("compare", str(folder / "w"), *metrics, *fronts, "--html", page, "--json").status == 0
    return Path(page)


@pytest.mark.parametrize("look", LOOKS)
def test_a_comparison_is_whole_in_every_look(compared: Path, browser: Any, look: str) -> None:
    assert "&lt;vllm&gt;</li>" in compared.read_text(encoding="utf-8")
    check_whole(browser, compared, look, figures=7)


PLAN = """\
question: Which is <cheapest> & good?
base:
  model: opt-13b
  backend: roofline
  policy: vllm
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 100, output_tokens: 20}
slo: [{percentile: 90, ttft_ms: 800}]
rate_per_s: [8, 24]
axes: {gpu: [a100-40gb, h100], replicas: [1, 2]}
search: {requests: 300, most_requests: 600, precision: 0.2}
front: true
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with two rates and a front."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "p.yaml").write_text(PLAN)
    result = chairlift("plan", str(folder / "p.yaml"), "-j1", "-q", "--out", str(folder / "out"))
    assert (result.status, result.err) == (0, "")
    return folder / "out" / "plan.html"


@pytest.mark.parametrize("look", LOOKS)
def test_a_plan_is_whole_in_every_look(planned: Path, browser: Any, look: str) -> None:
    assert "<p>Which is &lt;cheapest&gt; &amp; good?</p>" in planned.read_text(encoding="utf-8")
    check_whole(browser, planned, look, figures=2)


def test_every_case_and_variant_can_be_chosen(flagship: Path, browser: Any) -> None:
    page, said = opened(browser, flagship / "report.html")
    for case in ("cap 32", "cap 1536"):
        page.get_by_role("button", name=case, exact=True).click()
        for variant in ("naive static", "vLLM"):
            page.locator("[data-choose=run]:visible", has_text=variant).last.click()
            page.wait_for_timeout(200)
            assert page.locator("section[data-run]:visible").count() == 1
            assert page.locator(".figure[data-slots]:visible .main-svg").count() > 0

    assert said == []
    page.get_by_title("light or dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.context.close()


def test_slots_zoom_from_the_whole_run_to_single_steps(flagship: Path, browser: Any) -> None:
    page, said = opened(browser, flagship / "report.html")
    telling = page.locator(".telling:visible")

    assert "steps: a column is" in telling.text_content()
    page.locator("[data-act=steps]:visible").click()
    assert telling.text_content() == "40 steps: a column is one step."
    cells = page.evaluate("[...document.querySelectorAll('.figure[data-slots]')].find((e) => e.offsetParent).data[0].z")
    assert {len(line) for line in cells} == {40}
    for act in ("right", "closer", "wider", "left", "axis", "whole"):
        page.locator(f"[data-act={act}]:visible").click()
    assert "steps: a column is" in telling.text_content()
    assert "of them" in telling.text_content()
    page.locator(".figure[data-slots]:visible .nsewdrag").first.hover()
    page.wait_for_timeout(200)
    assert "request" in page.locator(".tip:visible").text_content()
    assert said == []
    page.context.close()


def test_the_page_replays_the_slots_as_they_were(flagship: Path, browser: Any) -> None:
    page, _ = opened(browser, flagship / "report.html")
    found = results.read(flagship)
    for i, run in enumerate(found.runs):
        if run.case != "cap 32" or run.variant not in ("honest static", "TGI / Ray Serve", "vLLM"):
            continue
        slots = seat(next(run.events()), next(run.steps("steps", "decodes")))
        assert page.evaluate(GRID, [str(i), 0]) == slots.grid(), run.variant
    page.context.close()


def test_it_prints_in_light_with_its_figures(flagship: Path, browser: Any, tmp_path: Path) -> None:
    page, said = opened(browser, flagship / "report.html", 1240, "dark")
    page.pdf(path=tmp_path / "report.pdf")

    assert said == []
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    page.context.close()


def test_a_table_that_goes_on_beyond_the_edge_says_so(browser: Any, flagship: Path) -> None:
    going_on = (
        "[...document.querySelectorAll('.scroll')].filter((e) => e.offsetParent)"
        ".map((e) => [e.classList.contains('more'), e.scrollWidth > e.clientWidth + 2])"
    )
    narrow, _ = opened(browser, flagship / "report.html", 400)
    found = narrow.evaluate(going_on)
    assert [True, True] in found
    assert all(said == cut for said, cut in found)

    narrow.evaluate("document.querySelectorAll('.scroll').forEach((e) => { e.scrollLeft = 1e6; })")
    narrow.wait_for_function(f"!{going_on}.some(([said]) => said)")


def test_a_table_with_sentences_has_a_line_a_cell_on_a_narrow_screen(browser: Any, planned: Path) -> None:
    narrow, _ = opened(browser, planned, 390)
    tables = "[...document.querySelectorAll('.scroll')].filter((e) => e.querySelector('.words') && e.offsetParent)"

    assert narrow.evaluate(f"{tables}.length") > 0
    assert narrow.evaluate(f"{tables}.every((e) => e.scrollWidth <= e.clientWidth)")
    heads = narrow.evaluate("[...document.querySelectorAll('.words td')].slice(0, 3).map((e) => e.dataset.head)")
    assert heads == ["$/h", "outcome", "share that met it [interval]"]
    narrow.context.close()
