/** The table of all regions: it asks the server for the rows that are looked at, sorted and filtered there. */

import { get } from "./api.js";
import { rememberTokens } from "./atlas.js";
import { hue } from "./colors.js";
import { fill, svg, tag } from "./dom.js";
import { count, fixed, percent } from "./format.js";
import { empty, failure, isAbort, loading } from "./states.js";
import { tip } from "./tooltip.js";

const PAGE = 100;
const SHAPES = {
  ascending: "M2 8 6 3l4 5z",
  descending: "M2 4l4 5 4-5z",
  none: "M2.5 5 6 1.5 9.5 5zM2.5 7 6 10.5 9.5 7z",
};

const COLUMNS = [
  { name: "Region", sort: "label", help: "Its label, or the tokens that set it apart; its number", cell: labelCell },
  { name: "Share", sort: "share", number: true, help: "Share of all tokens that this region owns", cell: shareCell },
  { name: "Tokens", sort: "share", number: true, help: "How many tokens it owns", cell: (r) => count(r.rows) },
  {
    name: "Genre",
    sort: "genre",
    help: "The genre that most of its tokens come from",
    cell: genreCell,
    needs: "genres",
  },
  {
    name: "Purity",
    sort: "purity",
    number: true,
    help: "Share of its tokens in that genre",
    cell: (r) => percent(r.purity),
    needs: "genres",
  },
  {
    name: "Entropy",
    sort: "entropy",
    number: true,
    help: "Entropy of its tokens, in nats: 0 where all are the same",
    cell: (r) => fixed(r.entropy),
  },
  {
    name: "Distinct",
    sort: "distinct",
    number: true,
    help: "How many different tokens it owns",
    cell: (r) => count(r.distinct),
  },
  {
    name: "Resp.",
    sort: "responsibility",
    number: true,
    help: "Mean responsibility for its tokens",
    cell: (r) => fixed(r.responsibility, 3),
  },
];

function labelCell(region) {
  return tag(
    "a",
    { href: `#/region/${region.component}`, tabindex: "-1", class: "row-link" },
    tag("bdi", { class: region.named ? "row-label" : "row-label token-label" }, region.label || "no tokens"),
    tag("span", { class: "row-number" }, String(region.component)),
  );
}

function shareCell(region, most) {
  const width = `${Math.max(2, (100 * region.share) / (most || 1))}%`;
  return [percent(region.share), tag("span", { class: "share-bar", "aria-hidden": "true", style: { width } })];
}

function genreCell(region, most, genres) {
  if (region.genre < 0) return tag("span", { class: "muted" }, "–");
  const swatch = tag("span", { class: "swatch", "aria-hidden": "true" });
  return tag("span", { class: "genre", style: { "--c": hue(region.genre) } }, swatch, genres[region.genre]);
}

/**
 * @param {HTMLElement} place the box that the table fills and in which it scrolls
 * @param {object} about
 * @param {AbortSignal} signal
 * @param {{sort: string, descending: boolean, genre: string, query: string}} state
 * @param {object} acts `onsort()`, `onrows(regions, total)` with all rows there are so far, and `onpoint(component)`
 *   with null where no row is pointed at
 * @returns {() => void} reads the state anew and asks the server again
 */
export function regionTable(place, about, signal, state, { onsort, onrows, onpoint }) {
  const columns = COLUMNS.filter((column) => column.needs !== "genres" || about.genres.length);
  const body = tag("tbody");
  const foot = tag("div", { class: "table-foot" });
  const heads = columns.map((column) => headCell(column));
  const table = tag(
    "table",
    { class: "regions", "data-test": "region-table" },
    tag("caption", { class: "unseen" }, "Regions. Arrow keys choose a row, Enter opens it."),
    tag(
      "thead",
      {},
      tag(
        "tr",
        {},
        heads.map((head) => head.node),
      ),
    ),
    body,
  );
  fill(place, table, foot);

  let shown = [];
  let total = 0;
  let most = 0;
  let asking = null;

  function headCell(column) {
    const icon = svg("path", { d: SHAPES.none });
    const arrow = svg(
      "svg",
      { viewBox: "0 0 12 12", width: "10", height: "10", class: "sort-icon", "aria-hidden": "true" },
      icon,
    );
    const press = () => {
      state.descending = state.sort === column.sort ? !state.descending : column.sort !== "label";
      state.sort = column.sort;
      onsort();
      reload();
    };
    const inside = column.sort
      ? tag("button", { type: "button", class: "sort", onclick: press }, column.name, arrow)
      : column.name;
    const node = tip(tag("th", { scope: "col", class: column.number ? "number" : null }, inside), [
      column.name,
      column.help,
    ]);
    return { column, node, icon };
  }

  function markSorted() {
    for (const { column, node, icon } of heads) {
      if (!column.sort) continue;
      const order = column.sort !== state.sort ? "none" : state.descending ? "descending" : "ascending";
      node.setAttribute("aria-sort", order);
      icon.setAttribute("d", SHAPES[order]);
    }
  }

  function rowOf(region) {
    const cells = columns.map((column) =>
      tag("td", { class: column.number ? "number" : null }, column.cell(region, most, about.genres)),
    );
    const tokens = (region.tokens ?? []).slice(0, 8).join("  ");
    tip(cells[0], [region.label || "no tokens", tokens]);
    return tag("tr", { tabindex: "-1", "data-test": "region-row", "data-component": region.component }, cells);
  }

  async function more() {
    if (asking || (shown.length && shown.length >= total)) return;
    const mine = new AbortController();
    const stop = () => mine.abort();
    signal.addEventListener("abort", stop);
    asking = mine;
    fill(foot, loading(shown.length ? "More regions" : "Regions"));
    const { sort, query, genre } = state;
    const asked = { sort, descending: Number(state.descending), offset: shown.length, limit: PAGE, genre, query };
    try {
      const answer = await get("/api/regions", asked, mine.signal);
      total = answer.total;
      rememberTokens(answer.regions);
      most ||= Math.max(0, ...answer.regions.map((region) => region.share));
      const rows = answer.regions.map(rowOf);
      if (!shown.length && rows.length) rows[0].tabIndex = 0;
      shown = shown.concat(answer.regions);
      body.append(...rows);
      if (!shown.length) fill(foot, empty("No region is like this."));
      else fill(foot, shown.length < total ? sentinel() : null);
      // An answer without rows would be asked for again and again.
      if (!answer.regions.length) total = shown.length;
      onrows(shown, total);
    } catch (error) {
      if (!isAbort(error))
        fill(
          foot,
          failure(error, () => more()),
        );
    } finally {
      signal.removeEventListener("abort", stop);
      if (asking === mine) asking = null;
    }
  }

  function sentinel() {
    const node = tag("p", { class: "muted more" }, `${count(total - shown.length)} more`);
    observer.observe(node);
    return node;
  }

  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    more();
  });
  signal.addEventListener("abort", () => observer.disconnect());

  function reload() {
    asking?.abort();
    asking = null;
    observer.disconnect();
    [shown, total, most] = [[], 0, 0];
    fill(body);
    place.scrollTop = 0;
    markSorted();
    more();
  }

  listenToRows(body, onpoint, more);
  reload();
  return reload;
}

const componentOf = (row) => Number(row.dataset.component);

function listenToRows(body, onpoint, more) {
  const rowAt = (event) => event.target.closest("tr");
  body.addEventListener("click", (event) => {
    // The link in a row answers itself, with whatever key is held to open it elsewhere.
    if (!event.target.closest("a") && rowAt(event)) location.hash = `#/region/${componentOf(rowAt(event))}`;
  });
  body.addEventListener("pointerover", (event) => rowAt(event) && onpoint(componentOf(rowAt(event))));
  body.addEventListener("pointerleave", () => onpoint(null));
  body.addEventListener("focusin", (event) => {
    for (const row of body.querySelectorAll('tr[tabindex="0"]')) row.tabIndex = -1;
    rowAt(event).tabIndex = 0;
    onpoint(componentOf(rowAt(event)));
  });
  body.addEventListener("focusout", () => onpoint(null));
  body.addEventListener("keydown", (event) => {
    const row = rowAt(event);
    const rows = [...body.rows];
    const at = rows.indexOf(row);
    const to = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + 10,
      PageUp: at - 10,
      Home: 0,
      End: rows.length - 1,
    }[event.key];
    if (event.key === "Enter" && event.target === row) location.hash = `#/region/${componentOf(row)}`;
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    rows[Math.max(0, Math.min(rows.length - 1, to))].focus();
    if (to >= rows.length - 1) more();
  });
}
