// Elements and plain SVG. No style attributes: the page's content security policy refuses them.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(found, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) found.setAttribute(name, value);
  }
  found.append(...children.filter((child) => child !== null));
  return found;
}

// parts: [class, value, words]. They fill the share value / whole of the width.
export function stackedBar(parts, whole, label) {
  const bar = shape("svg", { role: "img", "aria-label": label, viewBox: "0 0 1000 10", preserveAspectRatio: "none" });
  let at = 0;
  for (const [kind, value, words] of parts.filter((part) => part[1] > 0)) {
    const width = (1000 * value) / whole;
    bar.append(shape("rect", { class: kind, x: at, y: 0, width, height: 10, "vector-effect": "non-scaling-stroke" },
      shape("title", {}, words)));
    at += width;
  }
  return element("div", { class: "bar" }, bar);
}

// points: [x, y or null] ascending. marks: [x, class, sign, words]. Returns the values under the pointer by `over`.
export function curve(host, points, marks, label, over) {
  const [width, height] = [Math.max(host.clientWidth, 200), Math.max(host.clientHeight, 120)];
  const [left, right, top, bottom] = [54, 12, 18, 24];
  const values = points.map((point) => point[1]).filter((value) => value !== null);
  const xs = ticks(points.length ? points[0][0] : 0, points.length ? Math.max(points.at(-1)[0], 1) : 1, 6, true);
  const ys = ticks(values.length ? Math.min(...values) : 0, values.length ? Math.max(...values) : 1, 4, false);
  const x = (value) => left + ((value - xs.low) / (xs.high - xs.low)) * (width - left - right);
  const y = (value) => height - bottom - ((value - ys.low) / (ys.high - ys.low)) * (height - top - bottom);
  const picture = shape("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${height}` });
  for (const value of ys.at) {
    picture.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, plain(value)));
  }
  for (const value of xs.at) {
    picture.append(shape("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, plain(value)));
  }
  for (const [at, kind, sign, words] of marks.filter((mark) => mark[0] >= xs.low && mark[0] <= xs.high)) {
    picture.append(shape("g", {}, shape("title", {}, words),
      shape("line", { class: `mark ${kind}`, x1: x(at), x2: x(at), y1: top, y2: height - bottom }),
      shape("text", { class: `sign ${kind}`, x: x(at), y: top - 5 }, sign)));
  }
  picture.append(shape("path", { class: "curve", d: line(points, x, y) }));
  if (points.length === 1 && values.length) picture.append(shape("circle", { cx: x(points[0][0]), cy: y(values[0]), r: 3, class: "form" }));
  picture.addEventListener("pointermove", (event) => {
    const at = event.clientX - picture.getBoundingClientRect().left;
    over(points.reduce((best, point) => (Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best), points[0]));
  });
  host.replaceChildren(picture);
}

function line(points, x, y) {
  let [found, pen] = ["", "M"];
  for (const [at, value] of points) {
    if (value === null) pen = "M"; // a gap: the loss was not finite
    else {
      found += `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    }
  }
  return found;
}

function ticks(low, high, most, whole) {
  if (high - low < 1e-12) [low, high] = [low - Math.max(Math.abs(low) * 0.1, 1e-6), high + Math.max(Math.abs(high) * 0.1, 1e-6)];
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  let step = unit * ([1, 2, 5, 10].find((times) => unit * times >= rough) ?? 10);
  if (whole) step = Math.max(1, Math.round(step));
  const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
  const at = Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
  if (whole) return { at: at.filter((value) => value >= low && value <= high), low, high };
  return { at, low: at[0], high: at.at(-1) };
}

export function plain(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 99.5) return `${value.toPrecision(value < 10 ? 2 : 3)} s`;
  if (value < 5400) return `${(value / 60).toFixed(0)} min`;
  return value < 172800 ? `${(value / 3600).toFixed(1)} h` : `${(value / 86400).toFixed(1)} d`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value > 0 ? Math.min(Math.floor(Math.log2(value) / 10), 4) : 0;
  return `${plain(value / 1024 ** power)} ${units[power]}`;
}
