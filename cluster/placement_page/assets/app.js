// The placement page. Asks for cache/data every 2 s while somebody sees it; makes rates of counters from what it saw in
// the last minute. Addresses are relative, so that the page is the same at /cache of kvray and on Ray's dashboard.

import { explanation, prefixFacts } from "./explain.js";
import { ago, bytes, cell, count, element, percent, rows, seconds, shortId } from "./parts.js";

const PERIOD_MS = 2000;
const WINDOW_S = 60;
const TIMEOUT_MS = 12000;
const SOURCES = ["device", "host", "peer", "disk", "remote", "computed"];
const SOURCE_WORDS = {
  device: "device: the worker's own pool", host: "host: memory of a node cache", peer: "peer: another worker's pool",
  disk: "disk", remote: "remote store", computed: "computed anew",
};
const TIERS = ["device", "host", "disk", "remote"];
const KEY = "kvray.key";
const $ = (id) => document.getElementById(id);

let key = sessionStorage.getItem(KEY) || "";
let history = []; // [{at_s, counters: Map}], of the last minute
let seen = null; // the last document
let timer = 0;
let isAsking = false;
let hasRequests = true; // whether explanations of requests can be had

// ------------------------------------------------------------------------------------------------------------- asking

async function ask(path) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  return fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
}

async function refused(response) {
  let error = {};
  try { error = (await response.json()).error || {}; } catch { /* not one of kvray's */ }
  if (response.status === 401 && error.code === "invalid_api_key") return { wantsKey: true, words: error.message };
  if (response.status === 401 || response.status === 403) {
    return { words: error.message || "Ray's dashboard wants its token: enter it at its first page, then come back here." };
  }
  return { words: error.message || `it answered ${response.status}` };
}

async function update() {
  if (isAsking || document.visibilityState !== "visible") return;
  isAsking = true;
  clearTimeout(timer);
  try {
    const response = await ask("cache/data");
    if (response.ok) {
      show(await response.json());
      say(`Live, every ${PERIOD_MS / 1000} s`);
      await updateRequests();
    } else {
      const why = await refused(response);
      if (why.wantsKey) return wantKey(key ? "The server does not know this key." : "");
      say(`No numbers: ${why.words}`, true);
    }
  } catch (error) {
    say(error.name === "TimeoutError" ? "No numbers: it does not answer" : "No numbers: it cannot be reached", true);
  } finally {
    isAsking = false;
    if ($("login").hidden) timer = setTimeout(update, PERIOD_MS);
  }
}

function say(words, isBad = false) {
  const state = $("state");
  if (state.textContent !== words) state.textContent = words; // a live region: only what changed is read out
  state.classList.toggle("bad", isBad);
}

function wantKey(words) {
  sessionStorage.removeItem(KEY);
  key = "";
  history = [];
  seen = null;
  hasRequests = true;
  for (const body of document.querySelectorAll("tbody")) body.replaceChildren();
  $("content").hidden = $("forget").hidden = true;
  $("login").hidden = false;
  $("refusal").textContent = words;
  say("An API key is wanted");
  $("key").value = "";
  $("key").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem(KEY, key);
  $("login").hidden = true;
  $("refusal").textContent = "";
  $("main").focus();
  update();
});
$("forget").addEventListener("click", () => wantKey(""));
$("filter").addEventListener("input", () => seen && showOwners(seen));
document.addEventListener("visibilitychange", update);

// -------------------------------------------------------------------------------------------------------------- rates

function counters(document_) {
  const found = new Map();
  for (const [source, value] of Object.entries(document_.prompt_tokens)) found.set(`source ${source}`, value);
  found.set("ttft count", document_.ttft_count);
  found.set("ttft sum", document_.ttft_sum_s);
  for (const owner of document_.owners) {
    for (const [tier, one] of Object.entries(owner.tiers || {})) {
      found.set(`hits ${owner.worker_id} ${tier}`, one.hits);
      found.set(`evictions ${owner.worker_id} ${tier}`, one.evictions);
    }
    for (const [road, one] of Object.entries(owner.roads || {})) found.set(`bytes ${owner.worker_id} ${road}`, one.bytes);
  }
  return found;
}

function remember(document_) {
  history.push({ at_s: document_.made_s, counters: counters(document_) });
  while (history.length > 1 && history[0].at_s < document_.made_s - WINDOW_S) history.shift();
}

// By how much a counter grew in the last minute; null: it is not known, or it began anew.
function grown(name) {
  const first = history.find((one) => one.counters.get(name) != null);
  const now = history.at(-1).counters.get(name);
  if (now == null || !first || first === history.at(-1)) return null;
  const difference = now - first.counters.get(name);
  return difference < 0 ? null : difference;
}

// ------------------------------------------------------------------------------------------------------------ showing

function show(document_) {
  seen = document_;
  remember(document_);
  $("login").hidden = true;
  $("content").hidden = false;
  $("forget").hidden = !key;
  const whose = document_.tenant ? `, what is ${document_.tenant}'s` : "";
  $("facts").textContent = `${document_.model}${whose}, as of ${new Date(document_.made_s * 1000).toLocaleTimeString()}`;
  $("sources-section").hidden = $("transfers-section").hidden = Boolean(document_.tenant);
  if (!document_.tenant) {
    showSources(document_);
    showTransfers(document_);
  }
  showTiles(document_);
  showOwners(document_);
  showPrefixes(document_);
}

function tiles(document_) {
  const { owners } = document_;
  if (document_.tenant) {
    return ownTiers(owners).map(([tier, held, quota]) => [
      `Yours in ${tier}`, bytes(held), quota ? `of ${bytes(quota)} allowed` : "no limit of its own",
    ]);
  }
  const workers = owners.filter((owner) => owner.role !== "cache");
  const silent = owners.filter((owner) => !owner.is_answering).length;
  const found = [[
    "Workers", count(workers.length), `node caches: ${count(owners.length - workers.length)}, ${silent ? `${silent} silent` : "all answer"}`,
  ]];
  for (const tier of TIERS) {
    const those = owners.map((owner) => (owner.tiers || {})[tier]).filter(Boolean);
    if (!those.length) continue;
    const held = sum(those, (one) => one.bytes), room = sum(those, (one) => one.capacity_bytes);
    found.push([`Held in ${tier}`, bytes(held), room ? `${percent(held, room)} of ${bytes(room)}` : "no limit known"]);
  }
  const tokens = SOURCES.map((source) => grown(`source ${source}`) || 0);
  const all = tokens.reduce((a, b) => a + b, 0);
  const total = sum(Object.values(document_.prompt_tokens), (one) => one);
  found.push([
    "Prompt tokens not computed", all ? percent(all - tokens.at(-1), all) : "-",
    `last minute; ${percent(total - (document_.prompt_tokens.computed || 0), total)} in all`,
  ]);
  const answered = grown("ttft count");
  found.push(["Mean TTFT", answered ? seconds(grown("ttft sum") / answered) : "-", `${count(answered || 0)} requests in the last minute`]);
  const waits = workers.map((worker) => worker.ttft_s).filter((one) => one != null).sort((a, b) => a - b);
  found.push([
    "Predicted TTFT", waits.length ? seconds(waits[0]) : "-",
    waits.length ? `best worker; worst ${seconds(waits.at(-1))}; ${count(document_.nominal_tokens)} new tokens` : "nobody measured yet",
  ]);
  found.push(["Queue", seconds(sum(workers, (one) => one.queue_s)), `${count(sum(workers, (one) => one.waiting))} waiting, ${count(sum(workers, (one) => one.running))} running`]);
  const router = document_.counts;
  found.push(["Router", document_.has_router ? `${count(router.kvray_router_index_names || 0)} names` : "does not answer",
    document_.has_router ? `${count(router.kvray_router_workers_out_of_step || 0)} out of step` : "placing by hashing"]);
  return found;
}

function showTiles(document_) {
  const list = $("tiles");
  const wanted = tiles(document_);
  while (list.children.length > wanted.length) list.lastChild.remove();
  wanted.forEach(([name, value, more], at) => {
    const tile = list.children[at] || list.appendChild(element("div", {}, element("dt"), element("dd"), element("dd", { className: "more" })));
    [name, value, more].forEach((text, part) => cell(tile.children[part], text));
  });
}

function ownTiers(owners) {
  const found = new Map();
  for (const owner of owners) {
    for (const tiersOf of Object.values(owner.tenants || {})) {
      for (const [tier, one] of Object.entries(tiersOf)) {
        const [held, quota] = found.get(tier) || [0, 0];
        found.set(tier, [held + one.bytes, quota + (one.quota_bytes || 0)]);
      }
    }
  }
  return TIERS.filter((tier) => found.has(tier)).map((tier) => [tier, ...found.get(tier)]);
}

function showSources(document_) {
  const totals = document_.prompt_tokens;
  const all = sum(Object.values(totals), (one) => one);
  const recent = Object.fromEntries(SOURCES.map((source) => [source, grown(`source ${source}`)]));
  const allRecent = sum(Object.values(recent), (one) => one);
  const bar = $("sources-bar");
  for (const [at, source] of SOURCES.entries()) {
    const part = bar.children[at] || bar.appendChild(element("span", { className: source }));
    part.style.width = all ? `${(100 * (totals[source] || 0)) / all}%` : "0";
  }
  rows($("sources"), SOURCES, (source) => source, (source) => [
    { head: SOURCE_WORDS[source], swatch: source },
    { text: count(totals[source] || 0), number: true },
    { text: percent(totals[source] || 0, all), number: true },
    { text: recent[source] == null ? "-" : count(recent[source]), number: true },
    { text: percent(recent[source] || 0, allRecent), number: true },
  ]);
}

const OWNER_COLUMNS = [
  ["Worker"], ["Role"], ["Tier"], ["Full"], ["Blocks held", 1], ["Router believes", 1], ["Hits/min", 1],
  ["Evicted/min", 1], ["Runs", 1], ["Waits", 1], ["Queue", 1], ["TTFT", 1],
];

function head(id, columns) {
  if ($(id).children.length && $(id).dataset.columns === String(columns.length)) return;
  $(id).dataset.columns = columns.length;
  $(id).replaceChildren(element("tr", {}, ...columns.map(([text, isNumber]) => element("th", { scope: "col", className: isNumber ? "n" : "", textContent: text }))));
}

function showOwners(document_) {
  if (document_.tenant) return showOwn(document_);
  head("owners-head", OWNER_COLUMNS);
  const wanted = $("filter").value.trim().toLowerCase();
  const lines = [];
  let numShown = 0;
  const nodes = Map.groupBy(document_.owners, (owner) => owner.node);
  for (const [node, owners] of [...nodes].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const shown = owners.flatMap((owner) => ownerLines(owner)).filter((line) => !wanted || line.words.includes(wanted));
    if (!shown.length) continue;
    numShown += new Set(shown.map((line) => line.owner)).size;
    lines.push({ key: `node ${node}`, node, owners }, ...shown);
  }
  cell($("filter-count"), wanted ? `${count(numShown)} of ${count(document_.owners.length)}` : "");
  rows($("owners"), lines, (line) => line.key, (line) => (line.cells ? line.cells() : nodeCells(line)), (row, line) => row.classList.toggle("node", !line.cells));
}

function nodeCells({ node, owners }) {
  const held = TIERS.map((tier) => [tier, sum(owners, (owner) => ((owner.tiers || {})[tier] || {}).bytes)]).filter(([, one]) => one);
  return [{ head: `Node ${shortId(node)}: ${held.map(([tier, one]) => `${tier} ${bytes(one)}`).join(", ") || "nothing held"}`, title: node, span: OWNER_COLUMNS.length }];
}

function ownerLines(owner) {
  const tiersOf = TIERS.filter((tier) => (owner.tiers || {})[tier]);
  return (tiersOf.length ? tiersOf : [""]).map((tier, at) => ({
    key: `${owner.worker_id} ${tier}`,
    owner: owner.worker_id,
    words: `${owner.worker_id} ${owner.role} ${owner.node} ${tier}`.toLowerCase(),
    cells: () => ownerCells(owner, tier, at === 0),
  }));
}

function ownerCells(owner, tier, isFirst) {
  const one = (owner.tiers || {})[tier] || {};
  const isOff = owner.is_in_step === false || (one.blocks != null && one.known_blocks != null && Math.abs(one.blocks - one.known_blocks) > 0.02 * one.blocks + 16);
  const own = (value, as) => ({ text: !isFirst || value == null ? "" : as(value), number: true });
  return [
    { head: owner.worker_id, title: owner.is_answering ? "" : "does not answer", mono: true },
    { text: owner.is_answering ? owner.role : `${owner.role}, silent`, bad: !owner.is_answering },
    { text: tier },
    { gauge: one.capacity_bytes ? one.bytes / one.capacity_bytes : null, text: one.bytes == null ? "-" : one.capacity_bytes ? `${percent(one.bytes, one.capacity_bytes)} of ${bytes(one.capacity_bytes)}` : bytes(one.bytes) },
    { text: one.blocks == null ? "-" : count(one.blocks), number: true },
    { text: one.known_blocks == null ? "-" : count(one.known_blocks) + (owner.is_in_step === false ? " (behind)" : ""), number: true, bad: isOff },
    { text: optional(grown(`hits ${owner.worker_id} ${tier}`), count), number: true },
    { text: optional(grown(`evictions ${owner.worker_id} ${tier}`), count), number: true },
    own(owner.running, count), own(owner.waiting, count), own(owner.queue_s, seconds), own(owner.ttft_s, seconds),
  ];
}

function showOwn(document_) {
  head("owners-head", [["Owner"], ["Role"], ["Tier"], ["Yours", 1], ["Allowed", 1]]);
  const lines = document_.owners.flatMap((owner) => Object.values(owner.tenants || {}).flatMap((tiersOf) =>
    TIERS.filter((tier) => tiersOf[tier]).map((tier) => ({ owner, tier, one: tiersOf[tier] }))));
  rows($("owners"), lines, ({ owner, tier }) => `${owner.worker_id} ${tier}`, ({ owner, tier, one }) => [
    { head: owner.worker_id, mono: true }, { text: owner.role }, { text: tier },
    { text: bytes(one.bytes), number: true }, { text: one.quota_bytes == null ? "no limit" : bytes(one.quota_bytes), number: true },
  ]);
}

function showPrefixes(document_) {
  const hasTenants = document_.prefixes.some((prefix) => prefix.tenant) && !document_.tenant;
  head("prefixes-head", [["Prefix"], ["Requests", 1], ["Tokens", 1], ["Held now", 1], ["By"], ["Last", 1],
    ...(hasTenants ? [["Tenant"]] : []), ...(document_.has_previews ? [["Text"]] : [])]);
  rows($("prefixes"), document_.prefixes, (prefix) => prefix.name, (prefix) => [
    { head: shortId(prefix.name), action: () => whyPrefix(prefix) },
    { text: prefix.num_requests.toFixed(1), number: true },
    { text: count(prefix.num_tokens), number: true },
    { text: percent(prefix.runs.length ? prefix.runs.at(-1).end : 0, prefix.num_tokens), number: true },
    { text: holders(prefix), wide: true },
    { text: ago(prefix.age_s), number: true },
    ...(hasTenants ? [{ text: prefix.tenant || "none" }] : []),
    ...(document_.has_previews ? [{ text: prefix.text == null ? "(seen at another ingress, or too long ago)" : prefix.text, wide: true }] : []),
  ]);
  if (!document_.prefixes.length) {
    const words = document_.counts_prefixes ? "None yet: no prompt was found held."
      : document_.has_router ? "They are not counted (observability.level: off)." : "The router, which counts them, does not answer.";
    rows($("prefixes"), [words], (text) => text, (text) => [{ head: text, span: 8 }]);
  }
}

function holders(prefix) {
  const found = new Map();
  for (const run of prefix.runs) for (const [worker, tier] of run.holders) {
    const name = `${worker} (${tier})`;
    found.set(name, (found.get(name) || 0) + run.end - run.begin);
  }
  const names = [...found].sort(([, a], [, b]) => b - a).map(([name]) => name);
  return names.slice(0, 3).join(", ") + (names.length > 3 ? `, ${names.length - 3} more` : "") || "nobody";
}

function showTransfers(document_) {
  const lines = document_.owners.flatMap((owner) => Object.entries(owner.roads || {})
    .filter(([, one]) => one.bytes || one.failed).map(([road, one]) => ({ owner, road, one })));
  rows($("transfers"), lines, ({ owner, road }) => `${owner.worker_id} ${road}`, ({ owner, road, one }) => [
    { head: owner.worker_id, mono: true }, { text: road }, { text: bytes(one.bytes), number: true },
    { text: optional(grown(`bytes ${owner.worker_id} ${road}`), bytes), number: true },
    { text: one.seconds ? `${bytes(one.bytes / one.seconds)}/s` : "-", number: true },
    { text: count(one.failed), number: true, bad: one.failed > 0 },
    { text: count(owner.rejected_blocks || 0), number: true, bad: owner.rejected_blocks > 0 },
  ]);
  if (!lines.length) rows($("transfers"), ["Nothing was pulled yet."], (text) => text, (text) => [{ head: text, span: 7 }]);
}

// ------------------------------------------------------------------------------------------------ requests, and reasons

async function updateRequests() {
  if (!hasRequests) return;
  const response = await ask("v1/route?limit=20");
  hasRequests = response.status !== 404 && response.status !== 403; // else it stays so
  const note = $("requests-note");
  const requests = response.ok ? (await response.json()).routes : [];
  $("requests-table").parentElement.hidden = !requests.length;
  if (response.status === 404) cell(note, "This server keeps no explanations of requests.");
  else if (!response.ok) cell(note, `Not shown: ${(await refused(response)).words}`);
  else cell(note, requests.length ? "Newest first; the name of one opens why it went where it went." : "None yet, or none are kept (observability.explained_requests).");
  rows($("requests"), requests, (one) => `${one.request_id} ${one.began_s}`, (one) => [
    { head: shortId(one.request_id, 18), action: () => whyRequest(one.request_id), title: one.request_id },
    { text: new Date(one.began_s * 1000).toLocaleTimeString() },
    { text: count(one.num_prompt_tokens), number: true }, { text: optional(one.num_cached_tokens, count), number: true },
    { text: one.placed_by || "-" }, { text: one.decode_worker || "-" }, { text: one.prefill_worker || "-" },
    { text: optional(one.predicted_ttft_s, seconds), number: true }, { text: optional(one.ttft_s, seconds), number: true },
    { text: one.error || missed(one), bad: Boolean(one.error), wide: true },
  ]);
}

// What was computed though it might have been cached, by reason.
function missed(one) {
  const found = new Map();
  for (const run of one.runs || []) {
    if (run.why && run.why !== "prompt_end") found.set(run.why, (found.get(run.why) || 0) + run.end - run.begin);
  }
  return [...found].map(([why, tokens]) => `${count(tokens)} ${why.replaceAll("_", " ")}`).join(", ") || "-";
}

async function whyRequest(requestId) {
  open_(`Request ${requestId}`, element("p", { textContent: "Asking." }));
  $("why-body").replaceChildren(await why(requestId));
}

async function whyPrefix(prefix) {
  const last = element("div", {}, element("p", { textContent: "Asking." }));
  open_(`Prefix ${shortId(prefix.name)}`, prefixFacts(prefix), element("h3", { textContent: `The last request with it: ${prefix.last_request}` }), last);
  last.replaceChildren(await why(prefix.last_request));
}

async function why(requestId) {
  try {
    const response = await ask(`v1/route/${encodeURIComponent(requestId)}`);
    if (response.ok) return explanation(await response.json());
    const words = response.status === 404 ? "It is not kept: too many came after it, or this server keeps no explanations." : (await refused(response)).words;
    return element("p", { textContent: words });
  } catch {
    return element("p", { textContent: "It cannot be asked: the server does not answer." });
  }
}

function open_(title, ...body) {
  $("why-title").textContent = title;
  $("why-body").replaceChildren(...body);
  if (!$("why").open) $("why").showModal();
  $("why-title").focus();
}

const sum = (values, of) => values.reduce((total, one) => total + (of(one) || 0), 0);
const optional = (value, as) => (value == null ? "-" : as(value));

update();
