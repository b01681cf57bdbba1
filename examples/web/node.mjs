// Runs a bundle in onnxruntime-web, here in Node, on two samples that the bundle brings along.
//
//   npm install
//   node node.mjs BUNDLE ADAPTER.safetensors ...

import { readFile } from "node:fs/promises";
import { basename, join } from "node:path";

import * as ort from "onnxruntime-web";

import { asTensors, feeds, openBundle, readAdapter, readSafetensors } from "./regrow.js";

const [, , bundle, ...adapters] = process.argv;
if (!bundle) {
  console.error("usage: node node.mjs BUNDLE ADAPTER.safetensors ...");
  process.exit(2);
}

async function bytes(path) {
  const file = await readFile(path);
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.length);
}

ort.env.wasm.numThreads = 1;
const { manifest, session, defaults } = await openBundle(ort, (name) => bytes(join(bundle, name)));
const probe = readSafetensors(await bytes(join(bundle, "probe.safetensors"))).tensors;
const inputs = asTensors(ort, Object.fromEntries(probe));

async function answer(who, slots, labels, note = "") {
  const { logits: { data, dims: [samples, classes] } } = await session.run({ ...inputs, ...slots });
  const best = Array.from({ length: samples }, (_, i) => {
    const row = data.slice(i * classes, (i + 1) * classes);
    const index = row.indexOf(Math.max(...row));
    return labels[index] ?? index;
  });
  console.log(`${who}: ${best.join(", ")}${note}`);
}

await answer("base", asTensors(ort, defaults), manifest.labels);
for (const path of adapters) {
  const start = performance.now();
  const adapter = readAdapter(await bytes(path));
  // Keep these, and swapping back to this adapter is to feed them again.
  const slots = asTensors(ort, { ...defaults, ...feeds(adapter, manifest) });
  const note = ` (read and expanded in ${(performance.now() - start).toFixed(1)} ms)`;
  const labels = adapter.head?.labels ?? manifest.labels;
  await answer(basename(path, ".safetensors"), slots, labels, note);
}
