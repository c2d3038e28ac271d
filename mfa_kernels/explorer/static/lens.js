/** The logit lens: which next tokens a point or a direction makes more and less likely. */

import { tag } from "./dom.js";
import { signed } from "./format.js";

function column(title, changes, most, className) {
  const rows = changes.map(({ token, change }) =>
    tag(
      "li",
      { class: "lens-row" },
      tag("bdi", { class: "mono lens-token" }, token),
      tag("span", {
        class: "lens-bar",
        "aria-hidden": "true",
        style: { width: `${(100 * Math.abs(change)) / most}%` },
      }),
      tag("span", { class: "lens-change" }, signed(change)),
    ),
  );
  const body = rows.length ? tag("ol", {}, rows) : tag("p", { class: "muted" }, "none");
  return tag("div", { class: `lens-column ${className}` }, tag("p", { class: "lens-title" }, title), body);
}

/** @param {{raised: {token: string, change: number}[], lowered: object[]}} lens changes in nats */
export function lensFigure({ raised, lowered }) {
  const most = Math.max(1e-9, ...[...raised, ...lowered].map(({ change }) => Math.abs(change)));
  return tag(
    "div",
    { class: "lens" },
    column("Raised", raised, most, "raised"),
    column("Lowered", lowered, most, "lowered"),
  );
}
