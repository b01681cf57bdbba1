// regrow adapters in JavaScript, for browsers and Node: no dependency, nothing to build.
//
//   import { asTensors, feeds, openBundle, readAdapter } from "./regrow.js";
//   const read = async (name) => (await fetch(name)).arrayBuffer();
//   const bundle = await openBundle(ort, (name) => read(`bundle/${name}`));
//   const adapter = readAdapter(await read("user.safetensors"));
//   const slots = { ...bundle.defaults, ...feeds(adapter, bundle.manifest) };
//   const { logits } = await bundle.session.run({ pixel_values, ...asTensors(ort, slots) });
//
// It follows docs/adapter-format.md, docs/basis.md and docs/bundle-format.md. An array is {data,
// dims}: a typed array, row-major, and its shape. JavaScript computes in float64; what is written
// into a Float32Array is rounded, and that is where the formats round.

import { Role, keyOf, locations, shuffled, signWords, uniformKaiming } from "./basis.js";
import { requireInputs } from "./onnx.js";

export class RegrowError extends Error {}

function fail(message) {
  throw new RegrowError(message);
}

// -- the adapter file: docs/adapter-format.md ----------------------------------------------------

function half(bits) {
  const exponent = (bits >>> 10) & 31, fraction = bits & 1023, sign = bits >>> 15 ? -1 : 1;
  if (exponent === 31) return NaN; // or infinite: neither is allowed
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24);
}

const READERS = {
  F32: [4, (bytes) => new Float32Array(bytes)], // little-endian, as all that runs WebAssembly is
  F16: [2, (bytes) => Float32Array.from(new Uint16Array(bytes), half)],
  I64: [8, (bytes) => new BigInt64Array(bytes)],
  U32: [4, (bytes) => new Uint32Array(bytes)],
  I8: [1, (bytes) => new Int8Array(bytes)],
  U8: [1, (bytes) => new Uint8Array(bytes)],
};

/** Of an ArrayBuffer: {metadata, tensors}, tensors a Map of {data, dims, dtype}; F16 is widened. */
export function readSafetensors(buffer) {
  const broken = (what) => fail(`file must be whole safetensors, got ${what}: copy it again`);
  const room = buffer.byteLength - 8;
  const size = room < 0 ? Infinity : Number(new DataView(buffer).getBigUint64(0, true));
  if (size > room) broken("a broken header");
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(buffer.slice(8, 8 + size)));
  } catch (error) {
    broken(`a header that is no JSON (${error.message})`);
  }
  const { __metadata__: metadata = {}, ...entries } = header, tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(entries)) {
    const [bytes, read] = READERS[dtype] ?? broken(`dtype ${dtype} of ${name}`);
    const length = shape.reduce((product, n) => product * n, bytes);
    if (!(start >= 0 && end - start === length && size + end <= room)) broken(`half of ${name}`);
    const data = read(buffer.slice(8 + size + start, 8 + size + end));
    if (dtype[0] === "F" && !data.every(Number.isFinite)) fail(`${name} must be finite`);
    tensors.set(name, { data, dims: shape, dtype });
  }
  return { metadata, tensors };
}

/** Codes of 2 to 7 bits, least significant bit first, every row begun on a byte: Int8Array. */
export function unpack(packed, rows, length, bits) {
  const codes = new Int8Array(rows * length), width = Math.ceil((length * bits) / 8);
  for (let i = 0; i < codes.length; i++) {
    const bit = (i % length) * bits, at = Math.floor(i / length) * width + (bit >>> 3);
    const both = packed[at] | (packed[at + 1] << 8); // past the end, undefined counts as 0
    codes[i] = ((both >>> (bit & 7)) << (32 - bits)) >> (32 - bits); // with its sign
  }
  return codes;
}

// The most that a config's numbers may be, so that a file of a few bytes asks for no gigabytes.
const LIMITS = { k: 1 << 16, l: 1 << 16, n: 1 << 16, rank: 1 << 12 };
const MAX_WIDTH = 1 << 24;

// Coefficient tensors by method: [name, rows, length] each.
const LAYOUTS = {
  nola: ({ k, l }, targets) => [["alpha", targets.length, k], ["beta", targets.length, l]],
  vera: ({ rank }, targets) => [["d", targets.length, rank], ...stacked("b", targets, "out", 1)],
  fourierft: ({ n }, targets) => [["c", targets.length, n]],
  lora: ({ rank }, targets) =>
    [...stacked("A", targets, "in", rank), ...stacked("B", targets, "out", rank)],
  ia3: (config, targets) => [
    ...stacked("s", targets.filter((t) => !isFeedforward(config, t)), "out", 1),
    ...stacked("t", targets.filter((t) => isFeedforward(config, t)), "in", 1),
  ],
  ssf: (_, targets) => [...stacked("s", targets, "out", 1), ...stacked("b", targets, "out", 1)],
  bitfit: (_, targets) => stacked("b", targets, "out", 1),
  head: () => [],
};

function stacked(part, targets, side, each) {
  const rows = new Map();
  for (const target of targets) rows.set(target[side], (rows.get(target[side]) ?? 0) + each);
  return [...rows].map(([width, count]) => [`${part}.${width}`, count, width]);
}

function check(what, value, most) {
  if (!Number.isInteger(value) || value < 1 || value > most) {
    fail(`${what} must be from 1 to ${most}, got ${value}`);
  }
}

function take(tensors, name, dims, ...dtypes) {
  const found = tensors.get(name) ?? fail(`tensor ${name} is missing`);
  if (!dtypes.includes(found.dtype) || String(found.dims) !== String(dims)) {
    const got = `${found.dtype} [${found.dims}]`;
    fail(`tensor ${name} must be ${dtypes.join("/")} [${dims}], got ${got}`);
  }
  return found.data;
}

/**
 * An adapter: the fields of its metadata, with `targets` as {name, in, out} and `head` as {labels,
 * layers}; all `tensors`; and `coefficients`, a Map of {rows, length, values, scale, group}.
 */
export function readAdapter(buffer) {
  try {
    return parsed(buffer);
  } catch (error) {
    if (error instanceof RegrowError) throw error;
    return fail(`file must be a whole adapter, got a broken one: copy it again (${error.message})`);
  }
}

/** The targets of a row: one, or one for every number in the place of its `*`. */
function named([name, wide, high, first, last]) {
  if (first === undefined) return [{ name, in: wide, out: high }];
  check("numbers of a row of targets", last - first, 1e5);
  return Array.from({ length: last - first + 1 }, (_, i) => (
    { name: name.replace("*", first + i), in: wide, out: high }));
}

/** Order by UTF-8 bytes, which is that of code points, not of UTF-16. */
function byBytes(a, b) {
  const [left, right] = [a, b].map((text) => new TextEncoder().encode(text));
  const place = left.findIndex((byte, i) => byte !== right[i]);
  return place < 0 ? left.length - right.length : left[place] - (right[place] ?? -1);
}

function parsed(buffer) {
  const { metadata, tensors } = readSafetensors(buffer);
  if (!metadata.regrow) fail("file must be a regrow adapter, got safetensors without its metadata");
  const fields = JSON.parse(metadata.regrow), { config, basis, storage, group } = fields;
  const known = (what, value, choices) =>
    choices.includes(value) || fail(`${what} must be one of ${choices.join(", ")}, got ${value}`);
  known("format", fields.format, [1]);
  known("method", fields.method, Object.keys(LAYOUTS));
  known("basis", `${basis.kind} ${basis.version}`, ["philox-sign 1", "peft-mt19937 1", "stored 1"]);
  known("storage", storage, ["fp32", "fp16", ...[2, 3, 4, 5, 6, 7, 8].map((b) => `int${b}`)]);
  if (!/^\d{1,20}$/.test(fields.seed) || BigInt(fields.seed) >> 64n) fail("seed must be a uint64");
  const targets = fields.targets.flatMap(named);
  targets.sort((a, b) => byBytes(a.name, b.name));
  for (const t of targets) {
    check(`in of ${t.name}`, t.in, MAX_WIDTH);
    check(`out of ${t.name}`, t.out, MAX_WIDTH);
  }
  for (const name in LIMITS) if (name in config) check(name, config[name], LIMITS[name]);
  const coefficients = new Map(), dtype = { fp32: "F32", fp16: "F16", int8: "I8" }[storage];
  for (const [name, rows, length] of LAYOUTS[fields.method](config, targets)) {
    const bits = Number(storage.slice(3)), width = Math.ceil((length * bits) / 8);
    const values = dtype
      ? take(tensors, name, [rows, length], dtype)
      : unpack(take(tensors, name, [rows, width], "U8"), rows, length, bits);
    const scales = group ? [rows, Math.ceil(length / group)] : [rows];
    const scale = take(tensors, `${name}.scale`, scales, "F32");
    coefficients.set(name, { rows, length, values, scale, group });
  }
  const head = fields.head && { ...fields.head, layers: fields.head.layers.map(layer) };
  return { ...fields, targets, head, tensors, coefficients };

  function layer(name) {
    const dims = tensors.get(`head.${name}.weight`)?.dims ?? [];
    const weight = take(tensors, `head.${name}.weight`, dims, "F16", "F32");
    const bias = take(tensors, `head.${name}.bias`, dims.slice(0, 1), "F16", "F32");
    return { name, in: dims[1], out: dims[0], weight, bias };
  }
}

// -- expansion: docs/basis.md --------------------------------------------------------------------

function zeros(...dims) {
  return { data: new Float32Array(dims.reduce((product, n) => product * n, 1)), dims };
}

function transposed(data, rows, columns) {
  const found = zeros(columns, rows);
  for (let i = 0; i < data.length; i++) {
    found.data[(i % columns) * rows + Math.floor(i / columns)] = data[i];
  }
  return found;
}

/** Float32Array [rows * length]: stored numbers times their scales, rounded once. */
function dense({ rows, length, values, scale, group }) {
  const per = scale.length / rows;
  return Float32Array.from(values, (value, i) => {
    const at = group ? Math.floor((i % length) / group) : 0;
    return value * scale[Math.floor(i / length) * per + at];
  });
}

/** By target, its `each` rows of the tensors `<part>.<width>`, which are in the targets' order. */
function unstacked({ targets, coefficients }, part, side, each) {
  const tensors = new Map(), used = new Map();
  return targets.map(({ [side]: width }) => {
    if (!tensors.has(width)) tensors.set(width, dense(coefficients.get(`${part}.${width}`)));
    const start = used.get(width) ?? 0, end = start + each * width;
    used.set(width, end);
    return { data: tensors.get(width).subarray(start, end), dims: [each, width] };
  });
}

/**
 * NOLA's sums, by target: coefficient i times sign vector i, over all i, then times the scale.
 * Codes are integers, their sum is exact, the product is rounded once: the same bits everywhere.
 *
 * Eight vectors at a time: their signs at an entry are a byte, which picks one of 256 sums.
 */
function combined(adapter, name, role, sizes) {
  const part = adapter.coefficients.get(name), { length, group, scale } = part;
  const values = group ? dense(part) : part.values, key = keyOf(adapter.seed);
  const totals = sizes.map((size) => new Float64Array(size)), all = sizes.map((_, t) => t);
  const layers = adapter.config.shared ? [[0, all]] : all.map((t) => [1 + t, [t]]);
  for (const [layer, members] of layers) {
    const longest = Math.max(0, ...members.map((t) => sizes[t]));
    for (let first = 0; first < length; first += 8) {
      const count = Math.min(8, length - first), bytes = new Uint8Array(longest);
      for (let i = 0; i < count; i++) {
        const words = signWords(key, role, first + i, longest, layer);
        for (let p = 0; p < longest; p++) bytes[p] |= ((words[p >>> 5] >>> (p & 31)) & 1) << i;
      }
      for (const t of members) {
        const start = t * length + first, total = totals[t];
        const sums = sumsOf(values.subarray(start, start + count));
        for (let p = 0; p < total.length; p++) total[p] += sums[bytes[p]];
      }
    }
  }
  return totals.map((total, t) => Float32Array.from(total, (x) => x * (group ? 1 : scale[t])));
}

/** Sum number m: plus value i where bit i of m is 1, minus it where it is 0. */
function sumsOf(values) {
  const sums = new Float64Array(1 << values.length);
  sums[0] = -values.reduce((sum, value) => sum + value, 0);
  values.forEach((value, i) => {
    for (let m = 0; m < 1 << i; m++) sums[m | (1 << i)] = sums[m] + 2 * value;
  });
  return sums;
}

function nola(adapter) {
  const { targets, config: { rank } } = adapter;
  const a = combined(adapter, "alpha", Role.NOLA_A, targets.map((t) => t.in * rank));
  const b = combined(adapter, "beta", Role.NOLA_B, targets.map((t) => t.out * rank));
  return targets.map((t, i) => ({
    low_rank: {
      A: { data: a[i], dims: [t.in, rank] },
      B: { data: b[i], dims: [rank, t.out] },
    },
  }));
}

/** VeRA's frozen matrices, A [rank, wide] and B [high, rank], and how wide A is. */
function matrices({ seed, basis, targets, tensors, config: { rank } }) {
  const widest = (side) => Math.max(0, ...targets.map((t) => t[side]));
  const wide = basis.in ?? widest("in"), high = basis.out ?? widest("out");
  if (basis.kind === "peft-mt19937") {
    return [...uniformKaiming(seed, rank, wide, high, basis.dtype), wide];
  }
  if (basis.kind === "stored") {
    const stored = (name, dims) => take(tensors, name, dims, "F16", "F32");
    return [stored("basis.A", [rank, wide]), stored("basis.B", [high, rank]), wide];
  }
  const key = keyOf(seed);
  const ones = (role, rows, columns) => {
    const found = new Int8Array(rows * columns);
    for (let row = 0; row < rows; row++) {
      const words = signWords(key, role, row, columns);
      for (let p = 0; p < columns; p++) {
        found[row * columns + p] = (words[p >>> 5] >>> (p & 31)) & 1 ? 1 : -1;
      }
    }
    return found;
  };
  return [ones(Role.VERA_A, rank, wide), ones(Role.VERA_B, high, rank), wide];
}

function vera(adapter) {
  const { targets, config: { rank } } = adapter, [a, b, wide] = matrices(adapter);
  const d = dense(adapter.coefficients.get("d")), rows = unstacked(adapter, "b", "out", 1);
  return targets.map((t, n) => {
    const A = zeros(t.in, rank), B = zeros(rank, t.out), by = rows[n].data;
    for (let i = 0; i < rank; i++) {
      for (let p = 0; p < t.in; p++) A.data[p * rank + i] = a[i * wide + p] * d[n * rank + i];
      for (let o = 0; o < t.out; o++) B.data[i * t.out + o] = b[o * rank + i] * by[o];
    }
    return { low_rank: { A, B } };
  });
}

function lora(adapter) {
  const { targets, config: { rank } } = adapter;
  const a = unstacked(adapter, "A", "in", rank), b = unstacked(adapter, "B", "out", rank);
  return targets.map((t, i) => ({ low_rank: { A: transposed(a[i].data, rank, t.in), B: b[i] } }));
}

function fourierft(adapter) {
  const { targets, seed, basis, tensors, config: { n } } = adapter, grids = new Map();
  const draw = basis.kind === "peft-mt19937" ? shuffled : locations;
  const c = dense(adapter.coefficients.get("c"));
  return targets.map((t, i) => {
    const grid = `places.${t.out}x${t.in}`;
    if (!grids.has(grid)) {
      const stored = basis.kind === "stored" && take(tensors, grid, [n], "U32");
      grids.set(grid, stored || draw(seed, n, t.out * t.in));
    }
    return { delta: { D: delta(c.subarray(i * n, (i + 1) * n), grids.get(grid), t.in, t.out) } };
  });
}

/** D [wide, high]: D[b, a] is the sum of value * cos 2 pi (a j / high + b k / wide). */
function delta(values, places, wide, high) {
  const rows = Array(wide).fill(null), found = zeros(wide, high); // a row by k, most are empty
  const angles = Float64Array.from({ length: high }, (_, i) => (2 * Math.PI * i) / high);
  const cosines = angles.map(Math.cos), sines = angles.map(Math.sin);
  places.forEach((z, l) => {
    let j = Math.floor(z / wide), k = z % wide;
    if (2 * k > wide) [j, k] = [(high - j) % high, wide - k]; // the same cosine, and fewer rows
    const [re, im] = (rows[k] ??= [new Float64Array(high), new Float64Array(high)]);
    for (let a = 0; a < high; a++) {
      re[a] += values[l] * cosines[(a * j) % high];
      im[a] += values[l] * sines[(a * j) % high];
    }
  });
  transform(rows).forEach((row, b) => found.data.set(row[0], b * high));
  return found;
}

/** Row b: the sum over k of row k times e^(2 pi i b k / n). Rows are [re, im]; null is zeros. */
function transform(rows) {
  const n = rows.length, width = (rows.find(Boolean) ?? [[]])[0].length;
  if (n === 1 || !width) return rows;
  let p = 2;
  while (n % p) p++;
  const parts = Array.from({ length: p }, (_, r) => transform(rows.filter((_, k) => k % p === r)));
  return rows.map((_, b) => {
    const re = new Float64Array(width), im = new Float64Array(width);
    for (let r = 0; r < p; r++) {
      const row = parts[r][b % (n / p)], angle = (2 * Math.PI * ((b * r) % n)) / n;
      if (!row) continue;
      const [x, y] = row, c = Math.cos(angle), s = Math.sin(angle);
      for (let a = 0; a < width; a++) {
        re[a] += x[a] * c - y[a] * s;
        im[a] += x[a] * s + y[a] * c;
      }
    }
    return [re, im];
  });
}

/** Whether IA3 multiplies a target's inputs, and not its outputs. */
function isFeedforward({ feedforward = [] }, { name }) {
  return feedforward.some((ending) => `.${name}`.endsWith(`.${ending}`));
}

function ia3(adapter) {
  const { config, targets } = adapter, forward = (t) => isFeedforward(config, t);
  const of = (members, part, side) => unstacked({ ...adapter, targets: members }, part, side, 1);
  const s = of(targets.filter((t) => !forward(t)), "s", "out").values();
  const t = of(targets.filter(forward), "t", "in").values();
  return targets.map((target) => (
    forward(target) ? { input_scale: { t: t.next().value } } : { scale: { s: s.next().value } }));
}

function ssf(adapter) {
  const s = unstacked(adapter, "s", "out", 1), b = unstacked(adapter, "b", "out", 1);
  return adapter.targets.map((_, i) => ({ scale: { s: s[i] }, bias: { b: b[i] } }));
}

function bitfit(adapter) {
  const rows = unstacked(adapter, "b", "out", 1);
  return rows.map(({ data }) => ({ bias: { b: { data, dims: [data.length] } } }));
}

// What a method expands to by target: {kind of slot: {part: tensor}}, and the kinds that it fills.
const METHODS = {
  nola: { kinds: () => ["low_rank"], expand: nola },
  vera: { kinds: () => ["low_rank"], expand: vera },
  lora: { kinds: () => ["low_rank"], expand: lora },
  fourierft: { kinds: () => ["delta"], expand: fourierft },
  ia3: {
    kinds: ({ config }, t) => [isFeedforward(config, t) ? "input_scale" : "scale"],
    expand: ia3,
  },
  ssf: { kinds: () => ["scale", "bias"], expand: ssf },
  bitfit: { kinds: () => ["bias"], expand: bitfit },
  head: { kinds: () => [], expand: () => [] },
};

// Axes of a slot's parts whose size the slot fixes, rows 0 and columns 1, and what fills them up.
const KINDS = {
  low_rank: { A: { axis: 1, size: "rank" }, B: { axis: 0, size: "rank" } },
  head: {
    weight: { axis: 1, size: "out_features" },
    bias: { axis: 1, size: "out_features", fill: -Infinity },
  },
};

/** Map by target: by kind of slot, its tensors by part. */
export function expand(adapter) {
  const parts = METHODS[adapter.method].expand(adapter);
  return new Map(adapter.targets.map((t, i) => [t.name, parts[i]]));
}

/** Map by layer of the adapter's head, if it has one: weight [in, classes] and bias [classes]. */
export function expandHead(adapter) {
  const layers = adapter.head ? adapter.head.layers : [];
  return new Map(layers.map(({ name, in: wide, out, weight, bias }) =>
    [name, { weight: transposed(weight, out, wide), bias: { data: bias, dims: [out] } }]));
}

// -- the bundle: docs/bundle-format.md -----------------------------------------------------------

/**
 * {manifest, session, defaults} of a bundle.
 *
 * `ort` is the package onnxruntime-web, `options` are its session's. `read` gives a file of the
 * bundle by name, as a promise of an ArrayBuffer. `defaults` are to be fed where an adapter feeds
 * nothing, and are the base if there is none; onnx.js says why.
 */
export async function openBundle(ort, read, options = {}) {
  const manifest = JSON.parse(new TextDecoder().decode(await read("manifest.json")));
  const { graphs: [{ file }], slots, seeded, files } = manifest, externalData = [];
  const data = `${file}.data`;
  if (data in files) externalData.push({ path: data, data: new Uint8Array(await read(data)) });
  const inputs = [...slots, seeded ?? {}].flatMap((slot) => Object.values(slot.inputs ?? {}));
  const bytes = new Uint8Array(await read(file)), outside = externalData[0]?.data;
  const { model, defaults } = requireInputs(bytes, new Set(inputs), outside);
  const session = await ort.InferenceSession.create(model, { ...options, externalData });
  return { manifest, session, defaults };
}

/** What an expander and a seeded bundle take: the seed, unpacked coefficients, their scales. */
export function expanderInputs(adapter) {
  if (adapter.group || adapter.basis.kind !== "philox-sign") {
    fail("adapter must have the basis philox-sign and one scale per vector for a graph");
  }
  const found = { seed: { data: keyOf(adapter.seed), dims: [2] } };
  for (const [name, { rows, length, values, scale }] of adapter.coefficients) {
    found[name] = { data: values, dims: [rows, length] };
    found[`${name}.scale`] = { data: scale, dims: [rows] };
  }
  return found;
}

/** Why an adapter does not fit a bundle; empty if it does. */
export function mismatches(adapter, { backbone_id, seeded, slots }) {
  const found = [];
  const same = (what, wanted, got) =>
    String(wanted) === String(got) || found.push(`${what} must be ${wanted}, got ${got}`);
  same("backbone_id", backbone_id, adapter.backbone_id);
  if (adapter.extra) found.push(`extra must be folded in by a merged export, got ${adapter.extra}`);
  if (seeded) {
    same("method", seeded.method, adapter.method);
    same("layers", seeded.targets, adapter.targets.map((t) => t.name));
    same("storage", seeded.storage, adapter.storage.startsWith("int") ? "int8" : "fp32");
    for (const key in seeded.config) same(key, seeded.config[key], adapter.config[key]);
  }
  for (const t of seeded ? [] : adapter.targets) {
    for (const kind of METHODS[adapter.method].kinds(adapter, t)) {
      const slot = find(slots, t.name, kind);
      const wanted = slot ? `${slot.in_features} -> ${slot.out_features}` : `a ${kind} slot`;
      same(t.name, wanted, `${t.in} -> ${t.out}`);
      if (slot?.rank && slot.rank < adapter.config.rank) same("rank", slot.rank, adapter.config.rank);
    }
  }
  const heads = slots.filter((slot) => slot.kind === "head");
  const widths = (layers) => layers.map(([name, wide]) => `${name} (${wide} in)`).sort();
  if (adapter.head) {
    same("head", widths(heads.map((s) => [s.target, s.in_features])),
      widths(adapter.head.layers.map((l) => [l.name, l.in])));
    const classes = heads.at(-1)?.fixed ? heads.at(-1).out_features : Infinity;
    const { out } = adapter.head.layers.at(-1);
    if (out > classes) found.push(`classes must be ${classes} or fewer, got ${out}`);
  }
  return found;
}

function find(slots, target, kind) {
  return slots.find((slot) => slot.target === target && slot.kind === kind);
}

/** What to feed beside the model's inputs, by graph input: a swap is to feed something else. */
export function feeds(adapter, manifest) {
  const { format, mode, seeded, slots } = manifest;
  if (format !== 1 || mode === "merged") {
    fail(`bundle must be swappable or seeded, of format 1, got ${mode}, format ${format}`);
  }
  const reasons = mismatches(adapter, manifest);
  if (reasons.length) fail(`adapter does not fit this bundle:\n  ${reasons.join("\n  ")}`);
  const found = {};
  const put = (target, kind, parts) => {
    const slot = find(slots, target, kind);
    for (const part in parts) found[slot.inputs[part]] = withBatch(parts[part], part, slot);
  };
  if (seeded) {
    const inputs = expanderInputs(adapter);
    for (const name in inputs) found[seeded.inputs[name]] = inputs[name];
  } else {
    expand(adapter).forEach((changes, target) => {
      for (const kind in changes) put(target, kind, changes[kind]);
    });
  }
  expandHead(adapter).forEach((parts, target) => put(target, "head", parts));
  return found;
}

/**
 * As a slot takes it: n = 1 first, vectors as one row, a fixed rank filled up with zeros, and fixed
 * classes with a bias of -Infinity.
 */
function withBatch({ data, dims }, part, slot) {
  const [rows, columns] = dims.length === 1 ? [1, ...dims] : dims, sizes = [rows, columns];
  const { axis, size, fill = 0 } = KINDS[slot.kind]?.[part] ?? {};
  if (slot.fixed && slot[size]) sizes[axis] = slot[size];
  const found = zeros(1, ...sizes), [, wide] = sizes;
  if (fill) found.data.fill(fill);
  for (let r = 0; r < rows; r++) {
    found.data.set(data.subarray(r * columns, (r + 1) * columns), r * wide);
  }
  return found;
}

const TYPES = {
  Float32Array: "float32",
  Int8Array: "int8",
  Uint32Array: "uint32",
  BigInt64Array: "int64",
};

/** The same as tensors of ONNX Runtime, of the package that is given. */
export function asTensors(ort, arrays) {
  return Object.fromEntries(Object.entries(arrays).map(([name, { data, dims }]) =>
    [name, new ort.Tensor(TYPES[data.constructor.name], data, dims)]));
}
