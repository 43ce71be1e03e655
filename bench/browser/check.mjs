// The dashboard in a real Chromium, while a daemon is under load (bench/browser/load.py):
//
//   cd bench/browser && npm install && node check.mjs http://127.0.0.1:7070/ ../../docs/img ../results/browser.json TOKEN
//
// Light, dark and narrow: first paint, faults that axe-core finds, errors on the console, whether numbers on the page are
// those of /metrics, and screenshots. Then a look-up and an action, as somebody would do them, and the page without
// JavaScript. CHROMIUM names the browser; SECTIONS a folder for a picture of each section.
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

// The page shows the latest second, so each of its numbers must lie between those of two scrapes around it.
async function compare(page) {
  return page.evaluate(async () => {
    const digest = document.getElementById("namespaces").tBodies[0].rows[0].cells[2].textContent;
    const row = (table, first) => [...document.getElementById(table).tBodies[0].rows].find((r) => r.cells[0].textContent === first);
    const events = (tier, column) => document.getElementById(`${tier}_events`).tBodies[0].rows[0].cells[column];
    const numbers = {
      "stored in the largest namespace": [
        (l) => l.startsWith("kvstore_namespace_stored_blocks_total") && l.includes(digest),
        () => document.getElementById("namespaces").tBodies[0].rows[0].cells[5],
      ],
      "leases answered": [(l) => l.startsWith('kvstore_requests_total{outcome="ok",verb="lease"}'), () => row("verbs", "lease").cells[1]],
      "host hits": [(l) => l.startsWith('kvstore_tier_events_total{event="hit",tier="host"}'), () => events("host", 0)],
      "host evicted": [(l) => l.startsWith('kvstore_tier_events_total{event="evicted",tier="host"}'), () => events("host", 4)],
      "disk stored": [(l) => l.startsWith('kvstore_tier_events_total{event="stored",tier="disk"}'), () => events("disk", 2)],
    };
    const scrape = async () => {
      const lines = (await (await fetch("/metrics")).text()).split("\n");
      return Object.fromEntries(Object.entries(numbers).map(([name, [wanted]]) => [name, Number(lines.find(wanted)?.split(" ").pop())]));
    };
    const before = await scrape();
    await new Promise((done) => setTimeout(done, 2200));
    const shown = Object.fromEntries(Object.entries(numbers).map(([name, [, cell]]) => [name, Number(cell().textContent.replaceAll(",", ""))]));
    const after = await scrape();
    return Object.fromEntries(
      Object.keys(numbers).map((name) => [
        name,
        { before: before[name], shown: shown[name], after: after[name], same: before[name] <= shown[name] && shown[name] <= after[name] },
      ]),
    );
  });
}

// The same page where scripts do not run: all tables are there, and the look-up is a form that the server answers.
async function withoutJavaScript() {
  const page = await browser.newPage();
  await page.setJavaScriptEnabled(false);
  await page.setViewport({ width: 1440, height: 1200 });
  await page.goto(url, { waitUntil: "load" });
  const text = await page.content();
  await page.type("#prompt", Array(256).fill(0).join(" "));
  await Promise.all([page.waitForNavigation(), page.click("#lookup button")]);
  const after = await page.content();
  await page.close();
  const count = (what) => (what.match(/<tbody>/g) ?? []).length;
  const found = after.slice(after.indexOf('<table id="found"'));
  return { tables: count(text), blocks_found: (found.slice(0, found.indexOf("</table>")).match(/<tr>/g) ?? []).length - 1 };
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
  if (process.env.SECTIONS) {
    await page.$$eval("details:not(.acts)", (boxes) => boxes.forEach((box) => (box.open = true)));
    for (const section of ["now", "spaces", "blocks", "readers", "quality", "trouble", "settings"])
      await (await page.$(`section#${section}`)).screenshot({ path: `${process.env.SECTIONS}/${name}-${section}.png` });
  }
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
await (await page.$("section#quality")).screenshot({ path: `${pictures}/dashboard-quality.png` });
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
found.without_javascript = await withoutJavaScript();
found.console_after_look_up_and_action = found.console.length - errors;
found.command = "node check.mjs URL PICTURES REPORT TOKEN";
await browser.close();
writeFileSync(report, JSON.stringify(found, null, 1) + "\n");
console.log(JSON.stringify(found, null, 1));
const bad = Object.values(found.screens).some(
  (s) => s.axe_faults.some((f) => ["serious", "critical"].includes(f.impact)) || Object.values(s.metrics).some((each) => !each.same),
);
process.exit(bad || found.console.length > 0 ? 1 : 0);
