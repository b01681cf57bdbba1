// What tests/web/test_web.py runs in Node; it prints one JSON line.
//
//   node run.mjs vectors FOLDER      tests/vectors through examples/web, which lies beside this
//   node run.mjs broken FOLDER       the same adapters, cut off and with bytes changed
//   node run.mjs expanders FOLDER    expander graphs in onnxruntime-web, and the same in JavaScript
//   node run.mjs bundles FOLDER      bundles in onnxruntime-web, with adapters swapped

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import * as basis from "./basis.js";
import * as regrow from "./regrow.js";

const [, , command, folder] = process.argv;

function load(name) {
  const bytes = readFileSync(join(folder, name));
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
}

const json = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
const tensors = (name) => regrow.readSafetensors(load(name)).tensors;
const bytesOf = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
const hex = (array) => bytesOf(array).toString("hex");
const packed = (signs) => {
  const bits = new Uint8Array(Math.ceil(signs.length / 8));
  signs.forEach((sign, p) => { bits[p >> 3] |= (sign > 0) << (p & 7); });
  return hex(bits);
};

// How many float32 of `found` have other bits than `wanted`, and by how much of the largest.
function compared(found, wanted) {
  if (found.length !== wanted.length) return { values: found.length, wrong: -1, error: Infinity };
  const x = new Uint32Array(Float32Array.from(found).buffer);
  const y = new Uint32Array(Float32Array.from(wanted).buffer);
  let wrong = 0, difference = 0, largest = 0;
  for (let i = 0; i < found.length; i++) {
    wrong += x[i] !== y[i];
    difference = Math.max(difference, Math.abs(found[i] - wanted[i]));
    largest = Math.max(largest, Math.abs(wanted[i]));
  }
  return { values: found.length, wrong, error: difference && difference / largest };
}

// By <target>.<part>, what slots take of an adapter.
function expansion(adapter) {
  const flat = ([name, changes]) => [name, Object.assign({}, ...Object.values(changes))];
  const parts = [...[...regrow.expand(adapter)].map(flat), ...regrow.expandHead(adapter)];
  return new Map(parts.flatMap(([target, arrays]) =>
    Object.entries(arrays).map(([part, array]) => [`${target}.${part}`, array])));
}

function vectors() {
  const found = {};
  const compare = (name, rows, of) => {
    const differ = rows.filter((row) => JSON.stringify(of(row)) !== JSON.stringify(row.wanted));
    found[name] = { rows: rows.length, differ: differ.length };
  };
  const given = (name, wanted) => json(name).map((row) => ({ ...row, wanted: wanted(row) }));
  compare("philox", given("philox.json", (row) => row.words),
    ({ counter, key }) => [...basis.philox4x32(...counter, ...key)]);
  compare("signs", given("signs.json", (row) => row.bits), (row) =>
    packed(basis.signs(row.seed, row.role, row.vector, row.entries, row.layer)));
  compare("locations", given("locations.json", (row) => row.places),
    (row) => basis.locations(row.seed, row.n, row.out * row.in));
  compare("packing", given("packing.json", (row) => row.codes), ({ bits, packed: rows, codes }) => {
    const length = codes[0].length;
    const all = regrow.unpack(Buffer.from(rows.join(""), "hex"), rows.length, length, bits);
    return codes.map((_, r) => [...all.subarray(r * length, (r + 1) * length)]);
  });
  const { words, vera, fourierft } = json("mt19937.json");
  compare("mt19937 words", words.map((w) => ({ seed: w.seed, wanted: Object.values(w).slice(1) })),
    ({ seed }) => {
      const word = basis.mt19937(seed), stream = Array.from({ length: 1300 }, word);
      return [stream.slice(0, 8), stream.slice(620, 628), stream.slice(1290)];
    });
  compare("mt19937 vera", vera.map((row) => ({ ...row, wanted: [row.A, row.B] })), (row) =>
    basis.uniformKaiming(row.seed, row.rank, row.in, row.out, row.dtype).map(hex));
  compare("mt19937 fourierft", fourierft.map((row) => ({ ...row, wanted: row.places })),
    (row) => basis.shuffled(row.seed, row.n, row.out * row.in));
  const adapters = json("index.json").adapters.map((entry) => ({ ...entry, ...vector(entry) }));
  return { ...found, adapters };
}

function vector({ adapter: file, expansion: expected, tensors: about }) {
  const adapter = regrow.readAdapter(load(file)), wanted = tensors(expected), parts = {};
  const found = expansion(adapter);
  for (const [name, { data, dims }] of found) {
    const same = JSON.stringify(dims) === JSON.stringify(about[name]?.shape);
    const sha256 = createHash("sha256").update(bytesOf(data)).digest("hex");
    parts[name] = {
      ...compared(data, wanted.get(name).data), dims: same, sha256: sha256 === about[name].sha256,
    };
  }
  return { parts };
}

// How adapters fare that are not as they were written: accepted, refused, or worse.
function broken() {
  const found = { accepted: 0, refused: 0, worse: [] };
  const attempt = (name, bytes) => {
    try {
      regrow.readAdapter(bytes.buffer);
      found.accepted++;
    } catch (error) {
      if (error instanceof regrow.RegrowError && error.message.length < 2000) found.refused++;
      else found.worse.push(`${name}: ${error.stack}`);
    }
  };
  let state = 1;
  const random = (n) => (state = (Math.imul(state, 1103515245) + 12345) >>> 1) % n;
  for (const { adapter: file } of json("index.json").adapters) {
    const whole = new Uint8Array(load(file));
    for (let size = 0; size < whole.length; size += 7) attempt(file, whole.slice(0, size));
    for (let i = 0; i < 300; i++) {
      const changed = whole.slice();
      for (let n = 1 + random(3); n > 0; n--) changed[random(changed.length)] = random(256);
      attempt(file, changed);
    }
  }
  return found;
}

async function runtime() {
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  return ort;
}

async function expanders() {
  const ort = await runtime(), found = {};
  for (const name of json("cases.json")) {
    const session = await ort.InferenceSession.create(new Uint8Array(load(`${name}.onnx`)));
    const adapter = regrow.readAdapter(load(`${name}.safetensors`));
    const wanted = tensors(`${name}-wanted.safetensors`);
    const graph = await session.run(regrow.asTensors(ort, regrow.expanderInputs(adapter)));
    const script = expansion(adapter);
    found[name] = {};
    for (const [part, { data }] of wanted) {
      const output = part.replace(/\.(\w+)$/, ".adapter_$1");
      found[name][part] = {
        graph: compared(graph[output].data, data), script: compared(script.get(part).data, data),
      };
    }
    await session.release();
  }
  return { version: ort.env.versions.web, found };
}

async function bundles() {
  const ort = await runtime(), found = {};
  for (const [name, { adapters, expander, refused }] of Object.entries(json("bundles.json"))) {
    const read = (file) => load(join(name, file));
    const { manifest, session, defaults } = await regrow.openBundle(ort, read);
    const inputs = regrow.asTensors(ort, Object.fromEntries(tensors("inputs.safetensors")));
    const empty = regrow.asTensors(ort, defaults);
    const run = async (slots) => {
      const { logits } = await session.run({ ...inputs, ...empty, ...slots });
      return { dims: logits.dims, data: [...logits.data].map((x) => (isFinite(x) ? x : `${x}`)) };
    };
    const runs = (found[name] = { base: await run({}) });
    for (const file of adapters) {
      const adapter = regrow.readAdapter(load(file));
      runs[file] = await run(regrow.asTensors(ort, regrow.feeds(adapter, manifest)));
    }
    runs.refused = refused.map((file) => {
      try {
        return String(Object.keys(regrow.feeds(regrow.readAdapter(load(file)), manifest)));
      } catch (error) {
        return error.message;
      }
    });
    if (manifest.mode === "swappable" && !manifest.slots[0].fixed) { // as if exported with ranks of 8, or of 1
      const ranks = (rank) => ({ ...manifest, slots: manifest.slots.map((s) => ({ ...s, rank })) });
      const adapter = regrow.readAdapter(load(adapters[0]));
      runs.padded = await run(regrow.asTensors(ort, regrow.feeds(adapter, ranks(8))));
      runs.refused.push(String(regrow.mismatches(adapter, ranks(1))));
    }
    if (expander) { // its outputs are the slots' inputs, as they are
      const graph = await ort.InferenceSession.create(new Uint8Array(load(expander.graph)));
      const numbers = regrow.expanderInputs(regrow.readAdapter(load(expander.adapter)));
      runs.expander = await run(await graph.run(regrow.asTensors(ort, numbers)));
    }
    runs["base again"] = await run({});
  }
  return found;
}

console.log(JSON.stringify(await { vectors, broken, expanders, bundles }[command]()));
