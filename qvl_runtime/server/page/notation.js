// An answer's text as words and phrases: what the families write around a phrase and its box is not shown.

const REF = ["<ref>", "</ref>", "<|object_ref_start|>", "<|object_ref_end|>"];
const OBJECT = /\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}/g;
const SPAN = new RegExp(
  "(<ref>|<\\|object_ref_start\\|>)((?:(?!<ref>|<\\|object_ref_start\\|>)[^])*?)(</ref>|<\\|object_ref_end\\|>)" +
    "|(<box>|<\\|box_start\\|>)([^<]*)(</box>|<\\|box_end\\|>)" +
    `|(${OBJECT.source})`,
  "g",
);
// What a stream may end with in the middle of a notation.
const UNFINISHED = /(?:<(?:ref|\|object_ref_start\|)>?[^<]*|<(?:box|\|box_start\|)>?[^<]*)?(?:<[/|]?[a-z_]*\|?)?$/;
const UNFINISHED_LIST = /(?:(?:^|\n)`{1,3}[a-z]{0,4}\s*)?\[?\s*$/;
const OBJECT_STARTS = ['{"bbox_2d"', '{"label"'];

/**
 * Pieces of an answer: `{text}`, or `{phrase, numbers}` with the numbers of each box as the model wrote them.
 *
 * While the answer still streams (`open`), a notation at its end that is not complete is shown as a phrase so far.
 */
export function pieces(text, open = false) {
  let tail = null;
  if (open) {
    text = withoutObject(text).replace(UNFINISHED_LIST, "");
    const cut = text.search(UNFINISHED);
    const rest = text.slice(cut);
    const begin = REF.find((tag) => !tag.includes("/") && rest.startsWith(tag));
    if (begin) tail = rest.slice(begin.length).replace(/<[^<]*$/, "");
    text = text.slice(0, cut);
  }
  const found = [];
  let end = 0;
  for (const span of text.matchAll(SPAN)) {
    const [whole, ref, phrase, , box, corners, , json] = span;
    const object = json && boxObject(json);
    const numbers = box && boxNumbers(corners);
    if ((json && !object) || (box && !numbers)) continue;
    if (span.index > end) found.push({ text: text.slice(end, span.index) });
    end = span.index + whole.length;
    if (ref) found.push({ phrase: phrase.trim(), numbers: [] });
    else if (object) found.push({ ...object, json: true });
    else if (found.at(-1)?.phrase !== undefined && !found.at(-1).json) found.at(-1).numbers.push(numbers);
    else found.push({ phrase: "", numbers: [numbers] });
  }
  if (end < text.length) found.push({ text: text.slice(end) });
  if (tail) found.push({ phrase: tail, numbers: [] });
  return withoutList(found);
}

/** Without an object of a box that has begun and has no end. */
function withoutObject(text) {
  const whole = [...text.matchAll(OBJECT)].filter(([json]) => boxObject(json));
  const end = whole.length ? whole.at(-1).index + whole.at(-1)[0].length : 0;
  for (let begin = text.indexOf("{", end); begin >= 0; begin = text.indexOf("{", begin + 1)) {
    const head = text.slice(begin, begin + 40).replace(/\s/g, "");
    if (OBJECT_STARTS.some((start) => head.startsWith(start) || start.startsWith(head))) return text.slice(0, begin);
  }
  return text;
}

function boxNumbers(corners) {
  const numbers = corners.replace(/[()]/g, "").trim().split(/\s*,\s*/);
  return numbers.length === 4 && numbers.every((number) => /^\d{1,4}$/.test(number)) ? numbers.map(Number) : null;
}

function boxObject(json) {
  if (!json.includes("bbox_2d")) return null;
  try {
    const { bbox_2d: numbers, label } = JSON.parse(json.replace(/[\n\t]/g, " "));
    const good = Array.isArray(numbers) && numbers.length === 4 && numbers.every(Number.isFinite);
    return good ? { phrase: typeof label === "string" ? label : "", numbers: [numbers] } : null;
  } catch {
    return null;
  }
}

/** Without the brackets, commas and fences of a JSON list of boxes. */
function withoutList(found) {
  return found
    .map((piece, index) => {
      if (piece.text === undefined) return piece;
      let { text } = piece;
      const before = found[index - 1]?.json;
      const after = found[index + 1]?.json;
      if (before && after && /^\s*,\s*$/.test(text)) return { text: " " };
      if (after) text = text.replace(/(?:```(?:json)?\s*)?\[?\s*$/, "");
      if (before) text = text.replace(/^\s*,?\s*\]?(?:\s*`{1,3})?/, "");
      return { text };
    })
    .filter((piece) => piece.text !== "");
}

/** Gives each phrase the boxes of the server that it stands for: `boxes` of a piece. */
export function withBoxes(found, boxes) {
  const free = [...boxes];
  for (const piece of found) {
    piece.boxes = (piece.numbers ?? []).flatMap((numbers) => {
      const at = free.findIndex((box) => box.numbers.every((number, index) => number === numbers[index]));
      return at < 0 ? [] : free.splice(at, 1);
    });
  }
  return found;
}
