// Requests to the server. Answers are shared by address and kept; a request is aborted when no view waits for it.

const KEPT = 60;
const answers = new Map();

export function url(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (Array.isArray(value)) value.forEach((item) => query.append(name, item));
    else if (value !== "" && value !== null && value !== undefined) query.set(name, value);
  }
  const text = query.toString();
  return `/api/${path}${text && `?${text}`}`;
}

async function ask(address, signal) {
  let response;
  try {
    response = await fetch(address, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `eaft view` still running?");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new Error(answer?.error ?? `The server answered ${response.status} ${response.statusText}.`);
  return answer;
}

export function get(address, signal) {
  let request = answers.get(address);
  if (!request) {
    const controller = new AbortController();
    request = { controller, users: 0, done: false, promise: ask(address, controller.signal) };
    answers.set(address, request);
    request.promise.then(
      () => (request.done = true),
      () => answers.get(address) === request && answers.delete(address),
    );
    if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  }
  request.users += 1;
  signal?.addEventListener("abort", () => {
    request.users -= 1;
    if (request.users > 0 || request.done) return;
    answers.delete(address);
    request.controller.abort();
  });
  return request.promise;
}
