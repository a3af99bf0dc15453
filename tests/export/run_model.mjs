// Runs models in onnxruntime-node for the tests. Standard input is a list of {file, feed}, a tensor
// is {type, dims, data} with its bytes in base64, and standard output has the outputs of each.

import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const require = createRequire(new URL("../../examples/javascript/package.json", import.meta.url));
const ort = require("onnxruntime-node");
const ARRAYS = { uint8: Uint8Array, int8: Int8Array, float32: Float32Array, int64: BigInt64Array };

const sessions = {};
const answers = [];
for (const { file, feed } of JSON.parse(await text(process.stdin))) {
  sessions[file] ??= await ort.InferenceSession.create(file, { logSeverityLevel: 3 });
  const tensors = mapped(feed, ({ type, dims, data }) => {
    const bytes = new Uint8Array(Buffer.from(data, "base64"));
    return new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
  });
  const found = await sessions[file].run(tensors);
  answers.push(mapped(found, ({ type, dims, data }) => {
    const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
    return { type, dims, data: bytes.toString("base64") };
  }));
}
console.log(JSON.stringify(answers));

function mapped(object, change) {
  return Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
}
