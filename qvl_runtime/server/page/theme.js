// Runs before the first paint, so that a chosen theme never flashes the other one.
"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("qvl-theme");
    } catch {
      return null; // storage may be forbidden
    }
  };
  if (["dark", "light"].includes(stored())) root.dataset.theme = stored();
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.addEventListener("click", () => {
      const shown = root.dataset.theme || (dark.matches ? "dark" : "light");
      root.dataset.theme = shown === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("qvl-theme", root.dataset.theme);
      } catch {
        // then it lasts until the page is left
      }
    });
  });
})();
