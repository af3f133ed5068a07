// The page of a store: rows down, layers and their channels across. It asks a server (`layertap view`) or has
// everything in itself (`layertap export html`); two classes with the same methods hide which.
//
// All of the view's state is in the address, behind the #, so that a link is a view. A frame is painted from
// the state and from what is loaded; what is missing is asked for, and a frame is painted when it comes.
// Text of a store becomes text nodes and attributes, never markup.

const SPRITE_PIXELS = 262144; // maps of one request; a screen is a few
const SPRITE_BYTES = 160e6,
  VALUE_BYTES = 48e6;
const TALLEST = 8e6; // pixels: browsers cut taller elements off, so beyond this the scroll bar is scaled
const GAP = 4,
  HEAD = 50,
  NUMBERS = 14,
  BETWEEN = 22;
const $ = (id) => document.getElementById(id);

// ---- the store, from a server or from this file ----

class Failure {
  constructor(error) {
    this.message = String(error?.message ?? error);
  }
}

class FromServer {
  async ask(path, query = {}, signal) {
    const given = Object.entries(query).filter(([, value]) => value !== "" && value != null);
    if (this.version) given.push(["v", this.version]);
    let answer;
    try {
      answer = await fetch(`${path}?${new URLSearchParams(given)}`, { signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("layertap view does not answer; is it still running?");
    }
    if (answer.status === 200) return answer;
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error ?? `the server answered with status ${answer.status}`);
  }
  async json(path, query) {
    return (await this.ask(path, query)).json();
  }
  async run() {
    const run = await this.json("api/run");
    this.version = run.version;
    return run;
  }
  async rows(filter) {
    return new Uint32Array(await (await this.ask("api/rows", filter)).arrayBuffer());
  }
  facts(rows) {
    return this.json("api/facts", { rows: rows.join(",") });
  }
  layer(layer) {
    return this.json("api/layer", { layer: layer.name });
  }
  limits() {
    return this.json("api/limits");
  }
  channel(layer, channel) {
    return this.json("api/channel", { layer: layer.name, channel });
  }
  async tiles(layer, rows, channels, look, signal) {
    const scope = look.scope === "given" ? `${look.low}:${look.high}` : look.scope;
    const query = {
      layer: layer.name,
      rows: rows.join(","),
      channels: spans(channels),
      scope,
      colormap: look.colors,
    };
    const answer = await this.ask("tiles", query, signal),
      limits = answer.headers.get("X-Limits");
    return Object.assign(await createImageBitmap(await answer.blob()), {
      limits: limits && JSON.parse(limits),
    });
  }
  async values(layer, row, channel) {
    const answer = await this.ask("values", { layer: layer.name, row, channel });
    const shape = JSON.parse(answer.headers.get("X-Shape"));
    return { data: typed(await answer.arrayBuffer(), answer.headers.get("X-Type")), shape };
  }
  async picture(row) {
    return `picture?${new URLSearchParams({ row, v: this.version })}`;
  }
}

class FromFile {
  constructor(run) {
    this.given = run;
    this.waiting = new Map();
    this.urls = new Map();
    globalThis.layertapPiece = (n, text) => this.waiting.get(n)?.resolve(text);
  }
  async piece(key) {
    const n = this.given.pieces[key];
    if (n === undefined) throw new Error(`this page was made without ${key}`);
    const text = $(`piece-${n}`)?.textContent ?? (await this.script(n));
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const open = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(open).arrayBuffer();
  }
  script(n) {
    // A page from a disk may not fetch its neighbours, but it may load them as scripts.
    if (!this.waiting.has(n)) {
      const piece = {};
      piece.promise = new Promise((resolve, reject) => Object.assign(piece, { resolve, reject }));
      this.waiting.set(n, piece);
      const script = document.createElement("script");
      script.src = `pieces/${n}.js`;
      script.onerror = () => piece.reject(new Error(`pieces/${n}.js is not beside this page`));
      document.head.append(script);
    }
    return this.waiting.get(n).promise;
  }
  async json(key) {
    return JSON.parse(new TextDecoder().decode(await this.piece(key)));
  }
  at(layer) {
    return this.given.layers.indexOf(layer);
  }
  async run() {
    return this.given;
  }
  async rows({ label, prediction, outcome, text }) {
    const wanted = text?.toLowerCase();
    const fits = (one) =>
      (!label || one.true === label) &&
      (!prediction || one.predicted === prediction) &&
      (!outcome || one.right === (outcome === "right")) &&
      (!wanted || (one.id ?? "").toLowerCase().includes(wanted));
    return Uint32Array.from(this.given.facts.filter(fits), (one) => one.row);
  }
  async facts(rows) {
    return rows.map((row) => this.given.facts.find((one) => one.row === row));
  }
  layer(layer) {
    return (this.layers ??= new Map()).get(layer) ?? this.keep(layer, this.json(`layer:${this.at(layer)}`));
  }
  keep(layer, promise) {
    this.layers.set(layer, promise);
    return promise;
  }
  async limits() {
    return this.given.limits;
  }
  async channel(layer, channel) {
    const facts = (await this.json(`channels:${this.at(layer)}`))[available(layer).indexOf(channel)];
    if (!facts) throw new Error(`this page was made without ${layer.unit} ${channel} of ${layer.name}`);
    return facts;
  }
  async maps(layer, row) {
    const data = typed(await this.piece(`maps:${this.at(layer)}:${row}`), layer.wire);
    return { data, shape: (await this.layer(layer)).shapes?.[row] ?? layer.map };
  }
  async values(layer, row, channel) {
    const { data, shape } = await this.maps(layer, row);
    const n = data.length / available(layer).length,
      i = available(layer).indexOf(channel);
    return { data: data.subarray(i * n, (i + 1) * n), shape };
  }
  async tiles(layer, rows, channels, look) {
    const facts = await this.layer(layer);
    const lines = [];
    for (const row of rows) {
      const { data, shape } = await this.maps(layer, row),
        n = data.length / available(layer).length;
      lines.push(
        channels.map((channel) => {
          const i = available(layer).indexOf(channel);
          const values = data.subarray(i * n + shape.offset, i * n + shape.offset + shape.n_cells);
          return {
            values,
            shape,
            scale: scaleOf(facts, look, { channel, row, values, limits: this.given.limits }),
          };
        }),
      );
    }
    const image = await createImageBitmap(painted(lines, WIDE.includes(layer.wire)));
    return Object.assign(image, {
      limits: look.scope === "row" ? rows.map((row) => facts.row_limits[row]) : null,
    });
  }
  async picture(row) {
    if (!this.urls.has(row)) {
      const data = await this.piece(`picture:${row}`);
      this.urls.set(row, URL.createObjectURL(new Blob([data], { type: "image/png" })));
    }
    return this.urls.get(row);
  }
}

const WIDE = ["float64", "int32", "uint32", "int64", "uint64"]; // what float32 does not hold

function typed(buffer, type) {
  const kinds = {
    float32: Float32Array,
    float64: Float64Array,
    int8: Int8Array,
    int16: Int16Array,
    int32: Int32Array,
    int64: BigInt64Array,
    uint8: Uint8Array,
    uint16: Uint16Array,
    uint32: Uint32Array,
    uint64: BigUint64Array,
  };
  return new kinds[type](buffer);
}

function spans(numbers) {
  const found = [];
  for (const n of numbers) {
    const last = found.at(-1);
    if (last && last[1] === n - 1) last[1] = n;
    else found.push([n, n]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
}

// ---- colours: the same as render/scale.py, held to it by a test ----

function scaleOf(facts, look, { channel, row, values, limits } = {}) {
  const chosen = look.colors === "auto" ? null : look.colors;
  if (look.scope === "given") {
    const low = Number(look.low),
      high = Number(look.high);
    return { colors: chosen ?? (low < 0 ? "RdBu_r" : "viridis"), low, high };
  }
  let pair = [facts.low, facts.high],
    signed = facts.signed;
  if (look.scope === "store") {
    pair = limits ? [limits.low, limits.high] : [null, null];
    signed = limits?.low < 0;
  } else if (look.scope === "channel") pair = [facts.channel_low[channel], facts.channel_high[channel]];
  else if (look.scope === "row") pair = facts.row_limits?.[row] ?? [null, null];
  else if (look.scope === "map") pair = range(values ?? []);
  const [low, high] = pair.map((limit) => limit ?? NaN);
  const colors = chosen ?? (signed ? "RdBu_r" : "viridis");
  if (run.diverging.includes(colors)) {
    const most = Math.max(Math.abs(low), Math.abs(high));
    return { colors, low: -most, high: most };
  }
  return { colors, low: signed ? low : low * 0, high };
}

function range(values) {
  let low = null,
    high = null;
  for (const given of values) {
    const value = Number(given);
    if (!Number.isFinite(value)) continue;
    if (low === null || value < low) low = value;
    if (high === null || value > high) high = value;
  }
  return [low, high];
}

function rounded(x) {
  return Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x); // halves to even
}

const lastColour = () => run.marks.ZERO - 17; // in a palette the colours come first, then 16 greys, then the marks

function entriesOf(values, scale, wide) {
  const marks = run.marks,
    last = lastColour();
  const n = values.length,
    out = new Uint8Array(n),
    [least, most] = range(values);
  const finite = n > 0 && values.every((value) => Number.isFinite(Number(value)));
  if (finite && n > 1 && least === most) return out.fill(least === 0 ? marks.ZERO : marks.CONSTANT);
  let low = Number.isNaN(scale.low) ? 0 : scale.low,
    high = Number.isNaN(scale.high) ? 0 : scale.high;
  if (run.diverging.includes(scale.colors)) {
    high = Math.max(Math.abs(low), Math.abs(high));
    low = -high;
  }
  let size = Math.max(Math.abs(low), Math.abs(high));
  const far = wide || !(size > 1e-30 && size < 1e30);
  if (!far || size === 0) size = 1;
  const round = far ? (x) => x : Math.fround;
  low /= size;
  high /= size;
  const slope = high > low ? round(last / (high - low)) : 0;
  for (let i = 0; i < n; i++) {
    const value = Number(values[i]);
    if (Number.isNaN(value)) out[i] = marks.NAN;
    else if (value === Infinity) out[i] = marks.POSITIVE_INFINITY;
    else if (value === -Infinity) out[i] = marks.NEGATIVE_INFINITY;
    else if (value > scale.high) out[i] = marks.OVER;
    else if (value < scale.low) out[i] = marks.UNDER;
    else out[i] = Math.min(last, Math.max(0, rounded(round(round(value / size - round(low)) * slope))));
  }
  return out;
}

function painted(lines, wide) {
  const [width, height] = ["width", "height"].map((side) => Math.max(1, lines[0][0].shape[side])); // a row may have no values
  const image = new ImageData(width * lines[0].length, height * lines.length);
  lines.forEach((line, row) =>
    line.forEach(({ values, shape, scale }, column) => {
      const colours = palettes[scale.colors];
      entriesOf(values, scale, wide).forEach((entry, i) => {
        const y = row * height + Math.floor(i / shape.width),
          x = column * width + (i % shape.width);
        image.data.set(colours.subarray(4 * entry, 4 * entry + 4), 4 * (y * image.width + x));
      });
    }),
  );
  return image;
}

// ---- what is loaded: few requests at once, those for what is on the screen, in bounded memory ----

class Loader {
  constructor(atOnce, most, size, free = () => {}) {
    Object.assign(this, { atOnce, most, size, free, items: new Map(), running: 0, held: 0, failed: null });
  }
  get(key, load) {
    let item = this.items.get(key);
    if (item) this.items.delete(key);
    else item = { load, state: "waiting", stop: new AbortController() };
    this.items.set(key, item); // the last is the one that was wanted last
    item.frame = frame;
    return item.value;
  }
  pump() {
    for (const [key, item] of this.items) {
      if (item.frame === frame || item.state === "there" || item.state === "failed") continue;
      if (item.state === "running") item.stop.abort();
      this.items.delete(key);
    }
    for (const [key, item] of this.items) {
      if (this.running >= this.atOnce) break;
      if (item.state === "waiting") this.start(key, item);
    }
    for (const [key, item] of this.items) {
      if (this.held <= this.most) break;
      if (item.state !== "there" || item.frame === frame) continue;
      this.held -= this.size(item.value);
      this.free(item.value);
      this.items.delete(key);
    }
  }
  async start(key, item) {
    item.state = "running";
    this.running++;
    try {
      const value = await item.load(item.stop.signal);
      if (this.items.get(key) !== item) {
        this.free(value);
        return;
      }
      Object.assign(item, { value, state: "there" });
      this.held += this.size(value);
    } catch (error) {
      if (error.name === "AbortError" || this.items.get(key) !== item) return;
      Object.assign(item, { value: new Failure(error), state: "failed" });
      alertOf(error.message);
    } finally {
      this.running--;
      invalidate();
    }
  }
  retry() {
    for (const [key, item] of this.items) if (item.state === "failed") this.items.delete(key);
  }
}

const sprites = new Loader(
  6,
  SPRITE_BYTES,
  (image) => 4 * (image.width * image.height || 0),
  (image) => image.close?.(),
);
const values = new Loader(4, VALUE_BYTES, (found) => found.data?.byteLength ?? 0);
const facts = new Loader(4, 4000, () => 1);
const loaders = [sprites, values, facts];

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
  colors: "auto",
  size: "",
  label: "",
  prediction: "",
  outcome: "",
  text: "",
  top: "",
  x: "",
};
const FILTER = ["label", "prediction", "outcome", "text"];
let state = { ...DEFAULTS, layers: [] };
let source,
  run,
  palettes = {},
  rows = new Uint32Array(0),
  filterKey = null,
  rowAt = new Map();
let frame = 0,
  pending = false,
  loaded = false,
  followed = "";

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { layers: given.getAll("layers") };
  for (const [key, value] of Object.entries(DEFAULTS)) found[key] = given.get(key) ?? value;
  if (!["rows", "row", "channel"].includes(found.view)) found.view = "rows";
  return found;
}

function address(changes = {}) {
  const wanted = { ...state, ...changes },
    given = new URLSearchParams();
  for (const [key, value] of Object.entries(DEFAULTS))
    if (`${wanted[key]}` !== value) given.set(key, wanted[key]);
  for (const layer of wanted.layers) given.append("layers", layer);
  return `#${given}`;
}

function go(changes, keep = true) {
  state = { ...state, ...changes };
  const link = address();
  if (link !== (location.hash || "#")) history[keep ? "pushState" : "replaceState"](null, "", link);
  changed();
}

let remembering = 0;
function remember() {
  // where the page is scrolled to, once it rests
  clearTimeout(remembering);
  remembering = setTimeout(() => history.replaceState(null, "", address()), 120);
}

function changed() {
  const key = JSON.stringify(FILTER.map((name) => state[name]));
  if (key !== filterKey) {
    filterKey = key;
    const filter = Object.fromEntries(FILTER.map((name) => [name, state[name]]));
    source.rows(filter).then(
      (found) => {
        if (key === filterKey) {
          loaded = true;
          rows = found;
          rowAt = new Map(Array.from(found, (row, i) => [row, i]));
          restore();
        }
      },
      (error) => {
        if (key === filterKey) {
          loaded = true;
          rows = new Uint32Array(0);
          rowAt = new Map();
          alertOf(error.message);
          invalidate();
        }
      },
    );
  }
  fill();
  invalidate();
}

// ---- what is shown ----

const layerNamed = (name) => run.layers.find((layer) => layer.name === name);
const drawable = () => run.layers.filter((layer) => !layer.refusal);
const available = (layer) =>
  (layer.channels ??= layer.only ?? Array.from({ length: layer.n_channels }, (_, i) => i));
const look = () => ({ scope: state.scope, low: state.low, high: state.high, colors: state.colors });
const shown = () => {
  const named = state.layers.map(layerNamed).filter((layer) => layer && !layer.refusal);
  return named.length ? named : drawable();
};
const size = () => Math.min(512, Math.max(8, Number(state.size) || 64));

function factsOf(layer) {
  return facts.get(`layer ${layer.name}`, () => source.layer(layer));
}

function orderOf(layer, known) {
  const all = available(layer);
  if (state.by === "index") return all;
  const measure = known?.measures?.[state.by];
  if (!measure) return all;
  layer.orders ??= {};
  return (layer.orders[state.by] ??= [...all].sort(
    (a, b) => (measure[b] ?? -Infinity) - (measure[a] ?? -Infinity) || a - b,
  ));
}

/** A layer as it is shown. What must be asked for is asked for once it is looked at: a store has many layers. */
class Block {
  constructor(layer) {
    const most = available(layer).length;
    const all = state.n === "all" || (state.n === "" && state.view === "row");
    const single = Math.max(layer.map.height, layer.map.width) === 1;
    this.layer = layer;
    this.n = all ? most : Math.min(most, Number(state.n) || 8);
    this.across = single ? Math.max(12, size() / 2.5) : size();
    Object.assign(this, fitted(layer.map, this.across));
  }
  get known() {
    const found = factsOf(this.layer);
    return found && !(found instanceof Failure) ? found : null;
  }
  get order() {
    return orderOf(this.layer, state.by === "index" ? null : this.known);
  }
}

const blocks = () => shown().map((layer) => new Block(layer));

/** A tile's size in CSS pixels: a whole number of device pixels for each value, as far as that fits. */
function fitted(map, across, ratio = devicePixelRatio || 1) {
  const exact = (across * ratio) / Math.max(map.height, map.width);
  const factor = exact >= 1 ? Math.floor(exact) : exact;
  return { width: (map.width * factor) / ratio, height: (map.height * factor) / ratio };
}

/** Rows down, channels across. */
function matrix(viewWidth) {
  const found = blocks(),
    left = Math.min(headWidth(), viewWidth / 2);
  let x = 6;
  for (const block of found) {
    block.pitch = Math.max(block.width + GAP, block.n > 1 ? 22 : 0);
    block.x = x;
    block.span = Math.max(block.n * block.pitch, 132);
    x += block.span + BETWEEN;
  }
  const under = state.scope === "row" ? 12 : 0,
    tall = Math.max(54, ...found.map((block) => block.height)) + 10;
  const rowHeight = Math.ceil(tall + under),
    top = HEAD + NUMBERS + (state.scope === "channel" ? 12 : 0);
  return {
    found,
    left,
    top,
    rowHeight,
    width: x,
    height: rows.length * rowHeight,
    *tiles(x0, y0, x1, y1) {
      const first = Math.max(0, Math.floor(y0 / rowHeight)),
        last = Math.min(rows.length - 1, Math.floor(y1 / rowHeight));
      for (const block of found) {
        const from = Math.max(0, Math.floor((x0 - block.x) / block.pitch)),
          to = Math.min(block.n - 1, Math.floor((x1 - block.x) / block.pitch));
        for (let at = first; at <= last; at++)
          for (let k = from; k <= to; k++)
            yield {
              block,
              k,
              at,
              x: block.x + k * block.pitch,
              y: at * rowHeight + (tall - block.height) / 2,
            };
      }
    },
    heads: (x0, y0, x1) =>
      found
        .filter((block) => block.x < x1 && block.x + block.span > x0)
        .map((block) => ({
          block,
          x: Math.max(block.x - x0, Math.min(0, block.x + block.span - x0 - 132)),
          y: 0,
          width: Math.min(block.span + BETWEEN - 8, block.x + block.span - Math.max(x0, block.x)),
        })),
    place: (at, block, k) => ({
      x: block.x + k * block.pitch,
      y: at * rowHeight,
      width: block.width,
      height: rowHeight,
    }),
  };
}

/** One row: every layer a block of lines. */
function single(viewWidth) {
  const found = blocks(),
    at = rowAt.get(Number(state.row));
  let y = 0;
  for (const block of found) {
    block.pitch = Math.max(block.width + GAP, 22);
    block.columns = Math.max(1, Math.floor((viewWidth - 24) / block.pitch));
    block.line = block.height + GAP + NUMBERS + (state.scope === "channel" ? 12 : 0);
    block.y = y;
    block.tall = HEAD + Math.ceil(block.n / block.columns) * block.line;
    y += block.tall + BETWEEN;
  }
  const spot = (block, k) => ({
    x: 14 + (k % block.columns) * block.pitch,
    y: block.y + HEAD + NUMBERS + Math.floor(k / block.columns) * block.line,
  });
  return {
    found,
    left: 0,
    top: 0,
    rowHeight: 0,
    width: viewWidth,
    height: y,
    *tiles(x0, y0, x1, y1) {
      for (const block of found) {
        const from = Math.max(0, Math.floor((y0 - block.y - HEAD) / block.line)) * block.columns;
        const to = Math.min(block.n, (Math.floor((y1 - block.y - HEAD) / block.line) + 1) * block.columns);
        for (let k = from; k < to; k++) yield { block, k, at: at ?? -1, ...spot(block, k) };
      }
    },
    heads: (x0, y0, x1, y1) =>
      found
        .filter((block) => block.y < y1 && block.y + block.tall > y0)
        .map((block) => ({
          block,
          x: 14,
          y: Math.max(block.y - y0, Math.min(0, block.y + block.tall - y0 - HEAD)),
          width: viewWidth - 24,
        })),
    place: (_, block, k) => ({ ...spot(block, k), width: block.width, height: block.line }),
  };
}

const headWidth = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--head"));

/** The sprite that holds a tile, and where in it the tile is. */
function spriteOf(tile) {
  const { layer, order, n } = tile.block,
    one = state.view === "row" || layer.is_ragged;
  const budget = Math.max(1, Math.floor(SPRITE_PIXELS / (layer.map.height * layer.map.width)));
  const across = Math.min(n, one ? 128 : 64, budget),
    down = one ? 1 : Math.min(8, Math.max(1, Math.floor(budget / across)));
  const chunk = Math.floor(tile.k / across),
    page = Math.floor(tile.at / down);
  const channels = order.slice(chunk * across, Math.min(n, (chunk + 1) * across));
  const listed =
    state.view === "row" ? [Number(state.row)] : Array.from(rows.slice(page * down, (page + 1) * down));
  const key = JSON.stringify([
    layer.name,
    listed[0],
    listed.length,
    filterKey,
    state.by,
    n,
    chunk,
    look(),
    state.view,
  ]);
  const image = sprites.get(key, (signal) => source.tiles(layer, listed, channels, look(), signal));
  return {
    image,
    column: tile.k % across,
    line: state.view === "row" ? 0 : tile.at % down,
    columns: channels.length,
    lines: listed.length,
  };
}

// ---- the board: one canvas, and a few elements on it ----

const board = $("board"),
  canvas = $("canvas"),
  pen = canvas.getContext("2d");
let layout = null,
  offset = { x: 0, y: 0 },
  painting = [],
  colours = {};

function scrollRange() {
  const full = layout.height + layout.top + 8,
    tall = Math.min(TALLEST, full);
  return {
    full,
    tall,
    last: Math.max(0, full - board.clientHeight),
    most: Math.max(0, tall - board.clientHeight),
  };
}

/** Where the view is: beyond what a browser can scroll, a pixel of the bar is several of the view. */
function scrolled() {
  const { last, most } = scrollRange();
  offset.x = board.scrollLeft;
  if (Math.abs(board.scrollTop - (offset.bar ?? -9)) > 1)
    offset.y = most ? (board.scrollTop / most) * last : 0;
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

function paintBoard() {
  const width = board.clientWidth,
    height = board.clientHeight,
    ratio = devicePixelRatio || 1;
  layout = state.view === "row" ? single(width) : matrix(width);
  const { tall } = scrollRange();
  Object.assign($("space").style, {
    width: `${Math.max(width, layout.width + layout.left)}px`,
    height: `${Math.max(height, tall)}px`,
  });
  Object.assign($("stage").style, { width: `${width}px`, height: `${height}px` });
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  }
  follow();
  scrolled();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  const { left, top } = layout,
    x0 = offset.x,
    y0 = offset.y,
    x1 = x0 + width - left,
    y1 = y0 + height - top;
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width - left, height - top);
  pen.clip();
  canvas.tiles = painting = [];
  for (const tile of layout.tiles(x0, y0, x1, y1)) paintTile(tile, left - x0, top - y0, ratio);
  pen.restore();
  paintNumbers(width, height, x0, y0);
  paintHeads(x0, y0, x1, y1, width, height);
  $("empty").hidden = !loaded || (rows.length > 0 && shown().length > 0);
  $("empty").textContent = !run.captured
    ? "No row is captured yet: run the capture, then reload."
    : !shown().length
      ? "This store has no layer that can be drawn."
      : "No row fits the filter.";
}

function paintTile(tile, dx, dy, ratio) {
  const { block } = tile,
    channel = block.order[tile.k],
    row = state.view === "row" ? Number(state.row) : rows[tile.at];
  let x = Math.round((tile.x + dx) * ratio) / ratio,
    y = Math.round((tile.y + dy) * ratio) / ratio;
  let { width, height } = block;
  const ready = run.values && (state.by === "index" || block.known) && tile.at >= 0;
  const { image, ...at } = ready ? spriteOf(tile) : {};
  if (image && !(image instanceof Failure)) {
    const w = image.width / at.columns,
      h = image.height / at.lines;
    if (block.layer.is_ragged) ({ width, height } = fitted({ width: w, height: h }, block.across, ratio));
    pen.imageSmoothingEnabled = width * ratio < w;
    pen.drawImage(image, at.column * w, at.line * h, w, h, x, y, width, height);
    const { map } = block.layer,
      left = map.n_cells - map.width * (map.height - 1);
    if (!block.layer.is_ragged && left < map.width) {
      const unit = width / map.width;
      pen.clearRect(x + left * unit, y + height - unit, width - left * unit, unit);
    }
  } else {
    pen.fillStyle = colours.empty;
    pen.fillRect(x, y, width, height);
    if (image) {
      pen.strokeStyle = colours.wrong;
      line(x, y, x + width, y + height);
      line(x, y + height, x + width, y);
    }
  }
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1 / ratio;
  pen.strokeRect(x - 0.5 / ratio, y - 0.5 / ratio, width + 1 / ratio, height + 1 / ratio);
  const here =
    state.layer === block.layer.name &&
    Number(state.channel) === channel &&
    state.channel !== "" &&
    Number(state.row) === row;
  if (here) {
    pen.strokeStyle = colours.accent;
    pen.lineWidth = 2;
    pen.strokeRect(x - 2, y - 2, width + 4, height + 4);
  }
  const limits = image?.limits?.[at.line];
  if (limits && state.view === "row") block.rowLimits = limits;
  else if (limits && block.told !== tile.at) {
    // beneath the first of the row's tiles: what its colours mean
    block.told = tile.at;
    pen.font = "10px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.fillStyle = colours.grey;
    pen.fillText(
      `${short(limits[0])} to ${short(limits[1])}`,
      Math.max(x, layout.left + 2),
      y + height + 11,
    );
  }
  painting.push({
    x,
    y,
    width,
    height,
    layer: block.layer,
    channel,
    row,
    there: Boolean(image) && !(image instanceof Failure),
  });
}

function line(x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function paintNumbers(width, height, x0, y0) {
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "alphabetic";
  pen.fillStyle = colours.grey;
  if (state.view === "row") {
    for (const tile of painting) {
      pen.fillText(tile.channel, tile.x + tile.width / 2, tile.y - 3);
      const limits =
        state.scope === "channel" && layout.found.find((block) => block.layer === tile.layer).known;
      if (limits && tile.width > 24)
        pen.fillText(most(limits, tile.channel), tile.x + tile.width / 2, tile.y + tile.height + 11);
    }
    return;
  }
  pen.save();
  pen.beginPath();
  pen.rect(layout.left, 0, width, layout.top);
  pen.clip();
  for (const block of layout.found) {
    const from = Math.max(0, Math.floor((x0 - block.x) / block.pitch)),
      to = Math.min(block.n - 1, Math.floor((x0 + width - block.x) / block.pitch));
    for (let k = from; k <= to; k++) {
      const x = layout.left + block.x + k * block.pitch - x0 + block.width / 2;
      pen.fillText(block.order[k], x, HEAD + 9);
      if (state.scope === "channel" && block.known && block.pitch > 24)
        pen.fillText(most(block.known, block.order[k]), x, HEAD + 21);
    }
  }
  pen.restore();
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  line(0, layout.top - 0.5, width, layout.top - 0.5);
  line(layout.left - 0.5, 0, layout.left - 0.5, height);
}

/** The end of a channel's own scale: its other end is 0, or the same below. */
function most(known, channel) {
  const scale = scaleOf(known, look(), { channel });
  return `${run.diverging.includes(scale.colors) ? "±" : "to "}${short(scale.high)}`;
}

/** Keep one element for each item by its key, and no others. */
function pool(parent, items, make, update) {
  const kept = (parent.kept ??= new Map()),
    wanted = new Set();
  for (const item of items) {
    wanted.add(item.key);
    let element = kept.get(item.key);
    if (!element) {
      element = make(item);
      kept.set(item.key, element);
      parent.append(element);
    }
    update(element, item);
  }
  for (const [key, element] of kept)
    if (!wanted.has(key)) {
      element.remove();
      kept.delete(key);
    }
}

function paintHeads(x0, y0, x1, y1, width, height) {
  const tops = $("tops"),
    lefts = $("lefts"),
    { left, top, rowHeight } = layout;
  Object.assign(tops.style, {
    left: `${left}px`,
    top: 0,
    width: `${width - left}px`,
    height: `${top ? HEAD : height}px`,
  });
  pool(
    tops,
    layout.heads(x0, y0, x1, y1).map((head) => ({ ...head, key: head.block.layer.name })),
    makeLayerHead,
    updateLayerHead,
  );
  Object.assign(lefts.style, { left: 0, top: `${top}px`, width: `${left}px`, height: `${height - top}px` });
  const items = [];
  if (rowHeight)
    for (let at = Math.floor(y0 / rowHeight); at < rows.length && at * rowHeight < y1; at++)
      items.push({ key: rows[at], at, y: at * rowHeight - y0, height: rowHeight });
  pool(lefts, items, makeRowHead, updateRowHead);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function makeLayerHead(item) {
  const name = element("button", { type: "button", textContent: item.block.layer.name });
  name.onclick = () => focusLayer(item.block.layer.name);
  const bar = element(
    "small",
    { className: "bar" },
    element("span"),
    element("canvas", { width: 112, height: 1 }),
    element("span"),
    element("span"),
  );
  return element("div", { className: "layer" }, name, element("small"), bar);
}

function updateLayerHead(head, { block, x, y, width }) {
  Object.assign(head.style, { transform: `translate(${x}px, ${y}px)`, width: `${width}px` });
  const { layer, n, order, known } = block,
    [name, words, bar] = head.children;
  const map = layer.is_ragged ? "rows differ in shape" : `${layer.map.height} × ${layer.map.width}`;
  const part = layer.only ? ` (of ${layer.n_channels} captured)` : "";
  const ranked =
    state.by === "index"
      ? ""
      : known && !known.measures[state.by]
        ? ", this order is not known here"
        : `, by ${orderName()}`;
  const detail = [
    `${n} of ${order.length} ${plural(layer.unit, order.length)}${part}${ranked}`,
    map,
    layer.type,
    layer.about,
    layer.map.note,
  ];
  set(words, detail.filter(Boolean).join(" · "));
  name.title = `${layer.name}: ${state.layers.length === 1 ? "show all layers" : "show this layer alone, all of it"}`;
  words.title = words.textContent;
  paintBar(bar, block);
}

function orderName() {
  return (
    document.querySelector(`[name=by] option[value="${CSS.escape(state.by)}"]`)?.textContent ?? state.by
  );
}
function plural(unit, n) {
  return n === 1 ? unit : `${unit}s`;
}
function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A colour bar, where one is true of all that stands with it. */
function paintBar(bar, { known, rowLimits }) {
  const [low, strip, high, note] = bar.children,
    one = state.view === "row" && state.scope === "row";
  const own = one
    ? {}
    : {
        channel: "each channel has a scale of its own",
        row: "each row has a scale of its own",
        map: "each map has a scale of its own",
      };
  const limits = state.scope === "store" ? facts.get("limits", () => source.limits()) : null;
  const wait = !known || (state.scope === "store" && (!limits || limits instanceof Failure));
  const scale =
    wait || own[state.scope] || (one && !rowLimits)
      ? null
      : scaleOf(one ? { ...known, row_limits: [rowLimits] } : known, look(), { limits, row: 0 });
  const whole = !scale || (Number.isFinite(scale.low) && Number.isFinite(scale.high));
  strip.hidden = !scale || !whole;
  set(low, scale && whole ? short(scale.low) : "");
  set(high, scale && whole ? short(scale.high) : "");
  const some =
    known && !known.whole && state.scope !== "given" && !["row", "map"].includes(state.scope)
      ? `range of ${known.rows} rows`
      : "";
  set(note, own[state.scope] ?? (whole ? some : "no finite value"));
  if (!scale || !whole || strip.key === `${scale.colors} ${scale.low} ${scale.high}`) return;
  strip.key = `${scale.colors} ${scale.low} ${scale.high}`;
  const last = lastColour(),
    image = new ImageData(strip.width, 1);
  const most = Math.max(Math.abs(scale.low), Math.abs(scale.high));
  const [from, to] =
    run.diverging.includes(scale.colors) && most
      ? [scale.low, scale.high].map((limit) => (limit / most + 1) / 2)
      : [0, 1];
  for (let i = 0; i < strip.width; i++) {
    const entry = Math.round((from + ((to - from) * i) / (strip.width - 1)) * last);
    image.data.set(palettes[scale.colors].subarray(4 * entry, 4 * entry + 4), 4 * i);
  }
  strip.getContext("2d").putImageData(image, 0, 0);
}

function factOf(row) {
  const at = rowAt.get(row) ?? 0,
    page = Math.floor(at / 64);
  const listed = Array.from(rows.slice(page * 64, page * 64 + 64));
  const found = listed.includes(row)
    ? facts.get(JSON.stringify(["rows", filterKey, page, listed[0]]), () => source.facts(listed))
    : undefined;
  return found instanceof Failure ? undefined : found?.find((one) => one.row === row);
}

function makeRowHead({ key }) {
  const picture = run.columns.includes("picture")
    ? element("img", { alt: "", decoding: "async", draggable: false })
    : element("span", { className: "nopicture", hidden: true });
  if (picture.tagName === "IMG")
    source.picture(key).then(
      (url) => {
        picture.src = url;
      },
      () => {},
    );
  return element(
    "a",
    { className: "row", title: "Open this row" },
    picture,
    element("span", {}, element("b"), element("span"), element("small")),
  );
}

function updateRowHead(head, { key, y, height }) {
  Object.assign(head.style, { transform: `translateY(${y}px)`, height: `${height}px` });
  head.href = address({ view: "row", row: key, top: "", x: "" });
  head.classList.toggle("at", Number(state.row) === key && state.row !== "");
  const fact = factOf(key),
    [name, guess, id] = head.lastChild.children;
  set(name, fact?.true ?? `row ${key}`);
  guess.className = fact?.right === false ? "wrong" : fact?.right ? "right" : "";
  set(
    guess,
    fact?.predicted == null
      ? ""
      : fact.right
        ? "✓ predicted"
        : `${fact.right === false ? "✗ " : "→ "}${fact.predicted}`,
  );
  set(id, fact?.true == null ? (fact?.id ?? "") : `${key}${fact?.id ? ` · ${fact.id}` : ""}`);
  id.title = id.textContent;
}

// ---- the cursor ----

/** Bring the state's row and channel into view, once for each that is new. */
function follow() {
  const key = JSON.stringify([
    state.view,
    state.row,
    state.layer,
    state.channel,
    rows.length,
    filterKey,
    state.top,
    state.x,
  ]);
  if (key === followed || !rows.length) return;
  const before = followed && JSON.parse(followed);
  followed = key;
  if (state.view === "row") {
    if (before?.[0] !== "row" || before?.[1] !== state.row) {
      if (!moved) scrollTo(0, Number(state.top) || (before?.[0] === "row" ? offset.y : 0));
    }
  } else if (!moved && (state.top !== "" || state.x !== "")) {
    const [row, rest] = state.top.split("-").map(Number); // 17-20: row 17 is at the top, but for 20 pixels
    scrollTo(Number(state.x) || 0, (rowAt.get(row) ?? 0) * layout.rowHeight + (rest || 0));
  } else if (!moved && before && before[5] !== filterKey) scrollTo(offset.x, 0);
  if (!moved && (state.top !== "" || state.x !== "")) return;
  const at = state.view === "row" ? 0 : rowAt.get(Number(state.row)),
    block = layout.found.find((one) => one.layer.name === state.layer);
  const k = block && state.channel !== "" ? block.order.indexOf(Number(state.channel)) : -1;
  moved = false;
  if (at === undefined || state.row === "") return;
  const spot =
    block && k >= 0 && k < block.n
      ? layout.place(at, block, k)
      : state.view === "row"
        ? null
        : { x: offset.x, y: at * layout.rowHeight, width: 0, height: layout.rowHeight };
  if (!spot) return;
  const height = board.clientHeight - layout.top,
    width = board.clientWidth - layout.left;
  scrolled();
  const y =
    spot.y < offset.y
      ? spot.y - (state.view === "row" ? HEAD + NUMBERS : 0)
      : spot.y + spot.height > offset.y + height
        ? spot.y + spot.height - height
        : offset.y;
  const x =
    spot.x < offset.x
      ? spot.x - 10
      : spot.x + spot.width > offset.x + width
        ? spot.x + spot.width - width + 20
        : offset.x;
  scrollTo(x, y);
}
let moved = false; // the last change was a step of the cursor, so it is followed wherever the view was

function step(change) {
  moved = true;
  go({ ...change, top: "", x: "" }, false);
}

function restore() {
  followed = "";
  invalidate();
}

function stepRow(by) {
  if (!rows.length) return;
  const at = rowAt.get(Number(state.row));
  const here =
    state.row === "" || at === undefined
      ? state.view === "rows"
        ? Math.floor(offset.y / (layout?.rowHeight || 1)) - (by > 0 ? 1 : 0)
        : -1
      : at;
  const next = Math.min(rows.length - 1, Math.max(0, here + by));
  if (state.view === "row") go({ row: `${rows[next]}` }, false);
  else step({ row: `${rows[next]}` });
}

function stepChannel(by) {
  const found = layout.found,
    i = Math.max(
      0,
      found.findIndex((block) => block.layer.name === state.layer),
    );
  const block = found[i];
  if (!block) return;
  const k = state.channel === "" ? -1 : block.order.indexOf(Number(state.channel)),
    next = k < 0 ? 0 : k + by;
  const row =
    state.row === "" && rows.length
      ? { row: `${rows[Math.floor(offset.y / (layout.rowHeight || 1))]}` }
      : {};
  if (next < 0) {
    if (i > 0)
      step({
        ...row,
        layer: found[i - 1].layer.name,
        channel: `${found[i - 1].order[found[i - 1].n - 1]}`,
      });
  } else if (next < block.n) step({ ...row, layer: block.layer.name, channel: `${block.order[next]}` });
  else if (i + 1 < found.length)
    step({ ...row, layer: found[i + 1].layer.name, channel: `${found[i + 1].order[0]}` });
}

function stepLayer(by) {
  const list = shown(),
    i = list.findIndex((layer) => layer.name === state.layer);
  const layer = list[Math.min(list.length - 1, Math.max(0, i < 0 ? 0 : i + by))];
  if (!layer) return;
  if (state.view === "channel") go({ layer: layer.name, channel: `${available(layer)[0]}` }, false);
  else {
    const block = layout.found.find((one) => one.layer === layer);
    const row = state.row === "" && rows.length ? { row: `${rows[0]}` } : {};
    step({ ...row, layer: layer.name, channel: `${block.order[0]}` });
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
  go(
    state.layers.length === 1 && state.layers[0] === name
      ? { layers: [], n: "", x: "" }
      : { layers: [name], n: "all", x: "" },
  );
}

// ---- the true value under the pointer ----

let pointer = null;

function tileUnder(x, y) {
  return painting.find(
    (tile) => x >= tile.x && x < tile.x + tile.width && y >= tile.y && y < tile.y + tile.height,
  );
}

/** Of the map under the cursor of the keys, what the pointer would find: its range, and where it is greatest. */
function readCursor() {
  const tile =
    state.row === "" || state.channel === ""
      ? null
      : painting.find(
          (one) =>
            one.there &&
            one.layer.name === state.layer &&
            one.channel === Number(state.channel) &&
            one.row === Number(state.row),
        );
  const found = tile && valuesOf(tile);
  if (!found || found instanceof Failure || !found.shape.n_cells) {
    set($("place"), "");
    return;
  }
  const { data, shape } = found,
    real = data.subarray(shape.offset),
    [least, greatest] = (data.range ??= range(real));
  const at = real.findIndex((value) => Number(value) === greatest);
  if (at < 0) set($("place"), `${placeOf(tile)}: no finite value`);
  else if (real.length === 1) set($("place"), `${placeOf(tile)} = ${exact(real[0], data)}`);
  else
    set(
      $("place"),
      `${placeOf(tile)}: from ${short(least)} to ${exact(real[at], data)}${cellOf(shape, at)}`,
    );
}

function readPointer() {
  if (!pointer) {
    $("tip").hidden = true;
    readCursor();
    return;
  }
  const { surface, event } = pointer,
    box = surface.getBoundingClientRect();
  const x = event.clientX - box.left,
    y = event.clientY - box.top;
  const tile =
    surface === canvas
      ? layout && y > layout.top && x > layout.left
        ? tileUnder(x, y)
        : null
      : { ...surface.tile, x: 0, y: 0, width: box.width, height: box.height, there: true };
  canvas.style.cursor = tile && surface === canvas ? "pointer" : "";
  $("tip").hidden = !tile || !tile.there;
  if (!tile || !tile.there) {
    set($("place"), "");
    return;
  }
  const found = valuesOf(tile),
    [value, place] = $("tip").children;
  const words =
    found && !(found instanceof Failure)
      ? told(tile, found, (x - tile.x) / tile.width, (y - tile.y) / tile.height)
      : { value: "…", place: placeOf(tile) };
  set(value, words.value);
  set(place, words.place + (words.of ?? ""));
  set($("place"), `${words.place} = ${words.value}`);
  const tip = $("tip"),
    wide = tip.offsetWidth,
    high = tip.offsetHeight;
  const left = event.clientX + 16 + wide > innerWidth ? event.clientX - wide - 12 : event.clientX + 16;
  const over = event.clientY + 18 + high > innerHeight ? event.clientY - high - 12 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(2, left)}px, ${Math.max(2, over)}px)`;
}

function valuesOf(tile) {
  return values.get(JSON.stringify([tile.layer.name, tile.row, tile.channel]), () =>
    source.values(tile.layer, tile.row, tile.channel),
  );
}

function placeOf(tile) {
  return `${tile.layer.name}, row ${tile.row}, ${tile.layer.unit} ${tile.channel}`;
}

function cellOf({ axes, width, offset }, cell) {
  if (axes.length === 2) return `, ${axes[0]} ${Math.floor(cell / width)}, ${axes[1]} ${cell % width}`;
  return axes.length ? `, ${axes[0]} ${cell + offset}` : "";
}

function told(tile, { data, shape }, u, v) {
  const [y, x] = [
    [v, shape.height],
    [u, shape.width],
  ].map(([at, n]) => Math.max(0, Math.min(n - 1, Math.floor(at * n))));
  const cell = y * shape.width + x;
  if (cell >= shape.n_cells) return { value: "no value here", place: placeOf(tile) };
  const at = cellOf(shape, cell),
    [least, greatest] = (data.range ??= range(data.subarray(shape.offset)));
  const of = data.length > 1 ? ` (of ${short(least)} to ${short(greatest)} in this map)` : "";
  return { value: exact(data[cell + shape.offset], data), place: placeOf(tile) + at, of };
}

/** The shortest decimal that means this value and no other of its type. */
function exact(value, data) {
  if (typeof value === "bigint" || !(data instanceof Float32Array) || !Number.isFinite(value))
    return `${Object.is(value, -0) ? "-0" : value}`;
  for (let digits = 1; digits < 10; digits++) {
    const near = Number(value.toPrecision(digits));
    if (Math.fround(near) === value) return `${Object.is(near, -0) ? "-0" : near}`;
  }
  return `${value}`;
}

function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  const size = Math.abs(value);
  return size && (size >= 1e6 || size < 1e-4)
    ? value.toExponential(2).replace("e+", "e")
    : `${Number(value.toPrecision(3))}`;
}

function hover(surface) {
  surface.addEventListener("pointermove", (event) => {
    pointer = { surface, event };
    invalidate();
  });
  surface.addEventListener("pointerleave", () => {
    pointer = null;
    set($("place"), "");
    invalidate();
  });
}

// ---- one row, beside its maps ----

let sideKey = "";
function paintSide() {
  const side = $("side"),
    row = Number(state.row);
  side.hidden = state.view !== "row";
  document.querySelector("main").classList.toggle("split", state.view === "row");
  if (side.hidden) {
    sideKey = "";
    return;
  }
  const about = facts.get(`row ${row}`, () => source.facts([row]));
  const at = rowAt.get(row),
    key = JSON.stringify([row, Boolean(about), at, rows.length]);
  if (key === sideKey) return;
  sideKey = key;
  const fact = about && !(about instanceof Failure) ? about[0] : null;
  const picture = element("img", { alt: "The row's picture", hidden: !run.columns.includes("picture") });
  if (!picture.hidden)
    source.picture(row).then(
      (url) => {
        picture.src = url;
      },
      () => {
        picture.hidden = true;
      },
    );
  const list = element("dl");
  const say = (name, value, kind = "") => {
    if (value != null && value !== "")
      list.append(
        element("dt", { textContent: name }),
        element("dd", { textContent: value, className: kind }),
      );
  };
  say("id", fact?.id);
  say("class", fact?.true);
  say(
    "predicted",
    fact?.predicted == null
      ? null
      : `${fact.predicted}${fact.right == null ? "" : fact.right ? " ✓" : " ✗"}`,
    fact?.right === false ? "wrong" : fact?.right ? "right" : "",
  );
  for (const [name, value] of Object.entries(fact?.columns ?? {})) say(name, value);
  if (at === undefined) say("filter", "this row does not fit it");
  side.replaceChildren(
    turn(
      `Row ${row}`,
      () => stepRow(-1),
      () => stepRow(1),
      "row",
    ),
    picture,
    list,
  );
}

function turn(words, back, on, what) {
  const title = element("b", { textContent: words, title: words });
  return element(
    "div",
    { className: "turn" },
    element("button", {
      type: "button",
      textContent: "‹",
      title: `Previous ${what} (←)`,
      ariaLabel: `Previous ${what}`,
      onclick: back,
    }),
    element("button", {
      type: "button",
      textContent: "›",
      title: `Next ${what} (→)`,
      ariaLabel: `Next ${what}`,
      onclick: on,
    }),
    title,
    element("button", { type: "button", textContent: "close", title: "All rows (Esc)", onclick: close }),
  );
}

// ---- one channel ----

let channelKey = "";
function paintChannel() {
  const article = $("channel"),
    layer = layerNamed(state.layer),
    channel = Number(state.channel);
  article.hidden = state.view !== "channel";
  if (article.hidden) {
    channelKey = "";
    return;
  }
  if (!layer || layer.refusal || !available(layer).includes(channel) || state.channel === "") {
    const words = !layer
      ? `There is no layer ${state.layer} here.`
      : layer.refusal
        ? `${layer.name} cannot be drawn: ${layer.refusal}.`
        : `There is no ${layer.unit} ${state.channel} of ${layer.name} here.`;
    if (channelKey !== words)
      article.replaceChildren(
        element("p", { textContent: words }),
        element("button", { type: "button", textContent: "close", onclick: close }),
      );
    channelKey = words;
    return;
  }
  const known = factsOf(layer),
    about = facts.get(JSON.stringify(["channel", layer.name, channel]), () =>
      source.channel(layer, channel),
    );
  const ready = known && about,
    key = JSON.stringify([layer.name, channel, Boolean(ready), look()]);
  if (key !== channelKey) {
    if (!channelKey.startsWith(JSON.stringify([layer.name, channel]).slice(0, -1))) article.scrollTop = 0;
    channelKey = key;
    const title = turn(
      `${layer.name}, ${layer.unit} ${channel}`,
      () => turnChannel(-1),
      () => turnChannel(1),
      layer.unit,
    );
    if (!ready) article.replaceChildren(title, element("p", { textContent: "Reading …" }));
    else if (about instanceof Failure || known instanceof Failure)
      article.replaceChildren(title, element("p", { textContent: about.message ?? known.message }));
    else article.replaceChildren(title, ...sections(layer, channel, about, known));
  }
  paintTops(layer, channel);
}

function turnChannel(by) {
  const all = available(layerNamed(state.layer)),
    next = all.indexOf(Number(state.channel)) + by;
  if (next >= 0 && next < all.length) go({ channel: `${all[next]}` }, false);
}

function sections(layer, channel, about, known) {
  const sampled = (part) =>
    about.sampled.includes(part)
      ? `Of ${about.sample_rows} of ${run.captured.toLocaleString("en")} rows, spread evenly.`
      : "";
  const note = (part, more = "") => {
    const lack = about.lacking.find((one) => one.what === part);
    const how = lack
      ? ` The store does not keep this of every row; a capture with --stats ${lack.stats} does.`
      : "";
    return element("p", {
      textContent: [sampled(part) || (lack ? "Not known here." : ""), more].filter(Boolean).join(" ") + how,
    });
  };
  const part = (title, name, body, more) => [
    element("h2", { textContent: title }),
    note(name, more),
    ...(body ? [body] : []),
  ];
  return [
    ...part(
      about.whole && !about.sampled.includes("numbers")
        ? `Over all ${about.rows.toLocaleString("en")} captured rows`
        : "Over rows",
      "numbers",
      about.numbers && numbersOf(about.numbers),
    ),
    ...part(`Rows that excite it most`, "top", about.top && topOf(layer, channel, about.top)),
    ...part(
      "Histogram",
      "histogram",
      about.histogram && histogramOf(about.histogram, about.numbers),
      histogramNote(about),
    ),
    ...(about.classes || run.classes.length
      ? part(
          "Mean for each class",
          "classes",
          about.classes && classesOf(about.classes, known),
          about.classes?.some((one) => one.map)
            ? "Each map is the mean over the class, all of them on one scale."
            : "",
        )
      : []),
  ];
}

function numbersOf(numbers) {
  const list = element("dl");
  const named = {
    minimum: "minimum",
    maximum: "maximum",
    mean: "mean",
    deviation: "standard deviation",
    zero: "zeros",
    count: "finite values",
    nan: "NaN",
    inf: "infinite",
  };
  for (const [key, name] of Object.entries(named)) {
    const value = numbers[key];
    if ((key === "nan" || key === "inf") && !value) continue;
    const text =
      key === "zero" && value !== null
        ? `${(100 * value).toFixed(1)} %`
        : key === "count" || key === "nan" || key === "inf"
          ? value.toLocaleString("en")
          : value === null
            ? "none"
            : `${Number(value.toPrecision(5))}`;
    list.append(
      element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text })),
    );
  }
  if (numbers.zero === 1)
    list.append(
      element(
        "div",
        {},
        element("dt", { textContent: "this channel" }),
        element("dd", { textContent: "is dead", className: "wrong" }),
      ),
    );
  return list;
}

function topOf(layer, channel, top) {
  const box = element("div", { className: "top" });
  for (const one of top) {
    const here = !source.given || rowsHere().has(one.row),
      link = element("a", { href: here ? address({ view: "row", row: one.row, top: "", x: "" }) : "#" });
    const picture = element("img", { alt: "", hidden: !run.columns.includes("picture") });
    if (!picture.hidden)
      source.picture(one.row).then(
        (url) => {
          picture.src = url;
        },
        () => {
          picture.hidden = true;
        },
      );
    const map = element("canvas", { width: 1, height: 1 });
    map.tile = { layer, channel, row: one.row };
    hover(map);
    link.append(element("div", {}, picture, map));
    const at = one.at?.length ? ` at ${one.at.join(", ")}` : "";
    box.append(
      element(
        "figure",
        {},
        link,
        element(
          "figcaption",
          {},
          element("b", {
            textContent: one.value === null ? "none" : `${Number(one.value.toPrecision(5))}`,
          }),
          element("small", { textContent: `row ${one.row}${at}` }),
          element("small", { className: "who" }),
        ),
      ),
    );
  }
  box.rows = top.map((one) => one.row);
  return box;
}

/** Of a page from a file, the rows that are in it. */
const rowsHere = () => (source.given.here ??= new Set(source.given.facts.map((one) => one.row)));

/** The maps of a channel's top rows, in one request, once their section is there. */
function paintTops(layer, channel) {
  const box = document.querySelector("#channel .top");
  if (!box || !box.rows.length) return;
  const listed = source.given ? box.rows.filter((row) => rowsHere().has(row)) : box.rows;
  const known = listed.length
    ? facts.get(JSON.stringify(["top", listed]), () => source.facts(listed))
    : null;
  const each = layer.is_ragged || layer.map.height * layer.map.width * listed.length > 4 * SPRITE_PIXELS;
  const groups = !run.values || !listed.length ? [] : each ? listed.map((row) => [row]) : [listed];
  for (const group of groups) {
    const image = sprites.get(JSON.stringify(["top", layer.name, channel, group, look()]), (signal) =>
      source.tiles(layer, group, [channel], look(), signal),
    );
    if (!image || image instanceof Failure) continue;
    group.forEach((row, i) => {
      const map = box.children[box.rows.indexOf(row)].querySelector("canvas"),
        high = image.height / group.length;
      if (map.painted === image) return;
      map.painted = image;
      Object.assign(map, { width: image.width, height: high });
      const fit = fitted({ width: image.width, height: high }, 64);
      Object.assign(map.style, { width: `${fit.width}px`, height: `${fit.height}px` });
      map.getContext("2d").drawImage(image, 0, i * high, image.width, high, 0, 0, image.width, high);
    });
  }
  box.rows.forEach((row, i) => {
    const fact = known instanceof Failure ? null : known?.find((one) => one?.row === row),
      who = box.children[i].querySelector(".who");
    set(who, !listed.includes(row) ? "not in this page" : fact ? (fact.true ?? fact.id ?? "") : "");
    box.children[i].querySelector("canvas").hidden = !listed.includes(row) || !run.values;
  });
}

function histogramNote(about) {
  const zero = about.histogram?.octaves ? about.numbers?.zero : 0;
  return zero
    ? `The area of a bar is its share. ${(100 * zero).toFixed(1)} % are zero, and not drawn.`
    : "";
}

const SVG = "http://www.w3.org/2000/svg";
function drawn(tag, properties, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Bars between true edges, none narrower than can be seen; those of the statistics are eighths of an octave. */
function barsOf({ counts, edges }, { minimum, maximum }) {
  const least = (maximum - minimum || 1) / 64,
    bars = [];
  counts.forEach((n, i) => {
    const low = Math.max(edges[i] ?? minimum, minimum),
      high = Math.min(edges[i + 1] ?? maximum, maximum);
    if ((edges[i] ?? -1) < 0 && (edges[i + 1] ?? 1) > 0 && counts.length > 1 && high - low < least) {
      bars.push(null);
      return;
    }
    const last = bars.at(-1);
    if (last && last.high - last.low < least) {
      last.n += n;
      last.high = high;
    } else bars.push({ n, low, high });
  });
  return bars.filter((bar) => bar?.n && bar.high >= bar.low);
}

function histogramOf(histogram, numbers) {
  const wide = 760,
    high = 150,
    side = 24,
    box = drawn("svg", { class: "histogram", viewBox: `0 0 ${wide} 180`, role: "img" });
  const { minimum, maximum } = numbers,
    span = maximum - minimum || 1,
    bars = barsOf(histogram, numbers);
  const at = (value) => side + ((value - minimum) / span) * (wide - 2 * side);
  const dense = (bar) => bar.n / Math.max(bar.high - bar.low, span / 64),
    most = Math.max(...bars.map(dense), 0);
  for (const bar of bars) {
    const tall = Math.max(1, (dense(bar) / most) * (high - 10)),
      width = Math.max(1, at(bar.high) - at(bar.low) - 0.5);
    const shape = drawn("rect", { x: at(bar.low), y: high - tall, width, height: tall });
    shape.append(
      drawn("title", {}, `${short(bar.low)} to ${short(bar.high)}: ${bar.n.toLocaleString("en")}`),
    );
    box.append(shape);
  }
  box.append(drawn("line", { x1: side, x2: wide - side, y1: high, y2: high }));
  const step =
    [1, 2, 5, 10].map((n) => n * 10 ** Math.floor(Math.log10(span / 5))).find((n) => span / n <= 8) ?? span;
  for (let tick = Math.ceil(minimum / step); tick * step <= maximum + step * 1e-9; tick++) {
    const x = at(tick * step);
    box.append(
      drawn("line", { x1: x, x2: x, y1: high, y2: high + 5 }),
      drawn(
        "text",
        { x, y: high + 18, "text-anchor": "middle" },
        `${Number((tick * step).toPrecision(6))}`,
      ),
    );
  }
  return box;
}

function classesOf(classes, known) {
  const means = classes.map((one) => one.mean ?? 0),
    low = Math.min(0, ...means),
    high = Math.max(0, ...means),
    span = high - low || 1;
  const box = element("div", { className: "classes" }),
    all = classes.flatMap((one) => one.map?.flat() ?? []);
  const [least, most] = range(all),
    scale = all.length
      ? scaleOf({ low: least, high: most, signed: known.signed }, { scope: "layer", colors: state.colors })
      : null;
  const list = (some) => {
    for (const one of some) {
      const map = element("canvas", { hidden: !one.map });
      if (one.map) {
        const image = painted(
          [
            [
              {
                values: one.map.flat().map((v) => v ?? NaN),
                shape: { width: one.map[0].length, height: one.map.length },
                scale,
              },
            ],
          ],
          true,
        );
        Object.assign(map, {
          width: image.width,
          height: image.height,
          title: `${short(scale.low)} to ${short(scale.high)}`,
        });
        map.getContext("2d").putImageData(image, 0, 0);
      }
      const bar = element("i"),
        base = element("u");
      Object.assign(bar.style, {
        left: `${(100 * (Math.min(0, one.mean ?? 0) - low)) / span}%`,
        width: `${(100 * Math.abs(one.mean ?? 0)) / span}%`,
      });
      base.style.left = `${(-100 * low) / span}%`;
      box.append(
        element("a", {
          textContent: one.name,
          title: `${one.name}: ${one.rows} rows`,
          href: address({ view: "rows", label: one.name, row: "", top: "" }),
        }),
        one.map ? map : element("span"),
        element("span", { className: "track" }, bar, base),
        element("span", {
          className: "number",
          textContent: one.mean === null ? "none" : `${Number(one.mean.toPrecision(4))}`,
        }),
      );
    }
  };
  list(classes.slice(0, 200));
  if (classes.length > 200) {
    const more = element("button", {
      type: "button",
      textContent: `show all ${classes.length.toLocaleString("en")} classes`,
    });
    more.onclick = () => {
      more.remove();
      list(classes.slice(200));
    };
    box.append(more);
  }
  return box;
}

// ---- header, footer, dialogs ----

function paintFrame() {
  const layer =
    state.view === "channel"
      ? `${state.layer}, ${layerNamed(state.layer)?.unit ?? "channel"} ${state.channel}`
      : state.view === "row"
        ? `row ${state.row}`
        : state.layers.length === 1
          ? state.layers[0]
          : "";
  const trail = $("trail");
  if (trail.key !== layer) {
    trail.key = layer;
    trail.replaceChildren(...(layer ? [element("span", { textContent: layer, title: layer })] : []));
  }
  document.title = [layer, $("home").textContent, "layertap"].filter(Boolean).join(" · ");
  const at = rowAt.get(Number(state.row));
  const which =
    state.row !== "" && at !== undefined && state.view !== "channel"
      ? `${(at + 1).toLocaleString("en")} of `
      : "";
  const filtered = FILTER.some((name) => state[name] !== "");
  set(
    $("count"),
    `${which}${rows.length.toLocaleString("en")} ${filtered ? `rows that fit, of ${run.captured.toLocaleString("en")}` : "rows"}`,
  );
}

function fill() {
  const form = $("options");
  for (const name of [
    "label",
    "prediction",
    "outcome",
    "text",
    "n",
    "by",
    "scope",
    "low",
    "high",
    "colors",
  ]) {
    const field = form.elements[name];
    if (!field || document.activeElement === field) continue;
    if (
      field.tagName === "SELECT" &&
      ![...field.options].some((one) => one.value === state[name]) &&
      state[name] !== ""
    )
      field.append(new Option(state[name], state[name]));
    field.value = state[name];
  }
  form.elements.size.value = size();
  $("limits").hidden = state.scope !== "given";
  set(
    $("open-layers"),
    state.layers.length
      ? `${shown().length} of ${run.layers.length} layers`
      : `all ${run.layers.length} layers`,
  );
}

function setUp() {
  const form = $("options"),
    classes = run.classes;
  $("home").textContent = run.path.replace(/\/+$/, "").split("/").at(-1) || run.path;
  $("home").title = `${run.path}: all rows (Esc)`;
  const missing =
    run.captured < run.rows || !run.complete
      ? `, ${run.captured.toLocaleString("en")} captured so far`
      : "";
  const right = // of rows that were chosen for a page it would say nothing
    !run.of_rows && run.outcome.right + run.outcome.wrong > 0
      ? ` · ${((100 * run.outcome.right) / (run.outcome.right + run.outcome.wrong)).toFixed(1)} % right`
      : "";
  $("about").textContent = [
    run.model,
    `${run.rows.toLocaleString("en")}${run.of_rows ? ` of ${run.of_rows.toLocaleString("en")}` : ""} rows${missing} × ${run.layers.length} ${plural("layer", run.layers.length)}${right}`,
  ]
    .filter(Boolean)
    .join(" · ");
  $("about").title = $("about").textContent;
  const choose = (name, count) => {
    const some = classes.filter((one) => one[count]);
    form.elements[name].append(
      new Option("any", ""),
      ...some.map((one) => new Option(`${one.name} (${one[count].toLocaleString("en")})`, one.name)),
    );
    $(`of-${name}`).hidden = !some.length;
  };
  choose("label", "labelled");
  choose("prediction", "predicted");
  $("of-outcome").hidden = run.outcome.right === undefined;
  $("of-text").hidden = !run.columns.includes("id");
  form.elements.colors.append(
    new Option("by sign", "auto"),
    ...Object.keys(run.palettes).map((name) => new Option(name, name)),
  );
  for (const [name, hex] of Object.entries(run.palettes)) {
    palettes[name] = new Uint8ClampedArray(1024).fill(255);
    for (let i = 0; i < 256; i++)
      for (let c = 0; c < 3; c++)
        palettes[name][4 * i + c] = parseInt(hex.slice(6 * i + 2 * c, 6 * i + 2 * c + 2), 16);
  }
  if (!run.values)
    alertOf("This store holds statistics alone, so there are no maps; channels open by Enter.");
}

function listen() {
  const form = $("options");
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["label", "prediction", "outcome"])
    form.elements[name].onchange = (event) =>
      go({ [name]: event.target.value, top: "", ...(state.view === "channel" ? { view: "rows" } : {}) });
  for (const name of ["n", "by", "colors"])
    form.elements[name].onchange = (event) => go({ [name]: event.target.value });
  let typing = 0;
  form.elements.text.oninput = (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => go({ text: event.target.value, top: "" }, false), 180);
  };
  form.elements.scope.onchange = (event) => {
    const given = event.target.value === "given" && state.low === "";
    go({ scope: event.target.value, ...(given ? { low: "0", high: "1" } : {}) });
  };
  for (const name of ["low", "high"])
    form.elements[name].onchange = () => {
      const [low, high] = ["low", "high"].map((one) => form.elements[one].value.trim());
      if (low !== "" && high !== "" && Number(low) < Number(high)) go({ low, high });
      else alertOf(`limits are two numbers, the low one below the high one; not ${low} and ${high}`);
    };
  form.elements.size.oninput = (event) => go({ size: event.target.value }, false);
  form.elements.go.onkeydown = (event) => {
    if (event.key !== "Enter") return;
    const row = Number(event.target.value);
    if (event.target.value.trim() !== "" && rowAt.has(row)) {
      event.target.value = "";
      event.target.blur();
      if (state.view === "row") openRow(row);
      else {
        if (state.view !== "rows") state.view = "rows";
        step({ row: `${row}` });
      }
    } else
      alertOf(
        `row ${event.target.value} is not ${FILTER.some((name) => state[name] !== "") ? "among those that fit" : "there"}`,
      );
  };
  $("open-options").onclick = () =>
    $("open-options").setAttribute("aria-expanded", `${form.classList.toggle("open")}`);
  $("open-help").onclick = help;
  $("open-layers").onclick = chooseLayers;
  $("home").onclick = (event) => {
    event.preventDefault();
    go({ view: "rows", layers: [], n: "", top: "", x: "" });
  };
  $("alert").querySelector("button").onclick = () => {
    $("alert").hidden = true;
    loaders.forEach((loader) => loader.retry());
    filterKey = null;
    channelKey = "";
    changed();
  };
  board.addEventListener("scroll", () => {
    if (layout) scrolled();
    if (Math.abs(offset.bar - (offset.told ?? 0)) > 1 || offset.x !== offset.toldX) {
      offset.told = offset.bar;
      offset.toldX = offset.x;
      const y = Math.round(offset.y),
        tall = layout?.rowHeight || 1;
      const top =
        state.view === "row" ? `${y}` : `${rows[Math.floor(y / tall)]}${y % tall ? `-${y % tall}` : ""}`;
      state = { ...state, top: y > 0 ? top : "", x: offset.x ? `${Math.round(offset.x)}` : "" };
      followed = JSON.stringify([
        state.view,
        state.row,
        state.layer,
        state.channel,
        rows.length,
        filterKey,
        state.top,
        state.x,
      ]);
      remember();
    }
    invalidate();
  });
  board.addEventListener(
    "wheel",
    (event) => {
      // a pixel of the wheel is one of the view, whatever the bar is scaled by
      const { last, most } = layout ? scrollRange() : {};
      if (!(last > most) || event.ctrlKey || event.shiftKey || !event.deltaY) return;
      event.preventDefault();
      scrollTo(
        offset.x + event.deltaX,
        offset.y +
          event.deltaY * (event.deltaMode === 1 ? 20 : event.deltaMode === 2 ? board.clientHeight : 1),
      );
      invalidate();
    },
    { passive: false },
  );
  hover(canvas);
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(),
      tile = tileUnder(event.clientX - box.left, event.clientY - box.top);
    if (tile && event.clientY - box.top > layout.top) openChannel(tile.layer.name, tile.channel, tile.row);
  });
  addEventListener("hashchange", read);
  addEventListener("popstate", read);
  addEventListener("resize", invalidate);
  new ResizeObserver(invalidate).observe(board);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    colours = {};
    invalidate();
  });
  addEventListener("keydown", press);
}

function read() {
  const found = fromAddress();
  if (JSON.stringify(found) === JSON.stringify(state)) return;
  state = found;
  followed = "";
  changed();
}

function press(event) {
  const choosing = event.target.tagName === "SELECT" && event.key !== "/" && event.key !== "?"; // letters choose there
  const typing =
      choosing || (event.target.tagName === "INPUT" && !["range", "checkbox"].includes(event.target.type)),
    open = document.querySelector("dialog[open]");
  if (event.key === "Escape" && typing) {
    event.target.blur();
    board.focus();
    return;
  }
  if (typing || open || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key,
    view = state.view,
    button = /^(BUTTON|A)$/.test(event.target.tagName);
  const page = Math.max(1, Math.floor((board.clientHeight - 64) / (layout?.rowHeight || 64)) - 1);
  const shared = {
    Escape: close,
    "?": help,
    "/": () => focusField("text"),
    g: () => focusField("go"),
    l: chooseLayers,
    "+": () => resize(16),
    "=": () => resize(16),
    "-": () => resize(-16),
    s: () => cycle("scope"),
    m: () => cycle("colors"),
    o: () => cycle("by"),
  };
  const moves = {
    rows: {
      ArrowDown: () => stepRow(1),
      j: () => stepRow(1),
      ArrowUp: () => stepRow(-1),
      k: () => stepRow(-1),
      PageDown: () => stepRow(page),
      PageUp: () => stepRow(-page),
      Home: () => stepRow(-rows.length),
      End: () => stepRow(rows.length),
      ArrowRight: () => stepChannel(1),
      ArrowLeft: () => stepChannel(-1),
      "]": () => stepLayer(1),
      "[": () => stepLayer(-1),
      Enter: () =>
        state.channel === "" || !state.layer ? openRow(state.row) : openChannel(state.layer, state.channel),
      r: () => openRow(state.row === "" ? rows[0] : state.row),
    },
    row: {
      ArrowRight: () => stepRow(1),
      ArrowLeft: () => stepRow(-1),
      n: () => stepRow(1),
      p: () => stepRow(-1),
      j: () => stepRow(1),
      k: () => stepRow(-1),
      Home: () => stepRow(-rows.length),
      End: () => stepRow(rows.length),
      "]": () => stepLayer(1),
      "[": () => stepLayer(-1),
      ".": () => stepChannel(1),
      ",": () => stepChannel(-1),
      Enter: () => {
        if (state.layer && state.channel !== "") openChannel(state.layer, state.channel);
      },
      ArrowDown: () => {
        scrollTo(0, offset.y + 60);
        invalidate();
      },
      ArrowUp: () => {
        scrollTo(0, offset.y - 60);
        invalidate();
      },
      PageDown: () => {
        scrollTo(0, offset.y + board.clientHeight * 0.9);
        invalidate();
      },
      PageUp: () => {
        scrollTo(0, offset.y - board.clientHeight * 0.9);
        invalidate();
      },
    },
    channel: {
      ArrowRight: () => turnChannel(1),
      ArrowLeft: () => turnChannel(-1),
      n: () => turnChannel(1),
      p: () => turnChannel(-1),
      j: () => turnChannel(1),
      k: () => turnChannel(-1),
      "]": () => stepLayer(1),
      "[": () => stepLayer(-1),
      r: () => openRow(state.row),
    },
  };
  const act = moves[view][key] ?? shared[key];
  if (!act || (button && (key === "Enter" || key === " "))) return;
  event.preventDefault();
  act();
}

function focusField(name) {
  $("options").classList.add("open");
  const field = $("options").elements[name];
  if (!field.parentElement.hidden) {
    field.focus();
    field.select();
  }
}
function resize(by) {
  go({ size: `${Math.min(256, Math.max(16, size() + by))}` }, false);
}
function cycle(name) {
  const all = [...$("options").elements[name].options]
    .map((one) => one.value)
    .filter((one) => one !== "given");
  go({ [name]: all[(all.indexOf(state[name]) + 1) % all.length] }, false);
}

function help() {
  const keys = {
    "↓ ↑ or j k": "next and previous row (when a row or channel is open: → ← too)",
    "→ ←": "next and previous channel",
    "] [": "next and previous layer",
    Enter: "open the channel under the cursor",
    r: "open the row",
    Esc: "back to all rows",
    "/": "search the ids",
    g: "go to a row",
    l: "choose layers",
    "+ −": "larger and smaller maps",
    "s m o": "next scale, colour map, order",
    "Page Home End": "by pages, to the first and last row",
  };
  const list = element("dl");
  for (const [key, words] of Object.entries(keys))
    list.append(
      element(
        "dt",
        {},
        ...key.split(" ").map((one) => (one === "or" ? " or " : element("kbd", { textContent: one }))),
      ),
      element("dd", { textContent: words }),
    );
  const names = {
    ZERO: "zero everywhere",
    CONSTANT: "one value everywhere",
    NAN: "NaN",
    POSITIVE_INFINITY: "+∞",
    NEGATIVE_INFINITY: "−∞",
    OVER: "above the limits",
    UNDER: "below the limits",
  };
  const marks = Object.keys(run.palettes).map((colors) => {
    const line = element("p", { className: "swatches" }, element("b", { textContent: colors }));
    for (const [mark, words] of Object.entries(names)) {
      const swatch = element("i"),
        at = 4 * run.marks[mark];
      swatch.style.background = `rgb(${palettes[colors].subarray(at, at + 3).join(" ")})`;
      line.append(element("span", {}, swatch, words));
    }
    return line;
  });
  const shut = element("button", {
    type: "button",
    textContent: "close",
    onclick: () => $("help").close(),
  });
  $("help").replaceChildren(
    element("div", { className: "turn" }, element("b", { textContent: "Keys" }), shut),
    list,
    element(
      "section",
      {},
      element("h2", { textContent: "Marks" }),
      element("p", { textContent: "What a colour map must not show as if it were an ordinary value:" }),
      ...marks,
    ),
    element(
      "section",
      {},
      element("p", { textContent: `${run.path}. The address of this page is a link to what it shows.` }),
    ),
  );
  $("help").showModal();
}

function chooseLayers() {
  const dialog = $("layers"),
    chosen = new Set(state.layers.length ? state.layers : drawable().map((layer) => layer.name));
  const boxes = run.layers.map((layer) => {
    const box = element("input", {
      type: "checkbox",
      checked: chosen.has(layer.name) && !layer.refusal,
      disabled: Boolean(layer.refusal),
      value: layer.name,
    });
    return element(
      "label",
      {},
      box,
      element(
        "span",
        {},
        layer.name,
        " ",
        element("small", {
          textContent: layer.refusal || `${layer.type} · ${layer.shape.join(" × ") || "1"} ${layer.dtype}`,
        }),
      ),
    );
  });
  const search = element("input", { type: "search", placeholder: "name contains …" });
  search.oninput = () =>
    boxes.forEach((one) => {
      one.hidden = !one.textContent.toLowerCase().includes(search.value.toLowerCase());
    });
  const all = (on) =>
    boxes.forEach((one) => {
      const box = one.querySelector("input");
      if (!one.hidden && !box.disabled) box.checked = on;
    });
  const take = () => {
    const named = boxes
      .map((one) => one.querySelector("input"))
      .filter((box) => box.checked)
      .map((box) => box.value);
    dialog.close();
    go({ layers: named.length === drawable().length ? [] : named, x: "" });
  };
  const button = (textContent, onclick) => element("button", { type: "button", textContent, onclick });
  dialog.replaceChildren(
    element("h2", { textContent: "Layers" }),
    search,
    element("div", { className: "list" }, ...boxes),
    element(
      "menu",
      {},
      button("show these", take),
      button("tick all", () => all(true)),
      button("tick none", () => all(false)),
      button("cancel", () => dialog.close()),
    ),
  );
  dialog.showModal();
}

function alertOf(words) {
  $("alert").firstElementChild.textContent = words;
  $("alert").hidden = false;
}

// ---- frames ----

function invalidate() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    paint();
  });
}

function paint() {
  if (!run) return;
  frame++;
  if (!colours.line) {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["text", "grey", "line", "empty", "accent", "wrong"])
      colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
  board.hidden = state.view === "channel";
  paintSide();
  paintChannel();
  if (!board.hidden) paintBoard();
  else canvas.tiles = painting = [];
  readPointer();
  paintFrame();
  loaders.forEach((loader) => loader.pump());
}

async function begin() {
  const own = $("layertap-run");
  source = own ? new FromFile(JSON.parse(own.textContent)) : new FromServer();
  try {
    run = await source.run();
  } catch (error) {
    alertOf(error.message);
    $("alert").querySelector("button").onclick = () => location.reload();
    return;
  }
  state = fromAddress();
  setUp();
  listen();
  changed();
  board.focus({ preventScroll: true });
}

begin();
