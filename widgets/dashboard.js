// The dashboard: plotly charts over one time axis, a strip to choose a stretch of time in, numbers, and controls.
// @ts-check
import { buildFrame, isDark, make, onTheme } from "./frame.js";
import { buildControls } from "./engine_controls.js";
import { plotly } from "./plotly_page.js";
import { buildStrip } from "./time_strip.js";

const PATIENCE = 3000; // milliseconds that the kernel may take to answer with a stretch of time that was chosen
const CHART = 104; // CSS pixels of a chart's height
const ABOVE = 30; // and of what is over it: its title and legend
const TWO_COLUMNS = 760; // CSS pixels of width from which there are two

/** A chart as it was sent, with its numbers out of the bytes that came beside it.
 * @param {any} sent @param {DataView} data @returns {{ name: string, title: string, unit: string, style: string, times: number[],
 *   lines: { label: string, colour: string, faint: boolean, values: Float32Array }[] }} */
export function unpack(sent, data) {
  const { at, count, labels } = sent;
  const begin = data.byteOffset + at; // copied: what arrives may begin anywhere, and numbers may not
  const numbers = new Float32Array(data.buffer.slice(begin, begin + 4 * count * (labels.length + 1)));
  return {
    ...sent,
    times: Array.from(numbers.subarray(0, count), (offset) => sent.start + offset),
    lines: labels.map((/** @type {string} */ label, /** @type {number} */ i) => ({
      label,
      colour: sent.colours[i],
      faint: sent.faint[i],
      values: numbers.subarray((i + 1) * count, (i + 2) * count),
    })),
  };
}

/** @param {string} colour @param {number} alpha */
export function faded(colour, alpha) {
  const number = parseInt(colour.slice(1), 16);
  return `rgba(${number >> 16},${(number >> 8) & 255},${number & 255},${alpha})`;
}

/** Where each chart stands, as shares of the whole: [left, right, bottom, top].
 * @param {number} count @param {number} across */
export function places(count, across) {
  const rows = Math.ceil(count / across);
  const height = rows * (CHART + ABOVE);
  return Array.from({ length: count }, (_, i) => {
    const column = i % across;
    const top = 1 - (Math.floor(i / across) * (CHART + ABOVE) + ABOVE) / height;
    const gap = 0.09;
    const wide = (1 - gap * (across - 1)) / across;
    return [column * (wide + gap), column * (wide + gap) + wide, top - CHART / height, top];
  });
}

/** A chart's title with what its colours mean, in one line.
 * @param {ReturnType<typeof unpack>} chart */
export function heading(chart) {
  const text = (/** @type {string} */ plain) => plain.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const key =
    chart.lines.length > 1 ? chart.lines.map(({ label, colour }) => `  <span style="color:${colour}">■</span> ${text(label)}`) : [];
  return `<b>${text(chart.title)}</b>${chart.unit ? `, ${text(chart.unit)}` : ""}${key.join("")}`;
}

/** What plotly draws.
 * @param {ReturnType<typeof unpack>[]} charts @param {{ across: number, span: number[] | null, cursor: number | null, ink: string, dark: boolean }} look */
export function figure(charts, look) {
  const stand = places(charts.length, look.across);
  /** @type {any[]} */
  const data = [];
  const grid = look.dark ? "rgba(255,255,255,0.16)" : "rgba(0,0,0,0.12)";
  const first = Math.min(...charts.filter((one) => one.times.length).map((one) => one.times[0]));
  const last = Math.max(...charts.filter((one) => one.times.length).map((one) => one.times[one.times.length - 1]));
  const range = look.span ?? (first < last ? [first, last] : [0, 1]);
  /** @type {any} */
  const layout = {
    width: undefined,
    height: Math.ceil(charts.length / look.across) * (CHART + ABOVE) + 34,
    margin: { l: 46, r: 8, t: 0, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: look.ink, size: 11 },
    dragmode: "select",
    selectdirection: "h",
    hovermode: "x unified",
    hoverlabel: { bgcolor: look.dark ? "#222" : "#fff", font: { color: look.ink } },
    showlegend: false,
    annotations: [],
    shapes: [],
    uirevision: 1,
  };
  charts.forEach((chart, i) => {
    const n = i === 0 ? "" : String(i + 1);
    const [left, right, bottom, top] = stand[i];
    const lowest = i + look.across >= charts.length;
    layout[`xaxis${n}`] = {
      domain: [left, right], anchor: `y${n}`, range, matches: i === 0 ? undefined : "x", showgrid: true, gridcolor: grid, zeroline: false,
      showticklabels: lowest, title: lowest ? { text: "seconds", standoff: 4 } : undefined, fixedrange: true, nticks: 6,
    }; // prettier-ignore
    layout[`yaxis${n}`] = {
      domain: [bottom, top], anchor: `x${n}`, rangemode: "tozero", gridcolor: grid, zeroline: false, fixedrange: true, nticks: 4,
    }; // prettier-ignore
    layout.annotations.push({
      text: heading(chart), align: "left", x: left, xref: "paper", xanchor: "left", y: top, yref: "paper",
      yanchor: "bottom", showarrow: false, yshift: 2, font: { size: 11 },
    }); // prettier-ignore
    if (look.cursor !== null) {
      const line = { color: look.ink, width: 1, dash: "dot" };
      layout.shapes.push({ type: "line", xref: `x${n}`, yref: `y${n} domain`, x0: look.cursor, x1: look.cursor, y0: 0, y1: 1, line });
    }
    for (const { label, colour, faint, values } of chart.lines) {
      const points = chart.style === "points";
      data.push({
        type: "scatter", mode: points ? "markers" : "lines", name: label, x: chart.times, y: values, xaxis: `x${n}`, yaxis: `y${n}`,
        marker: { color: colour, size: 5 }, hovertemplate: "%{y:.4~g}",
        line: { color: colour, width: chart.style === "area" ? 0.5 : 1.5, shape: "hv" },
        ...(chart.style === "area" ? { stackgroup: `s${i}`, fillcolor: faded(colour, faint ? 0.15 : 0.75) } : {}),
        selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 1 } },
      }); // prettier-ignore
    }
  });
  return { data, layout };
}

/** What the engine's HTTP server counts, as a small table: names and numbers, whatever it counts.
 * @param {any} stats @returns {[string, string][]} */
export function httpRows(stats, prefix = "") {
  /** @type {[string, string][]} */
  const rows = [];
  for (const [name, value] of Object.entries(stats ?? {})) {
    const label = `${prefix}${name.replaceAll("_", " ")}`;
    if (value !== null && typeof value === "object" && !Array.isArray(value)) rows.push(...httpRows(value, `${label} `));
    else rows.push([label, typeof value === "number" ? value.toLocaleString("en") : String(value)]);
  }
  return rows;
}

/** @param {{ model: import("./frame.js").Model, el: HTMLElement }} given */
function render({ model, el }) {
  const numbers = make("dl", { className: "nbengine-numbers" });
  const plot = make("div", { className: "nbengine-charts", role: "img", "aria-label": "Charts of what the engine did" });
  const http = make("dl", { className: "nbengine-numbers nbengine-http", "aria-label": "HTTP traffic" });
  /** @type {any} */
  let library = null;
  /** @type {any} */
  let latest = null;
  /** @type {number[] | null} */
  let span = null; // as chosen here; the kernel's answer brings finer lines for it
  /** @type {{ span: number[] | null, at: number } | null} */
  let asked = null; // a stretch that the kernel has not yet answered with
  let stopped = false;
  let drawing = false;
  let waiting = false;
  let rested = 0; // when plotly may draw again: it takes at most a third of the page's time

  const draw = (/** @type {any} */ sent) => {
    latest = sent;
    if (asked && (String(asked.span) === String(sent.span) || performance.now() - asked.at > PATIENCE)) asked = null;
    if (!asked) span = sent.span; // else it was sent before the kernel heard of this one
    numbers.replaceChildren(
      ...sent.numbers.map((/** @type {string[]} */ [what, much]) =>
        make("div", {}, make("dt", { textContent: what }), make("dd", { textContent: much })),
      ),
    );
    controls.draw(frame.saved ? null : sent.controls);
    if (frame.saved) frame.uncover(); // the picture has the charts
    strip.draw(unpack(sent.overview, sent.data), span);
    const rows = httpRows(sent.http);
    http.replaceChildren(
      ...rows.map(([what, much]) => make("div", {}, make("dt", { textContent: what }), make("dd", { textContent: much }))),
    );
    http.hidden = rows.length === 0;
    redraw();
  };

  const redraw = async () => {
    if (!latest) return;
    if (latest.picture) {
      plot.innerHTML = latest.picture;
      return;
    }
    if (!library || !plot.isConnected || plot.clientWidth === 0) return;
    waiting = drawing;
    if (drawing) return; // what comes while plotly draws is drawn after it, once
    drawing = true;
    const rest = rested - performance.now();
    if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
    if (stopped) return;
    const began = performance.now();
    const look = {
      across: plot.clientWidth >= TWO_COLUMNS ? 2 : 1,
      span,
      cursor: latest.cursor,
      ink: getComputedStyle(el).color,
      dark: isDark(el),
    };
    const { data, layout } = figure(
      latest.charts.map((/** @type {any} */ one) => unpack(one, latest.data)),
      look,
    );
    try {
      const fresh = !plot.classList.contains("js-plotly-plot");
      if (fresh) plot.replaceChildren();
      await library.react(
        plot,
        data,
        { ...layout, width: plot.clientWidth },
        { displayModeBar: false, responsive: false, doubleClick: false },
      );
      if (fresh) listen();
      plot.dataset.drawn = String(Number(plot.dataset.drawn ?? 0) + 1);
    } finally {
      drawing = false;
      rested = performance.now() + 2 * (performance.now() - began);
    }
    if (waiting) redraw();
  };

  const listen = () => {
    /** @type {any} */ (plot).on("plotly_selected", (/** @type {any} */ event) => {
      const range = event?.range && Object.entries(event.range).find(([name]) => name.startsWith("x"))?.[1];
      library.restyle(plot, { selectedpoints: null });
      library.relayout(plot, { selections: [] });
      if (range) strip.set([...range].sort((/** @type {number} */ a, /** @type {number} */ b) => a - b));
    });
    /** @type {any} */ (plot).on("plotly_doubleclick", () => strip.set(null));
    /** @type {any} */ (plot).on("plotly_click", (/** @type {any} */ event) => frame.press("seek_time", event.points[0].x));
  };

  const frame = buildFrame({ model, el }, "Dashboard", draw);
  const strip = buildStrip((chosen) => {
    span = chosen;
    asked = { span: chosen, at: performance.now() };
    redraw();
    clearTimeout(later);
    later = setTimeout(() => frame.press("brush", chosen), 60);
  });
  /** @type {any} */
  let later = 0;
  const controls = buildControls(frame.press);
  el.classList.add("nbengine-dashboard");
  frame.body.append(numbers, plot, strip.element, http, controls.element);
  plot.textContent = frame.saved
    ? "The kernel brings what draws the charts. An exported notebook has a picture of them, and snapshot() of the view makes one."
    : "The charts are on their way.";
  strip.element.hidden = frame.saved;

  const size = new ResizeObserver(() => redraw());
  size.observe(plot);
  const noMoreThemes = onTheme(() => redraw());
  const load = () =>
    plotly(model, () => frame.press("plotly")).then(
      (found) => {
        if (stopped) return;
        library = found;
        redraw();
      },
      (error) => {
        if (stopped) return;
        plot.textContent = `Charts are drawn as pictures: ${error.message}.`;
        frame.press("pictures");
      },
    );
  if (!frame.saved) load();
  return () => {
    stopped = true;
    clearTimeout(later);
    size.disconnect();
    noMoreThemes();
    if (library) library.purge(plot);
    frame.stop();
  };
}

export default { render };
