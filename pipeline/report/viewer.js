// The viewer of the report: one image, its numbers, its mark and its keys. The last of the scripts: it starts the page.
"use strict";

const viewer = $("viewer");
const kinds = [...viewer.querySelectorAll("[data-kind]")].map((button) => button.dataset.kind);
let current = null; // the card in the viewer
let layer = "auto";

function open(card) {
  leaveNote();
  current = card;
  ids = null;
  $("viewer-name").textContent = card.id;
  $("viewer-place").textContent = visible.includes(card) ? `${visible.indexOf(card) + 1} of ${visible.length}` : "";
  stage.style.setProperty("--ratio", ratio());
  const photograph = $("photograph");
  photograph.hidden = !card.kinds.includes("photograph");
  if (!photograph.hidden) photograph.src = file(card, "photograph");
  photograph.alt = `Photograph ${card.id}`;
  $("under").textContent = "";
  history.replaceState(null, "", address(card));
  if (!viewer.open) viewer.showModal();
  $("viewer-name").focus({ preventScroll: true });
  Object.assign(view, { zoom: 1, x: 0, y: 0 });
  place();
  show(layer);
  showMarkOfCurrent();
  loadIds(card);
  const next = visible[visible.indexOf(card) + 1];
  if (next?.kinds.includes("photograph")) new Image().src = file(next, "photograph");
}

function step(by) {
  const next = visible[visible.indexOf(current) + by];
  if (next) open(next);
}

function show(kind) {
  layer = kind;
  for (const button of viewer.querySelectorAll("[data-kind]")) {
    button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    button.title = current.missing[button.dataset.kind] ?? "";
  }
  const there = current.kinds.includes(kind);
  const over = $("over");
  over.hidden = kind === "photograph" || kind in DRAWN || !there;
  if (!over.hidden) over.src = file(current, kind);
  over.alt = `${label(kind)} of ${current.id}`;
  $("drawn").setAttribute("aria-label", `${label(kind)} of ${current.id}`);
  $("why").textContent = there ? "" : `${label(kind)}: ${current.missing[kind] ?? "this run has none"}`;
  describe(kind);
  draw();
}

const label = (kind) => viewer.querySelector(`[data-kind="${kind}"]`).dataset.label;
const count = (n, one) => `${n.toLocaleString("en")} ${n === 1 ? one : one + "s"}`;

// What is beside the picture: its numbers, and the legend of its layer.
function describe(kind) {
  const facts = [
    ["Rank, worst first", `${current.rank} of ${gallery.images}`],
    ["Trust", score(current.trust)],
    ["Mean confidence", score(current.confidence)],
    ["Agreement", percent(current.agreement)],
    ["Ignored", percent(current.ignored)],
    ["Size", current.size.join(" × ")],
  ];
  if (current.full[0] > 1 && current.full[0] < current.size[0]) facts.push(["Drawn at", current.full.join(" × ")]);
  if (current.group) facts.push(["Group", current.group]);
  $("facts").replaceChildren(...facts.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
  $("of-classes").hidden = kind === "confidence" || kind === "disagreement" || kind === "fates";
  $("of-confidence").hidden = kind !== "confidence";
  $("of-disagreement").hidden = kind !== "disagreement";
  const coarse = current.classes.some((c) => c[2] > 0);
  const rows = current.classes.map(([id, auto, before]) => {
    const row = element("tr");
    row.dataset.id = id;
    row.append(heading(names[id], gallery.classes[id][1]));
    row.append(...(coarse ? [element("td", percent(before))] : []), element("td", percent(auto)));
    return row;
  });
  $("class-rows").replaceChildren(...rows);
  $("coarse-column").hidden = !coarse;
  for (const [place, cell] of [...$("of-disagreement").querySelectorAll("td")].entries())
    cell.textContent = percent(current.disagreement[place] ?? null);
  const fates = current.fates.map(([fate, share]) => {
    const [, name, colour] = gallery.fates.find((one) => one[0] === fate);
    const row = element("tr");
    row.append(heading(name, colour), element("td", percent(share)));
    return row;
  });
  $("fate-rows").replaceChildren(...fates);
  $("of-specks").textContent = aboutSpecks(current.specks);
  $("show-specks").disabled = !current.specks?.marked;
}

function aboutSpecks(specks) {
  if (!specks) return "Specks: unknown, because the fates of the pixels are.";
  const them = `${count(specks.count, "piece")} of fewer than ${specks.fewest} pixels`;
  if (!specks.count) return `Specks: no pieces of fewer than ${specks.fewest} pixels.`;
  const fate = specks.dropped ? "the policy has dropped" : `smallest_piece = ${specks.fewest} would drop`;
  const most = specks.marked < specks.count ? ` Rings mark the ${specks.marked} largest.` : "";
  return `Specks: ${them} (${count(specks.pixels, "pixel")} in all), which ${fate}.${most}`;
}

function heading(name, [r, g, b, a = 255]) {
  const swatch = element("i");
  swatch.className = "swatch";
  swatch.style.background = `rgb(${r} ${g} ${b} / ${a / 255})`;
  const made = element("th", name, swatch);
  made.scope = "row";
  return made;
}

// --- mouse and keys ----------------------------------------------------------------------------------------------------

function toggle(what) {
  if (what === "outlines") outlines = !outlines;
  else rings = !rings;
  stage.classList.toggle("outlined", outlines);
  $("show-outlines").setAttribute("aria-pressed", String(outlines));
  $("show-specks").setAttribute("aria-pressed", String(rings));
  draw();
}

function mark(kind, goOn = false) {
  toggleMark(current, kind, goOn);
  if (goOn) step(1);
}

// A note is kept when its field is left, by whatever way.
function leaveNote() {
  if (current && $("note").value.trim() !== noteOf(current)) setNote(current, $("note").value);
}

const doing = {
  previous: () => step(-1),
  next: () => step(1),
  close: () => viewer.close(),
  "zoom-in": () => zoomTo(1.5 * view.zoom),
  "zoom-out": () => zoomTo(view.zoom / 1.5),
  "zoom-full": () => toFullSize(),
  "show-outlines": () => toggle("outlines"),
  "show-specks": () => toggle("specks"),
};
viewer.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.kind) show(button.dataset.kind);
  else if (button?.dataset.mark) mark(button.dataset.mark);
  else if (button) doing[button.id]?.();
  else if (event.target === viewer) viewer.close(); // the backdrop
});
$("note").addEventListener("change", leaveNote);

const keys = {
  ArrowRight: doing.next, ArrowLeft: doing.previous, "+": doing["zoom-in"], "=": doing["zoom-in"],
  "-": doing["zoom-out"], 0: whole, z: doing["zoom-full"], o: doing["show-outlines"], s: doing["show-specks"],
  ",": () => setOpacity(Number($("opacity").value) - 10), ".": () => setOpacity(Number($("opacity").value) + 10),
  n: () => $("note").focus(), "?": () => ($("keys").open = !$("keys").open),
};
const moves = { ArrowRight: [-1, 0], ArrowLeft: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target === $("note")) {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault(); // Escape leaves the field, not the viewer
    leaveNote();
    $("viewer-name").focus({ preventScroll: true });
  } else if (event.target === $("opacity") && event.key.startsWith("Arrow")) return;
  else if (event.shiftKey && moves[event.key]) pan(...moves[event.key].map((way) => 80 * way));
  else if (kinds[Number(event.key) - 1]) show(kinds[Number(event.key) - 1]);
  else if (markOfKey(event.key) !== undefined) mark(markOfKey(event.key), event.shiftKey);
  else if (keys[event.key]) keys[event.key]();
  else return;
  event.preventDefault();
});
viewer.addEventListener("close", () => {
  leaveNote();
  history.replaceState(null, "", location.pathname + location.search);
  refresh(); // a mark may have changed what the filter shows
  (current.item.hidden ? visible[0]?.item : current.item)?.querySelector("a").focus();
});

const address = (card) => "#image=" + encodeURIComponent(card.id);

function follow() {
  const card = cards.find((one) => address(one) === location.hash);
  if (card && !(viewer.open && card === current)) open(card);
}

addEventListener("hashchange", follow);
addEventListener("pagehide", leaveNote);
setOpacity($("opacity").value); // a browser that reloads may keep the slider where it was
readMarks();
showMarks();
refresh();
follow();
