// The picture that is shown, the boxes on it, and the box that is dragged or moved by keys.

import { canvasBlob, decoded } from "/picture.js";
import { t } from "/strings.js";

const SVG = "http://www.w3.org/2000/svg";
const MIN_DRAG = 6; // in CSS pixels; less is a click
const $ = (id) => document.getElementById(id);

/** A box is `{pixels: [x1, y1, x2, y2], ref, tone}`, in pixels of the picture that is sent. */
export class Stage {
  /** `onBox(pixels)`: a box was made. `onLight(boxes)`: the pointer is over one, or none. `say(text)`: for screen readers. */
  constructor({ onBox, onLight, say }) {
    Object.assign(this, { onBox, onLight, say, picture: null, boxes: [], lit: [], made: null, from: null, byKeys: false });
    this.frame = $("frame");
    this.frame.addEventListener("pointerdown", (event) => this.#down(event));
    this.frame.addEventListener("pointermove", (event) => this.#move(event));
    this.frame.addEventListener("pointerup", (event) => this.#up(event));
    this.frame.addEventListener("pointercancel", () => this.#drop());
    this.frame.addEventListener("pointerleave", () => this.from || this.onLight([]));
    this.frame.addEventListener("keydown", (event) => this.#key(event));
    this.frame.addEventListener("blur", () => this.byKeys && this.#drop());
  }

  /** Shows a picture as number `number` of the conversation, with these boxes. */
  show(picture, number, boxes) {
    if (picture !== this.picture) {
      this.made = this.from = null;
      this.picture = picture;
      $("shown").src = picture.url;
      $("overlay").setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
      this.frame.style.setProperty("--ratio", picture.width / picture.height);
      this.frame.style.setProperty("--width", `${picture.width}px`);
    }
    const text = t("pictureOf", number, picture.width, picture.height);
    $("caption").textContent = text;
    $("shown").alt = text;
    this.frame.setAttribute("aria-label", text);
    this.boxes = boxes;
    this.#draw();
  }

  /** Lights some of the boxes, or none. */
  light(boxes) {
    this.lit = boxes;
    if (this.picture) this.#draw();
  }

  /** A file of the picture, full size, with its boxes and their phrases. */
  async withBoxes() {
    const { picture, boxes } = this;
    const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: picture.height });
    const pen = canvas.getContext("2d");
    pen.drawImage(await decoded(picture.url), 0, 0);
    const side = Math.min(picture.width, picture.height);
    const line = Math.max(2, Math.round(side / 200));
    const size = Math.max(11, Math.round(side / 32));
    pen.font = `600 ${size}px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    for (const box of boxes) {
      const [x1, y1, x2, y2] = box.pixels;
      for (const [style, width] of [["rgba(255, 255, 255, 0.85)", line * 2], [toneColour(box.tone), line]]) {
        pen.strokeStyle = style;
        pen.lineWidth = width;
        pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
      }
      if (!box.ref) continue;
      const width = Math.min(pen.measureText(box.ref).width + size * 0.8, picture.width);
      const height = size * 1.5;
      const left = Math.max(0, Math.min(x1, picture.width - width));
      const top = y1 >= height ? y1 - height : Math.min(y1, picture.height - height);
      pen.fillStyle = toneColour(box.tone);
      pen.fillRect(left, top, width, height);
      pen.fillStyle = "white";
      pen.fillText(box.ref, left + size * 0.4, top + height / 2, width - size * 0.8);
    }
    return canvasBlob(canvas, "image/png");
  }

  #draw() {
    const { width, height } = this.picture;
    const made = this.made && { pixels: this.made, tone: "made" };
    const all = made ? [...this.boxes, made] : this.boxes;
    const lit = made ? [made] : this.boxes.filter((box) => this.lit.includes(box));
    const shapes = [];
    if (lit.length) {
      const holes = lit.map(({ pixels: [x1, y1, x2, y2] }) => `M${x1} ${y1}V${y2}H${x2}V${y1}Z`);
      shapes.push(shape("path", { d: `M0 0H${width}V${height}H0Z${holes.join("")}`, class: "shade" }));
    }
    for (const box of all) {
      const [x1, y1, x2, y2] = box.pixels;
      const at = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
      const state = lit.length ? (lit.includes(box) ? " lit" : " dim") : "";
      shapes.push(shape("rect", { ...at, class: `halo${state}` }));
      shapes.push(shape("rect", { ...at, class: `box tone-${box.tone}${state}` }));
    }
    $("overlay").replaceChildren(...shapes);
    const named = all.filter((box) => box.ref && (!lit.length || lit.includes(box)));
    $("tags").replaceChildren(...named.map((box) => this.#tag(box)));
    $("tags").classList.toggle("few", named.length < 2);
  }

  #tag(box) {
    const { width, height } = this.picture;
    const [x1, y1, x2] = box.pixels;
    const tag = document.createElement("span");
    tag.className = `tag tone-${box.tone}`;
    tag.textContent = box.ref;
    tag.style.top = `${(y1 / height) * 100}%`;
    if (y1 / height < 0.08) tag.classList.add("inside");
    if (x1 / width < 0.6) tag.style.left = `${(x1 / width) * 100}%`;
    else tag.style.right = `${100 - (x2 / width) * 100}%`;
    return tag;
  }

  /** The pointer in pixels of the picture, inside of it. */
  #at(event) {
    const area = $("shown").getBoundingClientRect();
    const { width, height } = this.picture;
    const x = ((event.clientX - area.left) / area.width) * width;
    const y = ((event.clientY - area.top) / area.height) * height;
    return [Math.max(0, Math.min(width, x)), Math.max(0, Math.min(height, y))];
  }

  #down(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    this.frame.setPointerCapture(event.pointerId);
    this.byKeys = false;
    this.from = { at: this.#at(event), x: event.clientX, y: event.clientY };
  }

  #move(event) {
    if (!this.from) {
      this.onLight(this.#under(this.#at(event)));
      return;
    }
    const { x, y, at } = this.from;
    const far = Math.abs(event.clientX - x) >= MIN_DRAG && Math.abs(event.clientY - y) >= MIN_DRAG;
    this.made = far ? spanned(at, this.#at(event)) : null;
    this.#draw();
  }

  #up(event) {
    if (!this.from) return;
    const { made } = this;
    this.#drop();
    if (made) this.onBox(made);
    else this.onLight(this.#under(this.#at(event)));
  }

  #drop() {
    this.made = this.from = null;
    this.byKeys = false;
    if (this.picture) this.#draw();
  }

  /** The smallest box under a point, if any. */
  #under([x, y]) {
    const area = ({ pixels: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
    const inside = ({ pixels: [x1, y1, x2, y2] }) => x >= x1 && x <= x2 && y >= y1 && y <= y2;
    return this.boxes.filter(inside).sort((a, b) => area(a) - area(b)).slice(0, 1);
  }

  #key(event) {
    const { width, height } = this.picture;
    if (event.key === "Escape") this.#drop();
    if (!this.made) {
      if (event.key.toLowerCase() !== "b" || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.byKeys = true;
      this.made = [0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height].map(Math.round);
      this.#draw();
      this.say(t("boxStarted"));
      return;
    }
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Enter") {
      event.preventDefault();
      const { made } = this;
      this.#drop();
      this.onBox(made);
    } else if (moves[event.key]) {
      event.preventDefault();
      const step = Math.max(1, Math.round(Math.min(width, height) / 50));
      const [dx, dy] = moves[event.key].map((part) => part * step);
      const [x1, y1, x2, y2] = this.made;
      if (event.shiftKey) this.made = [x1, y1, clamp(x2 + dx, x1 + step, width), clamp(y2 + dy, y1 + step, height)];
      else {
        const [left, top] = [clamp(x1 + dx, 0, width - (x2 - x1)), clamp(y1 + dy, 0, height - (y2 - y1))];
        this.made = [left, top, left + x2 - x1, top + y2 - y1];
      }
      this.#draw();
      this.say(t("boxAt", ...this.made));
    }
  }
}

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}

/** The whole pixels between two points. */
function spanned(a, b) {
  const low = [0, 1].map((axis) => Math.floor(Math.min(a[axis], b[axis])));
  const high = [0, 1].map((axis) => Math.ceil(Math.max(a[axis], b[axis])));
  return [...low, ...high];
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function toneColour(tone) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--tone-${tone}`).trim();
}
