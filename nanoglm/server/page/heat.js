// Two pictures of where in the context Selections lie. A canvas has one pixel a cell and is stretched by the style.

import { shownText } from "./chips.js";

const BINS = 64;
const WIDEST = 1024; // columns of the map
const COARSE = 8; // stretches of the table

/** For one token: a row per Full layer, a column per position or few. */
export class SelectionMap {
  constructor(canvas, names, cursor, show) {
    Object.assign(this, { canvas, names, cursor });
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      show(Math.min(this.length - 1, Math.floor(((event.clientX - box.left) / box.width) * this.length)));
    });
  }

  /** @param rows [layer, positions]; own: the token's position; bright: layers that are shown, others are drawn pale */
  draw(rows, length, own, bright) {
    this.length = length;
    this.cursor.style.left = `${(100 * (own + 0.5)) / length}%`;
    const width = Math.min(length, WIDEST);
    const cells = rows.map(([layer, positions]) => {
      const row = new Float32Array(width);
      for (const position of positions) row[Math.floor((position * width) / length)] = bright.has(layer) ? 1 : 0.3;
      return row;
    });
    paint(this.canvas, cells, 1);
    this.names.replaceChildren(
      ...rows.map(([layer]) => {
        const name = document.createElement("span");
        name.textContent = layer;
        return name;
      }),
    );
    this.canvas.style.setProperty("--rows", rows.length);
    this.names.style.setProperty("--rows", rows.length);
  }
}

/** For all tokens of the answer: a row each, a column per stretch of the context. */
export class HeatMap {
  /** @param root the slider around the canvas; choose: called with a position */
  constructor(root, choose) {
    this.root = root;
    this.choose = choose;
    this.canvas = root.querySelector("canvas");
    this.cursor = root.querySelector(".heat-row");
    this.clear();
    this.canvas.addEventListener("click", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.#go(Math.floor(((event.clientY - box.top) / box.height) * this.rows.length));
    });
    root.addEventListener("keydown", (event) => this.#key(event));
  }

  clear() {
    this.rows = [];
    this.counts = [];
    this.root.hidden = true;
  }

  static bins(length) {
    return Math.min(BINS, length);
  }

  /** @param heats answers of /xray/ID/heat, whose counts are added up */
  draw(heats, tokens) {
    this.tokens = tokens;
    this.rows = heats[0].rows;
    this.counts = this.rows.map((_, row) => heats[0].counts[row].map((_, bin) => total(heats, row, bin)));
    paint(this.canvas, this.counts, this.counts.flat().reduce((a, b) => Math.max(a, b), 1));
    this.canvas.style.setProperty("--rows", this.rows.length);
    this.root.hidden = !this.rows.length;
    this.root.ariaValueMin = this.rows[0];
    this.root.ariaValueMax = this.rows.at(-1);
  }

  mark(position) {
    const row = this.rows.indexOf(position);
    this.cursor.hidden = row < 0;
    const at = row < 0 ? 0 : row;
    if (!this.rows.length) return;
    this.root.ariaValueNow = this.rows[at];
    this.root.ariaValueText =
      row < 0 ? "no token of the answer is chosen" : `position ${position}, ${this.#text(position)}`;
    if (row < 0) return;
    const height = this.canvas.clientHeight / this.rows.length;
    this.cursor.style.top = `${row * height}px`;
    this.cursor.style.height = `${Math.max(height, 3)}px`;
    const middle = row * height - this.root.clientHeight / 2;
    if (Math.abs(middle - this.root.scrollTop) > this.root.clientHeight / 2) this.root.scrollTop = middle;
  }

  /** [first position, last, count of the token or null, mean of all tokens] for each of a few stretches. */
  stretches(position) {
    const bins = this.counts[0]?.length ?? 0;
    const row = this.counts[this.rows.indexOf(position)];
    const parts = Math.min(COARSE, bins);
    return Array.from({ length: parts }, (_, part) => {
      const [begin, end] = [part, part + 1].map((edge) => Math.floor((edge * bins) / parts));
      const sum = (counts) => counts.slice(begin, end).reduce((a, b) => a + b, 0);
      const mean = this.counts.reduce((all, counts) => all + sum(counts), 0) / this.counts.length;
      const edges = [begin, end].map((bin) => Math.ceil((bin * this.tokens.length) / bins));
      return [edges[0], edges[1] - 1, row ? sum(row) : null, mean];
    });
  }

  #text(position) {
    return shownText(this.tokens[position].text).trim() || "space";
  }

  #go(row) {
    if (row >= 0 && row < this.rows.length) this.choose(this.rows[row]);
  }

  #key(event) {
    const now = this.rows.indexOf(Number(this.root.ariaValueNow));
    const last = this.rows.length - 1;
    const goes = {
      ArrowUp: now - 1, ArrowLeft: now - 1, ArrowDown: now + 1, ArrowRight: now + 1,
      PageUp: Math.max(0, now - 10), PageDown: Math.min(last, now + 10), Home: 0, End: last,
    };
    if (!(event.key in goes)) return;
    event.preventDefault();
    this.#go(goes[event.key]);
  }
}

function total(heats, row, bin) {
  return heats.reduce((sum, heat) => sum + heat.counts[row][bin], 0);
}

/** Fills a canvas with the colour the style gives it, as opaque as a cell is large. */
function paint(canvas, cells, most) {
  canvas.width = cells[0]?.length ?? 1;
  canvas.height = Math.max(1, cells.length);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const [red, green, blue] = getComputedStyle(canvas).color.match(/\d+/g).map(Number);
  cells.forEach((row, y) => {
    row.forEach((value, x) => {
      const opacity = 255 * Math.sqrt(value / most); // the square root lifts what is seldom
      image.data.set([red, green, blue, opacity], 4 * (y * canvas.width + x));
    });
  });
  context.putImageData(image, 0, 0);
}
