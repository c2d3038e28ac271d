/** The playground: steered text as the model writes it, beside what it writes by itself. */

import { get, regionPath } from "./api.js";
import { regionChooser } from "./chooser.js";
import { controls } from "./controls.js";
import { genreBadge } from "./contexts.js";
import { button, fill, tag } from "./dom.js";
import { fixed, percent, plural } from "./format.js";
import { componentIn, setQuery } from "./routes.js";
import { slider } from "./slider.js";
import { empty, failure, fillWith, say } from "./states.js";
import { chip } from "./tokens.js";
import { Pane, Run } from "./writer.js";

const STEP = 0.05;
/** Latents shown at once: those along which the region extends most. */
const FIRST = 4;

const isNarrow = matchMedia("(max-width: 1020px)");

/** The settings stay while other views are looked at. */
const state = {
  prompt: "",
  component: null,
  genre: null,
  mode: "toward",
  alpha: 0.3,
  latents: {},
  temperature: 0.7,
  seed: 1,
  newTokens: 80,
  compare: true,
};

const isSet = () => Object.fromEntries(Object.entries(state.latents).filter(([, value]) => value !== 0));

function bodyOf(plain) {
  const { prompt, temperature, seed, newTokens, component, genre, mode, alpha } = state;
  const common = { prompt, temperature, seed, new_tokens: newTokens, plain };
  return plain
    ? { ...common, component: null, mode, alpha: 0, latents: {} }
    : genre === null
      ? { ...common, component, mode, alpha, latents: isSet() }
      : { ...common, genre, alpha };
}

/** Sliders of the latents, from what is low to what is high in this region. */
function latentSliders(region, onchange) {
  const made = region.latents.map(({ axis, length, low, high }) => {
    const [min, max] = [Math.floor(Math.min(low, 0) / STEP) * STEP, Math.ceil(Math.max(high, 0) / STEP) * STEP];
    return slider({
      name: `Latent ${axis}`,
      help: `Length ${fixed(length)}; nine in ten tokens of the region lie between ${fixed(low)} and ${fixed(high)}`,
      min,
      max: max > min ? max : min + STEP,
      step: STEP,
      value: state.latents[axis] ?? 0,
      oninput: (value) => {
        state.latents[axis] = value;
        onchange({ latents: { ...state.latents }, note: `z${axis} ${fixed(value)}` });
      },
    });
  });
  const zero = () => {
    for (const axis of Object.keys(state.latents)) state.latents[axis] = 0;
    for (const one of made) one.set(0);
    onchange({ latents: { ...state.latents }, note: "z 0" });
  };
  const head = tag(
    "div",
    { class: "panel-title" },
    tag("h2", { class: "setting" }, "Latents"),
    made.length > 0 && button("All to 0", zero, { class: "quiet" }),
  );
  if (!made.length) return [head, tag("p", { class: "muted" }, "This region has no latents.")];
  const nodes = made.map((one) => one.node);
  const rest = nodes.slice(FIRST);
  return [
    head,
    nodes.slice(0, FIRST),
    rest.length > 0 &&
      tag("details", { class: "rest" }, tag("summary", {}, `${plural(rest.length, "shorter latent")}`), rest),
  ];
}

function regionCard(region, about) {
  return tag(
    "div",
    { class: "chosen-region" },
    tag(
      "p",
      {},
      tag("a", { href: `#/region/${region.component}` }, tag("bdi", {}, region.label || `Region ${region.component}`)),
      tag("span", { class: "muted" }, ` ${region.component} · ${percent(region.share)} `),
      genreBadge(region.genre, about.genres),
    ),
    tag(
      "div",
      { class: "chips" },
      region.tokens.slice(0, 8).map((token) => chip(token)),
    ),
  );
}

/** The set of regions that stand for a genre: all of them are added at once, each by its weight. */
function topicCard(topic, about) {
  const most = topic.regions[0]?.weight || 1;
  const items = topic.regions.slice(0, 8).map(({ component, label, weight }) =>
    tag(
      "li",
      {},
      tag("a", { href: `#/region/${component}` }, tag("bdi", {}, label || `region ${component}`)),
      tag(
        "span",
        { class: "distance-bar", "aria-hidden": "true" },
        tag("span", { style: { width: `${(100 * weight) / most}%` } }),
      ),
      tag("span", { class: "number" }, percent(weight)),
    ),
  );
  return tag(
    "div",
    { class: "chosen-region" },
    tag("p", {}, genreBadge(topic.genre, about.genres), ` ${plural(topic.n_regions, "region")} together, by weight:`),
    tag("ol", { class: "neighbors" }, items),
  );
}

/** Takes what the address names, a region or a genre, into the settings. */
function takeRoute(parts, about) {
  const genre = parts[0] === "genre" ? componentIn(parts[1]) : null;
  if (genre !== null && about.genres[genre] !== undefined) {
    if (state.genre !== genre) Object.assign(state, { genre, component: null, latents: {}, mode: "add", alpha: 1.5 });
    return;
  }
  const component = componentIn(parts[0]);
  if (state.genre !== null) Object.assign(state, { genre: null, mode: "toward", alpha: 0.3 });
  if (component !== null && component !== state.component) Object.assign(state, { component, latents: {} });
}

export function playgroundView(place, { about, parts, signal }) {
  const heading = tag(
    "div",
    { class: "intro" },
    tag("h1", { tabindex: "-1" }, "Playground"),
    tag(
      "p",
      { class: "muted" },
      "The model goes on with your prompt while its activations are pulled toward a region.",
    ),
  );
  place.append(heading);
  if (!about.can_steer) {
    place.append(
      empty("No model is loaded, so there is nothing to steer: start the explorer with --model."),
    );
    return { title: "Playground" };
  }
  takeRoute(parts, about);
  state.prompt ||= about.examples[0] ?? "";

  const steered = new Pane("Steered", "steered-text", "What the model writes when it is steered comes here.");
  const plain = new Pane("Not steered", "plain-text", "And here, what it writes by itself with the same seed.");
  const details = tag("div", { class: "chosen-place" });
  const latents = tag("div", { class: "sliders" });
  const problem = tag("div");
  let run = null;
  let isWriting = false;
  let plainOf = "";

  const change = (fields) => run?.pane === steered && run.change(fields);
  const chooser = regionChooser(signal, (region) => {
    if (state.genre !== null) return void (location.hash = `#/steer/${region.component}`);
    Object.assign(state, { component: region.component, latents: {} });
    setQuery(`#/steer/${region.component}`, {});
    change({ component: region.component, latents: {}, note: `region ${region.component}` });
    showRegion();
  });

  function showTopic() {
    const { genre } = state;
    chooser.show(`All of ${about.genres[genre]}`);
    return fillWith(
      details,
      () => get(`/api/topics/${genre}`, {}, signal),
      (topic) => topicCard(topic, about),
      `Topic ${about.genres[genre]}`,
    );
  }
  function showRegion() {
    const chosen = state.component;
    fill(latents);
    if (state.genre !== null) return showTopic();
    if (chosen === null)
      return fill(details, tag("p", { class: "muted" }, "No region yet: choose one, or write without steering."));
    chooser.show(`Region ${chosen}`);
    return fillWith(
      details,
      () => get(regionPath(chosen), {}, signal),
      (region) => {
        if (chosen !== state.component) return [];
        chooser.show(region.label || `Region ${chosen}`);
        fill(latents, latentSliders(region, change));
        return regionCard(region, about);
      },
      `Region ${chosen}`,
    );
  }

  async function start(pane, isPlain) {
    run = new Run(pane, signal);
    // Where settings and texts stand one below the other, the text would be written out of sight.
    if (isNarrow.matches) pane.node.scrollIntoView({ block: "nearest" });
    return run.write(bodyOf(isPlain));
  }
  async function write() {
    if (isWriting) return;
    fill(problem);
    if (!state.prompt.trim())
      return fill(problem, failure(new Error("The prompt is empty: write something to go on with.")));
    isWriting = true;
    board.setWriting(true);
    say("Writing");
    const { prompt, temperature, seed, newTokens } = state;
    const key = JSON.stringify([prompt, temperature, seed, newTokens]);
    const steer = state.component !== null || state.genre !== null;
    let goOn = true;
    if ((state.compare && plainOf !== key) || !steer) {
      plainOf = "";
      goOn = await start(plain, true);
      // The same prompt and seed give the same text: it need not be written twice.
      if (goOn && !board.isStopped() && !signal.aborted) plainOf = key;
    }
    if (goOn && steer && !board.isStopped() && !signal.aborted) await start(steered, false);
    run = null;
    isWriting = false;
    board.setWriting(false);
    if (!signal.aborted) say("Done writing");
  }
  const board = controls(about, state, { write, stop: () => run?.stop(), change });

  place.append(
    tag(
      "div",
      { class: "playground" },
      tag(
        "section",
        { class: "panel padded controls", "aria-label": "Settings" },
        board.prompt,
        tag("h2", { class: "setting" }, "Region"),
        chooser.node,
        details,
        board.strength,
        latents,
        board.sampling,
        board.acts,
        problem,
      ),
      tag("div", { class: "panes" }, steered.node, plain.node),
    ),
  );
  return { title: "Playground", ready: showRegion() };
}
