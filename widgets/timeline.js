// The timeline: a lane for each sequence, and the batch of the step that is looked at.
// @ts-check
import { buildFrame, colourOf, isDark, make, onTheme } from "./frame.js";

const GUTTER = 64; // CSS pixels for the names
const KINDS = ["queued", "prefill", "decode", "preempted", "held"];
const COLOURS = ["#8a8a8a", "#e69f00", "#0072b2", "#d55e00", "#8a8a8a"];
const DARK_COLOURS = ["#a0a0a0", "#e69f00", "#56b4e9", "#ff7f2a", "#a0a0a0"];
const HEIGHTS = [0.2, 1, 0.6, 0.2, 0.1]; // of a lane: colour is not the only sign

/** @typedef {[number, number, number, number]} Run kind, first record, one past the last, tokens */
/** @typedef {[number, string, string, Run[]]} Lane uid, name, why it ended, runs */

/** Where records lie, from the left edge of the lanes: all as wide, or as long as they took.
 * @param {{ window: [number, number], times: number[] }} state @param {number} width @param {boolean} byTime
 * @returns {(record: number) => number} */
export function placesOf(state, width, byTime) {
  const [first, end] = state.window;
  const count = Math.max(1, end - first);
  if (!byTime || state.times.length < 2) return (record) => ((record - first) / count) * width;
  const times = state.times;
  const last = times[times.length - 1];
  const whole = last + last - times[times.length - 2] || 1;
  return (record) => ((record - first < times.length ? times[Math.max(0, record - first)] : whole) / whole) * width;
}

/** The record at a place.
 * @param {{ window: [number, number] }} state @param {(record: number) => number} places @param {number} x */
export function recordAt(state, places, x) {
  let [low, high] = [state.window[0], state.window[1] - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (places(middle) <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** How high a lane is, and all of them.
 * @param {number} count */
export function lanesHeight(count) {
  const lane = Math.max(5, Math.min(18, Math.floor(360 / Math.max(1, count))));
  return { lane, whole: lane * Math.max(1, count) };
}

/** A lane in words.
 * @param {Lane} lane */
export function laneText([, name, reason, runs]) {
  const parts = KINDS.map((kind, number) => {
    const mine = runs.filter((run) => run[0] === number);
    if (!mine.length) return "";
    const records = mine.reduce((sum, run) => sum + run[2] - run[1], 0);
    const tokens = mine.reduce((sum, run) => sum + run[3], 0);
    if (kind === "prefill") return `prefill of ${tokens} tokens in ${mine.length} ${mine.length === 1 ? "chunk" : "chunks"}`;
    if (kind === "decode") return `${tokens} decode ${tokens === 1 ? "step" : "steps"}`;
    if (kind === "preempted") return `preempted ${mine.length === 1 ? "once" : `${mine.length} times`} (${records} steps)`;
    return `${kind} for ${records} steps`;
  });
  return `${name}: ${parts.filter(Boolean).join(", ") || "not in these steps"}${reason ? `; finished (${reason})` : ""}`;
}

/** A batch in words.
 * @param {any} batch */
export function batchText(batch) {
  if (!batch) return "No step yet.";
  const chunks = batch.rows.filter((/** @type {any} */ row) => row[4]);
  const tokens = chunks.reduce((/** @type {number} */ sum, /** @type {any} */ row) => sum + row[3], 0);
  const decodes = batch.rows.length - chunks.length;
  const sides = [`${batch.waiting} waiting`];
  for (const name of ["admitted", "preempted", "finished"]) if (batch[name]) sides.push(`${batch[name]} ${name}`);
  if (!batch.rows.length) return `Between steps, after step ${batch.step}: ${sides.join(", ")}.`;
  const chunked = chunks.length ? `${chunks.length} prefill ${chunks.length === 1 ? "chunk" : "chunks"} of ${tokens} tokens, ` : "";
  return `Batch of step ${batch.step}: ${chunked}${decodes} decode ${decodes === 1 ? "token" : "tokens"}; ${sides.join(", ")}.`;
}

/** @param {{ model: import("./frame.js").Model, el: HTMLElement }} given */
function render({ model, el }) {
  /** @type {any} */
  let state = null;
  /** @type {(record: number) => number} */
  let places = (record) => record;
  /** @type {number | null} */
  let pointed = null; // a lane
  let dragging = false;
  let waiting = 0;

  const canvas = make("canvas", { className: "nbengine-lanes", tabIndex: 0, role: "img" });
  canvas.setAttribute("aria-label", "Lanes of the sequences: left and right look back and forth, up and down read a lane");
  const scroll = make("div", { className: "nbengine-scroll" }, canvas);
  const axis = make("div", { className: "nbengine-axis nbengine-quiet" });
  const facts = make("div", { className: "nbengine-lane-facts", role: "status" });
  const batch = make("ol", { className: "nbengine-batch", "aria-label": "Batch of this step" });
  const batchWords = make("div", { className: "nbengine-batch-text" });
  const byTime = make("input", { type: "checkbox" });
  const steps = make("select", { "aria-label": "Steps shown" });
  steps.append(...[50, 100, 200, 500, 1000, 2000].map((count) => make("option", { value: count, textContent: `${count} steps` })));
  const legend = make("span", { className: "nbengine-lane-legend" });
  const names = ["queued", "prefill chunk", "decode", "preempted"];
  legend.append(...names.map((name, kind) => make("span", {}, make("i", { className: `nbengine-run nbengine-run-${KINDS[kind]}` }), name)));
  legend.append(make("span", {}, make("i", { className: "nbengine-run-end" }), "finished"));

  const frame = buildFrame({ model, el }, "Timeline", (/** @type {any} */ sent) => {
    state = sent;
    tell();
    later();
  });
  frame.tools.append(make("label", {}, "Show ", steps), make("label", {}, byTime, " as long as they took"), legend);
  steps.disabled = frame.saved;
  frame.body.append(scroll, axis, facts, batchWords, batch);
  steps.addEventListener("change", () => frame.press("steps", Number(steps.value)));
  byTime.addEventListener("change", () => later());

  const tell = () => {
    const [first, end] = state.window;
    if (document.activeElement !== steps) {
      const known = [...steps.options].some((/** @type {any} */ option) => Number(option.value) === state.steps);
      if (!known) steps.append(make("option", { value: state.steps, textContent: `${state.steps} steps` }));
      steps.value = String(state.steps);
    }
    const long = state.times.length ? state.times[state.times.length - 1] : 0;
    const more = state.left_out ? ` · ${state.left_out} earlier sequences are not drawn` : "";
    axis.textContent = end > first ? `records ${first} to ${end - 1}, ${(long / 10000).toFixed(2)} s${more}` : "no step yet";
    tellLane();
    batchWords.textContent = batchText(state.batch);
    tellBatch();
  };
  const tellLane = () => {
    const lane = pointed === null ? null : state.lanes[pointed];
    facts.textContent = lane ? laneText(lane) : "Point at a lane to read it; drag to look back.";
  };
  const tellBatch = () => {
    const rows = state.batch ? state.batch.rows : [];
    while (batch.children.length > rows.length) batch.lastChild.remove();
    rows.forEach((/** @type {any} */ [uid, name, start, count, prompt], /** @type {number} */ i) => {
      const entry = batch.children[i] ?? batch.appendChild(make("li"));
      const text = `${name}: ${count} ${prompt ? "of its prompt" : "decode"} ${count === 1 ? "token" : "tokens"} from position ${start}`;
      if (entry.title === text) return;
      entry.title = text;
      entry.dataset.uid = uid;
      entry.dataset.count = count;
      entry.className = prompt ? "nbengine-chunk" : "nbengine-decode";
      entry.textContent = prompt ? `${name} ${count}` : "";
      entry.style.flexGrow = count;
      entry.style.setProperty("--colour", colourOf(uid));
    });
  };

  // ── drawing
  const later = () => {
    if (!waiting) waiting = requestAnimationFrame(paint);
  };
  const paint = () => {
    waiting = 0;
    if (!state || !el.isConnected) return;
    const width = Math.max(240, frame.body.clientWidth - 4);
    const { lane, whole } = lanesHeight(state.lanes.length);
    const scale = devicePixelRatio || 1;
    const newest = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 8; // it stays with the newest lanes unless scrolled away
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(whole * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(whole * scale);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${whole}px`;
      if (newest) scroll.scrollTop = whole;
    }
    places = placesOf(state, width - GUTTER, byTime.checked);
    const brush = canvas.getContext("2d", { willReadFrequently: true });
    brush.setTransform(scale, 0, 0, scale, 0, 0);
    brush.clearRect(0, 0, width, whole);
    const dark = isDark(el);
    const ink = dark ? "#eeeeee" : "#222222";
    const colours = dark ? DARK_COLOURS : COLOURS;
    brush.font = `${Math.min(11, lane - 1)}px system-ui, sans-serif`;
    brush.textBaseline = "middle";
    state.lanes.forEach((/** @type {Lane} */ one, /** @type {number} */ row) =>
      drawLane(brush, one, row * lane, lane, colours, ink, row === pointed),
    );
    const at = state.moment.at;
    if (at >= state.window[0] && at < state.window[1]) {
      const x = GUTTER + (places(at) + places(at + 1)) / 2;
      brush.fillStyle = ink;
      brush.fillRect(Math.round(x) - 0.5, 0, state.moment.live ? 1 : 2, whole);
    }
    Object.assign(canvas.dataset, { gutter: GUTTER, lane, frames: String(Number(canvas.dataset.frames ?? 0) + 1) });
  };
  const drawLane = (
    /** @type {CanvasRenderingContext2D} */ brush,
    /** @type {Lane} */ [, name, reason, runs],
    /** @type {number} */ top,
    /** @type {number} */ high,
    /** @type {string[]} */ colours,
    /** @type {string} */ ink,
    /** @type {boolean} */ marked,
  ) => {
    if (marked) {
      brush.fillStyle = "rgba(127,127,127,0.22)";
      brush.fillRect(0, top, canvas.width, high);
    }
    if (high >= 9) {
      brush.fillStyle = ink;
      brush.fillText(name, 2, top + high / 2, GUTTER - 6);
    }
    let right = 0;
    for (const [kind, begin, stop] of runs) {
      const tall = Math.max(1, Math.round((high - 1) * HEIGHTS[kind]));
      const x = GUTTER + places(begin);
      right = GUTTER + places(stop);
      brush.fillStyle = colours[kind];
      const gap = kind === 1 && right - x > 2 ? 1 : 0; // chunks stand apart
      brush.fillRect(x, top + Math.floor((high - tall) / 2), Math.max(0.5, right - x - gap), tall);
    }
    if (reason) {
      brush.fillStyle = ink;
      brush.fillRect(right - 1, top, 2, high - 1);
    }
  };

  // ── pointing and dragging
  const point = (/** @type {PointerEvent} */ event) => {
    if (!state) return;
    const box = canvas.getBoundingClientRect();
    const { lane } = lanesHeight(state.lanes.length);
    const row = Math.floor((event.clientY - box.top) / lane);
    mark(row >= 0 && row < state.lanes.length ? row : null);
    if (dragging && event.clientX - box.left >= GUTTER) frame.seek(recordAt(state, places, event.clientX - box.left - GUTTER));
  };
  const mark = (/** @type {number | null} */ row) => {
    if (row === pointed) return;
    pointed = row;
    tellLane();
    later();
  };
  canvas.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
    dragging = true;
    canvas.setPointerCapture(event.pointerId);
    point(event);
  });
  canvas.addEventListener("pointermove", point);
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (dragging = false));
  canvas.addEventListener("pointerleave", () => mark(null));
  canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (!state) return;
    if (event.key === "ArrowLeft") frame.seekBy(-1);
    else if (event.key === "ArrowRight") frame.seekBy(1);
    else if (event.key === "ArrowUp") mark(Math.max(0, (pointed ?? 1) - 1));
    else if (event.key === "ArrowDown") mark(Math.min(state.lanes.length - 1, (pointed ?? -1) + 1));
    else if (event.key === "Escape") frame.press("live");
    else return;
    event.preventDefault();
  });

  const resized = new ResizeObserver(later);
  resized.observe(frame.body);
  const endTheme = onTheme(later);
  return () => {
    resized.disconnect();
    endTheme();
    cancelAnimationFrame(waiting);
    frame.stop();
  };
}

export default { render };
