// The block table: a cell for each physical KV block, the page table of a chosen sequence, and what is in a block.
// @ts-check
import { buildFrame, colourOf, isDark, make, onTheme, throttled } from "./frame.js";

export const HELD = 1;
export const CACHED = 2;
export const SHARED = 4;
export const COPIED = 8;
export const EMPTY = 16;
export const SEVERAL = 0xffff;

const TALLEST = 480; // CSS pixels that the cells may take
const SIDES = [22, 20, 18, 16, 14, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3];
const FLASH = 400; // milliseconds that a cell stays marked after it has changed hands
const FRAME = 1000 / 30;

/**
 * @typedef {{ owner: number, held: number, shared: number, copied: number, cached: number, filled: number }} Cell shares of 0 to 1
 * @typedef {{ side: number, gap: number, columns: number, rows: number, count: number }} Layout
 */

/** What was sent, cell by cell.
 * @param {any} state */
export class Cells {
  /** @param {any} state */
  constructor(state) {
    this.size = state.size;
    this.blocks = state.blocks;
    this.group = state.group;
    this.count = Math.ceil(state.blocks / state.group);
    this.bytes = state.data;
    this.names = new Map();
    this.uids = new Map();
    state.uids.forEach((/** @type {number} */ uid, /** @type {number} */ i) => {
      this.uids.set(uid % SEVERAL, uid);
      this.names.set(uid, state.names[i] ?? `#${uid}`);
    });
    this.partial = new Map();
    for (let i = 0; i < state.partial.length; i += 2) this.partial.set(state.partial[i], state.partial[i + 1]);
  }

  /** The flags of a block, where each has a cell of its own.
   * @param {number} i */
  kind(i) {
    return this.bytes.getUint8(2 * this.count + i);
  }

  /** How many of a block's slots are used.
   * @param {number} i */
  slots(i) {
    const kind = this.kind(i);
    if (kind & EMPTY || !(kind & (HELD | CACHED))) return 0;
    return this.partial.get(i) ?? this.size;
  }

  /** The uid of who holds it first; null for nobody, SEVERAL where a cell's blocks have several owners.
   * @param {number} i */
  owner(i) {
    const low = this.bytes.getUint16(2 * i, true);
    if (this.group === 1) return this.kind(i) & HELD ? (this.uids.get(low) ?? low) : null;
    if (low === SEVERAL) return SEVERAL;
    return this.bytes.getUint8(2 * this.count + i) ? (this.uids.get(low) ?? low) : null;
  }

  /** A cell as shares of its blocks.
   * @param {number} i @returns {Cell & { owner: number | null }} */
  cell(i) {
    const owner = this.owner(i);
    if (this.group === 1) {
      const kind = this.kind(i);
      return {
        owner,
        held: kind & HELD ? 1 : 0,
        shared: kind & SHARED ? 1 : 0,
        copied: kind & COPIED ? 1 : 0,
        cached: kind & CACHED ? 1 : 0,
        filled: kind & HELD ? this.slots(i) / this.size : 0,
      };
    }
    const share = (/** @type {number} */ part) => this.bytes.getUint8(2 * this.count + part * this.count + i) / 255;
    return { owner, held: share(0), shared: share(1), copied: share(2), cached: share(3), filled: share(4) };
  }
}

/** The largest cells that fit.
 * @param {number} width @param {number} count @returns {Layout} */
export function layoutFor(width, count) {
  let side = SIDES[SIDES.length - 1];
  for (const one of SIDES) {
    const columns = Math.max(1, Math.floor(width / one));
    if (Math.ceil(count / columns) * one <= TALLEST) {
      side = one;
      break;
    }
  }
  const columns = Math.max(1, Math.min(count, Math.floor(width / side)));
  return { side, gap: side > 3 ? 1 : 0, columns, rows: Math.ceil(count / columns), count };
}

/** Which cell lies at a point; null for none.
 * @param {Layout} layout @param {number} x @param {number} y */
export function cellAt(layout, x, y) {
  const column = Math.floor(x / layout.side);
  const row = Math.floor(y / layout.side);
  const cell = row * layout.columns + column;
  return column < 0 || column >= layout.columns || row < 0 || cell >= layout.count ? null : cell;
}

/** Where an arrow key leads.
 * @param {Layout} layout @param {number} cell @param {string} key */
export function cellAfter(layout, cell, key) {
  const steps = {
    ArrowLeft: -1,
    ArrowRight: 1,
    ArrowUp: -layout.columns,
    ArrowDown: layout.columns,
    Home: -cell,
    End: layout.count - 1 - cell,
  };
  const step = /** @type {any} */ (steps)[key];
  if (step === undefined) return null;
  const next = cell + step;
  return next < 0 || next >= layout.count ? cell : next;
}

/** How high a cell is filled: at least a pixel where there is anything, and full only where all is.
 * @param {number} inner @param {number} share */
export function fillHeight(inner, share) {
  if (share <= 0) return 0;
  if (share >= 1) return inner;
  return Math.min(inner - 1, Math.max(1, Math.round(inner * share)));
}

/** Draw every cell.
 * @param {CanvasRenderingContext2D} context @param {Cells} cells @param {Layout} layout
 * @param {{ ink: string, paper: string }} theme @param {Set<number> | null} lit the cells to light up, if not all are */
export function drawCells(context, cells, layout, theme, lit) {
  const { side, gap, columns, count } = layout;
  const inner = side - gap;
  context.clearRect(0, 0, columns * side, layout.rows * side);
  /** @type {Map<string, number[]>} */
  const fills = new Map(); // by colour: [x, y, width, height] of each rectangle
  const rectangle = (
    /** @type {string} */ colour,
    /** @type {number} */ x,
    /** @type {number} */ y,
    /** @type {number} */ w,
    /** @type {number} */ h,
  ) => {
    let list = fills.get(colour);
    if (!list) fills.set(colour, (list = []));
    list.push(x, y, w, h);
  };
  const hatched = [];
  for (let i = 0; i < count; i++) {
    const cell = cells.cell(i);
    const x = (i % columns) * side;
    const y = Math.floor(i / columns) * side;
    if (!cell.held && !cell.cached) {
      rectangle("rgba(127,127,127,0.14)", x, y, inner, inner);
      continue;
    }
    const dim = lit !== null && !lit.has(i);
    if (cell.held) {
      const colour = cell.owner === SEVERAL || cell.owner === null ? "#7f7f7f" : colourOf(cell.owner);
      const height = fillHeight(inner, cell.filled);
      rectangle(`${colour}${dim ? "18" : "48"}`, x, y, inner, inner - height);
      rectangle(dim ? `${colour}40` : colour, x, y + inner - height, inner, height);
    } else {
      rectangle("rgba(127,127,127,0.14)", x, y, inner, inner);
    }
    if (cell.cached) hatched.push(x, y + inner - fillHeight(inner, cell.cached), fillHeight(inner, cell.cached), i);
  }
  for (const [colour, list] of fills) {
    context.fillStyle = colour;
    for (let i = 0; i < list.length; i += 4) if (list[i + 3] > 0) context.fillRect(list[i], list[i + 1], list[i + 2], list[i + 3]);
  }
  drawHatches(context, hatched, inner, cells.group > 1);
  for (let i = 0; i < count; i++) {
    const cell = cells.cell(i);
    if (!cell.shared && !cell.copied) continue;
    const x = (i % columns) * side;
    const y = Math.floor(i / columns) * side;
    if (cell.shared) drawShared(context, x, y, inner, theme);
    if (cell.copied) drawCopied(context, x, y, inner, theme);
  }
}

/** Cached blocks are grey lines: what is in them can be found, and nobody holds it.
 * @param {CanvasRenderingContext2D} context @param {number[]} hatched @param {number} inner @param {boolean} narrow */
function drawHatches(context, hatched, inner, narrow) {
  context.fillStyle = context.strokeStyle = "rgba(127,127,127,0.75)";
  context.lineWidth = 1;
  const wide = narrow ? Math.max(1, Math.floor(inner / 3)) : inner; // in a group they stand at the right edge, beside what is held
  for (let i = 0; i < hatched.length; i += 4) {
    const [x, y, height] = [hatched[i] + inner - wide, hatched[i + 1], hatched[i + 2]];
    for (let line = height - 1; line >= 0; line -= inner < 8 ? 2 : 3) context.fillRect(x, y + line, wide, 1);
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} y @param {number} inner @param {{ ink: string, paper: string }} theme */
function drawShared(context, x, y, inner, theme) {
  const part = Math.max(1, Math.floor(inner / 3));
  const at = Math.floor((inner - part) / 2);
  if (inner > 7) {
    context.fillStyle = theme.ink;
    context.fillRect(x + at - 1, y + at - 1, part + 2, part + 2);
  }
  context.fillStyle = theme.paper;
  context.fillRect(x + at, y + at, part, part);
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} y @param {number} inner @param {{ ink: string, paper: string }} theme */
function drawCopied(context, x, y, inner, theme) {
  const part = Math.max(1, Math.floor(inner / 2.2));
  context.fillStyle = theme.ink;
  context.beginPath();
  context.moveTo(x + inner, y);
  context.lineTo(x + inner, y + part);
  context.lineTo(x + inner - part, y);
  context.fill();
}

/** What is known of a cell without asking the kernel.
 * @param {Cells} cells @param {number} i */
export function cellText(cells, i) {
  const cell = cells.cell(i);
  const owner = cell.owner === null ? "" : cell.owner === SEVERAL ? "several sequences" : (cells.names.get(cell.owner) ?? `#${cell.owner}`);
  if (cells.group > 1) {
    const last = Math.min(cells.blocks, (i + 1) * cells.group) - 1;
    const held = `${Math.round(100 * cell.held)} % held${owner ? ` by ${owner}` : ""}, ${Math.round(100 * cell.cached)} % cached`;
    return `blocks ${i * cells.group} to ${last}: ${held}, ${Math.round(100 * cell.filled)} % of their slots used`;
  }
  const marks = `${cell.shared ? ", shared" : ""}${cell.copied ? ", copied on write" : ""}`;
  if (cell.held) return `block ${i}: held by ${owner}${marks}, ${cells.slots(i)} of ${cells.size} slots used`;
  return cell.cached ? `block ${i}: cached and free` : `block ${i}: free`;
}

/** The first of many, and how many more there are.
 * @param {string[]} first @param {number} count */
function listed(first, count) {
  return first.join(", ") + (count > first.length ? ` and ${count - first.length} more` : "");
}

/** Whether what the kernel knows is of what is pointed at: of a cell, or of one block of it.
 * @param {any} facts @param {number | null} cell @param {number | null} block */
export function areOf(facts, cell, block) {
  return facts.cell === undefined ? facts.block === (block ?? cell) : block === null && facts.cell === cell;
}

/** What the kernel knows of a block, in words.
 * @param {any} facts @param {number} size */
export function factsText(facts, size) {
  if (facts.cell !== undefined) {
    const owners = listed(
      facts.owners.map((/** @type {any} */ owner) => owner[1]),
      facts.sequences,
    );
    return [
      `blocks ${facts.blocks[0]} to ${facts.blocks[1]}: ${facts.held} held${owners ? ` by ${owners}` : ""}, ${facts.cached} cached and free`,
    ];
  }
  const owners = listed(
    facts.owners.map((/** @type {any} */ owner) => `${owner[1]} (its block ${owner[2]})`),
    facts.references,
  );
  const references = `${facts.references} ${facts.references === 1 ? "reference" : "references"}`;
  const state = owners ? `held by ${owners}, ${references}` : facts.hash ? "cached and free" : "free";
  const lines = [`block ${facts.block}: ${state}, ${facts.slots} of ${size} slots used`];
  const ago = (/** @type {[number, number] | null} */ age) => (age ? `${age[0]} steps (${age[1]} s) ago` : "before this trace begins");
  const more = [];
  if (facts.copy_of !== null) more.push(`copied on write from block ${facts.copy_of}`);
  more.push(facts.hash ? `hash ${facts.hash}…` : "no hash");
  if (owners || facts.hash) more.push(`taken ${ago(facts.taken)}`);
  if (!owners && facts.hash) more.push(`let go ${ago(facts.freed)}`);
  lines.push(more.join(" · "));
  return lines;
}

/** @param {{ model: import("./frame.js").Model, el: HTMLElement }} given */
function render({ model, el }) {
  /** @type {Cells | null} */
  let cells = null;
  let layout = layoutFor(300, 1);
  /** @type {any} */
  let state = null;
  /** @type {number | null} */
  let pointed = null;
  /** @type {number | null} */
  let only = null; // the block that is pointed at, where its cell stands for several
  let focused = 0;
  let changedAt = new Float64Array(0);
  let drawn = 0;
  let waiting = 0;
  let stale = true;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  const canvas = make("canvas", { className: "nbengine-cells", tabIndex: 0, role: "img" });
  canvas.setAttribute("aria-label", "KV blocks: arrow keys move, Enter chooses the sequence that holds a block");
  const over = make("canvas", { className: "nbengine-over" });
  over.setAttribute("aria-hidden", "true");
  const grid = make("div", { className: "nbengine-grid" }, canvas, over);
  const facts = make("div", { className: "nbengine-facts", role: "status" });
  const chooser = make("select", { "aria-label": "Sequence whose table is shown" });
  const level = make("span", { className: "nbengine-level" });
  const legend = make("div", { className: "nbengine-legend" });
  const note = make("div", { className: "nbengine-quiet" });
  const table = make("ol", { className: "nbengine-pages", "aria-label": "Page table" });
  const head = make("div", { className: "nbengine-pages-head" });

  const frame = buildFrame({ model, el }, "KV blocks", (/** @type {any} */ sent) => take(sent));
  frame.tools.append(make("label", {}, "Sequence ", chooser), level);
  chooser.disabled = frame.saved;
  frame.body.append(grid, legend, note, facts, head, table);
  const inspect = throttled(100, () => (only === null ? frame.press("inspect", pointed) : frame.press("block", only)));

  const take = (/** @type {any} */ sent) => {
    const before = cells;
    state = sent;
    cells = new Cells(sent);
    if (changedAt.length !== cells.count) changedAt = new Float64Array(cells.count);
    else if (before && before.group === cells.group && !calm.matches) {
      const now = performance.now();
      for (let i = 0; i < cells.count; i++) if (cells.owner(i) !== before.owner(i)) changedAt[i] = now;
    }
    stale = true;
    tell();
    later();
  };

  const choose = (/** @type {number | null} */ uid) => frame.press("choose", uid);
  chooser.addEventListener("change", () => choose(chooser.value === "" ? null : Number(chooser.value)));

  /** Everything that is text. */
  const tell = () => {
    if (!cells) return;
    const totals = state.totals;
    const slots = totals.held * cells.size;
    const percent = (/** @type {number} */ part, /** @type {number} */ whole) => (whole ? Math.round((100 * part) / whole) : 0);
    level.textContent = `${percent(totals.held, totals.blocks)} % of the pool held · ${percent(totals.slots, slots)} % of held slots used`;
    level.style.setProperty("--level", `${(100 * totals.held) / totals.blocks}%`);
    legend.replaceChildren(
      ...[
        ["held", "held", totals.held],
        ["shared", "shared", totals.shared],
        ["copied", "copied on write", totals.copied],
        ["cached", "cached, free", totals.cached],
        ["blank", "free", totals.blocks - totals.held - totals.cached],
      ].map(([kind, label, count]) =>
        make("span", {}, make("i", { className: `nbengine-swatch nbengine-${kind}` }), `${label} ${count.toLocaleString("en")}`),
      ),
    );
    note.textContent =
      cells.group > 1
        ? `One cell stands for ${cells.group} blocks: filled as far as their slots are used, grey where they have several owners, lined at the right as far as they are cached.`
        : "";
    const options = [["", "none"], ...state.uids.map((/** @type {number} */ uid) => [String(uid), cells?.names.get(uid)])];
    const chosen = state.table ? String(state.table.uid) : "";
    if (chosen && !options.some(([value]) => value === chosen)) options.push([chosen, `${state.table.name} (holds none now)`]);
    const key = JSON.stringify(options);
    if (chooser.dataset.key !== key) {
      chooser.dataset.key = key;
      chooser.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
    }
    if (document.activeElement !== chooser || chooser.value !== chosen) chooser.value = chosen;
    tellTable();
    tellFacts();
  };

  const tellTable = () => {
    const shown = state.table;
    head.textContent = shown
      ? `Page table of ${shown.name}: ${shown.length} tokens in ${shown.blocks.length + shown.left_out} blocks (logical above, physical below)`
      : "";
    const blocks = shown ? shown.blocks : [];
    while (table.children.length > blocks.length) table.lastChild.remove();
    blocks.forEach((/** @type {number} */ block, /** @type {number} */ i) => {
      const logical = shown.left_out && i >= blocks.length / 2 ? i + shown.left_out : i;
      let entry = table.children[i];
      if (!entry) {
        entry = make("li", {}, make("button", { type: "button" }, make("span", {}), make("b", {})));
        const point = () => pointAtBlock(Number(entry.dataset.block));
        entry.firstChild.addEventListener("pointerenter", point);
        entry.firstChild.addEventListener("focus", point);
        table.append(entry);
      }
      const used = cells && cells.group === 1 ? cells.slots(block) / cells.size : 1;
      entry.dataset.block = block;
      entry.dataset.logical = logical;
      entry.firstChild.setAttribute("aria-label", `logical block ${logical} is physical block ${block}`);
      entry.firstChild.children[0].textContent = logical;
      entry.firstChild.children[1].textContent = block;
      entry.style.setProperty("--used", `${100 * used}%`);
      entry.style.setProperty("--colour", colourOf(shown.uid));
    });
  };

  const tellFacts = () => {
    if (!cells || pointed === null || pointed >= cells.count) {
      facts.replaceChildren(
        make("span", {
          className: "nbengine-quiet",
          textContent: "Point at a block, or move there with the arrow keys, to see what is in it.",
        }),
      );
      return;
    }
    const known = state.facts;
    if (!known || !areOf(known, pointed, only)) {
      facts.replaceChildren(make("div", { textContent: cellText(cells, pointed) }));
      return;
    }
    const lines = factsText(known, cells.size).map((text, i) => make("div", { textContent: text, className: i ? "nbengine-quiet" : "" }));
    if (known.tokens === null)
      lines.push(make("div", { className: "nbengine-quiet", textContent: "its tokens were computed before this trace begins" }));
    else if (known.tokens !== undefined && known.tokens.length) {
      const tokens = known.tokens.map((/** @type {[number, string | null]} */ [id, text]) =>
        make("code", { textContent: text === null ? `#${id}` : visible(text), title: `token ${id}` }),
      );
      lines.push(make("div", { className: "nbengine-tokens" }, ...tokens));
    }
    facts.replaceChildren(...lines);
  };

  /** @param {number | null} cell in cells, which are blocks where each has one of its own
   * @param {number | null} [block] the one that is meant, of a cell of several */
  const pointAt = (cell, block = null) => {
    if (cell === pointed && block === only) return;
    pointed = cell;
    only = block;
    if (cell !== null) focused = cell;
    inspect();
    tellFacts();
    later();
  };
  const pointAtBlock = (/** @type {number} */ block) => {
    const group = cells ? cells.group : 1;
    pointAt(Math.floor(block / group), group > 1 ? block : null);
  };

  // ── drawing
  const theme = () => (isDark(el) ? { ink: "#f5f5f5", paper: "#111111" } : { ink: "#222222", paper: "#ffffff" });
  const litCells = () => {
    if (!state.table || !cells) return null;
    const group = cells.group;
    return new Set(state.table.blocks.map((/** @type {number} */ block) => Math.floor(block / group)));
  };
  const later = () => {
    if (!waiting) waiting = requestAnimationFrame(paint);
  };
  const paint = (/** @type {number} */ now) => {
    waiting = 0;
    if (!cells || !el.isConnected) return;
    if (now - drawn < FRAME - 2) {
      later();
      return;
    }
    drawn = now;
    if (stale) fit();
    if (stale) drawCells(context(canvas), cells, layout, theme(), litCells());
    stale = false;
    if (paintOver()) later();
    canvas.dataset.frames = String(Number(canvas.dataset.frames ?? 0) + 1);
  };
  const fit = () => {
    if (!cells) return;
    layout = layoutFor(Math.max(200, frame.body.clientWidth - 2), cells.count);
    const scale = devicePixelRatio || 1;
    const [width, height] = [layout.columns * layout.side, layout.rows * layout.side];
    for (const one of [canvas, over]) {
      if (one.width === Math.round(width * scale) && one.height === Math.round(height * scale)) continue;
      one.width = Math.round(width * scale);
      one.height = Math.round(height * scale);
      one.style.width = `${width}px`;
      one.style.height = `${height}px`;
    }
    Object.assign(canvas.dataset, { columns: layout.columns, side: layout.side, gap: layout.gap, scale, group: cells.group });
  };
  const context = (/** @type {any} */ one) => {
    const found = one.getContext("2d", { willReadFrequently: true });
    const scale = devicePixelRatio || 1;
    found.setTransform(scale, 0, 0, scale, 0, 0);
    return found;
  };
  /** The marks that move: what has just changed, what is pointed at. Whether there is more to come. */
  const paintOver = () => {
    const brush = context(over);
    const { side, columns } = layout;
    const now = performance.now();
    let more = false;
    brush.clearRect(0, 0, columns * side, layout.rows * side);
    brush.lineWidth = side > 6 ? 2 : 1;
    brush.strokeStyle = theme().ink;
    for (let i = 0; i < changedAt.length; i++) {
      const age = now - changedAt[i];
      if (age >= FLASH) continue;
      more = true;
      brush.globalAlpha = 0.8 * (1 - age / FLASH);
      brush.strokeRect((i % columns) * side, Math.floor(i / columns) * side, side - 1, side - 1);
    }
    brush.globalAlpha = 1;
    const marked = pointed ?? (document.activeElement === canvas ? focused : null);
    if (marked !== null && marked < layout.count) {
      brush.lineWidth = 2;
      brush.strokeRect((marked % columns) * side, Math.floor(marked / columns) * side, Math.max(4, side - 1), Math.max(4, side - 1));
    }
    return more;
  };

  // ── pointing
  const at = (/** @type {PointerEvent | MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect();
    return cellAt(layout, event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => pointAt(at(event)));
  canvas.addEventListener("pointerleave", () => pointAt(document.activeElement === canvas ? focused : null));
  canvas.addEventListener("click", (/** @type {MouseEvent} */ event) => {
    const cell = at(event);
    if (cell !== null) chooseAt(cell);
  });
  canvas.addEventListener("focus", () => pointAt(Math.min(focused, layout.count - 1)));
  canvas.addEventListener("blur", () => pointAt(null));
  canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const next = cellAfter(layout, focused, event.key);
    if (next !== null) pointAt(next);
    else if (event.key === "Enter" || event.key === " ") chooseAt(focused);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });
  const chooseAt = (/** @type {number} */ cell) => {
    const owner = cells ? cells.owner(cell) : null;
    if (owner === SEVERAL) return;
    choose(owner === null || (state.table && state.table.uid === owner) ? null : owner);
  };

  const redraw = () => {
    stale = true;
    later();
  };
  const resized = new ResizeObserver(redraw);
  resized.observe(frame.body);
  const endTheme = onTheme(redraw);
  return () => {
    resized.disconnect();
    endTheme();
    cancelAnimationFrame(waiting);
    frame.stop();
  };
}

/** A token's text with signs for what would not be seen.
 * @param {string} text */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

export default { render };
