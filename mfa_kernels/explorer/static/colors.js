/** Colours of genres, kinds and regions: twelve hues of style.css, for colour-blind eyes too. */

export const HUES = 12;

/** A hue by number, as CSS; a negative number is the grey of "none". */
export const hue = (index) => (index < 0 ? "var(--hue-none)" : `var(--hue-${index % HUES})`);

/** A hue for a region that is always the same; neighbouring numbers get different ones. */
export const regionHue = (component) => hue((component * 7) % HUES);

/** What CSS colours are at the moment, for canvases, which know no variables. */
export function resolved(colors) {
  const probe = document.createElement("i");
  document.body.append(probe);
  const found = colors.map((color) => {
    probe.style.color = color;
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return found;
}
