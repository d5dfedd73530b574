"""The report's style sheet and script, written into the page as they stand."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c2024; --soft: #5c646c; --paper: #ffffff; --line: #d9dde1; --panel: #f4f6f8;
  --good: #2f6fb0; --defective: #d0670b; --wrong: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e8ea; --soft: #a0a8b0; --paper: #15181b; --line: #363c42; --panel: #1f2428;
    --good: #6aa9e6; --defective: #f0954a; --wrong: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem; max-width: 84rem;
  font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper);
}
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; max-width: 60rem; }
.soft, caption { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
th[scope=row] { font-weight: 400; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
#images { width: 100%; }
#images thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
#images td { vertical-align: middle; }
#images th[scope=row] { min-width: 9rem; max-width: 16rem; }
#images img { display: block; width: 8rem; height: 8rem; object-fit: contain;
  background: var(--panel); outline: 1px solid var(--line); }
#images button {
  all: unset; cursor: pointer; font-weight: 600; border-bottom: 1px dotted var(--soft);
}
#images button:focus-visible { outline: 2px solid var(--good); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.wrong { color: var(--wrong); font-weight: 600; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin: .8rem 0; }
.filters select { font: inherit; }
.scale { display: inline-flex; align-items: center; gap: .5rem; }
.scale img { width: 12rem; height: .8rem; }
.legend span { margin-right: 1rem; }
svg { width: 21rem; max-width: 100%; background: var(--panel); border-radius: 6px; }
svg.swatch { width: .8em; height: .8em; background: none; }
svg text { font-size: 11px; fill: var(--soft); }
svg text.title { font-size: 12px; font-weight: 600; fill: var(--text); text-anchor: middle; }
.tick { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.8; }
.curve { stroke: var(--good); }
.guide { stroke: var(--soft); stroke-dasharray: 3 4; stroke-width: 1; }
.threshold { stroke: var(--wrong); stroke-dasharray: 6 3; }
rect.good { fill: var(--good); }
rect.defective { fill: var(--defective); }
rect.threshold { fill: var(--wrong); stroke: none; }
.mark { fill: var(--wrong); }
"""

SCRIPT = """
const body = document.querySelector("#images tbody");
const rows = [...body.rows];
const selects = [...document.querySelectorAll(".filters select")];
const show = () => {
  let shown = 0;
  for (const row of rows) {
    row.hidden = selects.some(s => s.value && row.dataset[s.name] !== s.value);
    shown += !row.hidden;
  }
  document.querySelector("#count").textContent = `${shown} of ${rows.length} images`;
};
const sort = event => {
  const head = event.currentTarget.closest("th");
  const numeric = head.classList.contains("number");
  const down = head.ariaSort ? head.ariaSort === "ascending" : numeric;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[head.cellIndex].dataset.value;
  const compare = numeric
    ? (a, b) => Number(value(a)) - Number(value(b))
    : (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
  rows.sort(down ? (a, b) => compare(b, a) : compare);
  body.append(...rows);
};
for (const select of selects) select.addEventListener("change", show);
for (const button of document.querySelectorAll("#images button"))
  button.addEventListener("click", sort);
document.querySelector(".filters").hidden = false;
show();
"""
