// Plots as SVG, drawn for the width that they have; values under the pointer, or with the arrow keys.

const SVG = "http://www.w3.org/2000/svg";
const COLORS = 8;
const RAW_FROM = 30; // points from which on a moving mean is drawn over the single values

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function shape(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// From the ninth on, the colors return with dashed lines and hollow keys.
const dashes = (index) => ["none", "7 3", "2 3"][Math.floor(index / COLORS) % 3];
const color = (index) => `var(--series-${index % COLORS})`;
const key = (index) => {
  const made = element("span", { class: index < COLORS ? "key" : "key more" });
  made.style.background = color(index);
  made.style.borderColor = color(index);
  return made;
};

function shortNumber(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(4)));
}

const asShare = (value) => `${Number((100 * value).toFixed(1))}\u00a0%`;

// Round numbers that divide a range into about `count` parts.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(at * step);
  return found;
}

// The mean of the values around each; at the ends, of those that exist.
function movingMean(values) {
  const half = Math.max(1, Math.round(values.length / 40));
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, index) => {
    const from = Math.max(0, index - half);
    const to = Math.min(values.length, index + half + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

// Divide a label at its commas into lines of at most `most` characters; a longer part is cut.
function wrapped(label, most) {
  const lines = [];
  for (const part of label.split(", ")) {
    const cut = part.length > most ? `${part.slice(0, most - 1)}\u2026` : part;
    const last = lines.length - 1;
    if (lines.length && `${lines[last]}, ${cut}`.length <= most) lines[last] += `, ${cut}`;
    else lines.push(cut);
  }
  return lines;
}

// Call draw(width) now and whenever the width of the host changes.
function drawn(host, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(host.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      draw(width);
    }
  }).observe(host);
}

function tooltip(host) {
  const tip = element("div", { class: "tip", hidden: true, role: "status" });
  host.append(tip);
  return {
    // At x, beside or below y, counted in the host.
    show([x, y], ...content) {
      tip.replaceChildren(...content);
      tip.hidden = false;
      const room = host.clientWidth - tip.offsetWidth;
      const left = x + 12 > room ? x - 12 - tip.offsetWidth : x + 12;
      tip.style.top = `${y}px`;
      tip.style.left = `${Math.max(0, Math.min(room, left))}px`;
    },
    hide() {
      tip.hidden = true;
    },
  };
}

// A legend whose entries switch series off and on; returns a function that says whether a series is on.
function legend(host, names, colors, changed, always = false) {
  const on = names.map(() => true);
  if (names.length > 1 || always) {
    const list = element("ul", { class: "legend" });
    names.forEach((name, index) => {
      const button = element("button", { type: "button" }, key(colors[index]), name);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        on[index] = !on[index];
        button.setAttribute("aria-pressed", String(on[index]));
        changed();
      });
      list.append(element("li", {}, button));
    });
    host.before(list);
  }
  return (index) => on[index];
}

// Series: {name, color, curve: {steps, mean, low, high, averaged}}.
// Options: share (values are shares), middle (a line at one half), named (a legend even for one series).
function lineChart(host, title, series, { share = false, middle = false, named = false } = {}) {
  const height = 210;
  const margin = { left: 52, right: 10, top: 8, bottom: 26 };
  const format = share ? asShare : shortNumber;
  const tip = tooltip(host);
  let svg = null;
  let last = 0;
  const isOn = legend(host, series.map((one) => one.name), series.map((one) => one.color), () => draw(last), named);
  const smooth = new Map(series.map((one) => [one, one.curve.mean.length >= RAW_FROM ? movingMean(one.curve.mean) : null]));

  function draw(width) {
    last = width;
    const shown = series.filter((_, index) => isOn(index));
    const steps = shown.flatMap((one) => one.curve.steps);
    const values = shown.flatMap((one) => one.curve.mean);
    let [first, end] = [Math.min(...steps), Math.max(...steps)];
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (!values.length) [first, end, low, high] = [0, 1, 0, 1];
    if (end === first) [first, end] = [first - 0.5, end + 0.5];
    if (share) [low, high] = [0, middle || high > 0.4 ? 1 : Math.max(high * 1.15, 0.01)];
    if (high === low) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
    if (!share) [low, high] = [low - (high - low) * 0.06, high + (high - low) * 0.06];
    const x = (step) => margin.left + ((step - first) / (end - first)) * (width - margin.left - margin.right);
    const y = (value) => height - margin.bottom - ((value - low) / (high - low)) * (height - margin.top - margin.bottom);
    const made = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: "0" });
    made.setAttribute("aria-label", `${title} over steps; arrow keys read values`);
    for (const at of ticks(low, high, 4)) {
      made.append(shape("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(at), y2: y(at) }));
      made.append(shape("text", { x: margin.left - 7, y: y(at) + 4, "text-anchor": "end" }, format(at)));
    }
    for (const at of ticks(first, end, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger)) {
      made.append(shape("text", { x: x(at), y: height - 8, "text-anchor": "middle" }, String(at)));
    }
    if (middle) made.append(shape("line", { class: "middle", x1: margin.left, x2: width - margin.right, y1: y(0.5), y2: y(0.5) }));
    for (const one of shown) paint(made, one, x, y);
    const cursor = shape("line", { class: "cursor", y1: margin.top, y2: height - margin.bottom, visibility: "hidden" });
    made.append(cursor);
    follow(made, cursor, shown, x, width);
    if (svg) svg.replaceWith(made);
    else host.prepend(made);
    svg = made;
  }

  function paint(made, one, x, y) {
    const path = (values) => values.map((value, index) => `${index ? "L" : "M"}${x(one.curve.steps[index]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const mean = smooth.get(one);
    const line = { stroke: color(one.color), "stroke-dasharray": dashes(one.color) };
    made.append(shape("path", { ...line, d: path(one.curve.mean), "stroke-width": mean ? 1 : 2, opacity: mean ? 0.4 : 1 }));
    if (mean) made.append(shape("path", { ...line, d: path(mean), "stroke-width": 2.2 }));
    if (one.curve.mean.length < 3) {
      one.curve.mean.forEach((value, index) => made.append(shape("circle", { cx: x(one.curve.steps[index]), cy: y(value), r: 3.5, fill: color(one.color) })));
    }
  }

  function follow(made, cursor, shown, x, width) {
    const all = [...new Set(shown.flatMap((one) => one.curve.steps))].sort((one, other) => one - other);
    let at = -1;
    const show = (index) => {
      if (!all.length) return;
      at = Math.max(0, Math.min(all.length - 1, index));
      const place = x(all[at]);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      tip.show([place, 0], element("div", {}, `step ${shortNumber(Math.round(all[at]))}`), ...shown.map((one) => reading(one, all[at])));
    };
    const hide = () => {
      cursor.setAttribute("visibility", "hidden");
      tip.hide();
      at = -1;
    };
    const point = (event) => {
      const box = made.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * width;
      let best = 0;
      all.forEach((step, index) => {
        if (Math.abs(x(step) - place) < Math.abs(x(all[best]) - place)) best = index;
      });
      show(best);
    };
    made.addEventListener("pointermove", point);
    made.addEventListener("pointerdown", point);
    made.addEventListener("pointerleave", hide);
    made.addEventListener("blur", hide);
    made.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      show(at < 0 ? (move < 0 ? all.length - 1 : 0) : at + move);
    });
  }

  function reading(one, step) {
    const { steps, mean, low, high, averaged } = one.curve;
    let best = 0;
    steps.forEach((other, index) => {
      if (Math.abs(other - step) < Math.abs(steps[best] - step)) best = index;
    });
    const near = steps.length && Math.abs(steps[best] - step) <= averaged;
    const range = near && low ? ` (${format(low[best])} to ${format(high[best])} in ${averaged} steps)` : "";
    return element("div", {}, key(one.color), `${one.name}: ${near ? format(mean[best]) : "\u2013"}${range}`);
  }

  drawn(host, draw);
}

// Rows: {label, points: [{name, color, value, low, high, text}]}; all shares. The middle is a line at one half.
function whiskers(host, title, rows, middle) {
  const lane = 17;
  const margin = { side: 12, bottom: 24 };
  const tip = tooltip(host);
  let svg = null;
  drawn(host, (width) => {
    const labels = rows.map((row) => wrapped(row.label, Math.floor((width - 2 * margin.side) / 6.4)));
    const tall = rows.map((row, index) => 8 + 16 * labels[index].length + lane * row.points.length + 8);
    const height = tall.reduce((sum, one) => sum + one, 0) + margin.bottom;
    const x = (value) => margin.side + value * (width - 2 * margin.side);
    const made = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    made.setAttribute("aria-label", title);
    for (const at of [0, 0.25, 0.5, 0.75, 1]) {
      const half = middle && at === 0.5;
      made.append(shape("line", { class: half ? "middle" : "grid", x1: x(at), x2: x(at), y1: 0, y2: height - margin.bottom }));
      const anchor = at === 0 ? "start" : at === 1 ? "end" : "middle";
      made.append(shape("text", { x: x(at), y: height - 8, "text-anchor": anchor }, asShare(at)));
    }
    let top = 0;
    rows.forEach((row, place) => {
      labels[place].forEach((line, index) => made.append(shape("text", { class: "label", x: margin.side, y: top + 17 + 16 * index }, line)));
      row.points.forEach((point, index) => {
        const y = top + 16 + 16 * labels[place].length + lane * index;
        const group = shape("g", {});
        if (point.low !== null) {
          group.append(shape("line", { x1: x(point.low), x2: x(point.high), y1: y, y2: y, stroke: color(point.color), "stroke-width": 2.4, "stroke-linecap": "round" }));
        }
        group.append(shape("circle", { cx: x(point.value), cy: y, r: 4.5, fill: color(point.color) }));
        group.append(shape("rect", { x: 0, y: y - lane / 2, width, height: lane, fill: "transparent" }));
        for (const kind of ["pointerenter", "pointerdown"]) group.addEventListener(kind, () => tip.show([x(point.value), y + lane / 2], element("div", {}, key(point.color), `${point.name}: ${point.text}`)));
        group.addEventListener("pointerleave", () => tip.hide());
        made.append(group);
      });
      top += tall[place];
    });
    if (svg) svg.replaceWith(made);
    else host.prepend(made);
    svg = made;
  });
}

// Stages: {name: [seconds of every run, or null]}. One bar per run, stacked by stage.
function stageBars(host, stages, runs) {
  const names = Object.keys(stages);
  const tip = tooltip(host);
  let svg = null;
  let last = 0;
  const isOn = legend(host, names, names.map((_, index) => index), () => draw(last));
  const draw = (width) => {
    last = width;
    const rowHeight = runs.length > 1 ? 50 : 34;
    const height = rowHeight * runs.length + 24;
    const sum = (run) => names.reduce((total, name, index) => total + (isOn(index) ? stages[name][run] || 0 : 0), 0);
    const longest = Math.max(...runs.map((_, run) => sum(run)), 1e-9);
    const made = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Mean seconds per step by stage" });
    runs.forEach((run, index) => {
      const top = rowHeight * index + (runs.length > 1 ? 18 : 2);
      if (runs.length > 1) made.append(shape("text", { class: "label", x: 0, y: top - 4 }, run));
      let left = 0;
      names.forEach((name, stage) => {
        const seconds = isOn(stage) ? stages[name][index] || 0 : 0;
        const size = (seconds / longest) * width;
        const bar = shape("rect", { x: left, y: top, width: Math.max(0, size - 1), height: 26, fill: color(stage) });
        const at = left + size / 2;
        const share = sum(index) ? asShare(seconds / sum(index)) : "";
        for (const kind of ["pointerenter", "pointerdown"]) bar.addEventListener(kind, () => tip.show([at, top + 30], element("div", {}, key(stage), `${name}: ${shortNumber(seconds)} s, ${share}`)));
        bar.addEventListener("pointerleave", () => tip.hide());
        made.append(bar);
        left += size;
      });
    });
    for (const at of ticks(0, longest, Math.max(2, Math.floor(width / 120)))) {
      const anchor = at === 0 ? "start" : at > longest * 0.95 ? "end" : "middle";
      made.append(shape("text", { x: (at / longest) * width, y: height - 6, "text-anchor": anchor }, `${shortNumber(at)} s`));
    }
    if (svg) svg.replaceWith(made);
    else host.prepend(made);
    svg = made;
  };
  drawn(host, draw);
}
