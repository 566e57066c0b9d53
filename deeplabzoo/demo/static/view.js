// One answer on the page: the picture in its layers, the legend that isolates a class, the downloads and the times.

import { bytes, isBackground, paintLines, paintPhoto, paintTint, unpack } from "./layers.js";

export async function makeView(answer, name, opacity) {
  const root = document.getElementById("view").content.cloneNode(true).querySelector("article");
  const one = (selector) => root.querySelector(selector);
  const labels = await unpack(answer);
  const canvases = ["photo", "tint", "lines"].map((layer) => one(`canvas.${layer}`));
  for (const canvas of canvases) { canvas.width = answer.width; canvas.height = answer.height; }
  const [photo, tint, lines] = canvases;
  let alone = null;

  const isolate = (index) => {
    alone = index === alone ? null : index;
    paintTint(tint, answer, labels, alone);
    paintLines(lines, labels, alone);
    for (const button of root.querySelectorAll(".legend button")) button.setAttribute("aria-pressed", Number(button.value) === alone);
  };
  const setOpacity = (share) => { tint.style.opacity = share; };

  one("h2").textContent = answer.model;
  for (const side of ["width", "height"]) one(".picture").style.setProperty(`--${side}`, answer[side]);
  await paintPhoto(photo, answer);
  paintTint(tint, answer, labels, null);
  paintLines(lines, labels, null);
  setOpacity(opacity);
  one(".legend").append(...answer.classes.map((found) => entry(found, answer, isolate)));
  one(".times").textContent = times(answer.seconds);
  watchPointer(one(".picture"), one(".name"), answer, labels, isolate);

  const stem = name.replace(/\.[^.]*$/, "") || "photo";
  const file = one("a.labels");
  file.href = URL.createObjectURL(new Blob([bytes(answer.labels_png)], { type: "image/png" }));
  file.download = `${stem}_labels.png`;
  one("a.overlay").addEventListener("click", async (event) => {
    event.preventDefault();
    save(await flatten(photo, tint, lines), `${stem}_overlay.png`);
  });
  return { root, setOpacity, clear: () => { if (alone !== null) isolate(alone); }, forget: () => URL.revokeObjectURL(file.href) };
}

export function share(part) {
  if (part >= 0.9995) return part >= 1 ? "100 %" : ">99.9 %";
  return part >= 0.0005 ? `${(100 * part).toFixed(1)} %` : "<0.1 %";
}

function entry(found, answer, isolate) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const swatch = document.createElement("canvas");
  swatch.width = swatch.height = 1;
  if (!isBackground(answer, found.index)) {
    const context = swatch.getContext("2d");
    context.fillStyle = `rgb(${answer.palette[found.index].join(" ")})`;
    context.fillRect(0, 0, 1, 1);
  }
  const part = document.createElement("b");
  part.textContent = share(found.share);
  button.type = "button";
  button.value = found.index;
  button.setAttribute("aria-pressed", "false");
  button.append(swatch, found.name, part);
  button.addEventListener("click", () => isolate(found.index));
  item.append(button);
  return item;
}

function watchPointer(picture, tag, answer, labels, isolate) {
  const names = new Map(answer.classes.map((found) => [found.index, found.name]));
  const under = (event) => {
    const box = picture.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * answer.width);
    const y = Math.floor((event.clientY - box.top) / box.height * answer.height);
    return labels[Math.min(y, answer.height - 1) * answer.width + Math.min(x, answer.width - 1)];
  };
  picture.addEventListener("click", (event) => isolate(under(event)));
  picture.addEventListener("pointerleave", () => { tag.hidden = true; });
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    tag.textContent = names.get(under(event)) ?? "";
    tag.hidden = false;
    tag.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - tag.offsetWidth))}px`;
    tag.style.top = `${Math.max(0, event.clientY - box.top - 30)}px`;
  });
}

function times(seconds) {
  return Object.entries(seconds).filter(([, value]) => value >= 0.0001).map(([stage, value]) => `${stage} ${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`).join(" · ");
}

function flatten(photo, tint, lines) {
  const sheet = document.createElement("canvas");
  sheet.width = photo.width;
  sheet.height = photo.height;
  const context = sheet.getContext("2d");
  context.drawImage(photo, 0, 0);
  context.globalAlpha = Number(tint.style.opacity);
  context.drawImage(tint, 0, 0);
  context.globalAlpha = 1;
  context.drawImage(lines, 0, 0);
  return new Promise((done) => sheet.toBlob(done, "image/png"));
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
