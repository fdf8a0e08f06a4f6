"use strict";
// Everything that comes from the gateway is put in as text, never as markup: names are what people chose.

const REFRESH_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const text = (kind, content) => element("span", { class: kind }, content);
const count = (number) => number.toLocaleString("en");
const several = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;
const percent = (part, whole) => (whole ? `${Math.floor((100 * part) / whole)} %` : "–");

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) { bytes /= 1024; power += 1; }
  return `${power && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[power]}`;
}

function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

// Parts of a whole, side by side: [[class, share], …].
function bar(label, parts) {
  const children = [drawn("rect", { class: "ground", width: 1000, height: 8 })];
  let x = 0;
  for (const [kind, share] of parts) {
    const width = 1000 * Math.min(1, share || 0);
    children.push(drawn("rect", { class: kind, x, width, height: 8 }));
    x += width;
  }
  return drawn("svg", { class: "bar", viewBox: "0 0 1000 8", preserveAspectRatio: "none", role: "img", "aria-label": label }, ...children);
}

function jobCard(job, now) {
  const ended = job.completed + job.failed;
  const facts = [`${count(ended)} of ${count(job.total)} lines`];
  if (job.failed) facts.push(`${count(job.failed)} failed`);
  if (job.leased) facts.push(`${count(job.leased)} with agents`);
  if (job.tokens_per_s >= 1) facts.push(`${count(Math.round(job.tokens_per_s))} tokens/s`);
  if (job.ends_in_s) facts.push(`ends in ${[...new Set(job.ends_in_s.map(span))].join(" to ")}`);
  const time = job.end_s === null ? `for ${span(now - job.created_s)}` : `took ${span(job.end_s - job.created_s)}, ended ${span(now - job.end_s)} ago`;
  const card = element("div", { class: "card job", "data-job": job.id },
    element("div", { class: "row" },
      text("title", job.name || job.id), text(`state ${job.state}`, job.state), text("quiet", job.model),
      text("push num", percent(ended, job.total))),
    bar(`${ended} of ${job.total} lines`, [["done", job.completed / job.total], ["failed", job.failed / job.total], ["leased", job.leased / job.total]]),
    element("div", { class: "row quiet num" }, text("", facts.join(", ")), text("push", time)));
  if (job.waiting_reason) card.append(element("div", { class: "quiet" }, job.waiting_reason));
  return card;
}

function agentCard(agent) {
  const card = element("div", { class: "card agent", "data-agent": agent.name },
    element("div", { class: "row" }, text("title", agent.name), text("quiet push", agent.silent_s < 15 ? "here" : `silent for ${span(agent.silent_s)}`)),
    element("div", { class: "quiet" }, agent.model));
  const status = agent.status;
  if (status === null) return card;
  const used = status.pool_used_blocks / status.pool_blocks, kept = status.pool_cached_blocks / status.pool_blocks;
  card.append(
    element("div", { class: "row quiet num" }, text("", "device pool"), text("push", `${percent(status.pool_used_blocks, status.pool_blocks)} in use, ${percent(status.pool_cached_blocks, status.pool_blocks)} kept`)),
    bar("device pool", [["done", used], ["leased", kept]]));
  for (const tier of status.tiers) {
    card.append(
      element("div", { class: "row quiet num tier" }, text("", tier.name), text("push", `${size(tier.bytes)} of ${size(tier.budget_bytes)}, ${several(tier.hits, "hit")}`)),
      bar(tier.name, [["done", tier.bytes / tier.budget_bytes]]));
  }
  card.append(element("div", { class: "quiet num" },
    `${count(status.prompt_tokens)} prompt tokens, ${percent(status.reused_tokens, status.prompt_tokens)} found; ${count(status.generated_tokens)} generated`));
  return card;
}

// One line a series over the samples: {name: [value or null, …]}; null interrupts the line.
function chart(series, most, shown) {
  const names = Object.keys(series), lines = [];
  names.forEach((name, which) => {
    const values = series[name], step = 1000 / Math.max(1, values.length - 1);
    let path = "", pen = "M";
    values.forEach((value, place) => {
      if (value === null) { pen = "M"; return; }
      path += `${pen}${(place * step).toFixed(1)} ${(96 - 92 * (most ? value / most : 0)).toFixed(1)}`;
      pen = "L";
    });
    if (path) lines.push(drawn("path", { class: `s${which % 5}`, d: path }));
  });
  const grid = [4, 50, 96].map((y) => drawn("path", { class: "grid", d: `M0 ${y}L1000 ${y}` }));
  const legend = element("div", { class: "legend num" });
  names.forEach((name, which) => {
    const last = series[name].filter((value) => value !== null).pop();
    legend.append(text(`s${which % 5}`, `${name}: ${last === undefined ? "–" : shown(last)}`));
  });
  return [drawn("svg", { class: "chart", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": legend.textContent }, ...grid, ...lines), legend];
}

function history(samples) {
  byId("history").hidden = samples.length < 2;
  if (samples.length < 2) return;
  const tiers = [...new Set(samples.flatMap((sample) => [...Object.keys(sample.tier_bytes), ...Object.keys(sample.tier_hits)]))].sort();
  const of = (take) => Object.fromEntries(tiers.map((tier) => [tier, samples.map((sample) => take(sample, tier))]));
  const delivered = samples.map((sample) => Object.values(sample.tier_hits).reduce((sum, hits) => sum + hits, 0));
  const round = (value) => `${value.toFixed(1)} %`;
  const found = samples.map((sample) => (sample.prompt_tokens ? (100 * sample.reused_tokens) / sample.prompt_tokens : null));
  byId("reuse").replaceChildren(...chart({ found }, 100, round));
  const shares = Object.fromEntries(tiers.map((tier) => [tier, samples.map((sample, place) => (delivered[place] ? (100 * (sample.tier_hits[tier] || 0)) / delivered[place] : null))]));
  byId("hits").replaceChildren(...chart(shares, 100, round));
  const bytes = of((sample, tier) => sample.tier_bytes[tier] || 0);
  byId("bytes").replaceChildren(...chart(bytes, Math.max(1, ...Object.values(bytes).flat()), size));
}

function show(overview) {
  const running = overview.jobs.filter((job) => job.end_s === null).length;
  const agents = overview.agents;
  byId("summary").textContent = `${several(overview.num_jobs, "job")}, ${count(running)} under way` + (agents ? `, ${several(agents.length, "agent")}` : "");
  const jobs = overview.jobs.map((job) => jobCard(job, overview.now_s));
  byId("jobs").replaceChildren(...(jobs.length ? jobs : [text("quiet", "None yet.")]));
  const none = agents ? "None has asked for lines." : "The token of a monitor shows them.";
  byId("agents").replaceChildren(...(agents && agents.length ? agents.map(agentCard) : [text("quiet", none)]));
  history(overview.history || []);
}

let timer = 0;

async function refresh() {
  clearTimeout(timer);
  const token = sessionStorage.getItem("spillway-token");
  try {
    const answer = await fetch("/api/overview", { headers: token ? { Authorization: `Bearer ${token}` } : {}, cache: "no-store" });
    byId("entry").hidden = answer.status !== 401;
    if (answer.ok) show(await answer.json());
    else byId("summary").textContent = (await answer.json()).error.message;
  } catch (error) {
    byId("summary").textContent = `The gateway does not answer: ${error.message}`;
  }
  clearTimeout(timer);  // two may have been under way
  if (!document.hidden) timer = setTimeout(refresh, REFRESH_MS);
}

byId("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("spillway-token", byId("token").value.trim());
  byId("token").value = "";
  location.reload();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
