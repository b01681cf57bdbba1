// Audio to a graph's input, as the bundle's preprocessor_config.json says: what regrow_inputs
// computes in NumPy, with the same formulas (docs/inputs.md). For MelFeatureExtractor.

const HALF = 10, BETA = 5; // of the resampling filter: zero crossings to each side, Kaiser's beta

/** {samples: Float64Array, rate} of a .wav's bytes: PCM of 8 to 32 bits or floats; channels are averaged. */
export function readWav(buffer) {
  const view = new DataView(buffer), tag = (at) => String.fromCharCode(...new Uint8Array(buffer, at, 4));
  if (buffer.byteLength < 12 || tag(0) !== "RIFF" || tag(8) !== "WAVE") throw new Error("a clip must be a .wav file");
  let format;
  for (let at = 12; at + 8 <= buffer.byteLength;) {
    const name = tag(at), size = view.getUint32(at + 4, true), start = at + 8;
    if (name === "fmt ") {
      const kind = view.getUint16(start, true), block = view.getUint16(start + 12, true);
      format = { kind: kind === 0xfffe ? view.getUint16(start + 24, true) : kind, block,
        channels: view.getUint16(start + 2, true), rate: view.getUint32(start + 4, true) };
    }
    if (name === "data" && format) {
      if (start + size > buffer.byteLength) throw new Error("a .wav must hold the samples that its header promises");
      return { samples: samplesOf(view, start, size, format), rate: format.rate };
    }
    at = start + size + (size % 2);
  }
  throw new Error("a .wav must hold samples, got none");
}

function samplesOf(view, start, size, { kind, channels, block }) {
  const width = block / channels;
  const readers = kind === 3
    ? { 4: (at) => view.getFloat32(at, true), 8: (at) => view.getFloat64(at, true) }
    : kind === 1 ? {
      1: (at) => (view.getUint8(at) - 128) / 2 ** 7,
      2: (at) => view.getInt16(at, true) / 2 ** 15,
      3: (at) => (view.getUint16(at, true) | (view.getInt8(at + 2) << 16)) / 2 ** 23,
      4: (at) => view.getInt32(at, true) / 2 ** 31,
    } : {};
  const one = readers[width], length = Math.floor(size / block);
  if (!one || !length) throw new Error("a .wav must have samples of PCM or floats");
  return Float64Array.from({ length }, (_, i) => {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += one(start + i * block + c * width);
    return Math.fround(sum / channels);
  });
}

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

/** Bessel's I0, by its series. */
function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-17 * sum; k++) sum += (term *= (x / (2 * k)) ** 2);
  return sum;
}

/** The sound at another rate: a polyphase filter, a sinc under a Kaiser window. */
export function resample(samples, rate, wanted) {
  const common = gcd(rate, wanted), up = wanted / common, down = rate / common;
  if (up === down) return samples;
  const factor = Math.max(up, down), half = HALF * factor, taps = new Float64Array(2 * half + 1);
  for (let i = 0; i < taps.length; i++) {
    const x = (Math.PI * (i - half)) / factor, kaiser = bessel(BETA * Math.sqrt(1 - ((i - half) / half) ** 2));
    taps[i] = (x ? Math.sin(x) / x : 1) * kaiser;
  }
  const scale = up / taps.reduce((sum, tap) => sum + tap, 0);
  return Float64Array.from({ length: Math.ceil((samples.length * up) / down) }, (_, n) => {
    let sum = 0; // of samples[j] * taps[n * down - j * up + half]
    const last = Math.min(samples.length - 1, Math.floor((n * down + half) / up));
    for (let j = Math.max(0, Math.ceil((n * down - half) / up)); j <= last; j++) {
      sum += samples[j] * taps[n * down - j * up + half];
    }
    return Math.fround(sum * scale);
  });
}

const SCALES = {
  htk: [(f) => (2595 / Math.LN10) * Math.log1p(f / 700), (m) => 700 * Math.expm1((m * Math.LN10) / 2595)],
  kaldi: [(f) => 1127 * Math.log1p(f / 700), (m) => 700 * Math.expm1(m / 1127)],
  slaney: [
    (f) => (f < 1000 ? (3 * f) / 200 : 15 + (27 * Math.log(f / 1000)) / Math.log(6.4)),
    (m) => (m < 15 ? (200 * m) / 3 : 1000 * Math.exp(((m - 15) * Math.log(6.4)) / 27)),
  ],
};

/** Rows of weights, one per band. */
function triangles(s, size) {
  const [mels, hertz] = SCALES[s.mel_scale], low = mels(s.min_frequency), high = mels(s.max_frequency);
  const inMel = s.triangularize_in_mel_space;
  const ends = Array.from({ length: s.num_mel_filters + 2 }, (_, i) => {
    const end = low + (i * (high - low)) / (s.num_mel_filters + 1);
    return inMel ? end : hertz(end);
  });
  const bins = Array.from({ length: size / 2 + 1 }, (_, i) => (i * s.sampling_rate) / size).map((f) => (inMel ? mels(f) : f));
  return Array.from({ length: s.num_mel_filters }, (_, b) => {
    const [left, middle, right] = ends.slice(b, b + 3), norm = s.norm === "slaney" ? 2 / (right - left) : 1;
    return bins.map((x) => norm * Math.max(0, Math.min((x - left) / (middle - left), (right - x) / (right - middle))));
  });
}

const DEFAULTS = {
  min_frequency: 0, mel_scale: "htk", triangularize_in_mel_space: false, norm: null, power: 2, center: false,
  periodic_window: true, preemphasis: 0, remove_dc_offset: false, mel_floor: 1e-10, log_mel: "log",
  num_mfcc: null, dct_norm: "ortho", mean: 0, std: 1, num_samples: null, num_frames: null, time_last: false,
};

/**
 * What a bundle's preprocessor_config.json says, as {rate, seconds, values(samples)}: samples at that
 * rate to {data: Float32Array, dims: [1, frames, features]}; what comes after `seconds` is not heard.
 */
export function audioPreprocessor(settings) {
  const s = { ...DEFAULTS, fft_length: settings.frame_length, max_frequency: settings.sampling_rate / 2, ...settings };
  if (s.feature_extractor_type !== "MelFeatureExtractor") {
    throw new Error(`feature_extractor_type must be MelFeatureExtractor here, got ${s.feature_extractor_type}`);
  }
  if (s.fft_length % 2) throw new Error(`fft_length must be even here, got ${s.fft_length}`);
  const size = s.fft_length, length = s.frame_length, bands = triangles(s, size);
  const turn = (2 * Math.PI) / size;
  const [cosines, sines] = [Math.cos, Math.sin].map((f) => Float64Array.from({ length: size }, (_, i) => f(turn * i)));
  const steps = Math.max(s.periodic_window ? length : length - 1, 1);
  const window = Float64Array.from({ length }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / steps));
  const M = s.num_mel_filters, log = s.log_mel === "log" ? Math.log : Math.log10;
  const dct = s.num_mfcc && Array.from({ length: s.num_mfcc }, (_, m) => Float64Array.from({ length: M }, (_, b) =>
    Math.sqrt(2 / M) * Math.cos((Math.PI * m * (b + 0.5)) / M) * (m === 0 && s.dct_norm === "ortho" ? Math.SQRT1_2 : 1)));

  function features(frame) { // one frame, windowed, to bands or MFCCs
    const logs = new Float64Array(M), magnitude = new Float64Array(size / 2 + 1);
    for (let k = 0; k < magnitude.length; k++) {
      let re = 0, im = 0;
      for (let i = 0, at = 0; i < length; i++, at = (at + k) % size) {
        re += frame[i] * cosines[at];
        im += frame[i] * sines[at];
      }
      magnitude[k] = Math.hypot(re, im) ** s.power;
    }
    for (let b = 0; b < M; b++) {
      let sum = 0;
      for (let k = 0; k < magnitude.length; k++) sum += magnitude[k] * bands[b][k];
      logs[b] = log(Math.max(sum, s.mel_floor));
    }
    return dct ? dct.map((row) => row.reduce((sum, x, b) => sum + x * logs[b], 0)) : [...logs];
  }

  function frames(sound) {
    let x = Float64Array.from(sound);
    if (s.num_samples) x = Float64Array.from({ length: s.num_samples }, (_, i) => x[i] ?? 0);
    if (x.length < length) x = Float64Array.from({ length }, (_, i) => x[i] ?? 0);
    if (s.center) {
      const half = Math.floor(length / 2), n = x.length, whole = x, fold = 2 * (n - 1);
      x = Float64Array.from({ length: n + 2 * half }, (_, i) => {
        const at = (((i - half) % fold) + fold) % fold;
        return whole[at < n ? at : fold - at];
      });
    }
    const rows = [];
    for (let at = 0; at + length <= x.length; at += s.hop_length) {
      let frame = x.slice(at, at + length);
      const mean = s.remove_dc_offset ? frame.reduce((sum, y) => sum + y, 0) / length : 0;
      frame = frame.map((y) => y - mean);
      const p = s.preemphasis;
      frame = frame.map((y, i) => (y - p * frame[Math.max(i - 1, 0)]) * window[i]);
      rows.push(features(frame));
    }
    return rows;
  }

  return {
    rate: s.sampling_rate,
    seconds: s.num_samples ? s.num_samples / s.sampling_rate : Infinity,
    values(sound) {
      let rows = frames(sound);
      const width = dct ? s.num_mfcc : M;
      if (s.num_frames) rows = Array.from({ length: s.num_frames }, (_, i) => rows[i] ?? new Array(width).fill(0));
      rows = rows.map((row) => row.map((x) => (Math.fround(x) - Math.fround(s.mean)) / Math.fround(s.std)));
      const data = new Float32Array(rows.length * width);
      rows.forEach((row, t) => row.forEach((x, f) => (data[s.time_last ? f * rows.length + t : t * width + f] = x)));
      return { data, dims: s.time_last ? [1, width, rows.length] : [1, rows.length, width] };
    },
  };
}
