/** One region: what it is about, where it occurs, how it varies inside, and what is near it. */

import { get, regionPath } from "./api.js";
import { followMap, regionBeside } from "./atlas.js";
import { hue } from "./colors.js";
import { regionContexts } from "./contexts.js";
import { button, tag } from "./dom.js";
import { count, fixed, percent, plural } from "./format.js";
import { histogramFigure } from "./histogram.js";
import { latentList } from "./latents.js";
import { lensFigure } from "./lens.js";
import { around, RegionMap } from "./map.js";
import { componentIn } from "./routes.js";
import { failure, fillWith } from "./states.js";
import { chip } from "./tokens.js";
import { tip } from "./tooltip.js";

const open = (component) => (location.hash = `#/region/${component}`);

function heading(region, beside, about) {
  const name = tag(
    "h1",
    { tabindex: "-1", "data-test": "region-title", class: region.named ? null : "token-label" },
    tag("bdi", {}, region.label || "No tokens"),
  );
  const facts = [
    [`Region ${region.component}`, ""],
    [percent(region.share), " of all tokens"],
    [count(region.rows), region.rows === 1 ? " token" : " tokens"],
    [count(region.distinct), " different"],
    [fixed(region.responsibility, 3), " mean responsibility"],
    [fixed(region.entropy), " nats of entropy"],
  ];
  const steps = tag(
    "div",
    { class: "steps" },
    button("←", () => beside(-1), { class: "icon", "aria-label": "Previous region", title: "Previous region (p)" }),
    button("→", () => beside(1), { class: "icon", "aria-label": "Next region", title: "Next region (n)" }),
    about.can_steer &&
      tag("a", { class: "button primary", href: `#/steer/${region.component}` }, "Steer toward this region"),
  );
  return tag(
    "div",
    { class: "region-head" },
    tag(
      "div",
      {},
      name,
      tag(
        "p",
        { class: "facts" },
        facts.map(([value, text]) => tag("span", {}, tag("b", {}, value), text)),
      ),
    ),
    steps,
  );
}

function genreBars(region, about) {
  const rows = region.genres.filter(({ genre }) => about.genres[genre] !== undefined);
  if (!rows.length) return null;
  const bars = rows.map(({ genre, share, lift }) => {
    const bar = tag(
      "span",
      { class: "genre-bar" },
      tag("span", { style: { width: `${100 * share}%`, background: hue(genre) } }),
    );
    const row = tag(
      "li",
      {},
      tag("span", { class: "genre-name" }, about.genres[genre]),
      bar,
      tag("span", { class: "number" }, percent(share)),
    );
    return tip(row, [
      about.genres[genre],
      `${percent(share)} of this region's tokens, ×${fixed(lift, 1)} of what it is overall`,
    ]);
  });
  return panel("Genres", tag("ul", { class: "genre-bars" }, bars));
}

function panel(title, ...children) {
  return tag("section", { class: "panel padded" }, tag("h2", {}, title), children);
}

function tellingChips(region) {
  if (!region.telling.length) return tag("p", { class: "muted" }, "This region owns no tokens.");
  return tag(
    "div",
    { class: "chips" },
    region.telling.map(({ token, count: here, total, lift }) =>
      tip(chip(token, tag("span", { class: "chip-more" }, `×${fixed(lift, lift < 9.95 ? 1 : 0)}`)), [
        token,
        `${count(here)} here of ${count(total)} in all: ${fixed(lift, 1)} times as frequent as overall`,
      ]),
    ),
  );
}

function neighborList(neighbors) {
  const far = Math.max(...neighbors.map(({ distance }) => distance)) || 1;
  const items = neighbors.map(({ component, label, distance }) =>
    tag(
      "li",
      {},
      tag("a", { href: `#/region/${component}` }, tag("bdi", {}, label || `region ${component}`)),
      tag(
        "span",
        { class: "distance-bar", "aria-hidden": "true" },
        tag("span", { style: { width: `${(100 * distance) / far}%` } }),
      ),
      tip(tag("span", { class: "number" }, fixed(distance, 1)), [
        `Distance ${fixed(distance)}`,
      ]),
    ),
  );
  return tag("ol", { class: "neighbors" }, items);
}

function miniMap(region, about, signal) {
  const stage = tag("div", { class: "map-stage mini" });
  const map = new RegionMap(stage, about, signal, { compact: true, onopen: open });
  followMap((data) => {
    const isFirst = !map.map;
    map.setMap(data);
    if (!isFirst) return;
    map.setFocus(around(region));
    map.lookAround();
  }, signal);
  const link = tag("a", { class: "small", href: `#/?region=${region.component}` }, "Show on the large map");
  return tag("section", { class: "panel mini-panel", "aria-label": "Place on the map" }, stage, link);
}

function centroidLens(region, about, signal) {
  if (!about.lens) return null;
  const place = tag("div");
  fillWith(place, () => get(`${regionPath(region.component)}/lens`, {}, signal), lensFigure, "Logit lens");
  return panel(
    "Next tokens, by the centroid",
    tag("p", { class: "muted hint" }, "In nats, against the average region."),
    place,
  );
}

function render(region, about, signal, beside) {
  const contexts = regionContexts(region.component, about, region.contexts, signal);
  const main = tag(
    "div",
    { class: "region-main" },
    panel(
      "Telling tokens",
      region.explanation && tag("p", { class: "explanation" }, region.explanation),
      tellingChips(region),
    ),
    tag(
      "section",
      { class: "panel padded" },
      tag("div", { class: "panel-title" }, tag("h2", {}, "Contexts"), contexts.order),
      contexts.nodes,
    ),
    panel(
      "Latents",
      tag(
        "p",
        { class: "muted hint" },
        "How tokens vary inside of this region, longest first. z is in standard deviations, 0 at the centroid.",
      ),
      latentList(region, about, signal),
    ),
  );
  const side = tag(
    "div",
    { class: "region-side" },
    miniMap(region, about, signal),
    genreBars(region, about),
    region.neighbors.length ? panel("Nearest regions", neighborList(region.neighbors)) : null,
    centroidLens(region, about, signal),
    panel("Responsibility", histogramFigure("Responsibility", region.responsibilities, { digits: 3 })),
    panel("Distance to the centroid", histogramFigure("Mahalanobis distance", region.distances, { digits: 1 })),
  );
  return tag("div", { class: "region" }, heading(region, beside, about), main, side);
}

export function regionView(place, { about, parts, signal }) {
  const component = componentIn(parts[0]);
  if (component === null) {
    place.append(failure(new Error("A region is called by its number, as in #/region/12.")));
    return { title: "Region" };
  }
  const beside = (step) => open(regionBeside(component, step, about.n_components));
  // Without the map nothing is known of which regions own rows, nor are tokens of contexts named.
  followMap(() => {}, signal);
  const load = () => get(regionPath(component), {}, signal);
  const ready = fillWith(place, load, (region) => render(region, about, signal, beside), `Region ${component}`);
  return { title: `Region ${component}`, ready, keys: { n: () => beside(1), p: () => beside(-1) } };
}
