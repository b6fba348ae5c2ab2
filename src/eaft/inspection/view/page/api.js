// Requests to the server: one answer an address, shared and kept; what nobody waits for any longer is aborted.

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
  let found = answers.get(address);
  if (!found) {
    const controller = new AbortController();
    found = { controller, users: 0, done: false, promise: ask(address, controller.signal) };
    answers.set(address, found);
    found.promise.then(
      () => (found.done = true),
      () => answers.get(address) === found && answers.delete(address),
    );
    if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  }
  found.users += 1;
  signal?.addEventListener("abort", () => {
    found.users -= 1;
    if (found.users > 0 || found.done) return;
    answers.delete(address);
    found.controller.abort();
  });
  return found.promise;
}
