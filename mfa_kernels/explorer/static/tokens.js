/** Texts token by token, each a link to the region that owns it. */

import { labelOf } from "./atlas.js";
import { regionHue } from "./colors.js";
import { tag } from "./dom.js";
import { fixed } from "./format.js";
import { tip } from "./tooltip.js";

function tipLines(token, more) {
  const { component, responsibility } = token;
  return [
    labelOf(component) || `Region ${component}`,
    `Region ${component} · responsibility ${fixed(responsibility, 3)}`,
    ...(more?.(token) ?? []),
  ];
}

/**
 * Tokens in a row. The keyboard comes to the row once and moves inside of it with the arrow keys.
 * @param {{text: string, component: number, responsibility: number}[]} tokens
 * @param {object} options
 * @param {number} [options.home] tokens of this region are highlighted by their responsibility
 * @param {number} [options.at] the place of the token that it is about
 * @param {number} [options.from] where that place begins, if it is longer than a token
 * @param {(component: number) => string} [options.color] of the tokens of other regions
 * @param {(token: object) => string[]} [options.more] lines for the tooltip
 * @param {boolean} [options.breaks] whether a line ends where the text has a line end
 */
export function tokenRow(
  tokens,
  { home = null, at = -1, from = at, color = regionHue, more, breaks = false, ...attributes } = {},
) {
  const first = tokens[at]?.component >= 0 ? at : tokens.findIndex((token) => token.component >= 0);
  const nodes = tokens.map((token, i) => {
    const isOwned = token.component >= 0;
    const classes = [
      "token",
      isOwned ? (token.component === home ? "own" : "other") : "none",
      i >= from && i <= at ? "at" : "",
    ];
    const dressed = { class: classes.filter(Boolean).join(" ") };
    if (!isOwned) return tip(tag("span", dressed, token.text), [token.text, "No region: this token was not kept."]);
    dressed.href = `#/region/${token.component}`;
    dressed.tabindex = i === first ? "0" : "-1";
    dressed.style = { "--r": String(token.responsibility), "--c": color(token.component) };
    return tip(tag("a", { ...dressed, "data-component": token.component }, token.text), () => tipLines(token, more));
  });
  const row = tag("div", { class: "tokens", role: "group", "aria-label": "Tokens", ...attributes });
  // Tokens in which spaces are dots have no place at which a line could end.
  for (const [i, node] of nodes.entries()) {
    const ends = breaks && node.textContent.includes("⏎") && !nodes[i + 1]?.textContent.startsWith("⏎");
    row.append(node, document.createElement(ends ? "br" : "wbr"));
  }
  row.addEventListener("keydown", (event) => walk(row, event));
  return row;
}

function walk(row, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  const links = [...row.querySelectorAll("a")];
  const now = links.indexOf(event.target);
  const next = links[now + step];
  event.preventDefault();
  if (!next) return;
  links[now].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** A token on its own, as a chip. */
export const chip = (text, ...more) => tag("span", { class: "chip" }, tag("bdi", { class: "mono" }, text), more);
