// Runs modules in headless Chromium, without a network, and prints as JSON what each writes to the console, or its error.
// Arguments: a directory of directories, each with snippet.mjs and models/, and Chromium's path.
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { chromium } from "playwright-core";

const [root, executablePath] = process.argv.slice(2);
const npm = path.join(import.meta.dirname, "node_modules");
const types = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
// The page finds the library by name, as with a bundler, and its WebAssembly beside it instead of on a public server.
const page = `<!doctype html>
<script type="importmap">
  { "imports": { "@huggingface/transformers": "/npm/@huggingface/transformers/dist/transformers.min.js" } }
</script>
<script type="module">
  import { env } from "@huggingface/transformers";
  const at = location.origin + "/npm/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify";
  env.backends.onnx.wasm.wasmPaths = { mjs: at + ".mjs", wasm: at + ".wasm" };
  let written = [];
  console.log = (...values) => written.push(...values);
  window.run = async (name) => {
    written = [];
    history.replaceState(null, "", "/" + name + "/"); // relative addresses start here
    await import("/" + name + "/snippet.mjs");
    return { written };
  };
</script>`;

const server = http.createServer((request, response) => {
  const [, first, ...rest] = decodeURIComponent(new URL(request.url, "http://localhost").pathname).split("/");
  const file = first === "npm" ? path.join(npm, ...rest) : path.join(root, first, ...rest);
  if (!first) {
    response.writeHead(200, { "content-type": "text/html" }).end(page);
  } else if (fs.existsSync(file) && fs.statSync(file).isFile()) {
    response.writeHead(200, { "content-type": types[path.extname(file)] ?? "application/octet-stream" });
    fs.createReadStream(file).pipe(response);
  } else {
    response.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

const tab = await browser.newPage();
await tab.goto(`http://127.0.0.1:${server.address().port}/`);
await tab.waitForFunction(() => window.run !== undefined);
const results = {};
for (const name of fs.readdirSync(root)) {
  results[name] = await tab.evaluate((name) => window.run(name), name).catch((error) => ({ error: String(error) }));
}
console.log(JSON.stringify(results));
await browser.close();
server.close();
