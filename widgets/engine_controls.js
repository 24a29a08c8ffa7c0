// The controls of an engine under its dashboard.
// @ts-check
import { make } from "./frame.js";

/** Load, limits and policy.
 * @param {(name: string, value?: any) => void} press */
export function buildControls(press) {
  const number = (/** @type {string} */ label, /** @type {string} */ value, /** @type {string} */ max) =>
    make("input", { type: "number", min: "1", max, value, "aria-label": label, title: label });
  const choice = (/** @type {string} */ label) => make("select", { "aria-label": label, title: label });
  const button = (/** @type {string} */ text, /** @type {string} */ title, /** @type {() => void} */ onclick) =>
    make("button", { type: "button", textContent: text, title, onclick });

  const shape = choice("Shape of the load");
  const count = number("Requests in a burst", "32", "10000");
  const prompt = number("Tokens in", "128", "1000000");
  const output = number("Tokens out", "128", "1000000");
  const sizes = make("span", {}, prompt, " in ", output, " out");
  const load = () =>
    press("burst", {
      shape: shape.value,
      count: Number(count.value),
      ...(shape.value === "fixed" ? { prompt: Number(prompt.value), output: Number(output.value) } : {}),
    });
  const sized = () => (sizes.hidden = shape.value !== "fixed");
  shape.addEventListener("change", sized);

  const seqs = number("max_num_seqs", "1", "1");
  const tokens = number("max_num_batched_tokens", "1", "1");
  seqs.addEventListener("change", () => press("limits", { max_num_seqs: Number(seqs.value) }));
  tokens.addEventListener("change", () => press("limits", { max_num_batched_tokens: Number(tokens.value) }));
  const policy = choice("Scheduling policy");
  policy.addEventListener("change", () => press("policy", policy.value));
  const request = choice("Request to cancel");
  const cancel = button("Cancel", "End this request and keep what it has", () => press("cancel", request.value));
  const cancelAll = button("Cancel all", "End every request", () => press("cancel_all"));

  const group = (/** @type {string} */ name, /** @type {any[]} */ ...parts) =>
    make("fieldset", {}, make("legend", { textContent: name }), ...parts);
  const element = make("div", { className: "nbengine-controls-row" },
    group("Load", count, " × ", shape, " ", sizes, " ", button("Submit", "Queue this many requests at once", load)),
    group("Limits", make("label", {}, "sequences ", seqs), " ", make("label", {}, "tokens a step ", tokens)),
    group("Policy", policy),
    group("Requests", request, " ", cancel, " ", cancelAll),
  ); // prettier-ignore

  const fill = (/** @type {any} */ select, /** @type {string[]} */ values, /** @type {string} */ [...chosen]) => {
    const text = JSON.stringify(values);
    if (select.dataset.values !== text) {
      const before = select.value;
      select.dataset.values = text;
      select.replaceChildren(...values.map((value) => make("option", { value, textContent: value })));
      if (values.includes(before)) select.value = before;
    }
    const wanted = chosen.join("");
    if (wanted && document.activeElement !== select) select.value = wanted;
  };
  const fit = (/** @type {any} */ input, /** @type {number} */ value, /** @type {number} */ most) => {
    input.max = String(most);
    input.title = `${input.getAttribute("aria-label")}: 1 to ${most}`;
    if (document.activeElement !== input) input.value = String(value);
  };
  return {
    element,
    /** @param {any} controls */
    draw(controls) {
      element.hidden = !controls;
      if (!controls) return;
      fill(shape, controls.shapes, "");
      fill(policy, [...new Set([...controls.policies, controls.policy])], controls.policy);
      fill(request, controls.requests, "");
      fit(seqs, controls.max_num_seqs, controls.most_seqs);
      fit(tokens, controls.max_num_batched_tokens, controls.most_tokens);
      cancel.disabled = cancelAll.disabled = controls.requests.length === 0;
      sized();
    },
  };
}
