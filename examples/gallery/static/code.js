// The code beside its effect, as the application runs it.

import { ask } from "./common.js";

const code = await ask("/code");
for (const place of document.querySelectorAll("[data-code]")) place.textContent = code[place.dataset.code];
