// The server's endpoints, of the same origin only. Every failure is a ServerError whose message is one sentence.

import { read, write } from "./keep.js";

const KEY = "nanoglm.key";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  write("sessionStorage", KEY, key);
}

/** The name of the first model served. */
export async function modelName() {
  const response = await request("v1/models");
  return (await response.json()).data[0].id;
}

/** What the server recorded of a finished answer; `path` goes on behind its id. */
export async function xray(id, path = "", signal = undefined) {
  const response = await request(`xray/${encodeURIComponent(id)}${path}`, { signal });
  return response.json();
}

/** Sends a chat completion and yields the stream's chunks as they come. */
export async function* completion(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message));
    yield chunk;
  }
  throw new ServerError("The server broke the answer off.");
}

async function request(path, options = {}) {
  const key = read("sessionStorage", KEY, "");
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const failure = await response.json().catch(() => null);
  throw new ServerError(sentence(failure?.error?.message ?? `The server answered ${response.status}`), response.status);
}

/** The data of server-sent events: lines "data: ..." up to an empty line. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        if (line !== "" || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent what is no JSON.");
  }
}

function sentence(text) {
  const trimmed = String(text).trim();
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}
