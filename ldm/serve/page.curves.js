// Curves of one or several runs, over steps; what is under the pointer is written below a plot.
import { byId, colour, make, nameOf, note, ofShownRuns, short } from "./page.common.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP] = [360, 210, 52, 22, 8, 10];

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

function axes(drawing, [x0, x1], [y0, y1], isLogarithmic) {
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), level = y0 + share * (y1 - y0);
    drawing.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    drawing.append(svg("text", { x: LEFT - 4, y: y + 4, "text-anchor": "end" }, short(isLogarithmic ? 10 ** level : level)));
    const anchor = ["start", "middle", "end"][share * 2], x = LEFT + share * (WIDTH - LEFT - RIGHT);
    drawing.append(svg("text", { x, y: HEIGHT - 6, "text-anchor": anchor }, Math.round(x0 + share * (x1 - x0))));
  }
}

function plot(title, lines, isLogarithmic) {
  const scale = isLogarithmic ? Math.log10 : (value) => value;
  const usable = lines.map((line) => ({ ...line, points: line.points.filter(([, y]) => !isLogarithmic || y > 0) }))
    .filter((line) => line.points.length);
  const all = usable.flatMap((line) => line.points);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const last = usable.map((line) => short(line.points.at(-1)[1])).join(", ");
  const caption = make("figcaption", { textContent: `${title}: ${last}` });
  if (all.length) {
    const [x0, x1] = range(all.map(([x]) => x)), [y0, y1] = range(all.map(([, y]) => scale(y)));
    const place = ([x, y]) => [
      LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT),
      HEIGHT - BOTTOM - ((scale(y) - y0) / (y1 - y0 || 1)) * (HEIGHT - BOTTOM - TOP),
    ];
    axes(drawing, [x0, x1], [y0, y1], isLogarithmic);
    for (const { run, points } of usable) {
      const path = points.map((point) => place(point).map((c) => c.toFixed(1)).join(",")).join(" ");
      drawing.append(svg("polyline", { points: path, fill: "none", stroke: colour(run), "stroke-width": 1.5 }));
      const [cx, cy] = place(points.at(-1));
      drawing.append(svg("circle", { cx, cy, r: 3, fill: colour(run) }));
    }
    drawing.onpointermove = ({ clientX }) => {
      const { left, width } = drawing.getBoundingClientRect();
      const share = (((clientX - left) / width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
      const step = x0 + share * (x1 - x0);
      const near = usable.map(({ run, points }) => {
        const [x, y] = points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
        return `${nameOf(run)} ${short(y)} at ${x}`;
      });
      caption.textContent = `${title}: ${near.join(", ")}`;
    };
    drawing.onpointerleave = () => { caption.textContent = `${title}: ${last}`; };
  }
  return make("figure", {}, caption, drawing);
}

export async function showCurves() {
  const [curves, problems] = await ofShownRuns("curves");
  const wanted = byId("filter").value.trim().toLowerCase();
  const names = [...new Set(curves.flatMap(([, found]) => Object.keys(found)))]
    .sort((a, b) => b.includes("/") - a.includes("/") || a.localeCompare(b));
  const plots = names.filter((name) => name.toLowerCase().includes(wanted)).map((name) => {
    const lines = curves.filter(([, found]) => found[name]).map(([run, found]) => ({ run, points: found[name] }));
    return plot(name, lines, byId("logarithmic").checked);
  });
  byId("plots").replaceChildren(...(plots.length ? plots : [note("Nothing was logged yet.")]));
  if (problems.length) throw new Error(problems.join("\n"));
}
