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

/** Whether the browser shows the file otherwise than its pixels are stored. */
async function isTurned(file) {
  const side = 16;
  const thumbnails = await Promise.all(
    ["none", "from-image"].map(async (imageOrientation) => {
      const bitmap = await createImageBitmap(file, { imageOrientation });
      const pen = new OffscreenCanvas(side, side).getContext("2d");
      pen.drawImage(bitmap, 0, 0, side, side);
      const { width, height } = bitmap;
      bitmap.close();
      return { width, height, pixels: pen.getImageData(0, 0, side, side).data };
    }),
  );
  const [stored, shown] = thumbnails;
  return stored.width !== shown.width || stored.pixels.some((value, index) => value !== shown.pixels[index]);
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
