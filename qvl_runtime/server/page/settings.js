// What holds for every question: a system message, the temperature, the longest answer, and boxes only.

const $ = (id) => document.getElementById(id);
const STORED = "qvl-settings";
const NONE = { system: "", temperature: "", longest: "", grounding: false };
let chosen = { ...NONE, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {}; // storage may be forbidden
  }
}

/** The request with what was chosen; where nothing was, the server's own defaults hold. */
export function withSettings(request) {
  const { system, temperature, longest, grounding } = chosen;
  const told = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  return {
    ...request,
    messages: [...told, ...request.messages],
    ...(temperature !== "" && { temperature: Number(temperature) }),
    ...(longest !== "" && { max_tokens: Number(longest) }),
    ...(grounding && { grounding }),
  };
}

export function wireSettings() {
  const dialog = $("settings-dialog");
  const fields = { system: $("set-system"), temperature: $("set-temperature"), longest: $("set-longest") };
  const mark = () => $("settings").classList.toggle("on", Object.keys(NONE).some((name) => chosen[name] !== NONE[name]));
  const fill = (values) => {
    for (const [name, field] of Object.entries(fields)) field.value = values[name];
    $("set-grounding").checked = values.grounding;
  };
  $("settings").addEventListener("click", () => {
    fill(chosen);
    dialog.showModal();
  });
  $("set-defaults").addEventListener("click", () => fill(NONE));
  $("set-cancel").addEventListener("click", () => dialog.close());
  $("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    for (const [name, field] of Object.entries(fields)) chosen[name] = field.value;
    chosen.grounding = $("set-grounding").checked;
    try {
      localStorage.setItem(STORED, JSON.stringify(chosen));
    } catch {
      // then they last until the page is left
    }
    mark();
    dialog.close();
  });
  mark();
}
