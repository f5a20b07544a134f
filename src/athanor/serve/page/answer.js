// One answer slot of a turn: a pane's answers to one question (the first and those asked for again), of which one is shown.

import { complete, request, ServerError } from "./stream.js";
import { draw } from "./text.js";
import { say } from "./words.js";

const RATES = document.documentElement.dataset.feedback === "yes";
const status = document.getElementById("status");

export function announce(key) { status.textContent = say(key); }

function make(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function button(symbol, pressed) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${symbol}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  const made = make("button", { type: "button", className: "icon" }, svg);
  if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
  return made;
}

function label(element, word) {
  element.setAttribute("aria-label", word);
  element.title = word;
}

export class Cell {
  // `again` is called when another answer is wanted, `changed` when another one is shown.
  constructor(again) {
    this.answers = [];
    this.at = -1;
    this.last = true;
    this.frame = 0;
    this.model = make("span", { className: "model" });
    this.summary = make("summary");
    this.thought = make("div", { className: "text" });
    this.reasoning = make("details", { className: "reasoning", hidden: true }, this.summary, this.thought);
    this.text = make("div", { className: "text" });
    this.error = make("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.cost = make("span", { className: "cost" });
    this.back = button("left");
    this.place = make("span", { className: "place" });
    this.forth = button("right");
    this.variants = make("span", { className: "variants", hidden: true }, this.back, this.place, this.forth);
    this.up = button("thumb", false);
    this.down = button("thumb", false);
    this.down.classList.add("down");
    this.pen = button("pen");
    this.copy = button("copy");
    this.again = button("again");
    this.pen.setAttribute("aria-expanded", "false");
    this.feedback = make("span", { className: "tools", hidden: !RATES }, this.up, this.down, this.pen);
    this.tools = make("div", { className: "foot" }, this.variants, this.feedback, this.copy, this.again, this.cost);
    this.note = make("textarea", { rows: 2, maxLength: 4000 });
    this.save = make("button", { type: "submit" });
    this.noteForm = make("form", { className: "note", hidden: true }, this.note, this.save);
    this.element = make("article", { className: "answer" }, this.model, this.reasoning, this.text, this.error, this.tools, this.noteForm);

    this.again.onclick = again;
    this.back.onclick = () => this.show(this.at - 1);
    this.forth.onclick = () => this.show(this.at + 1);
    this.up.onclick = () => this.rate("up");
    this.down.onclick = () => this.rate("down");
    this.copy.onclick = async () => {
      try {
        await navigator.clipboard.writeText(this.shown.text);
        announce("copied");
        label(this.copy, say("copied"));
      } catch {
        getSelection().selectAllChildren(this.text); // no clipboard without HTTPS, or not allowed: ready for Ctrl-C at least
      }
    };
    this.pen.onclick = () => {
      this.noteForm.hidden = !this.noteForm.hidden;
      this.pen.setAttribute("aria-expanded", String(!this.noteForm.hidden));
      if (!this.noteForm.hidden) this.note.focus();
    };
    this.noteForm.onsubmit = async (event) => {
      event.preventDefault();
      if (await this.send({ ...this.shown, note: this.note.value.trim() })) this.pen.click();
    };
    this.note.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.noteForm.requestSubmit();
    };
  }

  get shown() { return this.answers[this.at]; }

  // What goes into the history: null where nothing was said.
  get message() {
    const { text, reasoning } = this.shown ?? {};
    return text ? { role: "assistant", content: text, ...(reasoning && { reasoning_content: reasoning }) } : null;
  }

  show(at) {
    this.at = at;
    this.note.value = this.shown.note;
    this.redraw();
  }

  // Ask `model` and show the answer while it comes; true unless the server wants a key.
  async ask(model, messages, parameters, signal) {
    const answer = { model, messages, parameters, text: "", reasoning: "", state: "streaming", rating: null, note: "", error: null };
    this.answers.push(answer);
    this.show(this.answers.length - 1);
    const started = performance.now();
    let first = null, last = started;
    try {
      const end = await complete({ model, messages, ...parameters }, signal, (id) => { answer.id = id; }, (content, reasoning) => {
        answer.text += content;
        answer.reasoning += reasoning;
        last = performance.now();
        first ??= last;
        this.frame ||= requestAnimationFrame(() => this.redraw());
      });
      answer.finish = end.finish;
      answer.tokens = end.tokens;
      answer.state = end.finish ? "done" : "broken";
    } catch (error) {
      answer.state = signal.aborted ? "stopped" : "failed";
      answer.finish = "abort";
      answer.error = error;
    }
    answer.first = first && (first - started) / 1000;
    answer.rate = answer.tokens > 1 && last > first ? ((answer.tokens - 1) * 1000) / (last - first) : null;
    this.redraw();
    return answer.error?.status !== 401;
  }

  redraw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const answer = this.shown;
    if (!answer) return;
    const live = answer.state === "streaming", thinking = live && !answer.text;
    this.element.setAttribute("aria-busy", String(live));
    this.element.dataset.state = answer.state;
    this.model.textContent = answer.model;
    if (this.reasoning.hidden !== !answer.reasoning || this.thinking !== thinking) this.reasoning.open = thinking; // once: then it is the reader's
    this.thinking = thinking;
    this.reasoning.hidden = !answer.reasoning;
    this.summary.textContent = say(thinking ? "thinking" : "reasoning");
    this.thought.textContent = answer.reasoning;
    this.text.replaceChildren(draw(answer.text));
    this.error.hidden = !["failed", "broken"].includes(answer.state);
    this.error.textContent = this.error.hidden ? "" : this.#why(answer);
    this.tools.hidden = live;
    this.variants.hidden = this.answers.length < 2;
    this.place.textContent = say("answerOf", this.at + 1, this.answers.length);
    this.back.disabled = this.at === 0;
    this.forth.disabled = this.at === this.answers.length - 1;
    this.again.hidden = !this.last;
    this.copy.hidden = !answer.text;
    this.feedback.hidden = !RATES || !answer.text || !answer.id;
    this.up.setAttribute("aria-pressed", String(answer.rating === "up"));
    this.down.setAttribute("aria-pressed", String(answer.rating === "down"));
    this.pen.classList.toggle("filled", Boolean(answer.note));
    this.cost.textContent = this.#cost(answer);
    for (const name of ["again", "copy", "up", "down"]) label(this[name], say(name));
    label(this.back, say("left"));
    label(this.forth, say("right"));
    label(this.pen, answer.note ? `${say("note")}: ${answer.note}` : say("note"));
    this.note.setAttribute("aria-label", say("note"));
    this.note.placeholder = say("noteHint");
    this.save.textContent = say("save");
  }

  #why(answer) {
    if (answer.state === "broken") return say("broken");
    if (answer.error instanceof ServerError) return answer.error.message;
    return say(answer.id ? "broken" : "unreachable");
  }

  #cost(answer) {
    const parts = [];
    if (answer.tokens !== null && answer.tokens !== undefined) parts.push(say("tokens", answer.tokens));
    if (answer.rate) parts.push(say("rate", answer.rate < 10 ? answer.rate.toFixed(1) : Math.round(answer.rate)));
    if (answer.first) parts.push(say("first", answer.first.toFixed(2)));
    if (answer.finish === "length") parts.push(say("cut"));
    if (answer.state === "stopped") parts.push(say("stopped"));
    return parts.join(" · ");
  }

  rate(rating) {
    const answer = this.shown;
    return this.send({ ...answer, rating: answer.rating === rating ? null : rating });
  }

  // Keep a rating and a note with the server; only what it took is shown.
  async send({ id, rating, note }) {
    const answer = this.answers.find((one) => one.id === id);
    try {
      await request("feedback", {
        request_id: id, model: answer.model, messages: answer.messages, parameters: answer.parameters, answer: answer.text,
        reasoning: answer.reasoning || null, finish_reason: answer.finish, rating, note,
      });
    } catch (error) {
      this.redraw();
      this.error.hidden = false;
      this.error.textContent = `${say("unsaved")}: ${error instanceof ServerError ? error.message : say("unreachable")}`;
      return false;
    }
    Object.assign(answer, { rating, note });
    this.redraw();
    announce("saved");
    return true;
  }
}
