// The page: one bundle in onnxruntime-web, an adapter per speaker, a clip, the answer and its cost.

import { asTensors, feeds, openBundle, readAdapter } from "./regrow.js";
import { readWav, resample, audioPreprocessor } from "./audio.js";

const ENGINE = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const LIST = "samples.json"; // {bundle, users: [{name, adapter, samples: [{label, wav}]}]}
const RECORD = 2, BEFORE = 0.05, LOUD = 0.1; // s, s before the word, share of the loudest sample

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en").format;
const percent = (p) => `${(100 * p).toFixed(p > 0.0995 ? 0 : 1)} %`;
const ms = (time) => `${time.toFixed(time < 10 ? 2 : 1)} ms`;

async function read(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) throw new Error(`${path} cannot be read: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

const json = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));

function element(tag, parent, fields = {}) {
  const made = Object.assign(document.createElement(tag), fields);
  parent.append(made);
  return made;
}

// -- what an application needs -------------------------------------------------------------------

let ort, model, list;

async function load() {
  ort = await import(ENGINE).catch(() => {
    throw new Error("onnxruntime-web is missing. In examples/web: npm install");
  });
  ort.env.wasm.numThreads = 1; // a small model is not faster with more
  list = await json(LIST);
  const start = performance.now();
  let bytes = 0;
  const part = async (name) => {
    const found = await read(`${list.bundle}/${name}`);
    bytes += found.byteLength;
    return found;
  };
  const { session, manifest, defaults } = await openBundle(ort, part);
  const prepare = audioPreprocessor(await json(`${list.bundle}/preprocessor_config.json`));
  const [{ inputs: [input], outputs: [output] }] = manifest.graphs;
  const time = performance.now() - start;
  model = { session, manifest, prepare, bytes, time, base: asTensors(ort, defaults), input: input.name, output: output.name };
}

/** An adapter from the bytes that `get` promises: what to feed, its labels, and what it cost. */
async function swap(get) {
  const start = performance.now();
  const bytes = await get();
  const reading = performance.now();
  const adapter = readAdapter(bytes);
  const slots = asTensors(ort, { ...model.base, ...feeds(adapter, model.manifest) });
  const done = performance.now();
  const labels = adapter.head?.labels ?? model.manifest.labels;
  return { adapter, slots, labels, bytes: bytes.byteLength, read: reading - start, expand: done - reading };
}

/** A clip at any rate to features, as the bundle says. */
const prepared = ({ samples, rate }) => model.prepare.values(resample(samples, rate, model.prepare.rate));

/** Probabilities of a clip's features. */
async function run(features, slots) {
  const found = await model.session.run({ ...asTensors(ort, { [model.input]: features }), ...slots });
  const { data } = found[model.output];
  const most = Math.max(...data), powers = Array.from(data, (x) => Math.exp(x - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** Two seconds of the microphone, from a little before the word on. */
async function record() {
  const media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext(), parts = [];
  try {
    await context.audioWorklet.addModule("recorder.js");
    const node = new AudioWorkletNode(context, "recorder");
    node.port.onmessage = ({ data }) => parts.push(...data);
    context.createMediaStreamSource(media).connect(node);
    await new Promise((done) => setTimeout(done, 1000 * RECORD));
  } finally {
    media.getTracks().forEach((track) => track.stop());
    await context.close();
  }
  const loudest = parts.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  if (!loudest) throw new Error("The microphone gave silence.");
  const first = parts.findIndex((x) => Math.abs(x) > LOUD * loudest) - BEFORE * context.sampleRate;
  return { samples: Float64Array.from(parts.slice(Math.max(0, Math.round(first)))), rate: context.sampleRate };
}

// -- what is shown -------------------------------------------------------------------------------

const now = { user: null, name: "", source: "", clips: [], clip: null };

let turn = Promise.resolve(); // one thing at a time, the last wish shown last
const inTurn = (work) => (turn = turn.then(work).catch(explain));

const bestOf = (probabilities, labels) => {
  const index = probabilities.indexOf(Math.max(...probabilities));
  return { index, label: labels[index] ?? String(index), sure: probabilities[index] };
};

function paint({ samples }) {
  const canvas = at("wave"), pen = canvas.getContext("2d"), { width, height } = canvas;
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  const step = samples.length / width;
  const loudest = Math.max(samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0), 1e-6);
  for (let x = 0; x < width; x++) {
    let most = 0;
    for (let i = Math.floor(x * step); i < (x + 1) * step; i++) most = Math.max(most, Math.abs(samples[i] ?? 0));
    const tall = Math.max(1, (most / loudest) * (height - 8));
    pen.fillRect(x, (height - tall) / 2, 1, tall);
  }
}

function play({ samples, rate }) {
  const context = new AudioContext(), buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(Float32Array.from(samples), 0);
  const source = new AudioBufferSourceNode(context, { buffer });
  source.connect(context.destination);
  source.onended = () => context.close();
  source.start();
}

async function choose(name, adapter) {
  at("refused").hidden = true;
  try {
    now.user = adapter ? await swap(() => read(adapter, { cache: "no-store" })) : null;
    now.name = name;
  } catch (error) {
    Object.assign(now, { user: null, name: "" });
    at("user").value = "";
    at("refused").textContent = `${name}: ${error.message}`;
    at("refused").hidden = false;
  }
  const { adapter: file, bytes } = now.user ?? {};
  at("adapter").textContent = file
    ? `${whole(bytes)} bytes · ${file.method} ${file.storage} · ${file.targets.length} layers · seed ${file.seed}`
    : "No adapter: the model answers as it was exported.";
  const times = [];
  for (let i = 0; now.clip && i < 6; i++) {
    const start = performance.now();
    await run(now.clip.features, now.user?.slots ?? model.base);
    times.push(performance.now() - start);
  }
  showCost(times);
  await refresh();
}

function showCost([first, ...further]) {
  const again = further.sort((a, b) => a - b)[Math.floor(further.length / 2)];
  const { read: reading, expand, bytes } = now.user ?? {};
  const rows = now.user ? [[`adapter read: ${whole(bytes)} bytes`, ms(reading)], ["weights regrown", ms(expand)]] : [];
  if (first) rows.push(["first run", ms(first)], ["each further run", ms(again)]);
  if (now.clip?.time) rows.push(["features of the clip (MFCC)", ms(now.clip.time)]);
  rows.push([`model, only once: ${whole(Math.round(model.bytes / 1000))} kB`, ms(model.time)]);
  at("total").textContent = now.user ? ms(reading + expand) : "nothing to swap";
  if (now.user) element("small", at("total"), { textContent: " to change the speaker" });
  at("cost").replaceChildren();
  for (const [what, time] of rows) {
    element("dt", at("cost"), { textContent: what });
    element("dd", at("cost"), { textContent: time });
  }
}

/** Answers the clip and the owner's test clips, with the adapter and without. */
async function refresh() {
  const slots = now.user?.slots ?? model.base, labels = now.user?.labels ?? model.manifest.labels;
  for (const clip of new Set([...now.clips, now.clip].filter(Boolean))) {
    clip.base ??= await run(clip.features, model.base);
    clip.own = now.user ? await run(clip.features, slots) : clip.base;
    if (!clip.button) continue;
    const { label } = bestOf(clip.own, labels), right = label === clip.label;
    clip.button.replaceChildren(clip.label);
    element("small", clip.button, { textContent: right ? `✓ ${label}` : `✗ ${label}`, className: right ? "right" : "wrong" });
    clip.button.setAttribute("aria-checked", clip === now.clip);
  }
  const right = (part, names) => now.clips.filter((clip) => bestOf(clip[part], names).label === clip.label).length;
  const own = now.user ? `, with ${now.name}’s adapter ${right("own", labels)}` : "";
  at("score").textContent = now.clips.length
    ? `Of ${now.clips.length} clips the model alone has ${right("base", model.manifest.labels)} right${own}.` : "";
  const other = now.source && now.name !== now.source;
  at("hint").hidden = !other;
  at("hint").textContent = other ? `These are ${now.source}’s clips, and ${
    now.name ? `this is ${now.name}’s adapter` : "the model answers alone"}: choose ${now.source}, and compare.` : "";
  showAnswer(labels);
}

function showAnswer(labels) {
  const clip = now.clip;
  if (!clip) return;
  const best = bestOf(clip.own, labels), before = bestOf(clip.base, model.manifest.labels);
  at("best").textContent = best.label;
  at("sure").textContent = percent(best.sure);
  at("alone").textContent = now.user ? `The model alone says ${before.label} (${percent(before.sure)}).` : "";
  at("bars").replaceChildren();
  at("bars").classList.toggle("wide", labels.some((label) => label.length > 2));
  labels.forEach((label, i) => {
    const row = element("li", at("bars"), { className: i === best.index ? "best" : "" });
    element("span", row, { className: "name", textContent: label });
    element("i", element("span", row, { className: "both" })).style.width = `${100 * clip.own[i]}%`;
    element("b", row, { textContent: percent(clip.own[i]) });
  });
  Object.assign(document.body.dataset, { answered: now.name, clip: clip.kind });
}

/** A clip of the visitor's own: shows what the model hears of it, and the answer, which a phone has below. */
async function take({ samples, rate }, kind, about) {
  const start = performance.now(), features = prepared({ samples, rate }), time = performance.now() - start;
  const heard = samples.slice(0, Math.round(rate * model.prepare.seconds)), cut = heard.length < samples.length;
  now.clip = { samples: heard, rate, features, time, kind };
  paint(now.clip);
  at("about").textContent = `${about}, ${cut ? "the first " : ""}${(heard.length / rate).toFixed(2)} s`;
  await refresh();
  at("answer").scrollIntoView({ block: "nearest" });
}

async function showSource(name) {
  now.source = name;
  at("strip").replaceChildren();
  const { samples } = list.users.find((user) => user.name === name) ?? { samples: [] };
  now.clips = await Promise.all(samples.map(async ({ label, wav }) => {
    const place = element("li", at("strip"));
    const sound = readWav(await read(wav)), start = performance.now(), features = prepared(sound);
    const clip = { ...sound, label, features, time: performance.now() - start, kind: "test" };
    clip.button = element("button", place, { type: "button" });
    clip.button.setAttribute("role", "radio");
    clip.button.addEventListener("click", () => inTurn(() => pick(clip, name)));
    return clip;
  }));
  if (now.clips.length) await pick(now.clips[0], name);
}

function pick(clip, name) {
  now.clip = clip;
  paint(clip);
  at("about").textContent = `${name} says ${clip.label}, ${(clip.samples.length / clip.rate).toFixed(2)} s`;
  return refresh();
}

/** An error beside the button, where a clip cannot be had; the page goes on. */
const trying = (work) => inTurn(async () => {
  at("trouble").hidden = true;
  try {
    await work();
  } catch (error) {
    at("trouble").textContent = error.name === "NotAllowedError"
      ? "The browser may not use the microphone. Allow it, or load a .wav file." : error.message;
    at("trouble").hidden = false;
  }
});

function explain(error) {
  console.error(error);
  const box = at("problem");
  box.replaceChildren();
  box.className = "panel problem";
  element("h2", box, { textContent: "Something failed" });
  element("p", box, { textContent: error.message });
  element("pre", box, { textContent: "python examples/web/serve.py words --page examples/keywords/web" });
  box.hidden = false;
}

async function start() {
  await load();
  const option = (select, value, textContent) => element("option", select, { value, textContent });
  option(at("user"), "", "nobody: the model alone");
  for (const { name, samples } of list.users) {
    option(at("user"), name, name);
    if (samples.length) option(at("source"), name, name);
  }
  at("source").addEventListener("change", ({ target }) => inTurn(() => showSource(target.value)));
  at("user").addEventListener("change", ({ target: { value } }) =>
    inTurn(() => choose(value, list.users.find(({ name }) => name === value)?.adapter)));
  at("wav").addEventListener("change", ({ target: { files: [file] } }) => file && trying(async () =>
    take(readWav(await file.arrayBuffer()), "file", file.name)));
  at("play").addEventListener("click", () => now.clip && play(now.clip));
  if (!navigator.mediaDevices) {
    at("record").disabled = true;
    at("record").textContent = "Recording needs https or localhost";
  }
  at("record").addEventListener("click", () => trying(async () => {
    Object.assign(at("record"), { disabled: true, textContent: "Speak now …" });
    try {
      await take(await record(), "recorded", "your recording");
    } finally {
      Object.assign(at("record"), { disabled: false, textContent: "Record a word" });
    }
  }));
  at("problem").hidden = true;
  at("app").hidden = false;
  await inTurn(() => showSource(at("source").value));
  await inTurn(() => choose("", null));
}

start().catch(explain);
