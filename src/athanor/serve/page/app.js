// The page: turns of a conversation, each a question and the answers of one or two panes.

import { announce, Cell } from "./answer.js";
import { hasKey, request, ServerError, setKey } from "./stream.js";
import { recall, remember, say, switchLanguage, translate } from "./words.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const selects = [$("model-0"), $("model-1")];
let turns = []; // {question, element, cells: [Cell], or two}
let comparing = false;
let running = null; // the AbortController of the answers that come

function panes() { return comparing ? [0, 1] : [0]; }

// The conversation as pane `i` has it up to turn `end`: turns before the comparison began have one answer for both panes.
function history(i, end) {
  const messages = [];
  const system = $("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const turn of turns.slice(0, end)) {
    const message = (turn.cells[i] ?? turn.cells[0]).message;
    if (message) messages.push({ role: "user", content: turn.question }, message); // a question without an answer would confuse the next
  }
  messages.push({ role: "user", content: turns[end].question });
  return messages;
}

function parameters() {
  const given = SETTINGS.slice(1).filter((name) => $(name).value !== "");
  return Object.fromEntries(given.map((name) => [name, $(name).valueAsNumber]));
}

function settingsAreGood() {
  const bad = SETTINGS.map($).find((field) => !field.checkValidity());
  if (!bad) return true;
  openSettings(true);
  bad.reportValidity();
  bad.focus();
  return false;
}

// Let cells of turn `at` answer, all at once; Esc and Stop end them.
async function answer(at, which) {
  running = new AbortController();
  redrawControls();
  const { signal } = running;
  const asked = which.map((i) => turns[at].cells[i].ask(selects[i].value, history(i, at), parameters(), signal));
  scroll(true);
  const welcome = (await Promise.all(asked)).every(Boolean);
  if (running?.signal !== signal) return; // another conversation has begun
  running = null;
  redrawControls();
  announce(signal.aborted ? "stopped" : which.some((i) => turns[at].cells[i].shown.state === "failed") ? "failed" : "done");
  if (!welcome) askForKey();
}

function ask(question) {
  if (!question.trim() || running || !selects[0].value || !settingsAreGood()) return false;
  const at = turns.length;
  const cells = panes().map((i) => new Cell(() => { if (!running && settingsAreGood()) answer(at, [i]); }));
  const said = document.createElement("p");
  said.className = "question";
  said.textContent = question;
  const row = document.createElement("div");
  row.className = "answers";
  row.append(...cells.map((cell) => cell.element));
  const element = document.createElement("li");
  element.append(said, row);
  for (const cell of turns.at(-1)?.cells ?? []) {
    cell.last = false;
    cell.redraw();
  }
  turns.push({ question, element, cells });
  $("turns").append(element);
  answer(at, panes());
  return true;
}

function begin() {
  running?.abort();
  running = null;
  turns = [];
  $("turns").replaceChildren();
  redrawControls();
  $("question").focus();
}

function redrawControls() {
  $("welcome").hidden = turns.length > 0;
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  $("new").disabled = !turns.length;
  $("compare").disabled = Boolean(running);
  for (const select of selects) select.disabled = Boolean(running);
  $("compare").setAttribute("aria-pressed", String(comparing));
  selects[1].hidden = !comparing;
  document.body.classList.toggle("comparing", comparing);
  $("report").hidden = document.documentElement.dataset.report !== "yes";
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (open && matchMedia("(max-width: 62rem)").matches) scrollTo(0, 0); // there it stands above the conversation
}

// Follow the answer while the reader is at its end.
let following = true;
addEventListener("scroll", () => { following = innerHeight + scrollY >= document.documentElement.scrollHeight - 48; }, { passive: true });
function scroll(always) {
  if (always || following) scrollTo(0, document.documentElement.scrollHeight);
}
new ResizeObserver(() => scroll(false)).observe($("turns"));

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

async function loadModels() {
  $("trouble").hidden = true;
  try {
    const names = (await (await request("v1/models")).json()).data.map((model) => model.id);
    if (!names.length) throw new ServerError(say("noModels"), 200);
    selects.forEach((select, i) => {
      select.replaceChildren(...names.map((name) => new Option(name, name)));
      select.selectedIndex = Math.min(i, names.length - 1);
    });
  } catch (error) {
    if (error.status === 401) return askForKey();
    $("trouble").hidden = false;
    $("trouble").textContent = error instanceof ServerError ? error.message : say("unreachable");
  }
}

function askForKey() {
  $("key").value = "";
  $("door").showModal();
}

// Not when the door has closed, which is told a moment later: a question may come before.
$("door").firstElementChild.onsubmit = () => {
  setKey($("key").value);
  ready = loadModels();
};
$("door").oncancel = (event) => event.preventDefault(); // nothing works without it

// A link cannot carry the key: with one, the report is fetched and kept as a file.
$("report").onclick = async (event) => {
  if (!hasKey()) return;
  event.preventDefault();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await request("report")).blob());
  link.download = "report.html";
  link.click();
  URL.revokeObjectURL(link.href);
};

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  await ready;
  if (!selects[0].value) await (ready = loadModels()); // it may be back
  if (ask($("question").value)) {
    $("question").value = "";
    grow();
  }
};
$("question").oninput = grow;
$("question").onkeydown = (event) => {
  // While signs are being composed (Chinese, Japanese ...), Enter is the input method's.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").onclick = () => { running?.abort(); $("question").focus(); };
$("new").onclick = begin;
$("compare").onclick = () => { comparing = !comparing; redrawControls(); };
$("settings-button").onclick = () => openSettings($("settings").hidden);
$("language").onclick = () => { switchLanguage(); speak(); };
for (const name of SETTINGS) {
  $(name).value = recall(name) ?? "";
  $(name).addEventListener("change", () => remember(name, $(name).value));
}

function speak() {
  translate(document);
  $("language").textContent = say("language");
  $("language").lang = document.documentElement.lang === "en" ? "zh-CN" : "en";
  for (const { cells } of turns) for (const cell of cells) cell.redraw();
}

speak();
redrawControls();
let ready = loadModels();
$("question").focus();
