// The data of a run as the network sees them, a page of items at a time.
import { ask, byId, framed, make } from "./page.common.js";

const PAGE = 12;
let first = 0, asked = 0;

function panel(entry, image) {
  if (entry.kind === "image" || entry.kind === "map") {
    return make("img", { src: entry.png, alt: entry.key });
  }
  if (entry.kind === "boxes" && image) {
    return framed(make("img", { src: image.png, alt: "boxes on the image" }), entry.boxes);
  }
  const text = { text: () => entry.text, label: () => entry.name, boxes: () => entry.boxes.map((box) => box.name).join(", ") };
  return make("span", { textContent: text[entry.kind]() });
}

function card(entries, number) {
  const image = entries.find((entry) => entry.key === "image");
  const parts = entries.map((entry) => make("div", {}, make("small", { textContent: entry.key }), panel(entry, image)));
  return make("figure", { className: "item" }, make("figcaption", { textContent: `item ${number}` }), ...parts);
}

export async function showData() {
  const run = byId("data-of").value, split = byId("split").value;
  const number = ++asked; // what was asked for before may be answered later
  byId("data-state").textContent = "reading …";
  try {
    const page = await ask(`/api/runs/${run}/data/${split}/${first}${byId("decoded").checked ? "/decoded" : ""}`);
    if (number !== asked) return;
    byId("items").replaceChildren(...page.items.map((entries, i) => card(entries, first + i)));
    byId("data-state").textContent = `${first} to ${first + page.items.length - 1} of ${page.total}`;
    byId("earlier").disabled = first === 0;
    byId("later").disabled = first + PAGE >= page.total;
  } catch (error) {
    if (number !== asked) return;
    byId("items").replaceChildren();
    byId("data-state").textContent = "";
    throw error;
  }
}

export function turnData(pages) {
  first = pages ? Math.max(0, first + pages * PAGE) : 0;
}
