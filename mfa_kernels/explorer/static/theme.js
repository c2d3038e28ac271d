/** Light and dark: the system's choice until somebody makes another one. */

const system = matchMedia("(prefers-color-scheme: dark)");

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

/** Makes `button` switch between light and dark; a "themechange" event on the document tells canvases to redraw. */
export function startTheme(button) {
  const told = () => {
    const dark = isDark();
    button.textContent = dark ? "☀" : "☾";
    button.title = dark ? "Light mode" : "Dark mode";
    button.setAttribute("aria-pressed", String(dark));
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // Not remembered where storage is forbidden; it holds for this page all the same.
    }
    told();
  });
  system.addEventListener("change", told);
  told();
}
