/** A title for a conversation that is not in the list yet. */

const TITLE_POINTS = 80;

/**
 * Return a title made of a first message: the start of its first line, at most 80 code points, cut between grapheme
 * clusters so that no character is shown in part.
 */
export function titleOf(/** @type {string} */ text) {
  // Ignore the rest of a long line, because this runs with each token.
  const line = text.trim().split("\n")[0].slice(0, 3 * TITLE_POINTS);
  const points = Array.from(line);
  if (points.length <= TITLE_POINTS) {
    return line;
  }
  const end = points.slice(0, TITLE_POINTS).join("").length;
  // Firefox has no Segmenter before version 125.
  const cluster = "Segmenter" in Intl ? new Intl.Segmenter().segment(line).containing(end) : undefined;
  return line.slice(0, cluster?.index || end);
}
