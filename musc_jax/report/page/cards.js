// The pairs as cards: found, sorted, and filled when they come near the window.

const both = (pair, value) => SIDES.map((name) => value(pair[name]));
const average = (pair, rule) => {
  const tokens = both(pair, lengthOf), means = both(pair, (side) => meanWeight(side, rule));
  return (tokens[0] * means[0] + tokens[1] * means[1]) / Math.max(1, tokens[0] + tokens[1]);
};
const apart = ([a, b]) => a - b;

// name -> [what it is called, pair -> number or text]
const SORTS = {
  file: ["place in the file", (pair) => pair.row],
  id: ["id", (pair) => pair.id],
  chosen: ["length of chosen", (pair) => lengthOf(pair.chosen)],
  rejected: ["length of rejected", (pair) => lengthOf(pair.rejected)],
  length: ["length of both", (pair) => lengthOf(pair.chosen) + lengthOf(pair.rejected)],
  longer: ["how much longer chosen is", (pair) => apart(both(pair, lengthOf))],
  mean: ["mean weight", (pair) => average(pair, state.rule)],
  heavier: ["how much heavier chosen is", (pair) => apart(both(pair, (side) => meanWeight(side, state.rule)))],
  constraints: ["number of constraints", asked],
  changed: ["number of changed constraints", changed],
};
if (!DATA.rules.length) { delete SORTS.mean; delete SORTS.heavier; }

const BY_NAME = new Intl.Collator("en", { numeric: true });

function sorted(pairs) {
  const [, key] = SORTS[state.sort], sign = state.desc ? -1 : 1;
  const keyed = pairs.map((pair) => [key(pair), pair]);
  keyed.sort(([a, p], [b, q]) => sign * (typeof a === "string" ? BY_NAME.compare(a, b) : a - b) || p.row - q.row);
  return keyed.map(([, pair]) => pair);
}

const promptText = (pair) => pair.prompt.map((m) => (m.rewritten ?? m.parts.map(([, text]) => text)).join("\n")).join("\n");

function words(query) {
  return [...query.toLocaleLowerCase("en").matchAll(/"([^"]+)"?|(\S+)/g)].map(([, phrase, word]) => phrase ?? word);
}

function found(pairs) {
  const wanted = words(state.q);
  if (!wanted.length) return pairs;
  return pairs.filter((pair) => {
    pair.haystack ??= [pair.id, promptText(pair), ...pair.constraints.flatMap((c) => [c.text, c.new ?? ""]),
      textOf(pair.chosen), textOf(pair.rejected)].join("\n").toLocaleLowerCase("en");
    return wanted.every((word) => pair.haystack.includes(word));
  });
}

const cards = new Map(); // pair -> its card, made once
const near = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) if (isIntersecting) fill(target);
}, { rootMargin: "1500px" });

function cardOf(pair) {
  if (!cards.has(pair)) {
    const fate = changed(pair), facts = [];
    if (pair.constraints.length) facts.push(`${plural(asked(pair), "constraint")}${fate ? `, ${fate} changed` : ""}`);
    const link = make("a", { href: "#", title: "a link to this pair", onclick: (event) => {
      event.preventDefault();
      set({ pair: pair.id });
    } }, make("bdi", {}, pair.id));
    const card = make("article", { class: "pair", tabindex: -1, "aria-label": `pair ${pair.id}` },
      make("header", {}, make("h2", {}, link), make("span", { class: "row" }, `row ${grouped(pair.row)}`),
        ...facts.map((fact) => make("span", {}, fact))));
    card.pair = pair;
    cards.set(pair, card);
  }
  return cards.get(pair);
}

function fill(card) {
  if (card.filled) return;
  card.filled = true;
  near.unobserve(card);
  const { pair } = card;
  card.append(make("div", { class: pair.constraints.length ? "columns" : "columns one" }, instruction(pair), constraints(pair)),
    make("div", { class: "columns" }, ...SIDES.map((name) => response(pair, name))));
  for (const box of card.querySelectorAll(".clip")) clip(box);
}

function instruction(pair) {
  const diff = pair.prompt.some((m) => m.rewritten || m.parts.some(([what]) => what));
  const section = make("section", { class: "instruction" }, make("h3", {}, "Instruction",
    make("small", {}, diff ? "what the perturbed one leaves out, and has instead" : pair.perturbed ? "the perturbed one is the same" : "")));
  const box = make("div", { class: "clip" });
  for (const message of pair.prompt) {
    if (message.role && pair.prompt.length > 1) box.append(make("div", { class: "role" }, message.role));
    if (message.rewritten) {
      const [full, perturbed] = message.rewritten;
      box.append(make("div", { class: "text", dir: "auto" }, full), make("div", { class: "role" }, "perturbed, written anew"),
        make("div", { class: "text", dir: "auto" }, make("ins", {}, perturbed)));
    } else box.append(make("div", { class: "text", dir: "auto" }, ...message.parts.map(([what, text]) =>
      what ? make(what < 0 ? "del" : "ins", {}, text) : text)));
  }
  section.append(box);
  return section;
}

function constraints(pair) {
  if (!pair.constraints.length) return null;
  const list = make("ol", {}, ...pair.constraints.map(({ text, kind, new: other }) =>
    make("li", { class: kind, dir: "auto" }, kind === "kept" ? text : text ? make("del", {}, text) : "",
      kind === "kept" ? null : make("em", {}, kind), other && kind !== "kept" ? make("ins", {}, other) : null)));
  return make("section", { class: "constraints" }, make("h3", {}, "Constraints"), make("div", { class: "clip" }, list));
}

function response(pair, name) {
  const side = pair[name], cut = side.full_length - side.tokens;
  const facts = [plural(lengthOf(side), UNIT.slice(0, -1))];
  const section = make("section", { class: `response ${name}` });
  const told = make("small", {});
  section.append(make("h3", {}, name === "chosen" ? "Chosen" : "Rejected", told));
  if (side.pieces) section.append(make("div", { class: "profile-place" }));
  const block = side.pieces ? tokenBlock(pair, name) : make("div", { class: "text", dir: "auto", tabindex: 0 }, side.text);
  section.append(make("div", { class: "clip" }, block,
    cut > 0 ? make("p", { class: "cut" }, `cut here: ${plural(cut, "further token")} of ${grouped(side.full_length)} lie beyond max_length`) : null));
  section.update = () => {
    const weight = side.pieces && state.rule ? [`mean weight ${show(meanWeight(side, state.rule))}`] : [];
    told.textContent = [...facts, ...weight].join(", ");
    section.querySelector(".profile-place")?.replaceChildren(...[profile(side)].filter(Boolean));
  };
  section.update();
  return section;
}

// A long text shows its beginning until somebody asks for the rest
function clip(box) {
  if (box.scrollHeight <= box.clientHeight + 40) { box.classList.remove("clip"); return; }
  const button = make("button", { class: "more", type: "button", "aria-expanded": "false", onclick: () => {
    const open = box.classList.toggle("unclipped");
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "show less" : "show all";
  } }, "show all");
  box.after(button);
  if (state.open) button.click();
}

function retint() {
  for (const card of cards.values()) if (card.filled) {
    for (const block of card.querySelectorAll(".tokens")) tint(block);
    for (const section of card.querySelectorAll(".response")) section.update();
  }
}

let listed = [];
function list() {
  point(null);
  listed = sorted(found(DATA.pairs));
  const main = document.getElementById("pairs");
  main.replaceChildren(...(listed.length ? listed.map(cardOf) : [make("p", { class: "none" }, "No pair has all of these words.")]));
  listed.slice(0, 3).forEach((pair) => fill(cardOf(pair)));
  for (const pair of listed) if (!cardOf(pair).filled) near.observe(cardOf(pair));
  document.getElementById("count").textContent =
    listed.length === DATA.pairs.length ? plural(listed.length, "pair") : `${grouped(listed.length)} of ${plural(DATA.pairs.length, "pair")}`;
  drawFigures(listed);
  mark();
}

// What was searched for, where the browser can mark text without changing it
function mark() {
  if (!globalThis.CSS?.highlights) return;
  CSS.highlights.delete("found");
  const wanted = words(state.q);
  if (!wanted.length) return;
  const ranges = [];
  for (const text of document.querySelectorAll("#pairs .text, #pairs li")) {
    const nodes = [], walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    let whole = "";
    while (walker.nextNode()) { nodes.push([whole.length, walker.currentNode]); whole += walker.currentNode.data; }
    const folded = whole.toLowerCase();
    if (folded.length !== whole.length) continue; // a few letters grow when they are made small: positions would be off
    const spot = (at, end) => { const [start, node] = nodes.findLast(([from]) => end ? from < at : from <= at); return [node, at - start]; };
    for (const word of wanted) for (let at = folded.indexOf(word); at >= 0; at = folded.indexOf(word, at + word.length)) {
      const range = new Range();
      range.setStart(...spot(at, false));
      range.setEnd(...spot(at + word.length, true));
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// token: "chosen.12", the twelfth token of that response, or ""
function go(card, token) {
  fill(card);
  card.focus({ preventScroll: true });
  if (!token) card.scrollIntoView({ block: "start" });
  const [name, number] = token.split("."), block = card.querySelector(`.response.${SIDES.includes(name) ? name : "none"} .tokens`);
  const k = block ? starts(block.side).findLastIndex((start) => start < Number(number)) : -1;
  if (k < 0 || k >= block.children.length) return;
  reach(block.children[k]);
}
