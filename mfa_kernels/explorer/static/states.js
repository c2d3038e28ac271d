/** What a place shows when it has nothing to show: it waits, failed, or is empty. */

import { button, fill, tag } from "./dom.js";

export function loading(text = "Loading") {
  return tag(
    "p",
    { class: "state loading", role: "status" },
    tag("span", { class: "spinner", "aria-hidden": "true" }),
    text,
  );
}

/** The server's sentence, with a button to try again where that makes sense. */
export function failure(error, retry) {
  return tag(
    "div",
    { class: "state failure", role: "alert" },
    tag("p", {}, error?.message || "Something went wrong."),
    retry && button("Try again", retry),
  );
}

export function empty(text, ...more) {
  return tag("div", { class: "state empty" }, tag("p", {}, text), more);
}

/** Whether an error only says that the view was left before the answer came. */
export const isAbort = (error) => error?.name === "AbortError";

/**
 * Fills a place with what `load` promises: a waiting sign, then what `render` makes of the answer, or the failure.
 * @returns {Promise<any>} the answer, or null where there was none
 */
export async function fillWith(place, load, render, waiting = "Loading") {
  fill(place, loading(waiting));
  place.setAttribute("aria-busy", "true");
  try {
    const answer = await load();
    fill(place, render(answer));
    return answer;
  } catch (error) {
    if (!isAbort(error))
      fill(
        place,
        failure(error, () => fillWith(place, load, render, waiting)),
      );
    return null;
  } finally {
    place.removeAttribute("aria-busy");
  }
}

const SAID = 6000;
let saying = 0;

/** Tells a sentence to whoever looks at the foot of the page or listens to it; it goes after a while. */
export function say(text) {
  const status = document.getElementById("status");
  status.textContent = text;
  clearTimeout(saying);
  saying = setTimeout(() => (status.textContent = ""), SAID);
}
