// The dashboard in a real Chromium, while a daemon is under load (bench/browser/load.py):
//
//   cd bench/browser && npm install && node check.mjs http://127.0.0.1:7070/ ../../docs/img ../results/browser.json TOKEN
//
// Light, dark and narrow: first paint, faults that axe-core finds, errors on the console, whether numbers on the page are
// those of /metrics, and screenshots. Then a look-up and an action, as somebody would do them. CHROMIUM names the browser.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import puppeteer from "puppeteer-core";

const [url, pictures, report, token] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const found = { screens: {}, console: [] };

async function open(width, height, scheme, bypass = false) {
  const page = await browser.newPage();
  if (bypass) await page.setBypassCSP(true); // axe is added to the page, which its policy forbids
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) found.console.push(message.text());
  });
  page.on("pageerror", (error) => found.console.push(String(error)));
  await page.setViewport({ width, height });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(url, { waitUntil: "load" });
  await wait(2500);
  return page;
}

// The page shows the latest second, so its number must lie between those of two scrapes around it.
async function compare(page) {
  return page.evaluate(async () => {
    const row = document.getElementById("namespaces").tBodies[0].rows[0];
    const digest = row.cells[2].textContent;
    const scraped = async () => {
      const text = await (await fetch("/metrics")).text();
      const line = text.split("\n").find((l) => l.startsWith("kvstore_namespace_stored_blocks_total") && l.includes(digest));
      return Number(line.split(" ").pop());
    };
    const before = await scraped();
    await new Promise((done) => setTimeout(done, 2200));
    const shown = Number(row.cells[5].textContent.replaceAll(",", ""));
    return { before, shown, after: await scraped() };
  });
}

for (const [name, width, height, scheme] of [
  ["light", 1440, 1500, "light"],
  ["dark", 1440, 1500, "dark"],
  ["narrow", 390, 1500, "light"],
]) {
  const page = await open(width, height, scheme);
  const paint = await page.evaluate(() => performance.getEntriesByType("paint").map((e) => [e.name, Math.round(e.startTime)]));
  const metrics = await compare(page);
  await page.screenshot({ path: `${pictures}/dashboard-${name}.png` });
  await page.close();
  const judged = await open(width, height, scheme, true);
  await judged.addScriptTag({ content: axe });
  const result = await judged.evaluate(() => axe.run(document));
  const faults = result.violations.map((v) => ({ id: v.id, impact: v.impact, nodes: v.nodes.length }));
  await judged.close();
  found.screens[name] = { paint: Object.fromEntries(paint), metrics, axe_faults: faults, axe_passes: result.passes.length };
}

const page = await open(1440, 1200, "light");
const errors = found.console.length;
await page.$eval("#prompt", (box, ids) => (box.value = ids), [...Array(512).fill(0), ...Array(768).fill(1003), ...Array(256).fill(5)].join(" "));
await page.click("#lookup button");
await wait(1500);
found.lookup = await page.$eval("#lookup_note", (note) => note.textContent);
await (await page.$("section#blocks")).screenshot({ path: `${pictures}/dashboard-blocks.png` });
if (token) {
  page.on("dialog", (dialog) => dialog.accept());
  await page.$eval(".acts", (box) => (box.open = true));
  await page.type("#token", token);
  await page.click("button[value=policy]");
  await wait(1000);
  found.action = await page.$eval("#acts_note", (note) => note.textContent);
}
await page.evaluate(() => document.activeElement.blur());
let stops = 0;
for (let i = 0; i < 60; i++) {
  await page.keyboard.press("Tab");
  const seen = await page.evaluate(() => document.activeElement !== document.body && document.activeElement.getBoundingClientRect().width > 0);
  stops += seen ? 1 : 0;
}
found.tab_stops = stops;
found.console_after_look_up_and_action = found.console.length - errors;
found.command = "node check.mjs URL PICTURES REPORT TOKEN";
await browser.close();
writeFileSync(report, JSON.stringify(found, null, 1) + "\n");
console.log(JSON.stringify(found, null, 1));
const bad = Object.values(found.screens).some((s) => s.axe_faults.some((f) => ["serious", "critical"].includes(f.impact)));
process.exit(bad || found.console.length > 0 ? 1 : 0);
