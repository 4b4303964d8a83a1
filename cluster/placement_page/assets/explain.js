// Why a request went where it went, and where a prefix lies: what the dialog shows.

import { ago, count, element, facts, seconds, table } from "./parts.js";

const PARTS = ["wait_s", "load_s", "queue_s", "compute_s", "handoff_s", "crowding_s", "displaced_s"];
const number = (value, as) => ({ text: value == null ? "-" : as(value), number: true });
const words = (value) => String(value ?? "-").replaceAll("_", " ");

export function prefixFacts(prefix) {
  const lines = prefix.runs.map((run) => [
    { head: `${count(run.begin)} to ${count(run.end)}` },
    { text: run.holders.map(([worker, tier]) => `${worker} (${tier})`).join(", "), wide: true },
  ]);
  return element("div", {},
    facts([
      ["Tokens", count(prefix.num_tokens)], ["Requests lately", prefix.num_requests.toFixed(1)], ["Last", ago(prefix.age_s)],
      ["Tenant", prefix.tenant], ["Text", prefix.text], ["Name of its last block", prefix.name],
    ]),
    lines.length ? table("Who holds it now", [["Tokens"], ["Held by"]], lines) : element("p", { textContent: "Nobody holds it any more: the next request with it computes it." }));
}

export function explanation(why) {
  const told = (why.sentences || []).map((sentence) => element("li", { textContent: sentence }));
  return element("div", {},
    ...(told.length ? [element("ul", {}, ...told)] : []),
    facts([
      ["Reason", why.reason], ["State", why.state], ["Error", why.error], ["Placed by", why.placed_by], ["Decode worker", why.decode_worker],
      ["Prefill worker", why.prefill_worker || "none: the decode worker computes"], ["Prompt tokens", count(why.num_prompt_tokens || 0)],
      ["First token predicted", why.predicted_ttft_s == null ? null : seconds(why.predicted_ttft_s)],
      ["First token came after", why.ttft_s == null ? null : seconds(why.ttft_s)],
    ]),
    ...candidates(why.predicted || {}), ...runs(why.runs || []));
}

function candidates(predicted) {
  const found = predicted.candidates || [];
  if (!found.length) return [];
  const title = `What the router could choose from: ${count(predicted.num_possible || found.length)} placements, the best ones`;
  const parts = PARTS.filter((part) => found.some((one) => (one.parts || {})[part]));
  const columns = [["Decode"], ["Prefill"], ["Cost", 1], ["TTFT", 1], ...parts.map((part) => [words(part.replace(/_s$/, "")), 1]), ["Held tokens"]];
  const lines = found.map((one) => [
    { head: (one.is_chosen ? "chosen: " : "") + one.decode_worker, chosen: one.is_chosen, mono: true },
    { text: one.prefill_worker || "itself", mono: true },
    number(one.cost_s, seconds), number(one.ttft_s, seconds), ...parts.map((part) => number((one.parts || {})[part], seconds)),
    { text: tiers(one.matched_tokens) },
  ]);
  return [element("h3", { textContent: title }), table(title, columns, lines)];
}

function tiers(matched) {
  return Object.entries(matched || {}).filter(([, tokens]) => tokens).map(([tier, tokens]) => `${tier} ${count(tokens)}`).join(", ") || "none";
}

function runs(found) {
  if (!found.length) return [];
  const lines = found.map((run) => [
    { head: `${count(run.begin)} to ${count(run.end)}` }, { text: words(run.source) }, { text: run.holder || "-", mono: true },
    { text: words(run.why) + (run.missed_holder ? `, last held by ${run.missed_holder}` : ""), wide: true },
  ]);
  return [element("h3", { textContent: "Where each token's KV came from" }), table("Where each token's KV came from", [["Tokens"], ["Source"], ["Holder"], ["Why"]], lines)];
}
