"use strict";

// The board: rows down, layers and their channels across, on one canvas.
//
// All of the view's state is in the address, behind the #, so that a link is a view. A frame is painted from
// the state and from what is loaded; what is missing is asked for, and a frame is painted when it comes.
// Text of a store becomes text nodes and attributes, never markup.

const SPRITE_PIXELS = 262144; // maps of one request; a screen is a few
const TALLEST = 8e6; // CSS pixels: browsers cut taller elements off, so beyond this the scroll bar is scaled
const GAP = 4;
const HEAD = 50; // height of a layer's head
const NUMBERS = 14; // height of a line of numbers
const BETWEEN = 22; // layers
const BAR = 112; // pixels of a colour bar

const $ = (id) => document.getElementById(id);

const sprites = new Loader(
  6,
  160e6,
  (image) => 4 * (image.width * image.height || 0),
  (image) => image.close?.(),
);
const values = new Loader(4, 48e6, (found) => found.data?.byteLength ?? 0);
const facts = new Loader(4, 4000, () => 1);
const loaders = [sprites, values, facts];
const ready = (found) => (found instanceof Failure ? undefined : found);

// ---- the state, and the address that says it ----

const DEFAULTS = {
  view: "rows",
  row: "",
  layer: "",
  channel: "",
  n: "",
  by: "index",
  scope: "layer",
  low: "",
  high: "",
  clip: "",
  colors: "auto",
  size: "",
  label: "",
  prediction: "",
  outcome: "",
  text: "",
  top: "", // row 17 is at the top, but for 20 pixels: 17-20; with a row open, pixels
  x: "",
};
const FILTER = ["label", "prediction", "outcome", "text"];

let state = { ...DEFAULTS, layers: [] };
let source;
let run;
let rows = new Uint32Array(0); // those that fit the filter
let rowAt = new Map(); // and where each of them is
let filterKey = null;
let isFiltering = true;

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { layers: given.getAll("layers") };
  for (const [key, value] of Object.entries(DEFAULTS)) found[key] = given.get(key) ?? value;
  if (!["rows", "row", "channel"].includes(found.view)) found.view = "rows";
  return found;
}

function address(changes = {}) {
  const wanted = { ...state, ...changes };
  const given = new URLSearchParams();
  const changed = Object.entries(DEFAULTS).filter(([key, value]) => `${wanted[key]}` !== value);
  for (const [key] of changed) given.set(key, wanted[key]);
  for (const layer of wanted.layers) given.append("layers", layer);
  return `#${given}`;
}

/** Change the state; as an entry of the history, or in place of the last. */
function go(changes, keep = true) {
  state = { ...state, ...changes };
  const link = address();
  if (link !== (location.hash || "#")) history[keep ? "pushState" : "replaceState"](null, "", link);
  changed();
}

/** Say in the address where the page is scrolled to, once it rests. */
function remember() {
  clearTimeout(remember.waiting);
  remember.waiting = setTimeout(() => history.replaceState(null, "", address()), 120);
}

function changed() {
  const key = JSON.stringify(FILTER.map((name) => state[name]));
  if (key !== filterKey) {
    filterKey = key;
    filterRows(key);
  }
  fillOptions();
  invalidate();
}

async function filterRows(key) {
  isFiltering = true;
  let found = new Uint32Array(0);
  try {
    found = await source.rows(Object.fromEntries(FILTER.map((name) => [name, state[name]])));
  } catch (error) {
    alertOf(error.message);
  }
  if (key !== filterKey) return;
  isFiltering = false;
  rows = found;
  rowAt = new Map(Array.from(found, (row, i) => [row, i]));
  followed = "";
  invalidate();
}

// ---- what is shown ----

const layerNamed = (name) => run.layers.find((layer) => layer.name === name);
const drawable = () => run.layers.filter((layer) => !layer.refusal);
const size = () => Math.min(512, Math.max(8, Number(state.size) || 64));
const clips = () => !["store", "given"].includes(state.scope); // whether a percentile can cut the scale
const isFiltered = () => FILTER.some((name) => state[name] !== "");

function look() {
  const { scope, low, high, colors } = state;
  return { scope, low, high, colors, clip: clips() ? state.clip : "" };
}

function shown() {
  const named = state.layers.map(layerNamed).filter((layer) => layer && !layer.refusal);
  return named.length ? named : drawable();
}

const knownOf = (layer) => facts.get(`layer ${layer.name}`, () => source.layer(layer));

/** Where a percentile cuts the scale of a layer or of its channels; undefined until that is known. */
function cutsOf(layer) {
  const wanted = look();
  if (!wanted.clip || !["layer", "channel"].includes(wanted.scope)) return null;
  return ready(facts.get(JSON.stringify(["cuts", layer.name, wanted]), () => source.cuts(layer, wanted)));
}

function orderOf(layer, known) {
  const measure = known?.measures?.[state.by];
  if (state.by === "index" || !measure) return available(layer);
  layer.orders ??= {};
  return (layer.orders[state.by] ??= [...available(layer)].sort(
    (a, b) => (measure[b] ?? -Infinity) - (measure[a] ?? -Infinity) || a - b,
  ));
}

/** A layer as it is shown. What is known of it is asked for once it is looked at: a store has many layers. */
class Block {
  constructor(layer) {
    const most = available(layer).length;
    const all = state.n === "all" || (state.n === "" && state.view === "row");
    const onePixel = Math.max(layer.map.height, layer.map.width) === 1;
    this.layer = layer;
    this.n = all ? most : Math.min(most, Number(state.n) || 8);
    this.across = onePixel ? Math.max(12, size() / 2.5) : size();
    Object.assign(this, fitted(layer.map, this.across));
  }

  get known() {
    return ready(knownOf(this.layer));
  }

  get order() {
    return orderOf(this.layer, state.by === "index" ? null : this.known);
  }
}

/** A tile's size in CSS pixels: a whole number of device pixels for each value, as far as that fits. */
function fitted(map, across) {
  const ratio = devicePixelRatio || 1;
  const exact = (across * ratio) / Math.max(map.height, map.width);
  const factor = exact >= 1 ? Math.floor(exact) : exact;
  return { width: (map.width * factor) / ratio, height: (map.height * factor) / ratio };
}

// A layout says where `tiles` and `heads` are, between x0, y0 and x1, y1 of the whole, and the `place` of one
// tile. `left` and `top` are what stands still beside and above it.

/** Rows down, channels across. */
function matrix(viewWidth) {
  const found = shown().map((layer) => new Block(layer));
  const headWidth = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--head"));
  let width = 6;
  for (const block of found) {
    block.pitch = Math.max(block.width + GAP, block.n > 1 ? 22 : 0);
    block.x = width;
    block.span = Math.max(block.n * block.pitch, 132);
    width += block.span + BETWEEN;
  }
  const tall = Math.max(54, ...found.map((block) => block.height)) + 10;
  const rowHeight = Math.ceil(tall + (state.scope === "row" ? 12 : 0));

  function* tiles(x0, y0, x1, y1) {
    const first = Math.max(0, Math.floor(y0 / rowHeight));
    const last = Math.min(rows.length - 1, Math.floor(y1 / rowHeight));
    for (const block of found) {
      const [from, to] = across(block, x0, x1);
      for (let at = first; at <= last; at++)
        for (let k = from; k <= to; k++)
          yield { block, k, at, x: block.x + k * block.pitch, y: at * rowHeight + (tall - block.height) / 2 };
    }
  }

  function heads(x0, y0, x1) {
    const seen = found.filter((block) => block.x < x1 && block.x + block.span > x0);
    return seen.map((block) => ({
      block,
      x: Math.max(block.x - x0, Math.min(0, block.x + block.span - x0 - 132)),
      y: 0,
      width: Math.min(block.span + BETWEEN - 8, block.x + block.span - Math.max(x0, block.x)),
    }));
  }

  const place = (at, { x, pitch, width }, k) => {
    return { x: x + k * pitch, y: at * rowHeight, width, height: rowHeight };
  };
  const left = Math.min(headWidth, viewWidth / 2);
  const top = HEAD + NUMBERS + (state.scope === "channel" ? 12 : 0);
  return { found, left, top, rowHeight, width, height: rows.length * rowHeight, tiles, heads, place };
}

/** The first and last channel of a block between two places. */
function across(block, x0, x1) {
  const at = (x) => Math.floor((x - block.x) / block.pitch);
  return [Math.max(0, at(x0)), Math.min(block.n - 1, at(x1))];
}

/** One row: every layer a block of lines. */
function single(viewWidth) {
  const found = shown().map((layer) => new Block(layer));
  const rowIndex = rowAt.get(Number(state.row)) ?? -1;
  let height = 0;
  for (const block of found) {
    block.pitch = Math.max(block.width + GAP, 22);
    block.columns = Math.max(1, Math.floor((viewWidth - 24) / block.pitch));
    block.line = block.height + GAP + NUMBERS + (state.scope === "channel" ? 12 : 0);
    block.y = height;
    block.tall = HEAD + Math.ceil(block.n / block.columns) * block.line;
    height += block.tall + BETWEEN;
  }
  const spot = (block, k) => ({
    x: 14 + (k % block.columns) * block.pitch,
    y: block.y + HEAD + NUMBERS + Math.floor(k / block.columns) * block.line,
  });

  function* tiles(x0, y0, x1, y1) {
    for (const block of found) {
      const line = (y) => Math.floor((y - block.y - HEAD) / block.line);
      const from = Math.max(0, line(y0)) * block.columns;
      const to = Math.min(block.n, (line(y1) + 1) * block.columns);
      for (let k = from; k < to; k++) yield { block, k, at: rowIndex, ...spot(block, k) };
    }
  }

  function heads(x0, y0, x1, y1) {
    const seen = found.filter((block) => block.y < y1 && block.y + block.tall > y0);
    return seen.map((block) => ({
      block,
      x: 14,
      y: Math.max(block.y - y0, Math.min(0, block.y + block.tall - y0 - HEAD)),
      width: viewWidth - 24,
    }));
  }

  const place = (at, block, k) => ({ ...spot(block, k), width: block.width, height: block.line });
  return { found, left: 0, top: 0, rowHeight: 0, width: viewWidth, height, tiles, heads, place };
}

/** The sprite that holds a tile, undefined until it is there, and where in it the tile is. */
function spriteOf(tile) {
  const { layer, order, n } = tile.block;
  const open = state.view === "row";
  const budget = Math.max(1, Math.floor(SPRITE_PIXELS / (layer.map.height * layer.map.width)));
  const one = open || layer.is_ragged; // a row by itself
  const columns = Math.min(n, one ? 128 : 64, budget);
  const lines = one ? 1 : Math.min(8, Math.max(1, Math.floor(budget / columns)));
  const chunk = Math.floor(tile.k / columns);
  const page = Math.floor(tile.at / lines);
  const channels = order.slice(chunk * columns, Math.min(n, (chunk + 1) * columns));
  const listed = open ? [Number(state.row)] : Array.from(rows.slice(page * lines, (page + 1) * lines));
  const key = [layer.name, listed[0], listed.length, filterKey, state.by, n, chunk, look(), open];
  const load = (signal) => source.tiles(layer, listed, channels, look(), signal);
  return {
    image: sprites.get(JSON.stringify(key), load),
    column: tile.k % columns,
    line: open ? 0 : tile.at % lines,
    columns: channels.length,
    lines: listed.length,
  };
}

// ---- the board: one canvas, and a few elements on it ----

const board = $("board");
const canvas = $("canvas");
const pen = canvas.getContext("2d");
const inks = {};
let layout = null;
let offset = { x: 0, y: 0 };
let painting = (canvas.tiles = []); // those that are on the canvas

function scrollRange() {
  const full = layout.height + layout.top + 8;
  const tall = Math.min(TALLEST, full);
  return { tall, last: Math.max(0, full - board.clientHeight), most: Math.max(0, tall - board.clientHeight) };
}

/** Find where the view is: beyond what a browser can scroll, a pixel of the bar is several of the view. */
function readScroll() {
  const { last, most } = scrollRange();
  offset.x = board.scrollLeft;
  const isNew = Math.abs(board.scrollTop - (offset.bar ?? -9)) > 1;
  if (isNew) offset.y = most ? (board.scrollTop / most) * last : 0;
  offset.y = Math.min(last, Math.max(0, offset.y));
  offset.bar = board.scrollTop;
}

function scrollTo(x, y) {
  const { last, most } = scrollRange();
  offset.y = Math.min(last, Math.max(0, y));
  board.scrollTop = last ? (offset.y / last) * most : 0;
  offset.bar = board.scrollTop;
  board.scrollLeft = offset.x = Math.max(0, x);
}

const rowAtTop = () => Math.floor(offset.y / (layout?.rowHeight || 1));

function paintBoard() {
  const [width, height, ratio] = [board.clientWidth, board.clientHeight, devicePixelRatio || 1];
  layout = state.view === "row" ? single(width) : matrix(width);
  setSize($("space"), Math.max(width, layout.width + layout.left), Math.max(height, scrollRange().tall));
  setSize($("stage"), width, height);
  setSize(canvas, width, height);
  const pixels = { width: Math.round(width * ratio), height: Math.round(height * ratio) };
  if (canvas.width !== pixels.width || canvas.height !== pixels.height) Object.assign(canvas, pixels);
  followCursor();
  readScroll();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  const { left, top } = layout;
  const [x0, y0] = [offset.x, offset.y];
  const [x1, y1] = [x0 + width - left, y0 + height - top];
  canvas.tiles = painting = [];
  clipped(left, top, width - left, height - top, () => {
    for (const tile of layout.tiles(x0, y0, x1, y1)) paintTile(tile, left - x0, top - y0, ratio);
  });
  if (state.view === "row") numberTiles();
  else numberColumns(width, height, x0);
  paintHeads(x0, y0, x1, y1, width, height);
  $("empty").hidden = isFiltering || (rows.length > 0 && shown().length > 0);
  setText($("empty"), emptyWords());
}

function emptyWords() {
  if (!run.captured) return "No row is captured yet: run the capture, then reload.";
  return shown().length ? "No row fits the filter." : "This store has no layer that can be drawn.";
}

function setSize(element, width, height) {
  Object.assign(element.style, { width: `${width}px`, height: `${height}px` });
}

function clipped(x, y, width, height, paint) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  paint();
  pen.restore();
}

function paintTile(tile, dx, dy, ratio) {
  const { block } = tile;
  const { layer } = block;
  const channel = block.order[tile.k];
  const row = state.view === "row" ? Number(state.row) : rows[tile.at];
  const whole = (at) => Math.round(at * ratio) / ratio; // device pixels
  const x = whole(tile.x + dx);
  let y = whole(tile.y + dy);
  const asked = run.values && tile.at >= 0 && (state.by === "index" || block.known);
  const { image: found, ...at } = asked ? spriteOf(tile) : {};
  const image = ready(found);
  let { width, height } = block;
  if (image) {
    const [w, h] = [image.width / at.columns, image.height / at.lines];
    if (layer.is_ragged) {
      ({ width, height } = fitted({ width: w, height: h }, block.across));
      y = whole(y + (block.height - height) / 2);
    }
    pen.imageSmoothingEnabled = width * ratio < w;
    pen.drawImage(image, at.column * w, at.line * h, w, h, x, y, width, height);
    if (!layer.is_ragged) clearRest(layer.map, x, y, width, height);
  } else {
    pen.fillStyle = inks.empty;
    pen.fillRect(x, y, width, height);
    if (found) {
      pen.strokeStyle = inks.wrong;
      line(x, y, x + width, y + height);
      line(x, y + height, x + width, y);
    }
  }
  pen.strokeStyle = inks.line;
  pen.lineWidth = 1 / ratio;
  pen.strokeRect(x - 0.5 / ratio, y - 0.5 / ratio, width + 1 / ratio, height + 1 / ratio);
  if (isCursor(layer, channel, row)) {
    pen.strokeStyle = inks.accent;
    pen.lineWidth = 2;
    pen.strokeRect(x - 2, y - 2, width + 4, height + 4);
  }
  const limits = image?.limits?.[at.line];
  if (limits && state.view === "row") block.rowLimits = limits;
  else if (limits && block.told !== tile.at) {
    block.told = tile.at; // beneath the first of the row's tiles: what its colours mean
    write(rangeWords(limits), Math.max(x, layout.left + 2), y + height + 11, "left");
  }
  painting.push({ x, y, width, height, layer, channel, row, there: Boolean(image), limits });
}

/** Leave nothing where a wrapped sequence has no cell. */
function clearRest(map, x, y, width, height) {
  const n = map.n_cells - map.width * (map.height - 1); // in the last line
  const unit = width / map.width;
  if (n < map.width) pen.clearRect(x + n * unit, y + height - unit, width - n * unit, unit);
}

function isCursor(layer, channel, row) {
  const named = state.layer === layer.name && state.channel !== "" && state.row !== "";
  return named && Number(state.channel) === channel && Number(state.row) === row;
}

function line(x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function write(text, x, y, align = "center") {
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = align;
  pen.textBaseline = "alphabetic";
  pen.fillStyle = inks.grey;
  pen.fillText(text, x, y);
}

function numberTiles() {
  for (const { x, y, width, height, layer, channel } of painting) {
    write(channel, x + width / 2, y - 3);
    if (state.scope === "channel" && width > 24) write(endOf(layer, channel), x + width / 2, y + height + 11);
  }
}

function numberColumns(width, height, x0) {
  clipped(layout.left, 0, width, layout.top, () => {
    for (const block of layout.found) {
      const [from, to] = across(block, x0, x0 + width);
      const ends = state.scope === "channel" && block.pitch > 24;
      for (let k = from; k <= to; k++) {
        const x = layout.left + block.x + k * block.pitch - x0 + block.width / 2;
        write(block.order[k], x, HEAD + 9);
        if (ends) write(endOf(block.layer, block.order[k]), x, HEAD + 21);
      }
    }
  });
  pen.strokeStyle = inks.line;
  pen.lineWidth = 1;
  line(0, layout.top - 0.5, width, layout.top - 0.5);
  line(layout.left - 0.5, 0, layout.left - 0.5, height);
}

/** The end of a channel's own scale: its other end is 0, or the same below. */
function endOf(layer, channel) {
  const [known, cuts] = [ready(knownOf(layer)), cutsOf(layer)];
  if (!known || cuts === undefined) return "";
  const scale = source.colours.scaleOf(known, look(), { channel, cuts });
  return `${source.colours.diverges(scale.colors) ? "±" : "to "}${short(scale.high)}`;
}

function rangeWords([low, high]) {
  return low === null || high === null ? "no finite value" : `${short(low)} to ${short(high)}`;
}

/** Keep one element for each item by its key, and no others. */
function pool(parent, items, make, update) {
  const kept = (parent.kept ??= new Map());
  const wanted = new Set(items.map((item) => item.key));
  for (const [key, element] of kept) {
    if (wanted.has(key)) continue;
    element.remove();
    kept.delete(key);
  }
  for (const item of items) {
    if (!kept.has(item.key)) {
      kept.set(item.key, make(item));
      parent.append(kept.get(item.key));
    }
    update(kept.get(item.key), item);
  }
}

function paintHeads(x0, y0, x1, y1, width, height) {
  const { left, top, rowHeight } = layout;
  const [tops, lefts] = [$("tops"), $("lefts")];
  tops.style.left = `${left}px`;
  setSize(tops, width - left, top ? HEAD : height);
  lefts.style.top = `${top}px`;
  setSize(lefts, left, height - top);
  const heads = layout.heads(x0, y0, x1, y1).map((head) => ({ ...head, key: head.block.layer.name }));
  pool(tops, heads, makeLayerHead, updateLayerHead);
  const seen = [];
  if (rowHeight)
    for (let at = Math.floor(y0 / rowHeight); at < rows.length && at * rowHeight < y1; at++)
      seen.push({ key: rows[at], y: at * rowHeight - y0, height: rowHeight });
  pool(lefts, seen, makeRowHead, updateRowHead);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(textContent, onclick, more = {}) {
  return element("button", { type: "button", textContent, onclick, ...more });
}

/** Show the picture of a row in an element, which is hidden where there is none. */
function showPicture(image, row) {
  image.hidden = !run.pictures;
  if (!run.pictures) return image;
  const hide = () => (image.hidden = true);
  source.picture(row).then((url) => (image.src = url), hide);
  return image;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function makeLayerHead({ block }) {
  const { name } = block.layer;
  const [low, high, note] = ["span", "span", "span"].map((tag) => element(tag));
  const strip = element("canvas", { width: BAR, height: 1 });
  const bar = element("small", { className: "bar" }, low, strip, high, note);
  return element("div", { className: "layer" }, button(name, () => focusLayer(name)), element("small"), bar);
}

function updateLayerHead(head, { block, x, y, width }) {
  Object.assign(head.style, { transform: `translate(${x}px, ${y}px)`, width: `${width}px` });
  const { layer, n } = block;
  const [name, words, bar] = head.children;
  const all = available(layer).length;
  const part = layer.only ? ` (of ${layer.n_channels} captured)` : "";
  const channels = `${n} of ${plural(layer.unit, all)}${part}${orderWords(block)}`;
  const more = [layer.type, layer.about, layer.map.note];
  setText(words, joined(" · ", channels, ...oddWords(block.known), sizeWords(block), ...more));
  words.title = words.textContent;
  const shows = state.layers.length === 1 ? "all layers" : "this layer alone, all of it";
  name.title = `${layer.name}: show ${shows}`;
  paintBar(bar, block);
}

function orderWords({ known }) {
  if (state.by === "index") return "";
  if (known && !known.measures[state.by]) return ", this order is not known here";
  const option = [...$("options").elements.by.options].find((one) => one.value === state.by);
  return `, by ${option?.textContent ?? state.by}`;
}

/** The channels that are dead, constant, or hold what is not finite. */
function oddWords(known) {
  const rest = (numbers) => (numbers.length > 6 ? ` and ${numbers.length - 6} more` : "");
  const list = (numbers) => numbers.slice(0, 6).join(", ") + rest(numbers);
  return Object.entries(known?.odd ?? {}).map(([what, numbers]) => `${what}: ${list(numbers)}`);
}

function sizeWords({ layer, width }) {
  const { map, is_ragged: isRagged } = layer;
  if (isRagged) return "rows differ in shape";
  const across = Math.round(width * (devicePixelRatio || 1));
  const reduced = across < map.width ? `, drawn ${across} across` : "";
  return `${map.height} × ${map.width}${reduced}`;
}

const counted = (n) => n.toLocaleString("en");
const plural = (unit, n) => `${counted(n)} ${unit}${n === 1 ? "" : "s"}`;
const joined = (by, ...parts) => parts.filter(Boolean).join(by);

const OWN = {
  channel: "each channel has a scale of its own",
  row: "each row has a scale of its own",
  map: "each map has a scale of its own",
};

/** Paint a colour bar, where one is true of all that stands with it, and say what it is of. */
function paintBar(bar, block) {
  const [low, strip, high, note] = bar.children;
  const oneRow = state.view === "row" && state.scope === "row";
  const own = oneRow ? undefined : OWN[state.scope];
  const scale = own ? undefined : barScale(block, oneRow);
  const isWhole = scale && Number.isFinite(scale.low) && Number.isFinite(scale.high);
  strip.hidden = !isWhole;
  setText(low, isWhole ? short(scale.low) : "");
  setText(high, isWhole ? short(scale.high) : "");
  const words = joined(", ", own, scale && !isWhole && "no finite value", ...ofRows(block));
  setText(note, isWhole && words ? `· ${words}` : words);
  const key = isWhole && JSON.stringify(scale);
  if (!key || strip.key === key) return;
  strip.key = key;
  strip.getContext("2d").putImageData(source.colours.bar(scale, BAR), 0, 0);
}

/** The scale of all of a block; undefined until it is known. */
function barScale({ layer, known, rowLimits }, oneRow) {
  if (!known || (oneRow && !rowLimits)) return undefined;
  if (oneRow) {
    const [low, high] = rowLimits.map((limit) => limit ?? NaN);
    return { colors: source.colours.of(look(), known.signed), low, high };
  }
  const limits = state.scope === "store" ? ready(facts.get("limits", () => source.limits())) : null;
  const cuts = cutsOf(layer);
  if (limits === undefined || cuts === undefined) return undefined;
  return source.colours.scaleOf(known, look(), { limits, cuts });
}

/** Where percentiles cut a scale, and of how many rows it is where that is not all. */
function ofRows({ layer, known }) {
  const { clip, scope } = look();
  const cuts = cutsOf(layer);
  const n = cuts?.rows ?? (known?.whole ? undefined : known?.rows);
  const some = n < (run.of_rows ?? run.captured) && ["layer", "channel", "store"].includes(scope);
  const cut = clip && `cut at ${cuts?.about ? "about " : ""}${clip} %`;
  return [cut, some && `${clip ? "" : "range "}of ${n} rows`];
}

function factOf(row) {
  const page = Math.floor((rowAt.get(row) ?? 0) / 64);
  const listed = Array.from(rows.slice(page * 64, page * 64 + 64));
  if (!listed.includes(row)) return undefined;
  const key = JSON.stringify(["rows", filterKey, page, listed[0]]);
  return ready(facts.get(key, () => source.facts(listed)))?.find((one) => one.row === row);
}

function makeRowHead({ key }) {
  const picture = showPicture(element("img", { alt: "", decoding: "async", draggable: false }), key);
  const words = element("span", {}, element("b"), element("span"), element("small"));
  return element("a", { className: "row", title: "Open this row" }, picture, words);
}

function updateRowHead(head, { key, y, height }) {
  Object.assign(head.style, { transform: `translateY(${y}px)`, height: `${height}px` });
  head.href = address({ view: "row", row: key, top: "", x: "" });
  head.classList.toggle("at", state.row !== "" && Number(state.row) === key);
  const fact = factOf(key);
  const [name, guess, id] = head.lastChild.children;
  setText(name, fact?.true ?? `row ${key}`);
  guess.className = outcomeOf(fact);
  setText(guess, guessWords(fact));
  const file = fact?.id?.split("/").at(-1); // of a path, what tells it from its neighbours
  setText(id, fact?.true == null ? (file ?? "") : joined(" · ", `${key}`, file));
  id.title = fact?.id ?? "";
}

function outcomeOf(fact) {
  return fact?.right == null ? "" : fact.right ? "right" : "wrong";
}

function guessWords(fact) {
  if (fact?.predicted == null) return "";
  if (fact.right) return "✓ predicted";
  return `${fact.right === false ? "✗" : "→"} ${fact.predicted}`;
}

// ---- the cursor ----

let followed = ""; // the view whose cursor was brought into sight
let moved = false; // the last change was a step of the cursor, so it is followed wherever the view was

function followKey() {
  const { view, row, layer, channel, top, x } = state;
  return JSON.stringify([view, row, filterKey, layer, channel, rows.length, top, x]);
}

/** Bring the state's row and channel into view, once for each that is new. */
function followCursor() {
  const key = followKey();
  if (key === followed || !rows.length) return;
  const [view, row, filter] = followed ? JSON.parse(followed) : [];
  followed = key;
  const stepped = moved;
  moved = false;
  if (!stepped) {
    const placed = state.top !== "" || state.x !== "";
    if (state.view === "row" && (view !== "row" || row !== state.row))
      scrollTo(0, Number(state.top) || (view === "row" ? offset.y : 0));
    else if (state.view === "rows" && placed) {
      const [top, rest] = state.top.split("-").map(Number);
      scrollTo(Number(state.x) || 0, (rowAt.get(top) ?? 0) * layout.rowHeight + (rest || 0));
    } else if (state.view === "rows" && filter !== undefined && filter !== filterKey) scrollTo(offset.x, 0);
    if (placed) return;
  }
  const spot = cursorSpot();
  if (!spot) return;
  readScroll();
  const [width, height] = [board.clientWidth - layout.left, board.clientHeight - layout.top];
  const above = state.view === "row" ? HEAD + NUMBERS : 0;
  scrollTo(
    nearest(offset.x, width, spot.x - 10, spot.x + spot.width + 20, 10),
    nearest(offset.y, height, spot.y - above, spot.y + spot.height, above),
  );
}

/** Where the cursor is in the layout. */
function cursorSpot() {
  const at = state.view === "row" ? 0 : rowAt.get(Number(state.row));
  if (at === undefined || state.row === "") return null;
  const block = layout.found.find((one) => one.layer.name === state.layer);
  const k = block && state.channel !== "" ? block.order.indexOf(Number(state.channel)) : -1;
  if (k >= 0 && k < block.n) return layout.place(at, block, k);
  if (state.view === "row") return null;
  return { x: offset.x + 10, y: at * layout.rowHeight, width: 0, height: layout.rowHeight };
}

/** How far to scroll so that what lies between two places is in sight, and no further. */
function nearest(now, room, first, last, margin) {
  if (first + margin < now) return first;
  return last > now + room ? last - room : now;
}

function step(change) {
  moved = true;
  go({ ...change, top: "", x: "" }, false);
}

function stepRow(by) {
  if (!rows.length) return;
  const at = state.row === "" ? undefined : rowAt.get(Number(state.row));
  const before = state.view === "rows" ? rowAtTop() - (by > 0 ? 1 : 0) : -1;
  const row = `${rows[Math.min(rows.length - 1, Math.max(0, (at ?? before) + by))]}`;
  if (state.view === "row") go({ row }, false);
  else step({ row });
}

/** The row of the cursor, or where it starts. */
const rowHere = () => (state.row === "" && rows.length ? { row: `${rows[rowAtTop()]}` } : {});

function stepChannel(by) {
  const found = layout.found;
  const i = Math.max(0, found.findIndex((block) => block.layer.name === state.layer));
  if (!found[i]) return;
  const k = state.channel === "" ? -1 : found[i].order.indexOf(Number(state.channel));
  let [block, next] = [found[i], k < 0 ? 0 : k + by];
  if (next < 0) [block, next] = [found[i - 1], (found[i - 1]?.n ?? 0) - 1];
  else if (next >= block.n) [block, next] = [found[i + 1], 0];
  if (block) step({ ...rowHere(), layer: block.layer.name, channel: `${block.order[next]}` });
}

function stepLayer(by) {
  const list = shown();
  const i = list.findIndex((layer) => layer.name === state.layer);
  const layer = list[Math.min(list.length - 1, Math.max(0, i < 0 ? 0 : i + by))];
  if (!layer) return;
  if (state.view === "channel") go({ layer: layer.name, channel: `${available(layer)[0]}` }, false);
  else {
    const block = layout.found.find((one) => one.layer === layer);
    step({ ...rowHere(), layer: layer.name, channel: `${block.order[0]}` });
  }
}

function openChannel(layer, channel, row = state.row) {
  go({ view: "channel", layer, channel: `${channel}`, row: `${row}`, top: "", x: "" });
}

function openRow(row) {
  if (row !== "" && row !== undefined) go({ view: "row", row: `${row}`, top: "", x: "" });
}

function close() {
  if (state.view !== "rows") go({ view: "rows", top: "", x: "" });
  else if (state.layers.length) go({ layers: [], n: "" });
}

function focusLayer(name) {
  const alone = state.layers.length === 1 && state.layers[0] === name;
  go(alone ? { layers: [], n: "", x: "" } : { layers: [name], n: "all", x: "" });
}

// ---- the true value under the pointer ----

let pointer = null;

const valuesOf = ({ layer, row, channel }) =>
  values.get(JSON.stringify([layer.name, row, channel]), () => source.values(layer, row, channel));

function readPointer() {
  const tile = pointer && tileUnder(pointer);
  canvas.style.cursor = tile && pointer.surface === canvas ? "pointer" : "";
  $("tip").hidden = !tile?.there;
  if (!pointer) readCursor();
  else if (!tile?.there) setText($("place"), "");
  else {
    const words = wordsOf(tile);
    const [value, place] = $("tip").children;
    setText(value, words.value);
    setText(place, joined("\n", words.place, words.of));
    setText($("place"), `${words.place} = ${words.value}`);
    placeTip(pointer.event);
  }
}

/** The tile under the pointer, with where in it that is, from 0 to 1. */
function tileUnder({ surface, event }) {
  const box = surface.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  if (surface !== canvas) return { ...surface.tile, u: x / box.width, v: y / box.height, there: true };
  if (!layout || y <= layout.top || x <= layout.left) return null;
  const inside = (tile) => x >= tile.x && x < tile.x + tile.width && y >= tile.y && y < tile.y + tile.height;
  const tile = painting.find(inside);
  return tile && { ...tile, u: (x - tile.x) / tile.width, v: (y - tile.y) / tile.height };
}

function placeTip({ clientX, clientY }) {
  const tip = $("tip");
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  const left = clientX + 16 + wide > innerWidth ? clientX - wide - 12 : clientX + 16;
  const top = clientY + 18 + high > innerHeight ? clientY - high - 12 : clientY + 18;
  tip.style.transform = `translate(${Math.max(2, left)}px, ${Math.max(2, top)}px)`;
}

/** Say of the map under the cursor of the keys its range, and where it is greatest. */
function readCursor() {
  const tile = painting.find((one) => one.there && isCursor(one.layer, one.channel, one.row));
  const found = tile && ready(valuesOf(tile));
  setText($("place"), found?.shape.n_cells ? `${placeOf(tile)}${rangeOfMap(found)}` : "");
}

function rangeOfMap({ data, shape }) {
  const real = data.subarray(shape.offset);
  const [least, greatest] = (data.range ??= rangeOf(real));
  const at = real.findIndex((value) => Number(value) === greatest);
  if (at < 0) return ": no finite value";
  if (real.length === 1) return ` = ${exact(real[0], data)}`;
  return `: from ${short(least)} to ${exact(real[at], data)}${cellOf(shape, at)}`;
}

function wordsOf(tile) {
  const found = ready(valuesOf(tile));
  const place = placeOf(tile);
  if (!found) return { value: "…", place };
  const { data, shape } = found;
  const at = (share, n) => Math.max(0, Math.min(n - 1, Math.floor(share * n)));
  const cell = at(tile.v, shape.height) * shape.width + at(tile.u, shape.width);
  if (cell >= shape.n_cells) return { value: "no value here", place };
  const [least, greatest] = (data.range ??= rangeOf(data.subarray(shape.offset)));
  const range = data.length > 1 && `this map: ${rangeWords([least, greatest])}`;
  const of = joined(", ", range, ...beyond(tile, found));
  return { value: exact(data[cell + shape.offset], data), place: place + cellOf(shape, cell), of };
}

/** How many values of a map lie above and below its scale, and have their marks. */
function beyond(tile, { data, shape }) {
  const scale = scaleOfTile(tile, data.subarray(shape.offset));
  if (!scale || data.range[0] === data.range[1]) return [];
  const round = data instanceof Float32Array ? Math.fround : Number;
  const [low, high] = [round(scale.low), round(scale.high)];
  let [under, over] = [0, 0];
  for (const given of data.subarray(shape.offset)) {
    const value = Number(given);
    if (Number.isFinite(value) && value > high) over++;
    if (Number.isFinite(value) && value < low) under++;
  }
  const words = (n, where) => n && `${counted(n)} of ${counted(shape.n_cells)} ${where} the scale`;
  return [words(over, "above"), words(under, "below")];
}

function scaleOfTile({ layer, channel, limits: ofRow }, values) {
  const [known, cuts] = [ready(knownOf(layer)), cutsOf(layer)];
  if (state.scope === "row") return ofRow && { low: ofRow[0] ?? NaN, high: ofRow[1] ?? NaN };
  const limits = state.scope === "store" ? ready(facts.get("limits", () => source.limits())) : null;
  if (!known || cuts === undefined || limits === undefined) return null;
  return source.colours.scaleOf(known, look(), { channel, values, cuts, limits });
}

const placeOf = ({ layer, row, channel }) => `${layer.name}, row ${row}, ${layer.unit} ${channel}`;

function cellOf({ axes, width, offset }, cell) {
  if (axes.length === 2) return `, ${axes[0]} ${Math.floor(cell / width)}, ${axes[1]} ${cell % width}`;
  return axes.length ? `, ${axes[0]} ${cell + offset}` : "";
}

/** The shortest decimal that means this value and no other of its type. */
function exact(value, data) {
  const plain = (x) => `${Object.is(x, -0) ? "-0" : x}`;
  if (!(data instanceof Float32Array) || !Number.isFinite(value)) return plain(value);
  for (let digits = 1; digits < 10; digits++) {
    const near = Number(value.toPrecision(digits));
    if (Math.fround(near) === value) return plain(near);
  }
  return plain(value);
}

function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  const size = Math.abs(value);
  const far = size && (size >= 1e6 || size < 1e-4);
  return far ? value.toExponential(2).replace("e+", "e") : `${Number(value.toPrecision(3))}`;
}

function hover(surface) {
  surface.addEventListener("pointermove", (event) => {
    pointer = { surface, event };
    invalidate();
  });
  surface.addEventListener("pointerleave", () => {
    pointer = null;
    setText($("place"), "");
    invalidate();
  });
}
