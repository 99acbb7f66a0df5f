// Sorting, filtering and picking models. Without JavaScript all of the page is there, in its first order.
const LONG = 12; // rows from which on a table can be filtered
const said = document.getElementById("said");
const say = (text) => { said.textContent = text; };
const make = (tag, set = {}, ...inside) => {
  const node = Object.assign(document.createElement(tag), set);
  node.append(...inside);
  return node;
};
const hidden = new Set(); // places of models that are not shown

// A row is hidden by its model, or because it does not hold what the table is filtered for.
const showRow = (row) => { row.hidden = hidden.has(row.dataset.m) || row.dataset.miss === "1"; };

function sortable(table) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) return;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent.trim());
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sign = up ? 1 : -1;
      const order = column === 0
        ? (a, b) => sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent)
        : (a, b) => {
          const [x, y] = [a, b].map((row) => row.cells[column].dataset.v);
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // dashes last
          return sign * (x - y);
        };
      body.append(...[...body.rows].sort(order));
      say(`sorted by ${button.textContent}, ${up ? "ascending" : "descending"}`);
    });
  });
}

function filterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < LONG || table.closest("#headline")) return; // there models are picked
  const input = make("input", { type: "search", autocomplete: "off" });
  const count = make("span");
  table.closest(".scroll").before(make("p", { className: "filter" }, make("label", {}, "Filter rows ", input), " ", count));
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.cells[0].textContent.toLowerCase();
      row.dataset.miss = words.every((word) => text.includes(word)) ? "" : "1";
      showRow(row);
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    say(count.textContent);
  });
}

function pickModels(tables) {
  const names = [...document.querySelectorAll("#headline tbody tr")].map((row) => row.cells[0].firstChild.textContent.trim());
  if (names.length < 3) return;
  const title = make("summary", {}, `Models: all ${names.length} shown`);
  const boxes = names.map((name, at) => make("input", { type: "checkbox", checked: true, value: String(at) }));
  const apply = () => {
    hidden.clear();
    boxes.forEach((box) => { if (!box.checked) hidden.add(box.value); });
    document.querySelectorAll("[data-m]").forEach((node) => {
      if (node.tagName === "TR") showRow(node);
      else if (node.tagName !== "TH") node.hidden = hidden.has(node.dataset.m);
    });
    for (const table of tables) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        if (head.dataset.m === undefined || head.hidden === hidden.has(head.dataset.m)) return;
        for (const row of table.rows) row.cells[column].hidden = hidden.has(head.dataset.m);
      });
    }
    const left = names.length - hidden.size;
    title.textContent = left === names.length ? `Models: all ${left} shown` : `Models: ${left} of ${names.length} shown`;
    say(title.textContent);
  };
  const all = (checked) => make("button", {
    type: "button",
    onclick: () => { boxes.forEach((box) => { box.checked = checked; }); apply(); },
  }, checked ? "Show all" : "Show none");
  const labels = names.map((name, at) => make("label", {}, boxes[at], ` ${name}`));
  boxes.forEach((box) => box.addEventListener("change", apply));
  const choices = make("div", { className: "models", role: "group", ariaLabel: "Models" }, all(true), all(false), ...labels);
  const hint = make("p", {}, "Tables and figures of single models follow; figures of all models and texts do not.");
  document.querySelector("#headline .scroll").before(make("details", { className: "pick" }, title, hint, choices));
}

const tables = [...document.querySelectorAll("table")];
pickModels(tables);
tables.forEach((table) => { sortable(table); filterable(table); });
