/** The first view: the map of all regions and their table, side by side. */

import { get, regionPath } from "./api.js";
import { followMap } from "./atlas.js";
import { debounce, fill, select, tag } from "./dom.js";
import { count, fixed, plural } from "./format.js";
import { around, RegionMap } from "./map.js";
import { drawLegend, MODES } from "./map_classes.js";
import { componentIn, setQuery } from "./routes.js";
import { failure, loading } from "./states.js";
import { regionTable } from "./table.js";

const open = (component) => (location.hash = `#/region/${component}`);
const SORTS = ["share", "component", "entropy", "distinct", "purity", "responsibility", "label", "genre"];

/** What dots are coloured by, for the next time that the map is shown. */
let colored = null;

function facts(about) {
  const parts = [
    [
      count(about.owned),
      about.owned === about.n_components ? "regions" : `of ${count(about.n_components)} regions own tokens`,
    ],
    [count(about.rows), "tokens"],
    [count(about.documents), "documents"],
    [String(about.rank), "latents a region"],
    [fixed(about.mean_responsibility, 3), "mean responsibility"],
  ];
  const layer = about.layer !== null && `layer ${/\d+$/.exec(about.layer)?.[0] ?? about.layer}`;
  const where = [about.model, layer].filter(Boolean).join(", ");
  return tag(
    "div",
    { class: "intro" },
    tag("h1", { tabindex: "-1" }, about.title || "Regions"),
    tag(
      "p",
      { class: "facts" },
      where && tag("span", {}, tag("b", {}, where)),
      parts.map(([value, name]) => tag("span", {}, tag("b", {}, value), ` ${name}`)),
    ),
  );
}

/**
 * The map with its legend.
 * @param {{focused: number|null, genre: () => number, ongenre: (genre: number) => void}} shared `genre` is the one that
 *   the table shows, -1 for all; `ongenre` is told when the legend chooses another
 */
function mapPanel(about, signal, { focused, genre, ongenre }) {
  const stage = tag("div", { class: "map-stage" });
  const legend = tag("div", {
    class: "legend",
    "data-test": "legend",
    role: "group",
    "aria-label": "Legend: choose what is shown",
  });
  const layout = tag("span", { class: "muted map-layout" });
  const wait = tag("div", { class: "map-wait" }, loading("The map"));
  const map = new RegionMap(stage, about, signal, { onopen: open });
  if (colored) map.mode = colored;
  stage.append(wait);

  function show(shown) {
    map.setShown(shown);
    drawLegend(legend, map.classes, shown, { ontoggle: toggle, onhover: (i) => map.light(i) });
  }
  function toggle(i) {
    const shown = new Set(map.shown);
    if (i < 0) shown.clear();
    else if (!shown.delete(i)) shown.add(i);
    show(shown);
    if (map.mode === "genre") ongenre(shown.size === 1 ? [...shown][0] : -1);
  }
  const showGenre = () => map.classes && map.mode === "genre" && show(new Set(genre() < 0 ? [] : [genre()]));

  const modes = MODES.filter(([mode]) => mode !== "genre" || about.genres.length);
  const chooser = select("Colour by", modes, map.mode, (mode) => {
    colored = mode;
    map.setMode(mode);
    if (!map.classes) return;
    show(new Set());
    showGenre();
  });
  // The map is good without it, so an error here is none to tell of.
  const showAround = (component) =>
    get(regionPath(component), {}, signal).then(
      (region) => map.setFocus(around(region)),
      () => {},
    );
  const took = (data) => {
    const isFirst = !map.map;
    const shown = map.shown;
    wait.remove();
    map.setMap(data);
    show(shown);
    fill(layout, data.is_final ? data.layout : `${data.layout}, getting better`);
    if (!isFirst) return;
    showGenre();
    if (focused === null) return;
    map.setFocus({ component: focused });
    map.lookAt(focused, 4);
    showAround(focused);
  };
  followMap(took, signal, (error) => fill(wait, failure(error)));
  const bar = tag("div", { class: "panel-bar" }, chooser, layout);
  return {
    map,
    showGenre,
    node: tag("section", { class: "panel map-panel", "aria-label": "Map" }, bar, stage, legend),
  };
}

export function homeView(place, { about, query, signal }) {
  const state = {
    sort: SORTS.includes(query.get("sort")) ? query.get("sort") : "share",
    descending: query.get("descending") !== "0",
    genre: about.genres[query.get("genre")] === undefined ? "" : query.get("genre"),
    query: query.get("query") ?? "",
  };
  const focused = componentIn(query.get("region"));
  const store = () =>
    setQuery("#/", {
      sort: state.sort === "share" ? "" : state.sort,
      descending: state.descending ? "" : "0",
      genre: state.genre,
      query: state.query,
      region: focused ?? "",
    });

  const total = tag("span", { class: "muted table-total", "aria-live": "polite" });
  const box = tag("div", { class: "table-box" });
  const filter = tag("input", {
    type: "search",
    placeholder: "Filter by label, token or number",
    "aria-label": "Filter the regions by label, token or number",
    value: state.query,
    spellcheck: "false",
    oninput: debounce(() => {
      if (signal.aborted) return;
      state.query = filter.value.trim();
      changed();
    }, 250),
  });
  const genreSelect = about.genres.length
    ? select("Genre", [["", "all"], ...about.genres.map((name, i) => [i, name])], state.genre, (genre) => {
        state.genre = genre;
        panel.showGenre();
        changed();
      })
    : null;
  const panel = mapPanel(about, signal, {
    focused,
    genre: () => (state.genre === "" ? -1 : Number(state.genre)),
    ongenre: (genre) => {
      const chosen = about.genres[genre] === undefined ? "" : String(genre);
      if (chosen === state.genre) return;
      state.genre = chosen;
      genreSelect.querySelector("select").value = chosen;
      changed();
    },
  });
  let reload = () => {};
  function changed() {
    store();
    reload();
  }

  const tablePanel = tag(
    "section",
    { class: "panel table-panel", "aria-label": "Table" },
    tag("div", { class: "panel-bar" }, filter, genreSelect, total),
    box,
  );
  const chosen =
    focused === null
      ? null
      : tag(
          "p",
          { class: "chosen" },
          "Region ",
          tag("a", { href: `#/region/${focused}` }, String(focused)),
          " is marked on the map.",
        );
  fill(place, tag("div", { class: "home" }, facts(about), chosen, panel.node, tablePanel));
  reload = regionTable(box, about, signal, state, {
    onsort: store,
    onrows: (regions, of) => {
      fill(total, plural(of, "region"));
      panel.map.setMarked(state.query ? regions.map((region) => region.component) : []);
    },
    onpoint: (component) => panel.map.point(component),
  });
  return { title: "Map", wide: true };
}
