"use strict";

// What stands around the board: a row, a channel, the header, keys and dialogs; and when a frame is painted.

// ---- one row, beside its maps ----

function paintSide() {
  const side = $("side");
  const isOpen = state.view === "row";
  side.hidden = !isOpen;
  document.querySelector("main").classList.toggle("split", isOpen);
  if (!isOpen) return;
  const row = Number(state.row);
  const fact = ready(facts.get(`row ${row}`, () => source.facts([row])))?.[0];
  const key = JSON.stringify([row, Boolean(fact), rowAt.get(row), rows.length]);
  if (side.key === key) return;
  side.key = key;
  const title = turn(`Row ${row}`, "row", stepRow);
  const picture = showPicture(element("img", { alt: "The row's picture" }), row);
  side.replaceChildren(title, picture, factList(fact, rowAt.has(row)));
}

function factList(fact, fits) {
  const list = element("dl");
  const say = (name, value, className = "") => {
    if (value == null || value === "") return;
    list.append(element("dt", { textContent: name }), element("dd", { textContent: value, className }));
  };
  const sign = { right: " ✓", wrong: " ✗" }[outcomeOf(fact)] ?? "";
  say("id", fact?.id);
  say("class", fact?.true);
  say("predicted", fact?.predicted == null ? null : fact.predicted + sign, outcomeOf(fact));
  for (const [name, value] of Object.entries(fact?.columns ?? {})) say(name, value);
  if (!fits) say("filter", "this row does not fit it");
  return list;
}

/** A title with buttons to turn to the previous and the next. */
function turn(words, what, by) {
  const arrow = (textContent, ariaLabel, key, n) =>
    button(textContent, () => by(n), { title: `${ariaLabel} (${key})`, ariaLabel });
  return element(
    "div",
    { className: "turn" },
    arrow("‹", `Previous ${what}`, "←", -1),
    arrow("›", `Next ${what}`, "→", 1),
    element("b", { textContent: words, title: words }),
    button("close", close, { title: "All rows (Esc)" }),
  );
}

// ---- one channel ----

function paintChannel() {
  const article = $("channel");
  article.hidden = state.view !== "channel";
  if (article.hidden) return;
  const layer = layerNamed(state.layer);
  const channel = Number(state.channel);
  const wrong = channelRefusal(layer, channel);
  const known = wrong ? undefined : knownOf(layer);
  const about = wrong ? undefined : channelFacts(layer, channel);
  const isReady = Boolean(known && about);
  const key = JSON.stringify([state.layer, state.channel, isReady, look(), wrong]);
  if (article.key !== key) {
    const place = JSON.stringify([state.layer, state.channel]);
    if (article.place !== place) article.scrollTop = 0;
    Object.assign(article, { key, place });
    const title = wrong ? button("close", close) : turn(whereWords(), layer.unit, turnChannel);
    const failure = [known, about].find((one) => one instanceof Failure);
    const words = wrong ?? failure?.message ?? (isReady ? "" : "Reading …");
    article.replaceChildren(title, ...(words ? [paragraph(words)] : sections(layer, channel, about, known)));
  }
  if (!wrong) paintTops(layer, channel);
}

function channelFacts(layer, channel) {
  return facts.get(JSON.stringify([layer.name, channel]), () => source.channel(layer, channel));
}

function channelRefusal(layer, channel) {
  if (!layer) return `There is no layer ${state.layer} here.`;
  if (layer.refusal) return `${layer.name} cannot be drawn: ${layer.refusal}.`;
  if (state.channel !== "" && available(layer).includes(channel)) return undefined;
  return `There is no ${layer.unit} ${state.channel} of ${layer.name} here.`;
}

function turnChannel(by) {
  const all = available(layerNamed(state.layer));
  const next = all.indexOf(Number(state.channel)) + by;
  if (next >= 0 && next < all.length) go({ channel: `${all[next]}` }, false);
}

const paragraph = (textContent) => element("p", { textContent });
const rounded = (value, digits) => (value === null ? "none" : `${Number(value.toPrecision(digits))}`);

function sections(layer, channel, about, known) {
  const { numbers, histogram, top, classes } = about;
  const isWhole = about.whole && !about.sampled.includes("numbers");
  const title = isWhole ? `Over all ${counted(about.rows)} captured rows` : "Over rows";
  const hasMaps = classes?.some((one) => one.map);
  const perClass = hasMaps ? "Each map is the mean over the class, all of them on one scale." : "";
  return [
    ...section(title, about, "numbers", numbers && numbersOf(numbers)),
    ...section("Rows that excite it most", about, "top", top && topOf(layer, channel, top)),
    ...section("Histogram", about, "histogram", histogramOf(histogram, numbers), zeroNote(about)),
    ...(classes || run.classes.length
      ? section("Mean for each class", about, "classes", classes && classesOf(classes, known), perClass)
      : []),
  ];
}

/** A part with what is to be known of it: of which rows it is, and how a capture keeps it. */
function section(title, about, name, body, more = "") {
  const lack = about.lacking.find((one) => one.what === name);
  const all = counted(run.of_rows ?? run.captured);
  const rows = about.sampled.includes(name) ? `Of ${about.sample_rows} of ${all} rows, spread evenly.` : "";
  const none = lack && !rows ? "Not known here." : "";
  const how = lack && `The store does not keep this of every row; a capture with --stats ${lack.stats} does.`;
  const words = joined(" ", rows || none, more, how);
  return [element("h2", { textContent: title }), words && paragraph(words), body].filter(Boolean);
}

function numbersOf(numbers) {
  const parts = [
    ["minimum", rounded(numbers.minimum, 5)],
    ["maximum", rounded(numbers.maximum, 5)],
    ["mean", rounded(numbers.mean, 5)],
    ["standard deviation", rounded(numbers.deviation, 5)],
    ["zeros", numbers.zero === null ? "none" : `${(100 * numbers.zero).toFixed(1)} %`],
    ["finite values", counted(numbers.count)],
    ["NaN", numbers.nan && counted(numbers.nan)],
    ["infinite", numbers.inf && counted(numbers.inf)],
    ["this channel", numbers.zero === 1 && !numbers.nan && !numbers.inf && "is dead"],
  ];
  const part = ([name, textContent]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent }));
  return element("dl", {}, ...parts.filter(([, text]) => text).map(part));
}

function topOf(layer, channel, top) {
  const box = element("div", { className: "top" });
  for (const { row, value, at } of top) {
    const here = source.rowsHere?.has(row) ?? true; // in a page from a file
    const map = element("canvas", { width: 1, height: 1, hidden: !here || !run.values });
    map.tile = { layer, channel, row };
    hover(map);
    const pictures = element("div", {}, showPicture(element("img", { alt: "" }), row), map);
    const link = element("a", { href: here ? address({ view: "row", row, top: "", x: "" }) : "#" }, pictures);
    const where = at?.length ? ` at ${at.join(", ")}` : "";
    const words = element(
      "figcaption",
      {},
      element("b", { textContent: rounded(value, 5) }),
      element("small", { textContent: `row ${row}${where}` }),
      element("small", { className: "who", textContent: here ? "" : "not in this page" }),
    );
    box.append(Object.assign(element("figure", {}, link, words), { row, here }));
  }
  return box;
}

/** Paint the maps of a channel's top rows, in one request, once their section is there. */
function paintTops(layer, channel) {
  const figures = [...document.querySelectorAll("#channel .top figure")].filter((one) => one.here);
  const listed = figures.map((one) => one.row);
  if (!listed.length) return;
  const known = ready(facts.get(JSON.stringify(["top", listed]), () => source.facts(listed)));
  const who = (fact) => fact?.true ?? fact?.id ?? "";
  figures.forEach((figure, i) => setText(figure.querySelector(".who"), who(known?.[i])));
  if (!run.values) return;
  const each = layer.is_ragged || layer.map.height * layer.map.width * listed.length > 4 * SPRITE_PIXELS;
  for (const group of each ? figures.map((one) => [one]) : [figures]) {
    const some = group.map((one) => one.row);
    const load = (signal) => source.tiles(layer, some, [channel], look(), signal);
    const image = ready(sprites.get(JSON.stringify(["top", layer.name, channel, some, look()]), load));
    if (image) group.forEach((figure, i) => paintMap(figure.querySelector("canvas"), image, i, group.length));
  }
}

/** Paint the i-th of n maps that are below each other in an image. */
function paintMap(map, image, i, n) {
  if (map.painted === image) return;
  map.painted = image;
  const [width, height] = [image.width, image.height / n];
  Object.assign(map, { width, height });
  const fit = fitted({ width, height }, 64);
  setSize(map, fit.width, fit.height);
  map.getContext("2d").drawImage(image, 0, i * height, width, height, 0, 0, width, height);
}

function zeroNote({ histogram, numbers }) {
  const zero = histogram && numbers?.zero;
  return zero ? `The area of a bar is its share. ${(100 * zero).toFixed(1)} % are zero, and not drawn.` : "";
}

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, properties, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

/** Bars between the true edges of bins, which are eighths of an octave; none narrower than can be seen. */
function barsOf({ counts, edges }, { minimum, maximum }) {
  const least = (maximum - minimum || 1) / 64;
  const isNarrow = (bar) => bar && bar.high - bar.low < least;
  const sides = [[]]; // below and above the bin of zeros, where that has a place of its own
  counts.forEach((n, i) => {
    const low = Math.max(edges[i] ?? minimum, minimum);
    const high = Math.min(edges[i + 1] ?? maximum, maximum);
    const bars = sides.at(-1);
    const last = bars.at(-1);
    const isZero = (edges[i] ?? -1) < 0 && (edges[i + 1] ?? 1) > 0 && counts.length > 1;
    if (isZero && high - low < least) sides.push([]);
    else if (isNarrow(last)) Object.assign(last, { n: last.n + n, high });
    else bars.push({ n, low, high });
  });
  for (const bars of sides) {
    if (bars.length < 2 || !isNarrow(bars.at(-1))) continue;
    const { n, high } = bars.pop(); // what is left over
    Object.assign(bars.at(-1), { n: bars.at(-1).n + n, high });
  }
  return sides.flat().filter((bar) => bar.n && bar.high >= bar.low);
}

function histogramOf(histogram, numbers) {
  if (!histogram) return null;
  const [wide, high, side] = [760, 150, 24];
  const { minimum, maximum } = numbers;
  const span = maximum - minimum || 1;
  const bars = barsOf(histogram, numbers);
  const at = (value) => side + ((value - minimum) / span) * (wide - 2 * side);
  const density = (bar) => bar.n / Math.max(bar.high - bar.low, span / 64);
  const most = Math.max(...bars.map(density), 0);
  const box = drawn("svg", { class: "histogram", viewBox: `0 0 ${wide} 180`, role: "img" });
  for (const bar of bars) {
    const height = Math.max(1, (density(bar) / most) * (high - 10));
    const width = Math.max(1, at(bar.high) - at(bar.low) - 0.5);
    const shape = drawn("rect", { x: at(bar.low), y: high - height, width, height });
    shape.append(drawn("title", {}, `${rangeWords([bar.low, bar.high])}: ${counted(bar.n)}`));
    box.append(shape);
  }
  box.append(drawn("line", { x1: side, x2: wide - side, y1: high, y2: high }));
  const scale = 10 ** Math.floor(Math.log10(span / 5));
  const unit = [1, 2, 5, 10].map((n) => n * scale).find((n) => span / n <= 8) ?? span;
  for (let tick = Math.ceil(minimum / unit); tick * unit <= maximum + unit * 1e-9; tick++) {
    const x = at(tick * unit);
    const number = `${Number((tick * unit).toPrecision(6))}`;
    box.append(drawn("line", { x1: x, x2: x, y1: high, y2: high + 5 }));
    box.append(drawn("text", { x, y: high + 18, "text-anchor": "middle" }, number));
  }
  return box;
}

const MOST_CLASSES = 200; // before a button shows the rest

function classesOf(classes, known) {
  const box = element("div", { className: "classes" });
  const means = classes.map((one) => one.mean ?? 0);
  const [low, high] = [Math.min(0, ...means), Math.max(0, ...means)];
  const inMaps = classes.flatMap((one) => one.map?.flat() ?? []).filter((value) => value !== null);
  const [least, most] = rangeOf(inMaps);
  const all = { low: least, high: most, signed: known.signed };
  const scale = source.colours.scaleOf(all, { ...look(), scope: "layer" });
  const list = (some) => box.append(...some.flatMap((one) => classLine(one, low, high - low || 1, scale)));
  list(classes.slice(0, MOST_CLASSES));
  if (classes.length > MOST_CLASSES) {
    const more = button(`show all ${counted(classes.length)} classes`, () => {
      more.remove();
      list(classes.slice(MOST_CLASSES));
    });
    box.append(more);
  }
  return box;
}

function classLine({ name, rows, mean, map }, low, span, scale) {
  const percent = (share) => `${100 * share}%`;
  const [bar, base] = [element("i"), element("u")];
  bar.style.left = percent((Math.min(0, mean ?? 0) - low) / span);
  bar.style.width = percent(Math.abs(mean ?? 0) / span);
  base.style.left = percent(-low / span);
  const link = { textContent: name, title: `${name}: ${rows} rows` };
  return [
    element("a", { ...link, href: address({ view: "rows", label: name, row: "", top: "" }) }),
    map ? classMap(map, scale) : element("span"),
    element("span", { className: "track" }, bar, base),
    element("span", { className: "number", textContent: rounded(mean, 4) }),
  ];
}

function classMap(map, scale) {
  const shape = { width: map[0].length, height: map.length };
  const values = map.flat().map((value) => value ?? NaN);
  const image = source.colours.painted([[{ values, shape, scale }]], true);
  const canvas = element("canvas", { ...shape, title: `${short(scale.low)} to ${short(scale.high)}` });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// ---- header and footer ----

function paintFrame() {
  const where = whereWords();
  const trail = $("trail");
  if (trail.key !== where) {
    trail.key = where;
    trail.replaceChildren(...(where ? [element("span", { textContent: where, title: where })] : []));
  }
  document.title = [where, $("home").textContent, "layertap"].filter(Boolean).join(" · ");
  const at = state.row === "" || state.view === "channel" ? undefined : rowAt.get(Number(state.row));
  const which = at === undefined ? "" : `${counted(at + 1)} of `;
  const fit = isFiltered() ? ` that fit, of ${counted(run.captured)}` : "";
  const soFar = run.complete ? "" : ` · not finished, of ${plural("row", run.rows)} (reload for more)`;
  if (!isFiltering) setText($("count"), `${which}${plural("row", rows.length)}${fit}${soFar}`);
}

function whereWords() {
  if (state.view === "row") return `row ${state.row}`;
  const unit = layerNamed(state.layer)?.unit ?? "channel";
  if (state.view === "channel") return `${state.layer}, ${unit} ${state.channel}`;
  return state.layers.length === 1 ? state.layers[0] : "";
}

/** Show the state in the form. */
function fillOptions() {
  const { elements } = $("options");
  for (const name of [...FILTER, "n", "by", "scope", "low", "high", "clip", "colors"]) {
    const field = elements[name];
    if (document.activeElement === field) continue;
    const value = state[name];
    const isKnown = field.tagName !== "SELECT" || [...field.options].some((one) => one.value === value);
    if (!isKnown) field.append(new Option(value, value));
    field.value = value;
  }
  elements.size.value = size();
  $("limits").hidden = state.scope !== "given";
  $("of-clip").hidden = !clips();
  const all = plural("layer", run.layers.length);
  const every = run.layers.length > 1 ? `all ${all}` : all;
  setText($("open-layers"), state.layers.length ? `${shown().length} of ${all}` : every);
}

function setUp() {
  const { elements } = $("options");
  $("home").textContent = run.path.replace(/\/+$/, "").split("/").at(-1) || run.path;
  $("home").title = `${run.path}: all rows (Esc)`;
  $("about").textContent = [run.model, storeWords(), rightWords()].filter(Boolean).join(" · ");
  $("about").title = $("about").textContent;
  for (const [name, count] of Object.entries({ label: "labelled", prediction: "predicted" })) {
    const some = run.classes.filter((one) => one[count]);
    const option = (one) => new Option(`${one.name} (${counted(one[count])})`, one.name);
    elements[name].append(new Option("any", ""), ...some.map(option));
    $(`of-${name}`).hidden = !some.length;
  }
  $("of-outcome").hidden = run.outcome.right === undefined;
  $("of-text").hidden = !run.columns.includes("id");
  elements.clip.append(...run.clips.map((clip) => new Option(`${clip} %`, clip)));
  const names = Object.keys(run.palettes);
  const group = (label, some) => {
    const made = element("optgroup", { label });
    made.append(...some.map((name) => new Option(name, name)));
    return made;
  };
  elements.colors.append(
    new Option("by sign", "auto"),
    group("from 0", names.filter((name) => !run.diverging.includes(name))),
    group("around 0", run.diverging),
  );
  if (!run.values) alertOf("This store holds statistics alone, and no maps; channels open by Enter.");
}

function storeWords() {
  const of = run.of_rows ? `${counted(run.rows)} of ` : "";
  const missing = run.complete ? "" : `, ${counted(run.captured)} captured so far`;
  return `${of}${plural("row", run.of_rows ?? run.rows)}${missing} × ${plural("layer", run.layers.length)}`;
}

/** Of rows that were chosen for a page it would say nothing. */
function rightWords() {
  const { right, wrong } = run.outcome;
  return !run.of_rows && right + wrong > 0 ? `${((100 * right) / (right + wrong)).toFixed(1)} % right` : "";
}

// ---- what people do ----

function listen() {
  listenToOptions($("options"));
  $("open-options").onclick = () => {
    const isOpen = $("options").classList.toggle("open");
    $("open-options").setAttribute("aria-expanded", `${isOpen}`);
  };
  $("open-help").onclick = help;
  $("open-layers").onclick = chooseLayers;
  $("home").onclick = (event) => {
    event.preventDefault();
    go({ view: "rows", layers: [], n: "", top: "", x: "" });
  };
  $("alert").querySelector("button").onclick = tryAgain;
  board.addEventListener("scroll", noteScroll);
  board.addEventListener("wheel", turnWheel, { passive: false });
  hover(canvas);
  canvas.addEventListener("click", (event) => {
    const tile = tileUnder({ surface: canvas, event });
    if (tile) openChannel(tile.layer.name, tile.channel, tile.row);
  });
  addEventListener("hashchange", readAddress);
  addEventListener("popstate", readAddress);
  addEventListener("resize", invalidate);
  new ResizeObserver(invalidate).observe(board);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    delete inks.line;
    invalidate();
  });
  addEventListener("keydown", press);
}

function listenToOptions(form) {
  const { elements } = form;
  form.addEventListener("submit", (event) => event.preventDefault());
  const on = (names, change) => {
    for (const name of names) elements[name].onchange = ({ target }) => change(name, target.value);
  };
  const toRows = () => (state.view === "channel" ? { view: "rows" } : {});
  on(["label", "prediction", "outcome"], (name, value) => go({ [name]: value, top: "", ...toRows() }));
  on(["n", "by", "colors", "clip"], (name, value) => go({ [name]: value }));
  on(["scope"], (name, scope) => {
    const isFirst = scope === "given" && state.low === "";
    go({ scope, ...(isFirst ? { low: "0", high: "1" } : {}) });
  });
  on(["low", "high"], () => {
    const [low, high] = [elements.low.value.trim(), elements.high.value.trim()];
    if (low !== "" && high !== "" && Number(low) < Number(high)) go({ low, high });
    else alertOf(`limits are two numbers, the low one below the high one; not ${low} and ${high}`);
  });
  elements.text.oninput = ({ target }) => {
    clearTimeout(target.waiting);
    target.waiting = setTimeout(() => go({ text: target.value, top: "", ...toRows() }, false), 180);
  };
  elements.size.oninput = ({ target }) => go({ size: target.value }, false);
  elements.go.onkeydown = ({ key, target }) => {
    if (key === "Enter") goToRow(target);
  };
}

function goToRow(field) {
  const row = Number(field.value);
  if (field.value.trim() === "" || !rowAt.has(row)) {
    alertOf(`row ${field.value} is not ${isFiltered() ? "among those that fit" : "there"}`);
    return;
  }
  field.value = "";
  field.blur();
  if (state.view === "row") openRow(row);
  else step({ view: "rows", row: `${row}` });
}

function tryAgain() {
  $("alert").hidden = true;
  loaders.forEach((loader) => loader.retry());
  filterKey = null;
  changed();
}

/** Note in the state where the view is. */
function noteScroll() {
  if (layout) {
    readScroll();
    if (Math.abs(offset.bar - (offset.told ?? 0)) > 1 || offset.x !== offset.toldX) {
      Object.assign(offset, { told: offset.bar, toldX: offset.x });
      const y = Math.round(offset.y);
      const rest = layout.rowHeight && y % layout.rowHeight;
      const top = layout.rowHeight ? `${rows[rowAtTop()]}${rest ? `-${rest}` : ""}` : `${y}`;
      state = { ...state, top: y > 0 ? top : "", x: offset.x ? `${Math.round(offset.x)}` : "" };
      followed = followKey();
      remember();
    }
  }
  invalidate();
}

/** A pixel of the wheel is one of the view, whatever the bar is scaled by. */
function turnWheel(event) {
  const { last, most } = layout ? scrollRange() : {};
  if (!(last > most) || event.ctrlKey || event.shiftKey || !event.deltaY) return;
  event.preventDefault();
  const unit = [1, 20, board.clientHeight][event.deltaMode];
  scrollBy(event.deltaX, event.deltaY * unit);
}

function scrollBy(x, y) {
  scrollTo(offset.x + x, offset.y + y);
  invalidate();
}

function readAddress() {
  const found = fromAddress();
  if (JSON.stringify(found) === JSON.stringify(state)) return;
  state = found;
  followed = "";
  changed();
}

const SHARED = {
  Escape: close,
  "?": help,
  "/": () => focusField("text"),
  g: () => focusField("go"),
  l: chooseLayers,
  "+": () => resize(16),
  "=": () => resize(16),
  "-": () => resize(-16),
  s: () => cycle("scope"),
  c: () => clips() && cycle("clip"),
  m: () => cycle("colors"),
  o: () => cycle("by"),
  "]": () => stepLayer(1),
  "[": () => stepLayer(-1),
  r: () => openRow(state.row === "" ? rows[0] : state.row),
  Enter: () => {
    if (state.layer && state.channel !== "") openChannel(state.layer, state.channel);
    else if (state.view === "rows") openRow(state.row);
  },
};
const ENDS = { Home: () => stepRow(-rows.length), End: () => stepRow(rows.length) };
const both = (keys, step) =>
  Object.fromEntries(keys.flatMap(([back, on]) => [[back, () => step(-1)], [on, () => step(1)]]));
const KEYS = {
  rows: {
    ...both([["ArrowUp", "ArrowDown"], ["k", "j"]], (by) => stepRow(by)),
    ...both([["PageUp", "PageDown"]], (by) => stepRow(by * rowsOfPage())),
    ...both([["ArrowLeft", "ArrowRight"]], (by) => stepChannel(by)),
    ...ENDS,
  },
  row: {
    ...both([["ArrowLeft", "ArrowRight"], ["k", "j"], ["p", "n"]], (by) => stepRow(by)),
    ...both([[",", "."]], (by) => stepChannel(by)),
    ...both([["ArrowUp", "ArrowDown"]], (by) => scrollBy(0, 60 * by)),
    ...both([["PageUp", "PageDown"]], (by) => scrollBy(0, 0.9 * by * board.clientHeight)),
    ...ENDS,
  },
  channel: both([["ArrowLeft", "ArrowRight"], ["k", "j"], ["p", "n"]], (by) => turnChannel(by)),
};

const rowsOfPage = () => Math.max(1, Math.floor((board.clientHeight - 64) / (layout?.rowHeight || 64)) - 1);

function press(event) {
  const { key, target } = event;
  const isList = target.tagName === "SELECT" && key !== "/" && key !== "?"; // letters choose there
  const isText = target.tagName === "INPUT" && !["range", "checkbox"].includes(target.type);
  if (key === "Escape" && (isList || isText)) {
    target.blur();
    board.focus();
    return;
  }
  const isBusy = isList || isText || document.querySelector("dialog[open]");
  if (isBusy || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = KEYS[state.view][key] ?? SHARED[key];
  if (!act || (/^(BUTTON|A)$/.test(target.tagName) && key === "Enter")) return;
  event.preventDefault();
  act();
}

function focusField(name) {
  const field = $("options").elements[name];
  $("options").classList.add("open");
  if (field.parentElement.hidden) return;
  field.focus();
  field.select();
}

function resize(by) {
  go({ size: `${Math.min(256, Math.max(16, size() + by))}` }, false);
}

function cycle(name) {
  const { options } = $("options").elements[name];
  const all = Array.from(options, (one) => one.value).filter((one) => one !== "given");
  go({ [name]: all[(all.indexOf(state[name]) + 1) % all.length] }, false);
}

// ---- dialogs ----

const HELP = {
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
  "s c m o": "next scale, percentile, colour map, order",
  "Page Home End": "by pages, to the first and last row",
};
const MARKS = {
  ZERO: "zero everywhere",
  CONSTANT: "one value everywhere",
  NAN: "NaN",
  POSITIVE_INFINITY: "+∞",
  NEGATIVE_INFINITY: "−∞",
  OVER: "above the limits",
  UNDER: "below the limits",
};

function help() {
  const key = (one) => (one === "or" ? " or " : element("kbd", { textContent: one }));
  const line = ([keys, words]) => [
    element("dt", {}, ...keys.split(" ").map(key)),
    element("dd", { textContent: words }),
  ];
  const marks = [
    element("h2", { textContent: "Marks" }),
    paragraph("What a colour map must not show as if it were an ordinary value:"),
    ...Object.keys(run.palettes).map(marksOf),
  ];
  const shut = button("close", () => $("help").close());
  $("help").replaceChildren(
    element("div", { className: "turn" }, element("b", { textContent: "Keys" }), shut),
    element("dl", {}, ...Object.entries(HELP).flatMap(line)),
    element("section", {}, ...marks),
    element("section", {}, paragraph(`${run.path}. The address of this page is a link to what it shows.`)),
  );
  $("help").showModal();
}

function marksOf(colors) {
  const line = element("p", { className: "swatches" }, element("b", { textContent: colors }));
  for (const [mark, words] of Object.entries(MARKS)) {
    const swatch = element("i");
    const at = 4 * run.marks[mark];
    swatch.style.background = `rgb(${source.colours.palettes[colors].subarray(at, at + 3).join(" ")})`;
    line.append(element("span", {}, swatch, words));
  }
  return line;
}

function chooseLayers() {
  const dialog = $("layers");
  const chosen = new Set(shown());
  const boxes = run.layers.map((layer) => {
    const [checked, disabled] = [chosen.has(layer), Boolean(layer.refusal)];
    const box = element("input", { type: "checkbox", value: layer.name, disabled, checked });
    const shape = `${layer.type} · ${layer.shape.join(" × ") || "1"} ${layer.dtype}`;
    const about = element("small", { textContent: layer.refusal || shape });
    return element("label", {}, box, element("span", {}, layer.name, " ", about));
  });
  const search = element("input", { type: "search", placeholder: "name contains …" });
  search.oninput = () => {
    const wanted = search.value.toLowerCase();
    for (const one of boxes) one.hidden = !one.textContent.toLowerCase().includes(wanted);
  };
  const tick = (on) => {
    for (const one of boxes) if (!one.hidden && !one.firstChild.disabled) one.firstChild.checked = on;
  };
  const take = () => {
    const named = boxes.filter((one) => one.firstChild.checked).map((one) => one.firstChild.value);
    dialog.close();
    go({ layers: named.length === drawable().length ? [] : named, x: "" });
  };
  const buttons = element(
    "menu",
    {},
    button("show these", take),
    button("tick all", () => tick(true)),
    button("tick none", () => tick(false)),
    button("cancel", () => dialog.close()),
  );
  const title = element("h2", { textContent: "Layers" });
  dialog.replaceChildren(title, search, element("div", { className: "list" }, ...boxes), buttons);
  dialog.showModal();
}

function alertOf(words) {
  $("alert").firstElementChild.textContent = words;
  $("alert").hidden = false;
}

// ---- frames ----

function invalidate() {
  if (invalidate.pending) return;
  invalidate.pending = true;
  document.querySelector("main").ariaBusy = "true";
  requestAnimationFrame(() => {
    invalidate.pending = false;
    if (run) paint();
  });
}

function paint() {
  Loader.frame++;
  if (!inks.line) {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["grey", "line", "empty", "accent", "wrong"])
      inks[name] = style.getPropertyValue(`--${name}`).trim();
  }
  board.hidden = state.view === "channel";
  paintSide();
  paintChannel();
  if (board.hidden) canvas.tiles = painting = [];
  else paintBoard();
  readPointer();
  paintFrame();
  loaders.forEach((loader) => loader.pump());
  const isBusy = invalidate.pending || isFiltering || loaders.some((loader) => loader.isBusy);
  document.querySelector("main").ariaBusy = `${isBusy}`;
}

async function begin() {
  const own = $("layertap-run");
  source = own ? new FromFile(JSON.parse(own.textContent)) : new FromServer();
  Loader.changed = invalidate;
  Loader.failed = alertOf;
  try {
    run = await source.run();
  } catch (error) {
    alertOf(error.message);
    $("alert").querySelector("button").onclick = () => location.reload();
    document.querySelector("main").ariaBusy = "false";
    return;
  }
  state = fromAddress();
  setUp();
  listen();
  changed();
  board.focus({ preventScroll: true });
}

begin();
