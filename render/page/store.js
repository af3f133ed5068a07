"use strict";

// The store that a page shows: from a server (`layertap view`), or from the page itself (`layertap export
// html`). Two classes with the same methods hide which. Colours are made here where there is no server to
// make them, by the arithmetic of render/scale.py, held to it by a test.

// ---- from a server ----

class FromServer {
  async run() {
    const run = await this.json("api/run");
    this.version = run.version;
    this.colours = new Colours(run);
    return run;
  }

  async ask(path, query = {}, signal = undefined) {
    const given = Object.entries(query).filter(([, value]) => value !== "" && value != null);
    if (this.version) given.push(["v", this.version]);
    const answer = await fetch(`${path}?${new URLSearchParams(given)}`, { signal }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("layertap view does not answer; is it still running?");
    });
    if (answer.status === 200) return answer;
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error ?? `the server answered with status ${answer.status}`);
  }

  async json(path, query) {
    return (await this.ask(path, query)).json();
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

  cuts(layer, look) {
    return this.json("api/cuts", { layer: layer.name, ...lookQuery(look) });
  }

  limits() {
    return this.json("api/limits");
  }

  channel(layer, channel) {
    return this.json("api/channel", { layer: layer.name, channel });
  }

  async tiles(layer, rows, channels, look, signal) {
    const query = { layer: layer.name, rows: rows.join(","), channels: spans(channels), ...lookQuery(look) };
    const answer = await this.ask("tiles", query, signal);
    const limits = JSON.parse(answer.headers.get("X-Limits") ?? "null");
    return Object.assign(await createImageBitmap(await answer.blob()), { limits });
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

function lookQuery({ scope, low, high, colors, clip }) {
  return { scope: scope === "given" ? `${low}:${high}` : scope, colormap: colors, clip };
}

/** 3,4,5,9 as 3-5,9. */
function spans(numbers) {
  const found = [];
  for (const n of numbers) {
    const last = found.at(-1);
    if (last && last[1] === n - 1) last[1] = n;
    else found.push([n, n]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
}

// ---- from this file, or a folder beside it ----

class FromFile {
  constructor(run) {
    this.given = run;
    this.colours = new Colours(run);
    this.rowsHere = new Set(run.facts.map((one) => one.row));
    this.scripts = new Map();
    this.layers = new Map();
    this.pictures = new Map();
    globalThis.layertapPiece = (n, text) => this.scripts.get(n)?.resolve(text);
  }

  async run() {
    return this.given;
  }

  async piece(key) {
    const n = this.given.pieces[key];
    if (n === undefined) throw new Error(`this page was made without ${key}`);
    const text = document.getElementById(`piece-${n}`)?.textContent ?? (await this.script(n));
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const open = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(open).arrayBuffer();
  }

  /** A page from a disk may not fetch its neighbours, but it may load them as scripts. */
  script(n) {
    if (!this.scripts.has(n)) {
      const piece = {};
      piece.promise = new Promise((resolve, reject) => Object.assign(piece, { resolve, reject }));
      this.scripts.set(n, piece);
      const script = document.createElement("script");
      script.src = `pieces/${n}.js`;
      script.onerror = () => piece.reject(new Error(`pieces/${n}.js is not beside this page`));
      document.head.append(script);
    }
    return this.scripts.get(n).promise;
  }

  async json(key) {
    return JSON.parse(new TextDecoder().decode(await this.piece(key)));
  }

  number(layer) {
    return this.given.layers.indexOf(layer);
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
    if (!this.layers.has(layer)) this.layers.set(layer, this.json(`layer:${this.number(layer)}`));
    return this.layers.get(layer);
  }

  async cuts(layer, look) {
    const known = await this.layer(layer);
    const sort = this.colours.diverges(this.colours.of(look, known.signed)) ? "symmetric" : "plain";
    return known.cuts[`${look.clip} ${look.scope} ${sort}`];
  }

  async limits() {
    return this.given.limits;
  }

  async channel(layer, channel) {
    const facts = (await this.json(`channels:${this.number(layer)}`))[available(layer).indexOf(channel)];
    if (!facts) throw new Error(`this page was made without ${layer.unit} ${channel} of ${layer.name}`);
    return facts;
  }

  /** The values of a row, channel by channel. */
  async maps(layer, row) {
    const data = typed(await this.piece(`maps:${this.number(layer)}:${row}`), layer.wire);
    const shape = (await this.layer(layer)).shapes?.[row] ?? layer.map;
    const n = data.length / available(layer).length;
    const at = (channel) => available(layer).indexOf(channel) * n;
    return { shape, of: (channel) => data.subarray(at(channel), at(channel) + n) };
  }

  async values(layer, row, channel) {
    const { shape, of } = await this.maps(layer, row);
    return { data: of(channel), shape };
  }

  async tiles(layer, rows, channels, look) {
    const known = await this.layer(layer);
    const cuts = look.clip && look.scope !== "map" ? await this.cuts(layer, look) : null;
    const limits = this.given.limits;
    const lines = [];
    for (const row of rows) {
      const { shape, of } = await this.maps(layer, row);
      const tile = (channel) => {
        const values = of(channel).subarray(shape.offset, shape.offset + shape.n_cells);
        const scale = this.colours.scaleOf(known, look, { channel, row, values, limits, cuts });
        return { values, shape, scale };
      };
      lines.push(channels.map(tile));
    }
    const image = await createImageBitmap(this.colours.painted(lines, WIDE.includes(layer.wire)));
    const ofRows = look.scope === "row" ? lines.map(([{ scale }]) => [scale.low, scale.high]) : null;
    return Object.assign(image, { limits: ofRows });
  }

  async picture(row) {
    if (!this.pictures.has(row)) {
      const data = await this.piece(`picture:${row}`);
      this.pictures.set(row, URL.createObjectURL(new Blob([data], { type: "image/png" })));
    }
    return this.pictures.get(row);
  }
}

/** Channels that the page has: all of them, or those that it was made with. */
function available(layer) {
  return (layer.channels ??= layer.only ?? Array.from({ length: layer.n_channels }, (_, i) => i));
}

const WIDE = ["float64", "int32", "uint32", "int64", "uint64"]; // what float32 does not hold

function typed(buffer, type) {
  const arrays = {
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
  return new arrays[type](buffer);
}

// ---- colours ----

class Colours {
  constructor(run) {
    const { marks, diverging, by_sign } = run;
    Object.assign(this, { marks, diverging, by_sign });
    this.last = marks.ZERO - 17; // in a palette the colours come first, then 16 greys, then the marks
    this.palettes = {};
    for (const [name, hex] of Object.entries(run.palettes)) {
      const palette = (this.palettes[name] = new Uint8ClampedArray(1024).fill(255)); // RGBA
      for (let i = 0; i < 768; i++)
        palette[i + Math.floor(i / 3)] = parseInt(hex.slice(2 * i, 2 * i + 2), 16);
    }
  }

  diverges(colors) {
    return this.diverging.includes(colors);
  }

  /** The colour map that is asked for, or what suits the sign. */
  of(look, signed) {
    return look.colors === "auto" ? this.by_sign[signed ? 1 : 0] : look.colors;
  }

  /**
   * The scale of a map, from what is known of its layer; `at` says which map it is, and has what is not known
   * by layer: its values, the limits of the store, and where a percentile cuts.
   */
  scaleOf(known, look, at = {}) {
    const { channel, row, values, limits, cuts } = at;
    const { scope, clip } = look;
    if (scope === "given") {
      const [low, high] = [Number(look.low), Number(look.high)];
      return { colors: this.of(look, low < 0), low, high };
    }
    const signed = scope === "store" ? limits?.low < 0 : known.signed;
    const colors = this.of(look, signed);
    let range = [known.low, known.high];
    let cut = cuts?.limits;
    if (scope === "store") range = [limits?.low, limits?.high];
    if (scope === "channel") range = [known.channel_low[channel], known.channel_high[channel]];
    if (scope === "channel") cut = cut?.[channel];
    if (scope === "row") [range, cut] = [known.row_range[row], cut?.[row]];
    if (scope === "map") range = rangeOf(values);
    if (scope === "map" && clip) cut = percentile(values, Number(clip), this.diverges(colors));
    return { colors, ...this.fit(range, signed, colors, cut) };
  }

  fit(range, signed, colors, cut) {
    let [low, high] = range.map((limit) => limit ?? NaN);
    if (this.diverges(colors)) {
      high = Math.max(Math.abs(low), Math.abs(high));
      low = -high;
    } else if (!signed) low *= 0;
    const [least, most] = [cut?.[0] ?? low, cut?.[1] ?? high];
    return least < most ? { low: least, high: most } : { low, high };
  }

  entries(values, scale, wide) {
    const { marks, last } = this;
    const out = new Uint8Array(values.length);
    const [least, most] = rangeOf(values);
    const finite = values.length > 0 && values.every((value) => Number.isFinite(Number(value)));
    const isFlat = finite && values.length > 1 && least === most;
    if (isFlat) return out.fill(least === 0 ? marks.ZERO : marks.CONSTANT);
    let [low, high] = [scale.low || 0, scale.high || 0];
    if (this.diverges(scale.colors)) {
      high = Math.max(Math.abs(low), Math.abs(high));
      low = -high;
    }
    let size = Math.max(Math.abs(low), Math.abs(high));
    const far = wide || !(size > 1e-30 && size < 1e30);
    if (!far || size === 0) size = 1;
    const [round, roundLimit] = [far, wide].map((exact) => (exact ? (x) => x : Math.fround));
    low /= size;
    high /= size;
    const slope = high > low ? round(last / (high - low)) : 0;
    const middle = this.diverges(scale.colors) && !(high > low) ? last / 2 : 0;
    const [under, over] = [roundLimit(scale.low), roundLimit(scale.high)];
    for (let i = 0; i < values.length; i++) {
      const value = Number(values[i]);
      if (Number.isNaN(value)) out[i] = marks.NAN;
      else if (value === Infinity) out[i] = marks.POSITIVE_INFINITY;
      else if (value === -Infinity) out[i] = marks.NEGATIVE_INFINITY;
      else if (value > over) out[i] = marks.OVER;
      else if (value < under) out[i] = marks.UNDER;
      else {
        const position = round(round(value / size - round(low)) * slope) + middle;
        out[i] = Math.min(last, Math.max(0, toEven(position)));
      }
    }
    return out;
  }

  /** Lines of tiles of one size, a pixel for each value. */
  painted(lines, wide) {
    const side = (name) => Math.max(1, lines[0][0].shape[name]); // a row may have no values
    const [width, height] = [side("width"), side("height")];
    const image = new ImageData(width * lines[0].length, height * lines.length);
    const pixels = new Uint32Array(image.data.buffer);
    const paintTile = ({ values, shape, scale }, left, top) => {
      const palette = new Uint32Array(this.palettes[scale.colors].buffer);
      const entries = this.entries(values, scale, wide);
      for (let i = 0; i < entries.length; i++) {
        const x = left + (i % shape.width);
        const y = top + Math.floor(i / shape.width);
        pixels[y * image.width + x] = palette[entries[i]];
      }
    };
    lines.forEach((line, row) => {
      line.forEach((tile, column) => paintTile(tile, column * width, row * height));
    });
    return image;
  }

  /** A bar of so many pixels from a scale's low end to its high one. */
  bar({ colors, low, high }, width) {
    const image = new ImageData(width, 1);
    const most = Math.max(Math.abs(low), Math.abs(high));
    const inside = (limit) => (most ? (limit / most + 1) / 2 : 0);
    const [from, to] = this.diverges(colors) && most ? [inside(low), inside(high)] : [0, 1];
    for (let i = 0; i < width; i++) {
      const entry = toEven((from + ((to - from) * i) / (width - 1)) * this.last);
      image.data.set(this.palettes[colors].subarray(4 * entry, 4 * entry + 4), 4 * i);
    }
    return image;
  }
}

/** Round, halves to even. */
function toEven(x) {
  return Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** The least and greatest finite value; null where there is none. */
function rangeOf(values) {
  let [low, high] = [null, null];
  for (const given of values) {
    const value = Number(given);
    if (!Number.isFinite(value)) continue;
    if (low === null || value < low) low = value;
    if (high === null || value > high) high = value;
  }
  return [low, high];
}

/** Where a percentile of values, or of their sizes on a symmetric scale, cuts a scale. */
function percentile(values, clip, symmetric) {
  const finite = Float64Array.from(values, Number).filter(Number.isFinite);
  const sorted = (symmetric ? finite.map(Math.abs) : finite).sort();
  if (!sorted.length) return null;
  const place = Math.max(0, Math.ceil(Number(((clip * sorted.length) / 100).toFixed(6))) - 1);
  return [symmetric ? -sorted[place] : null, sorted[place]];
}

// ---- what is loaded: few requests at once, those for what is on the screen, in bounded memory ----

class Failure {
  constructor(error) {
    this.message = String(error?.message ?? error);
  }
}

/**
 * Loads what frames ask for. What the last frame did not ask for is not loaded any more, and makes room
 * first. `free` lets go of a value; `Loader.changed` is called when something came, and `Loader.failed` with
 * what went wrong.
 */
class Loader {
  static frame = 0;
  static changed = () => {};
  static failed = () => {};

  constructor(atOnce, most, size, free = () => {}) {
    Object.assign(this, { atOnce, most, size, free, items: new Map(), running: 0, held: 0 });
  }

  /** What is there under a key, a Failure, or undefined until it is loaded. */
  get(key, load) {
    let item = this.items.get(key);
    if (item) this.items.delete(key);
    else item = { load, state: "waiting", stop: new AbortController() };
    this.items.set(key, item); // the last is the one that was wanted last
    item.frame = Loader.frame;
    return item.value;
  }

  /** Start what the frame asked for, and stop or forget what it did not. */
  pump() {
    for (const [key, item] of this.items) {
      if (item.frame === Loader.frame || item.state === "there" || item.state === "failed") continue;
      item.stop.abort();
      this.items.delete(key);
    }
    for (const [key, item] of this.items) {
      if (this.running >= this.atOnce) break;
      if (item.state === "waiting") this.start(key, item);
    }
    for (const [key, item] of this.items) {
      if (this.held <= this.most) break;
      if (item.state !== "there" || item.frame === Loader.frame) continue;
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
      Loader.failed(error.message);
    } finally {
      this.running--;
      Loader.changed();
    }
  }

  get isBusy() {
    return [...this.items.values()].some((item) => item.state === "waiting" || item.state === "running");
  }

  retry() {
    for (const [key, item] of this.items) if (item.state === "failed") this.items.delete(key);
  }
}
