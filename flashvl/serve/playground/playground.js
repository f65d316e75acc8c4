"use strict";

const MODEL = document.body.dataset.model;
const MAX_SIDE = 4096;
const QUESTIONS = ["Describe the image."];
const at = (id) => document.getElementById(id);

let picture = null;       // data URL of the picture that is shown
let frame = [0, 0];       // width and height of what the tiles add around the picture, in its pixels
let turns = [];           // messages so far, without the picture
let running = null;       // AbortController of the answer that is being streamed
let heldBack = null;      // function to call again once there is an API key
let choices = 0;          // pictures chosen so far; what was begun for an earlier one is dropped

// The service

class Refusal extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function call(path, body, signal) {
  const key = at("key").value.trim();
  const headers = {...(body && {"Content-Type": "application/json"}), ...(key && {Authorization: `Bearer ${key}`})};
  const answer = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal});
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refusal(told?.error?.message ?? `${answer.status} ${answer.statusText}`, answer.status);
}

function askForKey(again) {
  heldBack = again;
  at("key-label").textContent = at("key").value.trim() && again ? "The service does not take this key; enter another one" : "This service asks for an API key";
  at("key-form").hidden = false;
  at("key").focus();
  at("key").select();
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).replace(/^data: /, "");
      text = text.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function watchQueue() {
  if (document.hidden) return;
  const queue = at("queue");
  let told = "not reachable", state = "away";
  try {
    const load = await (await fetch("/readyz")).json();
    if (load.status !== "ready") told = "not ready";
    else {
      told = load.running || load.waiting ? `${load.running} running, ${load.waiting} waiting` : "ready";
      state = "ready";
    }
  } catch { /* told and state say it already */ }
  if (queue.textContent !== told) queue.textContent = told;
  queue.className = state;
}

// The picture

async function take(file, questions = QUESTIONS) {
  stopCamera();
  if (!file) return;
  const choice = ++choices;
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => done("");
    reader.readAsDataURL(file);
  });
  if (choice === choices) await show(url, questions, file.name);
}

async function show(url, questions, name = "") {
  removePicture();
  const image = at("image"), choice = choices;
  image.src = url;
  try { await image.decode(); } catch {
    if (choice !== choices) return;
    removePicture();
    at("picture-error").textContent = `${name || "This file"} is no picture that this browser can show.`;
    at("picture-error").hidden = false;
    at("picture-error").scrollIntoView({block: "nearest"});
    return;
  }
  if (choice !== choices) return;
  picture = url;
  at("empty").hidden = true;
  at("shown").hidden = false;
  fit();
  suggest(questions);
  await drawTiles();
}

function fit() {
  // As large as fits, together with what the tiles add around it; small pictures are enlarged too.
  const {naturalWidth: width, naturalHeight: height, style} = at("image");
  const share = matchMedia("(max-width: 52rem)").matches ? .34 : .55;
  const scale = Math.min(at("shown").clientWidth / (width + 2 * frame[0]), innerHeight * share / (height + 2 * frame[1]));
  style.width = `${Math.round(width * scale)}px`;
  at("picture").style.margin = `${frame[1] * scale}px auto`;
}

function removePicture() {
  choices += 1;
  picture = null;
  frame = [0, 0];
  clear();
  at("image").removeAttribute("src");
  at("tiles").replaceChildren();
  at("shown").hidden = true;
  at("empty").hidden = false;
  at("picture-error").hidden = true;
  at("file").value = "";
  suggest([]);
}

function suggest(questions) {
  at("chips").replaceChildren(...questions.map((question) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = question;
    chip.addEventListener("click", () => ask(question));
    return chip;
  }));
}

function draw(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

async function drawTiles() {
  const {naturalWidth: width, naturalHeight: height} = at("image"), choice = choices;
  let told;
  try { told = await (await call("/v1/tiles", {width, height})).json(); } catch (error) {
    if (choice !== choices) return;
    if (error.status === 401) askForKey(drawTiles);
    at("cut").textContent = error.status === 401 ? "" : error.message;
    at("legend").hidden = true;
    return;
  }
  if (choice !== choices) return;
  const count = told.grid[0] * told.grid[1];
  const hasOverview = told.num_tiles > count;
  const views = hasOverview ? told.views.slice(1) : told.views;
  const tiles = views.flatMap((view) => view.boxes.map((box) => place(view, box, told)));
  const isTwice = told.mode === "overlap" && count > 1;
  const svg = at("tiles");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(...tiles.map((tile, index) => drawTile(tile, index, isTwice)));
  frame = [Math.max(0, ...tiles.map((tile) => -tile.all.x)), Math.max(0, ...tiles.map((tile) => -tile.all.y))];
  fit();
  chooseTile(svg.firstElementChild);
  at("legend").hidden = false;
  at("legend-dropped").hidden = !told.dropped_patches;
  at("legend-twice").hidden = !isTwice;
  const overview = hasOverview ? " with the overview" : "";
  const plural = told.num_tiles === 1 ? "tile" : "tiles";
  at("cut").textContent = `${width} × ${height} pixels, ${told.num_tiles} ${plural}${overview} (${told.mode}), ${told.num_image_tokens} tokens`;
  svg.setAttribute("aria-label", at("cut").textContent);
}

function place(view, [l, t, r, b], {dropped_patches, patch_size}) {
  // From the resized and framed view to the picture's own pixels.
  const [left, top, right, bottom] = view.source;
  const x = (right - left) / view.resized[0], y = (bottom - top) / view.resized[1];
  const box = (inset) => ({
    x: left + (l + inset - view.frame) * x, y: top + (t + inset - view.frame) * y,
    width: (r - l - 2 * inset) * x, height: (b - t - 2 * inset) * y,
  });
  return {all: box(0), kept: box(dropped_patches * patch_size), patch: [patch_size * x, patch_size * y]};
}

function drawTile({all, kept, patch}, index, isTwice) {
  const hue = (index * 67 + 215) % 360, color = `hsl(${hue} 90% 55%)`;
  const hatch = `hatch-${index}`, grid = `grid-${index}`, mask = `mask-${index}`;
  const step = Math.max(...patch) / 3;
  const line = {stroke: color, fill: "none", "vector-effect": "non-scaling-stroke"};
  const outline = {...line, "stroke-width": 2.5, fill: color, "fill-opacity": isTwice ? .22 : 0};
  const inner = draw("g", {class: "inner"},
    draw("rect", {...all, fill: `url(#${hatch})`, mask: `url(#${mask})`}),
    draw("rect", {...all, ...line, "stroke-width": 1.5, "stroke-dasharray": "5 4"}),
    draw("rect", {...kept, fill: `url(#${grid})`}));
  return draw("g", {},
    draw("defs", {},
      draw("pattern", {id: hatch, patternUnits: "userSpaceOnUse", width: step, height: step, patternTransform: "rotate(45)"},
        draw("rect", {width: step, height: step, fill: "rgb(0 0 0 / .35)"}),
        draw("rect", {width: step / 6, height: step, fill: "rgb(255 255 255 / .75)"})),
      draw("pattern", {id: grid, patternUnits: "userSpaceOnUse", x: kept.x, y: kept.y, width: patch[0], height: patch[1]},
        draw("rect", {width: patch[0], height: patch[1], fill: "none", stroke: color, "stroke-opacity": .7, "stroke-width": 1, "vector-effect": "non-scaling-stroke"})),
      draw("mask", {id: mask}, draw("rect", {...all, fill: "white"}), draw("rect", {...kept, fill: "black"}))),
    draw("rect", {...kept, ...outline, class: "kept"}), inner);
}

function chooseTile(chosen) {
  for (const tile of at("tiles").children) tile.querySelector(".inner").style.display = tile === chosen ? "" : "none";
  if (chosen) at("tiles").append(chosen);  // above the others
}

async function useCamera() {
  stopCamera();
  const choice = ++choices;
  let stream;
  try { stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}}); }
  catch (error) { if (choice === choices) say("error", `No camera: ${error.message}`); return; }
  if (choice !== choices) { stop(stream); return; }
  removePicture();
  at("empty").hidden = true;
  at("camera-view").hidden = false;
  at("video").srcObject = stream;  // starts to play, and then fires loadeddata
}

function stop(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

function shoot() {
  const video = at("video"), canvas = document.createElement("canvas");
  const scale = Math.min(1, MAX_SIDE / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = video.videoWidth * scale;
  canvas.height = video.videoHeight * scale;
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  stopCamera();
  show(canvas.toDataURL("image/jpeg", 0.92), QUESTIONS);
}

function stopCamera() {
  choices += 1;
  stop(at("video").srcObject);
  at("video").srcObject = null;
  at("shoot").disabled = true;
  if (!at("camera-view").hidden) at("empty").hidden = false;
  at("camera-view").hidden = true;
}

// The conversation

function scroller() {
  return getComputedStyle(at("log")).overflowY === "auto" ? at("log") : document.querySelector("main");
}

function say(kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  if (kind === "error") turn.setAttribute("role", "alert");
  turn.textContent = text;
  at("log").append(turn);
  scroller().scrollTop = scroller().scrollHeight;
  return turn;
}

function clear() {
  running?.abort();
  turns = [];
  at("log").replaceChildren();
}

function request(question, options) {
  const messages = question ? [...turns, {role: "user", content: question}] : turns.slice(0, turns.findLastIndex((turn) => turn.role === "user") + 1);
  if (messages.length && picture) {
    const parts = [{type: "image_url", image_url: {url: picture}}, {type: "text", text: messages[0].content}];
    messages[0] = {role: "user", content: parts};
  }
  return {model: MODEL, messages, ...options};
}

async function ask(question) {
  if (!question || running) return;
  const mine = say("user", question);
  const answer = document.createElement("div"), shown = document.createElement("div");
  answer.className = "answer";
  shown.className = "turn assistant";
  shown.setAttribute("aria-busy", "true");
  answer.append(shown);
  at("log").append(answer);
  scroller().scrollTop = scroller().scrollHeight;
  if (at("question").value.trim() === question) setQuestion("");
  const body = request(question, {stream: true, stream_options: {include_usage: true}, include_timing: true});
  const control = running = new AbortController();
  showRunning();
  let text = "";
  try {
    for await (const event of events(await call("/v1/chat/completions", body, control.signal))) {
      if (event.error) throw new Error(event.error.message);
      const box = scroller(), isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
      for (const choice of event.choices) text += choice.delta.content ?? "";
      shown.textContent = text;
      if (event.timing) answer.append(figures(event.timing, event.usage));
      if (isAtEnd) box.scrollTop = box.scrollHeight;
    }
  } catch (error) {
    if (!text) { mine.remove(); answer.remove(); }
    if (error.status === 401) { setQuestion(question); askForKey(() => ask(question)); }
    else if (error.name !== "AbortError") { say("error", error.message); if (!text) setQuestion(question); }
    else if (!text && mine.isConnected) setQuestion(question);
    if (text) answer.append(note("stopped"));
  } finally {
    shown.removeAttribute("aria-busy");
    // An answer that began before the conversation was cleared does not belong to the next one.
    if (text && mine.isConnected) turns.push({role: "user", content: question}, {role: "assistant", content: text});
    if (running === control) running = null;
    showRunning();
  }
}

function note(text) {
  const line = document.createElement("details");
  line.textContent = text;
  const summary = document.createElement("summary");
  summary.textContent = text;
  line.replaceChildren(summary);
  return line;
}

function figures(timing, usage) {
  const ms = (value) => value < 1000 ? `${value.toFixed(value < 10 ? 1 : 0)} ms` : `${(value / 1000).toFixed(1)} s`;
  const phases = [
    ["queue", "queue", timing.queue_ms, ""],
    ["prefill", "first token", timing.ttft_ms - timing.queue_ms, ` for ${usage.prompt_tokens} prompt tokens`],
    ["decode", "decoding", timing.total_ms - timing.ttft_ms, `, ${ms(timing.tpot_ms)} a token`],
  ];
  const plural = usage.completion_tokens === 1 ? "token" : "tokens";
  const line = note(`${ms(timing.total_ms)} · ${usage.completion_tokens} ${plural}`);
  const bar = document.createElement("span"), list = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", phases.map(([, name, part]) => `${name} ${Math.round(100 * part / timing.total_ms)}%`).join(", "));
  list.className = "phases";
  for (const [kind, name, part, more] of phases) {
    const share = document.createElement("i"), dot = document.createElement("i"), item = document.createElement("span");
    share.className = dot.className = kind;
    share.style.flex = `${Math.max(part, 0)} 0 0`;
    bar.append(share);
    item.append(dot, `${name} ${ms(part)}${more}`);
    list.append(item);
  }
  line.addEventListener("toggle", () => line.scrollIntoView({block: "nearest"}));
  line.firstChild.prepend(bar);
  line.append(list);
  return line;
}

function showRunning() {
  const hadFocus = [at("ask"), at("stop")].includes(document.activeElement);
  at("ask").hidden = Boolean(running);
  at("stop").hidden = !running;
  if (hadFocus) at(running ? "stop" : "question").focus();
  at("ask").disabled = !at("question").value.trim();
}

function setQuestion(text) {
  at("question").value = text;
  at("question").dispatchEvent(new Event("input"));
}

// The request as a command and as a program

const asCurl = (body, key) => `curl ${location.origin}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\${key ? `
  -H "Authorization: Bearer $FLASHVL_API_KEY" \\` : ""}
  --data-binary @- <<'JSON'
${JSON.stringify(body)}
JSON
`;

const asPython = (body, key) => `${key ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=${key ? 'os.environ["FLASHVL_API_KEY"]' : '"any"'})
answer = client.chat.completions.create(
    model=${JSON.stringify(body.model)},
    messages=${JSON.stringify(body.messages, null, 4).replaceAll("\n", "\n    ")},
)
print(answer.choices[0].message.content)
`;

async function copy(kind) {
  const body = request(at("question").value.trim());
  if (!body.messages.length) body.messages = request(QUESTIONS[0]).messages;
  const text = (kind === "curl" ? asCurl : asPython)(body, at("key").value.trim());
  try { await navigator.clipboard.writeText(text); } catch {
    // Browsers have no clipboard for pages that came by plain http from another machine.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const button = document.querySelector(`[data-copy=${kind}]`), name = button.textContent;
  button.textContent = "copied";
  at("said").textContent = `The request is copied as ${name}.`;
  setTimeout(() => { button.textContent = name; at("said").textContent = ""; }, 1500);
}

async function showCard(event) {
  event.preventDefault();
  try {
    at("card").querySelector("pre").textContent = await (await call("/model-card")).text();
    at("card").showModal();
  } catch (error) {
    if (error.status === 401) askForKey(() => at("card-link").click());
    else say("error", error.message);
  }
}

// Events

function on(id, kind, react) { at(id)?.addEventListener(kind, react); }

on("file", "change", (event) => take(event.target.files[0]));
on("remove", "click", removePicture);
on("camera", "click", useCamera);
on("video", "loadeddata", () => { at("shoot").disabled = false; at("shoot").focus(); });
on("shoot", "click", shoot);
on("no-camera", "click", stopCamera);
on("stop", "click", () => running?.abort());
on("clear", "click", () => { clear(); at("question").focus(); });
on("card-link", "click", showCard);
on("key-button", "click", () => askForKey(null));
on("key-form", "submit", (event) => {
  event.preventDefault();
  at("key-form").hidden = true;
  const again = heldBack;
  heldBack = null;
  at("question").focus();
  again?.();
  if (picture && again !== drawTiles) drawTiles();
});
on("show-tiles", "change", (event) => { at("tiles").style.display = event.target.checked ? "" : "none"; });
on("form", "submit", (event) => { event.preventDefault(); ask(at("question").value.trim()); });
on("question", "input", () => {
  const question = at("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  showRunning();
});
on("question", "keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("form").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
for (const example of document.querySelectorAll(".example")) example.addEventListener("click", async () => {
  const image = example.querySelector("img"), questions = JSON.parse(example.dataset.questions);
  const choice = ++choices;
  let file;
  try { file = await (await fetch(image.src)).blob(); } catch (error) { say("error", error.message); return; }
  if (choice !== choices) return;
  await take(file, questions);
  setQuestion(questions[0]);
  if (at("key-form").hidden) at("question").focus();
});
document.addEventListener("paste", (event) => { const [file] = event.clipboardData.files; if (file) take(file); });
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  at("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop") take(event.dataTransfer.files[0]);
});
at("tiles").addEventListener("pointermove", (event) => {
  const box = at("tiles").getBoundingClientRect();
  for (const tile of at("tiles").children) {
    const kept = tile.querySelector(".kept").getBoundingClientRect();
    const isIn = event.clientX >= kept.left && event.clientX < kept.right && event.clientY >= kept.top && event.clientY < kept.bottom;
    if (isIn && box.width) { chooseTile(tile); break; }
  }
});
addEventListener("resize", () => { if (picture) fit(); });
document.addEventListener("visibilitychange", watchQueue);
watchQueue();
setInterval(watchQueue, 2000);
