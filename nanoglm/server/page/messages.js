// The conversation as it is seen. It knows messages and figures, and nothing of requests.

import { expressionOf } from "./calculator.js";

const NEAR = 80; // pixels from the end within which the view follows the text
const element = (id) => document.getElementById(id);

export class MessageList {
  /** @param acts what buttons do: xray(message), again(), edit(); and unauthorised() */
  constructor(acts) {
    this.acts = acts;
    this.views = new Map();
    this.waiting = new Set();
    this.frame = 0;
  }

  reset(messages) {
    this.views.clear();
    element("messages").replaceChildren();
    this.#failure(null);
    element("welcome").hidden = messages.length > 0;
    for (const message of messages) this.add(message);
    this.#last();
  }

  add(message) {
    element("welcome").hidden = true;
    this.#failure(null);
    if (message.role === "tool") {
      for (const view of this.views.values()) view.result?.(message);
      return;
    }
    const view = message.role === "user" ? new UserView(message, this.acts) : new AnswerView(message, this.acts);
    this.views.set(message, view);
    element("messages").append(view.root);
    view.update(this.running);
    this.#toEnd();
  }

  /** Redraws a message, once a frame however often it is called. */
  update(message) {
    this.waiting.add(message);
    this.frame ||= requestAnimationFrame(() => this.#draw());
  }

  busy(yes) {
    this.running = yes;
    const [shown, hidden] = yes ? [element("stop"), element("send")] : [element("send"), element("stop")];
    shown.hidden = false;
    if (document.activeElement === hidden) shown.focus();
    hidden.hidden = true;
    this.#draw();
    for (const view of this.views.values()) view.update(yes);
    this.#last();
  }

  failed(error) {
    if (error.status === 401) this.acts.unauthorised();
    this.#failure(error.message);
    this.#toEnd();
  }

  say(text) {
    element("status").textContent = text;
  }

  #draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const scroller = element("transcript");
    const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    for (const message of this.waiting) this.views.get(message)?.update(this.running);
    this.waiting.clear();
    if (follows) this.#toEnd();
  }

  #toEnd() {
    const scroller = element("transcript");
    scroller.scrollTop = scroller.scrollHeight;
  }

  #failure(text) {
    element("failure").hidden = text === null;
    element("failure").querySelector("p").textContent = text ?? "";
  }

  /** Only the last question can be edited, and only the last answer asked for again. */
  #last() {
    const views = [...this.views.values()];
    const question = views.findLast((view) => view instanceof UserView);
    for (const view of views) view.offer(!this.running && (view === question || view === views.at(-1)));
  }
}

class UserView {
  constructor(message, acts) {
    this.root = fromTemplate("user-template");
    this.root.querySelector(".text").textContent = message.content;
    this.root.querySelector(".edit").addEventListener("click", () => acts.edit());
  }

  offer(yes) {
    this.root.querySelector(".edit").hidden = !yes;
  }

  update() {}
}

class AnswerView {
  constructor(message, acts) {
    this.message = message;
    this.root = fromTemplate("assistant-template");
    this.thinking = this.root.querySelector(".thinking");
    this.thinking.querySelector("summary").addEventListener("click", () => (this.touched = true));
    this.root.querySelector(".open-xray").addEventListener("click", () => acts.xray(message));
    this.root.querySelector(".again").addEventListener("click", () => acts.again());
    this.results = new Map();
  }

  offer(yes) {
    this.root.querySelector(".again").hidden = !yes;
  }

  result(message) {
    if (!this.message.tool_calls.some((call) => call.id === message.tool_call_id)) return;
    this.results.set(message.tool_call_id, message.content);
    this.#calls();
  }

  update() {
    const { content, reasoning_content: reasoning, tool_calls: calls, figures } = this.message;
    const streams = !figures.finish;
    const thinks = !content && !calls.length;
    this.root.setAttribute("aria-busy", String(streams));
    this.root.classList.toggle("streaming", streams);
    this.thinking.hidden = !reasoning;
    if (!this.touched) this.thinking.open = thinks; // also where nothing followed it
    this.thinking.querySelector("summary").textContent = thinkingLine(figures, streams && thinks);
    setText(this.thinking.querySelector(".text"), reasoning);
    showText(this.root.querySelector(".content"), content);
    this.#calls();
    this.root.querySelector(".figures").replaceChildren(...figureList(figures).map(pair));
    this.root.querySelector(".open-xray").hidden = streams || !figures.id || !figures.chunks;
  }

  #calls() {
    const list = this.root.querySelector(".calls");
    list.hidden = !this.message.tool_calls.length;
    list.replaceChildren(
      ...this.message.tool_calls.map((call) => {
        const item = document.createElement("li");
        const code = document.createElement("code");
        code.textContent = expressionOf(call) ?? call.function.arguments;
        item.append(`${call.function.name} `, code);
        const result = this.results.get(call.id);
        if (result !== undefined) item.append(result.startsWith("Error") ? " — " : " = ", result);
        return item;
      }),
    );
  }
}

function thinkingLine(figures, streams) {
  const tokens = figures.usage?.completion_tokens_details?.reasoning_tokens ?? figures.thinkingChunks;
  const label = streams ? "Thinking" : "Thought";
  return `${label} · ${count(tokens, "token")} · ${(figures.thinking ?? 0).toFixed(1)} s`;
}

/** [name, value] of what is known of an answer. While it streams, chunks stand for tokens. */
export function figureList(figures) {
  const { usage, chunks, seconds, toFirst, finish } = figures;
  if (!chunks) return finish ? [["Ended", ENDS[finish] ?? finish]] : [["Waiting for", "the first token"]];
  const tokens = usage?.completion_tokens ?? chunks;
  const about = usage ? "" : "≈ ";
  const list = [["Tokens", about + number(tokens)]];
  if (seconds > 0 && tokens > 1) list.push(["Tokens/s", about + ((tokens - 1) / seconds).toFixed(1)]);
  list.push(["First token", `${toFirst.toFixed(2)} s`]);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    list.push(["Prompt", number(usage.prompt_tokens) + (cached ? ` (${number(cached)} cached)` : "")]);
    const { accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected } =
      usage.completion_tokens_details ?? {};
    const drafts = accepted + rejected;
    if (drafts > 0) list.push(["Drafts accepted", `${number(accepted)} of ${number(drafts)}`]);
  }
  if (ENDS[finish]) list.push(["Ended", ENDS[finish]]);
  return list;
}

const ENDS = { length: "at the limit of tokens", stopped: "stopped by you", error: "broken off" };

function pair([name, value]) {
  const term = document.createElement("dt");
  const definition = document.createElement("dd");
  term.textContent = name;
  definition.textContent = value;
  const group = document.createElement("div");
  group.append(term, definition);
  return group;
}

/** Shows text, what stands between ``` lines as code. */
function showText(target, text) {
  if (!text.includes("```")) return setText(target, text);
  const parts = text.split(/^```[^\n]*\n?/m);
  target.replaceChildren(
    ...parts.map((part, i) => {
      if (i % 2 === 0) return document.createTextNode(part);
      const block = document.createElement("pre");
      block.tabIndex = 0;
      block.textContent = part;
      return block;
    }),
  );
}

/** Appends what is new instead of drawing all again, so that a long stream stays quick and a selection is kept. */
function setText(target, text) {
  const node = target.firstChild;
  if (target.childNodes.length === 1 && node.nodeType === Node.TEXT_NODE && text.startsWith(node.data)) {
    node.appendData(text.slice(node.data.length));
  } else if (text || node) {
    target.textContent = text;
  }
}

function fromTemplate(id) {
  return element(id).content.firstElementChild.cloneNode(true);
}

export function number(value) {
  return value.toLocaleString("en");
}

export function count(value, noun) {
  return `${number(value ?? 0)} ${noun}${value === 1 ? "" : "s"}`;
}
