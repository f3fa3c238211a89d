// Runs every graph of a directory as it is, and with its quantised matrices unpacked by the page's code; prints as JSON the
// logits of both, the operators of the unpacked one, and whether a limit of one byte leaves the graph as it is.
// Arguments: the directory, unpack.js, and ids as JSON.
import fs from "node:fs";
import path from "node:path";
import * as ort from "onnxruntime-web";

const [directory, module, given] = process.argv.slice(2);
const source = fs.readFileSync(module, "utf8");
const { unpacked } = await import(`data:text/javascript,${encodeURIComponent(source)}`);
ort.env.wasm.numThreads = 1;
const ids = JSON.parse(given);
const integers = (value) => new ort.Tensor("int64", BigInt64Array.from(ids, (id, i) => BigInt(value(id, i))), [1, ids.length]);

async function logits({ graph, data }) {
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData: data });
  const feeds = { input_ids: integers((id) => id), attention_mask: integers(() => 1), position_ids: integers((_, i) => i) };
  for (const { name, shape } of session.inputMetadata) {
    feeds[name] ??= new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
  }
  const { logits } = await session.run(feeds, ["logits"]);
  return Array.from(logits.data);
}

const results = {};
for (const name of fs.readdirSync(directory).filter((each) => each.endsWith(".onnx"))) {
  const bytes = (file) => new Uint8Array(fs.readFileSync(path.join(directory, file)));
  const file = `${name}_data`;
  const stored = {
    graph: bytes(name),
    data: fs.existsSync(path.join(directory, file)) ? [{ path: file, data: bytes(file) }] : [],
  };
  const { graph, data } = unpacked(stored.graph, stored.data, Infinity);
  results[name] = {
    asItIs: await logits(stored),
    unpacked: await logits({ graph, data }),
    packed: Buffer.from(graph).includes("MatMulNBits"),
    limited: unpacked(stored.graph, stored.data, 1).graph === stored.graph,
  };
}
console.log(JSON.stringify(results));
