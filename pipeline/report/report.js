// The gallery of the report: filter, sort, keyboard, viewer. It reads the JSON of the page and asks no network.
"use strict";

const gallery = JSON.parse(document.getElementById("gallery-data").textContent);
const cards = gallery.cards.map((card, place) => ({ ...card, place, item: document.getElementById("shot-" + place) }));
const $ = (id) => document.getElementById(id);
// As in manifests/wording.py: what is above 0 is never shown as 0.
const percent = (share) =>
  share === null ? "–" : (share > 0 && share < 0.0005 ? "< 0.1" : (100 * share).toFixed(1)) + " %";
const score = (value) => (value === null ? "–" : value.toFixed(3));
const names = gallery.classes.map((c) => c[0]);

// --- filter and sort ---------------------------------------------------------------------------------------------------

const up = (key) => (a, b) => (a[key] ?? 2) - (b[key] ?? 2) || a.rank - b.rank;
const orders = {
  trust: up("rank"),
  agreement: up("agreement"),
  confidence: up("confidence"),
  ignored: (a, b) => b.ignored - a.ignored || a.rank - b.rank,
  best: (a, b) => b.rank - a.rank,
  name: (a, b) => (a.id < b.id ? -1 : 1),
};
let visible = cards;

function refresh() {
  const id = $("by-class").value === "" ? null : Number($("by-class").value);
  const group = $("by-group") ? $("by-group").value : "";
  const [least, most] = [$("trust-from"), $("trust-to")].map((input) => input.valueAsNumber);
  const text = $("by-name").value.toLowerCase();
  const fits = (card) =>
    (id === null || card.classes.some(([c, share]) => c === id && share > 0)) &&
    (group === "" || card.group === group) &&
    !(card.trust < least) && !(card.trust > most) && // NaN, an empty field, limits nothing
    card.id.toLowerCase().includes(text);
  visible = cards.filter(fits).sort(orders[$("order").value]);
  const shown = new Set(visible);
  for (const card of cards) card.item.hidden = !shown.has(card);
  $("gallery-list").append(...visible.map((card) => card.item));
  $("count").textContent = `${visible.length} of ${cards.length} images`;
  $("nothing").hidden = visible.length > 0;
}

function reset() {
  for (const id of ["by-class", "by-group", "trust-from", "trust-to", "by-name"]) if ($(id)) $(id).value = "";
  refresh();
}

function cover() {
  const kind = $("layer").value;
  for (const card of cards) {
    const over = card.item.querySelector(".over");
    if (over) over.hidden = kind === "photograph" || !card.kinds.includes(kind);
    if (over && !over.hidden) over.src = file(card, kind);
  }
}

const file = (card, kind) => `${gallery.folder}/${card.stem}-${kind}.webp`;

for (const id of ["by-class", "by-group", "order"]) $(id)?.addEventListener("change", refresh);
for (const id of ["trust-from", "trust-to", "by-name"]) $(id).addEventListener("input", refresh);
$("layer").addEventListener("change", cover);
$("reset").addEventListener("click", reset);
$("tools").hidden = false;

$("gallery-list").addEventListener("keydown", (event) => {
  const here = visible.findIndex((card) => card.item.contains(event.target));
  const columns = getComputedStyle($("gallery-list")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -here };
  steps.End = visible.length - 1 - here;
  const next = visible[here + steps[event.key]];
  if (here < 0 || !next || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  next.item.querySelector("a").focus();
});

$("gallery-list").addEventListener("click", (event) => {
  const card = cards.find((one) => one.item.contains(event.target));
  if (!card || event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab, as for any link
  event.preventDefault();
  open(card);
});

// --- viewer ------------------------------------------------------------------------------------------------------------

const viewer = $("viewer");
const kinds = [...viewer.querySelectorAll("[data-kind]")].map((button) => button.dataset.kind);
let current = null; // the card in the viewer
let layer = "auto";
let ids = null; // of its classes: {width, height, data}, red the auto label, green the coarse one

function open(card) {
  current = card;
  ids = null;
  $("viewer-name").textContent = card.id;
  $("viewer-place").textContent = visible.includes(card) ? `${visible.indexOf(card) + 1} of ${visible.length}` : "";
  $("stage").style.setProperty("--ratio", card.size[0] / card.size[1]);
  const photograph = $("photograph");
  photograph.hidden = !card.kinds.includes("photograph");
  if (!photograph.hidden) photograph.src = file(card, "photograph");
  photograph.alt = `Photograph ${card.id}`;
  $("under").textContent = "";
  show(layer);
  history.replaceState(null, "", address(card));
  if (!viewer.open) viewer.showModal();
  $("viewer-name").focus({ preventScroll: true });
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
  const over = $("over");
  const there = current.kinds.includes(kind);
  over.hidden = kind === "photograph" || !there;
  if (!over.hidden) over.src = file(current, kind);
  over.alt = `${label(kind)} of ${current.id}`;
  $("why").textContent = there ? "" : `${label(kind)}: ${current.missing[kind] ?? "this run has none"}`;
  describe(kind);
}

const label = (kind) => viewer.querySelector(`[data-kind="${kind}"]`).dataset.label;

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
  if (current.group) facts.push(["Group", current.group]);
  $("facts").replaceChildren(...facts.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
  $("of-classes").hidden = kind === "confidence" || kind === "disagreement";
  $("of-confidence").hidden = kind !== "confidence";
  $("of-disagreement").hidden = kind !== "disagreement";
  const coarse = current.classes.some((c) => c[2] > 0);
  const rows = current.classes.map(([id, auto, before]) => {
    const name = element("th", names[id], swatch(gallery.classes[id][1]));
    name.scope = "row";
    const row = element("tr");
    row.dataset.id = id;
    row.append(name, ...(coarse ? [element("td", percent(before))] : []), element("td", percent(auto)));
    return row;
  });
  $("class-rows").replaceChildren(...rows);
  $("coarse-column").hidden = !coarse;
  for (const [place, cell] of [...$("of-disagreement").querySelectorAll("td")].entries())
    cell.textContent = percent(current.disagreement[place] ?? null);
}

function element(tag, text = "", before = null) {
  const made = document.createElement(tag);
  if (before) made.append(before);
  made.append(text);
  return made;
}

function swatch(colour) {
  const made = element("i");
  made.className = "swatch";
  made.style.background = colour;
  return made;
}

// A file's pixels cannot be read from a page on disk, but a script's can: see write_pictures.
function loadIds(card) {
  const script = document.createElement("script");
  script.src = `${gallery.folder}/${card.stem}-ids.js`;
  script.onload = () => script.remove();
  document.head.append(script);
}

async function classIds(stem, url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  if (current?.stem !== stem) return;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  ids = context.getImageData(0, 0, image.width, image.height);
}

$("stage").addEventListener("pointermove", (event) => {
  if (!ids) return;
  const box = $("picture").getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
  const at = 4 * (Math.floor(y * ids.height) * ids.width + Math.floor(x * ids.width));
  const [auto, coarse] = [names[ids.data[at]] ?? "ignored", names[ids.data[at + 1]] ?? "none"];
  $("under").textContent = current.kinds.includes("coarse") ? `coarse: ${coarse} · auto: ${auto}` : `auto: ${auto}`;
  for (const row of $("class-rows").children) row.classList.toggle("here", Number(row.dataset.id) === ids.data[at]);
});

viewer.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.kind) show(button.dataset.kind);
  else if (event.target === viewer) viewer.close(); // the backdrop
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => viewer.close());
$("opacity").addEventListener("input", (event) => ($("over").style.opacity = event.target.value / 100));
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const slides = event.target === $("opacity");
  if (event.key === "ArrowRight" && !slides) step(1);
  else if (event.key === "ArrowLeft" && !slides) step(-1);
  else if (kinds[Number(event.key) - 1]) show(kinds[Number(event.key) - 1]);
});
viewer.addEventListener("close", () => {
  history.replaceState(null, "", location.pathname + location.search);
  current.item.querySelector("a").focus();
});

const address = (card) => "#image=" + encodeURIComponent(card.id);

function follow() {
  const card = cards.find((one) => address(one) === location.hash);
  if (card && !(viewer.open && card === current)) open(card);
}

addEventListener("hashchange", follow);
$("over").style.opacity = $("opacity").value / 100; // a browser that reloads may keep the slider where it was
refresh();
follow();
