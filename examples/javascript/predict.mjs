// Label images with an exported model and onnxruntime-node.
//
//   npm ci --ignore-scripts
//   node predict.mjs model.onnx image.jpg another.png
//
// model.labels.json, which `cnnrnn export` writes beside model.onnx, says what its outputs mean.
// With --decide threshold the labels are those whose score reaches the calibrated threshold, with
// --decide label_thresholds the one of each label; otherwise they are the most probable path.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import * as ort from "onnxruntime-node";

import { readSquare } from "./pictures.mjs";

const { values: options, positionals } = parseArgs({
  options: { decide: { type: "string", default: "path" } },
  allowPositionals: true,
});
const [model, ...files] = positionals;
const about = JSON.parse(await readFile(model.replace(/\.onnx$/i, ".labels.json"), "utf8"));
if (about.input !== "uint8") throw new Error(`${model} must take uint8 pictures, not ${about.input}`);
const { image_size: side, interpolation } = about.preprocessing;
const session = await ort.InferenceSession.create(model, { logSeverityLevel: 3 });

for (const file of files) {
  const pixels = await readSquare(file, side, interpolation);
  const images = new ort.Tensor("uint8", pixels, [1, side, side, 3]);
  const found = await session.run({ images }, ["labels", "lengths", "log_probs", "scores"]);
  const labels = decided(found, options.decide).map((label) => about.labels[label]);
  console.log(`${file} ${JSON.stringify(labels)} ${found.log_probs.data[0].toFixed(4)}`);
}

/** Return the labels of the one image, in path order. */
function decided({ labels, lengths, scores }, decide) {
  if (decide === "path") {
    return Array.from(labels.data.slice(0, Number(lengths.data[0])), Number);
  }
  const { threshold, label_thresholds: own, min_labels: least } = about.calibration;
  const cut = (label) => (decide === "threshold" ? threshold : own[label]);
  const order = [...about.labels.keys()].sort((a, b) => scores.data[b] - scores.data[a]);
  const taken = order.filter((label, rank) => rank < least || scores.data[label] >= cut(label));
  return taken.sort((a, b) => a - b);
}
