// What is asked when, and what is made of the answers. Everything shown is an answer of this sidecar's admin port, the
// same as its commands give; nothing is kept but what is chosen (in the address, so that it can be sent to somebody).

import {Asking, Refused} from "./ask.js";
import {Chart, bar, equations, fullness, legend, lines, stacked} from "./charts.js";
import {
  BUCKETS, NOTHING, brief, command, decimal, el, exact, fill, moment, name, number, plural, plus, seconds, share, shown,
  spaced, sum, table, today, visible, whole, word,
} from "./text.js";

const EVERY_MS = 5000; // between two looks; nothing new costs a few hundred bytes
const SUMS_REST = 20; // times as long as sums took to be read they are not asked for again: a page takes a twentieth of a core
const SLOWEST_MS = 60000; // where nobody answers
const STALE_MS = 20000; // from then on it is said that what is shown is old
const COLORS = 7; // told apart at a glance; the others are one
const REST = 8; // the colour of those others
const PARKED_SHOWN = 20; // of each backend and reason
const SIDECARS_SHOWN = 5; // of those that share a limit
const GROUPS_SHOWN = 12; // of these, with what is in them; of others it is said how many they are
const BALANCED = ["delivered", "duplicate", "parked", "pending", "skipped"];

const MEASURES = {
  cost_usd: {label: "cost", title: "Cost in US dollars", unit: "$"},
  calls: {label: "calls", title: "Calls", unit: ""},
  total_tokens: {label: "tokens", title: "Tokens", unit: ""},
  input_tokens: {label: "input tokens", title: "Input tokens", unit: ""},
  output_tokens: {label: "output tokens", title: "Output tokens", unit: ""},
  errors: {label: "errors", title: "Errors", unit: ""},
  response_bytes: {label: "response bytes", title: "Response bytes", unit: ""},
};
const PERIODS = {
  "1d": {label: "24 hours", days: 1}, "7d": {label: "7 days", days: 7}, "30d": {label: "30 days", days: 30},
  "90d": {label: "90 days", days: 90}, "365d": {label: "365 days", days: 365}, between: {label: "days from … until …"},
};
const GROUPS = ["model", "subscriber", "provider", "route", "status"];
const DEFAULTS = {
  measure: "cost_usd", period: "7d", bucket: "", stack: "model", zone: "UTC", top: "subscriber", n: "10", from: "", to: "",
  status: "", calls: "20", text: "",
};
const TIMES_MIN = 7; // days of the times, at least and at most
const TIMES_MAX = 31;
const HOUR_DAYS_MAX = 8; // of single hours: more bars than that are a wall

const $ = (id) => document.getElementById(id);
const asking = new Asking();
const here = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
const chart = new Chart($("chart"), $("chart-readout"));
const errors = new Chart($("errors"), $("errors-readout"));
const times = new Chart($("times"), $("times-readout"));
const balancePicture = new Chart($("balance-picture"), el("p"));
const colors = new Map(); // dimension -> value -> colour: what has a colour keeps it

let view = {...DEFAULTS, where: []};
let dimensions = []; // names of `SIDECAR_DIMENSIONS` that calls were seen to have
let last = {}; // what each part was drawn from
let running = false;
let again = false; // asked for while asking
let timer = 0;
let failures = 0;
let sumsAt = 0; // when sums are asked for again, where what is chosen stays
let goodAt = null; // when everything was answered
let paused = false;
let balance = null;
let backends = [];

// --- what is chosen ---------------------------------------------------------------------------------------------------

function read() {
  const found = new URLSearchParams(location.hash.slice(1));
  view = {...DEFAULTS, where: found.getAll("where").filter((one) => one.includes("="))};
  for (const key of Object.keys(DEFAULTS)) if (found.has(key)) view[key] = found.get(key).slice(0, 200);
  if (!MEASURES[view.measure]) view.measure = DEFAULTS.measure;
  if (!PERIODS[view.period]) view.period = DEFAULTS.period;
  if (!["UTC", here].includes(view.zone)) view.zone = "UTC";
  if (!["", "hour", "day", "month"].includes(view.bucket)) view.bucket = "";
  if (!["10", "25", "50", "100"].includes(view.n)) view.n = DEFAULTS.n;
  if (!["20", "100", "500"].includes(view.calls)) view.calls = DEFAULTS.calls;
}

function choose(changes) {
  Object.assign(view, changes);
  const kept = new URLSearchParams();
  for (const [key, value] of Object.entries(DEFAULTS)) if (view[key] !== value) kept.set(key, view[key]);
  for (const one of view.where) kept.append("where", one);
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname);
  last = {};
  controls();
  look();
}

const only = (dimension, value) => choose({where: [...new Set([...view.where, `${dimension}=${value}`])]});

// The first moment of a day in a zone, in UTC. Twice, because the offset may be another one over there.
function midnight(day, zone) {
  let at = Date.parse(`${day}T00:00Z`);
  if (Number.isNaN(at)) return null;
  const wanted = at;
  for (let i = 0; i < 2; i++) {
    const parts = Object.fromEntries(new Intl.DateTimeFormat("en-CA", {
      timeZone: zone, year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", hourCycle: "h23",
    }).formatToParts(new Date(at)).map((one) => [one.type, one.value]));
    at += wanted - Date.parse(`${parts.year}-${parts.month}-${parts.day}T${parts.hour}:${parts.minute}Z`);
  }
  return new Date(at);
}

// -> {since, until, days}: whole days of the zone, or the last 24 hours as they are kept.
function range() {
  if (view.period === "between") {
    const from = midnight(view.from || today(view.zone, 6), view.zone);
    const to = view.to ? midnight(view.to, view.zone) : null;
    const until = to === null ? null : new Date(to.getTime() + 86400e3);
    const days = Math.max(1, Math.round(((until ?? Date.now()) - from) / 86400e3));
    return {since: from ?? midnight(today(view.zone), view.zone), until, days};
  }
  const {days} = PERIODS[view.period];
  if (days === 1) return {since: new Date(Math.floor(Date.now() / 3600e3) * 3600e3 - 23 * 3600e3), until: null, days};
  return {since: midnight(today(view.zone, days - 1), view.zone), until: null, days};
}

function bucketOf(days) {
  if (view.bucket === "hour" && days > HOUR_DAYS_MAX) return "day";
  return view.bucket || (days === 1 ? "hour" : "day");
}

const stamp = (at) => at.toISOString().slice(0, 16) + "Z";

function usagePath(by, more = {}) {
  const {since, until} = range();
  const asked = new URLSearchParams({by, since: stamp(since)});
  if (until) asked.set("until", stamp(until));
  if (view.zone !== "UTC") asked.set("timezone", view.zone);
  for (const one of [...view.where, ...(more.where ?? [])]) asked.append("where", one);
  for (const [key, value] of Object.entries(more)) if (key !== "where") asked.set(key, value);
  return `/usage?${asked}`;
}

const rowsOf = (value) => (Array.isArray(value) ? value : value.rows ?? value.usage ?? value.records ?? value.parked ?? []);

// --- the controls -------------------------------------------------------------------------------------------------------

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, said]) => el("option", {value}, said)));
  select.value = chosen;
}

function controls() {
  const groups = [...GROUPS, ...dimensions.filter((one) => !GROUPS.includes(one))];
  for (const one of [view.stack, view.top]) if (one && !groups.includes(one)) groups.push(one);
  const {days} = range();
  const buckets = [["hour", "hour"], ["day", "day"], ["month", "month"]].filter(([one]) => one !== "hour" || days <= HOUR_DAYS_MAX);
  options($("measure"), Object.entries(MEASURES).map(([key, one]) => [key, one.label]), view.measure);
  options($("period"), Object.entries(PERIODS).map(([key, one]) => [key, one.label]), view.period);
  options($("bucket"), buckets, bucketOf(days));
  options($("stack"), [...groups.map((one) => [one, visible(one)]), ["", "nothing"]], view.stack);
  options($("top-by"), groups.map((one) => [one, visible(one)]), view.top);
  options($("top-n"), ["10", "25", "50", "100"].map((one) => [one, one]), view.n);
  options($("zone"), here === "UTC" ? [["UTC", "UTC"]] : [["UTC", "UTC"], [here, here]], view.zone);
  options($("records-n"), ["20", "100", "500"].map((one) => [one, one]), view.calls);
  options($("records-status"), [["", "any"], ["2", "2xx"], ["3", "3xx"], ["4", "4xx"], ["5", "5xx"], ["none", "none"]], view.status);
  $("between").hidden = view.period !== "between";
  $("from").value = view.from;
  $("to").value = view.to;
  if (document.activeElement !== $("records-text")) $("records-text").value = view.text;
  $("filters").hidden = !view.where.length;
  fill($("filters"), view.where.map((one) => {
    const [dimension, value] = [one.slice(0, one.indexOf("=")), one.slice(one.indexOf("=") + 1)];
    return el("li", null, `${visible(dimension)} is `, name(value), el("button", {
      type: "button", class: "plain", "data-key": one, "aria-label": `Not only ${visible(value)}`,
      onclick: () => choose({where: view.where.filter((other) => other !== one)}),
    }, "×"));
  }));
}

function wire() {
  const on = (id, key) => $(id).addEventListener("change", (event) => choose({[key]: event.target.value}));
  on("measure", "measure"); on("bucket", "bucket"); on("stack", "stack"); on("zone", "zone"); on("top-by", "top");
  on("top-n", "n"); on("from", "from"); on("to", "to"); on("records-n", "calls"); on("records-status", "status");
  $("period").addEventListener("change", (event) => choose({period: event.target.value, bucket: ""}));
  $("records-text").addEventListener("input", (event) => choose({text: event.target.value}));
  document.querySelectorAll("form.query").forEach((one) => one.addEventListener("submit", (event) => event.preventDefault()));
  $("again").addEventListener("click", () => { sumsAt = 0; look(); });
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").setAttribute("aria-pressed", String(paused));
    if (paused) clearTimeout(timer); else look();
    freshness();
  });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    asking.token = $("token").value.trim();
    $("token").value = "";
    look();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) look(); else clearTimeout(timer); });
  addEventListener("hashchange", () => { read(); last = {}; controls(); look(); });
  setInterval(freshness, 1000);
}

// --- asking -----------------------------------------------------------------------------------------------------------

// One look at everything. Parts are asked for at once; each says for itself what is wrong with it.
async function look() {
  clearTimeout(timer);
  if (running) { again = true; return; }
  running = true;
  // What is known at once first: the sums of a long time must not keep it waiting, since few are read for at a time.
  const ends = await Promise.all([
    part(null, state), part("balance", drawBalance), part("lanes", drawLanes), part("parked", drawParked), part("limits", drawLimits),
    part("records", drawRecords), part("faults", drawTimes),
  ]);
  if (Date.now() >= sumsAt || last.usage === undefined || last.top === undefined) {
    const began = Date.now();
    ends.push(...await Promise.all([part("usage", drawUsage), part("top", drawTop)]));
    sumsAt = Date.now() + SUMS_REST * (Date.now() - began);
  }
  running = false;
  const unreached = ends.filter((one) => one === "gone").length;
  failures = unreached ? failures + 1 : 0;
  if (!unreached) goodAt = Date.now();
  if (ends.includes("token")) needToken();
  else if (!ends.includes("wrong")) $("token-form").hidden = true;
  if (unreached === ends.length) showState("gone", "does not answer");
  freshness();
  document.documentElement.dataset.looks = String(Number(document.documentElement.dataset.looks ?? 0) + 1);
  if (again) { again = false; look(); return; }
  if (!paused && !document.hidden) timer = setTimeout(look, wait());
}

// Longer with each failure, and not all pages at one moment.
const wait = () => Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.min(failures, 6)) * (failures ? 0.75 + Math.random() / 2 : 1);

async function part(id, draw) {
  const place = id && $(`${id}-wrong`);
  try {
    await draw();
    if (place) place.hidden = true;
    return "good";
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return "token";
    const gone = !(error instanceof Refused) && (error instanceof TypeError || error.name === "TimeoutError");
    if (place && !(gone && failures < 2)) {
      const none = error.status === 404; // nothing was recorded yet: no fault
      place.textContent = gone ? "Not answered: what is shown is old." : `${none ? "Nothing to show yet" : "Cannot be shown"}: ${visible(error.message)}`;
      place.className = none ? "quiet" : "wrong";
      place.hidden = false;
    }
    if (!gone && !(error instanceof Refused)) reportError(error);
    return gone ? "gone" : "wrong";
  }
}

function needToken() {
  const form = $("token-form");
  $("token-why").textContent = asking.token ? "This is not the token." : "";
  if (form.hidden) { form.hidden = false; $("token").focus(); }
  asking.token = null;
}

// Whether a part has to be drawn: something was said that is new, or something else was asked for.
function changed(key, ...answers) {
  const fresh = answers.some((one) => one.fresh) || last[key] === undefined;
  last[key] = true;
  return fresh;
}

function freshness() {
  const age = goodAt === null ? null : Date.now() - goodAt;
  const place = $("fresh");
  const stale = age !== null && age > STALE_MS && !paused;
  const said = age === null ? (failures ? "no answer yet; asking again" : "asking …")
    : paused ? `paused; as of ${seconds(Math.round(age / 1000))} ago`
    : stale ? `stale: no answer for ${seconds(Math.round(age / 1000))}; asking again` : "up to date";
  // Said only when it changes: a screen reader would read it each second.
  if (place.textContent !== said && (!stale || Math.round(age / 1000) % 10 === 0 || !place.classList.contains("stale"))) {
    place.textContent = said;
  }
  place.classList.toggle("stale", stale || (age === null && failures > 0));
}

// --- how it is ----------------------------------------------------------------------------------------------------------

function showState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

async function state() {
  const answer = await asking.ask("/readyz", {also: [503]});
  if (!changed("state", answer)) return;
  const {status, notes, backends: how, version} = answer.value;
  $("version").textContent = version ?? "";
  backends = how;
  last.backends = undefined;
  showState(status, {
    ok: "ok", stopping: "stopping: it takes no new calls and finishes what is open", degraded: "degraded", full: "full",
  }[status] ?? status);
  $("notes").hidden = !notes.length;
  fill($("notes"), notes.map((one) => el("p", null, visible(one))));
  drawBackends();
}

// --- who uses what --------------------------------------------------------------------------------------------------------

function colorOf(dimension, value, taken) {
  if (!colors.has(dimension)) colors.set(dimension, new Map());
  const known = colors.get(dimension);
  let color = known.get(value);
  if (color === undefined || taken.has(color)) {
    color = [...Array(COLORS + 1).keys()].find((one) => !taken.has(one) && ![...known.values()].includes(one));
    color ??= [...Array(COLORS + 1).keys()].find((one) => !taken.has(one));
    known.set(value, color);
  }
  taken.add(color);
  return color;
}

async function drawUsage() {
  const {since, until, days} = range();
  const bucket = bucketOf(days);
  const by = view.stack;
  const answer = await asking.ask(usagePath(by ? `${bucket},${by}` : bucket, by ? {sort: view.measure, top: String(COLORS)} : {}));
  if (!changed("usage", answer)) return;
  const all = rowsOf(answer.value);
  const measure = MEASURES[view.measure];
  const kind = BUCKETS[bucket];
  const ends = [kind.place(bucket === "hour" ? since.toISOString() : dayOf(since)),
    until ? kind.place(bucket === "hour" ? new Date(until - 1).toISOString() : dayOf(new Date(until - 1))) : kind.now(view.zone)];
  for (const row of all) ends.push(kind.place(row[bucket]));
  const [first, final] = [Math.min(...ends), Math.max(...ends)];
  const places = Array.from({length: final - first + 1}, (_, i) => first + i);
  const labels = places.map((one) => kind.label(one, view.zone));

  const sums = places.map(() => null);
  for (const row of all) add(sums, kind.place(row[bucket]) - first, row[view.measure]);
  const series = stack(all, bucket, kind, first, places.length, sums);
  const total = sum(all, view.measure);
  const title = `${measure.title} by ${bucket}${view.stack ? `, stacked by ${visible(view.stack)}` : ""}`;
  $("chart-title").textContent = `${title}, ${view.zone}`;
  const sentence = `${title}: ${labels[0]} to ${labels[labels.length - 1]}, ${shown(total && number(total), measure.unit)} in all`;
  chart.show(sentence, stacked({
    title: sentence, labels, unit: measure.unit,
    series: series.map((one) => ({...one, values: one.values.map(number)})),
    say: (i) => [el("b", null, labels[i]), el("span", null, `${shown(sums[i] && number(sums[i]), measure.unit)}`),
      ...(view.stack ? series.filter((one) => one.values[i]).map((one) =>
        el("span", null, one.name(), ` ${shown(number(one.values[i]), measure.unit)}`)) : [])],
  }));
  legend($("legend"), view.stack ? series.map((one) => ({
    color: one.color, name: one.name(), key: `legend-${one.value}`, plain: one.rest, value: one.value ?? "",
    said: shown(one.total && number(one.total), measure.unit),
  })) : [], (one) => only(view.stack, one.value));
  fill($("chart-table"), table(`${title}, ${view.zone}`, [
    {title: bucket, head: true, cell: (i) => (i < 0 ? "total" : labels[i])},
    ...(view.stack ? series.map((one) => ({
      title: one.name(), number: true, cell: (i) => spaced(exact(i < 0 ? one.total : one.values[i])),
    })) : []),
    {title: "all", number: true, cell: (i) => spaced(exact(i < 0 ? total : sums[i]))},
  ], places.map((_, i) => i), -1));
  tiles(all);
  drawErrors(all, bucket, kind, first, labels);
}

const dayOf = (at) => new Intl.DateTimeFormat("en-CA", {timeZone: view.zone, year: "numeric", month: "2-digit", day: "2-digit"}).format(at);

function add(values, at, value) {
  if (value !== null && value !== undefined && at >= 0 && at < values.length) values[at] = plus(values[at], decimal(value));
}

// The greatest values of the stacked dimension, each with its values over time; all others came as one.
function stack(rows, bucket, kind, first, count, sums) {
  const by = view.stack;
  if (!by) return [{value: "", rest: true, name: () => "all", color: 0, values: sums, total: null}];
  const found = new Map();
  for (const row of rows) {
    const rest = row.others !== null && row.others !== undefined;
    const key = rest ? REST : JSON.stringify(row[by]);
    if (!found.has(key)) {
      found.set(key, {
        value: row[by], rest, name: () => (rest ? "all others" : label(by, row)), values: Array(count).fill(null), total: null,
      });
    }
    const one = found.get(key);
    const value = row[view.measure];
    add(one.values, kind.place(row[bucket]) - first, value);
    if (value !== null) one.total = plus(one.total, decimal(value));
  }
  const order = [...found.values()].filter((one) => one.total !== null && one.total.digits !== 0n)
    .sort((a, b) => a.rest - b.rest || number(b.total) - number(a.total));
  const taken = new Set();
  for (const one of order) one.color = one.rest ? REST : colorOf(by, one.value, taken);
  return order;
}

// A subscriber may have a name beside its id.
function label(by, row) {
  const called = by === "subscriber" ? row.name : null;
  return called ? name(called) : name(row[by], by === "status" ? "none" : "not known");
}

function tiles(rows) {
  const total = (column) => sum(rows, column);
  const count = (column) => number(total(column));
  const calls = count("calls");
  const tile = (title, value, small = "", exactly = null) => el("div", null, el("dt", null, title),
    el("dd", {title: exactly}, value, small && el("span", {class: "small"}, small)));
  const cost = total("cost_usd");
  const lacks = count("unpriced");
  const unknown = count("without_usage");
  fill($("tiles"), [
    tile("cost", cost ? shown(number(cost), "$") : NOTHING, lacks ? `without ${plural(lacks, "call")} of no known price` : "", cost && `$${exact(cost)}`),
    tile("calls", whole(calls)),
    tile("tokens", shown(total("total_tokens") && count("total_tokens"), ""),
      total("total_tokens") ? `${brief(count("input_tokens"), "")} in, ${brief(count("output_tokens"), "")} out` : ""),
    tile("errors", whole(count("errors")), calls ? share(count("errors"), calls) : ""),
    unknown > 0 && tile("no usage", whole(unknown), "model calls whose response told none"),
    tile("bytes out", brief(count("response_bytes"), ""), `${brief(count("request_bytes"), "")} in`),
  ].filter(Boolean));
}

async function drawTop() {
  const measure = MEASURES[view.measure];
  const by = view.top;
  const answer = await asking.ask(usagePath(by, {sort: view.measure, top: view.n}));
  if (!changed("top", answer)) return;
  const rows = rowsOf(answer.value);
  const total = sum(rows, view.measure);
  const value = (row) => (row[view.measure] === null ? null : decimal(row[view.measure]));
  const isRest = (row) => row.others !== null && row.others !== undefined;
  const most = Math.max(0, ...rows.filter((row) => !isRest(row)).map((row) => number(value(row))));
  fill($("top-list"), rows.length ? table(`${measure.title} by ${visible(by)}, the greatest first`, [
    {title: visible(by), head: true, cell: (row) => (isRest(row) ? plural(row.others, "other")
      : el("button", {type: "button", class: "plain", "data-key": `top-${row[by]}`, onclick: () => only(by, row[by] ?? "")},
        label(by, row)))},
    {title: "", class: "meter", cell: (row) => (isRest(row) ? "" : bar(number(value(row)), most))},
    {title: measure.label, number: true, cell: (row) => {
      const one = value(row);
      return el("span", {title: one && spaced(exact(one))}, shown(one && number(one), measure.unit));
    }},
    {title: "of all", number: true, cell: (row) => (value(row) ? share(number(value(row)), number(total)) : NOTHING)},
    {title: "calls", number: true, cell: (row) => whole(row.calls)},
  ], rows) : el("p", {class: "quiet"}, "Nothing was used in that time."));
}

function drawErrors(rows, bucket, kind, first, labels) {
  const failed = labels.map(() => 0);
  const calls = labels.map(() => 0);
  for (const row of rows) {
    const at = kind.place(row[bucket]) - first;
    failed[at] += Number(row.errors);
    calls[at] += Number(row.calls);
  }
  const all = failed.reduce((a, b) => a + b, 0);
  const title = `Errors by ${bucket}: ${plural(all, "call")} of ${whole(calls.reduce((a, b) => a + b, 0))} failed or got a status of 400 and above`;
  $("errors-title").textContent = title;
  errors.show(title, stacked({
    title, labels, unit: "", series: [{values: failed, color: "bad"}],
    say: (i) => [el("b", null, labels[i]), `${whole(failed[i])} of ${plural(calls[i], "call")} (${share(failed[i], calls[i])})`],
  }));
  fill($("errors-table"), table(`Errors by ${bucket}`, [
    {title: bucket, head: true, cell: (i) => labels[i]},
    {title: "errors", number: true, cell: (i) => whole(failed[i])},
    {title: "calls", number: true, cell: (i) => whole(calls[i])},
    {title: "share", number: true, cell: (i) => share(failed[i], calls[i])},
  ], labels.map((_, i) => i)));
}

// --- times ----------------------------------------------------------------------------------------------------------------

const LINES = [
  {of: "first_byte_s", part: "p50", label: "first byte, half of the calls", color: 0},
  {of: "first_byte_s", part: "p95", label: "first byte, 95 of 100", color: 3},
  {of: "duration_s", part: "p50", label: "whole call, half of them", color: 1},
  {of: "duration_s", part: "p95", label: "whole call, 95 of 100", color: 2},
];

// By day of UTC, whatever else is chosen: times are kept apart by nothing else.
async function drawTimes() {
  const answer = await asking.ask("/times");
  if (!changed("times", answer)) return;
  const rows = new Map(answer.value.days.map((row) => [BUCKETS.day.place(row.day), row]));
  const final = Math.max(BUCKETS.day.now("UTC"), ...rows.keys());
  const days = Math.min(Math.max(final - Math.min(final, ...rows.keys()) + 1, TIMES_MIN), TIMES_MAX);
  const places = Array.from({length: days}, (_, i) => final - days + 1 + i);
  const labels = places.map((one) => BUCKETS.day.label(one));
  const value = (i, line) => rows.get(places[i])?.[line.of][line.part] ?? null;
  const now = rows.get(final);
  const title = "How long calls took, and until the upstream's first byte, by day, all calls, UTC";
  const sentence = now ? `${title}: today half within ${seconds(now.duration_s.p50)}, 95 of 100 within ${seconds(now.duration_s.p95)}`
    : `${title}: no call today`;
  $("times-title").textContent = title;
  times.show(sentence, lines({
    title: sentence, labels, format: seconds,
    series: LINES.map((line) => ({...line, values: places.map((_, i) => value(i, line))})),
    say: (i) => [el("b", null, labels[i]), el("span", null, plural(rows.get(places[i])?.calls ?? 0, "call")),
      ...LINES.map((line) => el("span", null, `${line.label} ${seconds(value(i, line))}`))],
  }));
  legend($("times-legend"), LINES.map((line) => ({color: line.color, name: line.label, said: now ? seconds(now[line.of][line.part]) : ""})));
  fill($("times-table"), table(title, [
    {title: "day", head: true, cell: (i) => labels[i]},
    {title: "calls", number: true, cell: (i) => whole(rows.get(places[i])?.calls ?? 0)},
    ...["first_byte_s", "duration_s"].flatMap((of) => ["p50", "p95", "p99"].map((part) => ({
      title: `${of === "first_byte_s" ? "first byte" : "whole call"} ${part}`, number: true, cell: (i) => seconds(value(i, {of, part})),
    }))),
  ], places.map((_, i) => i)));
}

// --- where every call is ------------------------------------------------------------------------------------------------

const countOf = (term) => (typeof term === "number" ? term : Object.values(term).reduce((a, b) => a + b, 0));

function reasons(term) {
  if (typeof term === "number") return whole(term);
  const named = Object.entries(term).filter(([, count]) => count).map(([why, count]) => `${visible(why)} ${whole(count)}`);
  return whole(countOf(term)) + (named.length ? ` (${named.join(", ")})` : "");
}

async function drawBalance() {
  const answer = await asking.ask("/balance");
  if (!changed("balance", answer)) return;
  balance = answer.value;
  last.backends = undefined;
  const {holds, problems = [], backends: at} = balance;
  $("balance-says").textContent = holds ? "The balance holds: every call is in exactly one place."
    : `The balance does not hold: ${problems.map(visible).join("; ")}`;
  $("balance-says").className = `verdict ${holds ? "ok" : "bad"}`;
  const rows = [
    {label: "calls", whole: {label: "admitted", count: balance.admitted},
      parts: ["recorded", "open", "lost"].map((kind) => ({kind, label: kind, count: countOf(balance[kind])}))},
    ...Object.entries(at).map(([backend, terms]) => ({
      label: backend, whole: {label: "recorded", count: balance.recorded},
      parts: BALANCED.map((kind) => ({kind, label: kind, count: countOf(terms[kind])})),
    })),
  ];
  const title = rows.map((row) => `${visible(row.label)}: ${row.whole.label} ${whole(row.whole.count)} = ` +
    row.parts.map((one) => `${one.label} ${whole(one.count)}`).join(" + ")).join("; ");
  balancePicture.show(title, equations({title, rows}));
  const kinds = ["recorded", "open", "lost", ...BALANCED];
  legend($("balance-legend"), kinds.map((kind) => ({className: `c-${kind}`, name: kind})));
  fill($("balance-table"),
    table("Calls: admitted = recorded + open + lost", [
      {title: "", head: true, cell: () => "calls"},
      {title: "admitted", number: true, cell: () => whole(balance.admitted)},
      ...["recorded", "open", "lost"].map((kind) => ({title: kind, number: true, cell: () => reasons(balance[kind])})),
    ], [0]),
    table(`Each backend: recorded = ${BALANCED.join(" + ")}`, [
      {title: "backend", head: true, cell: ([backend]) => name(backend)},
      {title: "recorded", number: true, cell: () => whole(balance.recorded)},
      ...BALANCED.map((kind) => ({title: kind, number: true, cell: ([, terms]) => reasons(terms[kind])})),
    ], Object.entries(at)));
  drawBackends();
}

const STATES = {up: "ok", down: "bad", blocked: "bad", paused: "warn"};

function drawBackends() {
  if (balance === null || last.backends) return;
  last.backends = true;
  const known = new Map(backends.map((one) => [one.backend, one]));
  const rows = allBackends(balance).map(([backend, terms]) => ({backend, terms, now: known.get(backend)}));
  fill($("backends"), rows.length ? table("How each backend does", [
    {title: "backend", head: true, cell: (row) => name(row.backend)},
    {title: "state", cell: (row) => el("span", {class: `flag ${STATES[row.now?.state] ?? "warn"}`}, row.now?.state ?? (row.backend in balance.backends ? "not in use" : "by others"))},
    {title: "behind", number: true, cell: (row) => (row.now?.oldest_pending_s ? seconds(row.now.oldest_pending_s) : row.terms.pending ? "a moment" : NOTHING)},
    {title: "pending", number: true, cell: (row) => whole(row.terms.pending)},
    {title: "parked", number: true, cell: (row) => whole(countOf(row.terms.parked))},
    {title: "waits", number: true, cell: (row) => (row.now?.retry_after_s ? seconds(row.now.retry_after_s) : NOTHING)},
    {title: "why, and what helps", class: "said", cell: (row) => [
      row.now?.reason ? el("span", null, visible(row.now.reason), " ") : null,
      row.now?.state === "blocked" ? command("metering-sidecar check --connect", `check-${row.backend}`)
        : row.now && row.now.state !== "up" ? command(`metering-sidecar spool retry --backend ${word(row.backend)}`, `retry-${row.backend}`)
        : null].filter(Boolean)},
  ], rows) : el("p", {class: "quiet"}, "No backend has taken anything yet."));
}

// Each backend with what has become of its records: our own, or those that are delivered together, lane by lane.
const allBackends = ({backends: own, lanes}) => [...Object.entries(own),
  ...Object.entries(lanes?.sum?.backends ?? {}).filter(([backend]) => !(backend in own))];

// --- lanes ----------------------------------------------------------------------------------------------------------------

// Who delivers which customers' records, where sidecars deliver together. There is no such part where each does so itself.
async function drawLanes() {
  const {value: {lanes}} = await asking.ask("/balance");
  const said = JSON.stringify(lanes ?? null);
  if (said === last.lanes) return;
  last.lanes = said;
  $("lanes").hidden = !lanes;
  if (!lanes) return;
  const known = lanes.lanes !== undefined;
  const old = lanes.trouble && known ? `, this is as of ${seconds(Math.round(lanes.age_s))} ago` : "";
  $("lanes-says").textContent = known ? (lanes.holds ? "The balance holds: every record is in exactly one place of its lane."
    : `The balance does not hold: ${lanes.problems.map(visible).join("; ")}`) : "What became of the records is not known.";
  $("lanes-says").className = `verdict ${known && lanes.holds ? "ok" : "bad"}`;
  const notes = [...(lanes.notes ?? []), ...(lanes.trouble ? [`The database cannot be asked${old}: ${lanes.trouble}`] : [])];
  fill($("lanes-notes"), notes.map((one) => el("p", null, visible(one))));
  $("lanes-notes").hidden = !notes.length;
  if (!known) return fill($("lanes-list"));
  const backends = Object.keys(lanes.sum.backends);
  fill($("lanes-list"), table("The lanes, and what waits in each", [
    {title: "lane", head: true, cell: (row) => (row.lane === undefined ? "all" : String(row.lane))},
    {title: "delivered by", cell: (row) => (row.lane === undefined ? plural(Object.keys(lanes.holders).length, "sidecar")
      : row.holder === null ? el("span", {class: "flag bad"}, "nobody") : name(row.holder))},
    {title: "records", number: true, cell: (row) => whole(row.recorded)},
    ...backends.flatMap((backend) => [
      {title: `pending at ${visible(backend)}`, number: true, cell: ({backends: at}) => (at[backend] ? whole(at[backend].pending) : NOTHING)},
      {title: "parked", number: true, cell: ({backends: at}) => (at[backend] ? reasons(at[backend].parked) : NOTHING)},
    ]),
    {title: "changes asked for", number: true, cell: (row) => whole(row.asked ?? sumOf(lanes.lanes, "asked"))},
  ], lanes.lanes, lanes.sum));
}

const sumOf = (rows, key) => rows.reduce((found, row) => found + row[key], 0);

// --- what is parked -------------------------------------------------------------------------------------------------------

const WHY = {
  no_customer: "It is not known which customer these subscribers are: name them under [subscribers.ID], then offer them again.",
  unknown: "They may have been taken, and the backend would not recognise a repeat: look there first.",
  window_ended: "They may have been taken, too long ago for a repeat to be recognised: look there first.",
  too_old: "They are older than the backend takes.",
  salvaged: "Whether they were delivered before is not known any more: look at the backend first.",
  partly_taken: "Some events of their request were taken, and a repeat would double those: look at the backend first.",
  removed: "Their backend is not in SIDECAR_BACKENDS any more: put it back, then offer them again.",
  value_not_taken: "The backend does not take this value: change the meter, then offer them again.",
};
const RISKY = new Set(["unknown", "window_ended", "partly_taken", "salvaged"]);

// The balance says how many are parked at which backend and why; of each of these the first are asked for.
async function drawParked() {
  const {value} = await asking.ask("/balance");
  const groups = allBackends(value).flatMap(([backend, terms]) =>
    Object.entries(terms.parked).filter(([, count]) => count).map(([reason, count]) => ({backend, reason, count, rows: []})));
  groups.sort((a, b) => b.count - a.count);
  const answers = await Promise.all(groups.slice(0, GROUPS_SHOWN).map((one) =>
    asking.ask(`/parked?${new URLSearchParams({backend: one.backend, reason: one.reason, limit: String(PARKED_SHOWN)})}`)));
  answers.forEach((answer, i) => { groups[i].rows = rowsOf(answer.value); });
  const said = JSON.stringify(groups.map(({backend, reason, count}) => [backend, reason, count]));
  if (!changed("parked", ...answers) && said === last.parkedSaid) return;
  last.parkedSaid = said;
  const open = new Set([...$("parked-list").querySelectorAll("details[open]")].map((one) => one.dataset.group));
  const key = (one) => `${one.backend}\n${one.reason}`;
  fill($("parked-list"), groups.length ? groups.map((one) => parkedGroup(key(one), one, open.has(key(one))))
    : el("p", {class: "quiet"}, "Nothing is parked."));
}

function parkedGroup(key, {backend, reason, count, rows}, open) {
  const maybe = RISKY.has(reason) || rows.some((row) => row.maybe_taken);
  const chosen = `metering-sidecar spool redrive --backend ${word(backend)} --reason ${word(reason)}`;
  const whose = new Map();
  for (const row of rows) whose.set(row.subscriber, label("subscriber", row));
  return el("div", {class: "group"},
    el("p", null, el("b", null, plural(Math.max(count, rows.length ? 1 : 0), "record")), " at ", name(backend), ": ",
      el("span", {class: "flag bad"}, visible(reason)),
      whose.size ? [" of ", [...whose.values()].slice(0, 5).map((one, i) => [i ? ", " : "", one]), whose.size > 5 ? " and others" : ""] : null),
    el("p", null, WHY[reason] ?? "The backend refused them for this reason: mend it, then offer them again."),
    el("p", null, command(chosen + (maybe ? " --resend-unknown" : ""), `redrive-${key}`), maybe ? " at the risk of doubles" : ""),
    rows.length ? el("details", {open, "data-group": key},
      el("summary", null, `The first ${Math.min(rows.length, PARKED_SHOWN)} of them`),
      el("div", {class: "scroll"}, table("Parked records", [
        {title: "parked at", class: "when", cell: (row) => moment(row.parked_at, view.zone)},
        {title: "subscriber", cell: (row) => label("subscriber", row)},
        {title: "attempts", number: true, cell: (row) => whole(row.attempts)},
        {title: "may have been taken", cell: (row) => (row.maybe_taken ? "yes" : "no")},
        {title: "what was said last", class: "said", cell: (row) => visible(row.history?.[row.history.length - 1] ?? NOTHING)},
        {title: "event", cell: (row) => el("code", null, visible(row.event_id))},
      ], rows.slice(0, PARKED_SHOWN)))) : null);
}

// --- limits ---------------------------------------------------------------------------------------------------------------

async function drawLimits() {
  const answer = await asking.ask("/limits");
  if (!changed("limits", answer)) return;
  const rows = [...(answer.value.limits ?? rowsOf(answer.value))].sort((a, b) => (b.percent ?? Infinity) - (a.percent ?? Infinity));
  const unit = (row) => (row.unit === "cost_usd" ? "$" : "");
  const all = (row) => number(decimal(row.amount));
  fill($("limits-list"), rows.length ? table("How full each limit is, the fullest first", [
    {title: "limit", head: true, cell: (row) => name(row.limit)},
    {title: "of", class: "call", cell: (row) => scope(row)},
    {title: "", class: "meter", cell: (row) => fullness(number(decimal(row.used)), number(decimal(row.reserved)), all(row))},
    {title: "%", number: true, cell: (row) => (row.percent === null ? NOTHING : el("span", {
      class: `flag ${row.percent >= 100 ? "bad" : row.percent >= 80 ? "warn" : "ok"}`}, String(row.percent)))},
    {title: "used", number: true, cell: (row) => `${spaced(row.used)} of ${unit(row)}${spaced(row.amount)}`},
    {title: "unit", cell: (row) => visible(row.unit)},
    {title: "set aside", number: true, cell: (row) => spaced(row.reserved)},
    ...(rows.some((row) => row.instances) ? [{title: "by sidecar", cell: (row) => sidecars(row)}] : []),
    {title: "until", class: "when", cell: (row) => (row.until ? moment(row.until, view.zone) : row.window ?? NOTHING)},
    {title: "then", cell: (row) => visible(row.action)},
  ], rows) : el("p", {class: "quiet"}, "No limit is set, or none was touched by a call in its window."));
}

// Who shares a limit: what each used, and what it holds of it for calls to come.
function sidecars(row) {
  const all = Object.entries(row.instances ?? {});
  const lines = all.slice(0, SIDECARS_SHOWN).map(([one, has]) =>
    `${visible(one)} ${spaced(has.used)}${has.leased === "0" ? "" : ` + ${spaced(has.leased)} leased`}`);
  if (all.length > lines.length) lines.push(`and ${plural(all.length - lines.length, "more sidecar")}`);
  return lines.map((line) => el("div", null, line));
}

function scope(row) {
  const parts = Object.entries(row.scope).filter(([, value]) => value !== "");
  if (!parts.length) return name(null, "everybody");
  return parts.map(([one, value], i) => [i ? ", " : "", `${visible(one)} `, name(one === "subscriber" && row.name ? row.name : value)]);
}

// --- the last calls -------------------------------------------------------------------------------------------------------

// A dimension that is called like something else is asked for by its long name.
const TAKEN = new Set([...GROUPS, "hour", "day", "month", "name", "others", "records", ...Object.keys(MEASURES)]);
const LONG = "dimensions.";
const grouped = (one) => (TAKEN.has(one) ? LONG + one : one);
const bare = (one) => (one.startsWith(LONG) ? one.slice(LONG.length) : one);
const UPSTREAM = "upstream"; // filed like a dimension, where there are several
const filed = (row, one) => row.dimensions?.[bare(one)] ?? (one === UPSTREAM ? row.upstream : null);

function recordsPath() {
  const asked = new URLSearchParams({limit: view.calls});
  for (const one of view.where) asked.append("where", one);
  return `/records?${asked}`;
}

async function drawRecords() {
  const answer = await asking.ask(recordsPath());
  if (!changed("records", answer)) return;
  const all = rowsOf(answer.value);
  const seen = new Set(all.flatMap((one) => Object.keys(one.dimensions ?? {})).map(grouped));
  if (all.some((one) => one.upstream)) seen.add(UPSTREAM);
  const more = [...seen].filter((one) => !dimensions.includes(one));
  if (more.length) { dimensions = [...dimensions, ...more].sort(); controls(); }
  const wanted = view.text.trim().toLowerCase();
  const rows = all.toReversed().filter((one) => ofStatus(one) && (!wanted || said(one).includes(wanted)));
  $("records-count").textContent = rows.length === all.length ? `${plural(all.length, "call")}, the newest first`
    : `${whole(rows.length)} of the last ${plural(all.length, "call")}`;
  fill($("records-list"), rows.length ? table("Last calls", [
    {title: "started", class: "when", cell: (row) => moment(row.started_at, view.zone)},
    {title: "status", number: true, cell: (row) => el("span", {
      class: row.status === null || row.status >= 400 ? "flag bad" : null}, row.status ?? NOTHING)},
    {title: "outcome", cell: (row) => visible(row.outcome ?? NOTHING)},
    {title: "took", number: true, cell: (row) => (row.duration_ms === null ? NOTHING : seconds(row.duration_ms / 1e3))},
    {title: "first byte", number: true, cell: (row) => (row.first_byte_ms === null ? NOTHING : seconds(row.first_byte_ms / 1e3))},
    {title: "subscriber", cell: (row) => name(row.subscriber?.name ?? row.subscriber?.id)},
    {title: "model", cell: (row) => name(row.usage?.model ?? row.usage?.request_model, NOTHING)},
    {title: "in", number: true, cell: (row) => shown(row.usage?.input_tokens, "")},
    {title: "out", number: true, cell: (row) => shown(row.usage?.output_tokens, "")},
    {title: "cost", number: true, cell: (row) => costOf(row)},
    {title: "call", class: "call", cell: (row) => [`${visible(row.method)} `, name(row.route ?? row.url)]},
    ...dimensions.map((one) => ({title: visible(one), cell: (row) => name(filed(row, one), NOTHING)})),
  ], rows) : el("p", {class: "quiet"}, all.length ? "None of them fits." : "No call was recorded yet."));
}

function costOf({cost}) {
  if (!cost || cost.total === null || cost.total === undefined) return NOTHING;
  if (cost.currency !== "USD") return `${spaced(cost.total)} ${visible(cost.currency)}`;
  return el("span", {title: `$${spaced(cost.total)}`}, shown(Number(cost.total), "$"));
}

const ofStatus = ({status}) => !view.status || (view.status === "none" ? status === null : String(status ?? "").startsWith(view.status));

const said = (row) => [
  row.id, row.status, row.outcome, row.subscriber?.id, row.subscriber?.name, row.usage?.model, row.usage?.request_model,
  row.usage?.provider, row.method, row.route, row.url, row.error, row.upstream, ...Object.values(row.dimensions ?? {}),
].filter((one) => one !== null && one !== undefined).join("\n").toLowerCase();

read();
controls();
wire();
look();
