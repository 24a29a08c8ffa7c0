// What every view has around it: its title, the controls of time, what went wrong, and whether the kernel hears.
// @ts-check

/**
 * @typedef {{ first: number, last: number, at: number, live: boolean, traced: boolean, playing: boolean, status: string,
 *   engine: boolean, speed: number | null, step: number | null, seconds: number, name: string }} Moment
 * @typedef {{ get(name: string): any, send(content: any): void, on(event: string, call: (...given: any[]) => void): void,
 *   off(event: string, call: (...given: any[]) => void): void }} Model
 * @typedef {{ body: HTMLElement, tools: HTMLElement, saved: boolean, press(name: string, value?: any): void, seek(at: number): void,
 *   seekBy(count: number): void, uncover(): void, stop(): void }} Frame a saved one was kept with a page and has no kernel
 */

/** Okabe and Ito's colours: told apart by the colour-blind, and seen on white and on black. */
export const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800"];

const FULL_SPEED = 60; // the slider's right end
const DEAF_AFTER = 1000; // milliseconds without an answer until the view says that the kernel does not hear
const DRAWN_EVERY = 2000; // milliseconds between two words of thanks for what was sent

/** @param {number} uid */
export function colourOf(uid) {
  return PALETTE[uid % PALETTE.length];
}

/** The slider's places are powers: slow speeds need the finer choice.
 * @param {number} place @returns {number | null} steps a second; null for full speed */
export function speedAt(place) {
  if (place >= 100) return null;
  const speed = 0.2 * (FULL_SPEED / 0.2) ** (place / 100);
  return speed < 10 ? Math.round(10 * speed) / 10 : Math.round(speed);
}

/** @param {number | null} speed */
export function placeOf(speed) {
  return speed === null ? 100 : Math.round((100 * Math.log(speed / 0.2)) / Math.log(FULL_SPEED / 0.2));
}

/** @param {Moment} moment */
export function momentText(moment) {
  const state = moment.engine || moment.status === "closed" || moment.status === "dead" ? `engine ${moment.status}` : "recorded trace";
  if (moment.at < 0) return moment.traced ? `${state}, no step yet` : state;
  const where = moment.live ? "" : ` · looking back: record ${moment.at} of ${moment.first} to ${moment.last}`;
  return `${state} · step ${moment.step} at ${moment.seconds.toFixed(2)} s${where}`;
}

/** Which buttons say what now.
 * @param {Moment} moment */
export function controlsOf(moment) {
  const moving = moment.playing || (moment.live && ["running", "idle", "running slowly"].includes(moment.status));
  const past = !moment.live;
  return {
    toggle: moving ? "pause" : "resume",
    toggleLabel: moving ? "Pause" : past || !moment.engine ? "Play" : "Resume",
    canToggle: moment.engine || moment.last >= 0,
    canStep: moment.engine ? true : moment.at < moment.last,
    canBack: moment.at > moment.first,
    canGoLive: past,
    liveLabel: moment.engine ? "Live" : "End",
  };
}

/** @param {string} tag @param {Record<string, any>} [given] @param {(Node | string)[]} children
 * @returns {any} */
export function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in element && name !== "list" && name !== "form") /** @type {any} */ (element)[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Calls at most so often, with the newest arguments, and always with the last ones.
 * @template {any[]} T @param {number} every @param {(...given: T) => void} call @returns {(...given: T) => void} */
export function throttled(every, call) {
  let last = -Infinity;
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    const wait = last + every - performance.now();
    const now = () => {
      last = performance.now();
      call(...given);
    };
    if (wait <= 0) now();
    else timer = /** @type {any} */ (setTimeout(now, wait));
  };
}

/** A style that hides a static picture by its name, whether it is drawn in place or as an image.
 * @param {string} name */
export function coverOf(name) {
  const opening = btoa(`<svg class="${name}`).replace(/.{0,4}$/, ""); // its last bytes may be others, with what follows
  return make("style", { textContent: `.${name}, img[src*="${name}"], img[src*="${opening}"] { display: none !important; }` });
}

/** Whether what is around an element is dark.
 * @param {Element} el */
export function isDark(el) {
  const ink = getComputedStyle(el).color.match(/[\d.]+/g) ?? ["0", "0", "0"];
  return Number(ink[0]) + Number(ink[1]) + Number(ink[2]) > 380;
}

/** Call when the theme has changed; returns what ends that.
 * @param {() => void} call */
export function onTheme(call) {
  const later = () => setTimeout(call, 50);
  const watch = new MutationObserver(later);
  const parts = { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class", "data-vscode-theme-kind"] };
  watch.observe(document.body, parts);
  watch.observe(document.documentElement, parts);
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", later);
  return () => {
    watch.disconnect();
    media.removeEventListener("change", later);
  };
}

/** Build it in `el`; `draw` is called with the view's state when there is something new to draw.
 * @param {{ model: Model, el: HTMLElement }} given @param {string} title @param {(state: any) => void} draw @returns {Frame} */
export function buildFrame({ model, el }, title, draw) {
  const place = Math.random().toString(36).slice(2);
  let number = 0;
  let heard = 0;
  let thanked = 0;
  let stopped = false;
  /** @type {any} */
  let deaf = 0;

  el.classList.add("nbengine-view");
  el.setAttribute("role", "region");
  el.setAttribute("aria-label", title);
  const saved = model.get("layout")?.comm_live === false;
  const still = coverOf(model.get("still"));
  if (saved)
    el.classList.add("nbengine-empty"); // until it is known that there is anything to draw
  else document.head.append(still);

  const say = (/** @type {Record<string, any>} */ message) => model.send({ place, ...message });
  /** @type {Frame["press"]} */
  const press = (name, value) => {
    if (saved) return;
    if (name !== "seek") askFor(); // in the order of what was done
    number += 1;
    say({ press: name, value, number });
    clearTimeout(deaf);
    deaf = setTimeout(() => el.classList.toggle("nbengine-deaf", heard < number), DEAF_AFTER);
  };

  // ── the controls of time
  const button = (/** @type {string} */ name, /** @type {string} */ label, /** @type {string} */ hint) =>
    make("button", { type: "button", textContent: label, title: hint, onclick: () => press(name) });
  const toggle = make("button", { type: "button", textContent: "Pause", onclick: () => press(toggle.dataset.press) });
  const back = button("back", "◂ Back", "Look at the step before");
  const step = button("step", "Step ▸", "One step on");
  const live = button("live", "Live", "Return to the newest step");
  const speed = make("input", { type: "range", min: "0", max: "100", value: "100", className: "nbengine-speed", "aria-label": "Speed" });
  const speedText = make("output", { className: "nbengine-quiet" });
  const scrub = make("input", { type: "range", min: "0", max: "0", step: "1", className: "nbengine-scrub", "aria-label": "Recorded step" });
  const status = make("span", { className: "nbengine-status", role: "status" });
  const tools = make("div", { className: "nbengine-tools" });
  const body = make("div", { className: "nbengine-body" });
  const note = make("div", { className: "nbengine-quiet nbengine-note", role: "status" });
  const trouble = make("div", { className: "nbengine-trouble", role: "alert" });
  const hard = make("div", { className: "nbengine-hard", role: "status" });
  hard.textContent = "The kernel is busy with a cell and does not hear this button yet: it acts when the cell ends or awaits.";
  let aimed = 0; // the press that asked for where the slider stands: it follows what was sent after that was heard; Infinity: none has yet
  const askFor = () => {
    if (aimed < Infinity) return;
    press("seek", Number(scrub.value));
    aimed = number;
  };
  const ask = throttled(100, askFor);
  /** @type {Frame["seek"]} */
  const seek = (at) => {
    if (saved) return;
    scrub.value = String(at);
    aimed = Infinity;
    ask();
  };
  const go = throttled(150, (/** @type {number | null} */ value) => press("speed", value));
  let dragging = false;
  scrub.addEventListener("pointerdown", () => (dragging = true));
  for (const end of ["change", "pointerup", "pointercancel", "blur"]) scrub.addEventListener(end, () => (dragging = false));
  scrub.addEventListener("input", () => seek(Number(scrub.value)));
  const tellSpeed = () => {
    const value = speedAt(Number(speed.value));
    speedText.textContent = value === null ? "full speed" : `${value} steps/s`;
    speed.setAttribute("aria-valuetext", speedText.textContent);
    return value;
  };
  speed.addEventListener("input", () => go(tellSpeed()));
  const controls = make("div", { className: "nbengine-time", role: "group" }, toggle, back, step, live, scrub, speed, speedText);
  controls.setAttribute("aria-label", "Time");
  el.append(
    make("div", { className: "nbengine-head" }, make("strong", { textContent: title }), status),
    controls,
    hard,
    tools,
    body,
    note,
    trouble,
  );

  const show = (/** @type {Moment} */ moment, /** @type {number} */ known) => {
    const can = controlsOf(moment);
    toggle.textContent = can.toggleLabel;
    toggle.dataset.press = can.toggle;
    toggle.disabled = !can.canToggle;
    back.disabled = !can.canBack;
    step.disabled = !can.canStep;
    live.disabled = !can.canGoLive;
    live.textContent = can.liveLabel;
    live.hidden = !moment.engine;
    scrub.min = String(Math.max(0, moment.first));
    scrub.max = String(Math.max(0, moment.last));
    scrub.disabled = moment.last < 0;
    if (!dragging && known >= aimed) scrub.value = String(Math.max(0, moment.at));
    scrub.setAttribute("aria-valuetext", moment.at < 0 ? "no step yet" : `step ${moment.step}${moment.live ? ", live" : ""}`);
    if (document.activeElement !== speed) speed.value = String(placeOf(moment.speed));
    tellSpeed();
    if (saved) for (const control of [toggle, back, step, live, scrub, speed]) control.disabled = true;
    status.textContent = momentText(moment) + (saved ? " · saved, without its kernel" : "");
    el.classList.toggle("nbengine-past", !moment.live);
  };

  const changed = () => {
    const packed = model.get("packed");
    if (!packed || !packed.json) return; // nobody has looked yet
    const frame = { ...JSON.parse(packed.json), data: packed.data };
    if (!frame.moment) return;
    if (saved) {
      document.head.append(still);
      el.classList.remove("nbengine-empty");
    }
    show(frame.moment, frame.heard?.[place] ?? 0);
    note.textContent = frame.note ?? "";
    trouble.textContent = frame.trouble ?? "";
    draw(frame);
    const now = performance.now();
    if (now - thanked > DRAWN_EVERY) {
      thanked = now;
      say({ drawn: true });
    }
  };
  const answered = (/** @type {any} */ message) => {
    if (message.place !== place) return;
    heard = Math.max(heard, message.heard);
    if (heard >= number) el.classList.remove("nbengine-deaf");
  };

  // ── keys: JupyterLab takes bare ones from whatever is no text field, before it hears of them or after; Ctrl+S and the like stay its own
  const bare = (/** @type {KeyboardEvent} */ event) => !(event.ctrlKey || event.metaKey || event.altKey);
  const before = (/** @type {KeyboardEvent} */ event) => {
    if (el.contains(/** @type {Node} */ (event.target))) el.toggleAttribute("data-lm-suppress-shortcuts", bare(event));
  };
  const after = (/** @type {KeyboardEvent} */ event) => {
    if (bare(event)) event.stopPropagation();
  };
  window.addEventListener("keydown", before, true);
  el.addEventListener("keydown", after);

  // ── whether anybody sees it
  let inSight = true;
  let seen = false;
  const look = () => {
    const now = inSight && document.visibilityState !== "hidden";
    if (now !== seen) say({ seen: now });
    seen = now;
  };
  const sight = new IntersectionObserver((entries) => {
    inSight = entries[entries.length - 1].isIntersecting;
    look();
  });
  sight.observe(el);
  document.addEventListener("visibilitychange", look);

  model.on("change:packed", changed);
  model.on("msg:custom", answered);
  queueMicrotask(() => stopped || changed()); // what was sent before is drawn when the view has been built
  look();
  const stop = () => {
    stopped = true;
    clearTimeout(deaf);
    sight.disconnect();
    document.removeEventListener("visibilitychange", look);
    window.removeEventListener("keydown", before, true);
    el.removeEventListener("keydown", after);
    model.off("change:packed", changed);
    model.off("msg:custom", answered);
    still.remove();
    say({ gone: true });
  };
  const seekBy = (/** @type {number} */ count) => seek(Number(scrub.value) + count);
  return { body, tools, saved, press, seek, seekBy, uncover: () => still.remove(), stop };
}
