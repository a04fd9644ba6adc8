// Files on their way to the page: chosen, dropped or pasted.

const $ = (id) => document.getElementById(id);

/** Calls `add(files)` for all of them, as long as `wanted()`. */
export function onFiles(add, wanted) {
  for (const id of ["choose", "attach"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    await add([...$("file").files]);
    $("file").value = ""; // so that the same file can be chosen again
  });

  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    // A text with a picture in it, as office programs copy it, is pasted as text.
    if (!files.length || event.clipboardData.types.includes("text/plain") || !wanted()) return;
    event.preventDefault();
    add(files);
  });

  const dragging = (on) => document.body.classList.toggle("dragging", on);
  addEventListener("dragover", (event) => {
    event.preventDefault(); // else the browser would leave the page for the file
    dragging(event.dataTransfer.types.includes("Files") && wanted());
  });
  addEventListener("dragleave", (event) => event.relatedTarget || dragging(false));
  addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(false);
    if (wanted()) add([...event.dataTransfer.files]);
  });
}
