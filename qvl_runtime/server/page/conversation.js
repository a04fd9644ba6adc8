// The turns of a conversation: what is sent to the server, and how they are shown.

import { pieces, withBoxes } from "/notation.js";
import { t } from "/strings.js";

const MARK = /(\[(?:box|框) ?\d+\])/;
export const TONES = 6;

/**
 * A turn is `{text, pictures, boxes, answer}`. `text` has marks like "[box 1]" for its `boxes`: `{n, picture, pixels}`.
 * An answer is `{text, reasoning, boxes, state, note, error}`; its state is "waiting", "streaming", "done" or "failed".
 */
export function answered(turn) {
  return turn.answer?.text !== "" && turn.answer?.text !== undefined;
}

/** The boxes that a text mentions; a mark without a box stays text. */
export function mentioned(text, boxes) {
  const parts = cutAtMarks(text, boxes);
  return boxes.filter((box) => parts.includes(box));
}

/** A turn's text cut at its marks: strings and boxes. */
function cutAtMarks(text, boxes) {
  const numberOf = (piece) => MARK.test(piece) && Number(piece.match(/\d+/)[0]);
  return text
    .split(MARK)
    .filter(Boolean)
    .map((piece) => boxes.find(({ n }) => n === numberOf(piece)) ?? piece);
}

export function conversationPictures(turns) {
  return turns.flatMap((turn) => turn.pictures);
}

/** The `messages` of a request for the last turn's answer. */
export function messages(turns) {
  const pictures = conversationPictures(turns);
  return turns.flatMap((turn, index) => {
    const content = turn.pictures.map(({ data }) => ({ type: "image_url", image_url: { url: data } }));
    for (const part of cutAtMarks(turn.text, turn.boxes)) {
      if (typeof part === "string") content.push({ type: "text", text: part });
      else content.push({ type: "box", image: pictures.indexOf(part.picture), pixels: part.pixels });
    }
    const asked = { role: "user", content };
    return index === turns.length - 1 ? [asked] : [asked, { role: "assistant", content: turn.answer.text }];
  });
}

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function button(iconName, text, label, onClick) {
  const element = make("button", "quiet", icon(iconName), make("span", "", text));
  element.type = "button";
  element.title = label;
  element.setAttribute("aria-label", label);
  element.addEventListener("click", onClick);
  return element;
}

function error({ message, advice }) {
  return make("p", "error", make("b", "", message), advice ? make("span", "", advice) : "");
}

/** The turns in the element `root`. `act` has light, show, retry, undo and copy. */
export class Log {
  #articles = new Map();
  #phrases = new Map(); // box -> its elements

  constructor(root, act) {
    Object.assign(this, { root, act });
  }

  /** Shows all turns anew. */
  render(turns) {
    this.#phrases.clear();
    this.#articles = new Map(turns.map((turn) => [turn, make("article", "turn")]));
    for (const turn of turns) this.#fill(turn, turns);
    this.root.replaceChildren(...this.#articles.values());
    this.#scroll(true);
  }

  /** Shows that there is no model to talk to. */
  fail(problem, retry) {
    const row = make("p", "actions", button("retry", t("retry"), t("retry"), retry));
    this.root.replaceChildren(error(problem), row);
  }

  /** Shows what changed in the answer of the last turn. */
  update(turn, turns) {
    const stays = this.root.scrollHeight - this.root.scrollTop - this.root.clientHeight < 80;
    const focus = this.#articles.get(turn).contains(document.activeElement);
    this.#fill(turn, turns);
    if (focus && !this.root.contains(document.activeElement)) this.root.focus({ preventScroll: true });
    this.#scroll(stays);
  }

  /** Marks the phrases of some boxes. */
  light(boxes) {
    const lit = new Set(boxes.flatMap((box) => this.#phrases.get(box) ?? []));
    for (const element of [...this.#phrases.values()].flat()) element.classList.toggle("lit", lit.has(element));
  }

  #scroll(wanted) {
    if (wanted) this.root.scrollTop = this.root.scrollHeight;
  }

  #fill(turn, turns) {
    for (const box of [...turn.boxes, ...(turn.answer?.boxes ?? [])]) this.#phrases.delete(box);
    const parts = [this.#question(turn, turns)];
    if (turn.answer) parts.push(this.#answer(turn, turns.at(-1) === turn));
    this.#articles.get(turn).replaceChildren(...parts);
  }

  #question(turn, turns) {
    const said = make("div", "question");
    said.setAttribute("role", "group");
    said.setAttribute("aria-label", t("you"));
    const pictures = conversationPictures(turns);
    if (turn.pictures.length) {
      const row = make("div", "thumbs");
      for (const picture of turn.pictures) {
        const image = make("img");
        image.src = picture.url;
        image.alt = t("pictureOf", pictures.indexOf(picture) + 1, picture.width, picture.height);
        const thumb = make("button", "thumb", image);
        thumb.type = "button";
        thumb.addEventListener("click", () => this.act.show(picture, turn));
        row.append(thumb);
      }
      said.append(row);
    }
    const text = make("p");
    for (const part of cutAtMarks(turn.text, turn.boxes)) {
      text.append(typeof part === "string" ? part : this.#phrase(t("box", part.n), [part], "made"));
    }
    said.append(text);
    return said;
  }

  #answer(turn, last) {
    const { answer } = turn;
    const said = make("div", `answer ${answer.state}`);
    const text = make("p", "text");
    const open = answer.state === "streaming";
    for (const piece of withBoxes(pieces(answer.text, open), answer.boxes)) {
      if (piece.text !== undefined) text.append(piece.text);
      else {
        const shown = piece.phrase || piece.numbers.map((numbers) => `(${numbers.join(", ")})`).join(" ");
        text.append(this.#phrase(shown, piece.boxes, piece.boxes[0]?.tone));
      }
    }
    if (answer.reasoning) said.append(this.#reasoning(answer));
    if (answer.text) said.append(text);
    const since = answer.seconds > 2 ? t("seconds", answer.seconds) : "";
    if (answer.state === "waiting") said.append(make("p", "waiting", make("i"), make("span", "", answer.note), make("small", "", since)));
    if (answer.error) said.append(error(answer.error));
    if (answer.state !== "waiting" && answer.state !== "streaming") said.append(this.#actions(turn, last));
    return said;
  }

  /** What the model thought: open until the answer itself begins, or as the user wants it. */
  #reasoning(answer) {
    const thoughts = make("details", "reasoning", make("summary", "", t("reasoning")), make("p", "", answer.reasoning));
    thoughts.open = answer.unfolded ?? !answer.text;
    thoughts.firstChild.addEventListener("click", () => (answer.unfolded = !thoughts.open));
    return thoughts;
  }

  #actions(turn, last) {
    const { answer } = turn;
    const row = make("p", "actions");
    if (answer.text) {
      const copy = button("copy", t("copy"), t("copyLong"), async () => {
        await this.act.copy(answer.text);
        copy.replaceChildren(icon("check"), make("span", "", t("copied")));
      });
      row.append(copy);
    }
    if (last) {
      row.append(button("retry", t("retry"), t("retryLong"), this.act.retry));
      row.append(button("undo", t("undo"), t("undoLong"), this.act.undo));
    }
    row.append(make("small", "", answer.note ?? ""));
    return row;
  }

  /** A phrase: a button that lights its boxes, or plain where it has none. */
  #phrase(text, boxes, tone) {
    if (!boxes.length) return make("span", "phrase", text);
    const element = make("button", `phrase tone-${tone}`, text);
    element.type = "button";
    for (const box of boxes) this.#phrases.set(box, [...(this.#phrases.get(box) ?? []), element]);
    for (const event of ["pointerenter", "focus", "click"]) {
      element.addEventListener(event, () => this.act.light(boxes));
    }
    for (const event of ["pointerleave", "blur"]) element.addEventListener(event, () => this.act.light([]));
    return element;
  }
}
