// Loads an export and continues texts, off the page's thread. Messages in: load, write, stop. Messages out: progress,
// ready, token, done, error.

import { unpacked } from "./unpack.js";

/** Matrices up to this size are unpacked, in bytes: for speed, where there is memory for it. */
const MOST_UNPACKED = (navigator.deviceMemory ?? 8) <= 4 ? 200e6 : 1e9;
const BEST = 5; // likely tokens that are reported with each token
let site, ort, tokenizer, session, stopped;

const handlers = { load, write, stop: () => (stopped = true) };
self.onmessage = async ({ data }) => {
  try {
    await handlers[data.type](data);
  } catch (error) {
    postMessage({ type: "error", during: data.type, message: explained(error) });
  }
};

/** A message for people, of an error that people can do something about. */
function explained(error) {
  const text = String(error?.message ?? error);
  if (/memory|bad_alloc|Array buffer allocation|Invalid typed array length/i.test(text)) {
    return "There is not enough memory for this model. Choose a smaller variant, or close other tabs.";
  }
  return text;
}

// ---- Loading -------------------------------------------------------------------------------------------------------

async function load({ site: described, base, variant, device }) {
  const began = performance.now();
  await session?.release();
  session = undefined;
  site = described;
  checkBrowser();
  const { tokenizer: words, [device]: runtime } = site.libraries;
  const chosen = site.variants.find(({ name }) => name === variant);
  const progress = meter([words.module, ...Object.values(runtime), ...site.tokenizer, chosen.graph, ...chosen.data]);
  const get = (file) => fetched(new URL(file.url, base), file, progress);

  const [{ Tokenizer }, library] = await Promise.all([imported(words.module, get), imported(runtime.module, get)]);
  const [json, config] = await Promise.all(site.tokenizer.map(async (file) => JSON.parse(decoded(await get(file)))));
  tokenizer = new Tokenizer(json, config ?? {});
  ort = library;
  if (!ort.env.wasm.wasmBinary) {
    ort.env.wasm.wasmPaths = { mjs: address(await get(runtime.glue)) };
    ort.env.wasm.wasmBinary = (await get(runtime.binary)).buffer;
  }
  let graph = await get(chosen.graph);
  let data = [];
  for (const file of chosen.data) data.push({ path: file.path, data: await get(file) });
  progress.finish();
  if (device === "wasm") ({ graph, data } = unpacked(graph, data, MOST_UNPACKED));
  session = await ort.InferenceSession.create(graph, {
    executionProviders: [device],
    logSeverityLevel: 3, // errors
    externalData: data,
    ...(device === "webgpu" && { preferredOutputLocation: "gpu-buffer" }), // the cache stays there
  });
  checkGraph();
  const threads = device === "wasm" ? ort.env.wasm.numThreads || 1 : undefined;
  postMessage({ type: "ready", variant, threads, seconds: (performance.now() - began) / 1000 });
}

function checkBrowser() {
  // A module with one SIMD instruction: i32.const 0, i8x16.splat, drop.
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11];
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(Uint8Array.from(simd))) {
    throw new Error("This browser has no WebAssembly SIMD. Use a version from 2021 or later.");
  }
}

function checkGraph() {
  const unknown = session.inputNames.filter((name) => !/^(input_ids|attention_mask|position_ids|past_key_values\..*)$/.test(name));
  if (unknown.length || !session.inputNames.includes("input_ids") || !session.outputNames.includes("logits")) {
    throw new Error(`This graph does not write text: its inputs are ${session.inputNames.join(", ")}.`);
  }
}

/** Counts bytes of the files, and reports them. */
function meter(files) {
  const total = files.reduce((sum, { size }) => sum + size, 0);
  let loaded = 0;
  const report = () => postMessage({ type: "progress", loaded: Math.min(loaded, total), total });
  return {
    add(count) {
      loaded += count;
      report();
    },
    finish() {
      loaded = total;
      report();
    },
  };
}

/** The bytes of a file, which must be the ones that the page was made for. */
async function fetched(url, { size, integrity, sha256 }, progress) {
  const name = url.pathname.split("/").pop();
  const response = await fetch(url, { integrity, mode: "cors", credentials: "omit" }).catch(() => {
    const advice =
      url.origin === self.location.origin
        ? "Is the server still running? If it is, run gptconvert web again."
        : "Without a network, store the libraries beside the page: gptconvert web --runtime-from.";
    throw new Error(`${name} cannot be loaded from ${url.host}, or is not the file this page was made for. ${advice}`);
  });
  if (!response.ok) throw new Error(`${name} cannot be loaded (status ${response.status}). Is the directory complete?`);
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > size) throw damaged(name);
    bytes.set(value, at);
    at += value.length;
    progress.add(value.length);
  }
  if (at !== size || (sha256 && crypto.subtle && (await digest(bytes)) !== sha256)) throw damaged(name);
  return bytes;
}

const damaged = (name) => new Error(`${name} is not the file this page was made for. Run gptconvert web again.`);

async function digest(bytes) {
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const decoded = (bytes) => new TextDecoder().decode(bytes);
const address = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));

const modules = new Map();
async function imported(file, get) {
  if (!modules.has(file.url)) modules.set(file.url, await import(address(await get(file))));
  return modules.get(file.url);
}

// ---- Writing -------------------------------------------------------------------------------------------------------

async function write({ text, count, length, temperature, top_k, top_p, seed }) {
  const began = performance.now();
  stopped = false;
  const whole = text ? tokenizer.encode(text, { add_special_tokens: false }).ids : site.start;
  if (!whole.length) throw new Error("Write a word first.");
  const room = Math.max(1, Math.min(length, Math.floor(site.context / 2)));
  const ids = whole.slice(-(site.context - room));
  const start = tokenizer.decode(ids, DECODING);
  const rows = Array.from({ length: count }, (_, row) => ({ random: generator(seed + row), ids: [], text: "", p: 1 }));
  let cache = {};
  let logits, first;
  for (let step = 0; step < room && !stopped && rows.some(({ reason }) => !reason); step++) {
    [logits, cache] = await forward(ids, rows, step, cache);
    rows.forEach((row, i) => row.reason || advance(row, i, logits[i], step, { ids, start, temperature, top_k, top_p }));
    first ??= performance.now();
    await messages();
  }
  dispose(cache);
  const written = rows.reduce((sum, row) => sum + row.ids.length, 0);
  postMessage({
    type: "done",
    reasons: rows.map(({ reason }) => reason ?? (stopped ? "stopped" : "length")),
    first: (first - began) / 1000,
    speed: written > count ? (written - count) / ((performance.now() - first) / 1000) : null,
    read: ids.length < whole.length ? ids.length : null,
  });
}

/** Like gptconvert generate: special tokens are shown, spaces are kept. */
const DECODING = { skip_special_tokens: false, clean_up_tokenization_spaces: false };

/** Logits [V] of the next token of every row, and the new cache. */
async function forward(prompt, rows, step, cache) {
  const cached = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
  const all = rows.map((row) => [...prompt, ...row.ids]);
  const fed = cached.length && step ? all.map((ids) => ids.slice(-1)) : all;
  const [tokens, past] = [fed[0].length, all[0].length - fed[0].length];
  const integers = (size, value) =>
    new ort.Tensor("int64", BigInt64Array.from({ length: rows.length * size }, (_, i) => BigInt(value(i))), [rows.length, size]);
  const feeds = {
    input_ids: integers(tokens, (i) => fed[Math.floor(i / tokens)][i % tokens]),
    attention_mask: integers(past + tokens, () => 1),
    position_ids: integers(tokens, (i) => past + (i % tokens)),
  };
  for (const { name, type, shape } of cached) {
    const half = type === "float16";
    const empty = half ? new (globalThis.Float16Array ?? Uint16Array)(0) : new Float32Array(0);
    feeds[name] = cache[name] ?? new ort.Tensor(type, empty, [rows.length, shape[1], 0, shape[3]]);
  }
  for (const name of Object.keys(feeds)) if (!session.inputNames.includes(name)) delete feeds[name];
  const { logits, ...outputs } = await session.run(feeds);
  dispose(cache);
  const next = Object.fromEntries(cached.map(({ name }) => [name, outputs[name.replace("past_key_values", "present")]]));
  const [, seen, size] = logits.dims;
  const numbers = floats(await logits.getData());
  logits.dispose();
  const last = rows.map((_, i) => numbers.subarray((i * seen + seen - 1) * size, (i * seen + seen) * size));
  return [last, next];
}

function dispose(cache) {
  for (const tensor of Object.values(cache)) tensor.dispose();
}

/** Numbers of a tensor; those of float16 may come as bits. */
function floats(data) {
  if (data instanceof Float32Array) return data;
  if (!(data instanceof Uint16Array)) return Float32Array.from(data);
  return Float32Array.from(data, (bits) => {
    const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
    const sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}

/** Choose a row's next token, and report it. */
function advance(row, index, logits, step, { ids, start, temperature, top_k, top_p }) {
  const probabilities = softmax(logits);
  if (!Number.isFinite(probabilities[0])) throw new Error("The model computes values that are not numbers.");
  const likely = largest(probabilities, BEST);
  // Without chance, the alternatives begin with the most likely tokens.
  const token = temperature ? drawn(logits, row.random(), { temperature, top_k, top_p }) : likely[step ? 0 : index];
  if (site.stops.includes(token)) {
    row.reason = "end";
    return;
  }
  row.ids.push(token);
  row.p *= probabilities[token];
  const text = tokenizer.decode([...ids, ...row.ids], DECODING).slice(start.length);
  if (text.endsWith("\ufffd")) return; // a character whose other tokens are to come
  const best = likely.map((each) => ({ text: tokenizer.decode([each], DECODING), p: probabilities[each] }));
  postMessage({ type: "token", row: index, text, from: row.text.length, p: row.p, best });
  row.text = text;
  row.p = 1;
}

function softmax(logits, temperature = 1) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = Float64Array.from(logits, (each) => Math.exp((each - most) / temperature));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((each) => each / sum);
}

/** Indices of the largest values, the largest first; of equal ones the first. */
function largest(values, count) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (found.length === count && values[i] <= values[found[count - 1]]) continue;
    let at = found.length;
    while (at > 0 && values[found[at - 1]] < values[i]) at--;
    found.splice(at, 0, i);
    if (found.length > count) found.pop();
  }
  return found;
}

/** A token drawn with the number `chance` in [0, 1): temperature, then top-k, then top-p, as transformers applies them. */
function drawn(logits, chance, { temperature, top_k, top_p }) {
  const probabilities = softmax(logits, temperature);
  let order = top_k
    ? largest(probabilities, top_k)
    : Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
  const total = (some) => some.reduce((sum, each) => sum + probabilities[each], 0);
  let [sum, kept] = [0, 0];
  const limit = top_p * total(order);
  while (kept < order.length && (sum < limit || !kept)) sum += probabilities[order[kept++]];
  order = order.slice(0, kept);
  let rest = chance * sum;
  for (const each of order) if ((rest -= probabilities[each]) < 0) return each;
  return order[order.length - 1];
}

/** Random numbers in [0, 1) from a seed (mulberry32). */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Let messages in, such as stop. */
const messages = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
