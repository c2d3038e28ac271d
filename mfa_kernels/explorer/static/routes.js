/** Addresses of views: all that is after the # of the page's address. */

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** @returns {{view: string, parts: string[], query: URLSearchParams}} of "#/region/12?by=spread" */
export function parseRoute(hash) {
  const [path, ...rest] = hash.replace(/^#?\/?/, "").split("?");
  const [view, ...parts] = path.split("/").map(decoded);
  return { view, parts: parts.filter(Boolean), query: new URLSearchParams(rest.join("?")) };
}

/** Puts a query into the address of the view that is shown, without a new entry in the history. */
export function setQuery(path, query) {
  const given = Object.entries(query).filter(([, value]) => value !== "");
  const text = new URLSearchParams(given.map(([key, value]) => [key, String(value)])).toString();
  history.replaceState(history.state, "", text ? `${path}?${text}` : path);
}

export const searchHash = (text) => `#/search/${encodeURIComponent(text)}`;

/** The number of a region in an address, or null. */
export const componentIn = (part) => (/^\d{1,9}$/.test(part ?? "") ? Number(part) : null);
