// A file on its way: with an XMLHttpRequest, because fetch does not tell how much has been sent.

import { OURS, Problem, inWords } from "./common.js";

/** Send a file, telling which share of it has gone; resolves with the answer, rejects with a Problem. */
export function send(method, url, file, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, url);
    request.responseType = "json";
    for (const [name, value] of Object.entries(OURS)) request.setRequestHeader(name, value);
    request.setRequestHeader("Content-Type", file.type || "application/octet-stream");
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onload = () => {
      if (request.status < 400) resolve(request.response);
      else reject(new Problem(inWords(request.status, request.response)));
    };
    request.onerror = () => reject(new Problem("The connection was lost."));
    request.onabort = () => reject(new Problem("Cancelled; nothing of it was kept."));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}
