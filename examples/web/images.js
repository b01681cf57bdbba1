// From an image to a model's `pixel_values`, as the bundle's preprocessor_config.json says: the
// steps of regrow_runtime's preprocess.py, and pillow's own integers where an image is resized.
//
// An image is {data, width, height, channels}: 0 to 255, row by row, channels last; 1 or 3 of them.

const sinc = (x) => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1);

function cubic(x) {
  const a = Math.abs(x);
  if (a < 1) return (1.5 * a - 2.5) * a * a + 1;
  return a < 2 ? ((-0.5 * a + 2.5) * a - 4) * a + 2 : 0;
}

// By pillow's number: how far a filter reaches, and its weight at a distance.
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, cubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)], // box
};
const BITS = 22; // of a weight, below the point

/** What each of `to` pixels takes of `from` pixels: where it starts, and weights as integers. */
function weightsOf(from, to, [reach, filter]) {
  const scale = from / to, widened = Math.max(scale, 1), support = reach * widened;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const all = Array.from({ length: end - start }, (_, n) =>
      filter((n + start - centre + 0.5) * (1 / widened)));
    const sum = all.reduce((total, weight) => total + weight, 0);
    const whole = (weight) => Math.trunc(weight * 2 ** BITS + (weight < 0 ? -0.5 : 0.5));
    return { start, weights: all.map((weight) => whole(weight / sum)) };
  });
}

/** `lines` lines of `from` numbers that lie `step` apart, each brought to `to` numbers. */
function along(data, out, lines, step, from, to, filter) {
  const taken = weightsOf(from, to, filter);
  for (let line = 0; line < lines; line++) {
    const outer = Math.floor(line / step), inner = line % step;
    taken.forEach(({ start, weights }, i) => {
      let sum = 2 ** (BITS - 1);
      weights.forEach((weight, n) => {
        sum += weight * data[(outer * from + start + n) * step + inner];
      });
      out[(outer * to + i) * step + inner] = Math.floor(sum / 2 ** BITS); // clamped by its type
    });
  }
  return out;
}

/** The image at another size, with pillow's filter `resample`, and pillow's pixels. */
export function resize(image, height, width, resample = 2) {
  const { channels } = image;
  if (image.height === height && image.width === width) return image;
  const filter = FILTERS[resample] ?? stop(`resample must be 1, 2, 3 or 4, got ${resample}`);
  const space = (high, wide) => new Uint8ClampedArray(high * wide * channels);
  let { data } = image;
  if (image.width !== width) {
    const out = space(image.height, width);
    data = along(data, out, image.height * channels, channels, image.width, width, filter);
  }
  if (image.height !== height) {
    const out = space(height, width);
    data = along(data, out, width * channels, width * channels, image.height, height, filter);
  }
  return { data, width, height, channels };
}

/** The middle of an image; black around it where it is too small. */
function crop(image, height, width) {
  const { channels } = image, data = new Uint8ClampedArray(height * width * channels);
  // What is missing is added first, the larger half before; what is over is halved, rounded down.
  const first = (has, wants) => (wants > has ? -Math.ceil((wants - has) / 2) : (has - wants) >> 1);
  const top = first(image.height, height), left = first(image.width, width);
  for (let i = 0; i < data.length; i++) {
    const c = i % channels, x = (Math.floor(i / channels) % width) + left;
    const y = Math.floor(i / channels / width) + top;
    const inside = x >= 0 && x < image.width && y >= 0 && y < image.height;
    if (inside) data[i] = image.data[(y * image.width + x) * channels + c];
  }
  return { data, width, height, channels };
}

/** Grey to RGB, or RGB to grey as pillow weighs it. */
function withChannels(image, channels) {
  const { data, width, height } = image;
  if (image.channels === channels) return image;
  const out = new Uint8ClampedArray(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    if (channels === 3) out.fill(data[i], 3 * i, 3 * i + 3);
    else {
      const [r, g, b] = data.subarray(3 * i, 3 * i + 3);
      out[i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    }
  }
  return { data: out, width, height, channels };
}

function stop(message) {
  throw new Error(`preprocessor_config.json: ${message}`);
}

const KNOWN = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"];

/**
 * Of the bundle's preprocessor_config.json and config.json: {sized, values}. `sized` brings a
 * image to the model's channels and size, `values` makes {data, dims} of it for `pixel_values`.
 */
export function preprocessor(settings, { num_channels: channels = 3 } = {}) {
  const unknown = Object.keys(settings).filter((name) =>
    name.startsWith("do_") && settings[name] && !KNOWN.includes(name));
  if (unknown.length) stop(`${unknown.join(", ")} is not known here`);
  const { size, crop_size: middle, resample, rescale_factor: factor = 1 / 255 } = settings;
  const edge = size?.shortest_edge;
  const kind = settings.image_processor_type ?? settings.feature_extractor_type ?? "";
  if (settings.do_resize && typeof size === "number" && kind.startsWith("CLIP")) {
    stop("size must be given by name, such as {\"shortest_edge\": 224}");
  }
  const pair = (one) => (typeof one === "number" ? [one, one] : [one.height, one.width]);

  function sized(image) {
    let found = withChannels(image, channels);
    if (settings.do_resize && edge) {
      const { height, width } = found;
      const longer = Math.trunc((edge * Math.max(height, width)) / Math.min(height, width));
      found = resize(found, ...(height <= width ? [edge, longer] : [longer, edge]), resample);
    } else if (settings.do_resize) found = resize(found, ...pair(size), resample);
    return settings.do_center_crop ? crop(found, ...pair(middle)) : found;
  }

  function values({ data, width, height }) {
    const { image_mean: mean, image_std: std } = settings, pixels = width * height;
    const of = (numbers, c) => Math.fround(numbers.length === 1 ? numbers[0] : numbers[c]);
    const scale = Math.fround(settings.do_rescale === false ? 1 : factor);
    const out = new Float32Array(channels * pixels);
    for (let i = 0; i < out.length; i++) {
      const c = Math.floor(i / pixels);
      out[i] = data[(i % pixels) * channels + c] * scale;
      if (settings.do_normalize) out[i] = Math.fround(out[i] - of(mean, c)) / of(std, c);
    }
    return { data: out, dims: [1, channels, height, width] };
  }

  return { sized, values };
}
