// A block table's state as the script reads it, and where it draws what.
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  areOf,
  CACHED,
  cellAfter,
  cellAt,
  Cells,
  cellText,
  COPIED,
  drawCells,
  EMPTY,
  factsText,
  fillHeight,
  HELD,
  layoutFor,
  SEVERAL,
  SHARED,
  visible,
} from "../../widgets/block_table.js";
import { colourOf } from "../../widgets/frame.js";

/** @param {number[]} owners @param {number[]} kinds @param {object} [more] */
function exact(owners, kinds, more = {}) {
  const bytes = new DataView(new ArrayBuffer(3 * kinds.length));
  owners.forEach((owner, i) => bytes.setUint16(2 * i, owner, true));
  kinds.forEach((kind, i) => bytes.setUint8(2 * kinds.length + i, kind));
  return new Cells({ size: 16, blocks: kinds.length, group: 1, uids: [], names: [], partial: [], data: bytes, ...more });
}

test("a block's owner, flags and slots are read from what was sent", () => {
  const uid = 70000; // more than 16 bits hold
  const cells = exact([uid % SEVERAL, 2, 0, 2, 0], [HELD | SHARED, HELD | COPIED, CACHED, HELD | EMPTY, 0], {
    uids: [2, uid],
    names: ["r2", "r9/1"],
    partial: [1, 5],
  });
  assert.deepEqual(
    [0, 1, 2, 3, 4].map((i) => cells.owner(i)),
    [uid, 2, null, 2, null],
  );
  assert.deepEqual(
    [0, 1, 2, 3, 4].map((i) => cells.slots(i)),
    [16, 5, 16, 0, 0],
  );
  assert.equal(cellText(cells, 0), "block 0: held by r9/1, shared, 16 of 16 slots used");
  assert.equal(cellText(cells, 1), "block 1: held by r2, copied on write, 5 of 16 slots used");
  assert.equal(cellText(cells, 2), "block 2: cached and free");
  assert.equal(cellText(cells, 4), "block 4: free");
});

test("a group tells its shares, and whether it has several owners", () => {
  const bytes = new DataView(new ArrayBuffer(2 * 7));
  bytes.setUint16(0, SEVERAL, true);
  bytes.setUint16(2, 7, true);
  const shares = [255, 128, 0, 10, 0, 0, 0, 51, 200, 100]; // held, shared, copied, cached, filled; two cells each
  shares.forEach((share, i) => bytes.setUint8(4 + i, share));
  const cells = new Cells({ size: 16, blocks: 15, group: 8, uids: [7], names: ["r7"], partial: [], data: bytes });
  assert.equal(cells.count, 2);
  assert.equal(cells.owner(0), SEVERAL);
  assert.equal(cells.owner(1), 7);
  assert.deepEqual(cells.cell(0), { owner: SEVERAL, held: 1, shared: 0, copied: 0, cached: 0, filled: 200 / 255 });
  const last = new Cells({ size: 16, blocks: 15, group: 8, uids: [SEVERAL + 7], names: ["r65542"], partial: [], data: bytes });
  assert.equal(last.owner(1), SEVERAL + 7);
  assert.equal(cellText(cells, 1), "blocks 8 to 14: 50 % held by r7, 20 % cached, 39 % of their slots used");
});

test("cells are as large as fits, down to 360 pixels and ten thousand of them", () => {
  for (const width of [320, 360, 700, 1200])
    for (const count of [1, 50, 512, 10000]) {
      const { side, columns, rows } = layoutFor(width, count);
      assert.ok(columns * side <= width && columns * rows >= count && rows * side <= 500, `${width} ${count}: ${side} ${columns} ${rows}`);
    }
  assert.ok(layoutFor(700, 512).side > layoutFor(700, 10000).side);
});

test("a point and its cell belong together", () => {
  const layout = layoutFor(360, 10000);
  for (const cell of [0, 1, layout.columns, 9999]) {
    const x = (cell % layout.columns) * layout.side + 1;
    const y = Math.floor(cell / layout.columns) * layout.side + 1;
    assert.equal(cellAt(layout, x, y), cell);
  }
  assert.equal(cellAt(layout, -1, 5), null);
  assert.equal(cellAt(layout, layout.columns * layout.side + 1, 5), null);
  assert.equal(cellAt(layout, 5, layout.rows * layout.side + 1), null);
});

test("arrow keys stay within the table", () => {
  const layout = { side: 10, gap: 1, columns: 4, rows: 3, count: 10 };
  assert.equal(cellAfter(layout, 0, "ArrowRight"), 1);
  assert.equal(cellAfter(layout, 0, "ArrowLeft"), 0);
  assert.equal(cellAfter(layout, 2, "ArrowDown"), 6);
  assert.equal(cellAfter(layout, 8, "ArrowDown"), 8);
  assert.equal(cellAfter(layout, 6, "Home"), 0);
  assert.equal(cellAfter(layout, 6, "End"), 9);
  assert.equal(cellAfter(layout, 6, "a"), null);
});

test("a fill never lies: something shows, and less than all never shows as all", () => {
  assert.equal(fillHeight(9, 0), 0);
  assert.equal(fillHeight(9, 0.001), 1);
  assert.equal(fillHeight(9, 0.999), 8);
  assert.equal(fillHeight(9, 1), 9);
});

test("every cell is drawn in its owner's colour, as high as it is filled", () => {
  const cells = exact([1, 2, 0, 0], [HELD, HELD, CACHED, 0], { uids: [1, 2], names: ["a", "b"], partial: [1, 8] });
  const layout = { side: 11, gap: 1, columns: 2, rows: 2, count: 4 };
  /** @type {any[]} */
  const drawn = [];
  const context = /** @type {any} */ ({
    clearRect() {},
    fillRect(/** @type {number[]} */ ...box) {
      drawn.push([this.fillStyle, ...box]);
    },
  });
  drawCells(context, cells, layout, { ink: "#000", paper: "#fff" }, null);
  const solid = (/** @type {number} */ uid) => drawn.filter(([colour]) => colour === colourOf(uid));
  assert.deepEqual(solid(1), [[colourOf(1), 0, 0, 10, 10]]);
  assert.deepEqual(solid(2), [[colourOf(2), 11, 5, 10, 5]]);
  assert.ok(drawn.some(([colour, x, y]) => colour.includes("0.75") && x === 0 && y >= 11));
});

test("what is known of a block reads as sentences", () => {
  const facts = {
    block: 3,
    references: 2,
    hash: "0123456789abcdef",
    owners: [
      [1, "r1", 0],
      [2, "r2", 0],
    ],
    slots: 16,
    copy_of: null,
    taken: [5, 0.1],
    freed: null,
  };
  assert.deepEqual(factsText(facts, 16), [
    "block 3: held by r1 (its block 0), r2 (its block 0), 2 references, 16 of 16 slots used",
    "hash 0123456789abcdef… · taken 5 steps (0.1 s) ago",
  ]);
  assert.match(factsText({ ...facts, references: 12 }, 16)[0], /r2 \(its block 0\) and 10 more, 12 references/);
  const group = { cell: 1, blocks: [8, 15], held: 8, cached: 0, owners: facts.owners, sequences: 5 };
  assert.deepEqual(factsText(group, 16), ["blocks 8 to 15: 8 held by r1, r2 and 3 more, 0 cached and free"]);
  assert.match(factsText({ ...group, sequences: 2 }, 16)[0], /by r1, r2, 0 cached/);
  const free = { ...facts, owners: [], references: 0, freed: [2, 0.01], taken: null };
  assert.match(factsText(free, 16)[1], /taken before this trace begins · let go 2 steps \(0.01 s\) ago/);
});

test("what the kernel tells is of the cell that is pointed at, or of the one block", () => {
  assert.ok(areOf({ block: 3 }, 3, null)); // each block has a cell of its own
  assert.ok(!areOf({ block: 4 }, 3, null));
  assert.ok(areOf({ cell: 20, blocks: [300, 314] }, 20, null));
  assert.ok(!areOf({ cell: 20, blocks: [300, 314] }, 20, 300));
  assert.ok(areOf({ block: 300 }, 20, 300));
  assert.ok(!areOf({ block: 301 }, 20, 300));
  assert.ok(!areOf({ block: 20 }, 20, 300));
});

test("spaces and line ends are seen", () => {
  assert.equal(visible(" a\n"), "␣a⏎");
  assert.equal(visible(""), "∅");
});
