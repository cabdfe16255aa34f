// How things are written: exact sums, numbers for people, names of strangers, times.

// --- exact decimals -------------------------------------------------------------------------------------------------
// Costs are decimals that no float holds. A decimal is {digits: BigInt, places}: digits / 10^places.

const NUMBER = /^([+-]?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d{1,3}))?$/;

export function decimal(value) {
  const found = NUMBER.exec(String(value));
  if (!found) return null;
  const [, sign, whole, part = "", power = "0"] = found;
  let digits = BigInt(whole + part);
  let places = part.length - Number(power);
  if (places < 0) { digits *= 10n ** BigInt(-places); places = 0; }
  return {digits: sign === "-" ? -digits : digits, places};
}

export function plus(a, b) {
  if (a === null) return b;
  if (b === null) return a;
  const places = Math.max(a.places, b.places);
  const up = (one) => one.digits * 10n ** BigInt(places - one.places);
  return {digits: up(a) + up(b), places};
}

// Exactly, without zeros at the end: as the command prints it.
export function exact(one) {
  if (one === null) return null;
  const negative = one.digits < 0n;
  const digits = String(negative ? -one.digits : one.digits).padStart(one.places + 1, "0");
  const cut = digits.length - one.places;
  const part = digits.slice(cut).replace(/0+$/, "");
  return (negative ? "-" : "") + digits.slice(0, cut) + (part ? "." + part : "");
}

export const number = (one) => (one === null ? 0 : Number(exact(one)));

// The sum of one column, exactly; null where nothing is known, which is not zero.
export function sum(rows, column) {
  let total = null;
  for (const row of rows) {
    const value = row[column];
    if (value !== null && value !== undefined) total = plus(total, decimal(value));
  }
  return total;
}

// --- for people -----------------------------------------------------------------------------------------------------

const WHOLE = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const CENTS = new Intl.NumberFormat("en", {minimumFractionDigits: 2, maximumFractionDigits: 2});
const FINE = new Intl.NumberFormat("en", {maximumSignificantDigits: 3});
const SHORT = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const SHARE = new Intl.NumberFormat("en", {style: "percent", maximumFractionDigits: 1});

export const NOTHING = "–";
export const whole = (value) => WHOLE.format(value);
export const share = (part, of) => (of > 0 ? SHARE.format(part / of) : NOTHING);

function money(value) {
  if (value === 0) return "$0";
  const size = Math.abs(value);
  return "$" + (size >= 10000 ? WHOLE.format(value) : size >= 1 ? CENTS.format(value) : FINE.format(value));
}

// A value of a measure, as short as it can be read; `null` is not zero.
export function shown(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return NOTHING;
  return unit === "$" ? money(value) : WHOLE.format(value);
}

export function brief(value, unit) {
  if (unit === "$") return value >= 10000 ? "$" + SHORT.format(value) : money(value);
  return Math.abs(value) >= 10000 ? SHORT.format(value) : FINE.format(value);
}

// An exact text with its thousands apart.
export function spaced(text) {
  if (text === null || text === undefined) return NOTHING;
  const [front, part] = String(text).split(".");
  return front.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? "." + part : "");
}

export function seconds(value) {
  if (value === null || value === undefined) return NOTHING;
  if (value === 0) return "0 s";
  if (value < 0.001) return `${FINE.format(value * 1e6)} µs`;
  if (value < 1) return `${FINE.format(value * 1e3)} ms`;
  if (value < 120) return `${FINE.format(value)} s`;
  if (value < 7200) return `${WHOLE.format(value / 60)} min`;
  return value < 172800 ? `${FINE.format(value / 3600)} h` : `${FINE.format(value / 86400)} days`;
}

export const plural = (count, one, many = one + "s") => `${whole(count)} ${count === 1 ? one : many}`;

// What came over the wire must not hide anything: what is not printable is shown as being there, like the commands do.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
export const visible = (text) => String(text).replace(HIDDEN, "\uFFFD");

// --- elements -------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined));
  return node;
}

export const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// Somebody else's words, kept apart from ours whichever way they are written.
export function name(text, none = "not known") {
  if (text === null || text === undefined || text === "") return el("i", {class: "none"}, none);
  return el("bdi", {class: "name", title: visible(text)}, visible(text));
}

// Put new content in place, and the focus back where it was: `data-key` says what is the same.
export function fill(place, ...children) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset?.key : undefined;
  const left = place.scrollLeft;
  place.replaceChildren(...children.flat(Infinity).filter((one) => one !== null && one !== undefined));
  place.scrollLeft = left;
  reachable(place);
  if (key !== undefined) [...place.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key)?.focus();
}

// What has to be scrolled can be reached by the keys, and what need not is no stop on their way.
const scrolled = new ResizeObserver((changes) => changes.forEach((one) => reachable(one.target)));

function reachable(place) {
  if (!place.classList.contains("scroll")) {
    place.querySelectorAll(".scroll").forEach((one) => scrolled.observe(one));
    return;
  }
  scrolled.observe(place);
  const said = place.querySelector("caption")?.textContent;
  if (place.scrollWidth <= place.clientWidth) {
    for (const one of ["tabindex", "role", "aria-label"]) place.removeAttribute(one);
  } else {
    place.tabIndex = 0;
    place.setAttribute("role", "region");
    if (said) place.setAttribute("aria-label", said);
  }
}

// Columns: {title, cell(row) -> text or node, number?: true, head?: true}. A table that may be wider than its place
// can be scrolled with the keys.
export function table(caption, columns, rows, total = null) {
  const cell = (column, row) => el(
    column.head ? "th" : "td",
    {scope: column.head ? "row" : null, class: column.number ? "number" : column.class},
    ...[column.cell(row)].flat(Infinity),
  );
  return el("table", null,
    el("caption", null, caption),
    el("thead", null, el("tr", null, columns.map((one) =>
      el("th", {scope: "col", class: one.number ? "number" : null}, one.title)))),
    el("tbody", null, rows.map((row) => el("tr", null, columns.map((one) => cell(one, row))))),
    total && el("tfoot", null, el("tr", null, columns.map((one) => cell(one, total)))),
  );
}

// --- the command that mends it ----------------------------------------------------------------------------------------

// One word for a shell: what is not plain is quoted.
export const word = (text) => (/^[\w.:/@%+=,-]+$/.test(text) ? text : "'" + visible(text).replaceAll("'", "'\\''") + "'");

export function command(text, key) {
  const said = el("code", {class: "command"}, text);
  const button = el("button", {type: "button", "data-key": key, "aria-label": `Copy: ${text}`}, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      // Without leave to write there, or over plain HTTP: mark it, so that a key copies it.
      getSelection().selectAllChildren(said);
      button.textContent = "Marked";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return el("span", {class: "mend"}, said, button);
}

// --- times ------------------------------------------------------------------------------------------------------------

export function moment(text, zone) {
  const at = new Date(text);
  if (Number.isNaN(at.getTime())) return visible(text);
  const said = new Intl.DateTimeFormat("en-CA", {
    timeZone: zone, year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit",
    second: "2-digit", hourCycle: "h23",
  }).format(at);
  return el("time", {datetime: at.toISOString()}, said.replace(",", ""));
}

// A bucket of time, as the sums are kept by -> its place on a line without gaps, and how it is called.
export const BUCKETS = {
  hour: {
    place: (key) => Math.floor(Date.parse(key) / 3600e3),
    label: (place, zone) => new Intl.DateTimeFormat("en-GB", {
      timeZone: zone, day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23",
    }).format(new Date(place * 3600e3)),
    now: () => Math.floor(Date.now() / 3600e3),
  },
  day: {
    place: (key) => Math.floor(Date.parse(key.slice(0, 10) + "T00:00Z") / 86400e3),
    label: (place) => new Intl.DateTimeFormat("en-GB", {timeZone: "UTC", weekday: "short", day: "numeric", month: "short"})
      .format(new Date(place * 86400e3)),
    now: (zone) => BUCKETS.day.place(today(zone)),
  },
  month: {
    place: (key) => Number(key.slice(0, 4)) * 12 + Number(key.slice(5, 7)) - 1,
    label: (place) => `${Math.floor(place / 12)}-${String((place % 12) + 1).padStart(2, "0")}`,
    now: (zone) => BUCKETS.month.place(today(zone)),
  },
};

export const today = (zone, daysBack = 0) =>
  new Intl.DateTimeFormat("en-CA", {timeZone: zone, year: "numeric", month: "2-digit", day: "2-digit"})
    .format(new Date(Date.now() - daysBack * 86400e3));
