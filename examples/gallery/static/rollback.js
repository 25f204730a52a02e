// The page about rollbacks: it runs the experiment and shows what was found, with what has changed since the moment before.

import { ask, bytes, copyOf } from "./common.js";

const element = (id) => document.getElementById(id);

/** One column: what was found, beside what was there the moment before, and at the beginning. */
function momentOf(kind, title, hint, found, earlier = found, first = found) {
  const moment = copyOf("moment-template");
  moment.classList.add(kind);
  moment.querySelector("h2").textContent = title;
  moment.querySelector(".hint").textContent = hint;
  const [rows, files] = moment.querySelectorAll(".count");
  rows.textContent = found.rows.length;
  files.textContent = found.files.length;
  const rowText = (row) => `${row.title} → ${shortened(row.file)}`;
  const fileText = (file) => `${shortened(file.name)}, ${bytes(file.size)}`;
  fill(moment.querySelector(".rows"), [found.rows, earlier.rows, first.rows], (row) => `${row.id} ${row.file}`, rowText);
  fill(moment.querySelector(".files"), [found.files, earlier.files, first.files], (file) => file.name, fileText);
  return moment;
}

/** A file's name begins with 32 digits that make it unique: its last ones tell it from others. */
const shortened = (name) => name.replace(/^[0-9a-f]{28}/, "…");

function fill(list, moments, keyOf, textOf) {
  const [found, earlier, first] = moments;
  const [keys, earlierKeys, firstKeys] = moments.map((moment) => new Set(moment.map(keyOf)));
  const badgeOf = (key) => (earlierKeys.has(key) ? "" : firstKeys.has(key) ? "back" : "new");
  const gone = earlier.filter((one) => !keys.has(keyOf(one)));
  list.replaceChildren(
    ...found.map((one) => lineOf(textOf(one), badgeOf(keyOf(one)))),
    ...gone.map((one) => lineOf(textOf(one), "gone")),
  );
}

function lineOf(text, badge) {
  const line = copyOf("line-template");
  line.querySelector(".name").textContent = text;
  line.querySelector(".badge").textContent = badge;
  if (badge) line.classList.add(badge);
  return line;
}

async function run(fail) {
  const buttons = [element("fail"), element("commit")];
  for (const button of buttons) button.disabled = true;
  try {
    const { before, during, after, error } = await ask(`/rollback?fail=${fail}`, { method: "POST" });
    element("moments").replaceChildren(
      momentOf("before", "Before", "What was committed earlier.", before),
      momentOf("during", "During", "What the transaction itself sees; nothing is decided yet.", during, before, before),
      error
        ? momentOf("undone", "After the rollback", "What every other transaction saw all along.", after, during, before)
        : momentOf("kept", "After the commit", "What everybody sees from now on.", after, during, before),
    );
    const same = JSON.stringify(before) === JSON.stringify(after);
    conclude(
      error ? "undone" : "kept",
      error
        ? `The database refused a row (${error}). ${same ? "Rows and files are exactly what they were before." : "Something differs from before!"}`
        : "Committed. The new files are there with their rows; what was replaced or deleted is gone.",
    );
  } catch (problem) {
    conclude("undone", problem.message);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

function conclude(kind, text) {
  element("outcome").className = `outcome ${kind}`;
  element("outcome").textContent = text;
}

element("fail").onclick = () => run(true);
element("commit").onclick = () => run(false);

try {
  element("moments").replaceChildren(momentOf("before", "Now", "What is committed.", await ask("/rollback/state")));
} catch (problem) {
  conclude("undone", problem.message);
}
