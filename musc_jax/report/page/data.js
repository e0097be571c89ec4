// What Python wrote, and what follows from it. Axes: k pieces of a response, t its tokens.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["chosen", "rejected"];
const LEVELS = 10; // steps of colour on either side of 1

// The numbers of one field of a response, one a token; null where it has none
function numbers(side, field) {
  const found = side.fields && side.fields[field];
  if (!found) return null;
  side.decoded ??= {};
  if (!side.decoded[field]) {
    const [low, step, text] = found, bytes = atob(text), values = new Float32Array(bytes.length / 2);
    for (let t = 0; t < values.length; t++)
      values[t] = low + step * (bytes.charCodeAt(2 * t) + 256 * bytes.charCodeAt(2 * t + 1));
    side.decoded[field] = values;
  }
  return side.decoded[field];
}

// Where each piece begins, counted in tokens, and the number of tokens at the end
function starts(side) {
  if (!side.starts) {
    const parts = new Map(side.parts);
    let at = 0;
    side.starts = side.pieces.map((_, k) => { const start = at; at += parts.get(k) ?? 1; return start; });
    side.starts.push(at);
  }
  return side.starts;
}

const textOf = (side) => side.text ??= side.pieces.join("");
// Tokens, or words where no tokenizer was given
const lengthOf = (side) => side.tokens ?? (side.words ??= (side.text.match(/\S+/g) ?? []).length);
const UNIT = DATA.model === null ? "words" : "tokens";

function mean(values) {
  let sum = 0;
  for (const value of values) sum += value;
  return values.length ? sum / values.length : NaN;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Mean weight of a side under a rule; 1 where there are no weights
function meanWeight(side, rule) {
  const values = numbers(side, rule);
  if (!values) return 1;
  side.means ??= {};
  return side.means[rule] ??= mean(values);
}

// -LEVELS .. LEVELS; weights beyond 2 count as 2
const level = (weight) => Math.max(-LEVELS, Math.min(LEVELS, Math.round((weight - 1) * LEVELS)));
const shade = (step) => step === 0 ? "var(--sheet)" : `var(--${step < 0 ? "low" : "high"}-${Math.abs(step)})`;

const asked = (pair) => pair.constraints.filter((c) => c.text).length; // without those that only the perturbed side has
const changed = (pair) => pair.constraints.filter((c) => c.kind !== "kept").length;

// "kl" of the store is shown as itself; the rows' own scores and plain DPO by what they are
const ruleName = (rule) => rule === "columns" ? "the rows' own scores" : rule.replaceAll("_", " ");

const show = (value, digits = 2) => Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–";
const grouped = (number) => number.toLocaleString("en");
const plural = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;

// An element. Texts are set as text, never as markup
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
