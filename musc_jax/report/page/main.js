// Puts the page together and listens.

const by = (id) => document.getElementById(id);
const THEMES = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
const KEYS = [["/", "search"], ["j  k", "next, previous pair"], ["[  ]", "other weights"], ["s", "sort by the next"],
  ["o", "other order"], ["e", "show long texts whole"], ["t", "light, dark"], ["← → ↑ ↓", "walk through the tokens of a response"],
  ["Esc", "clear the search, close"]];

function masthead() {
  by("file").textContent = DATA.file;
  const lead = [DATA.rule === null ? "No model was given, so the texts are shown without tokens and weights (config.model)."
    : DATA.rules.length ? "Every token of a response is tinted by its weight in training: blue below 1, orange above, 2 at most."
    : "The rows bring no weights: in training every token would count 1."];
  if (DATA.pairs.length < DATA.total)
    lead.push(`The page shows ${grouped(DATA.pairs.length)} of ${plural(DATA.total, "pair")}, ${DATA.sampled} (config.max_pairs).`);
  by("lead").textContent = lead.join(" ");
  const total = DATA.pairs.reduce((sum, pair) => sum + lengthOf(pair.chosen) + lengthOf(pair.rejected), 0);
  const numbers = [["pairs", grouped(DATA.pairs.length)], [UNIT, grouped(total)]];
  const all = DATA.pairs.reduce((sum, pair) => sum + asked(pair), 0);
  if (all) numbers.push(["constraints", grouped(all)], ["of them changed", grouped(DATA.pairs.reduce((sum, pair) => sum + changed(pair), 0))]);
  by("numbers").append(...numbers.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  by("foot").append(...DATA.said.map((line) => make("p", {}, line)),
    make("p", {}, DATA.model === null ? "" : `tokens of ${DATA.model}`));
}

function controls() {
  by("sort").append(...Object.entries(SORTS).map(([name, [label]]) => make("option", { value: name }, label)));
  by("rule").append(...DATA.rules.map((rule) => make("option", { value: rule }, ruleName(rule))));
  by("ruling").hidden = by("scale").hidden = !DATA.rules.length;
  for (let step = -LEVELS; step <= LEVELS; step += 2) {
    const box = make("i", {});
    box.style.background = shade(step);
    by("scale").append(box);
  }
  for (const [text, name] of [["0", "least"], ["1", "one"], ["2", "most"]]) by("scale").append(make("b", { class: name }, text));
  by("search").addEventListener("input", () => set({ q: by("search").value }));
  by("sort").addEventListener("change", () => set({ sort: by("sort").value }));
  by("rule").addEventListener("change", () => set({ rule: by("rule").value }));
  by("direction").addEventListener("click", () => set({ desc: state.desc ? "" : "1" }));
  by("theme").addEventListener("click", () => set({ theme: next(Object.keys(THEMES), state.theme) }));
  by("keys").addEventListener("click", help);
  by("help").append(make("h2", {}, "Keys"), make("dl", {}, ...KEYS.flatMap(([key, what]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, what)])),
    make("form", { method: "dialog" }, make("button", {}, "close")));
}

const next = (items, item, step = 1) => items[(items.indexOf(item) + step + items.length) % items.length];

function help() {
  if (by("help").open) by("help").close();
  else by("help").showModal();
}

function set(changes) {
  const before = { ...state };
  Object.assign(state, { pair: "", token: "" }, changes);
  writeState();
  update(before);
}

function update(before) {
  const differs = (name) => !before || before[name] !== state[name];
  if (by("search").value !== state.q) by("search").value = state.q;
  by("sort").value = state.sort;
  by("rule").value = state.rule;
  by("direction").textContent = state.desc ? "↓" : "↑";
  by("direction").title = state.desc ? "largest first" : "smallest first";
  [by("theme").textContent, by("theme").title] = THEMES[state.theme] ?? THEMES[""];
  document.documentElement.dataset.theme = state.theme;
  if (differs("rule")) retint();
  if (before && differs("open")) for (const button of document.querySelectorAll(`.more[aria-expanded="${!state.open}"]`)) button.click();
  if (["q", "sort", "desc"].some(differs) || (differs("rule") && before)) list();
  if (state.pair) {
    const pair = DATA.pairs.find(({ id }) => id === state.pair);
    if (pair && listed.includes(pair)) go(cardOf(pair), state.token);
  }
}

// From the pair that has the focus, else from the one at the top of the window
function step(direction) {
  const shown = listed.map(cardOf), top = parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop);
  const place = (card) => card.getBoundingClientRect();
  const focused = shown.indexOf(document.activeElement.closest(".pair"));
  const seen = focused >= 0 && place(shown[focused]).bottom > top && place(shown[focused]).top < innerHeight;
  const at = seen ? focused + direction
    : direction > 0 ? shown.findIndex((card) => place(card).top > top + 8) : shown.findLastIndex((card) => place(card).top < top - 8);
  if (shown[at]) go(shown[at], "");
  else if (direction < 0) scrollTo(0, 0);
}

const ACTIONS = {
  "/": () => { by("search").focus(); by("search").select(); },
  j: () => step(1),
  k: () => step(-1),
  "]": () => DATA.rules.length && set({ rule: next(DATA.rules, state.rule) }),
  "[": () => DATA.rules.length && set({ rule: next(DATA.rules, state.rule, -1) }),
  s: () => set({ sort: next(Object.keys(SORTS), state.sort) }),
  o: () => set({ desc: state.desc ? "" : "1" }),
  e: () => set({ open: state.open ? "" : "1" }),
  t: () => set({ theme: next(Object.keys(THEMES), state.theme) }),
  "?": help,
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, select, textarea");
  if (event.key === "Escape") {
    point(null);
    if (event.target === by("search") && state.q) { event.preventDefault(); set({ q: "" }); }
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !ACTIONS[event.key] || (by("help").open && event.key !== "?")) return;
  event.preventDefault();
  ACTIONS[event.key]();
});

// On paper everything is shown, in ink on white
addEventListener("beforeprint", () => listed.forEach((pair) => fill(cardOf(pair))));
addEventListener("hashchange", () => { const before = { ...state }; readState(); update(before); });
addEventListener("error", (event) => fault(event.message));
addEventListener("unhandledrejection", (event) => fault(String(event.reason)));

function fault(message) {
  document.documentElement.dataset.error = message;
  document.body.prepend(make("p", { class: "fault" }, `This page has a fault: ${message}`));
}

try {
  readState();
  masthead();
  controls();
  update(null);
  document.documentElement.dataset.ready = "1";
} catch (error) {
  fault(error.stack);
}
