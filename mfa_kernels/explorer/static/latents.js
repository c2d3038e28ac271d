/** The latents of a region: how it varies inside, each with contexts at its quantiles, asked for when opened. */

import { get, regionPath } from "./api.js";
import { tag } from "./dom.js";
import { fixed, percent } from "./format.js";
import { contextItems } from "./contexts.js";
import { histogramFigure, sparkline, summary } from "./histogram.js";
import { lensFigure } from "./lens.js";
import { empty, fillWith } from "./states.js";

function quantileBlock({ quantile, value, contexts }, genres) {
  const named =
    { 0: "the lowest", 0.5: "the median", 1: "the highest" }[quantile] ?? `the ${percent(quantile)} quantile`;
  return tag(
    "section",
    { class: "quantile" },
    tag("h3", {}, `z = ${fixed(value)}`, tag("span", { class: "muted" }, ` ${named}`)),
    contexts.length
      ? tag("ol", { class: "contexts" }, contextItems(contexts, genres))
      : tag("p", { class: "muted" }, "No contexts."),
  );
}

function inside(answer, about) {
  const lens = answer.lens && [
    tag("h3", {}, "Next tokens at z = +1 less those at z = −1, in nats"),
    lensFigure(answer.lens),
  ];
  return [lens, answer.quantiles.map((one) => quantileBlock(one, about.genres))];
}

function latentItem(component, latent, longest, about, signal) {
  const name = `Latent ${latent.axis}`;
  const place = tag("div", { class: "latent-more" });
  const head = tag(
    "summary",
    {},
    tag("span", { class: "latent-name" }, name),
    tag("span", { class: "latent-length" }, `length ${fixed(latent.length)}`),
    tag(
      "span",
      { class: "length-bar", "aria-hidden": "true" },
      tag("span", { style: { width: `${(100 * latent.length) / longest}%` } }),
    ),
    sparkline(latent.histogram, summary(name, latent.histogram)),
  );
  let isAsked = false;
  const ontoggle = (event) => {
    if (!event.target.open || isAsked) return;
    isAsked = true;
    const load = () => get(`${regionPath(component)}/latents/${latent.axis}`, {}, signal);
    fillWith(place, load, (answer) => inside(answer, about), "Contexts at the quantiles");
  };
  const figure = histogramFigure(name, latent.histogram, { marks: [0, latent.low, latent.high] });
  return tag("details", { class: "latent", ontoggle }, head, figure, place);
}

export function latentList(region, about, signal) {
  if (!region.latents.length) return empty("This region has no latents to show.");
  const longest = Math.max(...region.latents.map((latent) => latent.length)) || 1;
  return tag(
    "div",
    { class: "latents" },
    region.latents.map((latent) => latentItem(region.component, latent, longest, about, signal)),
  );
}
