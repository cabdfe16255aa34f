// What is asked of the admin port: each address once at a time, with the tag of what is known, and the token where one
// is needed. What is the same as before is told apart from what is new, so that nothing is drawn twice.

const TOKEN = "metering-sidecar-token";
const LIMIT_MS = 30000;

export class Asking {
  #known = new Map(); // address -> {tag, value}
  #asked = new Map(); // address -> what several parts wait for at this moment

  get token() { return sessionStorage.getItem(TOKEN); }

  set token(value) {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
    this.#known.clear();
  }

  // -> {value, fresh}; `fresh` is false where it is what the same address said last. Raises `Refused`, or what `fetch`
  // raises where nobody answers.
  ask(address, {also = []} = {}) {
    if (!this.#asked.has(address)) {
      this.#asked.set(address, this.#ask(address, also).finally(() => this.#asked.delete(address)));
    }
    return this.#asked.get(address);
  }

  async #ask(address, also) {
    const known = this.#known.get(address);
    const headers = {Accept: "application/json"};
    if (known?.tag) headers["If-None-Match"] = known.tag;
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    const answer = await fetch(address, {
      headers, cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(LIMIT_MS),
    });
    if (answer.status === 304 && known) return {value: known.value, fresh: false};
    const body = await answer.text();
    if (!answer.ok && !also.includes(answer.status)) throw new Refused(answer.status, body);
    if (known && known.body === body) return {value: known.value, fresh: false};
    const value = JSON.parse(body);
    this.#known.delete(address);
    this.#known.set(address, {tag: answer.headers.get("ETag"), body, value});
    if (this.#known.size > 50) this.#known.delete(this.#known.keys().next().value);
    return {value, fresh: true};
  }
}

export class Refused extends Error {
  constructor(status, body) {
    let said = body.slice(0, 500);
    try { said = JSON.parse(body).error ?? said; } catch { /* no JSON: as it is */ }
    super(said || `status ${status}`);
    this.status = status;
  }
}
