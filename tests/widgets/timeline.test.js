// A timeline's records and where they lie, and what its lanes and batches say.
import assert from "node:assert/strict";
import { test } from "node:test";
import { batchText, lanesHeight, laneText, placesOf, recordAt } from "../../widgets/timeline.js";

const state = { window: /** @type {[number, number]} */ ([100, 104]), times: [0, 10, 50, 60] };

test("records lie side by side, or as long as they took", () => {
  assert.deepEqual([100, 101, 102, 103, 104].map(placesOf(state, 400, false)), [0, 100, 200, 300, 400]);
  assert.deepEqual(
    [100, 101, 102, 103, 104].map(placesOf(state, 700, true)).map((place) => Math.round(place)),
    [0, 100, 500, 600, 700],
  );
});

test("a place and its record belong together", () => {
  for (const byTime of [true, false]) {
    const places = placesOf(state, 400, byTime);
    for (const record of [100, 101, 102, 103]) assert.equal(recordAt(state, places, places(record) + 1), record);
    assert.equal(recordAt(state, places, -5), 100);
    assert.equal(recordAt(state, places, 4000), 103);
  }
});

test("many lanes are thin, few are not thick", () => {
  assert.equal(lanesHeight(2).lane, 18);
  assert.equal(lanesHeight(256).lane, 5);
  assert.equal(lanesHeight(0).whole, 18);
});

test("a lane is read as its life", () => {
  /** @type {import("../../widgets/timeline.js").Lane} */
  const lane = [
    4,
    "r4",
    "length",
    [
      [0, 100, 103, 0],
      [1, 103, 104, 64],
      [1, 104, 105, 32],
      [2, 105, 120, 15],
      [3, 120, 130, 0],
    ],
  ];
  assert.equal(
    laneText(lane),
    "r4: queued for 3 steps, prefill of 96 tokens in 2 chunks, 15 decode steps, preempted once (10 steps); finished (length)",
  );
  assert.equal(laneText([1, "r1", "", []]), "r1: not in these steps");
});

test("a batch is read as what it computes", () => {
  const batch = {
    step: 7,
    waiting: 3,
    admitted: 1,
    preempted: 0,
    finished: 2,
    rows: [
      [1, "r1", 0, 64, 1],
      [2, "r2", 70, 1, 0],
    ],
  };
  assert.equal(batchText(batch), "Batch of step 7: 1 prefill chunk of 64 tokens, 1 decode token; 3 waiting, 1 admitted, 2 finished.");
  assert.equal(batchText({ ...batch, rows: [] }), "Between steps, after step 7: 3 waiting, 1 admitted, 2 finished.");
  assert.equal(batchText(null), "No step yet.");
});
