// The page: a photo or the webcam goes to the server, once for each model chosen, and the answers stand side by side.

import { cameraPhotos } from "./camera.js";
import { makeView } from "./view.js";

const element = Object.fromEntries([...document.querySelectorAll("[id]")].map((one) => [one.id, one]));
let limits = { max_bytes: Infinity };
let shown = [];
let last = null; // the photo on the page, for another model
let asked = 0; // answers that come after a newer question are dropped
let live = false;

async function start() {
  const known = await (await fetch("api/models")).json();
  limits = known;
  for (const list of [element.model, element.second]) list.append(...known.models.map((name) => new Option(name, name)));
}

async function segment(photo, model) {
  let reply;
  try {
    reply = await fetch(`api/segment?model=${encodeURIComponent(model)}`, { method: "POST", body: photo });
  } catch {
    throw new Error("The demo does not answer; is it still running in its terminal?");
  }
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

async function show(photo, name) {
  const turn = ++asked, from = performance.now();
  last = { photo, name };
  element.error.hidden = true;
  if (!live) element.status.textContent = "Looking …";
  try {
    if (photo.size > limits.max_bytes) {
      throw new Error(`The upload has ${(photo.size / 1e6).toFixed(1)} MB, more than the ${limits.max_bytes / 1e6} MB that this demo takes; make the photo smaller.`);
    }
    const models = [element.model.value, element.second.value].filter(Boolean);
    const answers = await Promise.all(models.map((model) => segment(photo, model)));
    if (turn !== asked) return;
    const views = await Promise.all(answers.map((answer) => makeView(answer, name, element.opacity.value / 100)));
    if (turn !== asked) { for (const view of views) view.forget(); return; }
    for (const view of shown) view.forget();
    shown = views;
    element.views.replaceChildren(...views.map((view) => view.root));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    element.status.textContent = `${name}: ${answers[0].width} × ${answers[0].height} pixels, ${Math.round(performance.now() - from)} ms from drop to answer`;
  } catch (error) {
    if (turn === asked) fail(error);
  }
}

function fail(error) {
  element.status.textContent = "";
  element.error.textContent = error.message;
  element.error.hidden = false;
}

function take(files) {
  live = false;
  if (files.length) show(files[0], files[0].name);
}

async function watchCamera() {
  live = !live;
  element.webcam.setAttribute("aria-pressed", live);
  if (!live) return;
  try {
    for await (const photo of cameraPhotos(() => !live)) await show(photo, "webcam.jpg");
  } catch (error) {
    fail(error);
  }
  live = false;
  element.webcam.setAttribute("aria-pressed", false);
}

element.file.addEventListener("change", () => { take(element.file.files); element.file.value = ""; });
element.webcam.addEventListener("click", watchCamera);
element.opacity.addEventListener("input", () => {
  element.percent.textContent = `${element.opacity.value} %`;
  for (const view of shown) view.setOpacity(element.opacity.value / 100);
});
for (const list of [element.model, element.second]) list.addEventListener("change", () => { if (last && !live) show(last.photo, last.name); });
element.drop.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") element.file.click(); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); element.drop.classList.toggle("over", kind === "dragover"); });
}
document.addEventListener("drop", (event) => take(event.dataTransfer.files));
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") for (const view of shown) view.clear(); });
start().catch(() => fail(new Error("The demo does not answer; is it still running in its terminal?")));
