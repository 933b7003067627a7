// A conversation: its messages as the API has them, each answer with its figures, and the loop that runs the tool.

import { completion } from "./api.js";
import { answer, CALCULATOR } from "./calculator.js";
import { read, write } from "./keep.js";

const KEPT = "nanoglm.messages";
const STEPS = 5; // requests that one question may take while the model calls the tool

export class Chat {
  /**
   * @param view what shows it: add(message), update(message), busy(yes), failed(error), say(text), reset(messages)
   * @param settings a function: { system, calculator: whether it is offered, fields: of the request }
   */
  constructor(view, settings) {
    this.view = view;
    this.settings = settings;
    this.messages = read("sessionStorage", KEPT, []);
    for (const { figures } of this.messages) if (figures) figures.finish ??= "stopped"; // reloaded while it streamed
    this.controller = null;
    view.reset(this.messages);
  }

  get running() {
    return this.controller !== null;
  }

  async send(text) {
    if (this.running) return;
    this.#add({ role: "user", content: text });
    await this.#answer();
  }

  /** Asks for the last answer once more. */
  async again() {
    if (this.running || !this.#cut(1)) return;
    this.view.reset(this.messages);
    await this.#answer();
  }

  /** Takes the last question back, with all that followed, and returns its text. */
  takeBack() {
    const text = this.messages.findLast((message) => message.role === "user")?.content;
    if (this.running || !this.#cut(0)) return null;
    this.save();
    this.view.reset(this.messages);
    return text;
  }

  stop() {
    this.controller?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.save();
    this.view.reset(this.messages);
  }

  save() {
    write("sessionStorage", KEPT, this.messages);
  }

  /** Drops what follows the last question, and with keep 0 the question too. */
  #cut(keep) {
    const last = this.messages.findLastIndex((message) => message.role === "user");
    if (last >= 0) this.messages = this.messages.slice(0, last + keep);
    return last >= 0;
  }

  #add(message) {
    this.messages.push(message);
    this.view.add(message);
    this.save();
  }

  async #answer() {
    const controller = (this.controller = new AbortController());
    const own = this.messages;
    this.view.busy(true);
    try {
      for (let step = 1; ; step += 1) {
        const calls = await this.#step(controller.signal);
        if (!calls.length) break;
        for (const call of calls) this.#add({ role: "tool", tool_call_id: call.id, content: answer(call) });
        if (step === STEPS) throw new Error(`The model still called the tool after ${STEPS} steps, so it was stopped.`);
      }
    } catch (error) {
      if (error.name === "AbortError") this.view.say("Stopped");
      else if (own === this.messages) this.view.failed(error);
    } finally {
      this.controller = null;
      if (own === this.messages) this.save(); // else a new chat began
      this.view.busy(false);
    }
  }

  /** One request. Returns the tool calls of its answer. */
  async #step(signal) {
    const { system, calculator, fields } = await this.settings();
    signal.throwIfAborted();
    const body = { ...fields, messages: this.#history(), ...(calculator && { tools: [CALCULATOR] }) };
    if (system) body.messages.unshift({ role: "system", content: system });
    const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [], figures: {} };
    const clock = new Clock(message.figures);
    this.#add(message);
    try {
      for await (const chunk of completion(body, signal)) {
        this.#take(chunk, message, clock);
        this.view.update(message);
      }
    } catch (error) {
      message.figures.finish = error.name === "AbortError" ? "stopped" : "error";
      message.tool_calls = []; // cut off in the middle of a call
      throw error;
    } finally {
      message.figures.finish ??= "stop";
      this.view.update(message);
      if (isEmpty(message) && message.figures.finish === "error") this.#drop(message);
    }
    this.view.say(spoken(message));
    return message.tool_calls;
  }

  #take(chunk, message, clock) {
    const { figures } = message;
    figures.id ??= chunk.id;
    if (chunk.usage) figures.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta = {}, finish_reason: finish } = choice;
    const thinks = Boolean(delta.reasoning_content);
    if (thinks) message.reasoning_content += delta.reasoning_content;
    if (delta.content) message.content += delta.content;
    for (const part of delta.tool_calls ?? []) {
      const call = (message.tool_calls[part.index] ??= emptyCall());
      if (part.id) call.id = part.id;
      call.function.name += part.function?.name ?? "";
      call.function.arguments += part.function?.arguments ?? "";
    }
    if (thinks || delta.content || delta.tool_calls?.length) {
      if (thinks && !figures.thinkingChunks) this.view.say("Thinking");
      clock.tick(thinks);
    }
    if (finish) figures.finish = finish;
  }

  #drop(message) {
    const at = this.messages.indexOf(message);
    if (at < 0) return;
    this.messages.splice(at, 1);
    this.view.reset(this.messages);
  }

  /** The messages as the server takes them; calls that were never answered are left out. */
  #history() {
    const answered = new Set(this.messages.map((message) => message.tool_call_id));
    return this.messages.flatMap(({ figures, ...message }) => {
      if (message.role !== "assistant") return [message];
      const calls = message.tool_calls.filter((call) => answered.has(call.id));
      if (isEmpty({ ...message, tool_calls: calls })) return [];
      const { role, content, reasoning_content } = message;
      const own = { role, content };
      if (reasoning_content) own.reasoning_content = reasoning_content;
      if (calls.length) own.tool_calls = calls;
      return [own];
    });
  }
}

/** Measures an answer into its figures: seconds to the first token, of thinking, and from first token to last. */
class Clock {
  constructor(figures) {
    this.figures = Object.assign(figures, { chunks: 0, thinkingChunks: 0 });
    this.start = performance.now();
  }

  tick(thinks) {
    const now = performance.now();
    this.first ??= now;
    this.figures.toFirst = (this.first - this.start) / 1000;
    this.figures.seconds = (now - this.first) / 1000;
    this.figures.chunks += 1;
    if (!thinks) return;
    this.figures.thinking = (now - this.first) / 1000;
    this.figures.thinkingChunks += 1;
  }
}

function emptyCall() {
  return { id: "", type: "function", function: { name: "", arguments: "" } };
}

function isEmpty(message) {
  return !message.content && !message.reasoning_content && !message.tool_calls.length;
}

/** For readers of screens: a short answer whole, a long one by its beginning. */
function spoken(message) {
  const text = message.content.trim();
  return text.length > 300 ? `Answer finished: ${text.slice(0, 300)} …` : `Answer finished: ${text || "no text"}`;
}
