// The dashboard: asks for what has changed since what it has seen, and draws it. All text goes in as text, never as HTML.
"use strict";

const RETRY = 3000; // milliseconds
const KINDS = {
  READY: "good", COMPLETED: "good", BUSY: "busy", RUNNING: "busy", LEASED: "busy", FAILED: "bad", EXPIRED: "bad",
  ENDED: "over", CANCELLED: "over",
};
let offset = 0; // the daemon's clock less ours, in seconds
let ticking = []; // what changes by itself in the section that is being drawn: called with the daemon's time, every second
const sections = {}; // by name: what each was drawn from, and what of it changes by itself

// -- words -----------------------------------------------------------------------------------------------------------

const now = () => Date.now() / 1000 + offset;
const listed = (...parts) => parts.filter(Boolean).join("; ");
const counted = (count, one, many = one + "s") => `${count} ${count === 1 ? one : many}`;

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const pad = (number) => String(number).padStart(2, "0");
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours}:${pad(minutes)}:${pad(rest)}` : `${minutes}:${pad(rest)}`;
}

function size(bytes) {
  const unit = bytes ? Math.min(4, Math.floor(Math.log2(bytes) / 10)) : 0;
  return `${(bytes / 1024 ** unit).toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const known = (bytes) => (bytes ? size(bytes) : "");

// -- elements --------------------------------------------------------------------------------------------------------

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // strings become text nodes
  return made;
}

const element = (name, attributes, ...children) => filled(document.createElement(name), attributes, children);
const drawn = (name, attributes, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function clock(text) {
  const made = element("span", {});
  tick((time) => { made.textContent = text(time); });
  return made;
}

function tick(update) {
  update(now());
  ticking.push(update);
}

const state = (name, more = "") =>
  element("span", { class: `state ${KINDS[name] ?? "wait"}` }, name.toLowerCase(), more);

// A table; a column is [title, class]. Rows are arrays of cells, or elements that are rows already.
function table(caption, columns, rows, kind = "") {
  const head = columns.map(([title, kind]) => element("th", { scope: "col", class: kind }, title));
  const cell = (content, column) =>
    column ? element("td", { class: columns[column][1] }, content) : element("th", { scope: "row" }, content);
  const body = rows.map((row) => (Array.isArray(row) ? element("tr", {}, ...row.map(cell)) : row));
  return element(
    "table", { "aria-label": caption, class: kind }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body),
  );
}

const said = (text, kind = "empty") => element("p", { class: kind }, text);

// -- sections --------------------------------------------------------------------------------------------------------

function pools(shown) {
  if (!shown.pools.length) return [said("No pools yet: nnsight-hpc up NAME --model … starts one.")];
  const columns = [
    ["Pool", ""], ["State", "plain"], ["Serving", "number"], ["Waiting", "number"], ["Running", "number"],
    ["Time left", "number"], ["Weights", "number"], ["Free memory", "number"], ["Model", ""],
  ];
  return [table("Pools and their replicas", columns, shown.pools.flatMap(poolRows))];
}

function poolRows(pool) {
  const serves = (replica) => ["READY", "BUSY"].includes(replica.state);
  const serving = pool.replicas.filter(serves);
  const ends = serving.map((replica) => replica.ends).filter(Boolean);
  const newest = pool.replicas.at(-1);
  const row = [
    pool.name,
    serving.length ? state("READY") : newest ? state(newest.state) : "",
    `${serving.length}/${pool.desired}`, String(pool.queued), String(pool.running),
    ends.length ? clock((time) => duration(Math.max(...ends) - time)) : "",
    known((serving.at(-1) ?? newest)?.total), known(serving.at(-1)?.free), pool.model,
  ];
  const note = pool.note ? [element("tr", { class: "note" }, element("td", { colspan: 9 }, pool.note))] : [];
  return [row, ...note, ...pool.replicas.map(replicaRow)];
}

function replicaRow(replica) {
  const loads = replica.state === "LOADING" && replica.total;
  const more = loads ? ` ${size(replica.loaded)} of ${size(replica.total)}` : replica.cause && ` (${replica.cause})`;
  const left = replica.ends && replica.state !== "ENDED" ? clock((time) => duration(replica.ends - time)) : "";
  const begins = replica.begins && ["SUBMITTED", "PENDING"].includes(replica.state)
    ? clock((time) => `may start in ${duration(replica.begins - time)}`) : "";
  const words = listed(
    replica.job_id && `job ${replica.job_id}`, replica.host && `on ${replica.host}`, replica.reason,
    replica.position && `place ${replica.position} in its partition's queue`,
    replica.succeeds && `follows ${replica.succeeds}`,
  );
  const cell = (attributes, ...content) => element("td", attributes, ...content);
  return element(
    "tr", { class: "replica" }, cell({}, replica.id), cell({ class: "plain" }, state(replica.state, more)),
    cell({ colspan: 3 }), cell({ class: "number" }, left), cell({ colspan: 3 }, words, begins ? "; " : "", begins),
  );
}

const REQUESTS = [
  ["Request", "plain"], ["Kind", "plain"], ["Pool", ""], ["State", "plain"], ["For", "number"], ["Before it", "number"],
  ["May start in", "number"], ["Detail", ""],
];

function requestRow(request) {
  const over = ["COMPLETED", "FAILED", "CANCELLED", "EXPIRED"].includes(request.state);
  const since = clock((time) => duration(time - request.since) + (over ? " ago" : ""));
  const done = request.done === null ? "" : `${Math.round(100 * request.done)} % done`;
  const starts = request.starts_in === null || over ? "" : duration(request.starts_in);
  const before = request.before === null ? "" : String(request.before);
  return [request.id, request.kind, request.pool, state(request.state), since, before, starts, request.error || done];
}

// How many of those that wait are not in the list.
function rest(requests, waiting, words) {
  const more = waiting - requests.filter((request) => request.state === "QUEUED").length;
  return more > 0 ? [said(`${counted(more, "more request")} ${words}.`, "more")] : [];
}

function own({ own: requests, own_queued: waiting }) {
  if (!requests.length) return [said("You have sent no requests.")];
  return [table("My requests", REQUESTS, requests.map(requestRow)), ...rest(requests, waiting, "of yours behind these")];
}

function queue({ queued, running, owner, queue: requests, users }) {
  const all = said(`${counted(queued, "request waits", "requests wait")}, ${counted(running, "runs", "run")}.`, "more");
  if (!owner || !requests.length) return [all];
  const loads = users.map((load) => [load.user, String(load.queued), String(load.running)]);
  const rows = requests.map((request) => [request.user, ...requestRow(request)]);
  return [
    all,
    table("Users", [["User", ""], ["Waiting", "number"], ["Running", "number"]], loads, "small"),
    table("What runs and what goes next", [["User", "plain"], ...REQUESTS], rows),
    ...rest(requests, queued, "behind these"),
  ];
}

// Requests a second, in the steps of the last minutes; the newest step has not ended yet and is left out.
function throughput({ ended, step, span }) {
  const [steps, lately, minutes] = [Math.floor(span / step), Math.floor(60 / step), Math.round(span / 60)];
  const counts = new Map(ended.map(({ time, count }) => [Math.round(time / step), count]));
  const [words, top] = [element("p", { class: "more" }), element("span", {})];
  const line = drawn("polyline", {});
  const base = drawn("line", { x1: 0, x2: steps - 1, y1: 99, y2: 99 });
  const picture = drawn("svg", { viewBox: `0 0 ${steps - 1} 100`, preserveAspectRatio: "none", role: "img" }, base, line);
  tick((time) => {
    const first = Math.floor(time / step) - steps;
    const found = Array.from({ length: steps }, (_, number) => counts.get(first + number) ?? 0);
    const [most, sum] = [Math.max(...found), (some) => some.reduce((total, count) => total + count, 0)];
    line.setAttribute("points", found.map((count, n) => `${n},${99 - (97 * count) / (most || 1)}`).join(" "));
    top.textContent = most ? `top ${(most / step).toFixed(1)} requests/s` : "";
    words.textContent = `${(sum(found.slice(-lately)) / (lately * step)).toFixed(2)} requests/s in the last minute, ` +
      `${sum(found)} in the last ${minutes} minutes.`;
    picture.setAttribute("aria-label", words.textContent);
  });
  const ends = [element("span", {}, `${minutes} min ago`), top, element("span", {}, "now")];
  return [words, picture, element("div", { class: "axis" }, ...ends)];
}

// -- life ------------------------------------------------------------------------------------------------------------

const SECTIONS = {
  pools: [pools, "pools"],
  throughput: [throughput, "ended", "step", "span"],
  own: [own, "own", "own_queued"],
  queue: [queue, "queued", "running", "owner", "queue", "users"],
};

// Draws each section of which anything has changed: what somebody has marked elsewhere stays marked.
function draw(shown) {
  const { daemon } = shown;
  offset = shown.now - Date.now() / 1000;
  document.title = `${daemon.owner} on ${daemon.host}: nnsight-hpc`;
  document.getElementById("daemon").textContent =
    `Daemon of ${daemon.owner} on ${daemon.host}, version ${daemon.version}; you are ${daemon.user}`;
  for (const [name, [made, ...fields]] of Object.entries(SECTIONS)) {
    const from = JSON.stringify(fields.map((field) => shown[field]));
    if (sections[name]?.from === from) continue;
    ticking = [];
    document.getElementById(name).replaceChildren(...made(shown));
    sections[name] = { from, ticking };
  }
}

function say(words, away) {
  const link = document.getElementById("link");
  if (link.textContent !== words) link.textContent = words; // else screen readers say it again
  link.dataset.state = away ? "away" : "live";
  const main = document.querySelector("main");
  main.classList.toggle("away", away);
  main.setAttribute("aria-busy", String(away));
}

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const visible = () =>
  document.hidden ? new Promise((done) => document.addEventListener("visibilitychange", done, { once: true })) : null;

// One look; the version of what is shown then. It takes until there is news, or some seconds.
async function look(seen) {
  let answer, found;
  try {
    answer = await fetch(`state?seen=${encodeURIComponent(seen)}`);
    found = await answer.json();
  } catch { // nobody listens, or somebody else
    say("The command nnsight-hpc dashboard has ended; start it again for a new page.", true);
    await pause(RETRY);
    return seen;
  }
  if (!answer.ok) {
    say(`Away: ${found.what}. What is shown was last known; it is tried again.`, true);
    return seen;
  }
  if (found.version !== seen) draw(found);
  say("Live", false);
  return found.version;
}

async function live() {
  for (let seen = ""; ; await visible()) seen = await look(seen);
}

function tock() {
  for (const { ticking: updates } of Object.values(sections)) updates.forEach((update) => update(now()));
}

setInterval(tock, 1000);
live().catch((error) => {
  say(`This page has failed: ${error}. Load it again.`, true);
  throw error;
});
