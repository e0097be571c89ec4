// What is shown lives in the address, so that a view can be sent to somebody: #q=haiku&sort=mean&desc=1&rule=kl
// pair is an id, token one of its tokens: chosen.12

const DEFAULTS = { q: "", sort: "file", desc: "", rule: DATA.rules[0] ?? "", theme: "", pair: "", token: "", open: "" };
const state = { ...DEFAULTS };

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? DEFAULTS[name];
  if (!DATA.rules.includes(state.rule)) state.rule = DEFAULTS.rule;
  if (!SORTS[state.sort]) state.sort = DEFAULTS.sort;
}

function writeState() {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) given.set(name, value);
  const hash = given.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}
