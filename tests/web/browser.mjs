// Continues a prompt with transformers.js in headless Chromium, without a network; prints as JSON the texts and the dtypes of the
// graphs.
// Arguments: the directory of the exports, Chromium's path, and the cases as JSON:
// [{model, binary (suffix of onnxruntime-web's file), device, dtype (if not the one that config.json names)}].
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { chromium } from "playwright-core";

const [exports_, executablePath, cases] = process.argv.slice(2);
const roots = { models: exports_, npm: path.join(import.meta.dirname, "node_modules") };
const types = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };

const server = http.createServer((request, response) => {
  const [, root, ...rest] = decodeURIComponent(new URL(request.url, "http://localhost").pathname).split("/");
  const file = root in roots ? path.join(roots[root], ...rest) : null;
  if (root === "") {
    response.writeHead(200, { "content-type": "text/html" }).end("<!doctype html>");
  } else if (file && fs.existsSync(file) && fs.statSync(file).isFile()) {
    response.writeHead(200, { "content-type": types[path.extname(file)] ?? "application/octet-stream" });
    fs.createReadStream(file).pipe(response);
  } else {
    response.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));

const args = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];
const browser = await chromium.launch({ executablePath, args });

/** Runs in the page. */
async function continuation({ model, binary, device, dtype }) {
  const { env, pipeline } = await import("/npm/@huggingface/transformers/dist/transformers.min.js");
  const at = `${location.origin}/npm/onnxruntime-web/dist/ort-wasm-simd-threaded${binary}`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${at}.mjs`, wasm: `${at}.wasm` };
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.localModelPath = "/models/";
  env.useBrowserCache = false;
  const generate = await pipeline("text-generation", model, { device, ...(dtype && { dtype }) });
  const [{ generated_text }] = await generate("import os", { max_new_tokens: 12, do_sample: false });
  return [generated_text, generate.model.sessions.model.config.dtype];
}

const results = [];
for (const each of JSON.parse(cases)) {
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  results.push(await page.evaluate(continuation, each).catch((error) => [`failed: ${error}`, null]));
  await page.close();
}
console.log(JSON.stringify(results));
await browser.close();
server.close();
