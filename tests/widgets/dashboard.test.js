// What the dashboard's and the comparison's scripts work out, apart from a browser.
import assert from "node:assert/strict";
import { test } from "node:test";
import { momentOf, placeOfTime } from "../../widgets/comparison.js";
import { faded, figure, heading, httpRows, places, unpack } from "../../widgets/dashboard.js";

const HEAD = 3; // bytes before the numbers: what arrives may begin anywhere

/** @param {Record<string, any>} [changed] @param {number[]} [times] @param {number[]} [values] */
const chart = (changed = {}, times = [0, 1, 3], values = [1, 2, 3, 9, 8, 7]) => {
  const bytes = new Uint8Array(HEAD + 4 * (times.length + values.length));
  bytes.set(new Uint8Array(new Float32Array([...times, ...values]).buffer), HEAD);
  const sent = {
    name: "occupancy",
    title: "KV cache",
    unit: "blocks",
    style: "area",
    labels: ["used", "free"],
    colours: ["#0072b2", "#999999"],
  };
  return unpack(
    { ...sent, faint: [false, true], start: 100, at: HEAD - 1, count: times.length, ...changed },
    new DataView(bytes.buffer, 1),
  );
};
const look = { across: 2, span: null, cursor: null, ink: "#000", dark: false };

test("a chart's numbers are unpacked, line by line", () => {
  const one = chart();
  assert.deepEqual(one.times, [100, 101, 103]);
  assert.deepEqual(
    one.lines.map(({ label, values }) => [label, ...values]),
    [
      ["used", 1, 2, 3],
      ["free", 9, 8, 7],
    ],
  );
});

test("charts do not lie on each other, and fill the width", () => {
  for (const across of [1, 2]) {
    const stand = places(7, across);
    stand.forEach(([left, right, bottom, top], i) => {
      assert.ok(0 <= left && left < right && right <= 1.000001 && 0 <= bottom && bottom < top && top < 1);
      for (const [l, r, b, t] of stand.slice(i + 1)) assert.ok(r <= left || right <= l || t <= bottom || top <= b);
    });
    assert.equal(Math.max(...stand.map(([, right]) => right)).toFixed(6), "1.000000");
  }
});

test("all charts share one time axis, the chosen stretch or all there is", () => {
  const charts = [chart(), chart({ style: "line", start: 90 }), chart({}, [], [])];
  const { layout, data } = figure(charts, look);
  assert.deepEqual(layout.xaxis.range, [90, 103]);
  assert.ok(layout.xaxis2.matches === "x" && layout.xaxis3.matches === "x");
  assert.deepEqual(figure(charts, { ...look, span: [95, 96] }).layout.xaxis.range, [95, 96]);
  assert.equal(data.filter((trace) => trace.stackgroup === "s0").length, 2);
  assert.equal(data.filter((trace) => trace.yaxis === "y2" && trace.stackgroup).length, 0);
});

test("a past moment is a line in every chart", () => {
  assert.equal(figure([chart(), chart()], look).layout.shapes.length, 0);
  const { shapes } = figure([chart(), chart()], { ...look, cursor: 101 }).layout;
  assert.deepEqual(
    shapes.map((line) => [line.xref, line.x0]),
    [
      ["x", 101],
      ["x2", 101],
    ],
  );
});

test("nothing to draw is no error", () => {
  assert.deepEqual(figure([chart({}, [], [])], look).layout.xaxis.range, [0, 1]);
});

test("what a user calls a panel is text, not markup", () => {
  assert.ok(!heading(chart({ title: "<img src=x>" })).includes("<img"));
});

test("a colour is faded", () => assert.equal(faded("#0072b2", 0.5), "rgba(0,114,178,0.5)"));

test("HTTP counts are told whatever they are", () => {
  assert.deepEqual(httpRows({ active_streams: 2, requests: { 200: 1234 }, servers: "http://x" }), [
    ["active streams", "2"],
    ["requests 200", "1,234"],
    ["servers", "http://x"],
  ]);
  assert.deepEqual(httpRows(null), []);
});

test("a time is found among the steps", () => {
  assert.deepEqual(
    [-1, 0, 0.5, 1, 9].map((time) => placeOfTime([0, 1, 2], time)),
    [-1, 0, 0, 1, 2],
  );
});

test("a side shows what holds at a time, and nothing runs once it has ended", () => {
  const curve = (...numbers) => new Float32Array(numbers);
  const side = {
    times: curve(1, 2),
    end: 3,
    curves: { running: curve(4, 5), waiting: curve(1, 0), used: curve(0.5, 0.25), tokens: curve(10, 20) },
  };
  assert.deepEqual(momentOf(side, 0), { running: 0, waiting: 0, used: 0, tokens: 0, over: false });
  assert.deepEqual(momentOf(side, 2.5), { running: 5, waiting: 0, used: 0.25, tokens: 20, over: false });
  assert.deepEqual(momentOf(side, 3), { running: 0, waiting: 0, used: 0, tokens: 20, over: true });
});
