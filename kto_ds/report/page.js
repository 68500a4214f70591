"use strict";
// Draws the charts that charts.py and distribution_charts.py describe. No library, no network; every text gets in as text.
(() => {
  const {charts, runs} = JSON.parse(document.getElementById("page-data").textContent);
  const hidden = new Set();  // runs
  let smoothing = Number(document.getElementById("smoothing").value);  // weight of the past in a moving average
  const MARGIN = {left: 56, right: 14, top: 10, bottom: 24};
  const MARKED_BELOW = 30;  // points: a line through few hides where they are, and there is nothing to smooth

  const shown = (value) => {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en", {maximumSignificantDigits: size >= 1e4 ? 7 : 4});
  };

  // SVG

  const element = (name, attributes, parent, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  const ticksOf = (low, high, most, whole) => {
    let step = 10 ** Math.floor(Math.log10((high - low) / most));
    for (const factor of [1, 2, 5, 10]) if ((high - low) / (step * factor) <= most) { step *= factor; break; }
    if (whole) step = Math.max(1, Math.round(step));
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + step * 1e-9; tick++) ticks.push(Number((tick * step).toPrecision(12)));
    return ticks;
  };

  const marker = (kind, x, y, size) => {
    if (kind === "square") return `M${x - size},${y - size}h${2 * size}v${2 * size}h${-2 * size}z`;
    if (kind === "triangle") return `M${x},${y - 1.2 * size}L${x + 1.2 * size},${y + size}H${x - 1.2 * size}z`;
    if (kind === "diamond") return `M${x},${y - 1.4 * size}L${x + 1.4 * size},${y}L${x},${y + 1.4 * size}L${x - 1.4 * size},${y}z`;
    return `M${x - size},${y}a${size},${size} 0 1,0 ${2 * size},0a${size},${size} 0 1,0 ${-2 * size},0z`;
  };

  const path = (xs, ys) => xs.map((x, place) => `${place ? "L" : "M"}${x.toFixed(1)},${ys[place].toFixed(1)}`).join("");

  const canvas = (figure, height) => {
    const plot = figure.querySelector(".plot");
    const width = Math.max(plot.clientWidth, 200);
    const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-labelledby": `${figure.id}-alt`, tabindex: 0});
    plot.replaceChildren(svg);
    return {svg, width, height};
  };

  // curves

  // A moving average from the left and one from the right, so that the curve does not lag behind; without a pull to 0 at its ends.
  const smooth = (values) => {
    const average = (numbers) => {
      let sum = 0, weight = 0;
      return numbers.map((number) => {
        sum = smoothing * sum + number;
        weight = smoothing * weight + 1;
        return sum / weight;
      });
    };
    const backwards = average([...values].reverse()).reverse();
    return average(values).map((value, place) => (value + backwards[place]) / 2);
  };

  // Not Math.min(...values): a browser takes only so many arguments.
  const extremes = (values) => [values.reduce((least, value) => Math.min(least, value)), values.reduce((most, value) => Math.max(most, value))];

  const range = (values, padding) => {
    let [low, high] = extremes(values);
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
    return [low - padding * (high - low), high + padding * (high - low)];
  };

  const drawLines = (figure, chart) => {
    const curves = chart.curves.filter((curve) => !hidden.has(curve.run));
    const {svg, width, height} = canvas(figure, 210);
    const key = figure.querySelector(".key");
    key.replaceChildren();
    if (!curves.length) { element("text", {x: MARGIN.left, y: height / 2}, svg, "no run is chosen that has this"); return; }
    const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
    let [x0, x1] = chart.ticks ? [-0.4, chart.ticks.length - 0.6] : range(curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]), 0);
    const levels = curves.flatMap((curve) => [...curve.y, ...(curve.low || []), ...(curve.high || [])]);
    const [least, most] = extremes(levels);
    // A level to compare with is shown where it is near.
    const guide = chart.guide && (chart.guide.value - most < 3 * (most - least) && least - chart.guide.value < 3 * (most - least) || least === most) ? chart.guide : null;
    if (guide) levels.push(guide.value);
    let [y0, y1] = range(levels, 0.05);
    if (chart.from_zero) { y0 = 0; y1 = Math.max(y1, 1e-12); }
    const toX = (x) => left + (x - x0) / (x1 - x0) * (right - left);
    const toY = (y) => bottom - (y - y0) / (y1 - y0) * (bottom - top);

    for (const tick of ticksOf(y0, y1, 5, false)) {
      element("line", {class: "grid", x1: left, x2: right, y1: toY(tick), y2: toY(tick)}, svg);
      element("text", {x: left - 7, y: toY(tick) + 4, "text-anchor": "end"}, svg, shown(tick));
    }
    xTicks(svg, chart, {x0, x1, toX, bottom, room: right - left});
    if (guide) {
      element("line", {class: "guide", x1: left, x2: right, y1: toY(guide.value), y2: toY(guide.value)}, svg);
    }
    for (const curve of curves) drawCurve(svg, curve, toX, toY, chart.is_noisy);
    if (guide) nameGuide(svg, guide.words, toY(guide.value), {left, right, top}, curves.flatMap((curve) => curve.x.map((x, place) => [toX(x), toY(curve.y[place])])));
    fillKey(key, curves);
    const cursor = element("line", {class: "cursor", y1: top, y2: bottom, visibility: "hidden"}, svg);
    const all = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    follow(svg, figure, all.map(toX), (place) => {
      cursor.setAttribute("x1", toX(all[place])); cursor.setAttribute("x2", toX(all[place])); cursor.setAttribute("visibility", "visible");
      const where = chart.ticks ? `${chart.ticks[all[place]]} tokens` : `step ${shown(all[place])}`;
      const values = curves.map((curve) => {
        const at = nearest(curve.x, all[place]);
        if (chart.ticks && curve.x[at] !== all[place]) return null;
        const span = curve.low ? ` (${shown(curve.low[at])} to ${shown(curve.high[at])})` : "";
        const away = curve.x[at] === all[place] ? "" : ` at ${shown(curve.x[at])}`;
        const count = curve.counts ? ` of ${shown(curve.counts[at])} answers` : "";
        return `${runs.length > 1 ? `${runs[curve.run]} ` : ""}${curve.label} ${shown(curve.y[at])}${span}${away}${count}`;
      });
      return [where, ...values.filter((value) => value !== null)].join("  ·  ");
    });
  };

  // Write what a level means beside it, at that end and on that side where it hides the least of the curves.
  const nameGuide = (svg, words, y, {left, right, top}, points) => {
    const width = 6.5 * words.length;
    const places = [[right, "end", y - 4], [right, "end", y + 13], [left + 4, "start", y - 4], [left + 4, "start", y + 13]].filter(([, , base]) => base > top + 8);
    const hides = ([x, anchor, base]) => points.filter(([at, height]) => (anchor === "end" ? at > x - width - 4 : at < x + width + 4) && height > base - 14 && height < base + 5).length;
    const [x, anchor, base] = places.reduce((best, place) => hides(place) < hides(best) ? place : best);
    element("text", {x, y: base, "text-anchor": anchor, class: "over"}, svg, words);
  };

  const xTicks = (svg, chart, {x0, x1, toX, bottom, room}) => {
    const places = chart.ticks ? chart.ticks.map((_, place) => place) : ticksOf(x0, x1, Math.max(2, Math.floor(room / 75)), true);
    element("text", {x: toX(x0), y: bottom + 17, "text-anchor": chart.ticks ? "end" : "start"}, svg, chart.ticks ? "" : "step");
    const each = chart.ticks ? Math.ceil(chart.ticks.length * 62 / room) : 1;
    for (const place of places) {
      if (chart.ticks && place % each) continue;
      element("text", {x: toX(place), y: bottom + 17, "text-anchor": "middle"}, svg, chart.ticks ? chart.ticks[place] : shown(place));
    }
  };

  const drawCurve = (svg, curve, toX, toY, isNoisy) => {
    const group = element("g", {class: "drawn", "data-metric": curve.metric, "data-run": curve.run, "data-split": curve.split}, svg);
    const color = `var(--c${curve.color})`, xs = curve.x.map(toX);
    if (curve.low) element("path", {class: "band", fill: color, d: `${path(xs, curve.high.map(toY))}${path([...xs].reverse(), [...curve.low].reverse().map(toY)).replace("M", "L")}z`}, group);
    const isSmoothed = isNoisy && smoothing > 0 && !curve.marker && curve.x.length >= MARKED_BELOW;
    if (isSmoothed && !curve.low) element("path", {class: "raw", stroke: color, d: path(xs, curve.y.map(toY))}, group);
    const ys = (isSmoothed ? smooth(curve.y) : curve.y).map(toY);
    element("path", {class: "curve", stroke: color, "stroke-dasharray": curve.dash, d: path(xs, ys)}, group);
    if (curve.marker || curve.x.length < MARKED_BELOW) {
      const size = curve.marker ? 3.6 : 2.6;
      if (xs.length <= 60) xs.forEach((x, place) => element("path", {class: "mark", fill: color, d: marker(curve.marker, x, ys[place], size)}, group));
    }
  };

  // One entry a curve; of several runs one a run, which has a colour, and one for what its curves have in common.
  const fillKey = (key, curves) => {
    if (runs.length === 1) { for (const curve of curves) keyOf(key, curve.label, curve, `var(--c${curve.color})`); return; }
    for (const run of new Set(curves.map((curve) => curve.run))) keyOf(key, runs[run], {dash: "", marker: ""}, `var(--c${curves.find((curve) => curve.run === run).color})`);
    const looks = new Map(curves.map((curve) => [curve.label, curve]));
    if (looks.size > 1) for (const [label, curve] of looks) keyOf(key, label, curve, "var(--quiet)");
  };

  const keyOf = (key, label, curve, color) => {
    const item = document.createElement("li");
    const sign = element("svg", {viewBox: "0 0 26 12", "aria-hidden": "true"});
    element("path", {class: "curve", stroke: color, "stroke-dasharray": curve.dash, d: "M1,6H25"}, sign);
    if (curve.marker) element("path", {class: "mark", fill: color, d: marker(curve.marker, 13, 6, 3.6)}, sign);
    const words = document.createElement("span");
    words.textContent = label;
    item.append(sign, words);
    key.append(item);
  };

  const nearest = (sorted, value) => {
    let [low, high] = [0, sorted.length - 1];
    while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle + 1; else high = middle; }
    return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
  };

  // Tell what lies below a pointer, a finger, or the arrow keys.
  const follow = (svg, figure, xs, tell) => {
    const readout = figure.querySelector(".readout");
    let place = xs.length;
    const at = (next) => { place = Math.max(0, Math.min(xs.length - 1, next)); readout.textContent = tell(place); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      at(nearest(xs, (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width));
    });
    svg.addEventListener("keydown", (event) => {
      const moves = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20};
      if (event.key in moves) { at(place + moves[event.key]); event.preventDefault(); }
    });
  };

  // heat maps

  const drawHeat = (figure, chart) => {
    figure.hidden = hidden.has(chart.run);
    if (figure.hidden) return;
    const {svg, width, height} = canvas(figure, 230);
    const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
    const bins = chart.edges.length - 1, columns = chart.columns.length;
    const wide = (right - left) / columns, high = (bottom - top) / bins;
    const totals = chart.counts.map((counts) => counts.reduce((sum, count) => sum + count, 0));
    const largest = Math.max(...chart.counts.flatMap((counts, column) => counts.map((count) => count / totals[column])));
    const cells = element("g", {class: "drawn", "data-metric": "logratios", "data-run": chart.run}, svg);
    chart.counts.forEach((counts, column) => counts.forEach((count, bin) => {
      if (!count) return;
      const box = {x: left + column * wide, y: bottom - (bin + 1) * high, width: wide + 0.3, height: high + 0.3};
      element("rect", {...box, fill: `var(--c${chart.color})`, "fill-opacity": (0.08 + 0.92 * count / totals[column] / largest).toFixed(3)}, cells);
    }));
    chart.edges.forEach((edge, place) => {
      const isPower = edge !== null && (edge === 0 || Number.isInteger(Math.log2(Math.abs(edge)) / 2));
      if (!isPower || edge !== 0 && high < 3 && Math.abs(edge) < 1) return;
      const y = bottom - place * high;
      element("line", {class: edge === 0 ? "guide" : "grid", x1: left - 3, x2: edge === 0 ? right : left, y1: y, y2: y}, svg);
      if (edge === 0 || Math.abs(edge) >= 1) element("text", {x: left - 7, y: y + 4, "text-anchor": "end"}, svg, shown(edge));
    });
    const middle = (column) => (chart.columns[column][0] + chart.columns[column][1]) / 2;
    const shownColumns = columns === 1 ? [0] : [0, Math.floor((columns - 1) / 2), columns - 1];
    for (const column of new Set(shownColumns)) element("text", {x: left + (column + 0.5) * wide, y: bottom + 17, "text-anchor": "middle"}, svg, shown(Math.round(middle(column))));
    const outline = element("rect", {class: "cursor", fill: "none", y: top, width: wide, height: bottom - top, visibility: "hidden"}, svg);
    follow(svg, figure, chart.columns.map((_, column) => left + (column + 0.5) * wide), (column) => {
      outline.setAttribute("x", left + column * wide); outline.setAttribute("visibility", "visible");
      const [first, last] = chart.columns[column], total = totals[column];
      const above = chart.counts[column].reduce((sum, count, bin) => sum + (chart.edges[bin] !== null && chart.edges[bin] >= 0 ? count : 0), 0);
      const most = chart.counts[column].indexOf(Math.max(...chart.counts[column]));
      const bin = `${chart.edges[most] === null ? "below" : shown(chart.edges[most])} to ${chart.edges[most + 1] === null ? "above" : shown(chart.edges[most + 1])} nats`;
      return `${first === last ? `step ${shown(first)}` : `steps ${shown(first)} to ${shown(last)}`}  ·  ${shown(total)} completions, ${Math.round(100 * above / total)} % at 0 or above  ·  most at ${bin}`;
    });
  };

  const draw = () => {
    for (const chart of charts) {
      const figure = document.getElementById(`chart-${chart.name}`);
      (chart.kind === "heat" ? drawHeat : drawLines)(figure, chart);
    }
    document.documentElement.dataset.drawn = String(1 + Number(document.documentElement.dataset.drawn || 0));
  };

  for (const box of document.querySelectorAll("[data-choose-run]")) {
    box.addEventListener("change", () => { const run = Number(box.dataset.chooseRun); if (box.checked) hidden.delete(run); else hidden.add(run); draw(); });
  }
  const chooser = document.getElementById("smoothing");
  chooser.addEventListener("change", () => { smoothing = Number(chooser.value); draw(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });
  draw();
})();
