"use strict";
// Draws the figures of a report. The page carries plotly.js and all data, compressed; nothing is loaded from outside.

const report = { figures: {}, slots: {}, drawn: new Map(), views: new Map() };

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// ---- colours: figures name CSS variables; plotly wants colours ----

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function painted(value) {
  if (typeof value === "string") {
    return value.includes("var(--") ? value.replace(/var\((--[\w-]+)\)/g, (_, name) => colour(name)) : value;
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(painted);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, painted(each)]));
  }
  return value;
}

function axis(own) {
  return {
    gridcolor: "var(--line)", zeroline: false, linecolor: "var(--line)", ticks: "outside", ticklen: 4,
    tickcolor: "var(--line)", automargin: true, ...own,
    title: { standoff: 8, font: { size: 12, color: "var(--muted)" }, ...(own.title || {}) },
  };
}

function dressed(layout) {
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "var(--ink)" },
    hoverlabel: { bgcolor: "var(--paper)", bordercolor: "var(--line)", font: { color: "var(--ink)", size: 12 } },
    ...layout,
    margin: { l: 48, r: 16, t: 26, b: 44, ...(layout.margin || {}) },
  };
  for (const key of Object.keys(whole)) if (/^[xy]axis\d*$/.test(key)) whole[key] = axis(whole[key]);
  return painted(whole);
}

const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };

function draw(place) {
  const look = document.documentElement.dataset.theme || "";
  if (report.drawn.get(place) === look + place.clientWidth) return;
  report.drawn.set(place, look + place.clientWidth);
  if (place.dataset.slots !== undefined) {
    if (!report.views.has(place)) report.views.set(place, new SlotView(place, report.slots[place.dataset.slots]));
    report.views.get(place).show();
    return;
  }
  const figure = report.figures[place.dataset.figure];
  Plotly.react(place, painted(figure.data), dressed(figure.layout), CONFIG);
}

// ---- what is shown: cases, runs, theme ----

const nearby = new IntersectionObserver(
  (seen) => seen.forEach((each) => { if (each.isIntersecting) draw(each.target); }), { rootMargin: "600px" });

function refresh() {
  document.querySelectorAll(".figure").forEach((place) => {
    nearby.unobserve(place);
    nearby.observe(place); // calls back at once for what is in view
  });
}

function choose(kind, value) {
  document.querySelectorAll(`[data-${kind}]`).forEach((part) => { part.hidden = part.dataset[kind] !== value; });
  document.querySelectorAll(`[data-choose=${kind}]`).forEach((button) => {
    button.setAttribute("aria-pressed", String(button.value === value));
  });
  if (kind === "run") {
    const pressed = document.querySelector(`[data-choose=run][value="${value}"]`);
    report.variant = pressed && pressed.textContent; // so that another case shows the same variant
  }
  if (kind === "case") {
    const runs = [...document.querySelectorAll(`[data-case="${value}"] [data-choose=run]`)];
    const same = runs.find((button) => button.textContent === report.variant) || runs[runs.length - 1];
    if (same) choose("run", same.value);
  }
  refresh();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  report.drawn.clear();
  refresh();
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function listen() {
  document.querySelectorAll("[data-choose]").forEach((button) => {
    button.addEventListener("click", () => choose(button.dataset.choose, button.value));
  });
  document.getElementById("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (!document.documentElement.dataset.theme) { report.drawn.clear(); refresh(); }
  });
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme || "";
    document.documentElement.dataset.theme = "light";
    document.querySelectorAll(".figure").forEach((place) => { if (place.offsetParent) draw(place); });
  });
  addEventListener("afterprint", () => theme(before));
}

async function start() {
  const [plotly, data] = await Promise.all([unpack("plotly"), unpack("data")]);
  const script = document.createElement("script");
  script.textContent = plotly;
  document.head.append(script);
  Object.assign(report, JSON.parse(data));
  listen();
  const firstCase = document.querySelector("[data-choose=case][aria-pressed=true]");
  const firstRun = document.querySelector("[data-choose=run][aria-pressed=true]");
  if (firstCase) choose("case", firstCase.value);
  else if (firstRun) choose("run", firstRun.value);
  refresh();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  document.getElementById("trouble").hidden = false;
  console.error(error);
});

// ---- tables that go on beyond the edge say so ----

function hint(table) {
  table.classList.toggle("more", table.scrollLeft + table.clientWidth < table.scrollWidth - 2);
}

// Also when one is unhidden. In the next frame, for a hint is a line: an observer that changes sizes itself is an error.
const tables = new ResizeObserver((seen) => requestAnimationFrame(() => seen.forEach((each) => hint(each.target))));
for (const table of document.querySelectorAll(".scroll")) {
  table.tabIndex = 0;  // so that the arrow keys scroll it
  table.addEventListener("scroll", () => hint(table), { passive: true });
  tables.observe(table);
}
