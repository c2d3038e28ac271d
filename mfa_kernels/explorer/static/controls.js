/** The settings of the playground: prompt, strength, sampling, and the buttons that write and stop. */

import { button, fill, tag } from "./dom.js";
import { fixed } from "./format.js";
import { slider } from "./slider.js";

const MODES = [
  ["toward", "Toward", "Moves every activation part of the way to the region's centroid: 1 replaces it."],
  ["add", "Add", "Adds the way from the mean of all regions to this one's centroid, this many times."],
];
const RANGES = {
  toward: { min: 0, max: 1, step: 0.01 },
  add: { min: -2, max: 2, step: 0.02 },
  // Of a set of regions, most of which are weak, it takes more than of one.
  genre: { min: -1, max: 4, step: 0.05 },
};

function numberField(name, state, key, { min, max }) {
  const input = tag("input", {
    type: "number",
    min: String(min),
    max: String(max),
    step: "1",
    value: String(state[key]),
    onchange: () => {
      const value = Math.round(Number(input.value));
      state[key] = Number.isFinite(value) ? Math.min(max, Math.max(min, value)) : state[key];
      input.value = String(state[key]);
    },
  });
  return tag("label", { class: "field" }, tag("span", { class: "field-name" }, name), input);
}

function promptPart(about, state, write) {
  const area = tag("textarea", {
    rows: "3",
    "data-test": "prompt",
    "aria-label": "Prompt",
    spellcheck: "false",
    maxlength: about.max_prompt || null,
    value: state.prompt,
    oninput: () => (state.prompt = area.value),
    onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && write(),
  });
  const put = (text) => () => {
    state.prompt = text;
    area.value = text;
    area.focus();
  };
  const examples = about.examples.map((text) => button(text, put(text), { class: "example" }));
  return tag(
    "div",
    { class: "prompt-part" },
    tag("h2", { class: "setting" }, "Prompt"),
    area,
    tag("div", { class: "examples" }, examples),
  );
}

function strengthPart(state, change) {
  const place = tag("div");
  const hint = tag("p", { class: "muted hint" });
  function show() {
    const { min, max, step } = RANGES[state.genre === null ? state.mode : "genre"];
    state.alpha = Math.min(max, Math.max(min, state.alpha));
    const oninput = (alpha) => {
      state.alpha = alpha;
      change({ alpha, note: `α ${fixed(alpha)}` });
    };
    fill(
      place,
      slider({
        name: "Alpha",
        help: "The strength: 0 leaves the model alone",
        min,
        max,
        step,
        value: state.alpha,
        test: "alpha",
        oninput,
      }).node,
    );
    fill(hint, MODES.find(([mode]) => mode === state.mode)[2]);
  }
  const radios = MODES.map(([mode, name]) => {
    const input = tag("input", {
      type: "radio",
      name: "mode",
      value: mode,
      checked: state.mode === mode,
      onchange: () => {
        state.mode = mode;
        show();
        change({ mode, alpha: state.alpha, note: `${mode} α ${fixed(state.alpha)}` });
      },
    });
    return tag("label", {}, input, tag("span", {}, name));
  });
  show();
  // The set of regions of a genre is a direction: it can only be added.
  const hidden = state.genre !== null;
  const choice = tag("div", { class: "segments", role: "radiogroup", "aria-label": "How to steer", hidden }, radios);
  return tag(
    "div",
    { class: "sliders" },
    tag("div", { class: "panel-title" }, tag("h2", { class: "setting" }, "Strength"), choice),
    place,
    hint,
  );
}

function samplingPart(about, state) {
  const compare = tag("input", {
    type: "checkbox",
    checked: state.compare,
    onchange: () => (state.compare = compare.checked),
  });
  const temperature = slider({
    name: "Temperature",
    help: "0 always takes the likeliest token",
    min: 0,
    max: 2,
    step: 0.05,
    value: state.temperature,
    oninput: (value) => (state.temperature = value),
  });
  return tag(
    "div",
    { class: "sliders" },
    tag("h2", { class: "setting" }, "Sampling"),
    temperature.node,
    tag(
      "div",
      { class: "fields" },
      numberField("Seed", state, "seed", { min: 0, max: 2 ** 31 - 1 }),
      numberField("New tokens", state, "newTokens", { min: 1, max: about.max_new_tokens }),
      tag("label", { class: "check" }, compare, "Compare: write without steering first"),
    ),
  );
}

/**
 * @param {object} about
 * @param {object} state the settings, which the controls change
 * @param {{write: () => void, stop: () => void, change: (fields: object) => void}} acts `change` is told what changes a
 *   text that is being written, with a note to mark the place
 */
export function controls(about, state, { write, stop, change }) {
  let isStopped = false;
  const go = () => {
    isStopped = false;
    write();
  };
  const halt = () => {
    isStopped = true;
    stop();
  };
  const writeButton = button("Write", go, {
    class: "primary",
    "data-test": "write",
    title: "Write (Ctrl+Enter in the prompt)",
  });
  const stopButton = button("Stop", halt, { "data-test": "stop", disabled: true });
  return {
    prompt: promptPart(about, state, go),
    strength: strengthPart(state, change),
    sampling: samplingPart(about, state),
    acts: tag("div", { class: "acts" }, writeButton, stopButton),
    isStopped: () => isStopped,
    setWriting: (isWriting) => {
      writeButton.disabled = isWriting;
      stopButton.disabled = !isWriting;
    },
  };
}
