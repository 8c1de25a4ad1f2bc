// Marks and notes: kept by the browser under the key of the run, so that they survive a reload and the next report.
"use strict";

const MARKS = { keep: "✓", reject: "✕", fix: "✎" }; // by the letter that they begin with, a key marks an image
const shelf = "autolabel-marks-" + gallery.key;
let marks = new Map(); // by sample id: {mark, note}, also of images that this page does not show
let remembers = true; // false if the browser keeps nothing of this page

const markOf = (card) => marks.get(card.id)?.mark ?? "";
const noteOf = (card) => marks.get(card.id)?.note ?? "";
// The mark that a key gives, "" for none, undefined if it is the key of no mark.
const markOfKey = (key) =>
  key.toLowerCase() === "u" ? "" : Object.keys(MARKS).find((mark) => mark[0] === key.toLowerCase());

function hasMark(card, wanted) {
  if (wanted === "any") return markOf(card) !== "";
  if (wanted === "none") return markOf(card) === "";
  if (wanted === "note") return noteOf(card) !== "";
  return wanted === "" || markOf(card) === wanted;
}

function readMarks() {
  if (!remembers) return;
  const text = (value) => (typeof value === "string" ? value : "");
  try {
    const stored = JSON.parse(localStorage.getItem(shelf) ?? "[]");
    const rows = Array.isArray(stored) ? stored.filter((row) => Array.isArray(row) && typeof row[0] === "string") : [];
    marks = new Map(rows.map(([id, mark, note]) => [id, { mark: Object.hasOwn(MARKS, mark) ? mark : "", note: text(note) }]));
  } catch (error) {
    if (!(error instanceof SyntaxError)) remembers = false; // no storage for this page; else what was there is no list
  }
}

function writeMarks() {
  try {
    localStorage.setItem(shelf, JSON.stringify([...marks].map(([id, { mark, note }]) => [id, mark, note])));
  } catch {
    remembers = false;
  }
  showMarks();
}

// Each change reads first: another tab may have written.
function change(card, values) {
  readMarks();
  const now = { mark: markOf(card), note: noteOf(card), ...values };
  if (now.mark || now.note) marks.set(card.id, now);
  else marks.delete(card.id);
  writeMarks();
}

const setMark = (card, mark) => change(card, { mark });
// The same mark once more takes it away, unless it is meant to stand.
const toggleMark = (card, mark, stand) => setMark(card, mark === markOf(card) && !stand ? "" : mark);
const setNote = (card, note) => change(card, { note: note.replace(/\s+/g, " ").trim() });

function showMarks() {
  const counts = Object.fromEntries(Object.keys(MARKS).map((mark) => [mark, 0]));
  let notes = 0;
  for (const { mark, note } of marks.values()) {
    if (mark) counts[mark] += 1;
    if (note) notes += 1;
  }
  const here = new Set(cards.map((card) => card.id));
  const away = [...marks.keys()].filter((id) => !here.has(id)).length;
  const parts = Object.entries(counts).filter(([, n]) => n).map(([mark, n]) => `${n} ${mark}`);
  if (notes) parts.push(`${notes} with a note`);
  if (away) parts.push(`${away} of them not on this page`);
  $("marked").textContent =
    (parts.join(", ") || "no marks yet") + (remembers ? "" : "; this browser forgets them: save them before you leave");
  for (const button of ["save-csv", "clear-marks"]) $(button).disabled = marks.size === 0;
  for (const card of cards) {
    const [mark, note] = [markOf(card), noteOf(card)];
    const badge = card.item.querySelector(".badge");
    card.item.dataset.mark = mark;
    badge.hidden = !mark && !note;
    badge.textContent = [mark && `${MARKS[mark]} ${mark}`, note && "note"].filter(Boolean).join(" · ");
    badge.title = note;
  }
  if (current) showMarkOfCurrent();
}

function showMarkOfCurrent() {
  const mark = markOf(current);
  for (const button of document.querySelectorAll("#viewer [data-mark]"))
    button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
  if (document.activeElement !== $("note")) $("note").value = noteOf(current);
}

// --- what leaves the page ----------------------------------------------------------------------------------------------

const lines = (rows) => rows.map((row) => row + "\n").join("");
const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function csv() {
  const shown = cards.map((card) => card.id).filter((id) => marks.has(id));
  const others = [...marks.keys()].filter((id) => !shown.includes(id)).sort();
  const row = (id) => [id, marks.get(id).mark, marks.get(id).note].map(quoted).join(",");
  return lines(["sample_id,mark,note", ...[...shown, ...others].map(row)]);
}

function save(name, text, type) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", text); // where a page from disk may not use the clipboard
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

const ids_of = (some) => lines(some.map((card) => card.id));
const said = (text) => ($("said").textContent = text);
const images = (n) => `${n} ${n === 1 ? "image" : "images"}`;

$("copy-ids").addEventListener("click", async () => {
  await copy(ids_of(visible));
  said(`The ids of ${images(visible.length)} are in the clipboard.`);
});
$("save-ids").addEventListener("click", () => {
  save("ids.txt", ids_of(visible), "text/plain");
  said(`ids.txt has the ids of ${images(visible.length)}.`);
});
$("save-csv").addEventListener("click", () => {
  save("marks.csv", csv(), "text/csv");
  said(`marks.csv has the marks and notes of ${images(marks.size)}.`);
});
$("clear-marks").addEventListener("click", () => {
  readMarks();
  if (!confirm(`Remove the marks and notes of ${images(marks.size)}? They cannot be brought back.`)) return;
  marks.clear();
  writeMarks();
  refresh();
  said("All marks and notes are removed.");
});
addEventListener("storage", (event) => {
  if (event.key !== shelf && event.key !== null) return;
  readMarks();
  if (event.key === null) marks.clear();
  showMarks();
});
