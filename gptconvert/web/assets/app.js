// The page: text, alternatives and settings. The model runs in worker.js.

const $ = (id) => document.getElementById(id);
const text = $("text");
/** A variant larger than this, in bytes, is not the first choice; on a device with little memory, a smaller limit. */
const LARGEST = (navigator.deviceMemory ?? 8) <= 4 ? 200e6 : 400e6;
const NUMBERS = ["length", "temperature", "top_p", "top_k"];
/** Upper limits of the probabilities of the shades p0, p1 …; above the last, the next. */
const SHADES = [0.02, 0.1, 0.3, 0.7];
const DETAILS = $("token").textContent.trim();

const worker = new Worker("web/worker.js", { type: "module" });
let site;
let ready = false;
/** The tokens that the model wrote: [{from, to, p, best}], from and to being places in the text. */
let tokens = [];
/** What the text was before each continuation: [{text, tokens, caret}]. */
const earlier = [];
/** The continuations being written or chosen from: [{text, tokens}], and where they go. */
let rows = [];
let at = 0;
let writing = false;
let leaving = false; // Tab moves on, once

// ---- Start ---------------------------------------------------------------------------------------------------------

async function start() {
  const response = await fetch("web/site.json", { cache: "no-store" }).catch(() => null);
  if (!response?.ok) throw new Error("web/site.json cannot be loaded. Run gptconvert web again, and serve the directory over HTTP.");
  site = await response.json();
  $("title").textContent = document.title = `Write with ${site.model}`;
  for (const [name, value] of Object.entries(site.defaults)) $(name).value = value;
  for (const { name, size } of site.variants) $("variant").add(new Option(`${name}, ${bytes(size)}`, name));
  $("variant").value = (site.variants.find(({ size }) => size <= LARGEST) ?? smallest(site.variants)).name;
  $("libraries").textContent =
    "With " + site.libraries.packages.map(({ name, version, licence }) => `${name} ${version} (${licence})`).join(" and ") + ".";
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  $("device").querySelector("[value=webgpu]").disabled = !adapter;
  load();
}

const smallest = (variants) => variants.reduce((a, b) => (b.size < a.size ? b : a));

function load() {
  ready = false;
  say("");
  $("loading").hidden = false;
  refresh();
  worker.postMessage({ type: "load", site, base: document.baseURI, variant: $("variant").value, device: $("device").value });
}

worker.onerror = (event) => say(event.message || "web/worker.js cannot be loaded.", true);
worker.onmessage = ({ data }) => handlers[data.type](data);
const handlers = {
  progress({ loaded, total }) {
    $("progress").value = loaded / total;
    $("progress-text").textContent = `Loading ${bytes(loaded)} of ${bytes(total)}`;
  },
  ready({ variant, threads, seconds }) {
    ready = true;
    $("loading").hidden = true;
    const chosen = site.variants.find(({ name }) => name === variant);
    describe(chosen, threads, seconds);
    refresh();
    if (document.activeElement === document.body) text.focus();
  },
  token({ row, text: whole, from, p, best }) {
    rows[row].tokens.push({ from, to: whole.length, p, best });
    rows[row].text = whole;
    show(row);
  },
  done({ reasons, first, speed, read }) {
    writing = false;
    $("first").textContent = seconds(first);
    $("speed").textContent = speed ? `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens per second` : "";
    reasons.forEach((reason, row) => (rows[row].reason = reason));
    if (read) say(`The text is longer than the context: the model read its last ${read} tokens.`);
    if (!rows.some((row) => row.text)) {
      if (!reasons.includes("stopped")) say("The model ends the text here.");
      rows = [];
    }
    rows.forEach((_, row) => show(row));
    if (rows.length === 1) choose(0);
    refresh();
    if (rows.length && document.activeElement === text) focus(0);
  },
  error({ during, message }) {
    $("loading").hidden = true;
    writing = false;
    rows = [];
    say(message, true);
    if (during === "load") ready = false;
    refresh();
  },
};

// ---- Writing -------------------------------------------------------------------------------------------------------

function write() {
  if (!ready || writing || !$("settings").reportValidity()) return;
  say("");
  at = text.selectionEnd;
  rows = Array.from({ length: Number($("count").value) }, () => ({ text: "", tokens: [] }));
  writing = true;
  const given = $("seed").value;
  const seed = given === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(given);
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, Number($(name).value)]));
  worker.postMessage({ type: "write", text: text.value.slice(0, at), count: rows.length, seed, ...numbers });
  $("alternatives").replaceChildren(...rows.map((_, row) => alternative(row)));
  refresh();
}

function alternative(row) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", () => choose(row));
  item.append(button);
  return item;
}

/** Show what there is of an alternative. */
function show(row) {
  const { text: whole, tokens: parts, reason } = rows[row];
  const number = document.createElement("b");
  number.textContent = row + 1;
  const content = document.createElement("span");
  content.append(...shaded(whole, parts));
  if (reason === "end") content.append(" ∎");
  $("alternatives").children[row].firstChild.replaceChildren(number, content);
}

function focus(row) {
  $("alternatives").children[(row + rows.length) % rows.length].firstChild.focus();
}

/** Put an alternative into the text. While it is written, this stops it. */
function choose(row) {
  if (writing) return stop();
  const { text: added, tokens: parts } = rows[row];
  earlier.push({ text: text.value, tokens, caret: at });
  const whole = text.value.slice(0, at) + added + text.value.slice(at);
  const moved = ({ from, to, ...rest }, by) => ({ from: from + by, to: to + by, ...rest });
  tokens = [
    ...tokens.filter(({ to }) => to <= at),
    ...parts.map((each) => moved(each, at)),
    ...tokens.filter(({ from }) => from >= at).map((each) => moved(each, added.length)),
  ];
  rows = [];
  set(whole, at + added.length);
}

function stop() {
  worker.postMessage({ type: "stop" });
}

function back() {
  if (writing) return stop();
  if (rows.length) rows = [];
  else if (earlier.length) {
    const { text: before, tokens: parts, caret } = earlier.pop();
    tokens = parts;
    set(before, caret);
    return;
  } else leaving = true;
  text.focus();
  refresh();
}

function set(whole, caret) {
  text.value = whole;
  text.focus();
  text.setSelectionRange(caret, caret);
  text.scrollTop = caret === whole.length ? text.scrollHeight : text.scrollTop;
  refresh();
  detail();
}

/** Keep the tokens that an edit leaves as they were. */
let previous = "";
function edited() {
  const now = text.value;
  let same = 0;
  while (same < Math.min(now.length, previous.length) && now[same] === previous[same]) same++;
  let end = 0;
  const rest = Math.min(now.length, previous.length) - same;
  while (end < rest && now[now.length - 1 - end] === previous[previous.length - 1 - end]) end++;
  const by = now.length - previous.length;
  tokens = tokens.flatMap((each) => {
    if (each.to <= same) return [each];
    return each.from >= previous.length - end ? [{ ...each, from: each.from + by, to: each.to + by }] : [];
  });
  rows = [];
  refresh();
}

// ---- Display -------------------------------------------------------------------------------------------------------

function refresh() {
  previous = text.value;
  $("write").disabled = !ready || writing;
  $("stop").disabled = !writing;
  $("back").disabled = writing || (!rows.length && !earlier.length);
  $("choice").hidden = !rows.length;
  text.readOnly = writing;
  for (const name of ["variant", "device"]) $(name).disabled = writing || !site || (!ready && !$("loading").hidden);
  $("shades").replaceChildren(...shaded(text.value, tokens), "\n");
  $("shades").scrollTop = text.scrollTop;
}

/** A text as nodes, its tokens shaded by their probability. */
function shaded(whole, parts) {
  const nodes = [];
  let done = 0;
  for (const { from, to, p } of parts) {
    const span = document.createElement("span");
    span.className = shade(p);
    span.textContent = whole.slice(from, to);
    nodes.push(whole.slice(done, from), span);
    done = to;
  }
  return [...nodes, whole.slice(done)];
}

function shade(p) {
  const found = SHADES.findIndex((limit) => p < limit);
  return `p${found < 0 ? SHADES.length : found}`;
}

/** Show the token at a place of the text, by default at the cursor. */
function detail(place = text.selectionStart) {
  const index = tokens.findIndex(({ from, to }) => from < place && place <= to);
  const spans = $("shades").querySelectorAll("span");
  spans.forEach((span, i) => span.classList.toggle("current", i === index));
  $("best").hidden = index < 0;
  if (index < 0) {
    $("token").textContent = DETAILS;
    return;
  }
  const { from, to, p, best } = tokens[index];
  const name = document.createElement("code");
  name.textContent = visible(text.value.slice(from, to));
  $("token").replaceChildren(name, ` had a probability of ${percent(p)}. The most likely tokens were:`);
  $("best").tBodies[0].replaceChildren(
    ...best.map((each) => {
      const row = document.createElement("tr");
      const token = document.createElement("code");
      token.textContent = visible(each.text);
      row.insertCell().append(token);
      row.insertCell().textContent = percent(each.p);
      return row;
    }),
  );
}

/** The place of the text under the pointer; null if there is none. */
function pointed({ clientX, clientY }) {
  const spans = [...$("shades").querySelectorAll("span")];
  const inside = (box) => clientX >= box.left && clientX < box.right && clientY >= box.top && clientY < box.bottom;
  const index = spans.findIndex((span) => [...span.getClientRects()].some(inside));
  return index < 0 ? null : tokens[index].to;
}

function describe(variant, threads, loading) {
  const rows = [
    ["Size", bytes(variant.size)],
    ["Context", `${site.context} tokens`],
    ["Loaded in", seconds(loading)],
    ...(threads ? [["Threads", threads]] : []),
    ["First token", "", "first"],
  ];
  $("model").replaceChildren(
    ...rows.flatMap(([name, value, id]) => {
      const [term, description] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      description.textContent = value;
      if (id) description.id = id;
      return [term, description];
    }),
  );
  $("proof").textContent = proof(variant);
}

function proof({ name, verified }) {
  if (!verified) return "manifest.json does not record that this graph was verified.";
  const { weights, groups, max_kl } = verified;
  const checks = [
    weights && `all ${weights} weights equal the checkpoint's ${max_kl == null ? "" : "after quantisation, "}byte for byte`,
    groups && `${groups} groups of outputs are within rounding noise of the same model in float64`,
    max_kl != null &&
      `on text, its predictions differ from the checkpoint's by less than ${max_kl} nats per token (mean KL divergence)`,
  ].filter(Boolean);
  const { tool, format, repo } = site.source ?? {};
  const from = repo ?? format;
  return `${name} was verified before it was published: ${checks.join("; ")}. Converted${from ? ` from ${from}` : ""} by ${tool}.`;
}

function say(message, isError = false) {
  $("message").textContent = message;
  $("message").hidden = !message;
  $("message").classList.toggle("error", isError);
}

const visible = (token) => token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (p) => (p < 0.001 ? "below 0.1 %" : `${(100 * p).toFixed(1)} %`);
const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);
const bytes = (count) => (count < 1e6 ? `${(count / 1e3).toFixed(0)} kB` : `${(count / 1e6).toFixed(1)} MB`);

// ---- Controls ------------------------------------------------------------------------------------------------------

$("write").addEventListener("click", write);
$("stop").addEventListener("click", stop);
$("back").addEventListener("click", back);
for (const name of ["variant", "device"]) $(name).addEventListener("change", load);
$("settings").addEventListener("submit", (event) => event.preventDefault());
text.addEventListener("input", edited);
text.addEventListener("scroll", () => ($("shades").scrollTop = text.scrollTop));
text.addEventListener("keydown", (event) => {
  if (event.key === "Tab" && !event.shiftKey && !event.ctrlKey && !event.altKey && !leaving) {
    event.preventDefault();
    write();
  }
});
text.addEventListener("blur", () => (leaving = false));
text.addEventListener("pointermove", (event) => detail(pointed(event) ?? undefined));
text.addEventListener("pointerleave", () => detail());
document.addEventListener("selectionchange", () => document.activeElement === text && detail());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") back();
  else if (event.key !== "Shift") leaving = leaving && event.key === "Tab";
});
$("alternatives").addEventListener("keydown", (event) => {
  if (writing) return;
  const row = Number(event.key) - 1;
  const here = [...$("alternatives").children].findIndex((item) => item.contains(event.target));
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (row in rows) choose(row);
  else if (by) focus(here + by);
  else return;
  event.preventDefault();
});
new ResizeObserver(() => ($("shades").style.height = `${text.offsetHeight}px`)).observe(text);

start().catch((error) => say(error.message, true));
