/** Your own text: every token coloured by the region that owns it, as you type. */

import { post } from "./api.js";
import { followMap } from "./atlas.js";
import { HUES, hue } from "./colors.js";
import { button, debounce, fill, tag } from "./dom.js";
import { fixed, plural } from "./format.js";
import { empty, failure, isAbort, loading } from "./states.js";
import { tokenRow } from "./tokens.js";
import { tip } from "./tooltip.js";

const WAIT = 250;

/** The text stays while other views are looked at. */
let written = "";

/** Hues of regions, which they keep while more is typed; where there are more regions than hues, some share one. */
class Paint {
  #hues = new Map();

  take(counts) {
    for (const component of this.#hues.keys()) if (!counts.has(component)) this.#hues.delete(component);
    const used = new Array(HUES).fill(0);
    for (const index of this.#hues.values()) used[index]++;
    for (const component of counts.keys()) {
      if (this.#hues.has(component)) continue;
      const index = used.indexOf(Math.min(...used));
      used[index]++;
      this.#hues.set(component, index);
    }
  }

  of = (component) => hue(this.#hues.get(component) ?? -1);
}

function countRegions(tokens) {
  const counts = new Map();
  for (const { component } of tokens) if (component >= 0) counts.set(component, (counts.get(component) ?? 0) + 1);
  return new Map([...counts].sort((a, b) => b[1] - a[1]));
}

function legendItem(component, region, times, paint, row) {
  const light = (isOn) => {
    row.classList.toggle("lighting", isOn);
    for (const token of row.querySelectorAll(`[data-component="${component}"]`)) token.classList.toggle("lit", isOn);
  };
  const link = tag(
    "a",
    {
      class: "legend-item",
      href: `#/region/${component}`,
      style: { "--c": paint.of(component) },
      onpointerenter: () => light(true),
      onpointerleave: () => light(false),
      onfocus: () => light(true),
      onblur: () => light(false),
    },
    tag("span", { class: "swatch", "aria-hidden": "true" }),
    tag("bdi", { class: "legend-name" }, region?.label || `region ${component}`),
    tag("span", { class: "legend-count" }, `×${times}`),
  );
  return tip(link, [
    region?.label || `Region ${component}`,
    `Region ${component} owns ${plural(times, "token")} here`,
    (region?.tokens ?? []).slice(0, 8).join("  "),
  ]);
}

function render(answer, paint, genres) {
  const counts = countRegions(answer.tokens);
  paint.take(counts);
  const more = ({ component }) => {
    const region = answer.regions[component];
    return [
      genres[region?.genre],
      (region?.tokens ?? []).slice(0, 8).join("  "),
    ].filter(Boolean);
  };
  const row = tokenRow(answer.tokens, {
    color: paint.of,
    more,
    breaks: true,
    class: "tokens painted",
    "data-test": "own-tokens",
    "aria-label": "Your text, token by token",
  });
  const facts = [
    plural(answer.tokens.length, "token"),
    plural(counts.size, "region"),
    `${fixed(answer.seconds * 1000, 0)} ms`,
  ];
  return [
    row,
    answer.truncated &&
      tag("p", { class: "notice" }, "Only the beginning was read: the text is longer than the model takes."),
    tag(
      "p",
      { class: "facts small" },
      facts.filter(Boolean).map((one) => tag("span", {}, one)),
    ),
    tag("h2", {}, "Regions present"),
    tag(
      "div",
      { class: "legend", "data-test": "legend" },
      [...counts].map(([component, times]) => legendItem(component, answer.regions[component], times, paint, row)),
    ),
  ];
}

export function textView(place, { about, signal }) {
  const heading = tag(
    "div",
    { class: "intro" },
    tag("h1", { tabindex: "-1" }, "Your text"),
    tag(
      "p",
      { class: "muted" },
      "Every token takes the colour of the region that owns it, the stronger the more responsible. Click one to open it.",
    ),
  );
  place.append(heading);
  if (!about.can_read) {
    place.append(empty("No model is loaded to read a text of yours: start the explorer with --model. All else works without one."));
    return { title: "Your text" };
  }
  followMap(() => {}, signal);
  const paint = new Paint();
  const output = tag("section", { class: "panel padded own", "aria-label": "Tokens", "aria-live": "off" });
  let asking = null;

  async function read() {
    asking?.abort();
    if (signal.aborted) return;
    if (!written.trim()) return showExamples();
    const mine = new AbortController();
    asking = mine;
    output.setAttribute("aria-busy", "true");
    if (!output.querySelector(".tokens")) fill(output, loading("Reading"));
    try {
      const answer = await post("/api/text", { text: written }, mine.signal);
      // An answer to what was typed before is late: the one to the last key is on its way.
      if (asking === mine) fill(output, render(answer, paint, about.genres));
    } catch (error) {
      if (!isAbort(error) && asking === mine) fill(output, failure(error, read));
    } finally {
      if (asking === mine) output.removeAttribute("aria-busy");
    }
  }
  function showExamples() {
    const examples = about.examples.map((text) => button(text, () => put(text), { class: "example" }));
    fill(
      output,
      empty("Type something above, or begin with one of these.", tag("div", { class: "examples" }, examples)),
    );
  }
  function put(text) {
    written = text;
    area.value = text;
    area.focus();
    read();
  }
  signal.addEventListener("abort", () => asking?.abort());
  const later = debounce(read, WAIT);
  const area = tag("textarea", {
    rows: "5",
    "aria-label": "Your text",
    "data-test": "own-text",
    placeholder: "Type or paste a text",
    spellcheck: "false",
    maxlength: about.max_prompt || null,
    value: written,
    oninput: () => {
      written = area.value;
      later();
    },
  });
  place.append(tag("div", { class: "own-text" }, area, output));
  read();
  return { title: "Your text" };
}
