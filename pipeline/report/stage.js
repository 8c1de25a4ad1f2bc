// The picture in the viewer: photograph, drawn layers, rings around specks, zoom to single pixels.
"use strict";

const stage = $("stage");
const CLOSEST = 16; // CSS pixels of an image's pixel
const DRAWN = { auto: 0, coarse: 1, fates: 2, disagreement: null }; // channels of a card's ids; others are pictures
const view = { zoom: 1, x: 0, y: 0 }; // relative to the whole picture; the middle, in CSS pixels from the stage's
let ids = null; // of the current card: {width, height, data, specks}; data is RGBA: auto, coarse, fate
let outlines = false;
let rings = false;

// --- layers ------------------------------------------------------------------------------------------------------------

// A file's pixels cannot be read from a page on disk, but a script's can: see write_pictures.
function loadIds(card) {
  const script = document.createElement("script");
  script.src = `${gallery.folder}/${card.stem}-ids.js`;
  script.onload = () => script.remove();
  script.onerror = () => ($("why").textContent = `${card.stem}-ids.js is missing beside this page`);
  document.head.append(script);
}

async function classIds(stem, url, specks) {
  const image = new Image();
  image.src = url;
  await image.decode();
  if (current?.stem !== stem) return;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { width, height, data } = context.getImageData(0, 0, image.width, image.height);
  ids = { width, height, data, specks };
  draw();
}

// The value of every pixel in a layer: its class, its fate, or how two labels differ.
function valuesOf(kind) {
  const { data } = ids;
  const values = new Uint8Array(data.length / 4);
  if (kind !== "disagreement") for (let i = 0, at = DRAWN[kind]; i < values.length; i++, at += 4) values[i] = data[at];
  else
    for (let i = 0; i < values.length; i++) {
      const [auto, coarse] = [data[4 * i], data[4 * i + 1]];
      values[i] = coarse === 255 ? 3 : auto === coarse ? 0 : auto === 255 ? 1 : 2;
    }
  return values;
}

// A colour as canvases store it: alpha, blue, green, red.
const packed = ([r, g, b, a = 255]) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

function coloursOf(kind) {
  const list = { fates: gallery.fates.map((f) => f[2]), disagreement: gallery.comparison };
  const colours = new Uint32Array(256);
  (list[kind] ?? gallery.classes.map((c) => c[1])).forEach((colour, id) => (colours[id] = packed(colour)));
  return colours;
}

function draw() {
  const canvas = $("drawn");
  canvas.hidden = !ids || !(layer in DRAWN) || !current.kinds.includes(layer);
  drawRings();
  if (canvas.hidden) return;
  const { width, height } = ids;
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer);
  const [values, colours] = [valuesOf(layer), coloursOf(layer)];
  if (outlines) drawOutlines(pixels, values, colours, width);
  else {
    const period = Math.max(8, Math.floor(Math.max(width, height) / 120));
    const [dark, light] = [packed([0, 0, 0]), packed([255, 255, 255, 90])];
    const hatched = layer === "auto" || layer === "coarse";
    for (let i = 0; i < pixels.length; i++) {
      const value = values[i];
      if (value !== 255 || !hatched) pixels[i] = colours[value];
      else {
        const stripe = ((i % width) + Math.floor(i / width)) % period; // ignored: hatched, the photograph between
        pixels[i] = 4 * stripe < period ? dark : 2 * stripe < period ? light : 0;
      }
    }
  }
  context.putImageData(picture, 0, 0);
}

// Both sides of every border, each in its own colour, and as wide as can be seen at this zoom.
function drawOutlines(pixels, values, colours, width) {
  const reach = Math.max(1, Math.ceil(1.2 / scale()));
  for (let i = 0; i < pixels.length; i++) {
    const [value, x] = [values[i], i % width];
    const beside =
      (x + reach < width && values[i + reach] !== value) || (x >= reach && values[i - reach] !== value) ||
      (values[i + reach * width] ?? value) !== value || (values[i - reach * width] ?? value) !== value;
    if (beside) pixels[i] = colours[value];
  }
}

function drawRings() {
  const svg = $("rings");
  svg.toggleAttribute("hidden", !rings || !ids);
  if (!rings || !ids) return;
  svg.setAttribute("viewBox", `0 0 ${current.size[0]} ${current.size[1]}`);
  const least = 7 / scale();
  const circles = ids.specks.map(([x, y, pixels]) => {
    const circle = document.createElementNS(svg.namespaceURI, "circle");
    for (const [name, value] of [["cx", x], ["cy", y], ["r", Math.max(least, Math.sqrt(pixels))]])
      circle.setAttribute(name, value);
    return circle;
  });
  svg.replaceChildren(...circles);
}

// --- zoom --------------------------------------------------------------------------------------------------------------

const ratio = () => current.size[0] / current.size[1];
const wholeWidth = () => Math.min(stage.clientWidth, stage.clientHeight * ratio()); // of the picture at zoom 1
const scale = () => (view.zoom * wholeWidth()) / current.size[0]; // CSS pixels of an image's pixel

// Zoom about a point of the stage, in CSS pixels from its middle.
function zoomTo(zoom, x = 0, y = 0) {
  const next = Math.min(Math.max(zoom, 1), Math.max(1, (CLOSEST * current.size[0]) / wholeWidth()));
  const grown = next / view.zoom;
  [view.x, view.y] = [x - (x - view.x) * grown, y - (y - view.y) * grown];
  view.zoom = next;
  place();
  if (outlines) draw();
  else drawRings();
}

function place() {
  const [width, height] = [view.zoom * wholeWidth(), (view.zoom * wholeWidth()) / ratio()];
  const clamp = (value, most) => Math.min(Math.max(value, -most), most);
  view.x = clamp(view.x, Math.max(0, (width - stage.clientWidth) / 2));
  view.y = clamp(view.y, Math.max(0, (height - stage.clientHeight) / 2));
  const { style } = $("picture");
  [style.width, style.height] = [`${width}px`, `${height}px`];
  [style.left, style.top] = [`calc(50% + ${view.x - width / 2}px)`, `calc(50% + ${view.y - height / 2}px)`];
  stage.classList.toggle("zoomed", view.zoom > 1);
  stage.classList.toggle("pixels", scale() >= 2);
  $("zoom").textContent = `${Math.round(100 * scale())} %`;
}

const whole = () => zoomTo(1);
const toFullSize = (x, y) => (view.zoom > 1 ? whole() : zoomTo(Math.max(1, 1 / scale()), x, y));
const pan = (x, y) => ([view.x, view.y] = [view.x + x, view.y + y], place());

function fromMiddle(event) {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}

const fingers = new Map(); // pointers that are down, at their last place
stage.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, fromMiddle(event));
  stage.setPointerCapture(event.pointerId);
});
for (const end of ["pointerup", "pointercancel"])
  stage.addEventListener(end, (event) => fingers.delete(event.pointerId));
stage.addEventListener("pointermove", (event) => {
  nameUnder(event);
  if (!fingers.has(event.pointerId)) return;
  const [before, now] = [fingers.get(event.pointerId), fromMiddle(event)];
  const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
  fingers.set(event.pointerId, now);
  if (other) {
    const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
    zoomTo((view.zoom * apart(now)) / Math.max(1, apart(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  } else pan(now[0] - before[0], now[1] - before[1]);
});
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomTo(view.zoom * Math.exp(-event.deltaY / (event.deltaMode ? 12 : 400)), ...fromMiddle(event));
}, { passive: false });
stage.addEventListener("dblclick", (event) => toFullSize(...fromMiddle(event)));
new ResizeObserver(() => stage.clientWidth && current && zoomTo(view.zoom)).observe(stage);

function nameUnder(event) {
  if (!ids) return;
  const box = $("picture").getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
  const at = 4 * (Math.floor(y * ids.height) * ids.width + Math.floor(x * ids.width));
  const [auto, coarse] = [names[ids.data[at]] ?? "ignored", names[ids.data[at + 1]] ?? "none"];
  const fate = gallery.fates[ids.data[at + 2]]?.[1];
  const coarsely = current.kinds.includes("coarse") ? [`coarse: ${coarse}`] : [];
  $("under").textContent = [...coarsely, ...(fate ? [fate] : []), `auto: ${auto}`].join(" · ");
  for (const row of $("class-rows").children) row.classList.toggle("here", Number(row.dataset.id) === ids.data[at]);
}
