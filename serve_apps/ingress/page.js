"use strict";
const at = id => document.getElementById(id);
const VARIANTS = [["drafted", "Drafting", true], ["plain-mode", "Plain autoregressive", false]];
const MEANING = {
  draft: "an accepted draft", bonus: "follows drafts that were all accepted",
  correction: "replaces the first rejected draft", plain: "no draft was verified",
};
const ESCAPES = {n: "\n", r: "\r", t: "\t", "\\": "\\"};
const SHORTEST_MS = 300;  // the network decides how fast a shorter text seems
const turns = [];
let running = null, card = null, readTemplateOf = "", drafts = true, follows = true, height = 0, scrolling = false;

/** A text while it arrives: its characters (code points, as the server counts), its tokens, the number of them that
    are complete on the page, their times, and the article that shows it. */
function openRun(place, [name, title]) {
  const article = at("run").content.cloneNode(true).firstElementChild;
  article.classList.add(name);
  article.querySelector("h3").textContent = drafts ? title : "Autoregressive";
  place.append(article);
  return {
    article, chars: [], offsets: [], origins: [], ids: [], spans: [], complete: 0, notes: [],
    forwards: 0, sent: 0, first: 0, firstTokens: 0, last: 0, done: false, fingerprint: "",
  };
}

const part = (run, name) => run.article.querySelector("." + name);

/** Add one event's text and tokens to a run, and show them. */
function receive(run, {text, delta, decoding, token_ids, finish_reason, stop_reason}) {
  if (finish_reason === "length") run.notes.push("ended at max tokens");
  if (typeof stop_reason === "string") run.notes.push("ended at stop string " + JSON.stringify(stop_reason));
  if (!decoding) return;  // the event of a role
  const {forward, origin, text_offset} = decoding;
  if (origin.length) {
    run.last = performance.now();
    run.forwards = forward.at(-1) + 1;
    if (!run.first) [run.first, run.firstTokens] = [run.last, origin.length];
  }
  for (const char of text ?? delta.content ?? "") run.chars.push(char);
  run.offsets.push(...text_offset);
  run.origins.push(...origin);
  run.ids.push(...token_ids);
  for (let i = run.complete; i < run.origins.length; i++) {  // a token's text may come later than the token
    if (!run.spans[i]) {
      const span = document.createElement("span");
      span.className = run.origins[i];
      span.title = MEANING[run.origins[i]];
      part(run, "text").append(run.spans[i] = span);
    }
    const end = run.offsets[i + 1] ?? Infinity;
    const shown = run.spans[i].textContent = run.chars.slice(run.offsets[i], end).join("");
    run.spans[i].toggleAttribute("data-line-end", /^\n+$/.test(shown));
    if (end <= run.chars.length) run.complete = i + 1;
  }
  showFigures(run);
  follow();
}

function showFigures(run) {
  const tokens = run.ids.length, seconds = (run.last - run.first) / 1000;
  if (!tokens) return;
  part(run, "tokens").textContent = tokens;
  part(run, "per_forward").textContent = (tokens / run.forwards).toFixed(2);
  part(run, "first_ms").textContent = Math.round(run.first - run.sent);
  if (seconds > 0) part(run, "per_second").textContent = ((tokens - run.firstTokens) / seconds).toFixed(1);
}

const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 60;

/** Keep the end of a conversation in view, unless the reader has scrolled away from it. */
function follow() {
  if (at("chat").hidden || scrolling) return;
  scrolling = true;
  requestAnimationFrame(() => {
    scrolling = false;
    if (follows) scrollTo(0, document.documentElement.scrollHeight);
  });
}

/** The data of server-sent events, as they arrive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const {value, done} = await reader.read().catch(broken);
    if (done) return;
    const lines = (buffered + value).split("\n\n");
    buffered = lines.pop();
    for (const line of lines) yield line.replace(/^data: /, "");
  }
}

function broken(error) {
  throw error.name === "AbortError" ? error : new Error(`the connection to the server broke (${error.message})`);
}

/** The header of the API key; a header holds bytes, and a key is UTF-8. */
function headers() {
  const key = String.fromCharCode(...new TextEncoder().encode(at("key").value));
  return key ? {Authorization: "Bearer " + key} : {};
}

/** The response to a request, or an Error with the server's message. */
async function request(path, options) {
  const response = await fetch(path, {...options, headers: {...options.headers, ...headers()}}).catch(broken);
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(`${response.status}: ${body?.error?.message ?? response.statusText}`);
}

async function stream(run, path, body, signal) {
  run.sent = performance.now();
  const response = await request(path, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") { run.done = true; break; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    run.fingerprint = chunk.system_fingerprint;
    for (const choice of chunk.choices) receive(run, choice);
    const verified = chunk.metrics?.speculative_decoding;
    if (verified) run.notes.unshift(verified.num_spec_steps
      ? `${verified.num_accepted_draft_tokens} of ${verified.num_draft_tokens} drafts accepted in ${verified.num_spec_steps} verifications`
      : "no drafts");
    part(run, "mode").textContent = run.notes.join(" · ");
  }
  if (!run.done) throw new Error("the server ended the stream before the end of the text");
}

function equality(a, b) {
  if (a.fingerprint !== b.fingerprint) return ["other", "The served model changed between the two texts."];
  const length = Math.max(a.ids.length, b.ids.length);
  const place = Array.from({length}, (_, i) => a.ids[i] === b.ids[i]).indexOf(false);
  if (place >= 0) return ["other", `The texts differ from token ${place + 1} on.`];
  const [fast, plain] = [a, b].map(run => Number(part(run, "per_second").textContent));
  const measured = [a, b].every(run => run.last - run.first >= SHORTEST_MS);
  const speed = measured ? ` Drafting: ${(fast / plain).toFixed(2)} times the tokens per second.` : "";
  return ["same", `Same text, token for token: ${length} of ${length}.` + speed];
}

/** Fields of a body that chats and completions share. Both texts of a comparison have its seed. */
function sampling() {
  const temperature = Number(at("temperature").value), drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  const seed = at("seed").value !== "" ? Number(at("seed").value) : temperature > 0 ? drawn : null;
  const stop = at("stop").value.split("\n").filter(Boolean).map(line => line.replace(/\\([nrt\\])/g, (_, c) => ESCAPES[c]));
  return {
    max_tokens: Number(at("max_tokens").value), temperature, seed, stop,
    stream: true, stream_options: {include_usage: true}, return_token_ids: true, return_decoding: true,
  };
}

/** Show the text of a request in `place`, and the text without drafts beside it. Returns the first run. */
async function write(place, path, fields, compared) {
  const runs = document.createElement("div"), verdict = document.createElement("p");
  [runs.className, verdict.className] = ["runs", "verdict"];
  place.replaceChildren(runs, verdict);
  running = new AbortController();
  showButtons();
  at("status").textContent = "Writing.";
  const {signal} = running, shown = [openRun(runs, VARIANTS[0])];
  try {
    await connect(signal);
    const body = {model: card.id, ...fields, ...sampling()};
    for (const variant of VARIANTS.slice(0, compared && drafts ? 2 : 1)) {
      if (variant !== VARIANTS[0]) shown.push(openRun(runs, variant));
      const run = shown.at(-1);
      if (body.seed !== null) run.notes.push("seed " + body.seed);
      await stream(run, path, {...body, speculative: variant[2]}, signal);
    }
    if (shown.length === 2) [verdict.className, verdict.textContent] = equality(...shown);
    at("status").textContent = `Done: ${shown[0].ids.length} tokens. ${verdict.textContent}`;
  } catch (error) {
    if (signal.aborted) at("status").textContent = verdict.textContent = "Stopped.";
    else part(shown.at(-1), "problem").textContent = error.message;
  } finally {
    verdict.classList.add("verdict");
    running = null;
    follow();
  }
  return shown[0];
}

/** Read which model is served by now; a chat is offered if the model has a chat template. */
async function connect(signal) {
  ({data: [card]} = await (await request("v1/models", {signal})).json());
  drafts = card.block_len > 1;
  const decoding = drafts ? `${card.block_len} tokens a draft block, mode ${card.mode}` : "one token a forward, no drafts";
  at("model").textContent = `${card.id}, ${decoding}`;
  for (const element of document.querySelectorAll(".needs-drafts")) element.hidden = !drafts;
  if (readTemplateOf === card.bundle_hash) return;
  const info = await request("tokenizer_info", {signal}).then(response => response.json()).catch(() => null);
  if (info) readTemplateOf = card.bundle_hash;
  if (info?.chat_template) offerChat();
}

function offerChat() {
  const tabs = at("chat-tab").parentElement, untouched = at("prompt").value === at("prompt").defaultValue;
  const first = tabs.hidden && untouched && !running && !at("output").hasChildNodes();
  tabs.hidden = false;
  if (!first) return;
  select("chat");
  at("message").focus();
}

function select(name) {
  for (const panel of ["chat", "completion"]) {
    const tab = at(panel + "-tab"), chosen = panel === name;
    at(panel).hidden = !chosen;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
  }
}

function showButtons() {
  for (const button of document.querySelectorAll("form button"))
    button.disabled = button.matches(".halt") ? !running : running || (button.matches(".again") && !turns.length);
  const focused = document.activeElement;
  if (focused.disabled) focused.form.querySelector("button:enabled").focus();
}

/** Turns that have an answer are the conversation; a turn whose answer failed stays on the page and is left out. */
async function answer(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter(each => each.answer !== null);
  const messages = before.flatMap(each => [
    {role: "user", content: each.question}, {role: "assistant", content: each.answer},
  ]);
  if (at("system").value) messages.unshift({role: "system", content: at("system").value});
  messages.push({role: "user", content: turn.question});
  turn.answer = null;
  follows = true;
  const place = turn.item.querySelector(".answer");
  const run = await write(place, "v1/chat/completions", {messages}, at("compare-chat").checked);
  if (run.done || run.chars.length) turn.answer = run.chars.join("");
  else place.querySelector(".verdict").textContent += " Without an answer, this turn is not part of the conversation.";
  showButtons();
}

function addTurn(question) {
  const item = at("turn").content.cloneNode(true).firstElementChild;
  item.querySelector(".question").textContent = question;
  at("turns").append(item);
  turns.push({question, item, answer: null});
  return turns.at(-1);
}

function send(event) {
  event.preventDefault();
  const question = at("message").value;
  if (running || !at("settings").reportValidity()) return;
  at("message").focus();
  if (!question.trim()) return;
  at("message").value = "";
  answer(addTurn(question));
}

function editLast() {
  const {question, item} = turns.pop();
  item.remove();
  at("message").value = [question, at("message").value].filter(Boolean).join("\n");
  at("message").focus();
  showButtons();
}

function newChat() {
  turns.length = 0;
  at("turns").replaceChildren();
  at("message").focus();
  showButtons();
}

function complete(event) {
  event.preventDefault();
  if (running || !at("settings").reportValidity()) return;
  write(at("output"), "v1/completions", {prompt: at("prompt").value}, at("compare").checked).then(showButtons);
}

at("chat-form").addEventListener("submit", send);
at("completion-form").addEventListener("submit", complete);
at("retry").addEventListener("click", () => answer(turns.at(-1)));
at("edit").addEventListener("click", editLast);
at("new").addEventListener("click", newChat);
for (const button of document.querySelectorAll(".halt")) button.addEventListener("click", () => running?.abort());
for (const name of ["chat", "completion"]) {
  const tab = at(name + "-tab"), other = name === "chat" ? "completion" : "chat";
  tab.addEventListener("click", () => select(name));
  tab.addEventListener("keydown", event => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    select(other);
    at(other + "-tab").focus();
  });
}
at("settings").addEventListener("submit", event => {
  event.preventDefault();
  document.querySelector("[role=tabpanel]:not([hidden]) form").requestSubmit();
});
at("settings").addEventListener("invalid", () => at("options").open = true, true);
at("key").addEventListener("change", show);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") running?.abort();
  if (event.key !== "Enter" || event.isComposing) return;
  const sends = event.target === at("message") && !event.shiftKey && !matchMedia("(pointer: coarse)").matches;
  if (!sends && !event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  document.querySelector("[role=tabpanel]:not([hidden]) form").requestSubmit();
});
addEventListener("scroll", () => {  // only a scroll upwards leaves the end; the end itself moves while a text grows
  follows = scrollY >= height ? follows || atEnd() : atEnd();
  height = scrollY;
});

/** Show the model, or why it cannot be read. */
function show() {
  connect().catch(error => at("model").textContent = error.message);
}

at("options").open = innerWidth > 480;
show();
