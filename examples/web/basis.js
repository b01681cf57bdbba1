// The seeded basis in JavaScript, as docs/basis.md has it: integers, and floats that are rounded
// once, so that it gives the bits that every other client gives. tests/vectors checks it.
//
// Seeds are strings of decimal digits: they have 64 bits, and a Number holds 53.

export const Role = { NOLA_A: 0, NOLA_B: 1, VERA_A: 2, VERA_B: 3, FOURIER: 4 };

/** The upper 32 bits of the product of two uint32; Math.imul gives the lower ones. */
function mulHigh(a, b) {
  const lowA = a & 0xffff, highA = a >>> 16, lowB = b & 0xffff, highB = b >>> 16;
  const middle = highA * lowB + ((lowA * lowB) >>> 16); // below 2^32, and so is the next sum
  return highA * highB + (middle >>> 16) + ((lowA * highB + (middle & 0xffff)) >>> 16);
}

/** Philox4x32-10: four counter words and two key words, all uint32; four words go to `out`. */
export function philox4x32(c0, c1, c2, c3, k0, k1, out = new Uint32Array(4)) {
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(0xd2511f53, c0), low0 = Math.imul(0xd2511f53, c0);
    const high1 = mulHigh(0xcd9e8d57, c2), low1 = Math.imul(0xcd9e8d57, c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
  return out;
}

/** The two key words of a seed, low word first. */
export function keyOf(seed) {
  const whole = BigInt(seed);
  return Uint32Array.of(Number(whole & 0xffffffffn), Number((whole >> 32n) & 0xffffffffn));
}

/** A basis vector as bits: sign p is bit p % 32 of word p / 32, 1 for +1 and 0 for -1. */
export function signWords(key, role, vector, entries, layer = 0) {
  const words = new Uint32Array(4 * Math.ceil(entries / 128));
  for (let at = 0; at < words.length; at += 4) {
    philox4x32(at / 4, vector, role, layer, key[0], key[1], words.subarray(at, at + 4));
  }
  return words;
}

/** Int8Array of +1 and -1: the first `entries` signs of a basis vector. */
export function signs(seed, role, vector, entries, layer = 0) {
  const words = signWords(keyOf(seed), role, vector, entries, layer);
  return Int8Array.from({ length: entries }, (_, p) => 2 * ((words[p >>> 5] >>> (p & 31)) & 1) - 1);
}

/** FourierFT's places: the first `count` different ones of a grid of `size` < 2^32. */
export function locations(seed, count, size) {
  const key = keyOf(seed), found = new Set();
  for (let block = 0; found.size < count; block++) {
    for (const word of philox4x32(block, 0, Role.FOURIER, 0, key[0], key[1])) {
      if (found.size < count) found.add(mulHigh(word, size));
    }
  }
  return [...found];
}

// What PEFT draws, for adapters that it trained.

/** MT19937, set by init_genrand with a seed's low 32 bits; each call gives the next uint32. */
export function mt19937(seed) {
  const state = new Uint32Array(624);
  state[0] = keyOf(seed)[0];
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let at = 624;
  return () => {
    if (at === 624) {
      for (at = 0; at < 624; at++) {
        const pair = (state[at] & 0x80000000) | (state[(at + 1) % 624] & 0x7fffffff);
        state[at] = state[(at + 397) % 624] ^ (pair >>> 1) ^ (pair & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let word = state[at++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  };
}

// Significant bits of a dtype, and the exponent below which it has fewer.
const PRECISION = { float32: [24, -126], bfloat16: [8, -126], float16: [11, -14] };

function rounded(value, [bits, lowest]) {
  if (value === 0) return value;
  const step = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(value))), lowest) - bits + 1);
  return (value / step + 1.5 * 2 ** 52 - 1.5 * 2 ** 52) * step; // ties to even
}

/** VeRA's A [rank, wide] and B [high, rank], Float32Arrays. */
export function uniformKaiming(seed, rank, wide, high, dtype) {
  const word = mt19937(seed);
  const matrix = (rows, fan) => {
    const h = Math.fround(Math.sqrt(3) * (Math.sqrt(2) / Math.sqrt(fan)));
    return Float32Array.from({ length: rows * fan }, () => {
      const entry = Math.fround((word() & 0xffffff) * 2 ** -24 * (2 * h) - h);
      return rounded(entry, PRECISION[dtype]);
    });
  };
  return [matrix(rank, wide), matrix(high, rank)];
}

/** FourierFT's places: the first `count` numbers of a shuffle of 0 ... size - 1. */
export function shuffled(seed, count, size) {
  if (size >= 214748364) {
    throw new RangeError(`PEFT's grid must be below 214748364 places here, got ${size}`);
  }
  const word = mt19937(seed), moved = new Map();
  return Array.from({ length: count }, (_, i) => {
    const place = i + (word() % (size - i)), found = moved.get(place) ?? place;
    moved.set(place, moved.get(i) ?? i);
    return found;
  });
}
