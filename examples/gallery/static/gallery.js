// The albums: what they show, and how files get there and go.

import { Problem, ask, bytes, copyOf, pause } from "./common.js";
import { paint } from "./samples.js";
import { sendDirectly, sendThrough } from "./sending.js";

const AT_A_TIME = 3;
const PAGE = 10;
const PATIENCE = 60_000; // milliseconds
const element = (id) => document.getElementById(id);

let settings = { max_size: 0, accepted: [], shown: [] };

// Albums

function albumOf(album) {
  const section = copyOf("album-template");
  section.dataset.id = album.id;
  section.isOwn = album.is_own;
  section.querySelector("bdi").textContent = album.title;
  section.querySelector(".about").textContent = album.is_own ? "Your album" : `An album of ${album.owner}`;
  section.querySelector(".items").append(...album.files.map((file) => cardOf(file, section)));
  count(section);
  if (!album.is_own) {
    for (const part of section.querySelectorAll(".own")) part.remove();
    return section;
  }
  const share = section.querySelector(".public");
  share.checked = album.is_public;
  share.onchange = () => attempt(() => ask(`/albums/${album.id}/public?is_public=${share.checked}`, { method: "PUT" }));
  section.querySelector(".limits").textContent = `Pictures, films, sound, plain text, PDF and ZIP. At most ${bytes(settings.max_size)} each.`;
  const files = section.querySelector(".files");
  files.accept = settings.accepted.join();
  files.onchange = () => {
    upload(section, files.files);
    files.value = "";
  };
  section.querySelector(".samples").onclick = async ({ target }) => {
    target.disabled = true;
    for await (const file of paint()) upload(section, [file]);
    target.disabled = false;
  };
  section.querySelector(".delete").onclick = () =>
    confirmDelete(album.title, `/albums/${album.id}`, () => {
      section.remove();
      element("empty").hidden = element("list").childElementCount > 0;
    });
  takeDrops(section);
  return section;
}

function takeDrops(section) {
  const drop = section.querySelector(".drop");
  drop.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    upload(section, event.dataTransfer.files);
  };
}

function count(section) {
  section.querySelector(".album > .empty").hidden = section.querySelector(".items").childElementCount > 0;
}

async function showMore() {
  const oldest = element("list").lastElementChild?.dataset.id;
  const page = await ask(`/albums?limit=${PAGE}${oldest ? `&before=${oldest}` : ""}`);
  element("list").append(...page.map(albumOf));
  element("more").hidden = page.length < PAGE;
  element("empty").hidden = element("list").childElementCount > 0;
}

// Cards

function kindOf({ content_type }) {
  const type = (content_type ?? "").split(";")[0].trim().toLowerCase();
  return settings.shown.includes(type) ? type.split("/")[0] : "other";
}

const nameOf = (item) => item.file.original_filename ?? "Without a name";

function extensionOf({ original_filename, content_type }) {
  const extension = /\.([a-z0-9]{1,5})$/i.exec(original_filename ?? "")?.[1];
  return (extension ?? (content_type ?? "file").split(/[/;]/).at(1) ?? "file").slice(0, 5);
}

// The URL has the checksum, so that a browser that has the old file asks for the new one.
const version = ({ checksum }) => `?v=${checksum.slice(7, 19)}`;
const urlOf = (item) => `/files/${item.id}${version(item.file)}`;
const urlOfVariant = (item, name) => `/files/${item.id}/${name}${version(item[name])}`;

function cardOf(item, section) {
  const card = copyOf("item-template");
  card.dataset.id = item.id;
  card.dataset.version = item.file.checksum;
  card.querySelector("bdi").textContent = nameOf(item);
  card.querySelector(".about").textContent = `${(item.file.content_type ?? "unknown").split(";")[0]} · ${bytes(item.file.size)}`;
  const preview = card.querySelector(".preview");
  preview.setAttribute("aria-label", `Look at ${nameOf(item)}`);
  preview.append(pictureOf(item));
  preview.onclick = () => view(item);
  card.querySelector(".download").href = `${urlOf(item)}&download=true`;
  for (const action of card.querySelectorAll(".action")) action.setAttribute("aria-label", `${action.textContent} ${nameOf(item)}`);
  card.querySelector(".first").onclick = () =>
    attempt(async () => {
      await ask(`/files/${item.id}/first`, { method: "PUT" });
      section.querySelector(".items").prepend(card);
    });
  card.querySelector(".replace").onclick = () => choose((file) => replace(item, section, file));
  card.querySelector(".delete").onclick = () =>
    confirmDelete(nameOf(item), `/files/${item.id}`, () => {
      card.remove();
      count(section);
    });
  if (!section.isOwn) for (const part of card.querySelectorAll(".own")) part.remove();
  tellOfCopy(item, card);
  if (item.is_pending) waitForCopy(item, section);
  return card;
}

function tellOfCopy(item, card) {
  const line = card.querySelector(".copy");
  line.hidden = !item.is_pending && !item.large;
  line.classList.toggle("waiting", item.is_pending);
  if (item.is_pending) line.textContent = "A large copy is being made…";
  if (!item.large) return;
  const { width, height } = item.large.media;
  const link = Object.assign(document.createElement("a"), { href: urlOfVariant(item, "large"), target: "_blank" });
  link.textContent = `Large copy: ${width} × ${height}, ${bytes(item.large.size)}`;
  line.replaceChildren(link);
}

/** Ask until the worker has made the large copy; the card shows it then. */
async function waitForCopy(item, section) {
  const card = () => section.querySelector(`[data-id="${item.id}"][data-version="${item.file.checksum}"]`);
  for (const begun = performance.now(); performance.now() < begun + PATIENCE; ) {
    await pause(300);
    if (!card()) return; // deleted or replaced
    const now = await ask(`/files/${item.id}/state`).catch(() => item);
    if (!now.is_pending) return hang(now, section);
  }
  card()?.querySelector(".copy").replaceChildren("There is no large copy yet. Reload the page to look again.");
}

/** A thumbnail, whose size is known before it is loaded; and the large copy, which a browser takes where there is room for it. */
function thumbnailOf(item) {
  const { width, height } = item.thumb.media;
  const picture = Object.assign(new Image(width, height), { alt: "", loading: "lazy" });
  if (item.large) {
    picture.sizes = "auto, 16rem";
    picture.srcset = ["thumb", "large"].map((name) => `${urlOfVariant(item, name)} ${item[name].media.width}w`).join();
  }
  picture.src = urlOfVariant(item, "thumb");
  picture.onerror = () => picture.replaceWith(tileOf(item));
  return picture;
}

/** What a card shows: a thumbnail, or the file itself where the gallery lets a browser show it. */
function pictureOf(item) {
  if (item.thumb) return thumbnailOf(item);
  const kind = kindOf(item.file);
  if (kind === "text") return excerptOf(item, 600);
  if (kind !== "video") return tileOf(item);
  const film = Object.assign(document.createElement("span"), { className: "film" });
  const video = Object.assign(document.createElement("video"), { muted: true, preload: "metadata", src: `${urlOf(item)}#t=1` });
  video.onerror = () => film.replaceWith(tileOf(item));
  film.append(video);
  return film;
}

const tileOf = (item) => Object.assign(document.createElement("span"), { className: "tile", textContent: extensionOf(item.file) });

/** The beginning of a text: a range of it is enough. */
function excerptOf(item, length, tag = "span") {
  const excerpt = Object.assign(document.createElement(tag), { className: "excerpt" });
  fetch(urlOf(item), { headers: { Range: `bytes=0-${length - 1}` } })
    .then((response) => (response.ok ? response.text() : ""))
    .then((text) => (excerpt.textContent = text))
    .catch(() => excerpt.replaceWith(tileOf(item)));
  return excerpt;
}

/** Show a file: in its place, if its album shows it already, or else last. */
function hang(item, section) {
  const old = section.querySelector(`[data-id="${item.id}"]`);
  const card = cardOf(item, section);
  if (old) old.replaceWith(card);
  else section.querySelector(".items").append(card);
  count(section);
}

// Looking at one

/** Show the original, where a browser may; otherwise the best copy. */
function view(item) {
  const viewer = element("viewer");
  const kind = kindOf(item.file);
  let shown = tileOf(item);
  if (kind === "image") {
    shown = Object.assign(new Image(), { src: urlOf(item), alt: nameOf(item) });
  } else if (item.thumb) {
    shown = Object.assign(new Image(), { src: urlOfVariant(item, item.large ? "large" : "thumb"), alt: nameOf(item) });
  } else if (kind === "video" || kind === "audio") {
    shown = Object.assign(document.createElement(kind), { src: urlOf(item), controls: true, preload: "auto" });
    shown.setAttribute("aria-label", nameOf(item));
  } else if (kind === "text") {
    shown = excerptOf(item, 100_000, "pre");
    shown.tabIndex = 0;
  }
  viewer.querySelector(".stage").replaceChildren(shown);
  viewer.querySelector("h2 bdi").textContent = nameOf(item);
  viewer.querySelector(".type").textContent = item.file.content_type ?? "unknown";
  viewer.querySelector(".size").textContent = `${bytes(item.file.size)} (${item.file.size.toLocaleString("en")})`;
  viewer.querySelector(".checksum").textContent = item.file.checksum.slice(7);
  viewer.querySelector(".buttons a").href = `${urlOf(item)}&download=true`;
  viewer.showModal();
}

element("viewer").querySelector("button").onclick = () => element("viewer").close();
element("viewer").onclose = () => element("viewer").querySelector(".stage").replaceChildren();
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}

// Uploads

const waiting = [];
let active = 0;

function upload(section, files) {
  const album = `/albums/${section.dataset.id}`;
  const isDirect = section.querySelector(".direct").checked;
  for (const file of files) {
    const start = isDirect
      ? (options) => sendDirectly(`${album}/direct`, file, options)
      : (options) => sendThrough("POST", `${album}/files`, file, options);
    enqueue({ file, section, what: file.name, start });
  }
}

function replace(item, section, file) {
  const start = (options) => sendThrough("PUT", `/files/${item.id}`, file, options);
  enqueue({ file, section, what: `${file.name} in place of ${nameOf(item)}`, start });
}

function enqueue(job) {
  const line = copyOf("upload-template");
  line.querySelector("bdi").textContent = job.what;
  line.querySelector(".state").textContent = "waiting";
  line.querySelector("progress").setAttribute("aria-label", job.what);
  job.section.querySelector(".uploads").append(line);
  const controller = new AbortController();
  const button = line.querySelector("button");
  button.setAttribute("aria-label", `Cancel ${job.what}`);
  button.onclick = () => controller.abort();
  Object.assign(job, { line, controller });
  waiting.push(job);
  controller.signal.addEventListener("abort", () => {
    if (!waiting.includes(job)) return;
    waiting.splice(waiting.indexOf(job), 1);
    fail(job, new Problem("Cancelled before it began."));
  });
  next();
}

function next() {
  while (active < AT_A_TIME && waiting.length) run(waiting.shift());
}

async function run(job) {
  const { file, section, line, start, what, controller } = job;
  const state = line.querySelector(".state");
  active++;
  state.textContent = `0 of ${bytes(file.size)}`;
  try {
    const onProgress = (share) => {
      line.querySelector("progress").value = share;
      state.textContent = share < 1 ? `${bytes(share * file.size)} of ${bytes(file.size)}` : "being stored";
    };
    hang(await start({ onProgress, signal: controller.signal }), section);
    line.remove();
    say(`${what} is stored.`);
  } catch (error) {
    fail(job, error);
  } finally {
    active--;
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

function confirmDelete(name, url, then) {
  const question = element("question");
  question.querySelector("bdi").textContent = name;
  question.returnValue = "keep";
  question.onclose = () => {
    if (question.returnValue !== "delete") return;
    attempt(async () => {
      await ask(url, { method: "DELETE" });
      then();
      say(`${name} was deleted.`);
      element("albums").focus();
    });
  };
  question.showModal();
}

function say(text, visibly = false) {
  const status = element("status");
  status.textContent = text;
  status.classList.toggle("toast", visibly);
  status.classList.toggle("quiet", !visibly);
}

/** Do something; say why if it fails. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  }
}

// The page. A link to sign in has the token behind the #, which no browser sends to a server.

const linked = () => /^#sign-in=(.+)$/.exec(location.hash)?.[1];

async function signIn() {
  const token = linked();
  if (!token) return;
  history.replaceState(null, "", "/");
  await ask("/session", { method: "POST", json: { token } });
}

// A file that misses its place is not opened instead of the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());

addEventListener("hashchange", () => linked() && location.reload());

element("sign-out").onclick = () =>
  attempt(async () => {
    await ask("/session", { method: "DELETE" });
    location.reload();
  });

element("new-album").onsubmit = (event) => {
  event.preventDefault();
  attempt(async () => {
    element("list").prepend(albumOf(await ask("/albums", { method: "POST", json: { title: element("title").value } })));
    element("title").value = "";
    element("empty").hidden = true;
  });
};

element("more").onclick = () => attempt(showMore);

await attempt(signIn);
await attempt(async () => {
  const { name } = await ask("/session");
  element("user").textContent = name ? `Signed in as ${name}` : "To upload, sign in with a link that the gallery printed.";
  element("sign-out").hidden = element("new-album").hidden = !name;
  settings = await ask("/settings");
  element("replacement").accept = settings.accepted.join();
  await showMore();
});
