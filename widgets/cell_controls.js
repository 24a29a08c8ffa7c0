// The quiet line under a running cell, and its buttons once the kernel has answered this view's hello.

// @ts-check

/** @type {Record<string, string>} */
const LABELS = { cancel: "Cancel", resume: "Resume" };
/** @type {Record<string, string>} */
const HINTS = { cancel: "End this cell's requests and keep what they have", resume: "Let the engine go on" };

/** @param {{ model: import("./frame.js").Model, el: HTMLElement }} given */
function render({ model, el }) {
  el.classList.add("nbengine-controls");
  const buttons = document.createElement("span");
  const line = document.createElement("span");
  line.setAttribute("role", "status");
  const trouble = document.createElement("span");
  trouble.className = "nbengine-trouble";
  trouble.setAttribute("role", "alert");
  el.append(buttons, line, trouble);
  const shown = new Map(); // by offer: a button that stays keeps the focus

  const make = (/** @type {string} */ offer) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = LABELS[offer];
    button.title = HINTS[offer];
    button.addEventListener("click", () => {
      button.disabled = true;
      model.send({ press: offer });
    });
    return button;
  };

  const draw = () => {
    line.textContent = model.get("line");
    trouble.textContent = model.get("trouble");
    const offers = model.get("heard") ? model.get("offers") : [];
    for (const [offer, button] of shown) {
      if (!offers.includes(offer)) {
        button.remove();
        shown.delete(offer);
      }
    }
    offers.forEach((/** @type {string} */ offer, /** @type {number} */ place) => {
      if (shown.has(offer)) return;
      shown.set(offer, make(offer));
      buttons.insertBefore(shown.get(offer), buttons.children[place] ?? null);
    });
  };

  const events = ["change:line", "change:offers", "change:heard", "change:trouble"];
  events.forEach((event) => model.on(event, draw));
  draw();
  model.send({ hello: true });
  return () => {
    events.forEach((event) => model.off(event, draw));
    // who pressed a key on a button that goes should not be sent to the top of the page
    if (el.contains(document.activeElement)) /** @type {HTMLElement | null} */ (el.closest(".jp-Notebook"))?.focus();
  };
}

export default { render };
