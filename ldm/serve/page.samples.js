// The form of an order, as the task of the model needs it, and the orders of this browser with their progress.
import { ask, attempt, byId, fill, framed, make, nameOf, tell } from "./page.common.js";
import { Painter, loadImage } from "./page.paint.js";

const NUMBERS = ["count", "steps", "seed"], REALS = ["guidance", "strength"];
const MORE_GUIDANCE = { rescale: 0, apg_eta: 1, apg_norm: null, apg_momentum: 0 };
const UNKNOWN_SIZE = [256, 256], ENDED = ["done", "failed", "cancelled"];
let controls = null, controlsOf = null, file = null, painter = null; // file: an image that is sent as it is
const form = () => byId("order");

// ------------------------------------------------------------------------------------------------ the form

export async function showControls() {
  const run = byId("samples-of").value;
  if (controlsOf === run || run === "") return;
  const isCurrent = () => byId("samples-of").value === run; // another may be chosen while this one is loaded
  byId("state").textContent = "loading the model …";
  try {
    const found = await ask(`/api/runs/${run}/controls`);
    if (!isCurrent()) return;
    [controls, controlsOf] = [found, run];
  } catch (error) {
    if (!isCurrent()) return;
    controls = controlsOf = null;
    form().classList.add("empty");
    throw error;
  } finally {
    if (isCurrent()) byId("state").textContent = "";
  }
  form().classList.remove("empty");
  for (const part of form().querySelectorAll("[data-for]")) {
    part.hidden = !part.dataset.for.split(" ").some((name) => needs(name));
  }
  const { elements } = form();
  if (!controls.guided) elements.guidance.value = 1;
  elements.guidance.disabled = !controls.guided;
  fill(elements.sampler, Object.keys(controls.samplers).map((name) => [name, name]), "ddim");
  fill(elements.grid, [["", "its own"], ...controls.grids.map((name) => [name, name])], "");
  fill(elements.weights, controls.weights.map((name) => [name, name]), "ema");
  showOptions();
  showClasses([]);
  prepareCanvas();
  if (needs("classes") && controls.task !== "map") {
    const names = await ask(`/api/runs/${run}/classes`).catch(() => []); // numbers will do where the data are gone
    if (isCurrent()) showClasses(names);
  }
}

// Whether a part of the form has a use for this model.
function needs(name) {
  const { task, takes } = controls;
  if (name === "canvas") return takes.some((field) => ["image", "layout", "map"].includes(field));
  if (name === "brush") return takes.includes("mask") || task === "map";
  if (name === "classes") return controls.classes !== undefined;
  if (name === "start") return takes.includes("image") && task !== "small" && task !== "hole";
  if (name === "averages") return controls.weights.length > 1;
  if (name === "guided") return controls.guided;
  if (name === "tiles") return controls.tiles;
  if (name === "sized") return !["small", "map"].includes(task);
  return takes.includes(name);
}

function showOptions() {
  const options = controls.samplers[form().elements.sampler.value] ?? {};
  byId("options").replaceChildren(...Object.entries(options).map(([name, value]) => {
    const isSwitch = typeof value === "boolean";
    const input = isSwitch ? make("input", { type: "checkbox", checked: value })
      : make("input", { type: "number", step: "any", placeholder: value ?? "none" });
    input.dataset.option = name;
    return make("label", {}, name, input);
  }));
}

function showClasses(names) {
  if (controls.classes === undefined) return;
  const options = Array.from({ length: controls.classes }, (_, i) => [i, names[i] ? `${i}: ${names[i]}` : `class ${i}`]);
  const others = options.filter(([i]) => i !== controls.no_class);
  if (controls.task === "map" && controls.no_class !== null) others.push([controls.no_class, "no class"]);
  fill(form().elements.label, others);
  painter.names = names;
  painter.level = Number(form().elements.label.value);
}

function prepareCanvas() {
  file = null;
  form().elements.image.value = "";
  const { task, takes, map_size: mapSize } = controls;
  const [height, width] = (task === "map" ? mapSize : controls.size) ?? UNKNOWN_SIZE;
  painter.mode = { layout: "boxes", map: "map" }[task] ?? (takes.includes("mask") ? "hole" : "");
  painter.colours = controls.colours ?? [];
  painter.radius = Math.max(1, Math.round(Math.max(width, height) / 12));
  byId("radius").value = painter.radius;
  byId("radius").max = Math.max(8, Math.round(Math.max(width, height) / 3));
  painter.reset(width, height);
  painter.level = Number(form().elements.label.value) || 0;
}

function asAddress(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name}: cannot be read`));
    reader.readAsDataURL(blob);
  });
}

// Take an image that was chosen: shown on the canvas; what is enlarged, and a file of a map, is sent as it is.
async function takeImage(address) {
  const { task } = controls;
  if (task === "map") {
    file = address;
    byId("state").textContent = "the file is drawn, not the canvas";
    return;
  }
  if (task === "small") {
    const image = await loadImage(address).catch(() => null); // the server says what is wrong with it
    file = address;
    if (!image) return;
    painter.reset(image.naturalWidth, image.naturalHeight);
  }
  await painter.show(address);
}

// Fill the form from an item of the validation data.
async function takeItem() {
  const { elements } = form(), number = Number.parseInt(byId("item").value, 10);
  const { items: [entries] } = await ask(`/api/runs/${controlsOf}/items/${number}`);
  const found = (key, kind) => entries.find((entry) => entry.kind === kind && (key === null || entry.key === key));
  const { task } = controls;
  if (found("caption", "text")) elements.prompt.value = found("caption", "text").text;
  if (task === "class" && found(null, "label")) elements.label.value = found(null, "label").label;
  if (task === "layout" && found(null, "boxes")) {
    painter.keep();
    painter.boxes = found(null, "boxes").boxes.slice(0, controls.objects).map(({ label, box }) => ({ label, box }));
    painter.draw();
  }
  if (task === "map" && found(null, "map")) await painter.take(found(null, "map").levels);
  const image = found(task === "small" ? controls.key : "image", "image");
  if (image && controls.takes.includes("image")) await takeImage(image.png);
  if (image && task === "layout") await painter.show(image.png);
  if (task === "item") byId("preview").replaceChildren(...entries.filter((entry) => entry.kind === "image")
    .map((entry) => make("img", { src: entry.png, alt: entry.key })));
}

// ------------------------------------------------------------------------------------------------ an order

function readForm() {
  const { elements } = form(), { task, takes } = controls, order = {};
  for (const name of NUMBERS) order[name] = Number.parseInt(elements[name].value, 10);
  for (const name of REALS) order[name] = Number.parseFloat(elements[name].value);
  for (const name of ["sampler", "grid", "weights"]) order[name] = elements[name].value;
  order.options = {};
  for (const input of byId("options").querySelectorAll("input")) {
    if (input.type === "checkbox") order.options[input.dataset.option] = input.checked;
    else if (input.value !== "") order.options[input.dataset.option] = Number(input.value);
  }
  if (order.guidance !== 1) {
    order.interval = [elements.from.value, elements.to.value].map(Number);
    for (const [name, usual] of Object.entries(MORE_GUIDANCE)) {
      if (elements[name].value !== "" && Number(elements[name].value) !== usual) order[name] = Number(elements[name].value);
    }
  }
  for (const name of ["height", "width"]) {
    if (elements[name].value !== "" && needs("sized")) order[name] = Number.parseInt(elements[name].value, 10);
  }
  if (controls.tiles && elements.tile.checked) order.tile = true;
  for (const name of ["prompt", "negative"]) if (takes.includes(name)) order[name] = elements[name].value;
  if (takes.includes("label")) order.label = Number.parseInt(elements.label.value, 10);
  if (takes.includes("item")) order.item = Number.parseInt(byId("item").value, 10);
  if (task === "layout") order.layout = painter.boxes;
  if (task === "map") order.map = file ?? painter.levelsAddress();
  if (task === "small" && file) order.image = file;
  if (takes.includes("image") && task !== "small" && painter.image) order.image = painter.imageAddress();
  if (takes.includes("mask") && painter.image && painter.isPainted) order.mask = painter.levelsAddress();
  return order;
}

async function draw() {
  const order = readForm(), job = await ask(`/api/runs/${controlsOf}/samples`, order);
  const what = [order.prompt, order.label !== undefined && `class ${order.label}`, `${order.steps} steps of ${order.sampler}`,
    controls.guided && `guidance ${order.guidance}`, `seed ${order.seed}`];
  const entry = { number: job.number, title: `${nameOf(Number(controlsOf))}: ${what.filter(Boolean).join(", ")}` };
  sessionStorage.jobs = JSON.stringify([entry, ...remembered()].slice(0, 12));
  watch(entry);
}

const remembered = () => JSON.parse(sessionStorage.jobs ?? "[]");

// Show an order with its progress until it has ended, then its images; what it is drawn from stands before them.
async function watch({ number, title }) {
  const state = make("output"), bar = make("progress", { max: 1, value: 0 }), images = make("div", { className: "images" });
  const cancel = make("button", { type: "button", textContent: "Cancel" });
  cancel.onclick = () => attempt(() => ask(`/api/jobs/${number}/cancel`, {}));
  const card = make("article", {}, make("p", { textContent: title }), make("div", { className: "controls" }, state, bar, cancel), images);
  byId("drawn").prepend(card);
  let job = null, shown = 0;
  try {
    do {
      if (job) await new Promise((resolve) => setTimeout(resolve, 200));
      job = await ask(`/api/jobs/${number}`);
      bar.value = job.total ? job.done / job.total : 0;
      const before = job.state === "waiting" && job.before ? `, ${job.before} before it` : "";
      state.textContent = job.problem || (job.state === "drawing" ? `step ${job.done} of ${job.total}` : job.state + before);
      if (job.source && !images.children.length) images.append(make("img", { src: `/api/jobs/${number}/source.png`, alt: "drawn from", className: "source" }));
      for (; shown < job.images; shown += 1) images.append(make("img", { src: `/api/jobs/${number}/${shown}.png`, alt: `sample ${shown}` }));
    } while (!ENDED.includes(job.state));
    if (job.problem) state.classList.add("wrong");
  } catch (error) {
    state.textContent = error.message;
    state.classList.add("wrong");
  } finally {
    bar.remove();
    cancel.remove();
  }
}

export function startSamples() {
  const boxes = byId("boxes");
  painter = new Painter(byId("canvas"), () => {
    boxes.replaceChildren(...(painter?.boxes ?? []).map(({ label }, i) => {
      const remove = make("button", { type: "button", textContent: `${painter.names[label] ?? label} ×` });
      remove.onclick = () => { painter.keep(); painter.boxes.splice(i, 1); painter.draw(); };
      return remove;
    }));
  });
  const { elements } = form();
  form().onsubmit = (event) => { event.preventDefault(); attempt(draw); };
  elements.sampler.onchange = showOptions;
  elements.label.onchange = () => { painter.level = Number(elements.label.value); };
  elements.image.onchange = () => attempt(async () => {
    if (elements.image.files.length) await takeImage(await asAddress(elements.image.files[0]));
  });
  byId("radius").oninput = () => { painter.radius = Number(byId("radius").value); };
  byId("undo").onclick = () => painter.undo();
  byId("clear").onclick = prepareCanvas;
  byId("take").onclick = () => attempt(takeItem);
  for (const entry of remembered().reverse()) watch(entry);
}
