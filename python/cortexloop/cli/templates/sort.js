for (const heading of document.querySelectorAll("#neurons thead th")) {
  heading.addEventListener("click", () => {
    const place = heading.cellIndex, body = document.querySelector("#neurons tbody");
    const key = row => place ? Number(row.cells[place].dataset.v) : row.cells[0].textContent;
    const up = place ? heading.dataset.order === "down" : heading.dataset.order !== "up";
    const rows = [...body.rows].sort((one, other) => {
      const a = key(one), b = key(other);
      if (!place) return a.localeCompare(b, undefined, {numeric: true}) * (up ? 1 : -1);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return (a - b) * (up ? 1 : -1);
    });
    for (const other of document.querySelectorAll("#neurons thead th")) delete other.dataset.order;
    heading.dataset.order = up ? "up" : "down";
    body.append(...rows);
  });
}
