"use strict";

// Hidden text
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

// Order: figures within their group, by the heads of their columns; what has no value comes last
const words = new Intl.Collator("en", { numeric: true });
const number = (text) => (text === undefined ? NaN : Number(text.replace("inf", "Infinity")));

function ordered(items, value, sign) {
  const known = items.filter((item) => !Number.isNaN(value(item)));
  const compare = (a, b) => (typeof a === "string" ? words.compare(a, b) : a < b ? -1 : a > b ? 1 : 0);
  known.sort((a, b) => sign * compare(value(a), value(b)));
  return [...known, ...items.filter((item) => Number.isNaN(value(item)))];
}

for (const table of document.querySelectorAll("table.figures")) {
  const heads = [...table.tHead.querySelectorAll("th")];
  const groups = [...table.tBodies].map((body) => [body, [...body.rows].slice(1)]);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const value = ({ cells }) => (column ? number(cells[column].dataset.value) : cells[0].textContent);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: undefined }[head.ariaSort ?? "none"];
      const order = head.ariaSort ? next : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      if (order) head.setAttribute("aria-sort", order);
      for (const [body, rows] of groups) {
        body.append(...(order ? ordered(rows, value, order === "ascending" ? 1 : -1) : rows));
      }
    });
  });
}

// Samples by the first scorer
const order = document.getElementById("order");
const scores = {
  reference: ({ dataset }) => number(dataset.reference),
  unlearned: ({ dataset }) => number(dataset.unlearned),
  rise: ({ dataset }) => number(dataset.unlearned) - number(dataset.reference),
  fall: ({ dataset }) => number(dataset.reference) - number(dataset.unlearned),
};
const lists = [...document.querySelectorAll("ol.samples")].map((list) => [list, [...list.children]]);
order.hidden = lists.length === 0;
order.addEventListener("change", ({ target }) => {
  const value = scores[target.value];
  for (const [list, items] of lists) list.append(...(value ? ordered(items, value, -1) : items));
});

// Colours: the system's, until the button says otherwise
const theme = document.getElementById("theme");
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const name = () => (theme.textContent = isDark() ? "Light colours" : "Dark colours");

theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  if (isDark() === system.matches) delete root.dataset.theme;
  name();
});
system.addEventListener("change", name);
theme.hidden = false;
name();
