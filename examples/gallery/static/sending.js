// A file on its way: with an XMLHttpRequest, because fetch does not tell how much has been sent.

import { OURS, Problem, ask, inWords } from "./common.js";

/**
 * Send a file, telling which share of it has gone; resolves with the answer, rejects with a Problem.
 *
 * It goes as the body of the request, or, where there are fields, as the last part of a form.
 */
function send({ method, url, headers, fields = {} }, file, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const cancelled = () => reject(new Problem("Cancelled; nothing of it was kept."));
    if (signal.aborted) return cancelled();
    const request = new XMLHttpRequest();
    request.open(method, url);
    request.responseType = "json";
    const ours = url.startsWith("/") ? OURS : {};
    for (const [name, value] of Object.entries({ ...ours, ...headers })) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onload = () => {
      if (request.status < 400) resolve(request.response);
      else reject(new Problem(inWords(request.status, request.response)));
    };
    request.onerror = () => reject(new Problem("The connection was lost."));
    request.onabort = cancelled;
    signal.addEventListener("abort", () => request.abort());
    request.send(method === "POST" && Object.keys(fields).length ? formOf(fields, file) : file);
  });
}

function formOf(fields, file) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("file", file);
  return form;
}

const typeOf = (file) => file.type || "application/octet-stream";

/** Send a file to the application, which stores it. */
export function sendThrough(method, url, file, options) {
  const request = { method, url: `${url}?name=${encodeURIComponent(file.name)}`, headers: { "Content-Type": typeOf(file) } };
  return send(request, file, options);
}

/** Ask where a file may go, send it there, and tell the application that it has arrived. */
export async function sendDirectly(url, file, options) {
  const announced = { name: file.name, type: typeOf(file), size: file.size };
  const { token, ...request } = await ask(`${url}/begin`, { method: "POST", json: announced });
  await send(request, file, options);
  return ask(`${url}/finish`, { method: "POST", json: { token } });
}
