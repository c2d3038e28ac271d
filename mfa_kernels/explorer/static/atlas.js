/** What all views share: the facts about the mixture, and the map with the label and genre of every region. */

import { get } from "./api.js";

const POLL = 1500;
const RETRY = 4000;

let about = null;
let map = null;
let places = new Map();
let timer = 0;
let asking = false;
const listeners = new Map();
const tokens = new Map();

export async function loadAbout() {
  about ??= await get("/api/about");
  return about;
}

/**
 * Calls `listener` with the map, now and whenever a better layout is there, until the signal aborts.
 * @param {(map: object) => void} listener
 * @param {AbortSignal} signal
 * @param {(error: Error) => void} [onerror] while there is no map at all
 */
export function followMap(listener, signal, onerror = () => {}) {
  listeners.set(listener, onerror);
  signal.addEventListener("abort", () => listeners.delete(listener));
  if (map) listener(map);
  if (!map?.is_final) ask();
}

/** Waits for the map, or for the news that there is none yet: labels of regions come with it. */
export const mapTold = (signal) => new Promise((resolve) => followMap(resolve, signal, resolve));

async function ask() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  let wait = POLL;
  try {
    map = await get("/api/map");
    places = new Map(map.components.map((component, i) => [component, i]));
    for (const listener of [...listeners.keys()]) listener(map);
  } catch (error) {
    wait = RETRY;
    if (!map) for (const onerror of [...listeners.values()]) onerror(error);
  } finally {
    asking = false;
  }
  if (listeners.size && !map?.is_final) timer = setTimeout(ask, wait);
}

export function labelOf(component) {
  const i = places.get(component);
  return i === undefined ? "" : map.label[i];
}

/** Remembers the telling tokens of regions that came with a page of the table, for the tooltips of the map. */
export function rememberTokens(regions) {
  for (const region of regions) tokens.set(region.component, region.tokens);
}

export const tokensOf = (component) => map?.tokens?.[places.get(component)] ?? tokens.get(component) ?? [];

/** The region after or before one, among those that own rows. */
export function regionBeside(component, step, n) {
  const all = map ? [...map.components].sort((a, b) => a - b) : Array.from({ length: n }, (_, k) => k);
  const after = all.findIndex((k) => (step > 0 ? k > component : k >= component));
  const at = step > 0 ? (after < 0 ? 0 : after) : (after <= 0 ? all.length : after) - 1;
  return all[at] ?? component;
}
