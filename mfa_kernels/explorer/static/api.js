/** Requests to the server of this page. Errors carry the server's own sentence. */

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  let sentence = "";
  try {
    sentence = (await response.json()).error;
  } catch {
    // No JSON: something else than our server answered.
  }
  throw new ApiError(sentence || `The server answered with an error (${response.status}).`, response.status);
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** GET, with those of `query` that are not null, undefined or "". */
export async function get(path, query = {}, signal = undefined) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString();
  return (await request(text ? `${path}?${text}` : path, { signal })).json();
}

export async function post(path, body, signal) {
  return (await request(path, asJson(body, signal))).json();
}

/** POST whose answer is a stream of lines of JSON, each given as soon as it has come. */
export async function* postLines(path, body, signal) {
  const response = await request(path, asJson(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.trim()) yield JSON.parse(line);
      if (done) return;
    }
  } finally {
    // Leaving the loop early tells the server that nobody reads any more.
    reader.cancel().catch(() => {});
  }
}

export const regionPath = (component) => `/api/regions/${encodeURIComponent(component)}`;
