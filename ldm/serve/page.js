// The page as a whole: which runs are shown, in which tab; what is written meanwhile is asked for every few seconds.
import { ask, attempt, byId, colour, fill, make, state, tell } from "./page.common.js";
import { showCurves } from "./page.curves.js";
import { showData, turnData } from "./page.data.js";
import { showConfig, showFigures, showImages } from "./page.records.js";
import { showControls, startSamples } from "./page.samples.js";

const TABS = {
  curves: ["Curves", showCurves], images: ["Images", showImages], data: ["Data", showData],
  figures: ["Figures", showFigures], config: ["Config", showConfig], samples: ["Samples", showControls],
};
const LIVE = ["curves", "images"];
const REFRESH = 5000; // milliseconds
let tab = "curves";
const refresh = () => attempt(TABS[tab][1]);

function openTab(name) {
  tab = name;
  for (const [id, button] of Object.entries(buttons)) {
    byId(id).hidden = id !== name;
    button.setAttribute("aria-selected", id === name);
  }
  refresh();
}

const buttons = Object.fromEntries(Object.entries(TABS).map(([id, [title]]) => {
  const button = make("button", { textContent: title, onclick: () => openTab(id) });
  button.setAttribute("role", "tab");
  byId("tabs").append(button);
  return [id, button];
}));

function entry({ number, name, problem }) {
  const box = make("input", { type: "checkbox", checked: state.chosen.has(number), disabled: Boolean(problem) });
  box.onchange = () => { box.checked ? state.chosen.add(number) : state.chosen.delete(number); refresh(); };
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = colour(number);
  return make("label", { className: problem ? "broken" : "", title: problem }, box, swatch, problem || name);
}

async function listRuns() {
  const runs = await ask("/api/runs"), usable = runs.filter((run) => !run.problem);
  const isNew = JSON.stringify(runs) !== byId("runs").dataset.runs;
  if (!isNew) return;
  byId("runs").dataset.runs = JSON.stringify(runs);
  if (!state.runs.size) state.chosen = new Set(usable.slice(0, 1).map(({ number }) => number));
  for (const run of runs) state.runs.set(run.number, run);
  for (const { number, problem } of runs) if (problem) state.chosen.delete(number);
  byId("runs").replaceChildren(make("legend", { textContent: "Shown" }), ...runs.map(entry));
  const options = usable.map(({ number, name }) => [number, name]);
  for (const id of ["config-of", "data-of", "samples-of"]) fill(byId(id), options);
  fill(byId("config-other"), [["", "nothing"], ...options], "");
}

async function start() {
  startSamples();
  await listRuns();
  for (const id of ["filter", "logarithmic", "kind", "step", "config-of", "config-other", "samples-of"]) byId(id).oninput = refresh;
  byId("decoded").oninput = refresh;
  for (const id of ["data-of", "split"]) byId(id).oninput = () => { turnData(0); refresh(); };
  byId("earlier").onclick = () => { turnData(-1); refresh(); };
  byId("later").onclick = () => { turnData(1); refresh(); };
  setInterval(() => {
    if (document.hidden) return;
    listRuns().then(() => LIVE.includes(tab) && refresh(), (error) => tell(error.message));
  }, REFRESH);
  openTab("curves");
}

attempt(start);
