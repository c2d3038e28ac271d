/** What is found for a text: regions, tokens and the regions that own them, and places in the texts. */

import { get } from "./api.js";
import { mapTold } from "./atlas.js";
import { hue, regionHue } from "./colors.js";
import { contextItems } from "./contexts.js";
import { tag } from "./dom.js";
import { count, percent, plural } from "./format.js";
import { empty, fillWith } from "./states.js";
import { chip } from "./tokens.js";
import { tip } from "./tooltip.js";

const SHOWN = 8;
const OWNERS = 5;

function tokenItem({ token, total, regions }) {
  const bar = tag(
    "div",
    { class: "stack", "aria-hidden": "true" },
    regions.map(({ component, label, count: owned }) =>
      tip(tag("span", { style: { width: `${(100 * owned) / (total || 1)}%`, background: regionHue(component) } }), [
        label,
        `${count(owned)} of ${count(total)}`,
      ]),
    ),
  );
  const owners = regions
    .slice(0, OWNERS)
    .map(({ component, label, count: owned }) =>
      tag(
        "li",
        { style: { "--c": regionHue(component) } },
        tag("span", { class: "swatch", "aria-hidden": "true" }),
        tag("a", { href: `#/region/${component}` }, tag("bdi", {}, label || `region ${component}`)),
        tag("span", { class: "muted" }, ` ${percent(owned / (total || 1))}`),
      ),
    );
  const head = tag("div", { class: "found-head" }, chip(token), tag("span", { class: "muted" }, plural(total, "time")));
  return tag("li", { class: "found-token" }, head, bar, tag("ul", { class: "owners" }, owners));
}

function tokenList(tokens) {
  if (!tokens.length) return tag("p", { class: "muted" }, "No token contains it.");
  const rest = tokens.slice(SHOWN);
  return [
    tag("ul", { class: "found-tokens" }, tokens.slice(0, SHOWN).map(tokenItem)),
    rest.length > 0 &&
      tag(
        "details",
        { class: "rest" },
        tag("summary", {}, plural(rest.length, "more token", "more tokens")),
        tag("ul", { class: "found-tokens" }, rest.map(tokenItem)),
      ),
  ];
}

function regionItem(region, about) {
  return tag(
    "li",
    { style: { "--c": hue(region.genre) } },
    about.genres[region.genre] !== undefined && tag("span", { class: "swatch", title: about.genres[region.genre] }),
    tag("a", { href: `#/region/${region.component}` }, tag("bdi", {}, region.label || `region ${region.component}`)),
    tag("span", { class: "muted" }, ` ${percent(region.share)}`),
  );
}

function render(found, regions, text, about) {
  if (!found.tokens.length && !found.contexts.length && !regions.total) {
    return empty(`Nothing has “${text}” in it: no token, no text, no label.`);
  }
  const section = (title, more, node) =>
    tag(
      "section",
      { class: "panel padded" },
      tag("div", { class: "panel-title" }, tag("h2", {}, title), tag("span", { class: "muted" }, more)),
      node,
    );
  return tag(
    "div",
    { class: "found" },
    tag(
      "div",
      { class: "found-side" },
      regions.total > 0 &&
        section("Regions", count(regions.total), [
          tag(
            "ul",
            { class: "found-regions" },
            regions.regions.map((region) => regionItem(region, about)),
          ),
          regions.total > regions.regions.length &&
            tag("a", { class: "small", href: `#/?query=${encodeURIComponent(text)}` }, "All in the table"),
        ]),
      section("Tokens", plural(found.tokens.length, "token"), tokenList(found.tokens)),
    ),
    section(
      "In the texts",
      plural(found.found, "place"),
      found.contexts.length
        ? tag(
            "ol",
            { class: "contexts", "data-test": "contexts" },
            contextItems(found.contexts, about.genres, { named: true, found: text }),
          )
        : tag("p", { class: "muted" }, "It stands nowhere in the texts."),
    ),
  );
}

export function searchView(place, { about, parts, signal }) {
  const text = parts.join("/");
  const heading = tag(
    "div",
    { class: "intro" },
    tag("h1", { tabindex: "-1" }, text ? ["Search: ", tag("bdi", {}, text)] : "Search"),
  );
  const results = tag("div");
  place.append(heading, results);
  if (!text) {
    results.append(
      empty("Type a word into the field above, then Enter. It is looked for in tokens, texts and labels."),
    );
    return { title: "Search" };
  }
  const load = () =>
    Promise.all([
      get("/api/search", { query: text }, signal),
      get("/api/regions", { query: text, limit: SHOWN, sort: "share", descending: 1 }, signal),
      mapTold(signal),
    ]);
  const ready = fillWith(results, load, ([found, regions]) => render(found, regions, text, about), "Searching");
  return { title: `Search: ${text}`, ready };
}
