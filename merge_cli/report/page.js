// A click on a head sorts its table by that column; another click turns the order around.
// Cells that begin with a number sort by it, with its unit (s, min, h, kB, MB, GB, %), and before words.
const UNITS = {s: 1, min: 60, h: 3600, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, k: 1e3, M: 1e6, B: 1e9};
function key(cell) {
  const text = cell.textContent.trim().replace(/\u2212/g, "-").replace(/,(?=\d{3})/g, "");
  const found = text.match(/^([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)(?:\s+([\d.]+)\s*([A-Za-z]+))?/);
  if (!found) return [1, text];
  const rest = found[3] && UNITS[found[4]] ? Number(found[3]) * UNITS[found[4]] : 0;
  return [0, Number(found[1]) * (UNITS[found[2]] || 1) + rest];
}
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row, i) => [key(row.cells[head.cellIndex]), i, row]);
    rows.sort(([a, i], [b, j]) =>
      (a[0] - b[0] || (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0)) * (up ? 1 : -1) || i - j);
    body.append(...rows.map(([, , row]) => row));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
