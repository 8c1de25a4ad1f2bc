// The gallery of the report: its cards, filters, order and keys. It reads the JSON of the page and asks no network.
"use strict";

const gallery = JSON.parse(document.getElementById("gallery-data").textContent);
const cards = gallery.cards.map((card, place) => ({ ...card, place, item: document.getElementById("shot-" + place) }));
const $ = (id) => document.getElementById(id);
// As in manifests/wording.py: what is above 0 is never shown as 0.
const percent = (share) =>
  share === null ? "–" : (share > 0 && share < 0.0005 ? "< 0.1" : (100 * share).toFixed(1)) + " %";
const score = (value) => (value === null ? "–" : value.toFixed(3));
const names = gallery.classes.map((c) => c[0]);
const file = (card, kind) => `${gallery.folder}/${card.stem}-${kind}.webp`;

function element(tag, text = "", before = null) {
  const made = document.createElement(tag);
  if (before) made.append(before);
  made.append(text);
  return made;
}

// --- filter and sort ---------------------------------------------------------------------------------------------------

const up = (key) => (a, b) => (a[key] ?? 2) - (b[key] ?? 2) || a.rank - b.rank;
const orders = {
  trust: up("rank"),
  agreement: up("agreement"),
  confidence: up("confidence"),
  ignored: (a, b) => b.ignored - a.ignored || a.rank - b.rank,
  specks: (a, b) => (b.specks?.count ?? -1) - (a.specks?.count ?? -1) || a.rank - b.rank,
  best: (a, b) => b.rank - a.rank,
  name: (a, b) => (a.id < b.id ? -1 : 1),
};
let visible = cards;

function refresh() {
  const id = $("by-class").value === "" ? null : Number($("by-class").value);
  const group = $("by-group") ? $("by-group").value : "";
  const [least, most] = [$("trust-from"), $("trust-to")].map((input) => input.valueAsNumber);
  const text = $("by-name").value.toLowerCase();
  const marked = $("by-mark").value;
  const fits = (card) =>
    (id === null || card.classes.some(([c, share]) => c === id && share > 0)) &&
    (group === "" || card.group === group) &&
    !(card.trust < least) && !(card.trust > most) && // NaN, an empty field, limits nothing
    card.id.toLowerCase().includes(text) && hasMark(card, marked);
  visible = cards.filter(fits).sort(orders[$("order").value]);
  const shown = new Set(visible);
  for (const card of cards) card.item.hidden = !shown.has(card);
  $("gallery-list").append(...visible.map((card) => card.item));
  $("count").textContent = `${visible.length} of ${cards.length} images`;
  $("nothing").hidden = visible.length > 0;
  for (const button of ["copy-ids", "save-ids"]) $(button).disabled = visible.length === 0;
}

function reset() {
  for (const id of ["by-class", "by-group", "by-mark", "trust-from", "trust-to", "by-name"]) if ($(id)) $(id).value = "";
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

// One opacity for the cards and for the viewer, each with a slider of its own.
function setOpacity(value) {
  const opacity = Math.min(100, Math.max(0, Number(value)));
  for (const slider of [$("opacity"), $("opacity-of-cards")]) slider.value = opacity;
  document.documentElement.style.setProperty("--opacity", opacity / 100);
}

for (const slider of [$("opacity"), $("opacity-of-cards")])
  slider.addEventListener("input", (event) => setOpacity(event.target.value));
for (const id of ["by-class", "by-group", "by-mark", "order"]) $(id)?.addEventListener("change", refresh);
for (const id of ["trust-from", "trust-to", "by-name"]) $(id).addEventListener("input", refresh);
$("layer").addEventListener("change", cover);
$("reset").addEventListener("click", reset);
$("tools").hidden = false;
$("tools").open = innerWidth > 860; // on a phone the pictures come first

$("gallery-list").addEventListener("keydown", (event) => {
  const here = visible.findIndex((card) => card.item.contains(event.target));
  if (here < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const columns = getComputedStyle($("gallery-list")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -here };
  steps.End = visible.length - 1 - here;
  const mark = markOfKey(event.key);
  if (mark !== undefined) {
    event.preventDefault();
    toggleMark(visible[here], mark, event.shiftKey);
  }
  const next = visible[here + (steps[event.key] ?? (mark !== undefined && event.shiftKey ? 1 : NaN))];
  if (!next) return;
  event.preventDefault();
  next.item.querySelector("a").focus();
});

$("gallery-list").addEventListener("click", (event) => {
  const card = cards.find((one) => one.item.contains(event.target));
  if (!card || event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab, as for any link
  event.preventDefault();
  open(card);
});
