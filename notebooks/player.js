// The player of `course.play`, called when its animated PNG has loaded: the picture becomes a canvas
// with a pause button and a slider. Where scripts are removed (GitHub, a notebook that is not
// trusted), the animated PNG stays and moves by itself. It needs no id: any number fit on a page.
async (image, fps) => {
  const bytes = Uint8Array.from(atob(image.src.split(",")[1]), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), width = view.getUint32(16), height = view.getUint32(20);
  const inflate = async (part) => {
    const stream = new Blob([part]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  // The file is that of `course.animate`: one palette, and a chunk of data for each frame.
  let palette, frames = [];
  for (let at = 8, size; at < bytes.length; at += 12 + size) {
    size = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.slice(at + 8, at + 8 + size);
    if (kind == "PLTE") palette = data;
    if (kind == "IDAT") frames.push(data);
    if (kind == "fdAT") frames.push(data.slice(4)); // a number stands before the data
  }
  frames = await Promise.all(frames.map(inflate));

  const make = (kind, given) => Object.assign(document.createElement(kind), given);
  const canvas = make("canvas", { width, height, title: image.alt, role: "img" });
  canvas.ariaLabel = image.alt;
  canvas.style.cssText = `display: block; width: ${image.width}px; image-rendering: pixelated`;
  const pen = canvas.getContext("2d"), pixels = pen.createImageData(width, height);
  const button = make("button", { type: "button" });
  const slider = make("input", { type: "range", min: 0, max: frames.length - 1, value: 0 });
  slider.ariaLabel = "frame";
  const label = make("span");
  let moves;
  const show = (k) => {
    for (let i = 0; i < width * height; i++) {
      const colour = 3 * frames[k][i + 1 + Math.floor(i / width)]; // a row begins with its filter, 0
      pixels.data.set([palette[colour], palette[colour + 1], palette[colour + 2], 255], 4 * i);
    }
    pen.putImageData(pixels, 0, 0);
    slider.value = k;
    label.textContent = ` frame ${k + 1} of ${frames.length}, ${(k / fps).toFixed(2)} s`;
  };
  const move = (on) => {
    moves = on;
    button.textContent = on ? "pause" : "play";
  };
  button.onclick = () => move(!moves);
  slider.oninput = () => (move(false), show(+slider.value));
  setInterval(() => {
    if (moves && canvas.isConnected) show((+slider.value + 1) % frames.length);
  }, 1000 / fps);
  const box = make("div");
  box.append(canvas, button, slider, label);
  show(0);
  move(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  image.replaceWith(box);
}
