// The gallery: what hangs on the wall, and how things get there and go.

import { Problem, ask, bytes, copyOf } from "./common.js";
import { sendDirectly, sendThrough } from "./sending.js";
import { paint } from "./samples.js";

const element = (id) => document.getElementById(id);
const items = element("items");
const AT_A_TIME = 3;
const PAGE = 24;

let settings = { max_size: 0, taken: [], shown: [] };

// Cards

function kindOf({ content_type }) {
  const type = (content_type ?? "").split(";")[0].trim().toLowerCase();
  return settings.shown.includes(type) ? type.split("/")[0] : "other";
}

function nameOf(item) {
  return item.file.original_filename ?? "Without a name";
}

function extensionOf({ original_filename, content_type }) {
  const extension = /\.([a-z0-9]{1,5})$/i.exec(original_filename ?? "")?.[1];
  return (extension ?? (content_type ?? "file").split(/[/;]/).at(1) ?? "file").slice(0, 5);
}

// The checksum is there so that a browser that has the old file asks for the new one.
const addressOf = (item, name = "file") => `/items/${item.id}/${name}?v=${item[name].checksum.slice(7, 19)}`;

function cardOf(item) {
  const card = copyOf("item-template");
  const { size, content_type, checksum } = item.file;
  card.dataset.id = item.id;
  card.querySelector("h3 bdi").textContent = nameOf(item);
  card.querySelector(".about").textContent = `${(content_type ?? "unknown").split(";")[0]} · ${bytes(size)}`;
  card.querySelector(".sum").textContent = checksum.slice(7, 23);
  card.querySelector(".sum").title = checksum;
  const preview = card.querySelector(".preview");
  preview.setAttribute("aria-label", `Look at ${nameOf(item)}`);
  preview.append(pictureOf(item));
  preview.onclick = () => view(item);
  const download = card.querySelector(".download");
  download.href = `${addressOf(item)}&download=true`;
  for (const action of card.querySelectorAll(".action")) action.setAttribute("aria-label", `${action.textContent} ${nameOf(item)}`);
  card.querySelector(".replace").onclick = () => choose((file) => replace(item, file));
  card.querySelector(".delete").onclick = () => remove(item);
  return card;
}

/** A thumbnail or a preview, whose size is known before it is loaded. */
function variantOf(item, name) {
  const { width, height } = item[name].media;
  const picture = Object.assign(new Image(width, height), { alt: "", loading: "lazy", src: addressOf(item, name) });
  picture.onerror = () => picture.replaceWith(tileOf(item));
  return picture;
}

/** What stands for an item on its card: its thumbnail, or itself, where the gallery lets a browser show it. */
function pictureOf(item) {
  if (item.thumb) return variantOf(item, "thumb");
  const kind = kindOf(item.file);
  if (kind === "image" || kind === "video") {
    const picture = document.createElement(kind === "image" ? "img" : "video");
    picture.onerror = () => picture.replaceWith(tileOf(item));
    Object.assign(picture, kind === "image" ? { alt: "", loading: "lazy" } : { muted: true, preload: "metadata" });
    picture.src = kind === "image" ? addressOf(item) : `${addressOf(item)}#t=1`;
    if (kind === "image") return picture;
    const film = document.createElement("span");
    film.className = "film";
    film.append(picture);
    return film;
  }
  return kind === "text" ? excerptOf(item) : tileOf(item);
}

function tileOf(item) {
  const tile = document.createElement("span");
  tile.className = "tile";
  tile.textContent = extensionOf(item.file);
  return tile;
}

/** The beginning of a text: a range of it is enough. */
function excerptOf(item) {
  const excerpt = document.createElement("span");
  excerpt.className = "excerpt";
  fetch(addressOf(item), { headers: { Range: "bytes=0-599" } })
    .then((response) => (response.ok ? response.text() : ""))
    .then((text) => (excerpt.textContent = text))
    .catch(() => excerpt.replaceWith(tileOf(item)));
  return excerpt;
}

const hanging = (item) => items.querySelector(`[data-id="${item.id}"]`);

function hang(item) {
  const old = hanging(item);
  if (old) old.replaceWith(cardOf(item));
  else items.prepend(cardOf(item));
  count();
}

function count() {
  element("empty").hidden = items.childElementCount > 0;
}

async function showMore() {
  const oldest = items.lastElementChild?.dataset.id;
  const page = await ask(`/items?limit=${PAGE}${oldest ? `&before=${oldest}` : ""}`);
  items.append(...page.filter((item) => !hanging(item)).map(cardOf));
  element("more").hidden = page.length < PAGE;
  count();
}

// Looking at one

function view(item) {
  const viewer = element("viewer");
  const kind = kindOf(item.file);
  const stage = viewer.querySelector(".stage");
  let shown = item.thumb ? variantOf(item, "thumb") : tileOf(item);
  if (kind === "image") {
    shown = Object.assign(new Image(), { src: addressOf(item), alt: nameOf(item) });
  } else if (kind === "video" || kind === "audio") {
    shown = Object.assign(document.createElement(kind), { src: addressOf(item), controls: true, preload: "auto" });
    shown.setAttribute("aria-label", nameOf(item));
  } else if (kind === "text") {
    shown = document.createElement("pre");
    shown.tabIndex = 0;
    fetch(addressOf(item), { headers: { Range: "bytes=0-99999" } })
      .then((response) => (response.ok ? response.text() : ""))
      .then((text) => (shown.textContent = text))
      .catch(() => shown.replaceWith(tileOf(item)));
  }
  stage.replaceChildren(shown);
  viewer.querySelector("h2 bdi").textContent = nameOf(item);
  viewer.querySelector(".type").textContent = item.file.content_type ?? "unknown";
  viewer.querySelector(".size").textContent = `${bytes(item.file.size)} (${item.file.size.toLocaleString("en")})`;
  viewer.querySelector(".checksum").textContent = item.file.checksum.slice(7);
  viewer.querySelector(".buttons a").href = `${addressOf(item)}&download=true`;
  viewer.dataset.id = item.id;
  viewer.showModal();
  offerPreview(item);
}

/** A smaller copy of a picture. The first visitor who looks at it has it made, and sees so until it is there. */
async function offerPreview(item) {
  const viewer = element("viewer");
  const line = viewer.querySelector(".copy");
  line.hidden = !item.thumb;
  if (!item.thumb) return;
  line.textContent = "A smaller copy is being made…";
  line.classList.toggle("waiting", !item.preview);
  let told;
  try {
    if (!item.preview) Object.assign(item, await ask(`/items/${item.id}/preview`, { method: "POST" }));
    const { media, size } = item.preview;
    told = document.createElement("a");
    Object.assign(told, { href: addressOf(item, "preview"), target: "_blank" });
    told.textContent = `Smaller copy: ${media.width} × ${media.height}, ${bytes(size)}`;
  } catch (error) {
    told = error.message;
  }
  if (!viewer.open || viewer.dataset.id !== String(item.id)) return;
  line.replaceChildren(told);
  line.classList.remove("waiting");
  const stand = viewer.querySelector('.stage img[loading="lazy"]'); // for a picture that the browser is not let to show
  if (stand && item.preview) stand.replaceWith(variantOf(item, "preview"));
}

element("viewer").querySelector("button").onclick = () => element("viewer").close();
element("viewer").onclose = () => element("viewer").querySelector(".stage").replaceChildren();
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}

// Uploads

const waiting = [];
let underWay = 0;

function upload(files) {
  const start = element("direct").checked ? sendDirectly : (file, options) => sendThrough("POST", "/items", file, options);
  for (const file of files) enqueue(file, file.name, start);
}

function replace(item, file) {
  enqueue(file, `${file.name} in place of ${nameOf(item)}`, (...sent) => sendThrough("PUT", `/items/${item.id}/file`, ...sent));
}

function enqueue(file, what, start) {
  const line = copyOf("upload-template");
  line.querySelector("bdi").textContent = what;
  line.querySelector(".state").textContent = "waiting";
  line.querySelector("progress").setAttribute("aria-label", what);
  element("uploads").append(line);
  const controller = new AbortController();
  const button = line.querySelector("button");
  button.setAttribute("aria-label", `Cancel ${what}`);
  button.onclick = () => controller.abort();
  const job = { file, line, start, what, controller };
  waiting.push(job);
  controller.signal.addEventListener("abort", () => {
    if (!waiting.includes(job)) return;
    waiting.splice(waiting.indexOf(job), 1);
    fail(job, new Problem("Cancelled before it began."));
  });
  next();
}

function next() {
  while (underWay < AT_A_TIME && waiting.length) run(waiting.shift());
}

async function run(job) {
  const { file, line, start, what, controller } = job;
  const state = line.querySelector(".state");
  underWay++;
  state.textContent = `0 of ${bytes(file.size)}`;
  try {
    const onProgress = (share) => {
      line.querySelector("progress").value = share;
      state.textContent = share < 1 ? `${bytes(share * file.size)} of ${bytes(file.size)}` : "being written";
    };
    hang(await start(file, { onProgress, signal: controller.signal }));
    line.remove();
    say(`${what} hangs on the wall.`);
  } catch (error) {
    fail(job, error);
  } finally {
    underWay--;
    next();
  }
}

function fail({ line, what }, error) {
  line.classList.add("failed");
  line.querySelector("progress").remove();
  line.querySelector(".state").textContent = error.message;
  const button = line.querySelector("button");
  button.textContent = "Dismiss";
  button.setAttribute("aria-label", `Dismiss ${what}`);
  button.onclick = () => line.remove();
  say(`${what}: ${error.message}`);
}

/** Ask for one file. */
function choose(then) {
  const input = element("replacement");
  input.value = "";
  input.onchange = () => then(input.files[0]);
  input.click();
}

// Taking down

function remove(item) {
  const question = element("question");
  question.querySelector("bdi").textContent = nameOf(item);
  question.returnValue = "keep";
  question.onclose = async () => {
    if (question.returnValue !== "delete") return;
    try {
      await ask(`/items/${item.id}`, { method: "DELETE" });
      hanging(item)?.remove();
      count();
      say(`${nameOf(item)} was deleted.`);
      element("items-heading").focus();
    } catch (error) {
      say(error.message, true);
    }
  };
  question.showModal();
}

function say(text, visibly = false) {
  const status = element("status");
  status.textContent = text;
  status.classList.toggle("toast", visibly);
  status.classList.toggle("quiet", !visibly);
}

// The page

element("files").onchange = ({ target }) => {
  upload(target.files);
  target.value = "";
};

element("samples").onclick = async ({ target }) => {
  target.disabled = true;
  try {
    for await (const file of paint()) upload([file]);
  } finally {
    target.disabled = false;
  }
};

const drop = element("drop");
let inside = 0;
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => holdsFiles(event) && drop.classList.toggle("over", ++inside > 0));
addEventListener("dragleave", (event) => holdsFiles(event) && drop.classList.toggle("over", --inside > 0));
addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  inside = 0;
  drop.classList.remove("over");
  upload(event.dataTransfer.files);
});

element("more").onclick = () => showMore().catch((error) => say(error.message, true));

try {
  settings = await ask("/settings");
  for (const id of ["files", "replacement"]) {
    element(id).accept = settings.taken.join();
  }
  element("limits").append(` At most ${bytes(settings.max_size)} each.`);
  await showMore();
} catch (error) {
  say(error.message, true);
}
