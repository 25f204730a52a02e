// The experiment: it runs the transaction, and shows which files were stored at each moment, and which of them rows refer to.

import { ask, pause } from "./common.js";

const MOMENTS = ["before", "during", "ended", "after"];
const PATIENCE = 20_000; // milliseconds
const element = (id) => document.getElementById(id);

/** A file's name begins with 32 digits that make it unique. */
const shortened = (name) => name.slice(33);

function stateOf(name, found) {
  if (!found) return ["", "not known yet"];
  const stored = found.files.includes(name);
  if (found.rows.some((row) => row.file === name)) return stored ? ["both", "stored, with a row"] : ["lost", "a row without its file!"];
  return stored ? ["file", "stored, without a row"] : ["none", "not stored"];
}

/** One line for each file, one column for each moment. */
function show(moments) {
  const names = new Set(MOMENTS.flatMap((moment) => moments[moment]?.files ?? []));
  element("moments").replaceChildren(
    ...[...names].sort((one, other) => shortened(one).localeCompare(shortened(other))).map((name) => {
      const line = document.createElement("tr");
      const heading = Object.assign(document.createElement("th"), { scope: "row", textContent: shortened(name), title: name });
      const cells = MOMENTS.map((moment) => {
        const [kind, words] = stateOf(name, moments[moment]);
        const mark = Object.assign(document.createElement("span"), { className: `mark ${kind}`, title: words });
        mark.append(Object.assign(document.createElement("span"), { className: "quiet", textContent: words }));
        const cell = document.createElement("td");
        cell.append(mark);
        return cell;
      });
      line.append(heading, ...cells);
      return line;
    }),
  );
}

const isSettled = ({ rows, files }) => rows.length === files.length;

async function run(fail) {
  const buttons = [element("fail"), element("commit")];
  for (const button of buttons) button.disabled = true;
  try {
    const moments = await ask(`/rollback?fail=${fail}`, { method: "POST" });
    const begun = performance.now();
    const failed = moments.error !== null;
    element("ended").textContent = failed ? "At the rollback" : "At the commit";
    show(moments);
    conclude("waiting", failed ? "Rolled back." : "Committed. The worker deletes what rows no longer refer to…");
    for (let now = moments.ended; ; now = await ask("/rollback")) {
      moments.after = now;
      if (isSettled(now) || performance.now() > begun + PATIENCE) break;
      await pause(100);
    }
    show(moments);
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    const inTime = isSettled(moments.ended) ? "at once" : `${seconds} seconds later, by the journal’s worker`;
    if (!isSettled(moments.after)) {
      conclude("failed", "Some files are left to the journal’s worker, which has not deleted them yet.");
    } else if (failed) {
      const isSame = JSON.stringify(moments.before) === JSON.stringify(moments.after);
      const words = isSame ? "Rows and files are exactly those from before." : "Something differs from before!";
      conclude("failed", `The database refused a row (${moments.error}). The new files were deleted ${inTime}. ${words}`);
    } else {
      conclude("kept", `Committed: the new files are there with their rows. The old files were deleted ${inTime}.`);
    }
  } catch (problem) {
    conclude("failed", problem.message);
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
  show({ before: await ask("/rollback") });
  conclude("waiting", "Nothing has been run yet.");
} catch (problem) {
  conclude("failed", problem.message);
}
