/** Topics: regions that are almost all of one genre. */

import { hue } from "./colors.js";
import { tag } from "./dom.js";
import { percent, plural } from "./format.js";
import { empty } from "./states.js";
import { chip } from "./tokens.js";

const WORDS = 16;

function card(topic, about) {
  const name = about.genres[topic.genre] ?? "no genre";
  const more = topic.n_words - Math.min(topic.words.length, WORDS);
  return tag(
    "article",
    { class: "panel padded topic", "data-test": "topic", style: { "--c": hue(topic.genre) } },
    tag("h2", {}, tag("span", { class: "swatch", "aria-hidden": "true" }), name),
    tag(
      "p",
      { class: "muted" },
      `${percent(topic.share)} of the tokens of `,
      tag("a", { href: `#/region/${topic.component}` }, tag("bdi", {}, topic.label || `region ${topic.component}`)),
      " are of this genre.",
    ),
    tag(
      "div",
      { class: "chips" },
      topic.words.slice(0, WORDS).map((word) => chip(word)),
      more > 0 && tag("span", { class: "muted" }, `and ${plural(more, "more word", "more words")}`),
    ),
    tag(
      "p",
      { class: "topic-acts" },
      about.can_steer &&
        topic.genre >= 0 &&
        tag("a", { class: "button", href: `#/steer/genre/${topic.genre}` }, `Steer toward ${name}`),
      about.can_steer && tag("a", { href: `#/steer/${topic.component}` }, "Toward this region"),
      tag("a", { href: `#/region/${topic.component}` }, "Look inside"),
    ),
  );
}

export function topicsView(place, { about }) {
  const none = about.genres.length
    ? "No region is of one genre alone."
    : "These texts tell no genres, so there are no topics.";
  place.append(
    tag(
      "div",
      { class: "intro" },
      tag("h1", { tabindex: "-1" }, "Topics"),
      tag("p", { class: "muted" }, "Regions whose tokens come from one genre more than others do, the clearest first."),
    ),
    about.topics.length
      ? tag(
          "div",
          { class: "cards", "data-test": "topics" },
          about.topics.map((topic) => card(topic, about)),
        )
      : empty(none),
  );
  return { title: "Topics" };
}
