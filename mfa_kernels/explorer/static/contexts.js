/** Contexts: places in the texts, with the token that they are about in the middle. */

import { get, regionPath } from "./api.js";
import { labelOf } from "./atlas.js";
import { hue } from "./colors.js";
import { button, fill, select, tag } from "./dom.js";
import { count, fixed, plural } from "./format.js";
import { empty, failure, isAbort, loading } from "./states.js";
import { tokenRow } from "./tokens.js";
import { tip } from "./tooltip.js";

/** Contexts shown at first, so that what comes below them is found. */
const FIRST = 8;
const PAGE = 20;
const ORDERS = [
  ["responsibility", "most responsible"],
  ["distance", "farthest from the centroid"],
  ["spread", "at random"],
];

export function genreBadge(genre, genres) {
  if (genres[genre] === undefined) return null;
  const swatch = tag("span", { class: "swatch", "aria-hidden": "true" });
  return tag("span", { class: "badge", style: { "--c": hue(genre) } }, swatch, genres[genre]);
}

/** Where a text that ends at a context's place begins: the last token from which on it is all there. */
function beginning({ tokens, at }, text) {
  let read = "";
  for (let i = at; i >= 0; i--) {
    read = tokens[i].text + read;
    if (read.toLowerCase().includes(text.toLowerCase())) return i;
  }
  return at;
}

/**
 * One context.
 * @param {object} context as the server sends it
 * @param {string[]} genres
 * @param {{named?: boolean, found?: string}} options `named` tells the region too, where contexts of several are shown
 *   together; `found` is the text that was looked for and ends at the context's place
 */
export function contextCard(context, genres, { named = false, found = "" } = {}) {
  const facts = [
    Number.isFinite(context.score) && [`z ${fixed(context.score)}`, "The latent at this token"],
    Number.isFinite(context.responsibility) && [
      `r ${fixed(context.responsibility, 3)}`,
      "Responsibility of the region for this token",
    ],
    Number.isFinite(context.distance) && [
      `d ${fixed(context.distance, 1)}`,
      "Mahalanobis distance of this token to the centroid",
    ],
  ].filter(Boolean);
  const region =
    named && context.component >= 0
      ? tag(
          "a",
          { href: `#/region/${context.component}`, class: "context-region" },
          tag("bdi", {}, labelOf(context.component) || `region ${context.component}`),
        )
      : null;
  return tag(
    "li",
    { class: "context", "data-test": "context" },
    tag(
      "div",
      { class: "context-head" },
      genreBadge(context.genre, genres),
      tag("bdi", { class: "document" }, context.document),
      region,
      context.folded > 0 && tag("span", { class: "folded" }, `+${plural(context.folded, "near copy", "near copies")}`),
      tag(
        "span",
        { class: "context-facts" },
        facts.map(([text, means]) => tip(tag("span", {}, text), [text, means])),
      ),
    ),
    tokenRow(context.tokens, {
      home: context.component,
      at: context.at,
      from: beginning(context, found),
      "aria-label": `Tokens in ${context.document}`,
    }),
  );
}

export const contextItems = (contexts, genres, options) =>
  contexts.map((context) => contextCard(context, genres, options));

/** The contexts of a region, with a choice of order and a button for more. */
export function regionContexts(component, about, first, signal) {
  const list = tag("ol", { class: "contexts", "data-test": "contexts" });
  const foot = tag("div", { class: "contexts-foot" });
  const seen = new Set();
  let by = "responsibility";
  let offset = 0;
  let asked = 0;

  function add(contexts) {
    // The server pages by places of its list; the few that came with the region are its first ones.
    const fresh = contexts.filter((context) => !seen.has(context.row));
    for (const context of fresh) seen.add(context.row);
    offset += contexts.length;
    list.append(...contextItems(fresh, about.genres));
  }
  const moreButton = () => button("More contexts", more, { class: "wide" });

  async function more() {
    const mine = ++asked;
    fill(foot, loading("Contexts"));
    try {
      const answer = await get(`${regionPath(component)}/contexts`, { offset, limit: PAGE, by }, signal);
      if (mine !== asked) return;
      const before = list.children.length;
      add(answer.contexts);
      const rest = answer.total - offset;
      fill(
        foot,
        rest > 0 && answer.contexts.length
          ? [moreButton(), tag("span", { class: "muted" }, `${count(rest)} more`)]
          : null,
      );
      if (!list.children.length) fill(foot, empty("No contexts."));
      else if (before) list.children[before]?.querySelector("a")?.focus({ preventScroll: true });
    } catch (error) {
      if (!isAbort(error) && mine === asked) fill(foot, failure(error, more));
    }
  }

  const order = select("Order", ORDERS, by, (chosen) => {
    by = chosen;
    offset = 0;
    seen.clear();
    fill(list);
    more();
  });
  add(first.slice(0, FIRST));
  fill(foot, first.length ? moreButton() : empty("No contexts: this region owns no tokens."));
  return { order, nodes: [list, foot] };
}
