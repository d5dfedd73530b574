/* Sorts the table of images by a click on a column's head, and filters its rows. */
const body = document.querySelector("#images tbody");
const rows = [...body.rows];
const filters = [...document.querySelectorAll(".filters select")];

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
for (const button of document.querySelectorAll("#images button")) {
  button.addEventListener("click", sortRows);
}
document.querySelector(".filters").hidden = false;
showMatchingRows();
