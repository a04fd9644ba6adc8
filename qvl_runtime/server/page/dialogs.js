// The API key, which is asked for when the server wants one, and messages at the foot of the page.

import { t } from "/strings.js";

const $ = (id) => document.getElementById(id);
// Kept for this tab, so that it survives a reload; never in an address.
let key = sessionStorage.getItem("qvl-key") ?? "";
let hiding = 0;

export function apiKey() {
  return key;
}

/** Runs `work`, and again with another key as long as the server refuses the one it was given. */
export async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (problem) {
      if (problem.status !== 401 || !(await askKey())) throw problem;
    }
  }
}

/** Asks for the key; false if the user would rather not. */
function askKey() {
  const dialog = $("ask-key");
  $("key-wrong").hidden = !key;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use"), { once: true });
  });
}

export function wireKeyDialog() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    sessionStorage.setItem("qvl-key", key);
    $("ask-key").close("use");
  });
  $("key-cancel").addEventListener("click", () => $("ask-key").close());
}

/** Shows a message for a while, with something to do about it or without. */
export function toast(text, label, action) {
  const box = $("toast");
  box.replaceChildren(text);
  if (label) {
    const act = Object.assign(document.createElement("button"), { className: "plain", textContent: label });
    act.addEventListener("click", () => {
      box.hidden = true;
      action();
    });
    box.append(act);
  }
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (box.hidden = true), 9000);
}
