// Pictures of the toy model's world, drawn here: coloured shapes on a plain ground.

import { canvasBlob } from "/picture.js";
import { chinese, t } from "/strings.js";

const SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart"];
const COLOURS = {
  red: [214, 32, 40], orange: [246, 136, 24], yellow: [244, 220, 40], green: [36, 150, 60], blue: [36, 84, 214],
  purple: [134, 50, 166],
};
const GROUNDS = [[176, 176, 176], [150, 160, 172], [196, 184, 164], [164, 180, 160], [188, 164, 164], [204, 200, 186]];
const NAMES = {
  circle: "圆形", square: "正方形", triangle: "三角形", star: "星形", diamond: "菱形", cross: "十字形", ring: "圆环",
  heart: "心形", red: "红色", orange: "橙色", yellow: "黄色", green: "绿色", blue: "蓝色", purple: "紫色",
};
const SIDE = 448;

const random = (low, high) => low + Math.random() * (high - low);
const pick = (items) => items[Math.floor(Math.random() * items.length)];
const rgb = (colour, by = 1) => `rgb(${colour.map((part) => Math.round(part * by)).join(" ")})`;
const named = (...words) => (chinese ? words.map((word) => NAMES[word]).join("") : words.join(" "));

/** A fresh picture, `file`, and `questions` that it answers. */
export async function drawScene() {
  const things = place();
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const pen = canvas.getContext("2d");
  const ground = pick(GROUNDS);
  const shade = pen.createLinearGradient(0, 0, random(0, SIDE), SIDE);
  shade.addColorStop(0, rgb(ground, 1.06));
  shade.addColorStop(1, rgb(ground, 0.94));
  pen.fillStyle = shade;
  pen.fillRect(0, 0, SIDE, SIDE);
  for (const thing of things) paint(pen, thing, rgb(ground));
  const blob = await canvasBlob(canvas, "image/png");
  return { file: new File([blob], "drawn.png", { type: "image/png" }), questions: questions(things) };
}

/** Three or four shapes that do not touch, of few kinds so that some resemble each other. */
function place() {
  const shapes = [pick(SHAPES), pick(SHAPES), pick(SHAPES)];
  const colours = [pick(Object.keys(COLOURS)), pick(Object.keys(COLOURS)), pick(Object.keys(COLOURS))];
  const wanted = pick([3, 3, 4]);
  const things = [];
  for (let tries = 0; things.length < wanted && tries < 300; tries++) {
    const w = Math.random() < 0.4 ? random(0.16, 0.21) : random(0.3, 0.37);
    const h = w * random(0.92, 1.08);
    const [x, y] = [random(0.03, 0.97 - w), random(0.03, 0.97 - h)];
    const apart = (o) => x > o.x + o.w + 0.02 || o.x > x + w + 0.02 || y > o.y + o.h + 0.02 || o.y > y + h + 0.02;
    // The model names things from left to right, so that none stands right above another.
    const beside = (o) => Math.abs(x + w / 2 - o.x - o.w / 2) > 0.12;
    if (things.every((other) => apart(other) && beside(other))) things.push({ shape: pick(shapes), colour: pick(colours), x, y, w, h, turn: random(-0.17, 0.17) });
  }
  return things;
}

function questions(things) {
  const kinds = new Map();
  for (const thing of things) {
    const kind = named(thing.colour, thing.shape);
    kinds.set(kind, [...(kinds.get(kind) ?? []), thing]);
  }
  const single = [...kinds].find(([, same]) => same.length === 1)?.[0];
  const most = pick(things).shape;
  const plural = chinese ? NAMES[most] : most === "cross" ? "crosses" : `${most}s`;
  const find = single && t("find", chinese ? single : `the ${single}`);
  return [t("ground"), t("count", plural), find].filter(Boolean);
}

function outline(shape) {
  const circle = Array.from({ length: 48 }, (_, index) => (2 * Math.PI * index) / 48);
  switch (shape) {
    case "square":
      return [[-1, -1], [1, -1], [1, 1], [-1, 1]];
    case "triangle":
      return [[0, -1], [1, 1], [-1, 1]];
    case "diamond":
      return [[0, -1], [0.8, 0], [0, 1], [-0.8, 0]];
    case "star":
      return Array.from({ length: 10 }, (_, index) => {
        const [radius, angle] = [index % 2 ? 0.42 : 1, (Math.PI * index) / 5];
        return [radius * Math.sin(angle), -radius * Math.cos(angle)];
      });
    case "cross": {
      const [a, b] = [0.34, -0.34];
      return [[b, -1], [a, -1], [a, b], [1, b], [1, a], [a, a], [a, 1], [b, 1], [b, a], [-1, a], [-1, b], [b, b]];
    }
    case "heart":
      return circle.map((angle) => [
        16 * Math.sin(angle) ** 3,
        -(13 * Math.cos(angle) - 5 * Math.cos(2 * angle) - 2 * Math.cos(3 * angle) - Math.cos(4 * angle)),
      ]);
    default:
      return circle.map((angle) => [Math.cos(angle), Math.sin(angle)]);
  }
}

/** A shape, turned a little, that fills its box. */
function paint(pen, thing, hole) {
  const [cos, sin] = [Math.cos(thing.turn), Math.sin(thing.turn)];
  const turned = outline(thing.shape).map(([x, y]) => [x * cos - y * sin, x * sin + y * cos]);
  const fit = (axis, start, length) => {
    const values = turned.map((point) => point[axis]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return values.map((value) => (start + ((value - low) / (high - low)) * length) * SIDE);
  };
  const [xs, ys] = [fit(0, thing.x, thing.w), fit(1, thing.y, thing.h)];
  const [cx, cy] = [(thing.x + thing.w / 2) * SIDE, (thing.y + thing.h / 2) * SIDE];
  const colour = COLOURS[thing.colour];
  const fill = (style, scale) => {
    pen.beginPath();
    xs.forEach((x, index) => pen.lineTo(cx + (x - cx) * scale, cy + (ys[index] - cy) * scale));
    pen.closePath();
    pen.fillStyle = style;
    pen.strokeStyle = rgb(colour, 0.6);
    pen.lineWidth = SIDE / 112;
    pen.lineJoin = "round";
    pen.fill();
    pen.stroke();
  };
  fill(rgb(colour), 1);
  if (thing.shape === "ring") fill(hole, 0.55);
}
