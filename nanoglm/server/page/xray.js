// What the model looked at: for each token the positions it selected, by which layer, and the experts it visited.

import { xray } from "./api.js";
import { Chips, shownText } from "./chips.js";
import { HeatMap, SelectionMap } from "./heat.js";
import { count, number } from "./messages.js";

const ALL = "all";
const TONES = 6; // colours of groups of layers
const element = (id) => document.getElementById(id);

export class Xray {
  constructor(dialog) {
    this.dialog = dialog;
    this.chips = new Chips(element("chips"), (position) => this.choose(position));
    const show = (position) => this.chips.show(position);
    this.map = new SelectionMap(element("map"), element("map-names"), element("map-cursor"), show);
    this.heat = new HeatMap(element("heat"), (position) => this.choose(position));
    element("xray-close").addEventListener("click", () => dialog.close());
    element("layers").addEventListener("change", () => this.#layerChanged());
    element("hit-before").addEventListener("click", () => this.#step(-1));
    element("hit-after").addEventListener("click", () => this.#step(1));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#redraw());
    addEventListener("resize", () => dialog.open && this.chosen !== undefined && this.heat.mark(this.chosen));
  }

  /** Shows what the server recorded of an answer. */
  async open(id) {
    this.id = id;
    this.data = null;
    this.chosen = undefined;
    this.rows = new Map();
    this.heats = new Map();
    this.heat.clear();
    element("xray-body").hidden = true;
    element("xray-summary").textContent = "";
    this.#failure("");
    this.dialog.showModal();
    await this.#guarded(async () => {
      const data = await xray(id);
      if (this.id !== id) return;
      this.data = data;
      this.full = data.full_layers;
      element("xray-body").hidden = false;
      this.#fill();
      await this.choose(Math.max(0, Math.min(data.prompt_tokens, data.rows - 1)));
      element("chips").focus({ preventScroll: true });
      await this.#drawHeat();
    });
  }

  /** Chooses the token at a position; what it selected follows from the server. */
  async choose(position) {
    this.chosen = position;
    this.pending?.abort();
    const { signal } = (this.pending = new AbortController());
    const { id } = this;
    await this.#guarded(async () => {
      const none = position >= this.data.rows;
      if (none) this.rows.set(position, { selected: {}, experts: {} });
      if (!this.rows.has(position)) this.chips.mark(position, new Map(), 1); // answers a held key at once
      const row = this.rows.get(position) ?? (await xray(id, `/${position}`, signal));
      if (this.id !== id || this.chosen !== position) return;
      this.rows.set(position, row);
      this.#redraw();
    });
  }

  // ---------------------------------------------------------------- once for an answer
  #fill() {
    const { data } = this;
    const output = data.tokens.length - data.prompt_tokens;
    const accepted = data.drafted.reduce((sum, yes) => sum + yes, 0);
    element("xray-summary").textContent =
      `${data.model} · ${count(data.prompt_tokens, "token")} of prompt, ${number(output)} of answer, ` +
      `${number(accepted)} of them accepted drafts · k = ${data.index_topk}`;
    this.chips.fill(data.tokens, data.prompt_tokens, data.drafted);
    element("layers").replaceChildren(
      layerChoice(ALL, "All Full layers", [named("all", "All Full layers")], ""),
      ...this.full.map((layer, i) => layerChoice(layer, this.#reuse(layer), this.#cells(layer), `tone-${i % TONES}`)),
    );
    element("layers").querySelector("input").checked = true;
    element("map-end").textContent = element("heat-end").textContent = number(data.tokens.length - 1);
    element("experts").style.setProperty("--experts", data.n_routed_experts);
    element("experts-note").textContent =
      `${data.num_experts_per_tok} of ${data.n_routed_experts} in each MoE layer; expert 0 is at the left.`;
  }

  /** A Full layer and, behind it, those that reuse its Selection. */
  #cells(layer) {
    return [cell("F", layer, "full"), ...this.#shared(layer).map((i) => cell("S", i, "shared"))];
  }

  #shared(layer) {
    return this.data.source.flatMap((source, i) => (source === layer && i !== layer ? [i] : []));
  }

  // ---------------------------------------------------------------- for the chosen token and layer
  get #layer() {
    return element("layers").querySelector("input:checked").value;
  }

  get #shown() {
    return this.#layer === ALL ? this.full : [Number(this.#layer)];
  }

  #redraw() {
    const row = this.rows?.get(this.chosen);
    if (!row || !this.data) return;
    const { tokens } = this.data;
    const shown = this.#shown;
    const counts = new Map();
    for (const layer of shown) {
      for (const position of row.selected[layer] ?? []) counts.set(position, (counts.get(position) ?? 0) + 1);
    }
    this.chips.mark(this.chosen, counts, shown.length);
    element("sample-one").style.setProperty("--level", 1 / shown.length);
    const selections = this.full.map((layer) => [layer, row.selected[layer] ?? []]);
    this.map.draw(selections, tokens.length, this.chosen, new Set(shown));
    this.#describe(counts, shown, (row.selected[shown[0]] ?? []).length);
    element("positions").replaceChildren(...selections.flatMap(([layer, found]) => positionText(layer, found)));
    const experts = this.data.moe_layers.map((layer) => expertRow(layer, row.experts[layer] ?? []));
    element("experts").replaceChildren(...experts);
    this.heat.mark(this.chosen);
    this.#heatTable();
  }

  #describe(counts, shown, each) {
    const { tokens, prompt_tokens: prompt, drafted, rows } = this.data;
    const place = this.chosen;
    const token = tokens[place];
    const kind = place < prompt ? "prompt" : drafted[place - prompt] ? "answer, an accepted draft" : "answer";
    const code = document.createElement("code");
    code.textContent = shownText(token.text).replace(/^ | $/g, "␣");
    element("token-text").replaceChildren(code, ` position ${number(place)} · id ${number(token.id)} · ${kind}`);
    const layers = count(shown.length, "Full layer");
    const every = [...counts.values()].filter((n) => n === shown.length).length;
    let note = `It attended to ${number(counts.size)} of the ${number(place + 1)} positions up to itself.`;
    if (shown.length > 1) {
      note = `Each of ${layers} selected ${number(each)} of ${count(place + 1, "position")}: together ` +
        `${number(counts.size)}, of which ${number(every)} by all.`;
    }
    if (place >= rows) note = "The answer ended with it: the model was never run on it, so it selected nothing.";
    element("token-note").textContent = note;
    element("layer-note").textContent =
      this.#layer === ALL ? "Stronger: more Full layers selected it." : `${this.#reuse(shown[0])}.`;
  }

  #reuse(layer) {
    const shared = this.#shared(layer);
    if (!shared.length) return `Layer ${layer} uses its Selection alone`;
    return `The Selection of layer ${layer} is reused by ${shared.length > 1 ? "layers" : "layer"} ${listed(shared)}`;
  }

  async #layerChanged() {
    this.#redraw();
    await this.#guarded(() => this.#drawHeat());
  }

  async #drawHeat() {
    const { id } = this;
    const shown = this.#shown;
    const bins = HeatMap.bins(this.data.tokens.length);
    const missing = shown.filter((layer) => !this.heats.has(layer));
    const found = await Promise.all(missing.map((layer) => xray(id, `/heat?layer=${layer}&bins=${bins}`)));
    if (this.id !== id) return;
    missing.forEach((layer, i) => this.heats.set(layer, found[i]));
    if (String(shown) !== String(this.#shown)) return; // another layer was chosen meanwhile
    this.heat.draw(shown.map((layer) => this.heats.get(layer)), this.data.tokens);
    const who = this.#layer === ALL ? "all Full layers" : `layer ${this.#layer}`;
    element("heat-note").textContent =
      `A row for each of ${count(this.heat.rows.length, "token")}, a column for each of ${number(bins)} stretches: ` +
      `how much of it ${who} selected. A row chooses its token.`;
    this.heat.mark(this.chosen);
    this.#heatTable();
  }

  #heatTable() {
    if (!this.heat.rows.length) return element("heat-table").replaceChildren();
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["Positions", "Chosen token", "Mean of the answer"]) {
      const header = document.createElement("th");
      header.scope = "col";
      header.textContent = name;
      head.append(header);
    }
    const body = table.createTBody();
    for (const [begin, end, own, mean] of this.heat.stretches(this.chosen)) {
      const line = body.insertRow();
      for (const text of [`${number(begin)}–${number(end)}`, own === null ? "–" : number(own), mean.toFixed(1)]) {
        line.insertCell().textContent = text;
      }
    }
    element("heat-table").replaceChildren(table);
  }

  #step(direction) {
    const found = this.chips.showNext(direction);
    element("xray-status").textContent = found ? "" : "No selected token beyond what is in view.";
  }

  async #guarded(work) {
    try {
      await work();
    } catch (error) {
      if (error.name !== "AbortError") this.#failure(error.message);
    }
  }

  #failure(text) {
    element("xray-failure").hidden = !text;
    element("xray-failure").textContent = text;
  }
}

function layerChoice(value, name, cells, tone) {
  const label = document.createElement("label");
  label.className = `group ${tone}`;
  const input = document.createElement("input");
  input.type = "radio";
  input.name = "layer";
  input.value = value;
  input.ariaLabel = name;
  label.append(input, ...cells);
  return label;
}

function cell(letter, layer, kind) {
  const box = named(`cell ${kind}`, letter);
  const index = document.createElement("small");
  index.textContent = layer;
  box.append(index);
  box.dataset.layer = layer;
  return box;
}

function named(name, text) {
  const box = document.createElement("span");
  box.className = name;
  box.textContent = text;
  return box;
}

function expertRow(layer, experts) {
  const row = document.createElement("li");
  const lane = document.createElement("span");
  lane.className = "lane";
  lane.role = "img";
  lane.ariaLabel = experts.length ? `experts ${listed([...experts].sort((a, b) => a - b))}` : "no expert";
  lane.append(
    ...experts.map((expert) => {
      const filled = named("fired", "");
      filled.dataset.expert = expert;
      filled.style.setProperty("--at", expert);
      return filled;
    }),
  );
  row.dataset.layer = layer;
  row.append(named("layer-name", `${layer}`), lane);
  return row;
}

function positionText(layer, positions) {
  const term = document.createElement("dt");
  const definition = document.createElement("dd");
  term.textContent = `Layer ${layer}`;
  definition.textContent = ranges(positions) || "none";
  return [term, definition];
}

/** Ascending numbers with runs drawn together: 0–12, 40, 51–60. */
function ranges(positions) {
  const runs = [];
  for (const position of positions) {
    if (runs.at(-1)?.[1] === position - 1) runs.at(-1)[1] = position;
    else runs.push([position, position]);
  }
  return runs.map(([begin, end]) => (begin === end ? `${begin}` : `${begin}–${end}`)).join(", ");
}

function listed(numbers) {
  return numbers.length < 2 ? `${numbers}` : `${numbers.slice(0, -1).join(", ")} and ${numbers.at(-1)}`;
}
