// Uses the page of exports in headless Chromium, with nothing but its server reachable; prints what it sees as JSON.
// Arguments: Chromium's path, a directory for screenshots, and the steps as JSON: [{url, do, …}], `do` naming a function
// below.
import path from "node:path";
import { chromium } from "playwright-core";

const [executablePath, shots, steps] = process.argv.slice(2);
const args = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];
const browser = await chromium.launch({ executablePath, args });

const ready = (page) => page.waitForFunction(() => !document.getElementById("write").disabled, null, { timeout: 120000 });
const written = (page) => page.waitForFunction(() => document.getElementById("stop").disabled, null, { timeout: 240000 });
const value = (page) => page.inputValue("#text");
const alternatives = (page) => page.$$eval("#alternatives button > span", (all) => all.map((each) => each.textContent));

async function fill(page, settings) {
  for (const [name, given] of Object.entries(settings)) {
    const isSelect = await page.$eval(`#${name}`, (element) => element instanceof HTMLSelectElement);
    if (!isSelect) await page.fill(`#${name}`, String(given));
    else if ((await page.inputValue(`#${name}`)) !== String(given)) {
      await page.selectOption(`#${name}`, String(given));
      await ready(page);
    }
  }
}

/** Write on from a prompt; returns the text. */
async function writeOn(page, prompt, settings) {
  await fill(page, settings);
  await page.fill("#text", prompt);
  await page.press("#text", "Tab");
  await written(page);
}

const actions = {
  /** The text that one continuation without chance gives. */
  async greedy(page, { prompt, length, variant, device = "wasm" }) {
    await ready(page);
    await writeOn(page, prompt, { device, variant, count: 1, temperature: 0, length });
    return { text: await value(page), isolated: await page.evaluate(() => crossOriginIsolated) };
  },

  async alternatives(page, { prompt, length, variant }) {
    await ready(page);
    await writeOn(page, prompt, { variant, count: 3, temperature: 0, length });
    const offered = await alternatives(page);
    const chosen = [];
    for (const keys of [["2"], ["ArrowDown", "ArrowDown", "Enter"], ["ArrowUp", "ArrowDown", "Space"]]) {
      for (const key of keys) await page.keyboard.press(key);
      chosen.push(await value(page), await page.evaluate(() => document.activeElement.id));
      await page.press("#text", "Escape");
      chosen.push(await value(page));
      await page.press("#text", "Tab");
      await written(page);
    }
    await page.click("#alternatives li:nth-child(3) button");
    chosen.push(await value(page));
    return { offered, chosen };
  },

  /** Stop after some tokens. */
  async stop(page, { prompt, length }) {
    await ready(page);
    await fill(page, { count: 1, temperature: 0, length });
    await page.fill("#text", prompt);
    await page.press("#text", "Tab");
    await page.waitForFunction(() => document.querySelectorAll("#alternatives button > span > span").length > 2);
    await page.keyboard.press("Escape");
    await written(page);
    return { text: await value(page) };
  },

  /** Sampled texts by seed. */
  async seeds(page, { prompt, seeds }) {
    await ready(page);
    const texts = [];
    for (const seed of seeds) {
      await writeOn(page, prompt, { count: 3, temperature: 1, top_p: 1, top_k: 0, length: 8, seed });
      texts.push(await alternatives(page));
    }
    return { texts };
  },

  /** Shades, details by keyboard and pointer, an edit in the middle, and the numbers beside the text. */
  async details(page, { prompt, length }) {
    await ready(page);
    await writeOn(page, prompt, { count: 1, temperature: 0, length });
    const whole = await value(page);
    const tokens = () => page.$$eval("#shades span", (all) => all.map((each) => each.textContent));
    const about = () => page.$eval("#details", (element) => element.innerText);
    const before = await tokens();
    await page.press("#text", "Control+Home");
    const none = await about();
    for (let i = 0; i <= prompt.length; i++) await page.press("#text", "ArrowRight");
    const keyboard = await about();
    const rows = await page.$$eval("#best tr", (all) => all.map((row) => [...row.cells].map((cell) => cell.textContent)));
    const { x, y } = await page.$eval("#shades span:last-of-type", (span) => span.getBoundingClientRect().toJSON());
    await page.mouse.move(x + 2, y + 5);
    const pointer = await about();
    await page.press("#text", "Control+Home");
    await page.keyboard.type("> ");
    const moved = await tokens();
    await page.press("#text", "End");
    const model = await page.$eval("#model", (element) => element.innerText);
    const proof = await page.$eval("#proof", (element) => element.innerText);
    const speed = await page.$eval("#speed", (element) => element.textContent);
    return { whole, before, moved, none, keyboard, pointer, rows, model, proof, speed };
  },

  /** A text longer than the context, and none. */
  async extremes(page, { word, count }) {
    await ready(page);
    await writeOn(page, word.repeat(count), { count: 1, temperature: 0, length: 4 });
    const long = await page.textContent("#message");
    await writeOn(page, "", { count: 1 });
    return { long, grown: (await value(page)).length > 0 };
  },

  /** Screenshots, and what a person with a narrow screen or a screen reader would trip over. */
  async look(page, { prompt, name, sizes, scheme }) {
    await page.emulateMedia({ colorScheme: scheme });
    await ready(page);
    await writeOn(page, prompt, { count: 1, temperature: 0, length: 24 });
    await page.press("#text", "Tab");
    await fill(page, { count: 3, temperature: 0.9, seed: 7 });
    await page.press("#text", "Tab");
    await written(page);
    const wide = [];
    for (const width of sizes) {
      await page.setViewportSize({ width, height: 900 });
      if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) wide.push(width);
      await page.screenshot({ path: path.join(shots, `${name}-${width}.png`), fullPage: true });
    }
    const unnamed = await page.$$eval("button, input, select, textarea", (all) =>
      all.filter((each) => !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).map((each) => each.id),
    );
    return { wide, unnamed };
  },

  /** What the page says when a file is missing, or another one. */
  async broken(page, { file, status, body, open }) {
    await page.route(`**/${file}*`, (route) => route.fulfill({ status, body }));
    await page.goto(open);
    await page.waitForSelector("#message.error", { timeout: 60000 });
    return { message: await page.textContent("#message"), canWrite: await page.isEnabled("#write") };
  },

  /** In a browser where a statement has run before the worker: without SIMD, or without memory. */
  async lesser(page, { open, statement }) {
    await page.route("**/worker.js", async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, body: `${statement};\n` + (await response.text()) });
    });
    return actions.broken(page, { file: "none", open });
  },
};

const results = [];
for (const step of JSON.parse(steps)) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  const [outside, problems] = [[], []];
  await context.route(
    (url) => url.protocol.startsWith("http") && url.origin !== new URL(step.url).origin,
    (route) => {
      outside.push(route.request().url());
      return route.abort();
    },
  );
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  let found;
  try {
    if (!step.open) await page.goto(step.url);
    found = await actions[step.do](page, step);
  } catch (error) {
    const message = await page.textContent("#message").catch(() => "");
    found = { failed: `${error}; the page says: ${message}` };
  }
  results.push({ ...found, outside, problems });
  await context.close();
}
console.log(JSON.stringify(results));
await browser.close();
