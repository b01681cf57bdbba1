// One change to an ONNX file, so that onnxruntime-web can feed a bundle's slots.
//
// A slot is a graph input with a default, which need not be fed. ONNX Runtime's Python package
// takes these as a matter of course; onnxruntime-web 1.30 only knows inputs without a default, and
// refuses to feed others ("invalid input"). So the defaults are taken out of the graph, which makes
// the inputs required, and are handed back: a run feeds them where there is no adapter.

const ARRAYS = { 1: Float32Array, 3: Int8Array, 12: Uint32Array }; // by TensorProto.data_type

/** The fields of a protobuf message: number, value, and where they start and end. */
function* fieldsOf(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const start = at, tag = varint(), wire = tag & 7;
    let value;
    if (wire === 0) value = varint();
    else {
      const size = wire === 2 ? varint() : wire === 1 ? 8 : 4;
      value = bytes.subarray(at, (at += size));
    }
    yield { number: tag >>> 3, value, start, end: at };
  }
}

const TENSOR = { DIMS: 1, TYPE: 2, NAME: 8, RAW: 9, OUTSIDE: 13 };
const text = (bytes) => new TextDecoder().decode(bytes);

/**
 * The name of a TensorProto, and its content; the exporter writes dims one by one, data raw, or
 * large data into the bytes `outside`.
 */
function tensorOf(bytes, outside) {
  const all = [...fieldsOf(bytes)];
  const values = (number) => all.filter((one) => one.number === number).map((one) => one.value);
  const place = Object.fromEntries(values(TENSOR.OUTSIDE).map((entry) =>
    [...fieldsOf(entry)].map(({ value }) => text(value)))); // of key and value
  const [raw = new Uint8Array(0)] = values(TENSOR.RAW), start = Number(place.offset);
  const Kind = ARRAYS[values(TENSOR.TYPE)[0]], dims = values(TENSOR.DIMS);
  const content = () => {
    const data = place.location ? outside.slice(start, start + Number(place.length)) : raw.slice();
    return { data: new Kind(data.buffer), dims };
  };
  return { name: text(values(TENSOR.NAME)[0]), content };
}

function varintOf(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return [...bytes, value];
}

function joined(parts) {
  const all = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

const MODEL_GRAPH = 7, GRAPH_INITIALIZER = 5;

/**
 * Takes the defaults of the inputs in `names`, a Set, out of a model's bytes; `outside` are those
 * of the file beside it.
 *
 * Returns {model, defaults}: the model in which they are required, and their arrays by name.
 */
export function requireInputs(bytes, names, outside) {
  const defaults = {};
  const kept = (graph) => [...fieldsOf(graph)].filter(({ number, value }) => {
    if (number !== GRAPH_INITIALIZER) return true;
    const { name, content } = tensorOf(value, outside);
    if (!names.has(name)) return true;
    defaults[name] = content();
    return false;
  }).map(({ start, end }) => graph.subarray(start, end));
  const parts = [...fieldsOf(bytes)].map(({ number, value, start, end }) => {
    if (number !== MODEL_GRAPH) return bytes.subarray(start, end);
    const graph = joined(kept(value));
    return joined([[(MODEL_GRAPH << 3) | 2], varintOf(graph.length), graph]);
  });
  return { model: joined(parts), defaults };
}
