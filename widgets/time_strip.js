// The strip under charts, in which a stretch of time is chosen with a pointer or from the keyboard.
// @ts-check
import { make } from "./frame.js";

/** The strip under the charts: all of the time, and the stretch that is looked at.
 * @param {(span: number[] | null) => void} choose */
export function buildStrip(choose) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 1000 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const pane = make("div", { className: "nbengine-pane" });
  const strip = make(
    "div",
    { className: "nbengine-strip", title: "Drag to look at a stretch of time; double-click for all of it" },
    svg,
    pane,
  );
  const ends = ["From", "To"].map((label) =>
    make("input", { type: "range", min: "0", max: "1000", step: "1", "aria-label": `${label}: time of the charts` }),
  );
  const all = make("button", { type: "button", textContent: "All", title: "Look at all of the time" });
  const text = make("output", { className: "nbengine-quiet" });
  const row = make(
    "div",
    { className: "nbengine-ends" },
    make("label", {}, "from ", ends[0]),
    make("label", {}, "to ", ends[1]),
    all,
    text,
  );
  let first = 0;
  let last = 1;
  /** @type {number[] | null} */
  let span = null;
  let busy = false;

  const show = () => {
    const share = (/** @type {number} */ time) => Math.min(1, Math.max(0, (time - first) / (last - first || 1)));
    const [begin, end] = (span ?? [first, last]).map(share);
    pane.style.left = `${100 * begin}%`;
    pane.style.width = `${100 * Math.max(0.002, end - begin)}%`;
    pane.hidden = span === null;
    if (!busy) [begin, end].forEach((place, i) => (ends[i].value = String(Math.round(1000 * place))));
    all.disabled = span === null;
    text.textContent = span ? `${span[0].toFixed(2)} s to ${span[1].toFixed(2)} s` : `all ${(last - first).toFixed(1)} s`;
    ends.forEach((input, i) => input.setAttribute("aria-valuetext", `${(span ?? [first, last])[i].toFixed(2)} seconds`));
  };
  const set = (/** @type {number[] | null} */ chosen) => {
    span = chosen;
    show();
    choose(chosen);
  };
  const timeAt = (/** @type {PointerEvent} */ event) => {
    const box = strip.getBoundingClientRect();
    return first + Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * (last - first);
  };
  strip.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
    const from = timeAt(event);
    const held = span && event.target === pane ? span : null; // moved along, or drawn anew
    strip.setPointerCapture(event.pointerId);
    busy = true;
    const move = (/** @type {PointerEvent} */ moved) => {
      const to = timeAt(moved);
      if (held) {
        const by = Math.min(last - held[1], Math.max(first - held[0], to - from));
        set([held[0] + by, held[1] + by]);
      } else if (Math.abs(to - from) > 0.005 * (last - first)) set([Math.min(from, to), Math.max(from, to)]);
    };
    const up = () => {
      busy = false;
      strip.removeEventListener("pointermove", move);
      strip.removeEventListener("pointerup", up);
      strip.removeEventListener("pointercancel", up);
      show();
    };
    strip.addEventListener("pointermove", move);
    strip.addEventListener("pointerup", up);
    strip.addEventListener("pointercancel", up);
  });
  strip.addEventListener("dblclick", () => set(null));
  all.addEventListener("click", () => set(null));
  ends.forEach((input, i) =>
    input.addEventListener("input", () => {
      const times = ends.map((one) => first + (Number(one.value) / 1000) * (last - first));
      const other = times[1 - i];
      times[i] = i === 0 ? Math.min(times[i], other - 0.001 * (last - first)) : Math.max(times[i], other + 0.001 * (last - first));
      busy = true;
      set(times);
      busy = false;
    }),
  );

  return {
    element: make("div", {}, strip, row),
    set,
    /** @param {{ times: number[], lines: { values: Float32Array }[] }} chart @param {number[] | null} chosen what the kernel knows of */
    draw(chart, chosen) {
      if (!chart.times.length) return;
      first = chart.times[0];
      last = Math.max(chart.times[chart.times.length - 1], first + 1e-6);
      const values = chart.lines[0].values;
      const top = Math.max(1e-9, ...values);
      let path = "M0 40";
      chart.times.forEach((time, i) => {
        path += `H${((1000 * (time - first)) / (last - first)).toFixed(1)}V${(40 - (38 * values[i]) / top).toFixed(1)}`;
      });
      svg.innerHTML = `<path d="${path}V40z"/>`;
      if (!busy) span = chosen;
      show();
    },
  };
}
