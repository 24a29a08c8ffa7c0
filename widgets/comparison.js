// Two traces beside each other under one scrubber. All of it is here: nothing is asked of the kernel.
// @ts-check
import { coverOf, make, onTheme } from "./frame.js";

const COLOURS = ["#999999", "#e69f00", "#0072b2", "#d55e00"]; // queued, prefill, decode, preempted
const HEIGHTS = [0.2, 1, 0.6, 0.2]; // of a lane: colour is not the only sign
const NAMES = ["queued", "prefill", "decode", "preempted"];
const LANES = 150; // CSS pixels
const CURVE = 60;

/** @param {DataView} view */
const floats = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

/** The place of the last time that is not after `time`; -1 if all are.
 * @param {ArrayLike<number>} times @param {number} time */
export function placeOfTime(times, time) {
  let low = 0;
  let high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= time) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** What a side does at a time.
 * @param {{ times: Float32Array, curves: Record<string, Float32Array>, end: number }} side @param {number} time */
export function momentOf(side, time) {
  const i = placeOfTime(side.times, time);
  const over = time >= side.end;
  const at = (/** @type {string} */ name) => (i < 0 ? 0 : side.curves[name][i]);
  return { running: over ? 0 : at("running"), waiting: over ? 0 : at("waiting"), used: over ? 0 : at("used"), tokens: at("tokens"), over };
}

/** @param {{ model: import("./frame.js").Model, el: HTMLElement }} given */
function render({ model, el }) {
  el.classList.add("nbengine-view", "nbengine-compare");
  el.setAttribute("role", "region");
  el.setAttribute("aria-label", "Comparison of two traces");
  const still = coverOf(model.get("still"));
  document.head.append(still);

  const sides = model.get("sides").map((/** @type {any} */ sent) => ({
    ...sent,
    times: floats(sent.times),
    curves: Object.fromEntries(Object.entries(sent.curves).map(([key, view]) => [key, floats(/** @type {any} */ (view))])),
  }));
  const end = Math.max(...sides.map((/** @type {any} */ side) => side.end));
  const most = Math.max(
    0.01,
    ...sides.map((/** @type {any} */ side) =>
      side.curves.used.reduce((/** @type {number} */ a, /** @type {number} */ b) => Math.max(a, b), 0),
    ),
  ); // of the cache, in either
  let time = end;
  let playing = 0;

  const play = make("button", { type: "button", textContent: "Play" });
  const scrub = make("input", { type: "range", min: "0", max: "1000", step: "1", value: "1000", className: "nbengine-scrub" });
  scrub.setAttribute("aria-label", "Time on both clocks");
  const clock = make("output", { className: "nbengine-quiet" });
  const key = make("span", { className: "nbengine-quiet nbengine-key" });
  NAMES.forEach((text, i) => {
    const sign = make("i");
    sign.style.background = COLOURS[i];
    sign.style.height = `${0.8 * HEIGHTS[i]}em`;
    key.append(make("span", {}, sign, ` ${text}`));
  });
  const panels = sides.map((/** @type {any} */ side) => {
    const canvas = make("canvas", { role: "img" });
    const told = make("div", { className: "nbengine-quiet" });
    const parts = [make("strong", { textContent: side.label }), told, canvas];
    if (side.left_out)
      parts.push(make("div", { className: "nbengine-quiet", textContent: `${side.left_out} later sequences have no lane here` }));
    if (side.truncated) parts.push(make("div", { className: "nbengine-quiet", textContent: "its first steps have left the trace" }));
    return { side, canvas, told, element: make("div", { className: "nbengine-side" }, ...parts) };
  });
  const head = make(
    "tr",
    {},
    make("th"),
    ...sides.map((/** @type {any} */ side) => make("th", { scope: "col", textContent: side.label })),
    make("th"),
  );
  const rows = model
    .get("table")
    .map((/** @type {string[]} */ [what, ...cells]) =>
      make(
        "tr",
        {},
        make("th", { scope: "row", textContent: what }),
        ...cells.map((/** @type {string} */ textContent) => make("td", { textContent })),
      ),
    );
  el.append(
    make("div", { className: "nbengine-time", role: "group", "aria-label": "Time" }, play, scrub, clock, key),
    make("div", { className: "nbengine-sides" }, ...panels.map((/** @type {any} */ panel) => panel.element)),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );

  const draw = () => {
    clock.textContent = `${time.toFixed(2)} of ${end.toFixed(2)} s`;
    scrub.setAttribute("aria-valuetext", `${time.toFixed(2)} seconds`);
    for (const panel of panels) drawSide(panel, time, end, most, getComputedStyle(el).color);
  };
  const go = (/** @type {number} */ to) => {
    time = Math.min(end, Math.max(0, to));
    scrub.value = String(Math.round((1000 * time) / (end || 1)));
    draw();
  };
  const stop = () => {
    cancelAnimationFrame(playing);
    playing = 0;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (playing) return stop();
    const from = time >= end ? 0 : time;
    const began = performance.now();
    const pace = Math.max(1, end / 12); // real time, or as fast as shows all of it in twelve seconds
    play.textContent = "Pause";
    const move = () => {
      go(from + ((performance.now() - began) / 1000) * pace);
      if (time >= end) stop();
      else playing = requestAnimationFrame(move);
    };
    playing = requestAnimationFrame(move);
  });
  scrub.addEventListener("input", () => {
    stop();
    go((Number(scrub.value) / 1000) * end);
  });
  for (const { canvas } of panels)
    canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      if (event.buttons & 1) go(((event.offsetX - 1) / Math.max(1, canvas.clientWidth - 2)) * end);
    });

  const size = new ResizeObserver(draw);
  panels.forEach((/** @type {any} */ panel) => size.observe(panel.element));
  const noMoreThemes = onTheme(draw);
  go(end);
  return () => {
    stop();
    size.disconnect();
    noMoreThemes();
    still.remove();
  };
}

/** Lanes over a curve of the cache, both bright up to the time and faint after it.
 * @param {any} panel @param {number} time @param {number} end @param {number} most @param {string} ink */
function drawSide({ side, canvas, told }, time, end, most, ink) {
  const now = momentOf(side, time);
  told.textContent = `${now.over ? "finished" : `${now.running} running, ${now.waiting} waiting`} · ${Math.round(now.tokens).toLocaleString("en")} tokens · cache ${Math.round(100 * now.used)}%`;
  canvas.setAttribute("aria-label", `${side.label} at ${time.toFixed(2)} s: ${told.textContent}`);
  const width = canvas.parentElement.clientWidth;
  const height = LANES + CURVE + 8;
  const dots = globalThis.devicePixelRatio || 1;
  canvas.width = width * dots;
  canvas.height = height * dots;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  if (!pen || width === 0) return;
  pen.scale(dots, dots);
  const x = (/** @type {number} */ at) => 1 + (at / (end || 1)) * (width - 2);
  const high = Math.min(16, LANES / Math.max(1, side.lanes.length));
  const bar = (/** @type {number} */ from, /** @type {number} */ to, /** @type {number} */ top, /** @type {number} */ tall, seam = 0) => {
    const parts = [[from, Math.min(to, time), 1], [Math.max(from, time), to, 0.2]]; // prettier-ignore
    for (const [begin, stop, alpha] of parts) {
      if (stop <= begin) continue;
      pen.globalAlpha = alpha;
      pen.fillRect(x(begin), top, Math.max(0.5, x(stop) - x(begin) + seam), tall);
    }
  };
  side.lanes.forEach((/** @type {[string, number[]]} */ [, spans], /** @type {number} */ row) => {
    for (let i = 0; i < spans.length; i += 3) {
      const tall = Math.max(1, (high - 1) * HEIGHTS[spans[i]]);
      pen.fillStyle = COLOURS[spans[i]];
      bar(spans[i + 1], spans[i + 2], row * high + (high - tall) / 2, tall);
    }
  });
  pen.fillStyle = "#0072b2";
  const { times } = side;
  for (let i = 0; i < times.length; i++) {
    const tall = (side.curves.used[i] / most) * CURVE;
    bar(times[i], i + 1 < times.length ? times[i + 1] : side.end, height - tall, tall, 0.3);
  }
  pen.globalAlpha = 0.4;
  pen.fillStyle = ink;
  pen.fillRect(0, height - CURVE, width, 0.5);
  pen.font = "10px sans-serif";
  pen.globalAlpha = 0.8;
  pen.fillText(`KV cache used, up to ${Math.round(100 * most)}%`, 3, height - CURVE + 11);
  pen.globalAlpha = 1;
  pen.fillRect(x(time) - 0.5, 0, 1, height);
}

export default { render };
