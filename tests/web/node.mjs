// Runs every export below a directory in onnxruntime-web under Node, and writes logits.json beside its feeds.json.
// Arguments: the directory, and the module that selects the WebAssembly build.
import fs from "node:fs";
import path from "node:path";

const [root, build] = process.argv.slice(2);
const ort = await import(build);
ort.env.wasm.numThreads = 1;

const ids = ({ data, dims }) => new ort.Tensor("int64", BigInt64Array.from(data, BigInt), dims);
// An empty past: one sequence, no tokens yet; heads and head size are fixed.
const emptyPast = (shape) => shape.map((size, axis) => (axis === 0 ? 1 : typeof size === "number" ? size : 0));

for (const name of fs.readdirSync(root)) {
  const directory = path.join(root, name);
  const graph = fs.readdirSync(path.join(directory, "onnx")).find((file) => file.endsWith(".onnx"));
  const bytes = (file) => new Uint8Array(fs.readFileSync(path.join(directory, "onnx", file)));
  const session = await ort.InferenceSession.create(bytes(graph), {
    executionProviders: ["wasm"],
    externalData: [{ path: `${graph}_data`, data: bytes(`${graph}_data`) }],
  });
  const given = JSON.parse(fs.readFileSync(path.join(directory, "feeds.json"), "utf8"));
  const feeds = Object.fromEntries(Object.entries(given).map(([key, value]) => [key, ids(value)]));
  for (const input of session.inputMetadata) {
    feeds[input.name] ??= new ort.Tensor("float32", new Float32Array(0), emptyPast(input.shape));
  }
  const { logits } = await session.run(feeds, ["logits"]);
  fs.writeFileSync(path.join(directory, "logits.json"), JSON.stringify(Array.from(logits.data)));
}
