"use strict";
const buttons = [...document.querySelectorAll("button.reveal")];
const all = document.getElementById("reveal-all");
const isShown = (button) => button.getAttribute("aria-expanded") === "true";

function show(button, shown) {
  button.setAttribute("aria-expanded", shown);
  button.textContent = shown ? "hide" : "show";
  const label = button.getAttribute("aria-label");
  button.setAttribute("aria-label", label.replace(/^\w+/, shown ? "Hide" : "Show"));
  document.getElementById(button.getAttribute("aria-controls")).inert = !shown;
}

function count() {
  const shown = buttons.length > 0 && buttons.every(isShown);
  all.setAttribute("aria-pressed", shown);
  all.textContent = shown ? "Hide it again" : "Show all hidden text";
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    show(button, !isShown(button));
    count();
  });
}
all.hidden = buttons.length === 0;
all.addEventListener("click", () => {
  const shown = !buttons.every(isShown);
  for (const button of buttons) show(button, shown);
  count();
});
