// The server's two routes, and its errors in words that say what to do.

import { t } from "/strings.js";

/** What went wrong, for people; `status` is 0 without an answer. */
export class ApiError extends Error {
  constructor(message, { status = 0, advice = "" } = {}) {
    super(message);
    this.status = status;
    this.advice = advice;
  }
}

function advice(status, error, retryAfter) {
  if (status === 429) return t("busy", retryAfter || 5);
  if (status === 503) return t("stopping");
  if (status === 413) return t("large");
  if (error?.code === "context_length_exceeded") return t("full");
  return "";
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError(t("offline"));
  }
  if (response.ok) return response;
  const { error } = (await response.json().catch(() => null)) ?? {};
  throw new ApiError(error?.message || `${response.status} ${response.statusText}`, {
    status: response.status,
    advice: advice(response.status, error, response.headers.get("retry-after")),
  });
}

/** The model that is served: its id and the object `qvl` that describes it. */
export async function servedModel(key) {
  const response = await call("/v1/models", key);
  const model = (await response.json().catch(() => null))?.data?.[0];
  if (!model) throw new ApiError(t("badAnswer"), { status: response.status });
  return { id: model.id, title: model.id, chat: true, pictures: true, window: 0, device: "", ...model.qvl };
}

/** The chunks of an answer, in order. Ends at [DONE]; throws an ApiError, or an AbortError after `signal`. */
export async function* answer(request, key, signal) {
  const response = await call("/v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError(t("badAnswer"));
    }
    if (chunk.error) throw new ApiError(chunk.error.message || t("broken"), { advice: advice(0, chunk.error) });
    yield chunk;
  }
  throw new ApiError(t("broken"));
}

/** The data of server-sent events; comments (pings) and other fields are left out. */
async function* events(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (problem) {
    if (signal.aborted || problem instanceof ApiError) throw problem;
    throw new ApiError(t("broken"));
  } finally {
    reader.cancel().catch(() => {});
  }
}
