// A picture as the page keeps it: what is sent, and its size as it is shown.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/**
 * Reads a file: `{name, data, url, width, height}`, or null if it is no picture that the server and the browser read.
 *
 * `data` is a data: URL of the file's own bytes. Only a picture that its EXIF orientation turns is written anew, upright:
 * not every model turns it, and a box must mean the same pixels to the model and on this page.
 */
export async function readPicture(file) {
  if (!TYPES.includes(file.type)) return null;
  try {
    const turned = (await isTurned(file)) ? await upright(file) : file;
    const url = URL.createObjectURL(turned);
    const { naturalWidth: width, naturalHeight: height } = await decoded(url);
    return { name: file.name || "picture", data: await dataUrl(turned), url, width, height };
  } catch {
    return null;
  }
}

/** An image element that is ready to be drawn. */
export async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** A canvas as a file. */
export function canvasBlob(canvas, type, quality) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large"))), type, quality);
  });
}

// Where the EXIF data of a JPEG, PNG or WebP file begin: a TIFF header in either byte order.
const EXIF = /(?:Exif\0\0|eXIf|EXIF[^]{4})(?=II\*\0|MM\0\*)/;
const ORIENTATION = 0x0112;

/** Whether the EXIF data say that the picture is to be shown otherwise than it is stored. */
async function isTurned(file) {
  const bytes = await file.arrayBuffer();
  const header = new TextDecoder("latin1").decode(bytes).match(EXIF);
  if (!header) return false;
  try {
    const data = new DataView(bytes, header.index + header[0].length);
    const little = data.getUint8(0) === 0x49;
    const entries = data.getUint32(4, little);
    for (let entry = 0; entry < data.getUint16(entries, little); entry++) {
      const at = entries + 2 + 12 * entry;
      if (data.getUint16(at, little) === ORIENTATION) return data.getUint16(at + 8, little) > 1;
    }
  } catch {
    // broken data turn nothing
  }
  return false;
}

async function upright(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvasBlob(canvas, file.type === "image/jpeg" ? "image/jpeg" : "image/png", 0.95);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
