/** A slider with its value, and a tick where zero is. */

import { tag } from "./dom.js";
import { fixed } from "./format.js";
import { tip } from "./tooltip.js";

/**
 * @param {{name: string, help?: string, min: number, max: number, step: number, value: number, digits?: number,
 *   test?: string, oninput: (value: number) => void}} options
 * @returns {{node: HTMLElement, set: (value: number) => void}}
 */
export function slider({ name, help, min, max, step, value, digits = 2, test, oninput }) {
  const hasZero = min < 0 && max > 0;
  const shown = tag("output", { class: "slider-value" });
  const input = tag("input", {
    type: "range",
    min: String(min),
    max: String(max),
    step: String(step),
    "aria-label": name,
    "data-test": test,
  });
  // Browsers add the step up in floating point: what is told is the nearest multiple of it.
  const read = () => Number((Math.round(Number(input.value) / step) * step).toFixed(6));
  const tell = () => {
    shown.textContent = fixed(read(), digits);
    input.style.setProperty("--at", String((read() - min) / (max - min || 1)));
  };
  const set = (to) => {
    input.value = String(to);
    tell();
  };
  input.addEventListener("input", () => {
    tell();
    oninput(read());
  });
  set(value);
  const back = () => {
    set(0);
    oninput(0);
  };
  const track = tag(
    "span",
    { class: "slider-track", style: { "--zero": String(hasZero ? -min / (max - min) : 0) } },
    hasZero && tag("span", { class: "zero", "aria-hidden": "true" }),
    input,
  );
  if (hasZero) track.addEventListener("dblclick", back);
  const label = tag("span", { class: "slider-name" }, name);
  if (help) tip(label, [name, help]);
  return { node: tag("div", { class: "slider" }, label, track, shown), set };
}
