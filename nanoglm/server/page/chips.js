// The tokens as chips in a list box. Chips lie in blocks of which the browser lays out only those near the view.

const BLOCK = 256; // tokens, at least, up to the end of a line
const LONGEST = 1024;
const PAGE = 50; // tokens that Page Up and Page Down pass over
const EDGE = 12; // pixels kept between the chosen token and the edge
const CONTROL = /^(<\|[^|]+\|>|\[g?s?MASK\]|<\/?(sop|eop|think|tool_call|tool_response|arg_key|arg_value)>|\/nothink)$/;
const SHOWN = new Map([
  ["\n", ["↵", "new line"]],
  [" ", [" ", "space"]],
  ["\t", ["⇥", "tab"]],
  ["\r", ["␍", "carriage return"]],
  ["", ["·", "part of a character"]],
  ["\ufffd", ["·", "part of a character"]],
]);

export class Chips {
  /** @param choose called with the position a reader picks */
  constructor(root, choose) {
    this.root = root;
    this.choose = choose;
    this.chips = [];
    this.hits = [];
    root.addEventListener("click", (event) => {
      const chip = event.target.closest(".chip");
      if (chip) choose(Number(chip.dataset.position));
    });
    root.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param tokens [{id, text}]; prompt: how many are the prompt's; drafted: 0 or 1 per token of the answer */
  fill(tokens, prompt, drafted) {
    this.chosen = -1;
    this.hits = [];
    this.chips = tokens.map((token, position) => {
      const chip = chipOf(token, position);
      if (position >= prompt) chip.classList.add("output");
      if (drafted[position - prompt]) chip.classList.add("drafted");
      return chip;
    });
    this.root.replaceChildren(...blocks(this.chips, tokens));
  }

  /** Marks the chosen token and what it selected: counts maps a position to in how many of `most` layers. */
  mark(position, counts, most) {
    for (const hit of this.hits) this.chips[hit].classList.remove("hit");
    this.hits = [...counts.keys()].sort((a, b) => a - b);
    for (const hit of this.hits) {
      const chip = this.chips[hit];
      chip.classList.add("hit");
      chip.dataset.count = counts.get(hit);
      chip.style.setProperty("--level", counts.get(hit) / most);
    }
    this.#mark(position);
  }

  #mark(position) {
    const before = this.chips[this.chosen];
    const chip = this.chips[position];
    before?.classList.remove("chosen");
    before?.setAttribute("aria-selected", "false");
    chip.classList.add("chosen");
    chip.setAttribute("aria-selected", "true");
    this.root.setAttribute("aria-activedescendant", chip.id);
    const moved = this.chosen !== position;
    this.chosen = position;
    if (moved) this.#reveal(chip);
  }

  /** Scrolls the list box alone: the picture a token was chosen in stays where it is. */
  #reveal(chip, tries = 3) {
    const view = this.root.getBoundingClientRect();
    const box = chip.getBoundingClientRect();
    const by = Math.min(0, box.top - view.top - EDGE) || Math.max(0, box.bottom - view.bottom + EDGE);
    this.root.scrollTop += by;
    // Blocks that were never laid out had an estimated height: once they are drawn, look again.
    if (by && tries) requestAnimationFrame(() => this.chips[this.chosen] === chip && this.#reveal(chip, tries - 1));
  }

  /** Brings a position into view without choosing it. */
  show(position) {
    this.chips[position].scrollIntoView({ block: "center" });
  }

  /** Scrolls to the nearest selected position out of view, upwards (-1) or downwards (1). */
  showNext(direction) {
    const view = this.root.getBoundingClientRect();
    const outside = (hit) => {
      const box = this.chips[hit].getBoundingClientRect();
      return direction > 0 ? box.bottom > view.bottom : box.top < view.top;
    };
    const hit = direction > 0 ? this.hits.find(outside) : this.hits.findLast(outside);
    if (hit !== undefined) this.show(hit);
    return hit !== undefined;
  }

  #key(event) {
    const last = this.chips.length - 1;
    const goes = {
      ArrowLeft: () => this.chosen - 1,
      ArrowRight: () => this.chosen + 1,
      ArrowUp: () => this.#line(-1),
      ArrowDown: () => this.#line(1),
      PageUp: () => Math.max(0, this.chosen - PAGE),
      PageDown: () => Math.min(last, this.chosen + PAGE),
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (!goes || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const position = goes();
    if (position >= 0 && position <= last) this.choose(position);
  }

  /** The token above or below the chosen one, by where they are drawn. */
  #line(direction) {
    const from = this.chips[this.chosen].getBoundingClientRect();
    const middle = (from.left + from.right) / 2;
    let best = this.chosen;
    let top = null;
    for (let at = this.chosen + direction; at >= 0 && at < this.chips.length; at += direction) {
      const box = this.chips[at].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (top !== null && Math.abs(box.top - top) > from.height / 2) break; // a second line away
      top ??= box.top;
      best = at;
      if (direction > 0 ? box.right >= middle : box.left <= middle) break;
    }
    return best;
  }
}

/** Token text as it is shown, with what cannot be seen written as a sign. */
export function shownText(text) {
  return SHOWN.get(text)?.[0] ?? text.replaceAll("\n", "↵");
}

function chipOf(token, position) {
  const chip = document.createElement("span");
  chip.className = "chip";
  chip.id = `token-${position}`;
  chip.role = "option";
  chip.ariaSelected = "false";
  chip.dataset.position = position;
  chip.textContent = shownText(token.text);
  const name = SHOWN.get(token.text)?.[1];
  if (name) chip.ariaLabel = name;
  if (CONTROL.test(token.text)) chip.classList.add("control");
  else if (name && token.text !== " ") chip.classList.add("sign");
  return chip;
}

/** Chips in blocks; those of one word stay on one line. */
function blocks(chips, tokens) {
  const all = [];
  let block = null;
  let word = null;
  let filled = 0;
  chips.forEach((chip, position) => {
    const { text } = tokens[position];
    const breaks = text.endsWith("\n");
    if (!block) {
      block = newBlock();
      all.push(block);
      word = null;
      filled = 0;
    }
    if (CONTROL.test(text) || (/^\s/.test(text) && !breaks)) word = null;
    if (CONTROL.test(text) || (!text.trim() && !breaks)) {
      block.append(chip);
    } else {
      if (!word) {
        word = document.createElement("span");
        word.className = "word";
        block.append(word);
      }
      word.append(chip);
      if (/\s$/.test(text)) word = null;
    }
    filled += 1;
    block.ariaLabel = `up to position ${position}`;
    if (breaks) block.append(document.createElement("br"));
    if ((breaks && filled >= BLOCK) || filled >= LONGEST) block = null;
  });
  return all;
}

function newBlock() {
  const block = document.createElement("div");
  block.className = "block";
  block.role = "group";
  return block;
}
