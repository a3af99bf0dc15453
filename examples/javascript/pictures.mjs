// Image files as cnnrnn reads them: upright RGB, resized to a square with Pillow's filters.

import sharp from "sharp";

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const d = Math.abs(x);
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
    },
  },
};
const FRACTION_BITS = 22; // of the weights, which Pillow has as integers

/** Return the first frame of a file as the model takes it: Uint8Array [side, side, 3]. */
export async function readSquare(file, side, interpolation) {
  let image = await readRgb(file);
  // Pillow 13 shrinks the height first where it shrinks by more than twice as much as the width.
  const heightFirst = image.height - side > 2 * Math.max(0, image.width - side);
  for (const across of [!heightFirst, heightFirst]) {
    image = resized(image, across, side, FILTERS[interpolation]);
  }
  return image.pixels;
}

/** Return upright pixels of 8 bits, transparency on white and 16-bit grey scaled. */
async function readRgb(file) {
  const image = sharp(file, { ignoreIcc: true }).autoOrient();
  const { space, channels: stored } = await image.metadata();
  const deep = space === "grey16" && stored === 1;
  const decoded = deep ? image.toColourspace("grey16").raw({ depth: "ushort" }) : image.raw();
  const { data, info } = await decoded.toBuffer({ resolveWithObject: true });
  const { width, height, channels } = info;
  const values = deep ? new Uint16Array(data.buffer, data.byteOffset, width * height) : data;
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    const alpha = channels === 4 ? values[i * 4 + 3] : 255;
    for (let c = 0; c < 3; c++) {
      const value = values[i * channels + (channels < 3 ? 0 : c)];
      pixels[i * 3 + c] = deep
        ? Math.floor((value + 128) / 257)
        : Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return { pixels, width, height };
}

/** Return an image with another width (across) or height, rounded to 8 bits. */
function resized({ pixels, width, height }, across, side, filter) {
  const size = across ? { width: side, height } : { width, height: side };
  const target = new Uint8Array(size.width * size.height * 3);
  const lines = across ? height : width;
  for (let place = 0; place < side; place++) {
    const { first, weights } = weightsOf(place, across ? width : height, side, filter);
    for (let line = 0; line < lines; line++) {
      const source = (across ? line * width + first : first * width + line) * 3;
      const step = (across ? 1 : width) * 3;
      const to = (across ? line * side + place : place * width + line) * 3;
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (FRACTION_BITS - 1);
        for (let i = 0; i < weights.length; i++) sum += weights[i] * pixels[source + i * step + c];
        target[to + c] = Math.min(255, Math.max(0, sum >> FRACTION_BITS));
      }
    }
  }
  return { pixels: target, ...size };
}

/** Return the first pixel that one place of `side` sees, and the integer weights from there on. */
function weightsOf(place, width, side, filter) {
  const scale = width / side;
  const stretch = Math.max(1, scale); // antialiasing: the filter covers what becomes one pixel
  const centre = (place + 0.5) * scale;
  const reach = filter.support * stretch;
  const first = Math.max(0, Math.trunc(centre - reach + 0.5));
  const end = Math.min(width, Math.trunc(centre + reach + 0.5));
  const weights = [];
  for (let x = first; x < end; x++) weights.push(filter.weight((x - centre + 0.5) / stretch));
  const sum = weights.reduce((a, b) => a + b, 0);
  const one = 1 << FRACTION_BITS;
  return { first, weights: weights.map((w) => Math.trunc((w / sum) * one + 0.5 * Math.sign(w))) };
}
