// Sortable tables: a button in each heading. Without JavaScript the tables are simply not sortable.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent.trim();
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        if (column === 0) return cell.textContent;
        return cell.dataset.value === undefined ? -Infinity : Number(cell.dataset.value);
      };
      const order = (a, b) => (column === 0 ? key(a).localeCompare(key(b)) : key(a) - key(b)) * (up ? 1 : -1);
      body.append(...[...body.rows].sort(order));
      document.getElementById("said").textContent =
        `sorted by ${button.textContent}, ${up ? "ascending" : "descending"}`;
    });
  });
}
