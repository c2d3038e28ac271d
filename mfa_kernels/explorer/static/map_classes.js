/** What the dots of the map are coloured by: genre, kind of token, or label; and the legend that tells and filters. */

import { HUES, hue } from "./colors.js";
import { button, fill, tag } from "./dom.js";
import { count } from "./format.js";

export const MODES = [
  ["genre", "Genre"],
  ["kind", "Kind of token"],
  ["label", "Label"],
];

const indexed = (of, names, rest) => {
  const classes = names.map((name, i) => ({ name, color: hue(i), count: 0 }));
  classes.push({ name: rest, color: hue(-1), count: 0 });
  const classOf = Int32Array.from(of, (i) => (i >= 0 && i < names.length ? i : names.length));
  for (const c of classOf) classes[c].count++;
  return { classes, classOf };
};

/** Regions by their label: the labels that hold the most tokens have a colour of their own. */
function byLabel(map) {
  const shares = new Map();
  map.label.forEach((label, i) => shares.set(label, (shares.get(label) ?? 0) + map.share[i]));
  const largest = [...shares].sort((a, b) => b[1] - a[1]).slice(0, HUES - 1);
  const places = new Map(largest.map(([label], i) => [label, i]));
  return indexed(
    map.label.map((label) => places.get(label) ?? -1),
    [...places.keys()],
    "other labels",
  );
}

/** @returns {{classes: {name: string, color: string, count: number}[], classOf: Int32Array}} */
export function classify(map, mode, genres) {
  if (mode === "label") return byLabel(map);
  return mode === "kind" ? indexed(map.kind, map.kinds, "other") : indexed(map.genre, genres, "no genre");
}

/**
 * The legend: a button for each class that shows or hides it.
 * @param {HTMLElement} place
 * @param {Set<number>} shown classes that are shown; none chosen shows all
 */
export function drawLegend(place, classes, shown, { ontoggle, onhover }) {
  const items = classes.map((one, i) => {
    if (!one.count) return null;
    const item = button("", () => ontoggle(i), {
      class: "legend-item",
      "aria-pressed": String(shown.has(i)),
      style: { "--c": one.color },
      onpointerenter: () => onhover(i),
      onpointerleave: () => onhover(-1),
    });
    item.append(
      tag("span", { class: "swatch", "aria-hidden": "true" }),
      tag("span", { class: "legend-name", dir: "auto" }, one.name),
      tag("span", { class: "legend-count" }, count(one.count)),
    );
    return item;
  });
  const all = shown.size ? button("Show all", () => ontoggle(-1), { class: "legend-item legend-all" }) : null;
  place.classList.toggle("filtered", shown.size > 0);
  // Whoever chooses by keyboard stays on the entry that was just pressed.
  const focused = [...place.children].indexOf(document.activeElement);
  fill(place, items, all);
  place.children[focused]?.focus();
}
