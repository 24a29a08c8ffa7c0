// What the scripts work out, apart from a browser.
import assert from "node:assert/strict";
import { test } from "node:test";
import { colourOf, controlsOf, momentText, PALETTE, placeOf, speedAt, throttled } from "../../widgets/frame.js";

const moment = {
  first: 10,
  last: 90,
  at: 90,
  live: true,
  traced: true,
  playing: false,
  status: "running",
  engine: true,
  speed: null,
  step: 88,
  seconds: 1.5,
  name: "tales",
};

test("a sequence keeps its colour, and neighbours differ", () => {
  assert.equal(colourOf(3), colourOf(3 + PALETTE.length));
  assert.notEqual(colourOf(3), colourOf(4));
  assert.equal(new Set(PALETTE).size, PALETTE.length);
});

test("the speed slider's right end is full speed, and every speed has its place", () => {
  assert.equal(speedAt(100), null);
  assert.equal(placeOf(null), 100);
  assert.equal(speedAt(0), 0.2);
  for (let place = 0; place < 100; place += 7) {
    const speed = /** @type {number} */ (speedAt(place));
    assert.ok(speed >= 0.2 && speed <= 60, `${speed}`);
    assert.ok(Math.abs(placeOf(speed) - place) <= 4, `${place} ${speed} ${placeOf(speed)}`);
  }
});

test("the button pauses what moves and resumes what stands", () => {
  assert.equal(controlsOf(moment).toggle, "pause");
  assert.equal(controlsOf({ ...moment, status: "running slowly" }).toggle, "pause");
  assert.equal(controlsOf({ ...moment, status: "paused" }).toggle, "resume");
  assert.equal(controlsOf({ ...moment, live: false }).toggleLabel, "Play");
  assert.equal(controlsOf({ ...moment, live: false, playing: true }).toggle, "pause");
});

test("time stops at both ends of the record", () => {
  assert.equal(controlsOf({ ...moment, at: 10, live: false }).canBack, false);
  assert.equal(controlsOf({ ...moment, at: 11, live: false }).canBack, true);
  assert.equal(controlsOf({ ...moment, engine: false, status: "recorded" }).canStep, false);
  assert.equal(controlsOf({ ...moment, engine: false, status: "recorded", at: 50, live: false }).canStep, true);
  assert.equal(controlsOf(moment).canGoLive, false);
});

test("the status says whether it is now or then", () => {
  assert.equal(momentText(moment), "engine running · step 88 at 1.50 s");
  assert.match(momentText({ ...moment, live: false, at: 40 }), /looking back: record 40 of 10 to 90/);
  assert.equal(momentText({ ...moment, engine: false, status: "recorded", at: -1 }), "recorded trace, no step yet");
  assert.equal(momentText({ ...moment, traced: false, at: -1 }), "engine running"); // it keeps no steps, and may have made any number
});

test("a throttled call comes at once, then not too often, and the last one always", async () => {
  /** @type {number[]} */
  const calls = [];
  const call = throttled(40, (/** @type {number} */ value) => calls.push(value));
  for (const value of [1, 2, 3, 4]) call(value);
  assert.deepEqual(calls, [1]);
  await new Promise((resolve) => setTimeout(resolve, 120));
  assert.deepEqual(calls, [1, 4]);
});
