/** A field that finds a region by label, token or number while one types. */

import { get } from "./api.js";
import { debounce, fill, tag } from "./dom.js";
import { percent } from "./format.js";
import { isAbort } from "./states.js";

const SHOWN = 12;

/**
 * @param {AbortSignal} signal
 * @param {(region: object) => void} onchoose
 * @returns {{node: HTMLElement, show: (text: string) => void}}
 */
export function regionChooser(signal, onchoose) {
  const list = tag("ul", {
    class: "options",
    role: "listbox",
    id: "region-options",
    "aria-label": "Regions",
    hidden: true,
  });
  const input = tag("input", {
    type: "text",
    role: "combobox",
    "aria-label": "Region, by label, token or number",
    "aria-expanded": "false",
    "aria-controls": list.id,
    "aria-autocomplete": "list",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "Find a region by label, token or number",
    "data-test": "region-chooser",
  });
  let regions = [];
  let at = -1;
  let asked = 0;
  let name = "";

  function close() {
    asked++;
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }
  function mark(to) {
    at = to;
    for (const [i, option] of [...list.children].entries()) option.setAttribute("aria-selected", String(i === at));
    if (at < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", list.children[at].id);
    list.children[at].scrollIntoView({ block: "nearest" });
  }
  function choose(region) {
    close();
    show(region.label || `Region ${region.component}`);
    onchoose(region);
  }
  function show(text) {
    name = text;
    input.value = text;
  }
  const optionOf = (region, i) =>
    tag(
      "li",
      {
        role: "option",
        id: `region-option-${i}`,
        "aria-selected": "false",
        // Before the field loses its focus, which closes the list.
        onpointerdown: (event) => event.preventDefault(),
        onclick: () => choose(region),
      },
      tag("bdi", { class: "option-label" }, region.label || "no tokens"),
      tag("span", { class: "muted" }, `${region.component} · ${percent(region.share)}`),
    );

  async function ask(query) {
    const mine = ++asked;
    let note = "No region is like this.";
    try {
      ({ regions } = await get("/api/regions", { query, limit: SHOWN, sort: "share", descending: 1 }, signal));
    } catch (error) {
      if (isAbort(error)) return;
      regions = [];
      note = error.message;
    }
    if (mine !== asked || document.activeElement !== input) return;
    fill(list, regions.length ? regions.map(optionOf) : tag("li", { class: "muted", role: "presentation" }, note));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    mark(regions.length && query ? 0 : -1);
  }
  const later = debounce(() => ask(input.value.trim()), 180);

  input.addEventListener("input", later);
  input.addEventListener("focus", () => {
    input.select();
    ask("");
  });
  input.addEventListener("blur", () => {
    close();
    input.value = name;
  });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && !list.hidden && regions.length) mark((at + step + regions.length) % regions.length);
    else if (step) ask("");
    else if (event.key === "Enter" && !list.hidden && regions[at]) choose(regions[at]);
    else if (event.key === "Escape" && !list.hidden) close();
    else return;
    event.preventDefault();
  });
  return { node: tag("div", { class: "chooser" }, input, list), show };
}
