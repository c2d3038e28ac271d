/** Histograms as SVG, with the same told in words. */

import { svg, tag } from "./dom.js";
import { count, fixed } from "./format.js";
import { tip } from "./tooltip.js";

/** A quantile of what the histogram counts, by going through its bins. */
export function quantile({ edges, counts }, share) {
  const target = share * counts.reduce((sum, one) => sum + one, 0);
  let passed = 0;
  for (let i = 0; i < counts.length; i++) {
    if (counts[i] && passed + counts[i] >= target)
      return edges[i] + ((edges[i + 1] - edges[i]) * (target - passed)) / counts[i];
    passed += counts[i];
  }
  return edges.at(-1);
}

/** What a histogram shows, as a sentence. */
export function summary(name, histogram, digits = 2) {
  const [low, middle, high] = [0.05, 0.5, 0.95].map((share) => fixed(quantile(histogram, share), digits));
  return `${name}: median ${middle}, nine in ten between ${low} and ${high}`;
}

const isFilled = (histogram) => histogram?.counts?.some((one) => one > 0);

function bars({ edges, counts }, width, height) {
  const most = Math.max(...counts);
  const [low, high] = [edges[0], edges.at(-1)];
  const x = (value) => ((value - low) / (high - low || 1)) * width;
  return counts.map((one, i) => {
    // One count among thousands is still a count: it keeps a visible bar.
    const tall = one ? Math.max(1, (one / most) * height) : 0;
    const [left, right] = [x(edges[i]), x(edges[i + 1])];
    return svg("rect", {
      class: "bar",
      x: left,
      y: height - tall,
      width: Math.max(0.5, right - left - 0.6),
      height: tall,
    });
  });
}

/** A small one without axes, for a line of text. */
export function sparkline(histogram, label) {
  if (!isFilled(histogram)) return null;
  return svg(
    "svg",
    { class: "sparkline", viewBox: "0 0 96 22", preserveAspectRatio: "none", role: "img", "aria-label": label },
    bars(histogram, 96, 22),
  );
}

/**
 * A histogram with its axis and a summary in words under it.
 * @param {string} name
 * @param {{edges: number[], counts: number[]}} histogram
 * @param {{digits?: number, marks?: number[]}} options values to mark on the axis
 */
export function histogramFigure(name, histogram, { digits = 2, marks = [] } = {}) {
  if (!isFilled(histogram)) return tag("p", { class: "muted" }, `${name}: nothing to count.`);
  const [width, height] = [320, 84];
  const { edges, counts } = histogram;
  const text = summary(name, histogram, digits);
  const x = (value) => ((value - edges[0]) / (edges.at(-1) - edges[0] || 1)) * width;
  const hits = counts.map((one, i) => {
    const bin = svg("rect", { class: "bar-hit", x: x(edges[i]), y: 0, width: x(edges[i + 1]) - x(edges[i]), height });
    return tip(bin, [
      `${count(one)} of ${count(counts.reduce((sum, c) => sum + c, 0))}`,
      `${fixed(edges[i], digits)} to ${fixed(edges[i + 1], digits)}`,
    ]);
  });
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": text },
    bars(histogram, width, height),
    marks
      .filter((value) => value >= edges[0] && value <= edges.at(-1))
      .map((value) => svg("line", { class: "mark-line", x1: x(value), x2: x(value), y1: 0, y2: height })),
    hits,
  );
  const middle = (edges[0] + edges.at(-1)) / 2;
  const axis = [edges[0], middle, edges.at(-1)].map((value) => tag("span", {}, fixed(value, digits)));
  return tag(
    "figure",
    { class: "histogram" },
    picture,
    tag("div", { class: "axis", "aria-hidden": "true" }, axis),
    tag("figcaption", {}, text),
  );
}
