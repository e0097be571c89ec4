// The tokens of a response: tinted, walked through with the arrow keys, and what is known of one.

const tip = document.getElementById("tip");
let pointed = null; // the piece that the tip speaks of: {element, block, k}

// Signs that would not be seen, or would turn the page's own text around, by their names
const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]/gu;
const NAMED = { "\n": "↵", "\t": "⇥", "\r": "␍" };
const codepoint = (sign) => `U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
const visible = (text) => text.replace(HIDDEN, (sign) => NAMED[sign] ?? `⟨${codepoint(sign)}⟩`).replaceAll(" ", "␣");

// What stands in the running text: line breaks break, joiners join, what has no glyph gets one
function shown(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cn}\p{Co}]/gu, (sign) =>
    "\n\t\u200d\u200c\ufeff".includes(sign) ? sign : sign < " " ? String.fromCharCode(0x2400 + sign.charCodeAt(0)) : "▯");
}

function tokenBlock(pair, name) {
  const side = pair[name], special = new Set(side.special), parts = new Map(side.parts);
  const block = make("div", {
    class: "text tokens", tabindex: 0, role: "group", dir: "auto",
    "aria-label": `${name} response of ${pair.id}, ${plural(side.tokens, "token")}; the arrow keys walk through them`,
  });
  block.pair = pair;
  block.side = side;
  side.pieces.forEach((text, k) => {
    const piece = document.createElement("span");
    piece.className = special.has(k) ? "t special" : "t";
    piece.k = k;
    if (parts.has(k)) piece.dataset.parts = parts.get(k);
    // The sign of a line break is drawn by the style, so that copied text stays the response's own
    if (text.includes("\n")) piece.dataset.breaks = "↵".repeat(text.split("\n").length - 1);
    piece.textContent = shown(text);
    block.append(piece);
  });
  tint(block);
  return block;
}

function tint(block) {
  const { side } = block, weights = numbers(side, state.rule), at = starts(side);
  for (const piece of block.children) {
    const base = piece.classList.contains("special") ? "t special" : "t";
    const from = at[piece.k], to = at[piece.k + 1];
    piece.style.background = "";
    if (!weights) { piece.className = base; continue; }
    const step = level(mean(weights.subarray(from, to)));
    piece.className = step ? `${base} ${step < 0 ? "l" : "h"}${Math.abs(step)}` : base;
    if (to - from > 1) piece.style.background = stripes(Array.from(weights.subarray(from, to), level));
  }
}

// Colours side by side, one for each number
function stripes(steps) {
  const width = 100 / steps.length;
  return `linear-gradient(to right, ${steps.map((s, i) => `${shade(s)} ${i * width}% ${(i + 1) * width}%`).join(", ")})`;
}

// The weights over the whole response, at most BINS of them
const BINS = 120;
function profile(side) {
  const weights = numbers(side, state.rule);
  if (!weights) return null;
  const bins = Math.min(BINS, weights.length), steps = [];
  for (let i = 0; i < bins; i++)
    steps.push(level(mean(weights.subarray(Math.floor(i * weights.length / bins), Math.floor((i + 1) * weights.length / bins)))));
  const strip = make("div", { class: "profile", "aria-hidden": "true", title: "the weights from the first token to the last" });
  strip.style.background = stripes(steps);
  return strip;
}

function point(piece, again = false) {
  if (pointed?.element === piece && !again) return;
  pointed?.element.classList.remove("pointed");
  pointed = null;
  tip.hidden = true;
  if (!piece) return;
  const block = piece.parentElement;
  pointed = { element: piece, block, k: piece.k };
  piece.classList.add("pointed");
  tip.replaceChildren(...described(block.side, piece.k));
  tip.hidden = false;
  const spot = piece.getClientRects()[0] ?? piece.getBoundingClientRect(), { offsetWidth: w, offsetHeight: h } = tip;
  const below = spot.bottom + h + 12 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(spot.left, innerWidth - w - 8))}px`;
  tip.style.top = `${Math.max(8, below ? spot.bottom + 6 : spot.top - h - 6)}px`;
}

function described(side, k) {
  const at = starts(side), from = at[k], to = at[k + 1];
  const range = to - from > 1 ? `tokens ${from + 1}–${to}` : `token ${from + 1}`;
  const head = make("div", { class: "tip-head" },
    make("bdi", { class: "tip-text" }, visible(side.pieces[k]) || "∅"),
    make("span", {}, `${range} of ${grouped(side.tokens)}${side.special.includes(k) ? ", special" : ""}`));
  const rows = [head];
  if (to - from > 1) rows.push(make("p", {}, `One character, or a few, cut into ${to - from} tokens: a stripe for each.`));
  const values = (field) => Array.from(numbers(side, field)?.subarray(from, to) ?? []);
  const rules = DATA.rules.filter((rule) => numbers(side, rule));
  if (rules.length) rows.push(make("table", { class: "weights" }, make("tbody", {}, ...rules.map((rule) =>
    make("tr", { class: rule === state.rule ? "current" : null }, make("th", { scope: "row" }, ruleName(rule)),
      make("td", {}, values(rule).map((v) => show(v)).join(" · ")), make("td", {}, gauge(mean(values(rule)))))))));
  else rows.push(make("p", {}, "no weights: every token counts alike"));
  rows.push(...scoreTable(values));
  return rows;
}

function gauge(weight) {
  const bar = make("span", { class: "gauge" }), fill = make("i", {}), step = level(weight);
  const reach = Math.min(Math.abs(weight - 1), 1) * 50;
  fill.style.left = `${weight < 1 ? 50 - reach : 50}%`;
  fill.style.width = `${reach}%`;
  fill.style.background = step < 0 ? "var(--low)" : "var(--high)";
  bar.append(fill);
  return bar;
}

// logprob_full, entropy_perturbed, ...: kinds as rows, contexts as columns; what is named otherwise below
function scoreTable(values) {
  const split = DATA.scores.map((field) => [field, ...(field.match(/^(logprob|entropy)_(\w+)$/)?.slice(1) ?? [field, ""])]);
  const known = split.filter(([field]) => values(field).length);
  if (!known.length) return [];
  const kinds = [...new Set(known.map(([, kind]) => kind))], contexts = [...new Set(known.map(([, , context]) => context))];
  const cell = (kind, context) => known.find(([, a, b]) => a === kind && b === context);
  return [make("table", { class: "scores" },
    make("thead", {}, make("tr", {}, make("th", {}, "nats"), ...contexts.map((c) => make("th", { scope: "col" }, c)))),
    make("tbody", {}, ...kinds.map((kind) => make("tr", {}, make("th", { scope: "row" }, kind === "logprob" ? "log p" : kind),
      ...contexts.map((c) => make("td", {}, cell(kind, c) ? values(cell(kind, c)[0]).map((v) => show(v)).join(" · ") : ""))))))];
}

// Shows a token wherever it lies, and says it to who cannot see it
function reach(piece) {
  const box = piece.closest(".clip:not(.unclipped)");
  if (box && piece.offsetTop - box.offsetTop > box.clientHeight - 40) box.nextElementSibling?.click();
  piece.scrollIntoView({ block: "nearest" });
  point(piece);
  const { side } = piece.parentElement, from = starts(side)[piece.k], weights = numbers(side, state.rule);
  document.getElementById("heard").textContent =
    `token ${from + 1}, ${visible(side.pieces[piece.k])}${weights ? `, weight ${show(weights[from])}` : ""}`;
}

document.addEventListener("pointerover", (event) => {
  const piece = event.target.closest?.(".tokens > .t");
  if (piece || !tip.contains(event.target)) point(piece);
});
// A click puts the token into the address
document.addEventListener("click", (event) => {
  const piece = event.target.closest?.(".tokens > .t");
  if (!piece || String(getSelection())) return;
  const { pair, side } = piece.parentElement;
  Object.assign(state, { pair: pair.id, token: `${side === pair.chosen ? "chosen" : "rejected"}.${starts(side)[piece.k] + 1}` });
  writeState();
  point(piece);
});
document.addEventListener("scroll", () => pointed && point(pointed.element, true), { passive: true, capture: true });
document.addEventListener("focusout", () => point(null));
document.addEventListener("keydown", (event) => {
  const block = event.target.closest?.(".tokens");
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (!block || !step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const last = block.children.length - 1, now = pointed?.block === block ? pointed.k : step > 0 ? -1 : last + 1;
  const piece = block.children[Math.max(0, Math.min(last, Math.abs(step) === 10 && now < 0 ? 0 : now + step))];
  reach(piece);
});
