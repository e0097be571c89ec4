// Histograms as SVG, of the pairs that are shown, and where rows were lost.

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A step of 1, 2 or 5 times a power of ten that cuts `span` into at most `most` parts
function niceStep(span, most) {
  const raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 5, 10].find((factor) => factor * power >= raw) ?? 10);
}

const W = 420, H = 210, LEFT = 54, RIGHT = 10, TOP = 10, BOTTOM = 40;

// chosen upwards, rejected downwards over the same bins, as shares: nothing hides behind anything.
// up, down: how many fall into each bin
function histogram({ title, note, label, up, down, low, width, ticks, colour, format, unit }) {
  const bins = up.length, high = low + bins * width;
  const [ups, downs] = [up, down].map((counts) => counts.reduce((sum, n) => sum + n, 0)), share = (n, all) => all ? n / all : 0;
  const most = Math.max(...up.map((n) => share(n, ups)), ...down.map((n) => share(n, downs)), 1e-9);
  const middle = TOP + (H - TOP - BOTTOM) / 2, half = (H - TOP - BOTTOM) / 2;
  const x = (v) => LEFT + (W - LEFT - RIGHT) * (v - low) / (high - low);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${note}` });
  const gridStep = niceStep(most, 2);
  for (let g = gridStep; g <= most * 1.0001; g += gridStep) for (const sign of [-1, 1]) {
    const y = middle + sign * half * g / most;
    picture.append(svg("line", { x1: LEFT, x2: W - RIGHT, y1: y, y2: y, class: "grid" }),
      svg("text", { x: LEFT - 6, y: y + 3.5, class: "tick end" }, `${+(100 * g).toFixed(1)}%`));
  }
  for (let i = 0; i < bins; i++) for (const [n, all, sign, name] of [[up[i], ups, -1, "chosen"], [down[i], downs, 1, "rejected"]]) {
    if (!n) continue;
    const size = Math.max(1, half * share(n, all) / most), left = x(low + i * width);
    const bar = svg("rect", { x: left + 0.5, width: Math.max(0.8, x(low + (i + 1) * width) - left - 1),
      y: sign < 0 ? middle - size : middle, height: size, class: `bar-${name}` });
    if (colour) bar.style.fill = colour(low + (i + 0.5) * width);
    const from = low + i * width;
    bar.append(svg("title", {}, `${name}, ${format(from)} to ${format(from + width)}${i === bins - 1 ? " and above" : ""}: ${plural(n, unit)}`));
    picture.append(bar);
  }
  picture.append(svg("line", { x1: LEFT, x2: W - RIGHT, y1: middle, y2: middle, class: "axis" }));
  for (const v of ticks) picture.append(
    svg("line", { x1: x(v), x2: x(v), y1: H - BOTTOM, y2: H - BOTTOM + 4, class: "axis" }),
    svg("text", { x: x(v), y: H - BOTTOM + 16, class: "tick middle" }, format(v)));
  picture.append(svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 6, class: "label middle" }, label));
  const spot = `translate(11 ${middle}) rotate(-90)`;
  picture.append(svg("text", { transform: spot, class: "label middle" }, `share of ${unit}s`));
  for (const [name, y] of [["chosen", TOP + 9], ["rejected", H - BOTTOM - 4]])
    picture.append(svg("text", { x: W - RIGHT - 2, y, class: "side end" }, name));
  return make("figure", {}, make("figcaption", {}, make("b", {}, title), make("span", {}, note)), picture);
}

const binOf = (value, width, bins) => Math.max(0, Math.min(bins - 1, Math.floor(value / width + 1e-6)));

function lengthFigure(pairs) {
  const longest = Math.max(...DATA.pairs.flatMap((pair) => SIDES.map((name) => lengthOf(pair[name]))), 1);
  const width = Math.max(1, niceStep(longest, 24)), bins = Math.floor(longest / width) + 1;
  const lengths = SIDES.map((name) => pairs.map((pair) => lengthOf(pair[name])));
  const [up, down] = lengths.map((values) => {
    const counts = new Array(bins).fill(0);
    for (const value of values) counts[binOf(value, width, bins)]++;
    return counts;
  });
  const every = Math.max(1, niceStep(bins * width, 5)), ticks = [];
  for (let v = 0; v <= bins * width; v += every) ticks.push(v);
  return histogram({ title: "Length", note: pairs.length ? `median ${grouped(median(lengths[0]))} chosen, ${grouped(median(lengths[1]))} rejected` : "",
    label: `${UNIT} of a response`, up, down, low: 0, width, ticks, format: grouped, unit: "response" });
}

const WEIGHT_BINS = 20;

// Of one response under the rule in force; weights above 2 are counted with 2
function weightCounts(side) {
  side.counts ??= {};
  if (!side.counts[state.rule]) {
    const counts = side.counts[state.rule] = new Array(WEIGHT_BINS).fill(0);
    for (const weight of numbers(side, state.rule) ?? []) counts[binOf(weight, 2 / WEIGHT_BINS, WEIGHT_BINS)]++;
  }
  return side.counts[state.rule];
}

function weightFigure(pairs) {
  const [up, down] = SIDES.map((name) => {
    const sum = new Array(WEIGHT_BINS).fill(0);
    for (const pair of pairs) weightCounts(pair[name]).forEach((n, i) => sum[i] += n);
    return sum;
  });
  const means = SIDES.map((name) => {
    const tokens = pairs.reduce((sum, pair) => sum + lengthOf(pair[name]), 0);
    return pairs.reduce((sum, pair) => sum + lengthOf(pair[name]) * meanWeight(pair[name], state.rule), 0) / tokens;
  });
  return histogram({ title: "Weight", note: `mean ${show(means[0])} chosen, ${show(means[1])} rejected`,
    label: `weight of a token (${ruleName(state.rule)})`, up, down, low: 0, width: 2 / WEIGHT_BINS, ticks: [0, 0.5, 1, 1.5, 2],
    colour: (v) => shade(level(v) || (v < 1 ? -1 : 1)), format: (v) => `${+v.toFixed(1)}`, unit: "token" });
}

function dropFigure() {
  const { counts } = DATA, share = (n) => `${+(100 * n / Math.max(1, counts.input)).toFixed(1)}%`;
  const reasons = counts.stages.flatMap(({ stage, reasons: all }) => Object.entries(all).map(([reason, n]) => ({ stage, reason, n })));
  const most = Math.max(...reasons.map(({ n }) => n), 1);
  const whole = make("div", { class: "whole", "aria-hidden": "true" }, make("i", {}));
  whole.firstChild.style.width = share(counts.pairs);
  const list = make("table", { class: "drops" }, make("tbody", {}, ...reasons.map(({ stage, reason, n }, i) => {
    const bar = make("i", {});
    bar.style.width = `${100 * n / most}%`;
    return make("tr", {}, make("th", { scope: "row" }, i && reasons[i - 1].stage === stage ? "" : stage),
      make("td", {}, reason.replaceAll("_", " ")), make("td", { class: "bar-cell" }, bar), make("td", { class: "n" }, grouped(n)));
  })));
  return make("figure", { class: "dropped" }, make("figcaption", {}, make("b", {}, "Where rows were lost"),
    make("span", {}, `${grouped(counts.input)} rows, ${plural(counts.pairs, "pair")} (${share(counts.pairs)}), ${grouped(counts.dropped)} dropped`)),
  whole, reasons.length ? make("div", { class: "scroll", tabindex: 0 }, list) : make("p", {}, "none was dropped"), make("p", { class: "source" }, counts.file));
}

function drawFigures(pairs) {
  const figures = [lengthFigure(pairs)];
  if (DATA.rules.length) figures.push(weightFigure(pairs));
  if (DATA.counts) figures.push(dropFigure());
  document.getElementById("figures").replaceChildren(...figures);
}
