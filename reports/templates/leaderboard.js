// Sorting by a button in each heading, filtering by text and threat model. Without JavaScript the tables stay as they are.
const said = document.getElementById("said");

for (const table of document.querySelectorAll("table.ranking")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent.trim();
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now === null ? head.dataset.best : now === "ascending" ? "descending" : "ascending";
      const sign = next === "ascending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const compare = (a, b) => {
        const x = a.cells[column], y = b.cells[column];
        if (column < 2) return sign * x.textContent.localeCompare(y.textContent);
        const known = [x, y].map((cell) => cell.dataset.value !== undefined);
        if (!known[0] || !known[1]) return known[1] - known[0];  // what was not measured is last either way
        return sign * (Number(x.dataset.value) - Number(y.dataset.value));
      };
      body.append(...[...body.rows].sort(compare));
      said.textContent = `sorted by ${button.textContent}, ${next}`;
    });
  });
}

const form = document.getElementById("filter");
const text = document.getElementById("text");
const threat = document.getElementById("threat");

const filter = () => {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = threat ? threat.value : "";
  let shown = 0, all = 0;
  for (const board of document.querySelectorAll(".board")) {
    const heads = [...board.querySelectorAll(".ranking thead th")];
    const off = heads.map((head) => wanted !== "" && Boolean(head.dataset.threat) && head.dataset.threat !== wanted);
    const asked = heads.map((head, i) => wanted !== "" && head.dataset.threat === wanted ? i : -1).filter((i) => i >= 0);
    const fits = wanted === "" || asked.length > 0;
    let here = 0;
    for (const row of board.querySelectorAll("[data-text]")) {
      const measured = !row.cells || wanted === "" || asked.some((i) => row.cells[i].dataset.value !== undefined);
      const found = words.every((word) => row.dataset.text.toLowerCase().includes(word));
      row.hidden = !(fits && measured && found);
      all += 1;
      here += row.hidden ? 0 : 1;
    }
    for (const row of board.querySelectorAll(".ranking tr")) {
      [...row.cells].forEach((cell, i) => { cell.hidden = off[i]; });
    }
    board.hidden = here === 0;
    shown += here;
  }
  document.getElementById("shown").textContent = `${shown} of ${all} models`;
};

form.hidden = false;
form.addEventListener("submit", (event) => event.preventDefault());
text.addEventListener("input", filter);
if (threat) threat.addEventListener("change", filter);
let timer;
form.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => { said.textContent = document.getElementById("shown").textContent; }, 500);
});
filter();
