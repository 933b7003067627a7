// A tool the model may call: + - * / and brackets over decimals, parsed by descent and never evaluated as code.
//
//   sum     = product (("+" | "-") product)*
//   product = factor (("*" | "/") factor)*
//   factor  = ("+" | "-") factor | "(" sum ")" | number

const LONGEST = 1000; // characters; also bounds how deep brackets and signs nest
const TOKEN = /\s*(?:((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|([-+*/()]))/y;

export const CALCULATOR = {
  type: "function",
  function: {
    name: "calculator",
    description: "Calculates an arithmetic expression of decimals, + - * / and brackets.",
    parameters: {
      type: "object",
      properties: { expression: { type: "string", description: "for example 12.5 * (3 + 4)" } },
      required: ["expression"],
    },
  },
};

/** The result of a tool call as the text that goes back to the model; a mistake becomes a sentence. */
export function answer(call) {
  if (call.function.name !== "calculator") return `Error: there is no tool ${call.function.name}; expected calculator.`;
  const expression = expressionOf(call);
  if (expression === null) return "Error: arguments hold no string named expression.";
  try {
    return written(calculate(expression));
  } catch (error) {
    return `Error: ${error.message}`;
  }
}

/** The expression of a call, or null where its arguments hold none. */
export function expressionOf(call) {
  try {
    const { expression } = JSON.parse(call.function.arguments);
    return typeof expression === "string" ? expression : null;
  } catch {
    return null;
  }
}

export function calculate(expression) {
  if (expression.length > LONGEST) throw new Error(`the expression is longer than ${LONGEST} characters.`);
  const tokens = tokensOf(expression.replaceAll("×", "*").replaceAll("÷", "/").replaceAll("−", "-"));
  let at = 0;

  const wrong = () => new Error(at < tokens.length ? `unexpected ${tokens[at]}.` : "the expression ends too early.");
  const factor = () => {
    const token = tokens[at];
    if (token === "+" || token === "-") {
      at += 1;
      return token === "-" ? -factor() : factor();
    }
    if (token === "(") {
      at += 1;
      const value = sum();
      if (tokens[at] !== ")") throw wrong();
      at += 1;
      return value;
    }
    if (typeof token !== "number") throw wrong();
    at += 1;
    return token;
  };
  const product = () => {
    let value = factor();
    while (tokens[at] === "*" || tokens[at] === "/") {
      const divide = tokens[at] === "/";
      at += 1;
      const right = factor();
      if (divide && right === 0) throw new Error("division by zero.");
      value = divide ? value / right : value * right;
    }
    return value;
  };
  const sum = () => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") {
      const minus = tokens[at] === "-";
      at += 1;
      const right = product();
      value = minus ? value - right : value + right;
    }
    return value;
  };

  const value = sum();
  if (at < tokens.length) throw wrong();
  if (!Number.isFinite(value)) throw new Error("the result is too large.");
  return value;
}

function tokensOf(text) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  let end = 0;
  for (let found; (found = TOKEN.exec(text)); end = TOKEN.lastIndex) {
    tokens.push(found[1] === undefined ? found[2] : Number(found[1]));
  }
  const rest = text.slice(end).trim();
  if (rest) throw new Error(`${JSON.stringify([...rest][0])} is neither a number nor one of + - * / ( ).`);
  return tokens;
}

/** Fifteen digits are what a double holds: 0.1 + 0.2 reads 0.3. */
function written(value) {
  return String(Number.isSafeInteger(value) ? value + 0 : Number(value.toPrecision(15)));
}
