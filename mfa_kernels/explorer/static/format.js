/** Numbers as people read them. */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => whole.format(value);

export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

export function fixed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  const text = value.toFixed(digits);
  // A value that rounds to nothing has no sign.
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

/** Two or three digits that matter, for shares that span from most of all to one in a million. */
export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const of = share * 100;
  if (of === 0) return "0%";
  if (of < 0.001) return "<0.001%";
  return `${of.toFixed(of >= 9.95 ? 0 : of >= 0.995 ? 1 : of >= 0.0995 ? 2 : 3)}%`;
}

export const signed = (value, digits = 2) => (value > 0 ? "+" : "") + fixed(value, digits);

/** Shortened to a number of characters as people count them, so that no emoji is cut in two. */
export function clip(text, length) {
  const characters = Array.from(text);
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : text;
}
