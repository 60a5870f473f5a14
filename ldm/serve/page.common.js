// What all tabs share: requests, elements, messages, and which runs are shown. All text is set as text, never as HTML.

export const state = { runs: new Map(), chosen: new Set() }; // number of a run -> {name, problem}; numbers shown
const COLOURS = ["#3366cc", "#dc6b19", "#109618", "#990099", "#0099c6", "#b82e2e", "#66aa00", "#aaaa11"];

export const byId = (id) => document.getElementById(id);
export const colour = (run) => COLOURS[run % COLOURS.length];
export const shownRuns = () => [...state.chosen].sort((a, b) => a - b);
export const nameOf = (run) => state.runs.get(run).name;

export async function ask(path, order) {
  const options = order === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(order),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  const answer = isJson ? await response.json() : await response.text();
  if (!response.ok) throw new Error(answer.problem ?? response.statusText);
  return answer;
}

export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

export function tell(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

export async function attempt(action) {
  try {
    await action();
    tell("");
  } catch (error) {
    tell(error.message);
  }
}

// Ask for something of every run that is shown; a run that cannot be read is told, the others are returned.
export async function ofShownRuns(what) {
  const problems = [];
  const found = await Promise.all(shownRuns().map(async (run) => {
    try {
      return [run, await ask(`/api/runs/${run}/${what}`)];
    } catch (error) {
      problems.push(error.message);
      return null;
    }
  }));
  return [found.filter((entry) => entry !== null), problems];
}

export function fill(select, options, preferred) {
  const before = select.value;
  const texts = options.map(([value, text]) => `${value}\t${text}`).join("\n");
  if (select.dataset.texts === texts) return;
  select.dataset.texts = texts;
  const values = options.map(([value]) => String(value));
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = values.includes(before) ? before : String(preferred ?? values[0] ?? "");
}

export function short(value) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export const note = (text) => make("p", { textContent: text });

// Return an image with boxes, fractions of it, drawn over it in the colours of their classes.
export function framed(image, boxes) {
  const layers = boxes.map(({ label, name, box: [left, top, width, height] }) => {
    const frame = make("span", { className: "box" }, make("span", { textContent: name ?? String(label) }));
    Object.assign(frame.style, {
      left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`, height: `${100 * height}%`, color: classColour(label),
    });
    return frame;
  });
  return make("div", { className: "frame" }, image, ...layers);
}

export const classColour = (label) => `hsl(${(label * 0.618034 * 360) % 360} 85% 42%)`;
