// Draws each <figure data-timeline> from the JSON inside it: a row per lane, seconds along, zoomed by wheel, drag and keys.
for (const figure of document.querySelectorAll("figure[data-timeline]")) {
  const { lanes, units, spans } = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), words = figure.querySelector("output"), pen = canvas.getContext("2d");
  const names = lanes.map(([name]) => name), left = 68, row = 26, end = Math.max(...spans.map(span => span[2] + span[3]));
  let from = 0, to = end;

  const at = seconds => left + (seconds - from) / (to - from) * (canvas.clientWidth - left - 8);
  const secondsAt = x => from + (x - left) / (canvas.clientWidth - left - 8) * (to - from);

  function draw() {
    const width = canvas.clientWidth, height = row * names.length + 26, sharp = window.devicePixelRatio || 1;
    canvas.width = width * sharp; canvas.height = height * sharp; canvas.style.height = height + "px";
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle";
    pen.save(); pen.beginPath(); pen.rect(left, 0, width - left - 8, height); pen.clip();
    // A column of pixels is as high as the share of its time in which the lane is busy.
    const busy = lanes.map(() => new Float64Array(width + 1)), edges = [];
    let drawn = 0;
    for (const [lane, , start, length] of spans) {
      if (start + length < from || start > to) continue;
      const begin = Math.max(at(start), left), finish = Math.min(at(start + length), width - 8);
      for (let x = Math.floor(begin); x < finish; x++) busy[lane][x] += Math.min(finish, x + 1) - Math.max(begin, x);
      if (finish - begin > 6) edges.push([lane, begin]);
      drawn++;
    }
    busy.forEach((columns, lane) => {
      pen.fillStyle = lanes[lane][1];
      columns.forEach((share, x) => {
        const high = Math.min(share, 1) * (row - 6);
        if (high > 0) pen.fillRect(x, lane * row + row - 3 - high, 1, high);
      });
    });
    pen.fillStyle = "#fff";
    for (const [lane, x] of edges) pen.fillRect(x, lane * row + 3, 1, row - 6); // parts spans that are wide enough
    pen.restore();
    pen.fillStyle = "#333";
    names.forEach((name, lane) => pen.fillText(name, 2, lane * row + row / 2));
    const step = 10 ** Math.floor(Math.log10((to - from) / 2)), digits = Math.max(0, -Math.floor(Math.log10(step)));
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step * Math.ceil((to - from) / step / 10)) {
      pen.fillRect(at(tick), row * names.length, 1, 5);
      pen.fillText(tick.toFixed(digits) + " s", at(tick) + 3, row * names.length + 13);
    }
    canvas.dataset.drawn = drawn; canvas.dataset.from = from; canvas.dataset.to = to;
  }

  function show(begin, finish) {
    const length = Math.min(Math.max(finish - begin, 1e-5), end);
    from = Math.min(Math.max(begin, 0), end - length); to = from + length;
    draw();
  }

  const zoom = (factor, around) => show(around - (around - from) * factor, around + (to - around) * factor);
  const move = share => show(from + share * (to - from), to + share * (to - from));

  canvas.addEventListener("wheel", event => { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : .8, secondsAt(event.offsetX)); }, { passive: false });
  canvas.addEventListener("pointerdown", event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", event => {
    if (event.buttons) { move(-event.movementX / (canvas.clientWidth - left - 8)); return; }
    const lane = Math.floor(event.offsetY / row), seconds = secondsAt(event.offsetX);
    const under = spans.find(span => span[0] === lane && span[2] <= seconds && seconds <= span[2] + span[3]);
    words.textContent = under ? `${names[under[0]]} ${units[under[1]]}: ${(under[3] * 1e3).toFixed(3)} ms from ${under[2].toFixed(4)} s` : "";
  });
  const press = key => {
    const middle = (from + to) / 2;
    const keys = { "+": () => zoom(.8, middle), "-": () => zoom(1.25, middle), "0": () => show(0, end), "ArrowLeft": () => move(-.1), "ArrowRight": () => move(.1) };
    return keys[key] && (keys[key](), true);
  };
  canvas.addEventListener("keydown", event => { if (press(event.key)) event.preventDefault(); });
  for (const button of figure.querySelectorAll("button[data-key]")) button.addEventListener("click", () => press(button.dataset.key));
  window.addEventListener("resize", draw);
  figure.closest("details").addEventListener("toggle", draw); // folded, it has no width
  draw();
}
