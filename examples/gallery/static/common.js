// What all modules use: requests, and words.

export const OURS = { "X-Gallery": "1" };

/** An error in words for the user. */
export class Problem extends Error {}

export async function ask(url, { method = "GET", json } = {}) {
  const options = { method, headers: { ...OURS } };
  if (json) Object.assign(options, { body: JSON.stringify(json), headers: { ...OURS, "Content-Type": "application/json" } });
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Problem("The gallery cannot be reached.");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new Problem(inWords(response.status, answer));
  return answer;
}

export function inWords(status, answer) {
  if (status === 413 && answer?.max_size) return `It is larger than ${bytes(answer.max_size)}, the limit of the gallery.`;
  if (typeof answer?.detail === "string") return answer.detail;
  return `The gallery answered with an error (${status}).`;
}

export function bytes(count) {
  const units = ["bytes", "KB", "MB", "GB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit++) count /= 1000;
  return `${count.toLocaleString("en", { maximumFractionDigits: unit ? 1 : 0 })} ${units[unit]}`;
}

export const copyOf = (template) => document.getElementById(template).content.firstElementChild.cloneNode(true);

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
