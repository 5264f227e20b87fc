"use strict";
// The slot diagram: time or steps × batch slot. Zoomed in, a column is a step; zoomed out, a stretch of time that
// takes the colour of what its slot did for most of it.

const IDLE = 0, PREFILL = 1, DECODE = 2, STALLED = 3, PADDING = 4, LAST = 5;
const NAMES = ["idle", "prefill", "decode", "stalled", "padding", "last token"];
const COLOURS = ["--idle", "--prefill", "--decode", "--stalled", "--padding", "--last"];
const COLUMNS = 900; // drawn at most
const MARKS = 2000; // preemptions marked at most
const END = 8, PREEMPT = 6, LOST = 10; // `sim.journal.Kind`

function summed(differences) {
  let sum = 0;
  return differences.map((d) => (sum += d));
}

class Replay {
  // One replica's slots, row by row; what `sim.slotview.diagram` wrote.
  constructor(data) {
    Object.assign(this, data);
    this.n = data.steps.length;
    this.start = summed(data.start).map((ns) => ns * 1e-9);
    this.cumulative = [data.step];
    for (const steps of data.steps) this.cumulative.push(this.cumulative[this.cumulative.length - 1] + steps);
    this.stay = { ...data.stay, begin: summed(data.stay.begin) };
    this.stay.end = this.stay.begin.map((b, i) => b + data.stay.length[i]);
    const owners = summed(data.chunk.stay);
    this.chunks = new Map();
    owners.forEach((stay, i) => {
      if (!this.chunks.has(stay)) this.chunks.set(stay, new Map());
      this.chunks.get(stay).set(data.chunk.row[i], data.chunk.tokens[i]);
    });
    this.parks = new Map();
    data.park.stay.forEach((stay, i) => {
      if (!this.parks.has(stay)) this.parks.set(stay, []);
      this.parks.get(stay).push([data.park.begin[i], data.park.end[i]]);
    });
  }

  edge(row, j, byStep) { // where step j of a row starts
    if (byStep) return this.cumulative[row] + j;
    return this.start[row] + j * this.first[row] * 1e-9 + (j * (j - 1) / 2) * this.slope[row] * 1e-12;
  }

  from(row, byStep) { return this.edge(row, 0, byStep); }
  to(row, byStep) { return this.edge(row, this.steps[row], byStep); }

  rowAt(x, byStep) { // the last row that starts at or before x
    let low = 0, high = this.n - 1;
    while (low < high) {
      const mid = (low + high + 1) >> 1;
      if (this.from(mid, byStep) <= x) low = mid; else high = mid - 1;
    }
    return low;
  }

  stepAt(row, x, byStep) {
    let low = 0, high = this.steps[row] - 1;
    while (low < high) {
      const mid = (low + high + 1) >> 1;
      if (this.edge(row, mid, byStep) <= x) low = mid; else high = mid - 1;
    }
    return low;
  }

  cell(stay, row) {
    if (row >= this.stay.done[stay] && this.stay.done[stay] < this.stay.end[stay]) return PADDING;
    const chunks = this.chunks.get(stay);
    if (chunks && chunks.has(row)) return PREFILL;
    if (row < this.stay.ready[stay] || !this.decoding[row]) return STALLED;
    const parks = this.parks.get(stay);
    return parks && parks.some(([from, to]) => from <= row && row < to) ? STALLED : DECODE;
  }

  lastRow(stay) { // the row that brought the last token, -1 if none did
    const held = this.stay.done[stay] < this.stay.end[stay];
    return held || this.stay.why[stay] === END ? Math.min(this.stay.done[stay], this.stay.end[stay]) - 1 : -1;
  }

  at(row, slot) {
    const { slot: slots, begin, end } = this.stay;
    for (let i = 0; i < slots.length; i++) if (slots[i] === slot && begin[i] <= row && row < end[i]) return i;
    return -1;
  }
}

class SlotView {
  constructor(place, replays) {
    this.place = place;
    this.data = replays;
    this.replays = new Map();
    this.box = place.parentElement;
    this.byStep = false;
    this.pick(0);
    this.box.querySelectorAll("[data-act]").forEach((button) => button.addEventListener("click", () => this.act(button)));
  }

  pick(i) {
    if (!this.replays.has(i)) this.replays.set(i, new Replay(this.data[i]));
    this.replay = this.replays.get(i);
    this.range = this.whole();
  }

  whole() {
    const r = this.replay;
    if (r.overview && !this.byStep) return [r.overview.from, r.overview.to];
    return [r.from(0, this.byStep), r.to(r.n - 1, this.byStep)];
  }

  act(button) {
    const [from, to] = this.range, middle = (from + to) / 2, width = to - from;
    const act = button.dataset.act;
    if (act === "whole") this.range = this.whole();
    if (act === "closer") this.range = [middle - width / 8, middle + width / 8];
    if (act === "wider") this.range = [middle - width * 2, middle + width * 2];
    if (act === "left") this.range = [from - width / 2, to - width / 2];
    if (act === "right") this.range = [from + width / 2, to + width / 2];
    if (act === "steps") this.closeUp(40);
    if (act === "axis") this.swap(button);
    if (act === "replica") this.pick(Number(button.value));
    this.box.querySelectorAll("[data-act=replica]").forEach((each) => {
      each.setAttribute("aria-pressed", String(this.data[Number(each.value)] === this.data[[...this.replays].find(([, r]) => r === this.replay)[0]]));
    });
    this.show();
  }

  closeUp(count) { // single steps, where the view starts
    if (this.replay.overview && this.range[0] < this.replay.from(0, this.byStep)) this.range = [this.replay.from(0, this.byStep), 0];
    const r = this.replay, row = r.rowAt(this.range[0], this.byStep), j = r.stepAt(row, this.range[0], this.byStep);
    let last = row, left = count - (r.steps[row] - j);
    while (left > 0 && last + 1 < r.n) left -= r.steps[++last];
    this.range = [r.edge(row, j, this.byStep), r.edge(last, r.steps[last] + Math.min(0, left), this.byStep)];
  }

  swap(button) {
    const r = this.replay, was = this.byStep;
    const place = (x) => {
      const row = r.rowAt(x, was), j = x >= r.to(row, was) ? r.steps[row] : r.stepAt(row, x, was);
      return r.edge(row, j, !was);
    };
    this.range = this.range.map(place);
    this.byStep = !was;
    button.textContent = this.byStep ? "axis: steps" : "axis: time";
  }

  clamped() {
    const [low, high] = this.whole();
    let [from, to] = this.range;
    const width = Math.min(to - from, high - low);
    from = Math.min(Math.max(from, low), high - width);
    return [from, from + width];
  }

  // Columns as edges, and the cells of each slot.
  columns() {
    const r = this.replay, byStep = this.byStep, from = this.range[0];
    const to = this.range[1] - (this.range[1] - from) * 1e-6;
    if (r.overview && !byStep && (from < r.from(0) - 1e-6 || to > r.to(r.n - 1) + 1e-6)) return this.coarse();
    const first = r.rowAt(from, byStep), last = r.rowAt(to, byStep);
    const begin = r.stepAt(first, from, byStep), finish = r.stepAt(last, to, byStep) + 1; // `to` is a little inside
    const steps = r.cumulative[last] + finish - r.cumulative[first] - begin;
    const filled = steps <= COLUMNS ? this.exact(first, begin, last, finish) : this.binned(first, last);
    return { ...filled, steps, first, last };
  }

  coarse() { // the whole run in bins, made beforehand
    const r = this.replay, { from, to, cells } = r.overview, bins = cells[0].length;
    const edges = Array.from({ length: bins + 1 }, (_, i) => from + (i / bins) * (to - from));
    const z = cells.map((line) => Array.from(line, Number));
    return { edges, z, exact: false, coarse: true, first: 0, last: r.n - 1 };
  }

  exact(first, begin, last, finish) {
    const r = this.replay, edges = [], at = new Map();
    for (let row = first; row <= last; row++) {
      const j0 = row === first ? begin : 0, j1 = row === last ? finish : r.steps[row];
      for (let j = j0; j < j1; j++) {
        const x = r.edge(row, j, this.byStep);
        if (j === j0) {
          if (edges.length === 0) edges.push(x);
          else if (x > edges[edges.length - 1] + this.slack(row)) edges.push(x); // the replica was idle in between
          at.set(row, edges.length - 1);
        }
        edges.push(r.edge(row, j + 1, this.byStep));
      }
      at.set(~row, edges.length - 1); // columns of a row: at(row) … at(~row)
    }
    const z = Array.from({ length: r.slots }, () => new Array(edges.length - 1).fill(IDLE));
    const words = z.map((line) => new Array(line.length).fill(""));
    this.each(first, last, (stay, low, high) => {
      const slot = r.stay.slot[stay], ends = r.lastRow(stay);
      for (let row = low; row < high; row++) {
        const cell = r.cell(stay, row);
        for (let c = at.get(row); c < at.get(~row); c++) z[slot][c] = cell;
        if (row === low && at.get(row) < at.get(~row)) words[slot][at.get(row)] = String(r.stay.request[stay]);
        if (row === ends && (row < last || finish === r.steps[row])) z[slot][at.get(~row) - 1] = LAST;
      }
    });
    return { edges, z, words, exact: true };
  }

  slack(row) { return this.byStep ? 0 : this.replay.first[row] * 1e-12; } // a thousandth of a step: times are rounded

  binned(first, last) {
    const r = this.replay, [from, to] = this.range, width = (to - from) / COLUMNS;
    const weight = Array.from({ length: r.slots }, () => new Float32Array(COLUMNS * 5));
    this.each(first, last, (stay, low, high) => {
      const line = weight[r.stay.slot[stay]];
      let row = low;
      while (row < high) {
        const cell = r.cell(stay, row), x0 = r.from(row, this.byStep);
        while (++row < high && r.cell(stay, row) === cell && r.from(row, this.byStep) <= r.to(row - 1, this.byStep) + width / 4);
        this.add(line, cell, (x0 - from) / width, (r.to(row - 1, this.byStep) - from) / width);
      }
    });
    const z = weight.map((line) => {
      const cells = new Array(COLUMNS);
      for (let c = 0; c < COLUMNS; c++) {
        let most = 1;
        for (let k = 1; k < 5; k++) most -= line[c * 5 + k];
        cells[c] = IDLE;
        for (let k = 1; k < 5; k++) if (line[c * 5 + k] > most) { most = line[c * 5 + k]; cells[c] = k; }
      }
      return cells;
    });
    return { edges: Array.from({ length: COLUMNS + 1 }, (_, i) => from + i * width), z, exact: false };
  }

  add(line, cell, from, to) {
    from = Math.max(0, from);
    to = Math.min(COLUMNS, to);
    for (let c = Math.floor(from); c < to; c++) line[c * 5 + cell] += Math.min(to, c + 1) - Math.max(from, c);
  }

  each(first, last, call) { // stays with rows in first … last
    const { begin, end } = this.replay.stay;
    for (let i = 0; i < begin.length && begin[i] <= last; i++) {
      if (end[i] > first) call(i, Math.max(begin[i], first), Math.min(end[i], last + 1));
    }
  }

  marks(first, last) {
    const r = this.replay, x = [], y = [], text = [];
    let count = 0;
    for (let i = 0; i < r.stay.end.length; i++) {
      const row = r.stay.end[i] - 1, why = r.stay.why[i];
      if ((why !== PREEMPT && why !== LOST) || row < first || row > last) continue;
      if (++count > MARKS) continue;
      x.push(r.to(row, this.byStep));
      y.push(r.stay.slot[i]);
      text.push(`request ${r.stay.request[i]} ${why === PREEMPT ? "preempted" : "lost with its replica"}`);
    }
    return { x, y, text, count };
  }

  show() {
    this.range = this.clamped();
    const r = this.replay, made = this.columns(), marks = this.marks(made.first, made.last);
    const wide = this.place.clientWidth - 64, high = Math.max(96, Math.min(520, r.slots * 24));
    const cellWide = made.coarse ? 1 : wide / (made.edges.length - 1), cellHigh = high / r.slots;
    const scale = COLOURS.flatMap((name, i) => [[i / 6, colour(name)], [(i + 1) / 6, colour(name)]]);
    const spell = made.exact && cellHigh >= 13 && cellWide >= 16;
    const heat = {
      type: "heatmap", x: made.edges, y0: 0, dy: 1, z: made.z, zmin: -0.5, zmax: 5.5, colorscale: scale,
      showscale: false, hoverinfo: "none", xgap: cellWide >= 5 ? 1 : 0, ygap: cellHigh >= 5 ? 1 : 0,
    };
    if (spell) Object.assign(heat, { text: made.words, texttemplate: "%{text}", textfont: { size: 11, color: colour("--on-mark") } });
    const cross = {
      type: "scatter", mode: "markers", x: marks.x, y: marks.y, text: marks.text, hovertemplate: "%{text}<extra></extra>",
      cliponaxis: false,
      marker: { symbol: "x", size: cellHigh >= 8 ? 8 : 5, color: "var(--mark)", line: { width: 1, color: "var(--paper)" } },
    };
    const layout = {
      height: high + 56, hovermode: "closest",
      margin: { l: 44, r: 14, t: 8, b: 44 },
      xaxis: { title: { text: this.byStep ? "engine step" : "simulated time, s" }, range: this.range, showgrid: false },
      yaxis: { title: { text: "slot" }, range: [r.slots - 0.5, -0.5], fixedrange: true, showgrid: false, ticks: "", tick0: 0, dtick: Math.max(1, 5 * Math.round(r.slots / 40)) },
    };
    const place = this.place;
    Plotly.react(place, [heat, painted(cross)], dressed(layout), CONFIG).then(() => this.bind());
    this.tell(made, marks);
  }

  bind() {
    if (this.bound) return;
    this.bound = true;
    this.place.on("plotly_relayout", (change) => {
      if ("xaxis.range[0]" in change) this.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      else if (change["xaxis.autorange"]) this.range = this.whole();
      else return;
      this.show();
    });
    this.place.on("plotly_hover", (event) => {
      const point = event.points[0];
      if (point.data.type === "heatmap") this.hover(event.event, event.xvals ? event.xvals[0] : point.x, point.y);
    });
    this.place.on("plotly_unhover", () => { this.box.querySelector(".tip").hidden = true; });
  }

  hover(mouse, x, slot) {
    const r = this.replay, row = r.rowAt(x, this.byStep), j = r.stepAt(row, x, this.byStep);
    if (r.overview && (x < r.from(0, this.byStep) || x > r.to(r.n - 1, this.byStep))) return; // in a bin of the overview
    const idle = x > r.to(row, this.byStep);
    const stay = idle ? -1 : r.at(row, slot);
    const step = r.cumulative[row] + j, at = r.edge(row, j, false).toFixed(3);
    let words = idle ? "no step is running" : `slot ${slot}: idle`;
    if (stay >= 0) {
      const cell = r.cell(stay, row), chunk = (r.chunks.get(stay) || new Map()).get(row);
      words = `slot ${slot}: request ${r.stay.request[stay]}, ${NAMES[cell]}` + (chunk ? ` of ${chunk} tokens` : "");
    }
    const tip = this.box.querySelector(".tip"), box = this.box.getBoundingClientRect();
    tip.textContent = `${words} · step ${step.toLocaleString("en")} at ${at} s`;
    tip.hidden = false;
    const left = Math.min(mouse.clientX - box.left + 14, box.width - tip.offsetWidth - 4);
    tip.style.transform = `translate(${Math.max(4, left)}px, ${mouse.clientY - box.top + 16}px)`;
  }

  tell(made, marks) {
    const r = this.replay, number = (n) => n.toLocaleString("en");
    const stretch = r.n < r.rows ? `${number(r.n)} of this replica's ${number(r.rows)} runs of steps, from ${r.from(0).toFixed(1)} to ${r.to(r.n - 1).toFixed(1)} s, are in the page step by step (the longest queue, or what report --from and --to asked for)` : "";
    const words = made.coarse
      ? [`The whole run in ${number(made.z[0].length)} bins, each in the colour of what lasted longest in it; stalls count as decoding. ${stretch}: press single steps to see them.`]
      : [made.exact
      ? `${number(made.steps)} steps: a column is one step.`
      : `${number(made.steps)} steps: a column is ${number(Math.round(made.steps / COLUMNS * 10) / 10)} of them and takes the colour of what lasted longest in it; zoom in for single steps.`];
    if (stretch && !made.coarse) words.push(`${stretch}.`);
    if (marks.count > MARKS) words.push(`${number(MARKS)} of ${number(marks.count)} preemptions are marked.`);
    this.box.querySelector(".telling").textContent = words.join(" ");
  }
}
