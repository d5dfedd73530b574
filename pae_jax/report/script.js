/* Sorts the table of images by a click on a column's head, filters its rows, and decides by another
   threshold. Without this script the page shows everything, as the run decided. */
const table = document.querySelector("#images");
const body = table.tBodies[0];
const rows = [...body.rows];
const form = document.querySelector(".filters");
const filters = [...form.querySelectorAll("select")];

const showMatchingRows = () => {
  let shown = 0;
  for (const row of rows) {
    row.hidden = filters.some(
      filter => filter.value && row.dataset[filter.name] !== filter.value
    );
    shown += !row.hidden;
  }
  document.querySelector("#count").textContent = `${shown} of ${rows.length} images`;
};

const sortRows = event => {
  const head = event.currentTarget.closest("th");
  const numeric = head.classList.contains("number");
  /* A second click reverses the order; at the first, the highest score comes first. */
  const order = head.getAttribute("aria-sort");
  const descending = order ? order === "ascending" : numeric;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = row => row.cells[head.cellIndex].dataset.value;
  const compare = numeric
    ? (a, b) => Number(value(a)) - Number(value(b))
    : (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
  rows.sort(descending ? (a, b) => compare(b, a) : compare);
  body.append(...rows);
};

for (const filter of filters) filter.addEventListener("change", showMatchingRows);
for (const button of table.querySelectorAll("button")) button.addEventListener("click", sortRows);
form.elements.outlines?.addEventListener("change", event =>
  table.classList.toggle("plain", !event.currentTarget.checked)
);
form.hidden = false;
showMatchingRows();

/* ---- the threshold ---- */

/* Returns the position of data in a chart, in SVG units. */
const toChart = (svg, x, y) => {
  const [left, right, bottom, top, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
  return [
    left + (x - x0) / (x1 - x0) * (right - left),
    bottom - (y - y0) / (y1 - y0) * (bottom - top),
  ];
};

const moveLine = threshold => {
  const svg = document.querySelector("[data-chart=histogram]");
  const line = svg.querySelector("polyline.threshold");
  if (!line) return;
  const [, , bottom, top, low, high] = svg.dataset.frame.split(" ").map(Number);
  const [x] = toChart(svg, threshold, 0);
  line.setAttribute("points", `${x},${bottom} ${x},${top}`);
  /* Beyond the axis the line would cross the labels. */
  line.setAttribute("visibility", threshold >= low && threshold <= high ? "visible" : "hidden");
};

const movePoint = (chart, x, y, text) => {
  const svg = document.querySelector(`[data-chart=${chart}]`);
  if (!svg) return;
  const mark = svg.querySelector(".mark");
  const defined = Number.isFinite(x) && Number.isFinite(y);
  mark.setAttribute("visibility", defined ? "visible" : "hidden");
  if (!defined) return;
  const [cx, cy] = toChart(svg, x, y);
  mark.setAttribute("cx", cx);
  mark.setAttribute("cy", cy);
  mark.querySelector("title").textContent = text;
};

/* Decides every row, fills in the table of decisions, and moves the marks of the charts. */
const decide = threshold => {
  const counts = {defective: {defective: 0, good: 0}, good: {defective: 0, good: 0}};
  for (const row of rows) {
    const truth = row.dataset.truth;
    const decision = Number(row.dataset.score) > threshold ? "defective" : "good";
    counts[truth][decision] += 1;
    const outcome = decision === truth ? "right" : "wrong";
    const mistake = truth === "defective" ? "missed" : "false alarm";
    const verdict = outcome === "right" ? "right" : mistake;
    row.dataset.decision = outcome;
    const cell = row.querySelector(".decision");
    cell.dataset.value = `${decision} ${verdict}`;
    const span = document.createElement("span");
    span.className = outcome;
    span.textContent = verdict;
    cell.replaceChildren(`${decision}, `, span);
  }
  const rates = {};
  for (const truth of ["defective", "good"]) {
    const {defective, good} = counts[truth];
    rates[truth] = defective / (defective + good);  /* NaN without images */
    const rate = Number.isNaN(rates[truth]) ? "–" : toText(rates[truth]);
    const cells = {defective, good, rate};
    for (const [name, text] of Object.entries(cells)) {
      document.querySelector(
        `#decisions [data-truth=${truth}] [data-cell=${name}]`
      ).textContent = text;
    }
  }
  const called = counts.defective.defective + counts.good.defective;
  const precision = counts.defective.defective / called;
  moveLine(threshold);
  movePoint("roc", rates.good, rates.defective,
    `false positive rate ${toText(rates.good)}, true positive rate ${toText(rates.defective)}`);
  /* As on the page without scripts: without a detected image the precision has no place. */
  movePoint("precision_recall", rates.defective, rates.defective > 0 ? precision : NaN,
    `recall ${toText(rates.defective)}, precision ${toText(precision)}`);
  showMatchingRows();
};

/* Returns a rate as the page without scripts writes it. */
const toText = rate => rate && rate < 1e-3 ? rate.toPrecision(2) : rate.toFixed(rate ? 4 : 0);

const setUpThreshold = panel => {
  const {position, value} = panel.elements;
  const own = Number(panel.dataset.threshold);
  const scores = rows.map(row => Number(row.dataset.score)).filter(Number.isFinite);
  const sorted = [...new Set([...scores, own].filter(Number.isFinite))].sort((a, b) => a - b);
  /* A step of the slider changes one decision: an image is defective above its threshold. One more
     position, below all scores, calls every image defective. */
  const below = sorted[0] - ((sorted.at(-1) - sorted[0]) / 50 || 1);
  const positions = [below, ...sorted];
  const nearest = threshold => Math.max(0, positions.findLastIndex(p => p <= threshold));
  const use = threshold => {
    position.value = nearest(threshold);
    value.value = threshold;
    decide(threshold);
  };
  position.max = positions.length - 1;
  position.value = nearest(own);
  value.value = own;
  position.addEventListener("input", () => use(positions[position.value]));
  value.addEventListener("change", () => {
    if (value.value !== "") use(Number(value.value));
  });
  panel.querySelector("button").addEventListener("click", () => use(own));
  panel.addEventListener("submit", event => event.preventDefault());
  panel.hidden = false;
};

const panel = document.querySelector("#threshold");
if (panel && rows.length) setUpThreshold(panel);
