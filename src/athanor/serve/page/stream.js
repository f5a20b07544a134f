// The server's dialect: JSON requests, errors, server-sent events.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = null;
try { key = sessionStorage.getItem("athanor.key"); } catch { /* storage is blocked: it is asked for again */ }

export function setKey(value) {
  key = value;
  try { sessionStorage.setItem("athanor.key", value); } catch { /* for this page only, then */ }
}

export function hasKey() { return key !== null; }

// The response, once it is a good one. Raises ServerError, with what the server says, or TypeError when none is reached.
export async function request(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* not from our server: the status has to do */ }
  throw new ServerError(message, response.status);
}

// The data of each event.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (let line of lines) {
      line = line.replace(/\r$/, "");
      if (line.startsWith("data:")) {
        data.push(line.slice(5).replace(/^ /, ""));
      } else if (!line && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

// Ask for an answer and call `heard(content, reasoning)` for each piece. Returns {finish, tokens}; finish is null when it broke off.
export async function complete(body, signal, opened, heard) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", asked, signal);
  opened(response.headers.get("x-request-id"));
  let finish = null, tokens = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") return { finish, tokens };
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, 500);
    tokens = event.usage?.completion_tokens ?? tokens;
    for (const { delta, finish_reason } of event.choices) {
      finish = finish_reason ?? finish;
      const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
      if (delta.content || reasoning) heard(delta.content ?? "", reasoning);
    }
  }
  return { finish: null, tokens };
}
