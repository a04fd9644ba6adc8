// The page: what the user does, what is asked, and what is shown of it.

import { answer, ApiError, servedModel } from "/api.js";
import { answered, conversationPictures, icon, Log, mentioned, messages, TONES } from "/conversation.js";
import { apiKey, toast, wireKeyDialog, withKey } from "/dialogs.js";
import { onFiles } from "/incoming.js";
import { readPicture } from "/picture.js";
import { drawScene } from "/scene.js";
import { withSettings, wireSettings } from "/settings.js";
import { Stage } from "/stage.js";
import { t, translate } from "/strings.js";

const $ = (id) => document.getElementById(id);
const [FEW, BRIEF] = [8, 50]; // tokens and milliseconds of an answer too short to have a speed
const touch = matchMedia("(pointer: coarse)").matches;

let model = null;
let turns = [];
let draft = { pictures: [], boxes: [] };
let examples = null; // what may be asked about a drawn picture: {picture, questions}
let shown = null; // the picture on the stage
let active = null; // the turn whose boxes are on it
let running = null; // the AbortController of the answer that streams

const stage = new Stage({ onBox: addBox, onLight: light, say });
const log = new Log($("log"), { light, show, retry, undo, copy });

// --- what is shown

function pictures() {
  return [...conversationPictures(turns), ...draft.pictures];
}

function say(text) {
  $("status").textContent = text;
}

/** Puts a picture on the stage, with the boxes of a turn. */
function show(picture, turn = active) {
  shown = picture;
  active = turn;
  render();
}

function light(boxes) {
  const owner = boxes.length && turns.find((turn) => [...turn.boxes, ...(turn.answer?.boxes ?? [])].includes(boxes[0]));
  if (owner && (owner !== active || boxes[0].picture !== shown)) show(boxes[0].picture, owner);
  stage.light(boxes);
  log.light(boxes);
}

/** Everything but the conversation's log. */
function render() {
  const all = pictures();
  if (!all.includes(shown)) shown = all.at(-1) ?? null;
  if (!turns.includes(active)) active = turns.at(-1) ?? null;
  document.body.classList.toggle("blind", model?.pictures === false);
  document.body.classList.toggle("fresh", !turns.length);
  document.body.classList.toggle("looking", Boolean(running) && turns.at(-1)?.answer?.state === "waiting");
  $("empty").hidden = Boolean(shown);
  $("view").hidden = !shown;
  if (shown) {
    const boxes = [...(active?.answer?.boxes ?? []), ...(active?.boxes ?? []), ...draft.boxes];
    const own = boxes.filter((box) => box.picture === shown);
    stage.show(shown, all.indexOf(shown) + 1, own);
    $("download").hidden = !own.length;
  }
  $("redraw").hidden = !(examples && examples.picture === shown && draft.pictures.includes(shown));
  $("strip").hidden = all.length < 2;
  $("strip").replaceChildren(...all.map((picture, index) => thumbnail(picture, index + 1, "strip")));
  $("attached").replaceChildren(...draft.pictures.map((picture) => thumbnail(picture, all.indexOf(picture) + 1, "attached")));
  $("question").placeholder = t(turns.length ? "askMore" : all.length ? "askFirst" : "askText");
  $("new").disabled = !turns.length && !all.length;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !$("question").value.trim() || !model;
  renderSuggestions();
}

function thumbnail(picture, number, place) {
  const image = Object.assign(document.createElement("img"), { src: picture.url, alt: "" });
  const open = Object.assign(document.createElement("button"), { type: "button", className: "thumb" });
  open.append(image, Object.assign(document.createElement("span"), { textContent: number }));
  open.setAttribute("aria-label", t("pictureOf", number, picture.width, picture.height));
  open.setAttribute("aria-pressed", String(picture === shown));
  open.addEventListener("click", () => {
    show(picture, turns.findLast((turn) => turn.answer?.boxes.some((box) => box.picture === picture)) ?? active);
    $(place).querySelectorAll(".thumb")[[...$(place).children].length > 1 ? pictures().indexOf(picture) : 0]?.focus();
  });
  const item = document.createElement("li");
  item.append(open);
  if (place === "attached") {
    const remove = Object.assign(document.createElement("button"), { type: "button", className: "remove" });
    remove.append(icon("close"));
    remove.setAttribute("aria-label", t("remove", number));
    remove.addEventListener("click", () => removePicture(picture));
    item.append(remove);
  }
  return item;
}

function renderSuggestions() {
  const wanted = model && !turns.length && draft.pictures.length && !$("question").value;
  const drawn = examples && draft.pictures.includes(examples.picture);
  const questions = !wanted ? [] : drawn ? examples.questions : [t("describe"), t("read")];
  $("suggestions").replaceChildren(
    ...questions.map((question) => {
      const chip = Object.assign(document.createElement("button"), { className: "chip", textContent: question });
      chip.addEventListener("click", () => ask(question));
      return chip;
    }),
  );
}

// --- what is about to be asked

async function addPictures(files) {
  for (const file of files) {
    const picture = await readPicture(file);
    if (!picture) {
      toast(t("notPicture", file.name));
      continue;
    }
    draft.pictures.push(picture);
    shown = picture;
    say(t("added", pictures().length));
  }
  render();
  if (!touch && draft.pictures.length) $("question").focus();
}

function removePicture(picture) {
  draft.pictures = draft.pictures.filter((other) => other !== picture);
  draft.boxes = draft.boxes.filter((box) => box.picture !== picture);
  render();
  $("question").focus();
}

/** A box was made on the shown picture: the question mentions it. */
function addBox(pixels) {
  const field = $("question");
  draft.boxes = mentioned(field.value, draft.boxes);
  let n = 1;
  while (draft.boxes.some((box) => box.n === n)) n++;
  draft.boxes.push({ n, pixels, picture: shown, tone: "made", ref: t("box", n) });
  const whole = t("whatIn", n);
  if (!field.value.trim()) field.value = whole;
  else field.setRangeText(whole.match(/\[.*?\]/)[0], field.selectionStart, field.selectionEnd, "end");
  grow();
  render();
  field.focus();
}

async function drawExample() {
  const { file, questions } = await drawScene();
  const picture = await readPicture(file);
  if (examples) draft.pictures = draft.pictures.filter((other) => other !== examples.picture);
  examples = { picture, questions };
  draft.pictures.push(picture);
  draft.boxes = [];
  shown = picture;
  render();
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function write(text) {
  $("question").value = text;
  grow();
}

// --- asking

function ask(text) {
  if (running || !model || !text.trim()) return;
  // A turn without an answer is not sent again; its pictures are.
  const failed = turns.length && !answered(turns.at(-1)) ? turns.pop() : null;
  const boxes = mentioned(text, draft.boxes);
  turns.push({ text: text.trim(), pictures: [...(failed?.pictures ?? []), ...draft.pictures], boxes, answer: null });
  draft = { pictures: [], boxes: [] };
  write("");
  run();
}

async function run() {
  const turn = turns.at(-1);
  const started = performance.now();
  const control = (running = new AbortController());
  turn.answer = { text: "", reasoning: "", boxes: [], state: "waiting", note: t(turn.pictures.length ? "looking" : "thinking") };
  active = turn;
  render();
  log.render(turns);
  say(turn.answer.note);
  const clock = setInterval(() => {
    if (turn.answer.state !== "waiting") return;
    turn.answer.seconds = Math.round((performance.now() - started) / 1000);
    draw(turn);
  }, 1000);
  let usage = null;
  try {
    const request = withSettings({ model: model.id, messages: messages(turns) });
    await withKey(async () => {
      for await (const chunk of answer(request, apiKey(), control.signal)) {
        usage = chunk.usage ?? usage;
        take(turn, chunk.choices?.[0]);
      }
    });
    turn.answer.state = "done";
    if (usage) {
      const [tokens, now] = [usage.completion_tokens, performance.now()];
      turn.answer.note ||= t(tokens === 1 ? "spentOne" : "spent", ((now - started) / 1000).toFixed(1), tokens);
      const took = now - turn.answer.began, speed = (1000 * (tokens - 1)) / took;
      if (tokens >= FEW && took >= BRIEF) turn.answer.note = t("speed", turn.answer.note, speed.toFixed(speed < 10 ? 1 : 0));
      showRoom(usage.prompt_tokens + usage.completion_tokens);
    }
    if (!turn.answer.text) turn.answer.note = t("empty");
  } catch (problem) {
    turn.answer.state = "failed";
    turn.answer.note = "";
    if (control.signal.aborted) turn.answer.note = t("stopped");
    else turn.answer.error = { message: problem.message, advice: problem.advice };
    if (!(problem instanceof ApiError) && !control.signal.aborted) console.error(problem);
  }
  clearInterval(clock);
  if (running === control) running = null;
  draw(turn);
  // The button that had the focus is gone.
  if (!touch && document.activeElement === document.body) $("question").focus();
  say(turn.answer.error?.message ?? `${turn.answer.text} ${turn.answer.text ? "" : turn.answer.note}`);
}

/** What a chunk adds to an answer. */
function take(turn, choice) {
  if (!choice) return;
  const { content, boxes, reasoning_content: reasoning } = choice.delta ?? {};
  const all = pictures();
  for (const box of boxes ?? []) {
    const picture = all[box.image];
    if (picture) turn.answer.boxes.push({ ...box, picture, tone: turn.answer.boxes.length % TONES });
  }
  if (boxes?.length) shown = turn.answer.boxes.at(-1)?.picture ?? shown;
  if (choice.finish_reason === "length") turn.answer.note = t("cut");
  if (!content && !reasoning && !boxes?.length) return;
  turn.answer.text += content ?? "";
  turn.answer.reasoning += reasoning ?? "";
  if (turn.answer.state === "waiting" && (content || reasoning)) {
    Object.assign(turn.answer, { state: "streaming", note: "", began: performance.now() });
  }
  take.frame ??= requestAnimationFrame(() => draw(turn));
}

function draw(turn) {
  cancelAnimationFrame(take.frame);
  take.frame = null;
  if (!turns.includes(turn)) return;
  log.update(turn, turns);
  render();
}

/** How much of the model's window a conversation takes. */
function showRoom(used) {
  const window = model.window.toLocaleString();
  const room = model.window && (used ? t("window", used.toLocaleString(), window) : t("room", window));
  $("device").textContent = [model.device, room].filter(Boolean).join(" · ");
  $("device").classList.toggle("full", model.window && used > 0.8 * model.window);
}

function stop() {
  running?.abort();
}

function retry() {
  if (running || !turns.length) return;
  run();
  $("stop").focus();
}

/** Takes the last question back into the composer. */
function undo() {
  if (running || !turns.length) return;
  const turn = turns.pop();
  draft.pictures.unshift(...turn.pictures);
  if (!$("question").value.trim()) {
    draft.boxes = turn.boxes;
    write(turn.text);
  }
  active = null;
  log.render(turns);
  render();
  $("question").focus();
}

function newConversation() {
  stop();
  running = null;
  const old = { turns, draft, examples, text: $("question").value };
  turns = [];
  draft = { pictures: [], boxes: [] };
  examples = null;
  write("");
  showRoom(0);
  log.render(turns);
  render();
  $("question").focus();
  toast(t("cleared"), t("back"), () => {
    stop();
    running = null;
    ({ turns, draft, examples } = old);
    write(old.text);
    log.render(turns);
    render();
  });
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // There is no clipboard for pages that come without TLS from another machine.
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "sr" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

async function download() {
  const blob = await stage.withBoxes();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = shown.name.replace(/\.\w+$/, "") + "-boxes.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- wiring

function wire() {
  const field = $("question");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" && !field.value && turns.length) {
      event.preventDefault();
      undo();
    }
    // An input method takes Enter to choose a word; Safari tells it by the code 229 alone.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    ask(field.value);
  });
  field.addEventListener("input", () => {
    grow();
    draft.boxes = mentioned(field.value, draft.boxes);
    render();
  });
  onFiles(addPictures, () => model?.pictures !== false);
  for (const id of ["draw", "redraw"]) $(id).addEventListener("click", drawExample);
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", newConversation);
  $("download").addEventListener("click", download);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!$("new").disabled) newConversation();
    }
  });
  wireKeyDialog();
  wireSettings();
}

/** Learns what is served; where that fails, it can be tried again. */
async function connect() {
  try {
    model = await withKey(() => servedModel(apiKey()));
  } catch (problem) {
    log.fail(problem, connect);
    return;
  }
  log.render(turns);
  document.title = `${model.title} · qvl`;
  $("model").textContent = model.title;
  showRoom(0);
  const toy = model.id === "demo";
  $("draw").hidden = !toy;
  const note = toy ? "toy" : !model.pictures ? "blind" : !model.chat ? "base" : null;
  if (note) $("note").textContent = t(note);
  render();
}

translate(document);
wire();
render();
connect();
