"use strict";

// A click on a column's title sorts by it: numbers from the largest, text from A; again, reversed.
function sortBy(header) {
  const row = header.parentElement;
  const body = row.closest("table").tBodies[0];
  const column = [...row.children].indexOf(header);
  const isText = header.classList.contains("text");
  const usual = isText ? "ascending" : "descending";
  const other = isText ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === usual ? other : usual;
  const sign = order === "ascending" ? 1 : -1;
  const value = (line) => line.children[column].dataset.value ?? line.children[column].textContent;
  const lines = [...body.rows].map((line) => [value(line), line]);
  lines.sort(([a], [b]) => {
    if (isText) return sign * a.localeCompare(b);
    const [x, y] = [parseFloat(a), parseFloat(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return sign * (x - y);
  });
  for (const cell of row.children) cell.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  body.append(...lines.map(([, line]) => line));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}

for (const input of document.querySelectorAll("input[data-filters]")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const line of document.getElementById(input.dataset.filters).tBodies[0].rows) {
      line.hidden = !line.children[0].textContent.toLowerCase().includes(wanted);
    }
  });
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
