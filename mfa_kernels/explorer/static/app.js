/** The page: shows the view that the address names, and takes care of what is around it. */

import { loadAbout } from "./atlas.js";
import { fill, tag } from "./dom.js";
import { homeView } from "./home.js";
import { startKeyboard } from "./keyboard.js";
import { playgroundView } from "./playground.js";
import { regionView } from "./region.js";
import { parseRoute, searchHash } from "./routes.js";
import { searchView } from "./search.js";
import { empty, failure, loading, say } from "./states.js";
import { textView } from "./text.js";
import { startTheme } from "./theme.js";
import { hideTip, startTooltips } from "./tooltip.js";
import { topicsView } from "./topics.js";

const VIEWS = {
  "": homeView,
  topics: topicsView,
  search: searchView,
  region: regionView,
  text: textView,
  steer: playgroundView,
};

const main = document.getElementById("main");
const field = document.getElementById("search");
const heights = new Map();
let leaving = new AbortController();
let shown = { place: null, keys: {} };

function unknownView(place) {
  place.append(empty("There is no such page.", tag("p", {}, tag("a", { href: "#/" }, "To the map"))));
  return { title: "No such page" };
}

function dressHeader(about, route) {
  document.getElementById("brand").textContent = about.title || "Regions";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === route.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  field.value = route.view === "search" ? route.parts.join("/") : "";
}

/** Shows the view of the address. An entry of the history that was shown before has a place: the page scrolls there. */
async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const isFirst = shown.place === null;
  const place = history.state?.place ?? Date.now();
  const height = heights.get(place) ?? 0;
  history.replaceState({ place }, "");
  shown = { place, keys: {} };
  hideTip();
  say("");
  fill(main, loading());
  let about;
  try {
    about = await loadAbout();
  } catch (error) {
    if (!signal.aborted) fill(main, failure(error, show));
    return;
  }
  if (signal.aborted) return;
  const route = parseRoute(location.hash);
  dressHeader(about, route);
  fill(main);
  main.dataset.view = route.view || "home";
  const view = (Object.hasOwn(VIEWS, route.view) ? VIEWS[route.view] : unknownView)(main, { ...route, about, signal });
  shown.keys = view.keys ?? {};
  document.title = `${view.title} · ${about.title || "Regions"}`;
  scrollTo(0, 0);
  await view.ready;
  if (signal.aborted) return;
  // Who reads by ear is told of the new view by its heading; on the first one the browser reads the page itself.
  if (!isFirst && (document.activeElement === document.body || !document.activeElement)) {
    (main.querySelector("h1") ?? main).focus({ preventScroll: true });
  }
  if (height) scrollTo(0, height);
}

addEventListener("hashchange", show);
addEventListener("scroll", () => heights.set(shown.place, scrollY), { passive: true });

document.getElementById("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!field.value.trim()) return;
  location.hash = searchHash(field.value.trim());
  field.blur();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  // The address names a view, so the link must not change it.
  event.preventDefault();
  main.focus();
});

history.scrollRestoration = "manual";
startTheme(document.getElementById("theme"));
startTooltips();
startKeyboard(document.getElementById("help-button"), field, () => shown.keys);
show();
