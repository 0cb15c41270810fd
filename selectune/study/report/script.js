"use strict";
(() => {
  const words = (mark) => mark.getAttribute("aria-label");

  // What a mark says stands in its figure's line while the mark is pointed at or focused; a click keeps it there.
  for (const figure of document.querySelectorAll("figure")) {
    const line = figure.querySelector(".said");
    if (!line) continue;
    const hint = line.textContent;
    let kept = null;
    const show = (mark) => { line.textContent = mark ? words(mark) : kept ? words(kept) : hint; };
    const keep = (mark) => {
      if (kept) kept.setAttribute("aria-pressed", "false");
      kept = kept === mark ? null : mark;
      if (kept) kept.setAttribute("aria-pressed", "true");
      show(kept);
    };
    const mark = (event) => event.target.closest("[data-mark]");
    for (const type of ["mouseover", "focusin"]) figure.addEventListener(type, (event) => mark(event) && show(mark(event)));
    for (const type of ["mouseout", "focusout"]) figure.addEventListener(type, () => show(null));
    figure.addEventListener("click", (event) => {
      const found = mark(event);
      if (!found || !found.matches("button")) return;
      keep(found);
      history.replaceState(null, "", kept ? "#" + kept.id : location.pathname + location.search);
    });
    figure.addEventListener("keydown", (event) => { if (event.key === "Escape" && kept) keep(kept); });
  }

  // A heat map is one stop of the Tab key; arrow keys walk from tensor to tensor.
  for (const table of document.querySelectorAll("table.grid")) {
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.querySelector("button")));
    const all = rows.flat().filter(Boolean);
    all.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
    const next = (r, c, down, right) => {
      for (r += down, c += right; rows[r] && c >= 0 && c < rows[r].length; r += down, c += right) if (rows[r][c]) return rows[r][c];
      return null;
    };
    const ways = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    table.addEventListener("keydown", (event) => {
      const way = ways[event.key];
      if (!way || !event.target.matches("button")) return;
      event.preventDefault();
      const r = rows.findIndex((row) => row.includes(event.target));
      const to = next(r, rows[r].indexOf(event.target), ...way);
      if (!to) return;
      all.forEach((button) => { button.tabIndex = -1; });
      to.tabIndex = 0;
      to.focus();
    });
  }

  // One map is shown at a time; on paper all are.
  const maps = [...document.querySelectorAll(".map")];
  const choice = document.querySelector("[data-maps]");
  const choose = (id) => { choice.value = id; maps.forEach((map) => { map.hidden = map.id !== id; }); };
  if (maps.length > 1) {
    choice.closest("p").hidden = false;
    choice.addEventListener("change", () => choose(choice.value));
    choose(maps[0].id);
  }

  // A link to something folded or hidden brings it to light.
  const arrive = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const map = target.closest(".map");
    if (map && maps.length > 1) choose(map.id);
    for (let at = target; at; at = at.parentElement) if (at.matches("details")) at.open = true;
    if (target.matches("button") && target.getAttribute("aria-pressed") === "false") target.click();
    target.scrollIntoView({ block: "center" });
  };
  window.addEventListener("hashchange", arrive);
  arrive();
})();
