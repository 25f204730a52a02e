// Samples, painted and filmed by the browser itself, so that nobody need look for files.

const SKIES = [
  ["#f6d9b8", "#d98f6c", "#5c4a5e", "dawn"],
  ["#dfe9ee", "#9fb9c6", "#41576a", "noon"],
  ["#2b2f55", "#6a4f7c", "#191a2e", "dusk"],
];

const TEXT = `Granite Storage

Files that commit and roll back with your rows.

Bytes stream into storage while they arrive. A small receipt goes into the row.
Nothing half-written, nothing wrong, nothing left behind.
`;

export async function* paint() {
  for (const sky of SKIES) yield await picture(sky);
  yield new File([TEXT], "read me.txt", { type: "text/plain" });
  const made = await film();
  if (made) yield made;
}

function canvasOf(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  return [canvas, canvas.getContext("2d")];
}

/** Ridges, one before the other, under a sky. */
async function picture([light, warm, dark, name]) {
  const [canvas, context] = canvasOf(2400, 1800);
  context.scale(2, 2);
  const sky = context.createLinearGradient(0, 0, 0, 700);
  sky.addColorStop(0, name === "dusk" ? dark : light);
  sky.addColorStop(1, name === "dusk" ? warm : light);
  context.fillStyle = sky;
  context.fillRect(0, 0, 1200, 900);
  context.fillStyle = name === "noon" ? "#ffffff" : "#ffe9c4";
  context.beginPath();
  context.arc(300 + Math.random() * 600, 260, 64, 0, 2 * Math.PI);
  context.fill();
  const ridges = 6;
  for (let ridge = 0; ridge < ridges; ridge++) {
    context.fillStyle = `color-mix(in oklab, ${warm}, ${dark} ${(100 * ridge) / (ridges - 1)}%)`;
    outline(context, 340 + ridge * 90, 110 - ridge * 8);
    context.fill();
  }
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.86));
  return new File([blob], `${name}.jpg`, { type: blob.type });
}

function outline(context, height, roughness) {
  const waves = [1, 2.3, 5.1, 11.7].map((frequency) => [frequency, roughness / frequency, Math.random() * 7]);
  context.beginPath();
  context.moveTo(0, 900);
  for (let x = 0; x <= 1200; x += 4) {
    context.lineTo(x, waves.reduce((y, [frequency, size, phase]) => y + size * Math.sin((x / 190) * frequency + phase), height));
  }
  context.lineTo(1200, 900);
  context.closePath();
}

/** A film of lichen that grows on a stone, three seconds long. */
async function film(seconds = 3) {
  const type = ["video/webm;codecs=vp8", "video/mp4"].find((one) => window.MediaRecorder?.isTypeSupported(one));
  if (!type) return null;
  const [canvas, context] = canvasOf(640, 480);
  const spots = Array.from({ length: 60 }, () => [Math.random() * 640, Math.random() * 480, 6 + Math.random() * 40]);
  const draw = (share) => {
    context.fillStyle = "#3a3d40";
    context.fillRect(0, 0, 640, 480);
    spots.forEach(([x, y, size], number) => {
      const grown = Math.max(0, Math.min(1, share * 3 - (2 * number) / spots.length));
      context.fillStyle = ["#c3d46b", "#9aac4b", "#d9c97b"][number % 3];
      context.beginPath();
      context.arc(x, y, size * grown, 0, 2 * Math.PI);
      context.fill();
    });
  };
  draw(0);
  const recorder = new MediaRecorder(canvas.captureStream(25), { mimeType: type });
  const pieces = [];
  recorder.ondataavailable = ({ data }) => pieces.push(data);
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  const started = new Promise((resolve) => (recorder.onstart = resolve));
  recorder.start();
  await started; // which takes a while on a slow machine, and would be missing from the film
  const begun = performance.now();
  await new Promise((resolve) => {
    const timer = setInterval(() => {
      const share = (performance.now() - begun) / (1000 * seconds);
      draw(share);
      if (share < 1) return;
      clearInterval(timer);
      resolve();
    }, 40);
  });
  recorder.stop();
  await stopped;
  const [essence] = type.split(";");
  return new File(pieces, `lichen.${essence.split("/")[1]}`, { type: essence });
}
