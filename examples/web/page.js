// The page: one bundle in onnxruntime-web, an adapter per user, an image, the answer and its cost.
//
// What an application needs is `load`, `swap` and `run`; the rest is for show.

import { preprocessor } from "./images.js";
import { asTensors, feeds, openBundle, readAdapter } from "./regrow.js";

const ENGINE = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const LIST = "samples.json"; // {bundle, users: [{name, about, adapter, samples: [{label, pixels, …}]}]}
const DRAW = "drawing", PAPER = 256, PEN = 40;
const MOST_BARS = 10;

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en").format;
const percent = (p) => `${(100 * p).toFixed(p > 0.0995 ? 0 : 1)} %`;
const ms = (time) => `${time.toFixed(time < 10 ? 2 : 1)} ms`;

/** A reason why nothing can be shown, and what to type about it. */
class Problem extends Error {
  constructor(title, text, commands = "") {
    super(text);
    Object.assign(this, { title, commands });
  }
}

async function read(path, options) {
  const response = await fetch(path, options).catch(() => {
    throw new Error(`${path} cannot be read: the server does not answer. Is serve.py running?`);
  });
  if (response.ok) return response.arrayBuffer();
  const { error } = await response.json().catch(() => ({}));
  throw new Error(`${path} cannot be read: ${error ?? `${response.status} ${response.statusText}`}`);
}

const json = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));

// -- the model -----------------------------------------------------------------------------------

let ort, model, list;

/** Loads the engine, the bundle and the list of users: once. */
async function load() {
  ort = await import(ENGINE).catch(() => {
    throw new Problem("onnxruntime-web is missing",
      "The page runs the model with the package onnxruntime-web from the folder node_modules beside it. " +
      "Install it in the folder that holds this page, then reload:", "cd examples/web\nnpm install");
  });
  ort.env.wasm.numThreads = 1; // a small model is not faster with more
  list = await json(LIST).catch((error) => {
    throw new Problem("The list of users is missing", `${error.message}. Serve the page with the script ` +
      "beside it, which makes the list from a demo's folder:",
    "regrow demo -o tour\npython examples/web/serve.py tour");
  });
  const start = performance.now();
  let bytes = 0;
  const readPart = async (name) => {
    const part = await read(`${list.bundle}/${name}`);
    bytes += part.byteLength;
    return part;
  };
  try {
    const { session, manifest, defaults } = await openBundle(ort, readPart);
    const time = performance.now() - start;
    const prepare = preprocessor(
      await json(`${list.bundle}/preprocessor_config.json`), await json(`${list.bundle}/config.json`));
    model = { session, manifest, prepare, bytes, time, base: asTensors(ort, defaults) };
  } catch (error) {
    if (/wasm/.test(error.message)) {
      throw new Problem("onnxruntime-web does not start",
        `${error.message}\nIf its files are not whole, install it anew, then reload:`, "cd examples/web\nnpm install --force");
    }
    throw new Problem("The model cannot be loaded", `${error.message}\nMake the folder anew, and serve it:`,
      "regrow demo -o tour --force\npython examples/web/serve.py tour");
  }
  const [{ inputs }] = model.manifest.graphs;
  if (inputs.length !== 1 || inputs[0].name !== "pixel_values") {
    throw new Problem("This page shows classifiers of images", `The bundle takes ` +
      `${inputs.map(({ name }) => name).join(", ")} (${model.manifest.task}), not pixel_values.`);
  }
}

/** An adapter from the bytes that `get` promises: what to feed, its labels, and what it cost. */
async function swap(get) {
  const start = performance.now();
  const bytes = await get();
  const reading = performance.now();
  const adapter = readAdapter(bytes);
  const slots = asTensors(ort, { ...model.base, ...feeds(adapter, model.manifest) });
  const done = performance.now();
  // Keep `slots`, and swapping back to this user is to feed them again.
  const labels = adapter.head?.labels ?? model.manifest.labels;
  return { adapter, slots, labels, bytes: bytes.byteLength, read: reading - start, expand: done - reading };
}

/** Probabilities of an image that has the model's size. */
async function run(image, slots) {
  const inputs = asTensors(ort, { pixel_values: model.prepare.values(image) });
  const { logits } = await model.session.run({ ...inputs, ...slots });
  const most = Math.max(...logits.data), powers = Array.from(logits.data, (x) => Math.exp(x - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

// -- what is shown -------------------------------------------------------------------------------

const now = { user: null, name: "", source: "", samples: [], chosen: 0 };
const alone = () => ({ slots: model.base, labels: model.manifest.labels });
const sample = () => now.samples[now.chosen];
const bestOf = (probabilities, labels) => {
  const index = probabilities.indexOf(Math.max(...probabilities));
  return { index, label: labels[index] ?? String(index), sure: probabilities[index] };
};

/** An answer beside what the sample is meant as; an adapter with labels of its own may not know it. */
function judged(label, { label: meant }, labels) {
  if (!labels.includes(meant)) return { sign: "", className: "", textContent: "Labels of this user’s own." };
  return label === meant ? { sign: "✓", className: "right", textContent: "Right." }
    : { sign: "✗", className: "wrong", textContent: `Wrong, meant as ${meant}.` };
}

// One thing at a time: a session runs once at once, and the last wish is shown last.
let turn = Promise.resolve();
const inTurn = (work) => (turn = turn.then(work).catch(explain));

function paint(canvas, { data, width, height, channels }) {
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[i * channels + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function element(tag, parent, fields = {}) {
  const made = Object.assign(document.createElement(tag), fields);
  parent.append(made);
  return made;
}

async function choose(name, get) {
  at("refused").hidden = true;
  now.name = name;
  try {
    now.user = get ? await swap(get) : null;
  } catch (error) {
    now.user = undefined; // neither an adapter nor none
    at("refused").textContent = `${name}: ${error.message}`;
    at("refused").hidden = false;
  }
  for (const id of ["answered", "total", "cost"]) at(id).hidden = now.user === undefined;
  at("none").hidden = now.user !== undefined;
  const { adapter, bytes } = now.user ?? {};
  const described = () => [`${whole(bytes)} bytes`, `${adapter.method} ${adapter.storage}`,
    `${adapter.targets.length} layers`, `seed ${adapter.seed}`,
    ...(adapter.head ? [`a head with ${now.user.labels.length} labels of its own`] : [])].join(" · ");
  at("adapter").hidden = now.user === undefined;
  at("adapter").textContent = adapter ? described() : "No adapter: the model answers as it was exported.";
  if (now.user === undefined) return refresh();
  const times = [];
  if (sample()) {
    for (let i = 0; i < 6; i++) {
      const start = performance.now();
      await run(sample().image, (now.user ?? alone()).slots);
      times.push(performance.now() - start);
    }
  }
  showCost(times);
  return refresh();
}

function showCost([first, ...further]) {
  const again = further.sort((a, b) => a - b)[Math.floor(further.length / 2)];
  const { read: reading, expand, bytes } = now.user ?? { read: 0, expand: 0 };
  const rows = now.user
    ? [[`adapter read: ${whole(bytes)} bytes`, ms(reading)], ["weights regrown", ms(expand)]]
    : [];
  if (first) rows.push(["first run", ms(first)], ["each further run", ms(again)]);
  rows.push([`model, only once: ${whole(Math.round(model.bytes / 1000))} kB`, ms(model.time)]);
  at("total").textContent = now.user ? ms(reading + expand + (first ?? 0)) : "nothing to swap";
  if (now.user && first) element("small", at("total"), { textContent: " to the answer" });
  at("cost").replaceChildren();
  for (const [what, time] of rows) {
    element("dt", at("cost"), { textContent: what });
    element("dd", at("cost"), { textContent: time });
  }
}

/** Answers all samples, with the adapter and without. */
async function refresh() {
  hint();
  if (now.user === undefined) { // refused: what was answered before is not its answer
    for (const { mark } of now.samples) if (mark) mark.textContent = "";
    for (const id of ["score", "quick"]) at(id).textContent = "";
    return;
  }
  const { slots, labels } = now.user ?? alone();
  for (const one of now.samples) {
    one.base ??= await run(one.image, model.base);
    one.own = now.user ? await run(one.image, slots) : one.base;
    if (!one.mark) continue;
    const { label } = bestOf(one.own, labels), { sign, className } = judged(label, one, labels);
    Object.assign(one.mark, { textContent: `${label} ${sign}`, className });
  }
  showScore(labels);
  showAnswer(labels);
}

function showScore(labels) {
  if (now.source === DRAW) return;
  const count = (part, names) => {
    if (!now.samples.some(({ label }) => names.includes(label))) return "knows none of these labels";
    const right = now.samples.filter((one) => bestOf(one[part], names).label === one.label).length;
    return `${right} of ${now.samples.length} right`;
  };
  const own = now.user ? `, with ${now.name}’s adapter: ${count("own", labels)}` : "";
  at("score").textContent = `The model alone: ${count("base", model.manifest.labels)}${own}.`;
}

function showAnswer(labels) {
  at("answered").hidden = false;
  const one = sample(), same = String(labels) === String(model.manifest.labels);
  at("bars").replaceChildren();
  at("legend").hidden = !(one && now.user && same);
  at("seen").hidden = !one;
  at("quick").textContent = "";
  if (!one) {
    at("best").textContent = "";
    at("sure").textContent = "Draw one, and the answer appears here.";
    at("verdict").textContent = "";
    return;
  }
  paint(at("seen"), one.image);
  const best = bestOf(one.own, labels), before = bestOf(one.base, model.manifest.labels);
  at("best").textContent = best.label;
  at("sure").textContent = percent(best.sure);
  at("quick").textContent = `${best.label}, ${percent(best.sure)}`;
  at("verdict").replaceChildren();
  if (one.label) {
    const { textContent, className } = judged(best.label, one, labels);
    element("span", at("verdict"), { textContent, className });
  }
  if (now.user) at("verdict").append(` The model alone says ${before.label} (${percent(before.sure)}).`);
  let order = labels.map((_, i) => i); // in the model's order, so that the bars move in their place
  if (order.length > MOST_BARS) {
    order = order.sort((a, b) => one.own[b] - one.own[a]).slice(0, MOST_BARS);
  }
  at("bars").classList.toggle("wide", order.some((i) => labels[i].length > 2));
  for (const i of order) {
    const row = element("li", at("bars"), { className: i === best.index ? "best" : "" });
    element("span", row, { className: "name", textContent: labels[i], title: labels[i] });
    const both = element("span", row, { className: "both" });
    element("i", both).style.width = `${100 * one.own[i]}%`;
    if (now.user && same) element("i", both, { className: "base" }).style.width = `${100 * one.base[i]}%`;
    element("b", row, { textContent: percent(one.own[i]) });
  }
}

function hint() {
  const { source, name } = now, mine = source !== DRAW && source !== name;
  at("hint").hidden = !mine;
  at("hint").textContent = `These are ${source}’s samples, and ${
    name ? `this is ${name}’s adapter` : "the model answers alone"}: choose ${source}, and compare.`;
}

// -- samples -----------------------------------------------------------------------------------

function showSource(source) {
  Object.assign(now, { source, samples: [], chosen: 0 });
  at("samples").hidden = source === DRAW;
  at("drawing").hidden = source !== DRAW;
  at("strip").replaceChildren();
  if (source === DRAW) return drawn();
  const { samples, about } = list.users.find(({ name }) => name === source);
  now.samples = samples.map((sample, index) => {
    const { label, pixels, width, height, channels } = sample;
    const image = model.prepare.sized({ data: Uint8Array.from(pixels), width, height, channels });
    const box = element("label", element("li", at("strip")), { title: `meant as ${label}` });
    const input = element("input", box, { type: "radio", name: "sign", checked: index === 0 });
    input.setAttribute("aria-label", `sample meant as ${label}`);
    input.addEventListener("change", () => inTurn(() => {
      now.chosen = index;
      return refresh();
    }));
    paint(element("canvas", box), image);
    return { label, image, mark: element("span", box) };
  });
  at("about-samples").textContent = about ? `${source}: ${about}.` : "";
  at("strip").classList.toggle("wide", samples.some(({ label }) => label.length > 3));
  return inTurn(refresh);
}

const strokes = [];

/** The strokes, moved and scaled by `place`, on a canvas. */
function ink(canvas, place = (x, y) => [x, y]) {
  const pen = canvas.getContext("2d", { willReadFrequently: true }), dark = at("invert").checked;
  pen.fillStyle = dark ? "#fff" : "#000";
  pen.fillRect(0, 0, PAPER, PAPER);
  Object.assign(pen, { strokeStyle: dark ? "#000" : "#fff", lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    pen.beginPath();
    stroke.forEach(([x, y], i) => (i ? pen.lineTo(...place(x, y)) : pen.moveTo(...place(x, y))));
    pen.lineTo(...place(...stroke.at(-1))); // so that a point is one, too
    pen.stroke();
  }
}

/** As a scanner would cut it out: the strokes fill the height (or the width) of the paper. */
function framed() {
  const sheet = Object.assign(document.createElement("canvas"), { width: PAPER, height: PAPER });
  const [xs, ys] = [0, 1].map((side) => strokes.flat().map((point) => point[side]));
  const range = (all) => [Math.min(...all), Math.max(...all)];
  const [left, right] = range(xs), [top, bottom] = range(ys);
  const scale = Math.min((PAPER - PEN) / Math.max(right - left, bottom - top, 1), 4);
  const middle = PAPER / 2;
  ink(sheet, (x, y) =>
    [middle + scale * (x - (left + right) / 2), middle + scale * (y - (top + bottom) / 2)]);
  const { data } = sheet.getContext("2d").getImageData(0, 0, PAPER, PAPER);
  const colours = data.filter((_, i) => i % 4 < 3);
  return model.prepare.sized({ data: colours, width: PAPER, height: PAPER, channels: 3 });
}

function drawn() {
  ink(at("canvas"));
  const image = strokes.length && framed();
  at("small").style.visibility = image ? "visible" : "hidden";
  if (image) paint(at("small"), image);
  now.samples = image ? [{ image }] : [];
  return inTurn(refresh);
}

function draw() {
  const canvas = at("canvas");
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * (PAPER / box.width), (event.clientY - box.top) * (PAPER / box.height)];
  };
  let waiting = false;
  const later = () => {
    if (!waiting) requestAnimationFrame(() => drawn((waiting = false)));
    waiting = true;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    strokes.push([point(event)]);
    later();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    strokes.at(-1).push(point(event));
    later();
  });
  at("invert").addEventListener("change", drawn);
  at("clear").addEventListener("click", () => {
    strokes.length = 0;
    drawn();
  });
}

// -- the whole -----------------------------------------------------------------------------------

function explain(error) {
  console.error(error);
  const { title = "Something failed", commands = "" } = error, box = at("problem");
  box.replaceChildren();
  box.className = "panel problem";
  element("h2", box, { textContent: title });
  element("p", box, { textContent: error.message }).style.whiteSpace = "pre-line";
  if (commands) element("pre", box, { textContent: commands });
  box.hidden = false;
}

async function start() {
  await load();
  const option = (select, value, textContent) => element("option", select, { value, textContent });
  option(at("user"), "", "nobody: the model alone");
  for (const { name, samples } of list.users) {
    option(at("user"), name, name);
    if (samples.length) option(at("source"), name, `${name}: samples`);
  }
  option(at("source"), DRAW, "your own: draw one");
  at("source").addEventListener("change", ({ target }) => showSource(target.value));
  at("user").addEventListener("change", ({ target: { value } }) => {
    at("file").value = "";
    const user = list.users.find(({ name }) => name === value);
    // Not from the browser's cache, so that reading is measured.
    inTurn(() => choose(value, user && (() => read(user.adapter, { cache: "no-store" }))));
  });
  at("file").addEventListener("change", ({ target: { files: [file] } }) => {
    if (!file) return;
    at("user").selectedIndex = -1;
    inTurn(() => choose(file.name.replace(/\.safetensors$/, ""), () => file.arrayBuffer()));
  });
  draw();
  at("problem").hidden = true;
  at("app").hidden = false;
  await showSource(at("source").value);
  await inTurn(() => choose("", null));
}

start().catch(explain);
