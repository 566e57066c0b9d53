// The picture as three canvases: photo, class colours (shown at the chosen opacity), outlines and the veil over what is not asked for.

const WHITE_LINE = [255, 255, 255, 153];
const VEIL = [20, 20, 24, 190];

export async function unpack(answer) {
  const packed = new Blob([bytes(answer.labels)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(packed).arrayBuffer();
  return answer.label_bytes === 1 ? new Uint8Array(buffer) : new Uint16Array(buffer);
}

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

export async function paintPhoto(canvas, answer) {
  const photo = await createImageBitmap(new Blob([bytes(answer.photo)], { type: answer.photo_type }));
  canvas.getContext("2d").drawImage(photo, 0, 0);
  photo.close();
}

// Background is left as it is, as in the files that `predict` writes; asked for alone, it is what has no veil.
export function paintTint(canvas, answer, labels, alone) {
  const colors = answer.palette.map((color, index) =>
    word(color, !isBackground(answer, index) && (alone === null || index === alone)));
  paint(canvas, (out) => { for (let i = 0; i < labels.length; i++) out[i] = colors[labels[i]]; });
}

export function paintLines(canvas, labels, alone) {
  const { width, height } = canvas;
  const thick = Math.max(1, Math.round(Math.min(width, height) / 500));
  const line = word(WHITE_LINE, 1, WHITE_LINE[3]), veil = word(VEIL, 1, VEIL[3]);
  paint(canvas, (out) => {
    if (alone !== null) for (let i = 0; i < labels.length; i++) if (labels[i] !== alone) out[i] = veil;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const left = x > 0 && labels[i - 1] !== labels[i] && (alone === null || labels[i] === alone || labels[i - 1] === alone);
        const above = y > 0 && labels[i - width] !== labels[i] && (alone === null || labels[i] === alone || labels[i - width] === alone);
        for (let k = 0; k < thick; k++) {
          if (left && x + k < width) out[i + k] = line;
          if (above && y + k < height) out[i + k * width] = line;
        }
      }
    }
  });
}

export function isBackground(answer, index) {
  const found = answer.classes.find((one) => one.index === index);
  return found !== undefined && ["background", "_background_", "bg"].includes(found.name.trim().toLowerCase());
}

function paint(canvas, fill) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  fill(new Uint32Array(image.data.buffer));
  context.putImageData(image, 0, 0);
}

// Four bytes red, green, blue, alpha as the one number that a little-endian machine stores them as.
function word([red, green, blue], shown, alpha = 255) {
  return shown ? ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0 : 0;
}
