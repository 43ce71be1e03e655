// Keeps the page up to date. The server has already written it in full and sends each second what every element should
// say, so nothing is computed or formatted here. Data only ever becomes text or one of three attributes, never markup.

const find = (id) => document.getElementById(id);
let readouts = {};

function setText(node, text) {
  if (node && node.textContent !== text) node.textContent = text;
}

function fillRow(row, cells, heads) {
  while (row.cells.length > cells.length) row.deleteCell(-1);
  cells.forEach((text, i) => {
    const cell = row.cells[i] ?? row.insertCell();
    const head = heads[i];
    if (head && cell.dataset.label !== head.textContent) {
      cell.dataset.label = head.textContent;
      cell.className = head.className;
    }
    setText(cell, text);
  });
}

function fillTable(table, rows) {
  const body = table.tBodies[0];
  const heads = table.tHead.rows[0].cells;
  if (rows.length === 0) {
    if (body.rows.length === 1 && body.rows[0].className === "none") return;
    body.replaceChildren();
    const row = body.insertRow();
    row.className = "none";
    const cell = row.insertCell();
    cell.colSpan = heads.length;
    cell.textContent = table.dataset.empty;
    return;
  }
  if (body.rows[0]?.className === "none") body.replaceChildren();
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => fillRow(body.rows[i] ?? body.insertRow(), cells, heads));
}

function show(view) {
  if (view.boot !== document.documentElement.dataset.boot) {
    location.reload(); // another life of the daemon: its tiers and settings may differ
    return;
  }
  readouts = view.readouts;
  for (const [id, text] of Object.entries(view.text)) {
    if (!id.endsWith("_readout")) setText(find(id), text);
  }
  for (const [id, mood] of Object.entries(view.mood)) find(id)?.setAttribute("data-mood", mood);
  for (const [id, width] of Object.entries(view.bars)) find(id)?.setAttribute("width", width);
  for (const [id, path] of Object.entries(view.paths)) find(id)?.setAttribute("d", path);
  for (const [id, shown] of Object.entries(view.shown)) find(id)?.toggleAttribute("hidden", !shown);
  for (const [id, rows] of Object.entries(view.rows)) {
    const table = find(id);
    if (table) fillTable(table, rows);
  }
  plots.forEach((plot) => plot.say());
}

// A chart tells the value of one bar: the newest, or the one under the pointer or chosen with the arrow keys.
class Plot {
  constructor(node) {
    this.node = node;
    this.name = node.dataset.chart;
    this.cursor = node.querySelector(".cursor");
    const box = node.querySelector("svg").viewBox.baseVal;
    [this.width, this.height] = [box.width, box.height];
    this.chosen = null;
    node.addEventListener("pointermove", (event) => this.point(event));
    node.addEventListener("pointerleave", () => this.choose(null));
    node.addEventListener("blur", () => this.choose(null));
    node.addEventListener("keydown", (event) => this.key(event));
  }

  get lines() {
    return readouts[this.name] ?? [];
  }

  point(event) {
    const box = this.node.getBoundingClientRect();
    this.choose(Math.floor(((event.clientX - box.left) / box.width) * this.lines.length));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") this.choose(null);
    else if (event.key in steps) {
      event.preventDefault();
      this.choose((this.chosen ?? this.lines.length - 1) + steps[event.key]);
    }
  }

  choose(bar) {
    const last = this.lines.length - 1;
    this.chosen = bar === null || last < 0 ? null : Math.min(last, Math.max(0, bar));
    const x = ((this.chosen ?? 0) + 0.5) * (this.width / (last + 1));
    this.cursor.setAttribute("d", this.chosen === null ? "" : `M${x} 0V${this.height}`);
    this.say();
  }

  say() {
    const text = this.lines[this.chosen ?? this.lines.length - 1];
    if (text !== undefined) setText(find(`${this.name}_readout`), text);
  }
}

const plots = [...document.querySelectorAll("[data-chart]")].map((node) => new Plot(node));

function link(text, mood) {
  const badge = find("link");
  badge.hidden = text === "";
  badge.dataset.mood = mood;
  setText(badge, text);
}

function listen() {
  const stream = new EventSource("/v1/events");
  let patience;
  const wait = () => {
    clearTimeout(patience);
    patience = setTimeout(() => link("no news for 10 s", "warn"), 10_000);
  };
  stream.onopen = wait;
  stream.onmessage = (event) => {
    wait();
    link("", "");
    show(JSON.parse(event.data));
  };
  stream.onerror = () => {
    clearTimeout(patience);
    link("not connected, these numbers are old; trying again", "bad");
    // The browser tries again by itself, except where it was refused (too many viewers).
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
}

// -- questions and actions ---------------------------------------------------------------------------------------------

async function ask(method, path, body, token) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { method, headers, body: JSON.stringify(body) });
  const said = await answer.json();
  if (!answer.ok) throw new Error(`${said.code}: ${said.cause} ${said.remedy}`);
  return said;
}

// Without JavaScript the form is sent, and the server answers with the page and this table in it.
find("lookup").addEventListener("submit", async (event) => {
  event.preventDefault();
  const note = find("lookup_note");
  setText(note, "Looking…");
  const form = new FormData(event.target);
  const words = form.get("prompt").match(/[0-9A-Za-z-]+/g) ?? [];
  const keys = words.length > 0 && words.every((word) => word.length === 64);
  const body = keys ? { keys: words.map((word) => word.toLowerCase()) } : { tokens: words.map(Number) };
  try {
    const said = await ask("POST", "/v1/explain", { namespace: form.get("namespace"), ...body });
    fillTable(find("found"), said.rows);
    setText(note, `${said.usable} of ${said.blocks.length} blocks can be used by an engine now.`);
  } catch (error) {
    setText(note, String(error.message ?? error));
  }
});

find("acts").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = (id) => find(id).value;
  const orders = {
    drain: ["PUT", "/v1/drain", () => ({ draining: true }), "Refuse new blocks from now on?"],
    undrain: ["PUT", "/v1/drain", () => ({ draining: false }), "Take new blocks again?"],
    policy: ["PUT", "/v1/policy", () => ({ tier: value("tier"), policy: value("policy") }), "Change the policy?"],
    drop: ["POST", "/v1/drop", () => ({ namespace: value("victim") }), "Forget every block of this namespace, in every tier?"],
  };
  const [method, path, body, question] = orders[event.submitter.value];
  if (!window.confirm(question)) return;
  try {
    const said = await ask(method, path, body(), value("token"));
    setText(find("acts_note"), `Done: ${JSON.stringify(said)}`);
  } catch (error) {
    setText(find("acts_note"), String(error.message ?? error));
  }
});

listen();
