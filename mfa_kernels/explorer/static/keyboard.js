/** Keys that work everywhere, and the dialog that lists them. */

import { button, tag } from "./dom.js";

const HELP = [
  [
    "Everywhere",
    [
      ["/", "search"],
      ["?", "this help"],
      ["m", "map and table"],
      ["t", "topics"],
      ["y", "your text"],
      ["g", "playground"],
      ["Esc", "leave a field, close what is open"],
    ],
  ],
  [
    "Map",
    [
      ["←  ↑  ↓  →", "move"],
      ["+  −", "zoom"],
      ["0", "show all"],
    ],
  ],
  [
    "Table",
    [
      ["↑  ↓", "choose a row"],
      ["Page Up  Page Down", "ten rows"],
      ["Enter", "open the region"],
    ],
  ],
  ["Region", [["n  p", "next, previous region"]]],
  [
    "Texts",
    [
      ["←  →", "move from token to token"],
      ["Enter", "open the region of a token"],
    ],
  ],
  ["Playground", [["Ctrl  Enter", "write, from the prompt"]]],
];
const PLACES = { m: "#/", t: "#/topics", y: "#/text", g: "#/steer" };

/** Keys are two spaces apart. */
const kbd = (keys) => keys.split("  ").map((key) => [tag("kbd", {}, key), " "]);

function helpDialog() {
  const close = () => dialog.close();
  const parts = HELP.map(([title, rows]) =>
    tag(
      "section",
      {},
      tag("h3", {}, title),
      tag(
        "dl",
        {},
        rows.map(([keys, does]) => tag("div", {}, tag("dt", {}, kbd(keys)), tag("dd", {}, does))),
      ),
    ),
  );
  const dialog = tag(
    "dialog",
    { class: "help", "aria-label": "Keyboard help" },
    tag(
      "div",
      { class: "panel-title" },
      tag("h2", {}, "Keyboard"),
      button("✕", close, { class: "icon", "aria-label": "Close" }),
    ),
    tag("div", { class: "help-parts" }, parts),
  );
  // A click on the ground outside of the dialog's content closes it.
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  return dialog;
}

const isTyping = (target) =>
  target.closest?.("input:not([type=range], [type=checkbox], [type=radio]), textarea, select");

/**
 * @param {HTMLElement} helpButton
 * @param {HTMLInputElement} field of the search
 * @param {() => Record<string, () => void>} keysOfView what keys do in the view that is shown
 */
export function startKeyboard(helpButton, field, keysOfView) {
  const dialog = helpDialog();
  document.body.append(dialog);
  const help = () => dialog.showModal();
  helpButton.addEventListener("click", help);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isTyping(event.target)) event.target.blur();
    if (
      event.defaultPrevented ||
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      dialog.open ||
      isTyping(event.target)
    )
      return;
    const acts = {
      "/": () => {
        field.focus();
        field.select();
      },
      "?": help,
      ...keysOfView(),
    };
    const act = acts[event.key] ?? (PLACES[event.key] && (() => (location.hash = PLACES[event.key])));
    if (!act) return;
    event.preventDefault();
    act();
  });
}
