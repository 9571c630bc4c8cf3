// Arranges the images in a grid over two keys, sorts the table and draws the plots. Text is only set as textContent.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, words = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), words);
    made.append(...children);
    return made;
  };

  const grid = document.getElementById("grid");
  if (grid) arrange(grid, [...grid.children], document.getElementById("controls"));
  sortable(document.querySelector("table.cells"));
  draw();

  function arrange(grid, figures, controls) {
    const state = { rows: data.rows, columns: data.columns, fixed: data.keys.map(() => 0) };
    const chosen = make("span");
    chosen.style.display = "contents";
    controls.prepend(chosen);
    controls.addEventListener("submit", (event) => event.preventDefault());
    const differing = () => {
      const view = controls.elements.view;
      const images = document.getElementById("images");
      images.classList.toggle("differing", Boolean(view) && view.value === "differences");
      if (controls.elements.factor) grid.style.setProperty("--factor", controls.elements.factor.value);
    };
    controls.addEventListener("change", differing);
    differing();

    function select(label, options, value, change) {
      const box = make("select", { ariaLabel: label });
      options.forEach(([number, text]) => box.append(make("option", { value: number, textContent: text })));
      box.value = value;
      box.addEventListener("change", () => { change(Number(box.value)); show(); });
      return make("label", {}, label, box);
    }

    function choices() {
      const several = data.keys.map((key, index) => [index, key.name]).filter(([index]) => data.keys[index].values.length > 1);
      if (!several.length) return;
      const none = [[-1, "none"]];
      if (several.length > 1 || state.rows < 0 || state.columns < 0) {
        chosen.append(select("Rows", [...none, ...several], state.rows, (value) => {
          if (value === state.columns) state.columns = state.rows;
          state.rows = value;
        }));
        chosen.append(select("Columns", [...none, ...several], state.columns, (value) => {
          if (value === state.rows) state.rows = state.columns;
          state.columns = value;
        }));
      }
      if (state.rows < 0 && state.columns < 0) return;
      for (const [index, name] of several) {
        if (index === state.rows || index === state.columns) continue;
        const values = data.keys[index].values.map((value, number) => [number, value]);
        const fixed = select(name, [[-1, "all"], ...values], state.fixed[index], (value) => { state.fixed[index] = value; });
        fixed.classList.add("fixed");
        chosen.append(fixed);
      }
    }

    const values = (index) => (index < 0 ? [null] : data.keys[index].values.map((_, number) => number));
    const heading = (index, number) => [`${data.keys[index].name} `, make("b", { textContent: data.keys[index].values[number] })];

    function show() {
      chosen.replaceChildren();
      choices();
      grid.classList.add("arranged");
      const loose = state.rows < 0 && state.columns < 0;
      grid.classList.toggle("loose", loose);
      if (loose) {
        grid.classList.remove("arranged");
        grid.style.removeProperty("--columns");
        grid.replaceChildren(...figures);
        return;
      }
      const free = data.keys.map((_, index) => index).filter((index) => index !== state.rows && index !== state.columns);
      const visible = (item) => free.every((index) => state.fixed[index] < 0 || item[index] === state.fixed[index]);
      grid.classList.toggle("loose", free.some((index) => data.keys[index].values.length > 1 && state.fixed[index] < 0));
      const table = make("table");
      const columns = values(state.columns);
      grid.style.setProperty("--columns", columns.length);
      if (state.columns >= 0) {
        table.append(make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, ...heading(state.columns, column)))));
      }
      for (const row of values(state.rows)) {
        if (row !== null) {
          const across = make("th", { className: "across", colSpan: columns.length, scope: "rowgroup" });
          across.append(make("span", {}, ...heading(state.rows, row)));
          table.append(make("tr", {}, across));
        }
        const line = make("tr");
        for (const column of columns) {
          const here = figures.filter((_, number) => {
            const item = data.items[number];
            return visible(item) && (row === null || item[state.rows] === row) && (column === null || item[state.columns] === column);
          });
          line.append(make("td", {}, ...here));
        }
        table.append(line);
      }
      grid.replaceChildren(table);
    }
    show();
  }

  function sortable(table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((header, index) => {
      const cells = [...body.rows].map((row) => row.cells[index]).filter(Boolean);
      if (cells.some((cell) => cell.classList.contains("number"))) header.classList.add("number");
      const button = make("button", { type: "button", textContent: header.textContent });
      button.addEventListener("click", () => {
        const descending = header.getAttribute("aria-sort") === "ascending";
        [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[index];
          if (!cell || cell.classList.contains("reason")) return null;
          if (cell.dataset.number !== undefined) return Number(cell.dataset.number.replace("inf", "Infinity"));
          return cell.textContent.trim();
        };
        const compare = (first, second) => {
          const [a, b] = [key(first), key(second)];
          if (a === null || b === null) return (a === null) - (b === null);
          const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
          return descending ? -order : order;
        };
        body.append(...[...body.rows].sort(compare));
      });
      header.replaceChildren(button);
    });
  }

  function draw() {
    for (const place of document.querySelectorAll("[data-plot]")) {
      const failed = (error) => { place.textContent = `This plot could not be drawn: ${error.message}`; console.error(error); };
      vegaEmbed(place, data.plots[Number(place.dataset.plot)], { renderer: "svg", actions: false, tooltip: { theme: "custom" } }).catch(failed);
    }
  }
})();
