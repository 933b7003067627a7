// Entry: settings, composer, theme, and what connects the parts.

import { modelName, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { read, write } from "./keep.js";
import { MessageList } from "./messages.js";
import { Xray } from "./xray.js";

const FIELDS = ["system", "budget", "temperature", "max-tokens"];
const WIDE = "(min-width: 60rem)";
const element = (id) => document.getElementById(id);
const prompt = element("prompt");
let model = null;

// ------------------------------------------------------------------ settings
function restoreSettings() {
  const kept = read("localStorage", "nanoglm.settings", {});
  for (const name of FIELDS) element(name).value = kept[name] ?? "";
  element("calculator").checked = kept.calculator ?? false;
  const effort = document.querySelector(`#effort input[value="${CSS.escape(kept.effort ?? "")}"]`);
  if (effort) effort.checked = true;
}

function keepSettings() {
  const kept = Object.fromEntries(FIELDS.map((name) => [name, element(name).value]));
  kept.calculator = element("calculator").checked;
  kept.effort = effort();
  write("localStorage", "nanoglm.settings", kept);
}

function effort() {
  return document.querySelector("#effort input:checked").value;
}

/** What a request says beside its messages. An empty field is left to the server. */
async function settings() {
  if (!model) await findModel();
  const fields = { xray: true, reasoning_effort: effort() };
  if (model) fields.model = model;
  const numbers = { thinking_token_budget: "budget", temperature: "temperature", max_tokens: "max-tokens" };
  for (const [name, id] of Object.entries(numbers)) {
    if (element(id).value !== "") fields[name] = element(id).valueAsNumber;
  }
  return { system: element("system").value.trim(), calculator: element("calculator").checked, fields };
}

function showSettings(yes) {
  element("settings").hidden = !yes;
  element("show-settings").setAttribute("aria-expanded", String(yes));
}

async function findModel() {
  try {
    model = await modelName();
    element("model").textContent = model;
  } catch (error) {
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  showSettings(true);
  element("key-field").hidden = false;
  element("key").focus();
}

// ------------------------------------------------------------------ theme
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  element("theme").setAttribute("aria-pressed", String(isDark()));
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("nanoglm.theme", theme); // as it is: theme.js reads it
  } catch {
    // it holds until the page is left
  }
  showTheme();
}

// ------------------------------------------------------------------ composer
async function submit() {
  const form = element("settings-form");
  if (!form.checkValidity()) {
    showSettings(true);
    form.reportValidity();
    return;
  }
  const text = prompt.value.trim();
  if (!text || chat.running) return;
  prompt.value = "";
  grow();
  await chat.send(text);
}

/** The field is as high as its text, up to what the style allows. */
function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function edit() {
  const text = chat.takeBack();
  if (text === null) return;
  prompt.value = text;
  grow();
  prompt.focus();
}

// ------------------------------------------------------------------ connections
restoreSettings();
showTheme();
showSettings(matchMedia(WIDE).matches);
const xray = new Xray(element("xray"));
const view = new MessageList({
  xray: (message) => xray.open(message.figures.id),
  again: () => chat.again(),
  edit,
  unauthorised: askForKey,
});
const chat = new Chat(view, settings);
findModel();
if (matchMedia(WIDE).matches) prompt.focus(); // on a phone it would raise the keyboard

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
element("stop").addEventListener("click", () => chat.stop());
element("retry").addEventListener("click", () => chat.again());
element("new").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
element("suggestions").addEventListener("click", (event) => {
  if (!event.target.matches("button")) return;
  prompt.value = event.target.textContent;
  submit();
});
element("show-settings").addEventListener("click", () => showSettings(element("settings").hidden));
element("theme").addEventListener("click", switchTheme);
element("settings-form").addEventListener("submit", (event) => event.preventDefault());
element("settings-form").addEventListener("change", keepSettings);
element("effort").addEventListener("change", keepSettings);
element("key").addEventListener("change", () => {
  setKey(element("key").value.trim());
  findModel();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
addEventListener("pagehide", () => chat.save());
