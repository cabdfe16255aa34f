// The pictures: plain SVG, drawn at the width that is there. Each is one image to a screen reader, with a sentence that
// says what it shows; the numbers are in the table below it, and under the arrow keys.

import {brief, el, share, svg, visible, whole} from "./text.js";

const HEIGHT = 240;
const EDGE = {top: 10, right: 8, bottom: 24, left: 58};
const TICK_WIDTH = 104; // what the name of a bucket takes
const BAR_MIN = 3; // what is there at all is seen, however little it is
let drawn = 0;

// Steps of 1, 2 or 5 that a person reads; at least one, also where everything is zero.
function ticks(max) {
  if (!(max > 0)) return [0, 1];
  const raw = max / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const steps = [];
  for (let at = 0; at < max + step * 0.999; at += step) steps.push(Number(at.toPrecision(12)));
  return steps;
}

function picture(width, height, title, extra = {}) {
  const id = `picture-${++drawn}`;
  return svg("svg", {
    role: "img", "aria-labelledby": id, width, height, viewBox: `0 0 ${width} ${height}`, ...extra,
  }, svg("title", {id}, title));
}

const widthOf = (place) => Math.max(240, Math.floor(place.clientWidth) || 640);

function frame(root, width, top, said, labels) {
  const inner = {width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom};
  const steps = ticks(top);
  const highest = steps[steps.length - 1];
  const y = (value) => EDGE.top + inner.height * (1 - value / highest);
  for (const step of steps) {
    root.append(
      svg("line", {class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(step), y2: y(step)}),
      svg("text", {class: "tick", x: EDGE.left - 6, y: y(step) + 4, "text-anchor": "end"}, said(step)),
    );
  }
  const slot = inner.width / Math.max(labels.length, 1);
  const every = Math.max(1, Math.ceil(TICK_WIDTH / slot));
  labels.forEach((label, i) => {
    // The last one is always named: it is now.
    if ((labels.length - 1 - i) % every) return;
    const x = Math.min(EDGE.left + slot * (i + 0.5), width - EDGE.right);
    const anchor = x > width - TICK_WIDTH / 2 ? "end" : "middle";
    root.append(svg("text", {
      class: "tick", x: anchor === "end" ? width - EDGE.right : x, y: HEIGHT - 6, "text-anchor": anchor,
    }, label));
  });
  return {y, slot, inner};
}

// One place with a picture in it: drawn again when its data or its width changes, with a cursor for pointer and keys.
export class Chart {
  #place; #readout; #draw = null; #at = null; #width = 0;

  constructor(place, readout) {
    this.#place = place;
    this.#readout = readout;
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.addEventListener("keydown", (event) => this.#key(event));
    place.addEventListener("pointermove", (event) => this.#point(event));
    place.addEventListener("pointerleave", () => this.#move(null));
    place.addEventListener("blur", () => this.#move(null));
    new ResizeObserver(() => { if (widthOf(place) !== this.#width) this.#paint(); }).observe(place);
  }

  // `draw(width)` gives {root, count, slot, left, say(i)}.
  show(label, draw) {
    this.#draw = draw;
    this.#place.setAttribute("aria-label", `${label}; arrow keys read one after the other`);
    this.#paint();
  }

  #paint() {
    if (!this.#draw) return;
    this.#width = widthOf(this.#place);
    this.drawn = this.#draw(this.#width);
    this.#place.replaceChildren(this.drawn.root);
    if (this.#at !== null) this.#move(this.#at);
  }

  #key(event) {
    const count = this.drawn?.count ?? 0;
    const to = {
      ArrowRight: (this.#at ?? -1) + 1, ArrowLeft: (this.#at ?? count) - 1, Home: 0, End: count - 1,
    }[event.key];
    if (event.key === "Escape") this.#move(null);
    if (to === undefined || !count) return;
    event.preventDefault();
    this.#move(Math.min(count - 1, Math.max(0, to)));
  }

  #point(event) {
    if (!this.drawn?.count) return;
    const x = event.clientX - this.#place.getBoundingClientRect().left - this.drawn.left;
    const at = Math.floor(x / this.drawn.slot);
    this.#move(at >= 0 && at < this.drawn.count ? at : null);
  }

  #move(at) {
    if (at !== null && at >= this.drawn.count) at = null;
    this.#at = at;
    this.drawn?.root.querySelector(".cursor")?.remove();
    if (at === null) {
      this.#readout.replaceChildren();
      return;
    }
    this.drawn.root.prepend(svg("rect", {
      class: "cursor", x: this.drawn.left + at * this.drawn.slot, y: EDGE.top, width: this.drawn.slot,
      height: HEIGHT - EDGE.top - EDGE.bottom,
    }));
    this.#readout.replaceChildren(...this.drawn.say(at));
  }
}

// Bars over time, one on top of the other. `series`: [{label, values: [number or null], color}]; `say(i)`: what a bar is.
export function stacked({title, labels, series, unit, say}) {
  return (width) => {
    const root = picture(width, HEIGHT, title);
    const totals = labels.map((_, i) => series.reduce((total, one) => total + Math.max(0, one.values[i] ?? 0), 0));
    const {y, slot} = frame(root, width, Math.max(0, ...totals), (step) => brief(step, unit), labels);
    const gap = Math.min(4, slot * 0.2);
    labels.forEach((_, i) => {
      let below = 0;
      for (const one of series) {
        const value = Math.max(0, one.values[i] ?? 0);
        if (!value) continue;
        const from = y(below);
        below += value;
        root.append(svg("rect", {
          class: `s${one.color}`, x: EDGE.left + slot * i + gap / 2, y: y(below), width: Math.max(1, slot - gap),
          height: Math.max(0.5, from - y(below)),
        }));
      }
    });
    return {root, count: labels.length, slot, left: EDGE.left, say};
  };
}

// Lines over time: [{label, values: [number or null], color}]; a null is a gap.
export function lines({title, labels, series, format, say}) {
  return (width) => {
    const root = picture(width, HEIGHT, title);
    const known = series.flatMap((one) => one.values).filter((value) => value !== null);
    const {y, slot} = frame(root, width, Math.max(0, ...known), format, labels);
    const x = (i) => EDGE.left + slot * (i + 0.5);
    for (const one of series) {
      let path = "";
      one.values.forEach((value, i) => {
        if (value === null) return;
        path += `${one.values[i - 1] === null || i === 0 ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
        root.append(svg("circle", {class: `s${one.color}`, cx: x(i), cy: y(value), r: 3}));
      });
      root.append(svg("path", {class: `line l${one.color}`, d: path}));
    }
    return {root, count: labels.length, slot, left: EDGE.left, say};
  };
}

// How much of the most: a bar that stands in a cell of a table, where the number is said beside it.
export function bar(part, most, color = 0) {
  const width = most > 0 ? Math.max(part > 0 ? BAR_MIN : 0, (100 * part) / most) : 0;
  return svg("svg", {class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true"},
    svg("rect", {class: "rail", width: 100, height: 10}),
    svg("rect", {class: `s${color}`, width: Math.min(100, width), height: 10}));
}

// How full a limit is, with what is set aside for open calls behind what is used.
export function fullness(used, reserved, amount) {
  const at = (value) => (amount > 0 ? Math.min(100, (100 * value) / amount) : 100);
  const color = used >= amount ? "bad" : used >= 0.8 * amount ? "warn" : "ok";
  return svg("svg", {class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true"},
    svg("rect", {class: "rail", width: 100, height: 10}),
    svg("rect", {class: "c-open", width: at(used + reserved), height: 10}),
    svg("rect", {class: `c-${color}`, width: used > 0 ? Math.max(BAR_MIN, at(used)) : 0, height: 10}));
}

// The equations: [{label, whole: {label, count}, parts: [{kind, label, count}]}], one bar each. What is there at all is
// seen, so parts are as wide as they are only where there is room for that.
const ROW = 54;
export function equations({title, rows}) {
  return (width) => {
    const root = picture(width, rows.length * ROW + 4, title);
    rows.forEach((row, nth) => {
      const top = nth * ROW;
      const parts = row.parts.filter((part) => part.count > 0);
      const sum = parts.reduce((total, part) => total + part.count, 0);
      const holds = row.parts.reduce((total, part) => total + part.count, 0) === row.whole.count;
      root.append(
        svg("text", {class: "row", x: 0, y: top + 14}, clipped(row.label, width * 0.4, 8)),
        svg("text", {class: holds ? "tick" : "tick bad", x: width, y: top + 14, "text-anchor": "end"},
          `${row.whole.label} ${whole(row.whole.count)}${holds ? "" : `, accounted for ${whole(sum)}`}`),
        svg("rect", {class: "rail", x: 0, y: top + 20, width, height: 24}),
      );
      const least = parts.length * BAR_MIN;
      let x = 0;
      for (const part of parts) {
        const wide = BAR_MIN + ((width - least) * part.count) / sum;
        root.append(svg("rect", {class: `c-${part.kind}`, x, y: top + 20, width: Math.max(1, wide - 1), height: 24},
          svg("title", null, `${part.label} ${whole(part.count)} (${share(part.count, sum)})`)));
        const said = `${part.label} ${whole(part.count)}`;
        if (said.length * 7.2 < wide - 8) {
          root.append(svg("text", {class: `on c-on-${part.kind}`, x: x + 6, y: top + 37}, said));
        }
        x += wide;
      }
    });
    return {root, count: 0, slot: 1, left: 0, say: () => []};
  };
}

function clipped(text, width, each) {
  const chars = [...visible(text)];
  const most = Math.max(4, Math.floor(width / each));
  return chars.length <= most ? chars.join("") : chars.slice(0, most - 1).join("") + "…";
}

// What a colour stands for. `choose(one)`: what happens where the name is a button.
export function legend(place, entries, choose = null) {
  place.replaceChildren(...entries.map((one) => {
    const swatch = svg("svg", {class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true"},
      svg("rect", {class: one.className ?? `s${one.color}`, width: 10, height: 10, rx: 2}));
    const said = [swatch, one.name, one.said ? el("span", {class: "quiet"}, " " + one.said) : null];
    if (!choose || one.plain) return el("li", null, ...said.filter(Boolean));
    return el("li", null, el("button", {type: "button", class: "plain", "data-key": one.key, onclick: () => choose(one)}, said));
  }));
}
