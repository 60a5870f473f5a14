// A canvas on which boxes are drawn, or the pixels of a hole or of a map of classes are painted, by mouse or finger.
import { classColour } from "./page.common.js";

const SHOWN = 352; // pixels that the longer side has at least on the screen's canvas
const NONE = [0, 0, 0];

const sheet = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

export function loadImage(address) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("image: the file is no image that this browser can read"));
    image.src = address;
  });
}

export class Painter {
  // mode: "boxes", "hole", "map", or "" to show an image alone; level: class of the next box or stroke.
  constructor(canvas, onChange) {
    Object.assign(this, { canvas, onChange, mode: "", level: 0, radius: 3, colours: [], image: null });
    this.reset(64, 64);
    canvas.onpointerdown = (event) => this.begin(event);
    canvas.onpointermove = (event) => this.go(event);
    canvas.onpointerup = canvas.onpointercancel = () => this.end();
  }

  // Begin anew on so many pixels.
  reset(width, height) {
    Object.assign(this, { width, height, image: null, boxes: [], names: [], past: [], drag: null });
    this.levels = new Uint8Array(width * height);
    const factor = Math.max(1, Math.ceil(SHOWN / Math.max(width, height)));
    Object.assign(this.canvas, { width: width * factor, height: height * factor });
    this.draw();
  }

  // Show an image, scaled and cropped to the pixels of the canvas; what was painted on another one goes.
  async show(address) {
    const image = await loadImage(address), fitted = sheet(this.width, this.height), pen = fitted.getContext("2d");
    const scale = Math.max(this.width / image.naturalWidth, this.height / image.naturalHeight);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    pen.fillStyle = "white";
    pen.fillRect(0, 0, this.width, this.height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, (this.width - w) / 2, (this.height - h) / 2, w, h);
    this.image = fitted;
    if (this.mode === "hole") this.levels.fill(0);
    this.draw();
  }

  // Take the levels of a grey image of the size of the canvas.
  async take(address) {
    const image = await loadImage(address), grey = sheet(this.width, this.height), pen = grey.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, this.width, this.height);
    const { data } = pen.getImageData(0, 0, this.width, this.height);
    this.keep();
    this.levels = this.levels.map((_, i) => data[4 * i]);
    this.draw();
  }

  get isPainted() {
    return this.levels.some((level) => level > 0);
  }

  imageAddress() {
    return this.image.toDataURL("image/png");
  }

  // Return the levels as a grey PNG; of a hole 255 times them.
  levelsAddress() {
    const factor = this.mode === "hole" ? 255 : 1, grey = sheet(this.width, this.height), pen = grey.getContext("2d");
    const pixels = pen.createImageData(this.width, this.height);
    this.levels.forEach((level, i) => pixels.data.set([level * factor, level * factor, level * factor, 255], 4 * i));
    pen.putImageData(pixels, 0, 0);
    return grey.toDataURL("image/png");
  }

  keep() {
    this.past = [...this.past.slice(-20), { boxes: [...this.boxes], levels: this.levels.slice() }];
  }

  undo() {
    const before = this.past.pop();
    if (before) Object.assign(this, before);
    this.draw();
  }

  place({ clientX, clientY }) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    const share = (value) => Math.min(1, Math.max(0, value));
    return [share((clientX - left) / width), share((clientY - top) / height)];
  }

  begin(event) {
    if (!this.mode) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.keep();
    this.drag = { from: this.place(event), to: this.place(event) };
    if (this.mode !== "boxes") this.stroke(this.drag.from, this.drag.from);
    this.draw();
  }

  go(event) {
    if (!this.drag) return;
    const to = this.place(event);
    if (this.mode !== "boxes") this.stroke(this.drag.to, to);
    this.drag.to = to;
    this.draw();
  }

  end() {
    if (!this.drag) return;
    const box = this.dragged();
    this.drag = null;
    if (this.mode === "boxes" && box[2] * this.width >= 1 && box[3] * this.height >= 1) {
      this.boxes.push({ label: this.level, box });
    }
    this.draw();
  }

  dragged() {
    const { from: [a, b], to: [c, d] } = this.drag;
    return [Math.min(a, c), Math.min(b, d), Math.abs(a - c), Math.abs(b - d)];
  }

  stroke(from, to) {
    const [x0, y0, x1, y1] = [from[0] * this.width, from[1] * this.height, to[0] * this.width, to[1] * this.height];
    const count = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0)));
    for (let i = 0; i <= count; i += 1) this.dab(x0 + ((x1 - x0) * i) / count, y0 + ((y1 - y0) * i) / count);
  }

  dab(x, y) {
    const r = this.radius, level = this.mode === "hole" ? 1 : this.level;
    for (let row = Math.max(0, Math.floor(y - r)); row < Math.min(this.height, y + r); row += 1) {
      for (let column = Math.max(0, Math.floor(x - r)); column < Math.min(this.width, x + r); column += 1) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= r) this.levels[row * this.width + column] = level;
      }
    }
  }

  draw() {
    const pen = this.canvas.getContext("2d"), { width, height } = this.canvas;
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingEnabled = false;
    if (this.image) pen.drawImage(this.image, 0, 0, width, height);
    if (this.mode === "map" || this.mode === "hole") pen.drawImage(this.painted(), 0, 0, width, height);
    const pending = this.drag && this.mode === "boxes" ? [{ label: this.level, box: this.dragged() }] : [];
    for (const { label, box: [left, top, w, h] } of [...this.boxes, ...pending]) {
      pen.strokeStyle = pen.fillStyle = classColour(label);
      pen.lineWidth = 2;
      pen.strokeRect(left * width, top * height, w * width, h * height);
      this.write(pen, this.names[label] ?? String(label), left * width + 4, top * height + 15);
    }
    this.onChange();
  }

  // Write a text in the present colour, on a white edge so that it can be read on any image.
  write(pen, text, x, y) {
    pen.save();
    Object.assign(pen, { font: "14px system-ui, sans-serif", lineWidth: 3, lineJoin: "round", strokeStyle: "white" });
    pen.strokeText(text, x, y);
    pen.fillText(text, x, y);
    pen.restore();
  }

  // Return the levels in colours: a map opaque, a hole as a black veil over the image.
  painted() {
    const layer = sheet(this.width, this.height), pen = layer.getContext("2d");
    const pixels = pen.createImageData(this.width, this.height), isMap = this.mode === "map";
    this.levels.forEach((level, i) => {
      if (isMap || level) pixels.data.set([...(isMap ? this.colours[level] ?? NONE : NONE), isMap ? 255 : 200], 4 * i);
    });
    pen.putImageData(pixels, 0, 0);
    return layer;
  }
}
