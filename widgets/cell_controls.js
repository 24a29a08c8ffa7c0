// The quiet line under a running cell, and its buttons once the kernel has answered this view's hello.

const LABELS = { cancel: "Cancel", resume: "Resume" };
const HINTS = { cancel: "End this cell's requests and keep what they have", resume: "Let the engine go on" };

function render({ model, el }) {
  el.classList.add("nbengine-controls");
  const line = document.createElement("span");
  line.setAttribute("role", "status");
  const buttons = document.createElement("span");
  const trouble = document.createElement("span");
  trouble.className = "nbengine-trouble";
  trouble.setAttribute("role", "alert");
  el.append(buttons, line, trouble);

  const draw = () => {
    line.textContent = model.get("line");
    trouble.textContent = model.get("trouble");
    const offers = model.get("heard") ? model.get("offers") : [];
    if (offers.join() === buttons.dataset.offers) return;
    buttons.dataset.offers = offers.join();
    buttons.replaceChildren(
      ...offers.map((offer) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = LABELS[offer];
        button.title = HINTS[offer];
        button.addEventListener("click", () => {
          button.disabled = true;
          model.send({ press: offer });
        });
        return button;
      }),
    );
  };

  const events = ["change:line", "change:offers", "change:heard", "change:trouble"];
  events.forEach((event) => model.on(event, draw));
  draw();
  model.send({ hello: true });
  return () => events.forEach((event) => model.off(event, draw));
}

export default { render };
