// What a run leaves behind: images over its steps, figures of evaluations, its config.
import { ask, byId, fill, make, nameOf, note, ofShownRuns, short } from "./page.common.js";

export async function showImages() {
  const [found, problems] = await ofShownRuns("images");
  const kinds = [...new Set(found.flatMap(([, images]) => Object.keys(images)))].sort();
  fill(byId("kind"), kinds.map((kind) => [kind, kind]), kinds.find((kind) => kind.includes("samples")));
  const kind = byId("kind").value;
  const steps = [...new Set(found.flatMap(([, images]) => (images[kind] ?? []).map(([step]) => step)))].sort((a, b) => a - b);
  const slider = byId("step"), wasLast = slider.value === slider.max;
  slider.max = Math.max(steps.length - 1, 0);
  if (wasLast) slider.value = slider.max;
  const step = steps[slider.value];
  byId("shown-step").textContent = step ?? "";
  const figures = found.flatMap(([run, images]) => {
    const entry = (images[kind] ?? []).findLast(([at]) => at <= step);
    if (!entry) return [];
    const image = make("img", { src: `/api/runs/${run}/images/${entry[1]}`, alt: `${kind} of ${nameOf(run)}` });
    return [make("figure", {}, make("figcaption", { textContent: `${nameOf(run)}, step ${entry[0]}` }), image)];
  });
  byId("grids").replaceChildren(...(figures.length ? figures : [note("There are no images yet.")]));
  if (problems.length) throw new Error(problems.join("\n"));
}

const cells = (kind, texts) => make("tr", {}, ...texts.map((text) => make(kind, { textContent: text })));

export async function showFigures() {
  const [found, problems] = await ofShownRuns("evaluations");
  const rows = [], sheets = [];
  for (const [run, evaluations] of found) {
    evaluations.forEach(({ name, n, figures, sheet, problem }, i) => {
      if (problem) problems.push(problem);
      for (const { name: measure, value, interval } of figures ?? []) {
        const ends = interval ? `${short(interval[0])} to ${short(interval[1])}` : "";
        rows.push([nameOf(run), name, measure, value === null ? "not finite" : value.toPrecision(5), ends, n ?? ""]);
      }
      if (!sheet) return;
      const image = make("img", { src: `/api/runs/${run}/evaluations/${i}.png`, alt: `samples of ${name}` });
      sheets.push(make("figure", {}, make("figcaption", { textContent: `${nameOf(run)}, ${name}` }), image));
    });
  }
  const head = cells("th", ["run", "evaluation", "measure", "value", "interval", "images"]);
  const none = "No evaluation lies in these run folders; ldm evaluate --run RUN --out RUN/evaluation makes one.";
  const table = make("div", { className: "scroll" }, make("table", {}, head, ...rows.map((row) => cells("td", row))));
  byId("evaluations").replaceChildren(rows.length ? table : note(none), make("div", { className: "side-by-side" }, ...sheets));
  if (problems.length) throw new Error(problems.join("\n"));
}

export async function showConfig() {
  const [run, other] = [byId("config-of").value, byId("config-other").value];
  if (other === "") {
    byId("config-text").textContent = await ask(`/api/runs/${run}/config`);
    return;
  }
  const text = await ask(`/api/runs/${run}/difference/${other}`);
  const classes = { "+": "added", "-": "removed" };
  const lines = (text || "The configs are equal.").split("\n");
  byId("config-text").replaceChildren(
    ...lines.map((line) => make("span", { textContent: `${line}\n`, className: classes[line[0]] ?? "" })),
  );
}
